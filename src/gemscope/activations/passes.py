"""Forward passes of a harvest: one after the other where copies overlap with them, two at a time on a CPU.

One pass of a small model cannot keep all threads of a CPU busy: between two products, and while another thread
tokenizes or writes, some wait. Two passes, each on half of the threads, fill each other's gaps.
"""

import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from types import TracebackType
from typing import TypeVar

import torch

from gemscope.core.arrays import Float, Tensor
from gemscope.models.gemma import Gemma

Item = TypeVar("Item")
Moved = TypeVar("Moved")
Landed = TypeVar("Landed")

AT_ONCE = 2
"""Passes at a time on a CPU of at least so many threads."""
_SETTING = threading.Lock()
"""Held while numbers of threads are set, for the last one that is set is everybody's."""


class Scratch:
    """Memory that is used again: what is allocated anew is cleared by the system page by page, which takes longer than
    the work done in it.
    """

    def __init__(self) -> None:
        self._found: dict[tuple[torch.device, torch.dtype], Tensor] = {}

    def like(self, x: Float[Tensor, "rows width"], dtype: torch.dtype) -> Float[Tensor, "rows width"]:
        """Room for ``x``, holding anything; gone when the same is asked for again."""
        there = self._found.get((x.device, dtype))
        if there is None or there.numel() < x.numel():
            there = self._found[x.device, dtype] = torch.empty(x.numel(), dtype=dtype, device=x.device)
        return there[: x.numel()].view(x.shape)


class Passes:
    """Who makes the passes; a context manager, at whose end all of them are through."""

    def __init__(self, gemma: Gemma) -> None:
        threads = torch.get_num_threads()
        self._own, self._gemma = threading.local(), gemma
        self._pool: ThreadPoolExecutor | None = None
        self._ahead = 1
        if gemma.device.type == "cpu" and threads >= AT_ONCE:
            self._ahead, self._pool = AT_ONCE, _sharing(threads)

    def __enter__(self) -> "Passes":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)

    @property
    def gemma(self) -> Gemma:
        """The model of the thread that asks."""
        if self._pool is None:
            return self._gemma
        if not hasattr(self._own, "gemma"):
            self._own.gemma = self._gemma.twin()
        return self._own.gemma

    @property
    def scratch(self) -> Scratch:
        """Memory of the thread that asks."""
        if not hasattr(self._own, "scratch"):
            self._own.scratch = Scratch()
        return self._own.scratch

    def each(
        self, items: Iterable[Item | None], start: Callable[[Item], Moved], land: Callable[[Item, Moved], Landed]
    ) -> Iterator[tuple[Item, Landed]]:
        """Each item with ``land(item, start(item))``, in order; without threads the next one is started before one
        lands. None among the items says that the next one has to wait until one more has landed.
        """
        ahead = deque[tuple[Item, Callable[[], Landed]]]()
        for item in items:
            if item is not None:
                ahead.append((item, self._begun(item, start, land)))
            while ahead and (item is None or len(ahead) > self._ahead):
                first, landed = ahead.popleft()
                yield first, landed()
                item = first
        for first, landed in ahead:
            yield first, landed()

    def _begun(
        self, item: Item, start: Callable[[Item], Moved], land: Callable[[Item, Moved], Landed]
    ) -> Callable[[], Landed]:
        """What waits for the end of a pass that has begun."""
        if self._pool is not None:
            return self._pool.submit(lambda: land(item, start(item))).result
        moved = start(item)
        return lambda: land(item, moved)


def _sharing(threads: int) -> ThreadPoolExecutor:
    """Threads with an equal share of ``threads`` each."""
    pool, together = ThreadPoolExecutor(AT_ONCE, "pass", _take, (threads // AT_ONCE,)), threading.Barrier(AT_ONCE)
    with _SETTING:
        try:
            wait([pool.submit(together.wait) for _ in range(AT_ONCE)])
        except BaseException:
            together.abort()
            pool.shutdown(wait=False)
            raise
        finally:
            torch.set_num_threads(threads)  # what new threads begin with is what was set last
    return pool


def _take(threads: int) -> None:
    """This thread's share; what is asked for first is settled, whatever another thread sets later."""
    torch.set_num_threads(threads)
    torch.get_num_threads()
