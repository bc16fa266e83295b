from __future__ import annotations

import signal
import threading

import pytest

from eckart.models.interrupts import uninterrupted


def test_what_is_inside_is_done_to_its_end():
    before, done = signal.getsignal(signal.SIGINT), []

    def steps():
        with uninterrupted():
            for step in range(3):
                signal.raise_signal(signal.SIGINT)
                done.append(step)

    with pytest.raises(KeyboardInterrupt):
        steps()
    assert done == [0, 1, 2]
    assert signal.getsignal(signal.SIGINT) is before


def test_an_error_inside_is_not_lost_where_nobody_interrupts():
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(ZeroDivisionError), uninterrupted():
        1 / 0  # noqa: B018
    assert signal.getsignal(signal.SIGINT) is before


def test_other_threads_have_nothing_to_hold():
    done = []

    def work():
        with uninterrupted():
            done.append(1)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert done == [1]
