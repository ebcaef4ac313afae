"""The record command on a book of a few lines, and the book's own records."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from handbook_src.errors import ConfigError, DataError
from handbook_src.publish import record
from handbook_src.publish.book import Book
from handbook_src.publish.chapters import chapters
from handbook_src.publish.record import Options, jobs_of, readable
from handbook_src.testing.refusal import refuses

ROOT = Path(__file__).resolve().parents[2]
OPENING = (
    "from handbook_src.experiment import experiments\nquick = True\nexperiment = experiments('a', quick)\nbase = 5"
)
RACE = "@experiment(quick=dict(n=1), full=dict(n=3))\ndef race(n):\n    return {'x': [base + i for i in range(n)]}"
BROKEN = "@experiment(quick=dict(n=1), full=dict(n=0))\ndef broken(n):\n    return {'x': 1 / n}"


@pytest.fixture
def book(tiny):
    tiny.chapter("a", OPENING, RACE, "assert race()['x'][0] == 5")
    return tiny


def file(book) -> Path:
    return book.root / "book/a.record.json"


def states(book) -> dict[str, str]:
    (chapter,) = chapters(Book(book.root))
    return {job.name: job.state for job in jobs_of(chapter, "cpu")}


def test_recording_keeps_what_a_person_can_read(book, monkeypatch, capsys):
    monkeypatch.setattr(record, "kernel_environment", lambda *_: {"PYTHONPATH": str(ROOT)})
    book.chapter("a", OPENING, RACE, BROKEN)
    assert record.record(book.root, Options([], [])) == 1  # one fails, the other is kept
    assert "division by zero" in capsys.readouterr().err
    assert states(book) == {"race": "valid", "broken": "missing"}
    assert json.loads(file(book).read_text())["race"]["cpu"]["data"] == {"x": [5, 6, 7]}
    assert '"x": [5, 6, 7]' in file(book).read_text()

    book.chapter("a", OPENING.replace("base = 5", "base = 6"), RACE)
    assert states(book) == {"race": "stale"}
    assert record.record(book.root, Options([], [], check=True)) == 1
    assert "stale    a race" in capsys.readouterr().out


def test_nothing_is_started_when_the_minutes_are_over(book):
    assert record.record(book.root, Options([], [], minutes=0.0)) == 1
    assert not file(book).exists()


def test_unknown_names_and_stray_entries_are_refused(book):
    with refuses(ConfigError, "no_such", "race"):
        record.record(book.root, Options([], ["no_such"]))
    file(book).write_text('{"gone": {}}')
    with refuses(DataError, "gone"):
        record.record(book.root, Options([], []))


def test_lists_of_numbers_stand_on_one_line():
    assert readable({"a": {"cpu": {"data": [[1, 2.5], ["x, y"]]}}}).count("\n") == 10
    text = readable({"a": {"x": [1.5, 2]}})
    assert "[1.5, 2]" in text
    assert json.loads(text) == {"a": {"x": [1.5, 2]}}


def test_every_experiment_of_the_book_has_a_valid_record():
    left = [f"{j.title}: {j.state}" for c in chapters(Book(ROOT)) for j in jobs_of(c, "cpu") if j.state != "valid"]
    assert not left, "run: python3 -m handbook_src record\n" + "\n".join(left)
