"""A few worker processes that execute chapters and say where they are.

The standard pool does not tell which task is running, fails everything when one
worker dies, and leaves kernels behind on Ctrl-C; this one is small enough to do
better. Workers are spawned, never forked: their kernels must not inherit torch.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from typing import Any

from handbook_src.publish.book import Book
from handbook_src.publish.execute import Failure, Outcome, Task, execute

_SPAWN = multiprocessing.get_context("spawn")


@dataclass
class Worker:
    """A process, the line to it, and what it is at."""

    process: Any
    line: Connection
    task: Task | None = None


def work(book: Book, line: Connection, environment: dict[str, str]) -> None:
    """A worker's life: take a task, execute it, send what came of it, until the line is closed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    book.build.mkdir(exist_ok=True)
    with book.log.open("ab") as log:  # a kernel's stray words would tear the progress bar
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    os.environ.update(environment)
    with contextlib.suppress(EOFError, BrokenPipeError, ConnectionResetError):
        while True:
            task = line.recv()
            try:
                outcome = execute(book, task, lambda cell: line.send(cell))
            except Exception as error:  # a fault of the press must not stop the other chapters
                outcome = Outcome(
                    task.chapter.page, "failed", failure=Failure(f"the press: {type(error).__name__}: {error}")
                )
            line.send(outcome)


class Pool:
    """Runs tasks on ``jobs`` workers; use as a context manager, so that nothing is left running."""

    def __init__(self, book: Book, jobs: int, environment: dict[str, str]) -> None:
        self.book, self.jobs, self.environment = book, jobs, environment
        self.workers: list[Worker] = []

    def __enter__(self) -> Pool:
        return self

    def __exit__(self, *exc: object) -> None:
        self.end()

    def hire(self) -> Worker:
        ours, theirs = _SPAWN.Pipe()
        process = _SPAWN.Process(target=work, args=(self.book, theirs, self.environment), daemon=False)
        process.start()
        theirs.close()
        worker = Worker(process, ours)
        self.workers.append(worker)
        return worker

    def run(
        self,
        tasks: list[Task],
        started: Callable[[Task], None],
        cell: Callable[[Task, int], None],
        finished: Callable[[Outcome], None],
        tick: Callable[[], None],
    ) -> None:
        """Work the tasks off in order; the callbacks follow what happens."""
        waiting = list(tasks)
        for _ in range(min(self.jobs, len(waiting))):
            self.give(self.hire(), waiting, started)
        while busy := [w for w in self.workers if w.task is not None]:
            for line in wait([w.line for w in busy], timeout=0.5):
                worker = next(w for w in busy if w.line is line)
                self.hear(worker, waiting, started, cell, finished)
            tick()

    def give(self, worker: Worker, waiting: list[Task], started: Callable[[Task], None]) -> None:
        worker.task = waiting.pop(0) if waiting else None
        if worker.task is not None:
            started(worker.task)
            worker.line.send(worker.task)

    def hear(
        self,
        worker: Worker,
        waiting: list[Task],
        started: Callable[[Task], None],
        cell: Callable[[Task, int], None],
        finished: Callable[[Outcome], None],
    ) -> None:
        task = worker.task
        assert task is not None
        try:
            message = worker.line.recv()
        except (EOFError, ConnectionResetError):
            worker.process.join()
            self.workers.remove(worker)
            why = f"its process died with exit status {worker.process.exitcode}; out of memory?"
            finished(Outcome(task.chapter.page, "failed", failure=Failure(why)))
            if waiting:
                self.give(self.hire(), waiting, started)
            return
        if isinstance(message, Outcome):
            finished(message)
            self.give(worker, waiting, started)
        else:
            cell(task, message)

    def end(self) -> None:
        """Close the lines; idle workers leave by themselves, busy ones are ended with their kernels."""
        for worker in self.workers:
            worker.line.close()
        busy = [w for w in self.workers if w.task is not None]
        family = [p for w in busy for p in descendants(w.process.pid)]
        for process in family:
            with contextlib.suppress(Exception):
                process.kill()
        for worker in self.workers:
            worker.process.join(10)
            if worker.process.is_alive():
                worker.process.kill()
                worker.process.join()
        self.workers.clear()


def descendants(pid: int) -> list[Any]:
    """A process and all below it; kernels live in sessions of their own, so no signal reaches both."""
    import psutil

    try:
        top = psutil.Process(pid)
        return [*top.children(recursive=True), top]
    except psutil.Error:
        return []
