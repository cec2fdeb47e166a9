"""What the memory manager moves, against what it must: exact counters and paired timings.

python bench/memory.py line      90 % of the weights on NVMe: a decode pass against reading the same
                                 bytes and nothing else, and that against O_DIRECT reads at their
                                 best block size
python bench/memory.py bytes     disk bytes a pass at 10, 50 and 90 % of the weights resident,
                                 against the bytes that are not
python bench/memory.py rotation  128 running sequences with device blocks for 8, the others' KV on
                                 the host or on NVMe, against all on the device and the roofline
python bench/memory.py rotation-long  the same with long sequences and a KV head for each query head
python bench/memory.py dtypes    KV on NVMe as it is, in int8 and in fp8: bytes and time of a pass,
                                 and how far the tokens' log-probabilities are off
python bench/memory.py prefix    the first token after a cached prefix of 2,000 tokens whose KV lies
                                 on NVMe, against computing the prefix
python bench/memory.py experts   a mixture of 64 experts a layer, 4 for a token, most on NVMe: bytes
                                 and time of a decode pass against the planner's forecast
python bench/memory.py long      2,000 mixed requests, many given up, through tiny tiers: every
                                 answer against transformers.generate, and what is left behind
"""

from __future__ import annotations

from memory_kv import dtypes, prefix, rotation, rotation_long
from memory_long import long
from memory_weights import experts, line, moved_bytes
from report import run_mode

MODES = {
    "line": line,
    "bytes": moved_bytes,
    "rotation": rotation,
    "rotation-long": rotation_long,
    "dtypes": dtypes,
    "prefix": prefix,
    "experts": experts,
    "long": long,
}

if __name__ == "__main__":
    run_mode(__doc__, MODES, rounds=3)
