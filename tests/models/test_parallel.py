from __future__ import annotations

import threading
import time

import pytest
import torch

from eckart.models.parallel import parallel_map


def test_results_keep_their_order_whatever_they_cost():
    items = [5, 1, 4, 2, 3]
    for workers in (None, 1, 2, 8):
        assert parallel_map(lambda i: i * i, items, cost=float, workers=workers) == [25, 1, 16, 4, 9]
    assert parallel_map(lambda i: i, [], cost=float, workers=2) == []


def test_the_costliest_starts_first():
    order: list[int] = []
    lock = threading.Lock()

    def work(item: int) -> None:
        with lock:
            order.append(item)
        time.sleep(0.01)

    parallel_map(work, [1, 2, 9, 3], cost=float, workers=2)
    assert set(order[:2]) == {9, 3}


def test_one_worker_is_the_callers_thread():
    assert parallel_map(lambda _: threading.get_ident(), [1, 2], cost=float, workers=1) == [threading.get_ident()] * 2
    assert parallel_map(lambda _: threading.get_ident(), [1], cost=float, workers=4) == [threading.get_ident()]


def test_threads_are_one_inside_and_as_before_outside():
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        assert parallel_map(lambda _: torch.get_num_threads(), range(4), cost=float, workers=2) == [1] * 4
        assert torch.get_num_threads() == 2
        # Torch's own number of threads is the default number of workers.
        assert len(set(parallel_map(lambda _: time.sleep(0.01) or threading.get_ident(), range(4), cost=float))) == 2
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
@pytest.mark.parametrize("workers", [1, 2])
def test_an_error_comes_out_and_what_has_not_begun_does_not_begin(error, workers):
    before = torch.get_num_threads()
    begun: list[int] = []

    def work(item: int) -> None:
        begun.append(item)
        if item == 0:
            raise error("stop")
        time.sleep(0.02)

    with pytest.raises(error, match="stop"):
        parallel_map(work, list(range(50)), cost=lambda item: -item, workers=workers)
    assert torch.get_num_threads() == before
    assert len(begun) < 10
