"""The walk: a row may say "published" only while its contract stands."""

from __future__ import annotations

import dataclasses
import importlib
import re
from pathlib import Path

import pytest

from handbook_src.catalogue import Component, claims, components
from handbook_src.catalogue.docstring import followed

ROOT = Path(__file__).resolve().parents[2]
ARXIV = re.compile(r"\d{4}\.\d{4,5}")
CLAIM_CALL = re.compile(r"""\bclaim\(\s*["']([\w-]+)["']""")
NEEDED = ("parity", "law", "refusal")
Marks = list[list[str]]


def text_of(page: str) -> str:
    path = ROOT / f"{page}.md"
    return path.read_text(encoding="utf-8") if page and path.is_file() else ""


def code_complaints(row: Component) -> list[str]:
    """What is missing in the object: it imports, its docstring has formula and source."""
    module, _, name = row.object.rpartition(".")
    try:
        getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        return [f"object {row.object!r} does not import: {error}"]
    said = followed(row.object)
    papers = "\n".join(f.sections.get("Source", "") for f in said)
    found = []
    if not any(f.formulas for f in said):
        found.append(f"{row.object} has no formula in its docstring, nor where that points")
    if not papers:
        found.append(f"{row.object} has no Source in its docstring, nor where that points")
    wanted = set(ARXIV.findall(row.source))
    if wanted and papers and not wanted & set(ARXIV.findall(papers)):
        found.append(f"the docstring of {row.object} cites none of {sorted(wanted)}")
    return found


def chapter_complaints(row: Component) -> list[str]:
    """What is missing in the text: page, section under the id, a verdict for each claim."""
    text = text_of(row.chapter)
    if not text:
        return [f"chapter {row.chapter!r} does not exist"]
    found = []
    if not re.search(rf"^\s*- file: {re.escape(row.chapter)}\s*$", (ROOT / "_toc.yml").read_text(), re.MULTILINE):
        found.append(f"chapter {row.chapter} is not in _toc.yml")
    if not re.search(rf"^\({re.escape(row.id)}\)=\n+#+ ", text, re.MULTILINE):
        found.append(f"no section labelled ({row.id})= in {row.chapter}")
    settled = set(CLAIM_CALL.findall(text))
    found += [f"claim {c.id} is not settled in {row.chapter}" for c in claims() if c.component == row.id
              and c.id not in settled]  # fmt: skip
    return found


def complaints(row: Component, marks: Marks) -> list[str]:
    """Everything that a published row promises and doesn't keep."""
    if row.status == "planned":
        return []
    found = [f"{column} is empty" for column in ("object", "chapter", "oracle", "source") if not getattr(row, column)]
    proofs = {kind for kind, component, _ in marks if component == row.id}
    found += [f"no {kind} test was collected" for kind in NEEDED if kind not in proofs]
    return [f"{row.id}: {line}" for line in [*found, *code_complaints(row), *chapter_complaints(row)]]


def test_every_published_entry_keeps_its_contract(collected: Marks) -> None:
    found = [line for row in components() for line in complaints(row, collected)]
    assert not found, "\n" + "\n".join(found)


def test_marks_name_components(collected: Marks) -> None:
    known = {c.id for c in components()}
    strangers = [f"{test}: {kind}({component!r})" for kind, component, test in collected if component not in known]
    assert not strangers, strangers


def test_each_claim_is_settled_once_and_known() -> None:
    known = {c.id for c in claims()}
    calls = [(name, page) for page in (ROOT / "book").rglob("*.md") for name in CLAIM_CALL.findall(page.read_text())]
    assert [c for c in calls if c[0] not in known] == []
    names = [name for name, _ in calls]
    assert sorted(names) == sorted(set(names))


def test_the_walk_can_fail() -> None:
    row = next(c for c in components() if c.id == "rms-norm")
    broken = dataclasses.replace(
        row, object="handbook_src.catalogue.table.fold", chapter="book/normalisation/nowhere", oracle="",
        source="Nobody 2020, arXiv:2001.00001", status="published",
    )  # fmt: skip
    found = "\n".join(complaints(broken, [["parity", "rms-norm", "here"]]))
    for expected in ("oracle is empty", "no law test", "no refusal test", "no formula", "no Source", "does not exist"):
        assert expected in found
    assert "no parity test" not in found
    missing = dataclasses.replace(broken, object="handbook_src.catalogue.absent.Thing")
    assert "does not import" in "\n".join(complaints(missing, []))
    lost = dataclasses.replace(row, id="no-such-id", chapter="book/index", status="published")
    found = "\n".join(chapter_complaints(lost))
    assert "no section labelled (no-such-id)=" in found or "does not exist" in found


@pytest.mark.parametrize("text", ['claim("rms-norm-1", verdict', "claim(\n    'rms-norm-1',"])
def test_claim_calls_are_found(text: str) -> None:
    assert CLAIM_CALL.findall(text) == ["rms-norm-1"]
