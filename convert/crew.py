"""Several threads on one job, one result after the other: what comes out does not depend on how many there are."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass(frozen=True)
class Crew:
    """``count`` threads, each of which computes with one; without a pool it is the caller's own."""

    count: int = 1
    _pool: ThreadPoolExecutor | None = None

    def map(self, function: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Result]:
        """Results in the order of ``items``, of which ``count`` are under way and as many may wait to be taken."""
        if self._pool is None:
            return map(function, items)
        return in_order(self._pool, function, items, ahead=2 * self.count)


@contextmanager
def crew(count: int) -> Iterator[Crew]:
    """Threads for the time of a context, none of which keeps gradients."""
    if count <= 1:
        yield Crew()
        return
    with ThreadPoolExecutor(count, thread_name_prefix="crew", initializer=_without_gradients) as pool:
        yield Crew(count, pool)


def in_order(pool: ThreadPoolExecutor, function: Callable[[Item], Result], work: Iterable[Item], *, ahead: int) -> Iterator[Result]:
    """Results in the order of ``work``, at most ``ahead`` of them started and not yet taken. A failure stops what has not begun."""
    waiting: deque[Future[Result]] = deque()
    try:
        for item in work:
            if len(waiting) == ahead:
                yield waiting.popleft().result()
            waiting.append(pool.submit(function, item))
        while waiting:
            yield waiting.popleft().result()
    finally:
        for future in waiting:
            future.cancel()


def _without_gradients() -> None:
    import torch

    torch.set_grad_enabled(False)
