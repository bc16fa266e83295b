"""Independent matrix problems side by side: one thread each, instead of all threads on one.

LAPACK's eigensolvers gain little from a second core, two problems at once gain almost all of it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

__all__ = ["parallel_map"]

T = TypeVar("T")
R = TypeVar("R")


def parallel_map(
    function: Callable[[T], R], items: Sequence[T], *, cost: Callable[[T], float], workers: int | None = None
) -> list[R]:
    """Results of ``function`` for every item, in order; the costliest items start first.

    Args:
        function: called with one item; releases the GIL while it works, as torch does.
        items: the inputs.
        cost: a number that grows with the time an item takes.
        workers: threads; default torch's own number of threads. With one, or one item, nothing is started
            and the item has all of torch's threads.
    """
    threads = torch.get_num_threads()
    count = min(workers or threads, len(items))
    if count <= 1:
        return [function(item) for item in items]
    order = sorted(range(len(items)), key=lambda index: -cost(items[index]))
    try:
        # The number of threads is a setting of each thread, but new threads start with the last one set.
        with ThreadPoolExecutor(count, initializer=lambda: torch.set_num_threads(1)) as pool:
            pending = {index: pool.submit(function, items[index]) for index in order}
            try:
                return [pending[index].result() for index in range(len(items))]
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)  # what has not begun need not begin
                raise
    finally:
        torch.set_num_threads(threads)
