"""A chapter's time: what it would have taken with a core to itself.

Seconds in which the kernel was ready to run while other processes had the cores
are not counted (Linux tells them per process). On a quiet machine that is the
time on the wall; on one with eight busy processes on two cores a chapter took
255 s on the wall and 73 s by this measure. One that sleeps or hangs is counted in
full.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil

SAMPLE_SECONDS = 0.25


class Stopwatch:
    """Starts with the first cell; ends the kernel when the limit is passed.

    Papermill calls it before each cell, for a time limit of that cell, and gets
    none: a limit set then could not know what other processes will take.
    """

    def __init__(self, limit: float | None, report: Callable[[int], None]) -> None:
        self.limit, self.report = limit, report
        self.cell = 0
        self.expired = False
        self._start: float | None = None
        self._end: float | None = None
        self._kernel: psutil.Process | None = None
        self._before = self._waited = 0.0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __call__(self, cell: Any) -> None:
        if self._start is None:
            self._start = time.perf_counter()
            self._kernel = own_kernel()
            self._before = self._waited = waited(self._kernel)
            self._thread.start()
        self.cell += 1
        self.report(self.cell)

    def stop(self) -> None:
        self._end = time.perf_counter()
        self._stop.set()

    @property
    def seconds(self) -> float:
        """Since the first cell began, without the wait for a core."""
        if self._start is None:
            return 0.0
        return max((self._end or time.perf_counter()) - self._start - (self._waited - self._before), 0.0)

    def _watch(self) -> None:
        while not self._stop.wait(SAMPLE_SECONDS):
            self._waited = max(waited(self._kernel), self._waited)
            if self.limit is not None and self.seconds > self.limit:
                self.expired = True
                self.stop()
                if self._kernel is not None:
                    self._kernel.kill()


def own_kernel() -> psutil.Process | None:
    """The kernel below this process: a worker has one at a time."""
    for child in psutil.Process().children(recursive=True):
        try:
            if any("ipykernel" in word for word in child.cmdline()):
                return child
        except psutil.Error:
            continue
    return None


def waited(process: psutil.Process | None) -> float:
    """Seconds that a process was ready while others had the cores; 0 where the system doesn't tell."""
    if process is None:
        return 0.0
    try:
        return int(Path(f"/proc/{process.pid}/schedstat").read_text("ascii").split()[1]) / 1e9
    except (OSError, ValueError, IndexError):
        return 0.0
