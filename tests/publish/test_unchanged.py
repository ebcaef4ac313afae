"""A build of which nothing has changed does nothing; anything that may matter makes it look again."""

import os

import pytest

from handbook_src.publish import build, unchanged

ALSO = "Nothing has changed since."


@pytest.fixture
def built(tiny, capsys):
    tiny.page("a", "# A\n")
    tiny.write("_build/cache/a-1.ipynb", "")

    def render(book, strict):
        tiny.rendered += 1
        tiny.write("_build/html/index.html", f"{tiny.rendered}")
        return 0

    tiny.again = lambda **options: build.book(tiny.root, build.Options(**options), render)
    assert tiny.again() == 0
    capsys.readouterr()
    return tiny


def test_a_second_build_only_says_what_the_first_one_said(built, capsys):
    assert built.again() == 0
    said = capsys.readouterr().out
    assert said.startswith("chapter")
    assert ALSO in said
    assert "The site stands" in said
    assert built.rendered == 1


CHANGES = {
    "a sentence": lambda tiny: tiny.page("a", "# Another\n"),
    "a source": lambda tiny: tiny.write("handbook_src/layer.py", "def double(x):\n    return x + x\n"),
    "a file beside": lambda tiny: tiny.write("book/a.record.json", "{}"),
    "the cache": lambda tiny: [path.unlink() for path in tiny.book.cache.iterdir()],
    "the stage": lambda tiny: tiny.book.staged("book/a", ".md").write_text(""),
    "a page of the site": lambda tiny: tiny.write("_build/html/extra.html", ""),
    "the site": lambda tiny: (tiny.book.html / "index.html").unlink(),
    "a time": lambda tiny: os.utime(tiny.root / "constraints.txt", (1, 1)),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_any_change_leads_to_a_build(built, change, capsys):
    change(built)
    assert built.again() == 0
    assert ALSO not in capsys.readouterr().out
    assert built.rendered == 2


def test_other_options_lead_to_a_build(built):
    assert built.again(parameters={"seed": 1}) == 0
    assert built.rendered == 2


def test_a_new_day_leads_to_a_build(built, monkeypatch):
    tomorrow = unchanged.datetime.date.today() + unchanged.datetime.timedelta(days=1)
    monkeypatch.setattr(unchanged.datetime, "date", type("date", (), {"today": lambda: tomorrow}))
    assert unchanged.Mark(built.book, build.Options()).said() is None


def test_a_failed_build_is_not_remembered(built):
    built.chapter("a", ":tags: [unclosed\n\n1")
    assert built.again() == 1
    assert built.again() == 1


def test_an_edit_while_the_build_runs_is_a_change(built, monkeypatch):
    built.write("book/new.txt", "")
    prune = build.prune
    monkeypatch.setattr(build, "prune", lambda the: (prune(the), built.write("book/new.txt", "edited")))
    assert built.again() == 0
    monkeypatch.undo()
    assert built.again() == 0
    assert built.rendered == 3


def test_what_is_hidden_or_built_or_compiled_is_no_source(tmp_path):
    for name in (".git/x", "_build/x", "a/__pycache__/x", "a/x"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "a/nowhere").symlink_to(tmp_path / "absent")
    assert [path for path, _ in unchanged.files(tmp_path)] == [str(tmp_path / "a/x")]
