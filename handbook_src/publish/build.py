"""The ``book`` command: execute what changed, stage it all, build the site."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

from handbook_src.errors import DataError
from handbook_src.publish import report, site
from handbook_src.publish.beat import clock, step
from handbook_src.publish.book import Book
from handbook_src.publish.chapters import Chapter, Skip, chapters, choose, skips
from handbook_src.publish.execute import Failure, Outcome, Task, entry, kernel_environment, read
from handbook_src.publish.fingerprint import Fingerprints
from handbook_src.publish.pool import Pool
from handbook_src.publish.progress import Progress, expected, keep_times, known_times
from handbook_src.publish.speed import slowness
from handbook_src.publish.stage import Stage
from handbook_src.publish.unchanged import Mark

PATIENCE = 3.0
#: What a render is expected to take before one has been timed here.
SITE_SECONDS = 60.0
#: Executed notebooks kept a chapter, so that going back to another branch costs nothing.
KEPT = 5


@dataclass(frozen=True)
class Options:
    """What was asked for on the command line."""

    only: list[str] = field(default_factory=list)
    parameters: dict[str, Any] = field(default_factory=dict)
    jobs: int | None = None
    patience: float | None = None

    def limit(self, chapter: Chapter, slowness: float) -> float | None:
        """Seconds after which a chapter fails. Budgets are for the quick setting; the full one has none."""
        if self.patience is None and self.parameters.get("quick") is False:
            return None
        return (self.patience or PATIENCE) * chapter.budget * slowness


@dataclass
class Plan:
    """What stands already, and what is to be executed."""

    cached: list[Outcome] = field(default_factory=list)
    tasks: list[Task] = field(default_factory=list)
    kept: dict[str, Path] = field(default_factory=dict)
    cells: dict[str, int] = field(default_factory=dict)
    broken: list[Outcome] = field(default_factory=list)


def plan(book: Book, wanted: list[Chapter], others: list[Chapter], options: Options) -> Plan:
    """Look every chapter up in the cache; longest first among those to execute."""
    prints = Fingerprints(book)
    made = Plan()
    todo: list[tuple[Chapter, str]] = []
    for chapter in [*wanted, *others]:
        try:
            notebook = read(chapter.source)
            key = prints.key(notebook, chapter.page, options.parameters)
        except Exception as error:  # a text that doesn't parse must not stop the other chapters
            made.broken.append(Outcome(chapter.page, "failed", failure=Failure(f"its text can't be read: {error}")))
            continue
        made.kept[chapter.page] = path = entry(book, chapter, key)
        made.cells[chapter.page] = sum(c.cell_type == "code" for c in notebook.cells)
        before = known(path, chapter.page)
        limit = options.limit(chapter, before.slowness) if before else None
        if before and (limit is None or before.seconds <= limit):
            made.cached.append(before)
        elif chapter in wanted:
            path.unlink(missing_ok=True)
            todo.append((chapter, key))
    times = known_times(book)
    todo.sort(key=lambda pair: -expected(pair[0], times))
    slow = slowness(kernel_environment(book)) if todo else 1.0
    made.tasks = [Task(c, key, options.parameters, options.limit(c, slow), slow) for c, key in todo]
    return made


def known(path: Path, page: str) -> Outcome | None:
    """What a kept execution says of itself; ``None`` when there is none that can be read."""
    try:
        facts = json.loads(path.read_text("utf8"))["metadata"]["handbook"]
        return Outcome(page, "cached", facts["verified"]["seconds"], slowness=facts.get("slowness", 1.0))
    except (OSError, ValueError, KeyError):
        return None


def execute(book: Book, made: Plan, jobs: int, threads: int) -> list[Outcome]:
    """Run the plan's tasks; on Ctrl-C what is finished stays in the cache."""
    if not made.tasks:
        return []
    import matplotlib.font_manager  # noqa: F401  # builds the font cache once, and not with a warning in each kernel

    book.cache.mkdir(parents=True, exist_ok=True)
    book.log.write_bytes(b"")
    progress = Progress(made.tasks, jobs, known_times(book), made.cells)
    try:
        with Pool(book, jobs, kernel_environment(book, threads)) as pool:
            pool.run(made.tasks, progress.started, progress.cell, progress.finished, progress.tick)
    finally:
        progress.close()
        keep_times(book, {o.page: o.seconds for o in progress.done if o.state == "executed"})
    return progress.done


Render = Callable[[Book, bool], int]


def render(the: Book, strict: bool) -> int:
    """The site, from the stage; warnings are errors where the whole book is there."""
    start, usual = time.monotonic(), known_times(the).get("site", SITE_SECONDS)
    print()
    try:
        with step("Rendering the site", lambda t: f"{site.far(the.site_log)}, about {clock(max(usual - t, 1))} left"):
            fresh = site.build(the.stage, the.build, strict=strict)
    except site.SiteError as error:
        print(error)
        return 1
    if fresh:
        keep_times(the, {"site": time.monotonic() - start})
    return 0


def book(root: Path, options: Options, render: Render = render) -> int:
    """Build everything; the exit status."""
    the = Book(root)
    start = time.monotonic()
    with alone(the), interruptible():
        try:
            code = _build(the, options, render)
        except KeyboardInterrupt:
            kept = len(list(the.cache.glob("*.ipynb")))
            print(
                f"\nStopped after {clock(time.monotonic() - start)}. Every chapter that was finished is kept "
                f"({kept} in {the.cache}); the same command goes on from there.",
                file=sys.stderr,
            )
            return 130
    if code == 0:
        index = the.html / "index.html"
        print(f"\nThe site stands after {clock(time.monotonic() - start)}: {index}")
        print(f"Open it with any browser:  {opener()} {index}\n                           or {index.as_uri()}")
    return code


def _build(the: Book, options: Options, render: Render) -> int:
    mark = Mark(the, options)
    if before := mark.said():
        print(f"{before}\n\nNothing has changed since.")
        return 0
    everything = chapters(the)
    left_out = skips(the)
    wanted = [c for c in choose(everything, options.only) if c.page not in left_out]
    others = [c for c in everything if c not in wanted and c.page not in left_out]
    stage = Stage(the)
    stage.plain(everything)
    made = plan(the, wanted, others, options)
    jobs = min(options.jobs or cores(), max(len(made.tasks), 1))
    threads = 1 if options.parameters.get("quick", True) else max(1, cores() // jobs)
    print(f"{len(wanted)} chapters: {len(made.tasks)} to execute, {jobs} at a time; the rest is cached.", flush=True)
    if made.tasks and made.tasks[0].slowness >= 1.1:
        print(report.stretched(made.tasks[0].slowness), flush=True)
    ran = execute(the, made, jobs, threads)
    outcomes = settle(stage, everything, made, ran, left_out)
    by_page = {c.page: c for c in everything}
    said = "\n\n".join(filter(None, [report.times(outcomes, by_page), report.skipped(left_out)]))
    print("\n" + said)
    prune(the)
    if any(o.failure for o in outcomes):
        print("\n" + report.failures(outcomes, by_page, the.root))
        failed = sum(o.failure is not None for o in outcomes)
        print(f"\n{failed} of {len(wanted)} chapters failed, so the site was not built. The rest is cached.")
        return 1
    code = render(the, len(others) == 0)
    if code == 0:
        mark.keep(said)
    return code


def settle(
    stage: Stage, everything: list[Chapter], made: Plan, ran: list[Outcome], left_out: dict[str, Skip]
) -> list[Outcome]:
    """Stage each chapter by what came of it; the outcomes in reading order."""
    by_page = {o.page: o for o in [*made.cached, *made.broken, *ran]}
    outcomes = []
    for chapter in everything:
        outcome = by_page.get(chapter.page)
        if chapter.page in left_out:
            skip = left_out[chapter.page]
            stage.stub(chapter, f"This page is not executed until {skip.until}: {skip.reason}")
            outcomes.append(Outcome(chapter.page, "skipped"))
        elif outcome is None:
            stage.stub(chapter, "This page was not asked for in this build.")
        elif outcome.failure:
            stage.stub(chapter, f"This page failed when it was last executed: {outcome.failure.why}")
            outcomes.append(outcome)
        else:
            try:
                stage.chapter(chapter, made.kept[chapter.page])
            except DataError as error:  # edited while it ran
                stage.stub(chapter, str(error))
                outcome = Outcome(chapter.page, "failed", outcome.seconds, Failure(str(error)))
            outcomes.append(outcome)
    stage.close()
    return outcomes


def prune(the: Book) -> None:
    """Keep the newest executions of each chapter."""
    groups: dict[str, list[Path]] = {}
    for path in the.cache.glob("*.ipynb"):
        groups.setdefault(path.stem.rpartition("-")[0], []).append(path)
    for paths in groups.values():
        for path in sorted(paths, key=lambda p: -p.stat().st_mtime)[KEPT:]:
            path.unlink()


def cores() -> int:
    """The cores that this process may use, which in a container can be fewer than there are."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def opener() -> str:
    return {"darwin": "open", "win32": "start"}.get(sys.platform, "xdg-open")


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """A polite end from outside (a CI job that is cancelled) is treated like Ctrl-C."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextlib.contextmanager
def alone(the: Book) -> Iterator[None]:
    """One build at a time in one folder; the second waits. The system frees the lock of a process that died."""
    the.build.mkdir(parents=True, exist_ok=True)
    with (the.build / "lock").open("w") as lock:
        try:
            import fcntl
        except ImportError:  # not on Windows
            yield
            return
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print("Another build is running in this folder; waiting for it ...", flush=True)
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield
