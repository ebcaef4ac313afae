"""What the test of the notebooks compares, and the little that it doesn't."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest

from handbook_src.publish import build, proof
from handbook_src.publish.book import Book
from handbook_src.publish.execute import kernel_environment

REPOSITORY = Path(__file__).resolve().parents[2]
SANITIZE = REPOSITORY / "tests" / "nbval_sanitize.cfg"
SVG = "<?xml version='1.0'?>\\n<svg xmlns='http://www.w3.org/2000/svg'><path d='M {} 0'/></svg>"
PICTURE = f"""from IPython.display import SVG, display
display({{'image/svg+xml': "{SVG}".format(1.25), 'text/plain': 'a figure'}}, raw=True)"""


@pytest.fixture(scope="module")
def notebook(make_tiny, tmp_path_factory):
    """One staged notebook with a cell of each kind, executed once."""
    tiny = make_tiny(tmp_path_factory.mktemp("proof"))
    tiny.chapter(
        "a",
        "print('loss 0.125')",
        "7",
        PICTURE,
        ":tags: [nbval-ignore-output]\n\nprint('4.2 ms')",
        "object.__repr__(3.5)",
        "print('took 4.2 ms')",
    )
    assert tiny.build() == 0
    return tiny.book.staged("book/a")


def edited(notebook, *edits):
    """The stored notebook with texts in its outputs replaced."""
    stored = nbformat.read(notebook, as_version=4)
    for cell in stored.cells:
        if cell.get("outputs"):
            text = json.dumps(cell.outputs)
            for before, after in edits:
                text = text.replace(before, after)
            cell.outputs = [nbformat.from_dict(o) for o in json.loads(text)]
    assert stored != nbformat.read(notebook, as_version=4)
    return stored


def without_picture(notebook):
    stored = nbformat.read(notebook, as_version=4)
    for cell in stored.cells:
        cell["outputs"] = [o for o in cell.get("outputs", []) if "image/svg+xml" not in o.get("data", {})]
    return stored


@pytest.fixture(scope="module")
def failed(notebook):
    """How many cells nbval finds changed in each copy of the notebook."""
    copies = {
        "harmless": edited(
            notebook, ("M 1.25 0", "M 7.5 3"), ('"4.2 ms', '"9.9 ms'), ("<float object at 0x", "<float object at 0x1")
        ),
        "changed": edited(
            notebook,
            ("loss 0.125", "loss 0.126"),
            ('"text/plain": "7"', '"text/plain": "8"'),
            ("took 4.2 ms", "took 4.3 ms"),
        ),
        "bare": without_picture(notebook),
    }
    for name, stored in copies.items():
        nbformat.write(stored, notebook.with_name(f"{name}.ipynb"))
    line = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-c", os.devnull, "--nbval"]
    line += ["--nbval-current-env", "--nbval-sanitize-with", str(SANITIZE), *(f"{name}.ipynb" for name in copies)]
    settings = {**os.environ, **kernel_environment(Book(notebook.parents[3]))}
    run = subprocess.run(line, env=settings, capture_output=True, text=True, cwd=notebook.parent)
    assert run.returncode == 1, run.stdout + run.stderr
    return {name: len(re.findall(rf"\nFAILED \S*{name}\.ipynb", run.stdout)) for name in copies}


def test_another_picture_address_and_tagged_time_pass(failed):
    assert failed["harmless"] == 0


def test_a_changed_text_integer_or_untagged_time_fails(failed):
    assert failed["changed"] == 3


def test_a_picture_that_is_gone_fails(failed):
    assert failed["bare"] == 1


def test_pytest_gets_the_notebooks_first_and_what_the_caller_adds(tiny):
    line = proof.command(tiny.book, 2, ["-k", "rms"])
    assert line[1:3] == ["-m", "pytest"]
    assert line[-4:] == ["-k", "rms", "_build/stage/book", "tests"]
    assert line[line.index("--dist") + 1] == "loadfile"
    assert "--no-loadscope-reorder" in line, "or xdist puts the files with the most tests first"


def test_named_tests_replace_the_whole_suite(tiny):
    tiny.write("tests/test_a.py", "")
    line = proof.command(tiny.book, 2, ["tests/test_a.py::test_x", "-x"])
    assert line[-2:] == ["tests/test_a.py::test_x", "-x"]


@pytest.mark.parametrize(("built", "pytest_says", "code"), [(0, 0, 0), (0, 1, 1), (1, 0, 1), (1, 1, 1)])
def test_the_command_fails_where_the_build_or_a_test_does(tiny, monkeypatch, built, pytest_says, code):
    monkeypatch.setattr(proof.build, "book", lambda root, options: built)
    monkeypatch.setattr(proof, "call", lambda *args: pytest_says)
    assert proof.test(tiny.root, build.Options(), []) == code


def test_a_stopped_build_starts_no_tests(tiny, monkeypatch):
    monkeypatch.setattr(proof.build, "book", lambda root, options: 130)
    monkeypatch.setattr(proof, "call", lambda *args: pytest.fail("tests were started"))
    assert proof.test(tiny.root, build.Options(), []) == 130


def test_a_keyword_that_is_also_a_folder_chooses_no_path(tiny):
    tiny.write("kernels/README.md", "")
    assert not proof.names_tests(tiny.root, "kernels")
    assert proof.names_tests(tiny.root, "kernels/README.md")
