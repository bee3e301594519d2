"""Ctrl-C and SIGTERM during a run: noted, obeyed between two updates, so that the checkpoint can be written first."""

import signal
import threading
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import Any


@dataclass
class Stop:
    """What this process has been asked for."""

    signal: int | None = None


def obey(number: int | None) -> None:
    """End the run as the signal would: KeyboardInterrupt for Ctrl-C, exit code 143 for SIGTERM; nothing for None."""
    if number == signal.SIGINT:
        raise KeyboardInterrupt
    if number is not None:
        raise SystemExit(128 + number)


@contextmanager
def stopping() -> Generator[Stop]:
    """Note the two signals while inside; a second one takes effect at once. Outside the main thread: no change."""
    stop = Stop()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    before: dict[int, Any] = {}

    def note(number: int, frame: FrameType | None) -> None:
        obey(stop.signal)
        stop.signal = number

    for number in (signal.SIGINT, signal.SIGTERM):
        before[number] = signal.signal(number, note)
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
