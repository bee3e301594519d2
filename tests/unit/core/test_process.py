"""What is freed stays within reach while long work goes on, and goes back afterwards."""

import ctypes
import subprocess
import sys

import pytest

from gemscope.core.process import quick_turns

_ROUNDS = """
import resource, sys
import numpy as np
from contextlib import nullcontext
from gemscope.core.process import kept_memory

def rounds(count):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(count):
        blocks = [np.ones(20 << 20, np.uint8) for _ in range(6)]
        del blocks
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

def resident():
    return int(open("/proc/self/statm").read().split()[1])

with kept_memory() if sys.argv[1] == "kept" else nullcontext():
    rounds(1)
    again, inside = rounds(4), resident()
print(again, inside - resident())
"""
PAGES = 6 * (20 << 20) // 4096


def _glibc() -> bool:
    return sys.platform == "linux" and hasattr(ctypes.CDLL(None), "mallopt")


@pytest.mark.skipif(not _glibc(), reason="only glibc has these thresholds")
def test_freed_memory_is_cleared_once_and_given_back_at_the_end() -> None:
    def run(how: str) -> tuple[int, int]:
        done = subprocess.run([sys.executable, "-c", _ROUNDS, how], capture_output=True, text=True, check=True)
        again, given_back = map(int, done.stdout.split())
        return again, given_back

    again, given_back = run("kept")
    assert given_back > PAGES / 2
    assert again < run("usual")[0] / 4


def test_the_interval_of_the_lock_is_set_and_set_back() -> None:
    before = sys.getswitchinterval()
    with pytest.raises(KeyError), quick_turns():
        assert sys.getswitchinterval() < before / 10
        raise KeyError
    assert sys.getswitchinterval() == before
