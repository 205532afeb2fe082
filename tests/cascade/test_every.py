"""Something done again and again: it begins, goes on, and ends when told."""

import threading
import time

from shortlist.cascade.every import Every


def test_it_is_called_until_it_is_stopped():
    called, thrice = [], threading.Event()

    def work():
        called.append(threading.current_thread().name)
        if len(called) == 3:
            thrice.set()

    looks = Every(0.01, work, "looks")
    looks.start()
    assert thrice.wait(5)
    looks.stop()
    count = len(called)
    time.sleep(0.05)
    assert len(called) == count
    assert set(called) == {"looks"}


def test_the_first_call_comes_after_the_time_between_two():
    called = []
    looks = Every(30.0, lambda: called.append(1), "looks")
    looks.start()
    began = time.perf_counter()
    looks.stop()
    assert time.perf_counter() - began < 1.0  # stopping waits for no turn
    assert called == []


def test_a_call_that_hangs_is_not_waited_for_long():
    started, gate = threading.Event(), threading.Event()

    def work():
        started.set()
        gate.wait(10)

    looks = Every(0.05, work, "looks")
    looks.start()
    assert started.wait(5)
    began = time.perf_counter()
    looks.stop()
    assert time.perf_counter() - began < 2.0
    gate.set()


def test_stopping_what_never_started_does_nothing():
    Every(1.0, lambda: None, "looks").stop()
