"""An interrupt that Python would drop."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

DELAY_S = 0.01


@contextmanager
def no_lost_interrupts() -> Iterator[None]:
    """Within, what the handlers of SIGTERM and SIGINT raise is not lost, once both raise the same.

    A handler runs between any two instructions of the main thread. Where these are a destructor's,
    or those of a weak reference's callback (every import has one), Python says that the exception
    is ignored, and goes on. Here SIGTERM comes again, a moment later, instead.
    """
    before = sys.unraisablehook

    def deliver_again(lost: sys.UnraisableHookArgs) -> None:
        if isinstance(lost.exc_value, KeyboardInterrupt | SystemExit):
            threading.Timer(DELAY_S, os.kill, (os.getpid(), signal.SIGTERM)).start()
        else:
            before(lost)

    sys.unraisablehook = deliver_again
    try:
        yield
    finally:
        sys.unraisablehook = before
