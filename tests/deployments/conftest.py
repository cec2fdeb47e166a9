"""Makes the helpers of this folder, and the tiny models of the exactness tests, importable."""

import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent / "exactness")]
