"""The card of a component: what one needs at three in the morning, on one screen."""

from __future__ import annotations

import re
import shutil
import textwrap
from collections.abc import Iterable
from pathlib import Path

from handbook_src.catalogue.docstring import Facts, followed, plain
from handbook_src.catalogue.ledger import Entry, current, find_root, find_stage, ledger, staged
from handbook_src.catalogue.notes import Note, notes
from handbook_src.catalogue.table import Component, claims, component, fold

INDENT = 10


def card(name: str) -> str:
    """Everything known about the component that answers to ``name``, as text.

    Raises:
        ConfigError: nothing answers to ``name``, or several components do.
    """
    row = component(name)
    said = followed(row.object) if row.object else []
    note = notes().get(row.id, Note())
    lines = [_heading(row), *_asked(row, name)]
    lines += _field("what", [_without_pointer(said[0].sentence) if said else note.what])
    lines += _field("formula", _formulas(said) or note.formula, verbatim=True)
    lines += _field("shapes", _shapes(said) or note.shapes, verbatim=True)
    lines += _field("typical", _section(said, "Typical values") or note.typical)
    lines += _field("import", [_import_line(row.object)] if row.status == "published" else [], verbatim=True)
    lines += _field("page", _page(row), verbatim=True)
    lines += _field("oracle", [row.oracle])
    lines += _field("source", row.source.split("; "))
    lines += _field("also", ["; ".join(row.synonyms)])
    for entry in _entries(row):
        lines += _field("claim", _claim(entry))
    if row.status == "planned":
        lines += ["", *_wrap(_planned(note), "")]
    return "\n".join(lines)


def _heading(row: Component) -> str:
    title = f"{row.id} - {row.title}"
    return f"{title}\n{row.part_name}, {row.status}\n"


def _asked(row: Component, name: str) -> list[str]:
    if fold(name) in (fold(row.id), fold(row.title)):
        return []
    shown = next((s for s in row.synonyms if fold(s) == fold(name)), name)
    return [f'You asked for "{shown}": that is another name or a variant of {row.id}.', ""]


def _planned(note: Note) -> str:
    if note.formula:
        return "Planned: the lines above are from the cited papers; no code and no proof stand here yet."
    return "Planned: no code, formula or proof stands here yet."


def _without_pointer(sentence: str) -> str:
    """``Divide by the root mean square: see a.b.c.`` without the part from ``see`` on."""
    return re.sub(r"[:;,.(]?\s*[Ss]ee (?:also )?(?:handbook_src\.|~)?[\w.]+\)?\.?$", ".", sentence)


def _formulas(said: list[Facts]) -> list[str]:
    """The lines of the first docstring's formulas that has any."""
    for found in said:
        if found.formulas:
            return [line for formula in found.formulas for line in _unaligned(formula).splitlines()]
    return []


def _unaligned(formula: str) -> str:
    """The formula without the marks that only align its lines on a page."""
    if r"\begin" in formula:
        return formula
    return re.sub(r"\s*\\\\(?:\[\w.]+\])?\s*$", "", formula.replace("&", ""), flags=re.MULTILINE)


def _shapes(said: list[Facts]) -> list[str]:
    return _section(said, "Shape", flow=False) or next((list(f.shapes) for f in said if f.shapes), [])


def _section(said: list[Facts], name: str, flow: bool = True) -> list[str]:
    """A section of the first docstring that has it; ``flow`` joins its wrapped lines."""
    text = next((f.sections[name] for f in said if f.sections.get(name)), "")
    if not flow:
        return [line.replace("``", "") for line in text.splitlines()]
    lines: list[str] = []
    for line in text.splitlines():
        if lines and not (lines[-1].endswith(".") and not line.startswith(" ")):
            lines[-1] += " " + line.strip()
        else:
            lines.append(line)
    return [plain(line) for line in lines if line.strip()]


def _import_line(path: str) -> str:
    module, _, name = path.rpartition(".")
    return f"from {module} import {name}"


def _page(row: Component) -> list[str]:
    if not row.chapter:
        return []
    lines = [f"{row.chapter}.md, section ({row.id})="]
    root = find_root()
    if root is not None:
        built = root / "_build" / "html" / f"{row.chapter}.html"
        shown = Path("_build", "html", f"{row.chapter}.html#{row.id}").as_posix()
        lines.append(shown if built.exists() else f"{shown} (not built yet: python3 -m handbook_src book)")
    return lines


def _entries(row: Component) -> list[Entry]:
    """The component's claims; only its own chapter's notebook is looked at."""
    if not any(c.component == row.id for c in claims()):
        return []
    stage = find_stage()
    own = [p for p in staged(stage) if p == stage / f"{row.chapter}.ipynb"] if stage else []
    return [e for e in ledger(stage, current(own)) if e.component == row.id]


def _claim(entry: Entry) -> list[str]:
    if entry.verdict == "open":
        return [f"{entry.id}, open: {entry.claim}. To settle: {entry.how}.", entry.origin]
    figures = "; ".join(f"{k}: {v}" for k, v in entry.figures.items())
    return [f"{entry.id}, {entry.verdict}: {entry.claim}. {entry.because} ({figures})", entry.origin]


def _field(name: str, values: Iterable[str], *, verbatim: bool = False) -> list[str]:
    """A label in the left margin and its lines beside it; empty when there are none."""
    lines = [line for value in values if value for line in ([value] if verbatim else _wrap(value, ""))]
    if not lines:
        return []
    margin = " " * INDENT
    return [f"{name:<{INDENT}}{lines[0]}", *(margin + line for line in lines[1:])]


def _wrap(text: str, prefix: str) -> list[str]:
    width = max(40, min(88, shutil.get_terminal_size((88, 24)).columns) - INDENT)
    return textwrap.wrap(text, width, initial_indent=prefix, subsequent_indent=prefix, break_on_hyphens=False)
