"""The claims ledger: each claim with the verdict that the last run gave it.

A verdict is read from the executed notebooks of the book and from nowhere else,
and only from notebooks that are current, so none outlives its run.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from handbook_src.catalogue.table import Claim, claims
from handbook_src.errors import DataError
from handbook_src.judge import OPEN

CLAIM_TYPE = "application/vnd.handbook.claim+json"


@dataclass(frozen=True)
class Entry:
    """A claim and what became of it; ``verdict`` is ``open`` until a run settles it.

    ``chapter`` is the page without its suffix and ``anchor`` the place on it.
    """

    id: str
    component: str
    claim: str
    kind: str
    source: str
    quote: str
    link: str
    how: str
    verdict: str = OPEN
    figures: dict[str, str] = field(default_factory=dict)
    because: str = ""
    chapter: str = ""
    anchor: str = ""

    @property
    def origin(self) -> str:
        """Where the claim stands, as one line."""
        words = f": “{self.quote}”" if self.quote else ""
        return self.source + words + (f" <{self.link}>" if self.link else "")


def find_root(start: Path | None = None) -> Path | None:
    """The repository: the first folder upwards from here, or around this file, with a ``_toc.yml``."""
    here = (start or Path.cwd()).resolve()
    around = Path(__file__).resolve().parents[2]
    for folder in (here, *here.parents, around):
        if (folder / "_toc.yml").is_file() and (folder / "handbook_src").is_dir():
            return folder
    return None


def find_stage(start: Path | None = None) -> Path | None:
    """The folder of executed notebooks, or None while the book has not been built."""
    root = find_root(start)
    stage = root / "_build" / "stage" if root else None
    return stage if stage is not None and (stage / "book").is_dir() else None


def records(notebook: Path) -> Iterator[dict[str, Any]]:
    """The claim records among a notebook's outputs.

    Raises:
        DataError: the file is torn: not JSON, or not a notebook.
    """
    try:
        cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(
            str(notebook),
            got=f"{type(error).__name__}: {error}",
            want="an executed notebook",
            remedy="Build the book again: python3 -m handbook_src book.",
        ) from error
    for cell in cells:
        for output in cell.get("outputs", ()):
            record = output.get("data", {}).get(CLAIM_TYPE)
            if record is not None:
                yield record


def ledger(stage: Path | None = None, notebooks: Iterable[Path] | None = None) -> list[Entry]:
    """Every claim, settled where a notebook under ``stage`` settles it.

    Args:
        stage: the folder that holds ``book/**/*.ipynb``; None is ``_build/stage``
            of the repository, of which stale notebooks are left out.
        notebooks: count these files below ``stage`` only.

    Raises:
        DataError: two cells settle one claim, or a record names no claim.
    """
    if stage is None:
        stage = find_stage()
        notebooks = current(staged(stage)) if stage else []
    known = {c.id: c for c in claims()}
    settled: dict[str, Entry] = {}
    for notebook in staged(stage) if notebooks is None and stage else notebooks or ():
        chapter = notebook.relative_to(stage or notebook.parent).with_suffix("").as_posix()
        for record in records(notebook):
            entry = _settle(known, record, chapter)
            if entry.id in settled:
                raise DataError(
                    f"claim {entry.id}",
                    got=f"verdicts in {settled[entry.id].chapter} and {chapter}",
                    want="one cell that settles it",
                    remedy="Take the claim() call out of one of them and link to the other.",
                )
            settled[entry.id] = entry
    return [settled.get(c.id, Entry(**vars(c))) for c in claims()]


def _settle(known: dict[str, Claim], record: dict[str, Any], chapter: str) -> Entry:
    claim = known.get(record.get("id", ""))
    if claim is None:
        raise DataError(
            f"claim record in {chapter}",
            got=repr(record.get("id")),
            want="an id of claims.tsv",
            remedy="The claim was renamed or removed: run the chapter again.",
        )
    return Entry(
        **vars(claim),
        verdict=record["verdict"],
        figures=dict(record["figures"]),
        because=record["because"],
        chapter=chapter,
        anchor=f"claim-{claim.id}",
    )


def staged(stage: Path) -> list[Path]:
    """The executed notebooks under ``stage``."""
    return sorted(stage.glob("book/**/*.ipynb"))


def current(notebooks: Iterable[Path]) -> list[Path]:
    """Those that settle claims and whose code, sources and pins are still today's."""
    return [path for path, why in judged(notebooks) if not why]


def judged(notebooks: Iterable[Path]) -> list[tuple[Path, str]]:
    """Those that settle claims, each with the reason why its verdicts don't count, if there is one."""
    settling = [path for path in notebooks if next(records(path), None) is not None]
    try:  # the press needs what the book's environment installs
        from handbook_src.publish.chapters import current as up_to_date

        good = up_to_date(settling)
    except ImportError as error:
        return [(path, f"whether it is current can't be checked here ({error})") for path in settling]
    return [(path, "" if path in good else "its code, a source or a pin changed since it ran") for path in settling]
