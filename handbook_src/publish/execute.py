"""Execute one chapter with papermill, watch its clock, keep its outputs."""

from __future__ import annotations

import copy
import datetime
import os
import platform
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import jupytext
import nbformat

from handbook_src.errors import DataError
from handbook_src.publish.book import Book, write
from handbook_src.publish.chapters import Chapter
from handbook_src.publish.fingerprint import device_name
from handbook_src.publish.locate import line_of_cell
from handbook_src.publish.stopwatch import Stopwatch

#: Seconds that a kernel may take to start; a busy machine has needed 40.
KERNEL_START = 120
ANSI = re.compile(r"\x1b\[[0-9;]*m")


@dataclass(frozen=True)
class Task:
    """One chapter to execute: under which key its outputs are kept, within which seconds here."""

    chapter: Chapter
    key: str
    parameters: dict[str, Any] = field(default_factory=dict)
    limit: float | None = None
    slowness: float = 1.0


@dataclass(frozen=True)
class Failure:
    """Why a chapter failed, and where: cell counted from 1, line in the text."""

    why: str
    cell: int | None = None
    line: int | None = None
    trace: tuple[str, ...] = ()


@dataclass(frozen=True)
class Outcome:
    """What came of one chapter: ``executed``, ``cached``, ``failed`` or ``skipped``."""

    page: str
    state: str
    seconds: float = 0.0
    failure: Failure | None = None
    slowness: float = 1.0


def kernel_environment(book: Book, threads: int = 1) -> dict[str, str]:
    """What every kernel sees, in the build and in the test alike.

    One thread, because sums over several threads differ in their last bits from
    run to run, and because the cores are already taken by other chapters.
    """
    return {
        "PYTHONHASHSEED": "0",
        "PYTHONPATH": str(book.root),
        "HANDBOOK_FIGURES": "svg",
        "OMP_NUM_THREADS": str(threads),
        "MKL_NUM_THREADS": str(threads),
        "OPENBLAS_NUM_THREADS": str(threads),
        "TQDM_DISABLE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "PYDEVD_DISABLE_FILE_VALIDATION": "1",
        "JUPYTER_PREFER_ENV_PATH": "1",  # never a kernel of the same name from the home folder
        "HF_HUB_OFFLINE": "1",  # no chapter needs the network
    }


def read(path: Path) -> Any:
    """A chapter's text as a notebook; whoever changes it copies it first."""
    return parse(path.read_text("utf8"))


@cache
def parse(text: str) -> Any:
    """Parsed once a build, with cell ids that don't change from run to run."""
    notebook = jupytext.reads(text, fmt="md")
    for number, cell in enumerate(notebook.cells):
        cell["id"] = f"cell-{number}"
    return notebook


def entry(book: Book, chapter: Chapter, key: str) -> Path:
    """Where the executed notebook of this key is kept."""
    return book.cache / f"{chapter.name.replace('/', '.')}-{key}.ipynb"


def execute(book: Book, task: Task, report: Callable[[int], None] = lambda cell: None) -> Outcome:
    """Run the chapter's cells; keep the notebook in the cache, or in ``failed`` with its reason."""
    chapter = task.chapter
    notebook = read(chapter.source)
    watch = Stopwatch(task.limit, report)
    failed = book.failed / f"{chapter.name.replace('/', '.')}.ipynb"
    failure = run(book, task, notebook, failed, watch)
    done = nbformat.read(failed, as_version=4) if failed.exists() else notebook
    seconds = watch.seconds
    if failure is None and not any(c.get("execution_count") for c in done.cells if not _injected(c)):
        failure = Failure("it executed no cell")
    if failure is None and task.limit is not None and seconds > task.limit:
        failure = too_slow(task, seconds, task.limit)
    if failure is not None:
        return Outcome(chapter.page, "failed", seconds, failure)
    done.metadata["handbook"] = {
        **dict(notebook.metadata.get("handbook", {})),
        "key": task.key,
        "slowness": task.slowness,
        "verified": verified(task.parameters, seconds),
    }
    write(entry(book, chapter, task.key), nbformat.writes(done).encode())
    failed.unlink()
    return Outcome(chapter.page, "executed", seconds, slowness=task.slowness)


def run(book: Book, task: Task, notebook: Any, out: Path, watch: Stopwatch) -> Failure | None:
    """Papermill's part; every way in which it can fail becomes a :class:`Failure`."""
    import papermill
    from papermill.exceptions import PapermillExecutionError
    from traitlets.config import Config

    folder = book.staged(task.chapter.page).parent
    folder.mkdir(parents=True, exist_ok=True)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.unlink(missing_ok=True)
    try:
        papermill.execute_notebook(
            copy.deepcopy(notebook),
            str(out),
            parameters=task.parameters,
            kernel_name="python3",
            cwd=str(folder),
            progress_bar=False,
            start_timeout=KERNEL_START,
            timeout_func=watch,
            shutdown_kernel="immediate",  # a graceful end takes 1.4 s once torch is loaded
            # ipykernel 7 warns about TCP on every start otherwise
            config=Config(KernelManager={"transport_encryption": "auto"}),
        )
    except PapermillExecutionError as error:
        trace = ANSI.sub("", "\n".join(error.traceback)).splitlines()
        why = f"{error.ename}: {ANSI.sub('', error.evalue)}".splitlines()[0]
        return located(task.chapter, notebook, error.source, why, trace)
    except Exception as error:  # a kernel that died, or that the stopwatch has ended: the others go on
        cells = [c for c in notebook.cells if c.cell_type == "code"]
        position = watch.cell - 1 - bool(task.parameters and _takes_parameters(cells))
        source = cells[position].source if 0 <= position < len(cells) else ""
        why = f"{type(error).__name__}: {error}".strip()
        if watch.expired and task.limit is not None:
            why = too_slow(task, watch.seconds, task.limit).why + "; stopped"
        return located(task.chapter, notebook, source, why, [])
    finally:
        watch.stop()
    return None


def too_slow(task: Task, seconds: float, limit: float) -> Failure:
    budget = task.chapter.budget
    why = f"it took {seconds:.1f} s, more than {limit / budget / task.slowness:.3g} times its budget of {budget:g} s"
    return Failure(f"{why}, times {task.slowness:.2f} for this machine" if task.slowness > 1 else why)


def located(chapter: Chapter, notebook: Any, source: str, why: str, trace: list[str]) -> Failure:
    """Find the failed cell again in the notebook and in the text."""
    for number, cell in enumerate(notebook.cells):
        if cell.cell_type == "code" and cell.source == source:
            code_cells = [c for c in notebook.cells[:number] if c.cell_type == "code"]
            first = line_of_cell(chapter.source, len(code_cells))
            inside = _line_in_cell(trace)
            line = None if first is None else first + inside - 1
            return Failure(why, number + 1, line, tuple(trace))
    return Failure(why, trace=tuple(trace))


def _line_in_cell(trace: list[str]) -> int:
    """The line of the cell's own frame: the first that IPython marks as a cell."""
    for line in trace:
        if found := re.search(r"(?:Cell In\s?\[\d+\], line |<ipython-input[^>]*>, line )(\d+)", line):
            return int(found[1])
    return 1


def _edited(now: str | None, ran: str | None) -> DataError:
    def cell(source: str | None) -> str:
        return "no further cell" if source is None else repr(source[:60])

    return DataError(
        "the chapter's code",
        got=f"{cell(now)} in the text",
        want=f"{cell(ran)}, as it was executed",
        remedy="The text was edited while it ran: run the command again.",
    )


def _takes_parameters(cells: list[Any]) -> bool:
    return any("parameters" in c.metadata.get("tags", []) for c in cells)


def _injected(cell: Any) -> bool:
    return "injected-parameters" in cell.metadata.get("tags", [])


def verified(parameters: dict[str, Any], seconds: float) -> dict[str, Any]:
    """The stamp of one execution: when, on what, with which versions."""
    from importlib.metadata import PackageNotFoundError, version

    def of(name: str) -> str | None:
        try:
            return version(name)
        except PackageNotFoundError:
            return None

    device = str(parameters.get("device", "cpu"))
    name = f"CPU, {platform.machine()}, {os.cpu_count()} cores" if device == "cpu" else device_name(device)
    return {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "device": name,
        "torch": of("torch"),
        "triton": of("triton"),
        "python": platform.python_version(),
        "seconds": round(seconds, 1),
        "parameters": parameters,
    }


def merge(text: Any, done: Any) -> Any:
    """The chapter as it is written now, with the outputs of an execution of the same code."""
    notebook = copy.deepcopy(text)
    runs = [c for c in done.cells if c.cell_type == "code"]
    cells = []
    for cell in notebook.cells:
        if cell.cell_type == "code":
            if runs and _injected(runs[0]):
                injected = runs.pop(0)
                injected.metadata = nbformat.from_dict({"tags": ["injected-parameters", "remove-cell"]})
                cells.append(injected)
            ran = runs.pop(0) if runs else None
            if ran is None or ran.source != cell.source:
                raise _edited(cell.source, None if ran is None else ran.source)
            cell.outputs, cell.execution_count = ran.outputs, ran.execution_count
        cells.append(cell)
    if runs:
        raise _edited(None, runs[0].source)
    notebook.cells = cells
    for number, cell in enumerate(cells):
        cell["id"] = f"cell-{number}"
    notebook.metadata.pop("jupytext", None)
    notebook.metadata["language_info"] = {"name": "python"}
    notebook.metadata["handbook"] = {**notebook.metadata.get("handbook", {}), **done.metadata["handbook"]}
    return notebook
