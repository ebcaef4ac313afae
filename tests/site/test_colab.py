"""MyST prose as plain Markdown, form by form, and the takeaway notebooks of the real chapters."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import nbformat
import pytest

from handbook_src.errors import DataError
from handbook_src.publish import colab, site
from handbook_src.publish.quote import excerpt
from handbook_src.testing import refuses

LABELS = {
    "labels": {
        "rms-norm": {"page": "book/normalisation/norm", "anchor": "rms-norm", "text": "RMSNorm"},
        "eq-rms": {"page": "book/normalisation/norm", "anchor": "equation-eq-rms", "text": "", "number": "(1.3)"},
        "fig-depth": {"page": "book/normalisation/norm", "anchor": "fig-depth", "text": "D", "number": "Fig. 1.2"},
    },
    "objects": {"handbook_src.dispatch.resolve": ["book/api/ground", "handbook_src.dispatch.resolve"]},
}
HOME = site.site_url()
NORM = f"{HOME}/book/normalisation/norm.html"


@pytest.fixture
def context() -> colab.Context:
    folder = site.ROOT / "book" / "normalisation"
    return colab.Context("book/normalisation/norm", folder, LABELS, {"ratio": "0.4321", "name": "'wide'"})


@pytest.mark.parametrize(
    ("myst", "markdown"),
    [
        ("{glue:text}`ratio:.2f` of it", "0.43 of it"),
        ("{glue:text}`norm.ipynb::ratio:.1f`", "0.4"),
        ("a {glue:text}`name` one", "a wide one"),
        ("see {ref}`rms-norm`", f"see [RMSNorm]({NORM}#rms-norm)"),
        ("see {ref}`there <rms-norm>`", f"see [there]({NORM}#rms-norm)"),
        ("{eq}`eq-rms`", f"[(1.3)]({NORM}#equation-eq-rms)"),
        ("{numref}`fig-depth`", f"[Fig. 1.2]({NORM}#fig-depth)"),
        ("{numref}`Figure %s <fig-depth>`", f"[Fig. 1.2]({NORM}#fig-depth)"),
        ("{ref}`nowhere`", "nowhere"),
        ("{term}`logits`, {term}`scores <logits>`", "logits, scores"),
        ("{doc}`the masks <../attention/attention>`", f"[the masks]({HOME}/book/attention/attention.html)"),
        ("[ledger](../claims.md)", f"[ledger]({HOME}/book/claims.html)"),
        ("[GPT](../transformers/gpt2.ipynb#gpt)", f"[GPT]({HOME}/book/transformers/gpt2.html#gpt)"),
        ("[x](#rms-norm)", f"[x]({NORM}#rms-norm)"),
        ("[out](https://example.org)", "[out](https://example.org)"),
        (
            "{py:func}`~handbook_src.dispatch.resolve`",
            f"[`resolve`]({HOME}/book/api/ground.html#handbook_src.dispatch.resolve)",
        ),
        ("{func}`torch.nn.Linear`", "`torch.nn.Linear`"),
        ("{cite:p}`zhang2019root`", "([Zhang & Sennrich 2019](https://arxiv.org/abs/1910.07467))"),
        ("{cite:t}`ba2016layer` say", "[Ba et al. (2016)](https://arxiv.org/abs/1607.06450) say"),
        ("$x$ and `{not a role}`", "$x$ and `{not a role}`"),
        ("(rms-norm)=\n## RMSNorm", "## RMSNorm"),
        ("% a comment\ntext", "text"),
        ("$$\nx\n$$ (eq-rms)", "$$\nx\n$$"),
        ("```{math}\n:label: eq-rms\nx^2\n```", "$$\nx^2\n$$"),
        ("```{admonition} Exercise\n:class: tip\nShow it.\n```", "> **Exercise**\n>\n> Show it."),
        (":::{note}\nMind $x$.\n:::", "> **Note**\n>\n> Mind $x$."),
        ("```python\nx = '{ref}`a`'\n```", "```python\nx = '{ref}`a`'\n```"),
        ("```{list-table} Symbols\n* - a\n  - b\n* - 1\n  - 2\n```", "**Symbols**\n\n| a | b |\n|---|---|\n| 1 | 2 |"),
        ("::::{div} cards\n:::{div} card\nIn.\n:::\n::::", "In."),
        ("```{code-block} python\n:caption: c\nx = 1\n```", "```python\nx = 1\n```"),
        ("text {.handbook-lead}", "text {.handbook-lead}"),
    ],
)
def test_each_form_becomes_plain(context: colab.Context, myst: str, markdown: str) -> None:
    assert colab.plain(myst, context) == markdown


def test_nested_admonitions_keep_their_order(context: colab.Context) -> None:
    text = "````{admonition} Exercise\nShow.\n\n```{admonition} Solution\n:class: dropdown\nSo.\n```\n````"
    out = colab.plain(text, context)
    assert out.startswith("> **Exercise**")
    assert "> <details><summary>Solution</summary>" in out
    assert out.index("Show.") < out.index("So.")


def test_quoted_source_is_the_source(context: colab.Context) -> None:
    text = "```{literalinclude} ../../handbook_src/dispatch.py\n:pyobject: has_triton\n```"
    out = colab.plain(text, context)
    assert f"[`handbook_src/dispatch.py`]({site.repository()}/blob/main/handbook_src/dispatch.py)" in out
    assert "def has_triton(" in out
    assert "def resolve(" not in out


def test_quoted_maths_is_the_function_without_its_docstring(context: colab.Context) -> None:
    out = colab.plain("```{handbook-maths} functional.rms_norm\n:caption: RMS norm\n```", context)
    assert "handbook_src/functional/normalisation/norm.py`]" in out
    assert '@operation(widens="x")\ndef rms_norm(' in out
    assert "torch.sqrt(mean_square + eps)" in out
    assert "Zhang" not in out
    with pytest.raises(DataError, match="no_such_norm"):
        colab.plain("```{handbook-maths} functional.no_such_norm\n```", context)


SOURCE = (
    "import os\n\n@cache\ndef f():\n    # [a]\n    x = 1\n    # [b]\n    return x\n\n"
    "class C:\n    def g(self):\n        pass\n"
)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"pyobject": "f"}, "@cache\ndef f():\n    # [a]\n    x = 1\n    # [b]\n    return x"),
        ({"pyobject": "C.g"}, "def g(self):\n    pass"),
        ({"start-after": "[a]", "end-before": "[b]"}, "x = 1"),
        ({"start-at": "x = 1", "end-at": "return"}, "x = 1\n# [b]\nreturn x"),
        ({"lines": "1,4-5"}, "import os\ndef f():\n    # [a]"),
    ],
)
def test_excerpts(options: dict[str, str], text: str) -> None:
    assert excerpt(SOURCE, options) == text


def test_an_excerpt_of_nothing_is_refused() -> None:
    with refuses(DataError, "C.h"):
        excerpt(SOURCE, {"pyobject": "C.h"})
    with refuses(DataError, "[z]"):
        excerpt(SOURCE, {"start-after": "[z]"})


# ------------------------------------------------------------------ the real notebooks
@pytest.mark.site
def test_notebooks_hold_no_myst(html: Path, chapter_names: list[str]) -> None:
    left = re.compile(
        r"\{(?:ref|eq|numref|term|cite|glue|doc|func|py|math)[\w:]*\}`|^(?:`{3,}|:{3,})\{|^\([\w-]+\)=", re.M
    )
    for name in chapter_names:
        notebook = nbformat.read(html / f"{name}.ipynb", as_version=4)
        nbformat.validate(notebook)
        prose = [re.sub(r"(?ms)^```\w.*?^```", "", c.source) for c in notebook.cells if c.cell_type == "markdown"]
        assert not [found[0] for text in prose for found in left.finditer(text)], name
        assert notebook.cells[1].source == colab.install_line()
        assert f"git+{site.repository()}" in notebook.cells[1].source


@pytest.fixture(scope="session")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The package as a reader has it: the wheel, unpacked outside the repository."""
    folder = tmp_path_factory.mktemp("wheel")
    call = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", str(folder)]
    subprocess.run([*call, str(site.ROOT)], check=True, capture_output=True)
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder / "lib")
    return folder / "lib"


@pytest.mark.site
@pytest.mark.slow
def test_a_notebook_runs_outside_the_repository(
    html: Path, stage: Path, chapter_names: list[str], installed: Path, tmp_path: Path
) -> None:
    def seconds(name: str) -> float:
        metadata = json.loads((stage / f"{name}.ipynb").read_text("utf8"))["metadata"]
        return float(metadata.get("handbook", {}).get("verified", {}).get("seconds", 1e9))

    name = min(chapter_names, key=seconds)
    notebook = nbformat.read(html / f"{name}.ipynb", as_version=4)
    notebook.cells[1].source = f"import handbook_src\nassert handbook_src.__file__.startswith({str(installed)!r})"
    nbformat.write(notebook, tmp_path / "taken.ipynb")
    env = dict(os.environ, PYTHONPATH=str(installed), PYTHONSAFEPATH="1", TQDM_DISABLE="1")
    call = [sys.executable, "-m", "papermill", "taken.ipynb", "done.ipynb", "-k", "python3", "--no-progress-bar"]
    run = subprocess.run(call, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-3000:]
