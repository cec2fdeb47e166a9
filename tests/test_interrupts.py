"""Signals that find a program where Python drops exceptions."""

from __future__ import annotations

import subprocess
import sys

import pytest

PROGRAM = """
import os, signal, sys, time
from contextlib import nullcontext
from giantserve.interrupts import no_lost_interrupts

def interrupt(signum, frame):
    raise {raised}

class Dropped:
    def __del__(self):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.2)

signal.signal(signal.SIGTERM, interrupt)
try:
    with {context}:
        Dropped()
        time.sleep(1)
except (KeyboardInterrupt, SystemExit):
    print("interrupted")
else:
    print("lost")
"""


def run(context: str, raised: str) -> tuple[str, str]:
    program = PROGRAM.format(context=context, raised=raised)
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    return done.stdout, done.stderr


@pytest.mark.parametrize("raised", ["KeyboardInterrupt", "SystemExit(signum)"])
def test_an_interrupt_in_a_destructor_comes_again(raised: str) -> None:
    assert run("no_lost_interrupts()", raised) == ("interrupted\n", "")


def test_without_it_the_interrupt_is_lost() -> None:
    said, complained = run("nullcontext()", "KeyboardInterrupt")
    assert said == "lost\n"
    assert "Exception ignored in" in complained


def test_other_exceptions_are_told_as_ever() -> None:
    said, complained = run("no_lost_interrupts()", "ValueError('odd')")
    assert said == "lost\n"
    assert "Exception ignored in" in complained and "ValueError: odd" in complained
