"""How far the build is: a bar in a terminal, elsewhere a line at least every 30 s."""

from __future__ import annotations

import json
import sys
import time
from dataclasses import dataclass, field
from typing import Any

from handbook_src.publish.beat import EVERY, clock
from handbook_src.publish.book import Book, write
from handbook_src.publish.chapters import Chapter
from handbook_src.publish.execute import Outcome, Task

#: Seconds that a chapter costs beside its cells: a kernel, and most often `import torch`.
OVERHEAD = 4.0


def known_times(book: Book) -> dict[str, float]:
    """Seconds that each chapter took when it was last executed here."""
    try:
        found: dict[str, float] = json.loads(book.times.read_text("utf8"))
    except (FileNotFoundError, ValueError):
        return {}
    return found


def keep_times(book: Book, seconds: dict[str, float]) -> None:
    times = {**known_times(book), **{page: round(s, 1) for page, s in seconds.items()}}
    write(book.times, json.dumps(times, indent=1, sort_keys=True).encode())


def expected(chapter: Chapter, times: dict[str, float]) -> float:
    """The last known time, else the budget."""
    return times.get(chapter.page, chapter.budget) + OVERHEAD


@dataclass
class Progress:
    """Follows a pool's callbacks; knows what is running and what remains."""

    tasks: list[Task]
    jobs: int
    times: dict[str, float]
    cells: dict[str, int] = field(default_factory=dict)
    out: Any = field(default_factory=lambda: sys.stderr if sys.stderr.isatty() else sys.stdout)

    def __post_init__(self) -> None:
        self.start = time.monotonic()
        self.done: list[Outcome] = []
        self.running: dict[str, float] = {}
        self.at: dict[str, int] = {}
        self.said = self.start
        self.bar: Any = None
        if self.out.isatty():
            from tqdm import tqdm

            self.bar = tqdm(
                total=len(self.tasks),
                file=self.out,
                leave=False,
                disable=False,
                mininterval=0.2,
                dynamic_ncols=True,
                bar_format="{n_fmt}/{total_fmt} |{bar:20}| {desc}",
            )

    def started(self, task: Task) -> None:
        self.running[task.chapter.page] = time.monotonic()
        self.at[task.chapter.page] = 0
        if self.bar is None:
            self._say(f"  start     {task.chapter.name}")
        self.tick()

    def cell(self, task: Task, number: int) -> None:
        self.at[task.chapter.page] = number
        self.tick()

    def finished(self, outcome: Outcome) -> None:
        self.running.pop(outcome.page, None)
        self.done.append(outcome)
        name = outcome.page.removeprefix("book/")
        line = f"  {outcome.state:9} {name}  {outcome.seconds:.1f} s"
        if self.bar is None:
            self._say(f"{line}  {self.far()}")
        else:
            self.bar.write(line, file=self.out)
            self.bar.update(1)
        self.tick()

    def tick(self) -> None:
        running = ", ".join(f"{p.removeprefix('book/')}{self._cell(p)}" for p in self.running)
        if self.bar is not None:
            self.bar.set_description_str(f"{clock(self.elapsed)} elapsed, {self.left()} · {running}")
        elif time.monotonic() - self.said >= EVERY:
            self._say(f"  running   {running}  {self.far()}")

    def far(self) -> str:
        left = f"; {self.left()}" if len(self.done) < len(self.tasks) else ""
        return f"[{len(self.done)}/{len(self.tasks)}, {clock(self.elapsed)} elapsed{left}]"

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()

    @property
    def elapsed(self) -> float:
        return time.monotonic() - self.start

    def left(self) -> str:
        """What remains: never less than the longest chapter, nor than an even share of the rest."""
        now = time.monotonic()
        over = {o.page for o in self.done}
        rest = [
            max(expected(t.chapter, self.times) - (now - self.running.get(t.chapter.page, now)), 1.0)
            for t in self.tasks
            if t.chapter.page not in over
        ]
        return f"about {clock(max(max(rest), sum(rest) / self.jobs))} left" if rest else "done"

    def _cell(self, page: str) -> str:
        total = self.cells.get(page)
        return f" {self.at[page]}/{total}" if total and self.at[page] else ""

    def _say(self, line: str) -> None:
        print(line, file=self.out, flush=True)
        self.said = time.monotonic()
