"""A chapter's time leaves out what other processes took, and nothing else."""

import multiprocessing
import os
import time

import psutil
import pytest

from handbook_src.publish import stopwatch
from handbook_src.publish.stopwatch import Stopwatch

CALM = "the system does not tell how long a process waited"


def watch(limit=None):
    cells = []
    made = Stopwatch(limit, cells.append)
    made(None)
    return made, cells


def test_it_starts_with_the_first_cell_and_counts_cells():
    made = Stopwatch(None, lambda cell: None)
    assert made.seconds == 0
    made, cells = watch()
    made(None)
    made.stop()
    first = made.seconds
    time.sleep(0.05)
    assert cells == [1, 2]
    assert made.seconds == first


def test_sleep_counts_in_full():
    made, _ = watch()
    time.sleep(0.6)
    made.stop()
    assert 0.5 <= made.seconds < 5


def test_waiting_for_a_core_does_not_count(monkeypatch):
    elapsed = iter([2.0, *[2.4] * 1000])
    monkeypatch.setattr(stopwatch, "waited", lambda process: next(elapsed))
    made, _ = watch()
    time.sleep(0.7)
    made.stop()
    assert 0.2 <= made.seconds < 0.7


def test_past_the_limit_the_kernel_is_ended(monkeypatch):
    process = multiprocessing.get_context("spawn").Process(target=time.sleep, args=(60,))
    process.start()
    monkeypatch.setattr(stopwatch, "own_kernel", lambda: psutil.Process(process.pid))
    made, _ = watch(limit=0.3)
    process.join(20)
    assert not process.is_alive()
    assert made.expired
    assert made.seconds >= 0.3


@pytest.mark.skipif(stopwatch.waited(psutil.Process()) == 0, reason=CALM)
def test_the_system_tells_how_long_a_busy_process_waited():
    """Three busy processes on one core: each waits for about two thirds of the time."""
    if not hasattr(os, "sched_setaffinity"):
        pytest.skip(CALM)
    cores = os.sched_getaffinity(0)
    context = multiprocessing.get_context("spawn")
    busy = [context.Process(target=spin, args=({min(cores)},)) for _ in range(3)]
    for process in busy:
        process.start()
    for process in busy:
        process.join(60)
    assert all(process.exitcode == 0 for process in busy)


def spin(cores):
    os.sched_setaffinity(0, cores)
    me = psutil.Process()
    start, used, waited = time.perf_counter(), time.process_time(), stopwatch.waited(me)
    while time.perf_counter() - start < 1.5:
        pass
    wall = time.perf_counter() - start
    counted = wall - (stopwatch.waited(me) - waited)
    assert abs(counted - (time.process_time() - used)) < 0.3 * wall
