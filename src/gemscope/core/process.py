"""How the running process shares its lock and keeps its memory, while long work goes on."""

import ctypes
import sys
from collections.abc import Generator
from contextlib import contextmanager

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
_MMAP_MOST = 32 << 20
"""Bytes: glibc takes no larger one."""


@contextmanager
def quick_turns() -> Generator[None]:
    """Python's lock is handed on 25 times sooner: after every operation of a model its thread may have to wait for one
    that tokenizes or writes.
    """
    before = sys.getswitchinterval()
    sys.setswitchinterval(2e-4)
    try:
        yield
    finally:
        sys.setswitchinterval(before)


@contextmanager
def kept_memory() -> Generator[None]:
    """Memory that is freed stays with the process until the end, where glibc is the C library.

    Otherwise what a forward pass frees may go back to the system, which then clears it again page by page for the
    next one. Afterwards it is given back, and the thresholds are those that glibc's own adjusting ends at.
    """
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None
    if libc is None or not hasattr(libc, "mallopt") or not hasattr(libc, "malloc_trim"):
        yield
        return
    libc.mallopt(_MMAP_THRESHOLD, _MMAP_MOST)
    libc.mallopt(_TRIM_THRESHOLD, 2**31 - 1)
    try:
        yield
    finally:
        libc.mallopt(_TRIM_THRESHOLD, 2 * _MMAP_MOST)
        libc.malloc_trim(0)
