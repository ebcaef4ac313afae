"""A verdict comes from an executed notebook and from nowhere else."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from handbook_src.catalogue import claims
from handbook_src.catalogue import ledger as ledger_module
from handbook_src.catalogue.__main__ import run
from handbook_src.catalogue.ledger import CLAIM_TYPE, Entry, current, find_root, find_stage, judged, ledger, staged
from handbook_src.errors import DataError
from handbook_src.notebook import CLAIM_TYPE as WRITTEN_TYPE
from handbook_src.testing.refusal import refuses

HOLDS = {"id": "rms-norm-1", "verdict": "holds", "figures": {"ratio": "1.12"}, "because": "It was faster."}


def stage_with(folder: Path, **pages: list[dict[str, Any]]) -> Path:
    for page, found in pages.items():
        path = folder / "book" / "part" / f"{page}.ipynb"
        path.parent.mkdir(parents=True, exist_ok=True)
        outputs = [{"output_type": "display_data", "data": {CLAIM_TYPE: r, "text/plain": ""}} for r in found]
        cells: list[dict[str, Any]] = [{"cell_type": "markdown", "metadata": {}, "source": "text"}]
        cells.append(
            {
                "cell_type": "code",
                "metadata": {},
                "source": "",
                "outputs": [{"output_type": "stream", "text": "x"}, *outputs],
            }
        )
        path.write_text(json.dumps({"cells": cells, "metadata": {}, "nbformat": 4, "nbformat_minor": 4}))
    return folder


def test_reader_and_writer_mean_the_same_type() -> None:
    assert CLAIM_TYPE == WRITTEN_TYPE


def test_without_a_run_everything_is_open(tmp_path: Path) -> None:
    entries = ledger(tmp_path)
    assert [e.id for e in entries] == [c.id for c in claims()]
    assert {e.verdict for e in entries} == {"open"}
    assert {e.chapter for e in entries} == {""}


def test_a_record_settles_its_claim(tmp_path: Path) -> None:
    entries = {e.id: e for e in ledger(stage_with(tmp_path, norm=[HOLDS]))}
    entry = entries["rms-norm-1"]
    assert (entry.verdict, entry.figures, entry.because) == ("holds", {"ratio": "1.12"}, "It was faster.")
    assert (entry.chapter, entry.anchor) == ("book/part/norm", "claim-rms-norm-1")
    assert entries["rms-norm-2"].verdict == "open"
    assert len(entries) == len(claims())


def test_where_a_claim_stands_is_one_line() -> None:
    entry = Entry("a-1", "a", "it is", "cost", "A 2000, abstract", "It is so.", "https://a.org", "time")
    assert entry.origin == "A 2000, abstract: “It is so.” <https://a.org>"
    assert replace(entry, quote="").origin == "A 2000, abstract <https://a.org>"
    assert replace(entry, source="from the source documents", quote="", link="").origin == "from the source documents"


def test_only_the_named_notebooks_count(tmp_path: Path) -> None:
    stage = stage_with(tmp_path, norm=[HOLDS], other=[])
    entries = ledger(stage, notebooks=[stage / "book" / "part" / "other.ipynb"])
    assert {e.verdict for e in entries} == {"open"}


@pytest.mark.parametrize("pages", [{"norm": [HOLDS, HOLDS]}, {"norm": [HOLDS], "other": [HOLDS]}])
def test_two_verdicts_on_one_claim_are_refused(tmp_path: Path, pages: dict[str, list[dict[str, Any]]]) -> None:
    with refuses(DataError, "rms-norm-1", "book/part/norm", *(f"book/part/{p}" for p in pages)):
        ledger(stage_with(tmp_path, **pages))


def test_a_record_of_no_claim_is_refused(tmp_path: Path) -> None:
    with refuses(DataError, "'no-such-claim'", "book/part/norm"):
        ledger(stage_with(tmp_path, norm=[{**HOLDS, "id": "no-such-claim"}]))


@pytest.mark.parametrize("text", ["", "{", "[]", "{}"])
def test_a_torn_notebook_is_refused(tmp_path: Path, text: str) -> None:
    stage = stage_with(tmp_path, norm=[HOLDS])
    (stage / "book" / "part" / "norm.ipynb").write_text(text)
    with refuses(DataError, "norm.ipynb", "an executed notebook"):
        ledger(stage)


def test_a_stale_notebook_settles_nothing(tmp_path: Path) -> None:
    stage = stage_with(tmp_path / "_build" / "stage", norm=[HOLDS], silent=[])
    [(path, why)] = judged(staged(stage))
    assert path.stem == "norm"
    assert "changed since it ran" in why  # no chapter of that name, so no key that could match
    assert current(staged(stage)) == []


def test_without_the_press_a_verdict_does_not_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "handbook_src.publish.chapters", None)
    [(_, why)] = judged(staged(stage_with(tmp_path, norm=[HOLDS])))
    assert "can't be checked here" in why


def test_a_current_notebook_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stage = stage_with(tmp_path, norm=[HOLDS])
    monkeypatch.setattr("handbook_src.publish.chapters.current", set)
    monkeypatch.setattr(ledger_module, "find_stage", lambda: stage)
    assert {e.id: e.verdict for e in ledger()}["rms-norm-1"] == "holds"
    monkeypatch.setattr("handbook_src.publish.chapters.current", lambda paths: set())
    assert {e.verdict for e in ledger()} == {"open"}


def test_the_stage_is_found_from_inside_the_repository(tmp_path: Path) -> None:
    (tmp_path / "handbook_src").mkdir()
    (tmp_path / "_toc.yml").touch()
    inside = tmp_path / "book" / "part"
    inside.mkdir(parents=True)
    assert find_root(inside) == tmp_path
    assert find_stage(inside) is None
    stage = tmp_path / "_build" / "stage"
    (stage / "book").mkdir(parents=True)
    assert find_stage(inside) == stage


@pytest.mark.parametrize("line", [["claims", "--json"], ["--json", "claims"]])
def test_json_counts_before_and_after_the_command(line: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert run(line) == 0
    rows = json.loads(capsys.readouterr().out)
    assert len(rows) == 175
    assert {tuple(r) for r in rows} == {("id", "component", "verdict", "source", "quote", "link")}
