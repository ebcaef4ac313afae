"""The card, the docstrings it is made from, and the command line."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from handbook_src.catalogue import __main__ as cli
from handbook_src.catalogue import card as card_module
from handbook_src.catalogue import components
from handbook_src.catalogue.__main__ import run
from handbook_src.catalogue.card import card
from handbook_src.catalogue.docstring import facts, followed, plain
from handbook_src.catalogue.notes import notes
from handbook_src.catalogue.table import Component
from handbook_src.errors import ConfigError
from handbook_src.testing.refusal import refuses

KEYS = ["id", "title", "synonyms", "part", "object", "chapter", "oracle", "source", "status"]

SAMPLE = r'''
"""A module to read, never to run."""
raise RuntimeError("was imported")

def twice(x: Float[Tensor, "*lead d"], gain: Float[Tensor, " d"] | None = None, n: int = 2) -> Float[Tensor, "*lead d"]:
    r"""Add ``x`` to itself,
    with a gain.

    .. math:: y_i = 2\, x_i
       \quad g_i

    Some words.

    .. math::
       :label: two

       z = \frac{1}{2}
         + 3

    Args:
        x: activations.

    Typical values:
        gain: 1 for ``wide`` nets,
            2 for narrow ones.
        n: 2.

    Source:
        Someone 2020, eq. 1, arXiv:2001.00001
    """

class Twice(Module):
    """The layer of :func:`twice`, see also :func:`elsewhere.other`.

    Shape:
        ``(*lead, d)`` to ``(*lead, d)``.
    """

class Plain(Module):
    """No shapes said."""

    def forward(self, x: Int[Tensor, "b t"]) -> Float[Tensor, "b t d"]:
        return x

class Heir(Plain):
    __doc__ = Plain.__doc__
'''


@pytest.fixture
def sample(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "sample_for_card.py").write_text(SAMPLE)
    monkeypatch.syspath_prepend(str(tmp_path))
    return "sample_for_card"


def test_facts_are_read_without_an_import(sample: str) -> None:
    found = facts(f"{sample}.twice")
    assert found is not None
    assert found.sentence == "Add x to itself, with a gain."
    assert found.formulas == ("y_i = 2\\, x_i\n\\quad g_i", "z = \\frac{1}{2}\n+ 3")
    assert found.sections["Source"] == "Someone 2020, eq. 1, arXiv:2001.00001"
    assert found.sections["Args"] == "x: activations."
    assert found.shapes == ("x: (*lead d) float", "gain: (d) float, optional", "returns: (*lead d) float")


def test_a_pointer_is_followed_and_a_foreign_one_left(sample: str) -> None:
    first, second = followed(f"{sample}.Twice")
    assert first.sections["Shape"] == "``(*lead, d)`` to ``(*lead, d)``."
    assert first.pointers == (f"{sample}.twice",)
    assert second.formulas


def test_a_layer_shows_what_forward_takes(sample: str) -> None:
    found = facts(f"{sample}.Plain")
    assert found is not None
    assert found.shapes == ("x: (b t) int", "returns: (b t d) float")
    assert facts(f"{sample}.Heir") == dataclasses.replace(found, path=f"{sample}.Heir")
    method = facts(f"{sample}.Plain.forward")
    assert method is not None
    assert method.shapes == found.shapes


@pytest.mark.parametrize("path", ["sample_for_card.absent", "no_such_package.thing", "plain"])
def test_what_has_no_source_has_no_facts(sample: str, path: str) -> None:
    assert facts(path) is None
    assert followed(path) == []


def test_roles_become_words() -> None:
    assert plain(":func:`~a.b.c` and :class:`the norm <a.B>`,\n ``eps`` too") == "a.b.c and the norm, eps too"


def test_a_card_of_a_published_row(sample: str, monkeypatch: pytest.MonkeyPatch) -> None:
    row = Component("rms-norm", "RMSNorm", ("RMS",), "normalisation", f"{sample}.Twice", "book/a/b", "an oracle",
                    "Someone 2020, arXiv:2001.00001", "published")  # fmt: skip
    monkeypatch.setattr(card_module, "component", lambda name: row)
    text = card("rms")
    for line in (
        "rms-norm - RMSNorm",
        "normalisation, published",
        'You asked for "RMS"',
        "formula   y_i = 2\\, x_i",
        "shapes    (*lead, d) to (*lead, d).",
        "typical   gain: 1 for wide nets, 2 for narrow ones.",
        f"import    from {sample} import Twice",
        "page      book/a/b.md, section (rms-norm)=",
        "oracle    an oracle",
        "claim     rms-norm-1, ",
    ):
        assert line in text, line
    assert "Planned" not in text


@pytest.mark.parametrize(
    ("formula", "want"),
    [
        (r"x &= 1 \\" + "\n" + r"y &= 2", "x = 1\ny = 2"),
        (r"\begin{cases} 1 & a \\ 2 & b \end{cases}", r"\begin{cases} 1 & a \\ 2 & b \end{cases}"),
        (r"\frac{a}{b}", r"\frac{a}{b}"),
    ],
)
def test_alignment_marks_are_dropped(formula: str, want: str) -> None:
    assert card_module._unaligned(formula) == want


@pytest.mark.parametrize(
    ("sentence", "want"),
    [
        ("Divide by the root: see a.b.c.", "Divide by the root."),
        ("Weight over its norm; see also handbook_src.a.b.", "Weight over its norm."),
        ("You see it at once, whatever it is.", "You see it at once, whatever it is."),
    ],
)
def test_a_pointer_is_no_part_of_what_it_is(sentence: str, want: str) -> None:
    assert card_module._without_pointer(sentence) == want


def test_the_card_of_swiglu() -> None:
    text = card("swiglu")
    for line in ("glu - GLU", "variant of glu", "formula", "shapes", "typical", "arXiv:2002.05202", "glu-1, "):
        assert line in text, line


def test_every_component_has_a_card() -> None:
    for row in components():
        text = card(row.id)
        assert row.title in text
        assert ("Planned" in text) == (row.status == "planned"), row.id
        assert max(map(len, text.splitlines())) < 160, row.id


def test_notes_are_of_components_and_hold_something() -> None:
    assert set(notes()) <= {c.id for c in components()}
    for id_, note in notes().items():
        assert note.what.endswith("."), id_
        assert note.formula, id_
        for formula in note.formula:
            assert formula.count("{") == formula.count("}"), id_
            assert not {"\t", "\b", "\f", "\r"} & set(formula), id_  # a backslash that TOML has eaten


def test_an_unknown_name_is_one_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["show", "sofmax"]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert "Did you mean softmax" in said.err
    assert "Traceback" not in said.err
    with refuses(ConfigError, "'sofmax'"):
        card("sofmax")


def test_a_name_of_several_words(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["show", "layer", "normalization"]) == 0
    assert capsys.readouterr().out.startswith("layer-norm - ")


def test_json_has_exactly_these_keys(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert len(rows) == 360
    assert all(list(row) == KEYS for row in rows)
    assert all(isinstance(row["synonyms"], list) for row in rows)


def test_filters(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["--json", "--part", "Normalisation", "--status", "planned"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert {(r["part"], r["status"]) for r in rows} <= {("normalisation", "planned")}
    assert run(["--part", "attention"]) == 0
    assert "scaled-dot-product-attention" in capsys.readouterr().out
    assert run(["--part", "cookery"]) == 2
    assert "'cookery'" in capsys.readouterr().err


def test_claims_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["claims", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert len(rows) == 175
    assert all(list(row) == ["id", "component", "verdict", "source", "quote", "link"] for row in rows)
    assert all(row["source"] for row in rows)
    assert {r["verdict"] for r in rows} <= {"open", "holds", "fails", "depends", "no evidence"}
    assert run(["claims"]) == 0
    assert "“RMSNorm achieves comparable performance against LayerNorm” <https://arxiv" in capsys.readouterr().out


def test_stderr_says_which_runs_are_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(cli, "find_stage", lambda: None)
    assert run(["claims", "--json"]) == 0
    said = capsys.readouterr()
    assert "No built book here" in said.err
    assert len(json.loads(said.out)) == 175
    monkeypatch.setattr(cli, "find_stage", lambda: tmp_path)
    monkeypatch.setattr(cli, "judged", lambda notebooks: [(tmp_path / "book/a/b.ipynb", "a source changed")])
    assert run(["claims"]) == 0
    assert "book/a/b: a source changed, so its claims read open" in capsys.readouterr().err


def test_the_command_line_needs_no_torch() -> None:
    code = (
        "import sys, handbook_src.catalogue.__main__ as m; m.run(['show', 'rms-norm']); "
        "assert 'torch' not in sys.modules and 'numpy' not in sys.modules"
    )
    done = subprocess.run(
        [sys.executable, "-P", "-c", code],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        cwd=Path(__file__).parent,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("rms-norm - ")


@pytest.mark.parametrize("part", ["", "???"])
@pytest.mark.parametrize("command", [[], ["claims"]])
def test_a_part_without_a_letter_names_nothing(part: str, command: list[str]) -> None:
    assert run(["--part", part, *command]) == 2


def test_claims_of_one_part(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["--json", "--part", "Normalisation", "claims"]) == 0
    found = {c["component"] for c in json.loads(capsys.readouterr().out)}
    assert found
    assert found <= {c.id for c in components() if c.part == "normalisation"}


def test_a_c_locale_prints_the_listing() -> None:
    line = [sys.executable, "-m", "handbook_src.catalogue"]
    env = os.environ | {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    assert "in all" in subprocess.run(line, env=env, capture_output=True, text=True, check=True).stdout
