"""The ``record`` command: run the full setting of every experiment that has no valid record."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from handbook_src.errors import ConfigError, DataError, HandbookError
from handbook_src.experiment import LARGEST, Records
from handbook_src.program import cut, experiments
from handbook_src.publish.book import Book, write
from handbook_src.publish.chapters import Chapter, chapters, choose
from handbook_src.publish.execute import kernel_environment, read
from handbook_src.publish.progress import clock


@dataclass(frozen=True)
class Job:
    """One experiment of one chapter on one device."""

    chapter: Chapter
    name: str
    device: str
    state: str
    seconds: float
    alone: bool

    @property
    def title(self) -> str:
        return f"{self.chapter.name} {self.name}"

    @property
    def kind(self) -> str:
        return self.device.partition(":")[0]


@dataclass(frozen=True)
class Options:
    """What was asked for on the command line."""

    chapters: list[str]
    only: list[str]
    device: str = "cpu"
    minutes: float | None = None
    jobs: int | None = None
    check: bool = False
    again: bool = False


def code_cells(chapter: Chapter) -> list[str]:
    return [c.source for c in read(chapter.source).cells if c.cell_type == "code"]


def file_of(chapter: Chapter) -> Path:
    return chapter.source.with_suffix(".record.json")


def jobs_of(chapter: Chapter, device: str) -> Iterator[Job]:
    """Every experiment of a chapter with the state of its record."""
    cells = code_cells(chapter)
    names = experiments(cells)
    records = Records.load(chapter.source.stem, chapter.source.parent)
    if stray := set(records.entries) - set(names):
        raise DataError(
            file_of(chapter).name, got=f"records of {', '.join(sorted(stray))}", want="experiments of the chapter",
            remedy="Take the entry out of the file: its experiment is gone or was renamed.",
        )  # fmt: skip
    for name in names:
        program = cut(cells, name)
        entry = records.entry(name, device.partition(":")[0])
        state = "missing" if entry is None else "valid" if entry["source"] == program.hash else "stale"
        alone = "alone=True" in program.statements[-1].text.partition("\ndef ")[0]
        yield Job(chapter, name, device, state, entry["seconds"] if entry else 0.0, alone)


def record(root: Path, options: Options) -> int:
    """Record what is missing or stale; the exit status is 1 where something is left."""
    book = Book(root)
    found = [j for c in choose(chapters(book), options.chapters) for j in jobs_of(c, options.device)]
    if unknown := set(options.only) - {j.name for j in found}:
        raise ConfigError(
            "--only", got=", ".join(sorted(unknown)), want=f"one of {', '.join(j.name for j in found)}",
            remedy="Check the spelling.",
        )  # fmt: skip
    chosen = [j for j in found if not options.only or j.name in options.only]
    todo = [j for j in chosen if options.again or j.state != "valid"]
    print(f"{len(chosen)} experiments, {len(chosen) - len(todo)} with a valid record.", flush=True)
    if options.check:
        for job in todo:
            print(f"  {job.state:8} {job.title}")
        return int(bool(todo))
    return Recorder(book, options, todo).run()


class Recorder:
    """Runs jobs in processes of their own, and keeps each as it finishes."""

    def __init__(self, book: Book, options: Options, todo: list[Job]) -> None:
        self.book, self.options, self.start = book, options, time.monotonic()
        # What measures time comes last, with nothing beside it.
        self.waiting = sorted(todo, key=lambda job: job.alone)
        self.running: dict[subprocess.Popen[bytes], tuple[Job, Path, float]] = {}
        self.done: list[tuple[Job, float]] = []
        self.failed: list[str] = []
        self.say: Callable[[str], None] = print

    def run(self) -> int:
        from tqdm import tqdm

        places = self.options.jobs or len(os.sched_getaffinity(0))
        with tempfile.TemporaryDirectory() as folder, tqdm(total=len(self.waiting), leave=False, disable=None) as bar:
            self.say = bar.write
            try:
                while self.running or (self.waiting and self.in_time()):
                    while self.waiting and self.in_time() and self.fits(places):
                        self.begin(self.waiting.pop(0), Path(folder))
                    self.gather(bar)
                    time.sleep(0.2)
            finally:
                for process in self.running:
                    process.kill()
        for line in self.failed:
            print(line, file=sys.stderr)
        left = len(self.waiting)
        print(f"{len(self.done)} recorded in {clock(self.elapsed)}, {len(self.failed)} failed, {left} left.")
        return int(bool(self.failed or left))

    @property
    def elapsed(self) -> float:
        return time.monotonic() - self.start

    def in_time(self) -> bool:
        return self.options.minutes is None or self.elapsed < 60 * self.options.minutes

    def fits(self, places: int) -> bool:
        """Whether the next job may start beside those that run."""
        alone = self.waiting[0].alone or any(job.alone for job, _, _ in self.running.values())
        return not self.running if alone else len(self.running) < places

    def begin(self, job: Job, folder: Path) -> None:
        out = folder / f"{job.chapter.source.stem}.{job.name}.json"
        settings = {**os.environ, **kernel_environment(self.book), "MPLBACKEND": "agg"}
        line = [sys.executable, "-m", "handbook_src.publish.record", str(job.chapter.source), job.name, job.device]
        with out.with_suffix(".log").open("wb") as log:
            process = subprocess.Popen(
                [*line, str(out)], cwd=job.chapter.source.parent, env=settings, stdout=log, stderr=subprocess.STDOUT
            )
        self.running[process] = job, out, time.monotonic()
        self.say(f"  start     {job.title}{f'  (last time {clock(job.seconds)})' if job.seconds else ''}")

    def gather(self, bar: Any) -> None:
        for process in [p for p in self.running if p.poll() is not None]:
            job, out, began = self.running.pop(process)
            seconds = time.monotonic() - began
            try:
                if process.returncode:
                    raise RuntimeError(out.with_suffix(".log").read_text("utf8")[-3000:])
                keep(job, json.loads(out.read_text("utf8")))
            except (RuntimeError, HandbookError) as error:
                self.failed.append(f"\nFAILED {job.title}\n{error}")
                self.say(f"  failed    {job.title}  {clock(seconds)}")
            else:
                self.done.append((job, seconds))
                self.say(f"  recorded  {job.title}  {clock(seconds)}; {self.left()}")
            bar.update(1)

    def left(self) -> str:
        """From the last recordings' seconds, or from what others took now."""
        if not (rest := [*self.waiting, *(job for job, _, _ in self.running.values())]):
            return "nothing left"
        usual = sum(s for _, s in self.done) / len(self.done)
        return f"{len(rest)} left, about {clock(sum(job.seconds or usual for job in rest))} of one core"


def keep(job: Job, entry: dict[str, Any]) -> None:
    """Set one entry into the chapter's file, in one step."""
    path = file_of(job.chapter)
    entries = Records.load(job.chapter.source.stem, path.parent).entries
    entries.setdefault(job.name, {})[job.kind] = entry
    text = readable(entries)
    if len(text) > LARGEST:
        raise ConfigError(
            f"{path.name}: {job.name}", got=f"{len(text):,} bytes in all", want=f"at most {LARGEST:,}",
            remedy="Return what the figures show, not every step.",
        )  # fmt: skip
    write(path, text.encode())


def readable(entries: dict[str, Any]) -> str:
    """JSON with a line a key, and lists of numbers on one line."""
    text = json.dumps(dict(sorted(entries.items())), indent=1, ensure_ascii=False)
    return re.sub(r"\[\s+([^\[\]{}]*?)\s+\]", lambda m: "[" + re.sub(r"\n\s+", " ", m[1]) + "]", text) + "\n"


def commit(folder: Path) -> str:
    """The commit that the code stands on; + where it has been changed since."""
    line = ["git", "describe", "--always", "--dirty=+", "--abbrev=10", "--exclude=*"]
    found = subprocess.run(line, cwd=folder, capture_output=True, text=True)
    return found.stdout.strip()


def perform(source: Path, name: str, device: str, out: Path) -> None:
    """In a process of its own: execute the experiment's program, then its full setting."""
    from handbook_src.notebook import setup

    chapter = Chapter("", source)
    program = cut(code_cells(chapter), name)
    for other in jobs_of(chapter, device):
        if other.name in experiments([program.text]) and other.name != name and other.state != "valid":
            raise ConfigError(
                name, got=f"no valid record of {other.name}", want="what it builds on",
                remedy=f"Record {other.name} first.",
            )  # fmt: skip
    path = out.with_suffix(".py")  # a file, so that a traceback shows its lines
    path.write_text("\n".join(s.text for s in program.statements if not s.sets_parameters), "utf8")
    space: dict[str, Any] = {"__name__": "__main__", "quick": True, "seed": 0, "device": device}
    setup(0, device)
    exec(compile(path.read_text("utf8"), str(path), "exec"), space)
    entry = {**space[name].record(), "commit": commit(source.parent)}
    assert entry["source"] == program.hash, f"{name}: its program does not define itself"
    out.write_text(json.dumps(entry), "utf8")


if __name__ == "__main__":
    perform(Path(sys.argv[1]), sys.argv[2], sys.argv[3], Path(sys.argv[4]))
