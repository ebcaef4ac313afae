"""The build as a whole, with real kernels: what is executed, kept, reported."""

import json
import os

import nbformat
import pytest

from handbook_src.publish import build, chapters, report
from handbook_src.publish.execute import Failure, Outcome


def staged(tiny, name):
    return nbformat.read(tiny.book.staged(f"book/{name}"), as_version=4)


def text_of(notebook):
    return [o["data"]["text/plain"] for c in notebook.cells for o in c.get("outputs", ()) if "data" in o]


@pytest.fixture
def mixed(tiny):
    """One good chapter among every kind of bad one."""
    tiny.chapter("good", "from handbook_src.layer import double\ndouble(21)")
    tiny.chapter("bad", "x = 1", "def f():\n    raise ValueError('no such thing')\n\nf()")
    tiny.chapter("slow", "import time\ntime.sleep(60)", budget=0.5)
    tiny.chapter("dead", "import os\nos._exit(3)")
    tiny.chapter("empty")
    return tiny


def test_a_failure_stops_no_other_and_is_reported_with_its_place(mixed, capsys):
    assert mixed.build(jobs=2) == 1
    said = capsys.readouterr().out
    lines = (mixed.root / "book/bad.md").read_text("utf8").splitlines()
    assert f"FAILED  book/bad.md:{lines.index('f()') + 1}, cell 3" in said
    assert "ValueError: no such thing" in said
    assert "raise ValueError('no such thing')" in said
    assert "more than 3 times its budget of 0.5 s; stopped" in said
    assert "FAILED  book/empty.md\n  it executed no cell" in said
    assert "DeadKernelError" in said
    assert "4 of 5 chapters failed" in said
    assert mixed.rendered == 0
    assert text_of(staged(mixed, "good")) == ["42"]
    assert (mixed.book.failed / "bad.ipynb").exists()

    mixed.chapter("bad", "1")
    mixed.chapter("dead", "1")
    mixed.chapter("slow", "1")
    mixed.chapter("empty", "1")
    assert mixed.build() == 0
    again = capsys.readouterr().out
    assert "4 to execute" in again
    assert mixed.rendered == 1
    states = {line.split()[0]: line.split()[-1] for line in again.splitlines() if line.endswith(("cached", "executed"))}
    assert states["good"] == "cached"


def test_only_what_changed_is_executed_again(tiny, capsys):
    tiny.chapter("uses", "from handbook_src.layer import double\ndouble(21)", prose="Before.")
    tiny.chapter("alone", "1 + 1")
    assert tiny.build() == 0
    before = staged(tiny, "uses").metadata["handbook"]
    assert set(before["verified"]) == {"date", "device", "torch", "triton", "python", "seconds", "parameters"}
    assert chapters.is_current(tiny.book.staged("book/uses"))

    tiny.chapter("uses", "from handbook_src.layer import double\ndouble(21)", prose="After.")
    capsys.readouterr()
    assert tiny.build() == 0
    assert "2 chapters: 0 to execute" in capsys.readouterr().out
    page = staged(tiny, "uses")
    assert "After." in page.cells[0].source
    assert text_of(page) == ["42"]
    assert page.metadata["handbook"] == before

    tiny.write("handbook_src/layer.py", "def double(x):\n    return 2 * x + 1\n")
    assert not chapters.is_current(tiny.book.staged("book/uses"))
    assert chapters.is_current(tiny.book.staged("book/alone"))
    assert tiny.build() == 0
    assert "2 chapters: 1 to execute" in capsys.readouterr().out
    assert text_of(staged(tiny, "uses")) == ["43"]


def test_parameters_reach_the_chapter_and_leave_no_trace_on_the_page(tiny):
    tiny.chapter("a", ":tags: [parameters]\n\nquick = True\nseed = 0", "(quick, seed)")
    assert tiny.build() == 0
    assert text_of(staged(tiny, "a")) == ["(True, 0)"]
    assert len([c for c in staged(tiny, "a").cells if c.cell_type == "code"]) == 2
    assert tiny.build(parameters={"quick": False, "seed": 3}) == 0
    page = staged(tiny, "a")
    assert text_of(page) == ["(False, 3)"]
    injected = [c for c in page.cells if "injected-parameters" in c.metadata.get("tags", [])]
    assert [c.metadata["tags"] for c in injected] == [["injected-parameters", "remove-cell"]]
    assert page.metadata["handbook"]["verified"]["parameters"] == {"quick": False, "seed": 3}
    assert chapters.is_current(tiny.book.staged("book/a"))


def test_a_skipped_page_keeps_its_labels_and_says_why(tiny, capsys):
    tiny.chapter("a", "raise SystemExit")
    tiny.chapter("b", "1")
    tiny.write("book/skip.yml", "- {page: book/a, reason: waits for a GPU, until: 2999-01-31}\n")
    assert tiny.build() == 0
    said = capsys.readouterr().out
    assert "skipped book/a until 2999-01-31: waits for a GPU" in said
    page = tiny.book.staged("book/a", ".md").read_text("utf8")
    assert page.startswith("(a)=\n# a\n")
    assert "until 2999-01-31: waits for a GPU" in page
    assert "SystemExit" not in page


def test_only_one_chapter_is_executed_when_asked(tiny, capsys):
    tiny.chapter("a", "1")
    tiny.chapter("b", "1")
    assert tiny.build(only=["a"]) == 0
    assert "1 chapters: 1 to execute" in capsys.readouterr().out
    assert tiny.book.staged("book/a").exists()
    assert not tiny.book.staged("book/b").exists()


def test_what_left_the_book_leaves_the_stage(tiny):
    tiny.chapter("a", "1")
    tiny.page("b", "# B\n")
    assert tiny.build() == 0
    assert tiny.book.staged("book/b", ".md").exists()
    tiny.pages.remove("b")
    tiny.chapter("c", "1")
    assert tiny.build() == 0
    assert not tiny.book.staged("book/b", ".md").exists()


def test_a_torn_cache_is_executed_again(tiny):
    tiny.chapter("a", "40 + 2")
    assert tiny.build() == 0
    for path in tiny.book.cache.iterdir():
        path.write_bytes(path.read_bytes()[:50])
    assert tiny.build() == 0
    assert text_of(staged(tiny, "a")) == ["42"]


def test_a_worker_that_dies_takes_only_its_chapter(tiny, capsys):
    tiny.chapter("a", "import os\nos.kill(os.getppid(), 9)")
    tiny.chapter("b", "1")
    assert tiny.build(jobs=1) == 1
    said = capsys.readouterr().out
    assert "its process died" in said
    assert "1 of 2 chapters failed" in said


def test_kernels_see_one_thread_and_this_book(tiny):
    names = "('OMP_NUM_THREADS', 'HANDBOOK_FIGURES', 'TQDM_DISABLE', 'PYTHONHASHSEED')"
    tiny.chapter("a", f"import os\n[os.environ[n] for n in {names}]", "import handbook_src\nhandbook_src.__file__")
    assert tiny.build() == 0
    assert text_of(staged(tiny, "a")) == ["['1', 'svg', '1', '0']", repr(str(tiny.root / "handbook_src/__init__.py"))]


def test_times_are_kept_for_the_next_estimate(tiny):
    tiny.chapter("a", "import time\ntime.sleep(0.3)")
    assert tiny.build() == 0
    times = json.loads(tiny.book.times.read_text("utf8"))
    assert 0.3 <= times["book/a"] < 15


def test_old_executions_are_pruned(tiny):
    tiny.book.cache.mkdir(parents=True)
    for number in range(build.KEPT + 3):
        path = tiny.book.cache / f"part.a-{number}.ipynb"
        path.touch()
        os.utime(path, (number, number))
    build.prune(tiny.book)
    kept = sorted(p.stem for p in tiny.book.cache.iterdir())
    assert kept == [f"part.a-{n}" for n in range(3, build.KEPT + 3)]


def test_budgets_bind_the_quick_setting_only(tiny):
    tiny.chapter("a", "1", budget=20)
    chapter = chapters.chapters(tiny.book)[0]
    assert build.Options().limit(chapter, 1.0) == 60
    assert build.Options(patience=10.0).limit(chapter, 1.0) == 200
    assert build.Options().limit(chapter, 2.0) == 120
    assert build.Options(parameters={"quick": False}).limit(chapter, 1.0) is None


def test_a_slow_machine_gets_more_time(tiny, monkeypatch, capsys):
    tiny.chapter("a", "import time\ntime.sleep(1)", budget=0.2)
    assert tiny.build() == 1
    assert "more than 3 times its budget of 0.2 s; stopped" in capsys.readouterr().out
    monkeypatch.setattr(build, "slowness", lambda settings: 100.0)
    assert tiny.build() == 0
    said = capsys.readouterr().out
    assert "100.00 times as slow" in said
    assert "over its budget" not in said
    monkeypatch.setattr(build, "slowness", lambda settings: 1.0)
    assert tiny.build() == 0  # kept: it was in time on the machine that it ran on
    assert "0 to execute" in capsys.readouterr().out


def test_a_chapter_that_is_too_slow_for_a_slow_machine_is_told_so(tiny, monkeypatch, capsys):
    tiny.chapter("a", "import time\ntime.sleep(60)", budget=0.2)
    monkeypatch.setattr(build, "slowness", lambda settings: 2.0)
    assert tiny.build() == 1
    assert "more than 3 times its budget of 0.2 s, times 2.00 for this machine" in capsys.readouterr().out


def test_the_table_says_who_is_over_budget(tiny):
    tiny.chapter("a", "1", budget=20)
    by_page = {c.page: c for c in chapters.chapters(tiny.book)}
    table = report.times([Outcome("book/a", "executed", 31.5)], by_page)
    assert table.splitlines()[1].split(maxsplit=3) == ["a", "31.5", "20", "executed, over its budget"]
    table = report.times([Outcome("book/a", "executed", 31.5, slowness=2.0)], by_page)
    assert table.splitlines()[1].split(maxsplit=3) == ["a", "31.5", "20", "executed"]


def test_long_tracebacks_are_cut_to_their_end(tiny):
    tiny.chapter("a", "1")
    by_page = {c.page: c for c in chapters.chapters(tiny.book)}
    trace = tuple(f"frame {n}" for n in range(40))
    said = report.failures([Outcome("book/a", "failed", 1.0, Failure("why", 2, 9, trace))], by_page, tiny.root)
    assert said.splitlines()[0] == "FAILED  book/a.md:9, cell 2"
    assert "frame 39" in said
    assert "frame 20" not in said


def test_a_text_that_cannot_be_read_stops_no_other(tiny, capsys):
    tiny.chapter("a", ":tags: [unclosed\n\n1")
    tiny.chapter("b", "1")
    assert tiny.build() == 1
    said = capsys.readouterr().out
    assert "its text can't be read" in said
    assert "1 of 2 chapters failed" in said
    assert text_of(staged(tiny, "b")) == ["1"]


def test_texts_that_are_edited_while_they_run_stop_no_other(tiny, capsys, monkeypatch):
    edits = {"another": ("2",), "one_more": ("1", "2"), "none": ()}
    for name in (*edits, "b"):
        tiny.chapter(name, "1")
    execute = build.execute

    def and_edit(*arguments):
        ran = execute(*arguments)
        for name, cells in edits.items():
            tiny.chapter(name, *cells)
        return ran

    monkeypatch.setattr(build, "execute", and_edit)
    assert tiny.build() == 1
    said = capsys.readouterr().out
    assert said.count("The text was edited while it ran") == 3
    assert "3 of 4 chapters failed" in said
    assert text_of(staged(tiny, "b")) == ["1"]
    monkeypatch.undo()
    tiny.chapter("none", "1")
    assert tiny.build() == 0
