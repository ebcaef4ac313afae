"""Recorded experiments: run once at a size that convinces, shown in every build.

A chapter opens its records once, and decorates what it measures::

    experiment = experiments("norm", quick, device)

    @experiment(quick=dict(seeds=1, steps=3), full=dict(seeds=10, steps=2000))
    def norm_race(seeds, steps):
        ...
        return {"batch norm": [...], "layer norm": [...]}    # numbers, words, lists, dicts

    race = norm_race()

A build runs the quick setting, which proves that the code still works and returns data of
the recorded form, and hands out the *recorded* data. ``python3 -m handbook_src record`` runs
the full setting. ``quick = False`` in a notebook runs it in place.
"""

from __future__ import annotations

import contextlib
import datetime
import hashlib
import json
import linecache
import os
import platform
import random
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from handbook_src.errors import ConfigError, DataError
from handbook_src.program import cut

#: A chapter's records are read by people and travel in its notebook.
LARGEST = 200_000
#: Significant digits that are kept of a number: more than any figure shows.
DIGITS = 6
_carried: dict[str, dict[str, Any]] = {}


def carry(name: str, text: str) -> None:
    """Give a notebook that left the repository the records of its chapter."""
    _carried[name] = json.loads(text)


class Data(dict[str, Any]):
    """What an experiment returned, and where it comes from.

    ``recorded`` is false for the quick run that stands in where no valid record is:
    nothing may be concluded from it. ``settings`` are those that the data were made with.
    """

    def __init__(self, data: Mapping[str, Any], settings: Mapping[str, Any], recorded: bool) -> None:
        super().__init__(data)
        self.settings, self.recorded = dict(settings), recorded


@dataclass(frozen=True)
class Records:
    """The records of one chapter: experiment, then device, then entry."""

    name: str
    entries: dict[str, dict[str, Any]]

    @classmethod
    def load(cls, name: str, folder: Path | None = None) -> Records:
        """From the notebook itself where it carries them, else from the file beside it."""
        path = (folder or Path()) / f"{name}.record.json"
        if name in _carried:
            return cls(name, _carried[name])
        if not path.exists():
            return cls(name, {})
        try:
            found = json.loads(path.read_text("utf8"))
        except ValueError as error:
            raise broken(path.name, f"{error}") from error
        return cls(name, found)

    def entry(self, experiment: str, device: str) -> dict[str, Any] | None:
        """One entry, if there is one; its data must be those that were recorded."""
        entry = self.entries.get(experiment, {}).get(device)
        if entry is not None and entry.get("digest") != digest(entry):
            raise broken(f"{self.name}.record.json: {experiment}", "data that don't fit their digest")
        return entry


def broken(what: str, got: str) -> DataError:
    return DataError(
        what, got=got, want="what was recorded", remedy="Restore the file from git, or delete it and record again."
    )


def digest(entry: Mapping[str, Any]) -> str:
    """Ties data and settings together, so that an edit by hand shows."""
    text = json.dumps([entry.get("settings"), entry.get("data")], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Experiments:
    """The experiments of one chapter; called as a decorator with the two settings."""

    records: Records
    quick: bool
    device: str
    cells: tuple[str, ...] | None = None

    def __call__(
        self, *, quick: Mapping[str, Any], full: Mapping[str, Any], alone: bool = False
    ) -> Callable[[Callable[..., Any]], Experiment]:
        """Decorate a function of the settings; ``alone`` where it measures time."""
        if set(quick) != set(full):
            raise ConfigError(
                "experiment", got=f"quick {sorted(quick)} and full {sorted(full)}",
                want="the same settings twice", remedy="Give every setting in both.",
            )  # fmt: skip
        return lambda function: Experiment(self, function, dict(quick), dict(full), alone)


def experiments(name: str, quick: bool = True, device: str = "cpu") -> Experiments:
    """The experiments of the chapter ``name``, whose records stand in ``<name>.record.json``."""
    return Experiments(Records.load(name), quick, device)


@dataclass(frozen=True)
class Experiment:
    """A function of its settings whose full result is recorded."""

    page: Experiments
    function: Callable[..., Any]
    quick: dict[str, Any]
    full: dict[str, Any]
    alone: bool

    @property
    def name(self) -> str:
        return self.function.__name__

    def __call__(self) -> Data:
        """The recorded data, after the quick setting has shown that the code still works."""
        if not self.page.quick:
            return Data(self.run(self.full), self.full, recorded=True)
        entry = self.valid()
        seen = self.run(self.quick)
        if entry is None:
            show_banner(self.name)
            return Data(seen, self.quick, recorded=False)
        compare(form(seen), form(entry["data"]), f"{self.page.records.name}.record.json: {self.name}")
        return Data(entry["data"], entry["settings"], recorded=True)

    def on(self, device: str) -> Data | None:
        """The data recorded on another device, or None: not measured."""
        entry = self.valid(device)
        return None if entry is None else Data(entry["data"], entry["settings"], recorded=True)

    def valid(self, device: str | None = None) -> dict[str, Any] | None:
        """The entry of the device, where it belongs to the code as it stands."""
        entry = self.page.records.entry(self.name, (device or self.page.device).partition(":")[0])
        return entry if entry is not None and entry["source"] == self.hash else None

    @property
    def hash(self) -> str:
        return cut(self.page.cells or cells_so_far(self.function), self.name).hash

    def run(self, settings: Mapping[str, Any]) -> dict[str, Any]:
        """One run under its own seed; the page's random numbers go on as if nothing had been."""
        with own_random_numbers():
            return plain(self.function(**settings), self.name)

    def record(self) -> dict[str, Any]:
        """Run the full setting and say all that a reader must know of it."""
        start = time.monotonic()
        data = self.run(self.full)
        entry = {
            "settings": plain(self.full, self.name),
            **circumstances(self.page.device, time.monotonic() - start),
            "source": self.hash,
            "data": data,
        }
        return {"digest": digest(entry), **entry}


def cells_so_far(function: Callable[..., Any]) -> list[str]:
    """The cells executed in this notebook, in order; for a function in a file, the file.

    A kernel keeps each cell's source for its tracebacks, as if it were a file in one folder.
    Its history would be shorter to read, but nbval runs cells without one.
    """
    path = Path(function.__code__.co_filename)
    cells = {name: x for name, x in linecache.cache.items() if len(x) == 4 and x[1] is None}
    if str(path) not in cells:
        return [path.read_text("utf8")]
    return ["".join(x[2]) for name, x in cells.items() if Path(name).parent == path.parent]


@contextlib.contextmanager
def own_random_numbers(seed: int = 0) -> Iterator[None]:
    import numpy as np
    import torch

    before = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        random.seed(seed)
        np.random.seed(seed)
        torch.manual_seed(seed)
        yield
    random.setstate(before[0])
    np.random.set_state(before[1])


def plain(value: Any, where: str) -> Any:
    """As JSON keeps it: numbers of six digits, words, lists, and dicts with words as keys."""
    if isinstance(value, Mapping):
        for key in value:
            if not isinstance(key, str):
                raise ConfigError(
                    where, got=f"the key {key!r}", want="words as keys, as JSON has them",
                    remedy="Use str(key), or a list of pairs.",
                )  # fmt: skip
        return {key: plain(v, f"{where}[{key!r}]") for key, v in value.items()}
    if isinstance(value, list | tuple):
        return [plain(v, where) for v in value]
    if isinstance(value, float):
        return float(f"{value:.{DIGITS}g}")
    if value is None or isinstance(value, bool | int | str):
        return value
    if hasattr(value, "tolist"):  # a tensor, an array, or a number of either
        return plain(value.tolist(), where)
    raise ConfigError(
        where, got=type(value).__name__, want="numbers, words, lists, dicts", remedy="Return what a figure needs."
    )


def form(data: Any) -> Any:
    """The form of data: keys, and kinds of what is in them; a list is what its first item is."""
    if isinstance(data, dict):
        return {key: form(value) for key, value in data.items()}
    if isinstance(data, list):
        return [form(data[0])] if data else []
    return None if data is None else "words" if isinstance(data, str) else "number"


def compare(seen: Any, recorded: Any, where: str) -> None:
    """The quick run's form against the record's; nothing and an empty list fit anything."""
    if seen in (None, []) or recorded in (None, []):
        return
    if isinstance(seen, dict) and isinstance(recorded, dict) and set(seen) == set(recorded):
        for key in seen:
            compare(seen[key], recorded[key], f"{where}[{key!r}]")
    elif isinstance(seen, list) and isinstance(recorded, list):
        compare(seen[0], recorded[0], where)
    elif seen != recorded:
        raise DataError(
            where, got=f"{seen} in the quick run", want=f"{recorded}, as recorded",
            remedy="Return data of one form in both settings: lists may differ in length, not in kind.",
        )  # fmt: skip


def circumstances(device: str, seconds: float) -> dict[str, Any]:
    """When, on what, with which versions."""
    import numpy as np
    import torch

    cuda = torch.device(device).type == "cuda"
    return {
        "seconds": round(seconds, 1),
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "device": torch.cuda.get_device_name(device) if cuda else f"CPU, {platform.machine()}",
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "versions": {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__},
    }


def stamp(entry: Mapping[str, Any]) -> str:
    """One line under a figure: date, device, seeds, seconds."""
    seeds = entry["settings"].get("seeds")
    facts = [f"Recorded {entry['date']}", f"{entry['device']}, {entry['cores']} cores"]
    facts += [f"{seeds} seed{'s' * (seeds != 1)}"] if isinstance(seeds, int) else []
    return " · ".join([*facts, f"{entry['seconds']:,.0f} s"])


def show_banner(name: str) -> None:
    from IPython.display import display

    words = (
        f"No valid record of {name}: what is shown is its quick run, from which nothing follows. "
        "Claims that hang on it are open."
    )
    html = f'<div class="admonition warning handbook-unrecorded"><p>{escape(words)}</p></div>'
    display({"text/html": html, "text/plain": words}, raw=True)
