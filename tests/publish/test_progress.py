"""What the build says while it runs."""

import io

import pytest

from handbook_src.publish import progress
from handbook_src.publish.chapters import Chapter
from handbook_src.publish.execute import Outcome, Task
from handbook_src.publish.progress import OVERHEAD, Progress


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def three(tiny):
    return [Task(Chapter(f"book/{name}", tiny.root / f"book/{name}.md", 20.0), "key") for name in "abc"]


def test_the_rest_is_estimated_from_known_times_over_the_workers(three):
    times = {"book/a": 40 - OVERHEAD, "book/b": 10 - OVERHEAD, "book/c": 10 - OVERHEAD}
    assert Progress(three, 1, times, out=io.StringIO()).left() == "about 1 min 00 s left"
    assert Progress(three, 2, times, out=io.StringIO()).left() == "about 40 s left"  # the longest one decides
    assert Progress(three, 1, {}, out=io.StringIO()).left() == "about 1 min 12 s left"  # budgets, where unknown


def test_lines_name_what_starts_and_what_is_done(three):
    out = io.StringIO()
    said = Progress(three, 1, {}, out=out)
    said.started(three[0])
    said.finished(Outcome("book/a", "executed", 3.0))
    lines = out.getvalue().splitlines()
    assert lines[0] == "  start     a"
    assert lines[1].startswith("  executed  a  3.0 s  [1/3, 0 s elapsed; about ")


def test_a_log_hears_at_least_every_half_minute_what_runs(three, monkeypatch):
    now = iter(range(0, 1000, 10))
    monkeypatch.setattr(progress.time, "monotonic", lambda: float(next(now)))
    out = io.StringIO()
    said = Progress(three, 2, {}, cells={"book/a": 9}, out=out)
    said.started(three[0])
    said.cell(three[0], 3)
    for _ in range(5):
        said.tick()
    lines = [line for line in out.getvalue().splitlines() if line.startswith("  running")]
    assert 1 <= len(lines) <= 5
    assert all(line.startswith("  running   a 3/9  [0/3, ") and line.endswith(" left]") for line in lines)


def test_a_terminal_gets_a_bar_with_chapter_elapsed_and_remaining_time(three):
    out = Terminal()
    said = Progress(three, 2, {}, cells={"book/a": 9, "book/b": 4}, out=out)
    said.started(three[0])
    said.started(three[1])
    said.cell(three[0], 3)
    said.finished(Outcome("book/b", "failed", 1.0))
    said.close()
    shown = out.getvalue()
    assert "a 3/9, b" in shown
    assert "1/3 |" in shown
    assert "0 s elapsed, about " in shown
    assert "failed    b" in shown


def test_times_that_are_torn_are_as_good_as_none(tiny):
    tiny.book.build.mkdir()
    tiny.book.times.write_text("{", "utf8")
    assert progress.known_times(tiny.book) == {}
    progress.keep_times(tiny.book, {"book/a": 1.26})
    assert progress.known_times(tiny.book) == {"book/a": 1.3}
