"""A step says what runs, how far it is, and how long it took; in a log and in a terminal."""

import io
import re
import sys
import time

import pytest

from handbook_src.publish import beat
from handbook_src.publish.beat import CLEAR, clock, step


def run(monkeypatch, out, seconds=0.25, every=0.05):
    monkeypatch.setattr(beat, "EVERY", every)
    monkeypatch.setattr(sys, "stdout", out)
    with step("  2/4 a thing", lambda elapsed: "half of it"):
        time.sleep(seconds)
    return out.getvalue()


def test_a_log_gets_a_line_now_and_then(monkeypatch):
    first, *between, last = run(monkeypatch, io.StringIO()).splitlines()
    assert first == "  2/4 a thing ..."
    assert between
    assert all(re.fullmatch(r"  2/4 a thing \.\.\. \d s, half of it", line) for line in between)
    assert re.fullmatch(r"  2/4 a thing \.\.\. \d s", last)


def test_a_short_step_is_one_line(monkeypatch):
    assert run(monkeypatch, io.StringIO(), seconds=0, every=30) == "  2/4 a thing ... 0 s\n"


def test_a_terminal_keeps_one_line_current(monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    said = run(monkeypatch, Terminal(), seconds=1.2)
    assert said.count("\n") == 1
    first, *between, last = said.split(CLEAR)
    assert first == "  2/4 a thing ..."
    assert between
    assert all(line.endswith("s, half of it") for line in between)
    assert re.fullmatch(r"  2/4 a thing \.\.\. \d s\n", last)


def test_a_step_that_fails_says_so(capsys):
    with pytest.raises(KeyboardInterrupt), step("a thing"):
        raise KeyboardInterrupt
    assert capsys.readouterr().out == "a thing ... failed\n"


def test_seconds_as_people_say_them():
    assert [clock(s) for s in (0.4, 59.4, 60.0, 3725.0)] == ["0 s", "59 s", "1 min 00 s", "62 min 05 s"]
