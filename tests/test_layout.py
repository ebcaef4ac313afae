"""The layout law: floors, stems, sizes, clean linters, a cheap and silent import."""

from __future__ import annotations

import ast
import importlib
import inspect
import os
import re
import subprocess
import sys
from pathlib import Path

import jupytext
import pytest
import torch

from handbook_src.catalogue.table import PARTS, components
from handbook_src.publish.fingerprint import public_face

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "handbook_src"
FUNCTION, FILE, KERNEL_FILE, CONSTRUCTOR = 40, 350, 400, 10

#: Files whose tests stand under another name, and where.
TESTED_ELSEWHERE = {"models/transformers/folder.py": "tests/models/transformers/test_gpt2.py"}

#: Floors whose files stand in the folder of their part, and which other parts each part may use.
FLOORS = ("functional", "layers", "models")
MAY_USE = {
    "attention": {"compression", "foundations", "normalisation", "positions"},
    "cnn": {"convolution", "normalisation"},
    "embeddings": {"attention", "convolution", "foundations", "normalisation", "transformers"},
    "transformers": {"attention", "foundations", "normalisation"},
}

#: Constructors whose arguments are those of a torch class, one for one: fewer would not drop in.
DROP_INS = {"layers/convolution/conv.py": "Conv2d", "layers/convolution/conv_transpose.py": "ConvTranspose2d"}


def run(*command: str, **env: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, *command], cwd=ROOT, capture_output=True, text=True, timeout=600,
        env={**os.environ, "OMP_NUM_THREADS": "1", **env},
    )  # fmt: skip


@pytest.mark.parametrize(
    "command",
    [
        ("-c", "import sys; from importlinter.cli import lint_imports; sys.exit(lint_imports(no_cache=True))"),
        ("-m", "ruff", "check", "."),
        ("-m", "ruff", "format", "--check", "."),
        ("-m", "mypy"),
        ("-m", "codespell_lib"),
    ],
    ids=["import-linter", "ruff check", "ruff format", "mypy", "codespell"],
)
def test_the_tree_is_clean(command):
    done = run(*command)
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]


CHAPTERS = [p for p in sorted((ROOT / "book").glob("*/*.md")) if "kernelspec:" in p.read_text("utf8")[:1000]]


@pytest.mark.parametrize("chapter", CHAPTERS, ids=lambda p: p.stem)
def test_the_chapters_code_is_clean(chapter):
    """No unused import, no undefined or unused name; how a cell looks is the author's choice."""
    cells = [c.source for c in jupytext.read(chapter).cells if c.cell_type == "code"]
    rules = ["--isolated", "--select", "F", "--ignore", "F704,F722", "--target-version", "py311"]
    done = subprocess.run(
        [sys.executable, "-m", "ruff", "check", *rules, "--output-format", "concise", "-"],
        input="\n\n".join(cells), capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout


def sources(*folders: str) -> list[Path]:
    return [p for folder in folders for p in sorted((ROOT / folder).rglob("*.py")) if "_build" not in p.parts]


def lines_of(path: Path) -> int:
    """Lines without docstrings: they are the pages of the reference, not code."""
    text = path.read_text("utf8")
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    docs = [n.body[0] for n in ast.walk(ast.parse(text)) if isinstance(n, documented) and ast.get_docstring(n)]
    return text.count("\n") - sum(d.end_lineno - d.lineno + 1 for d in docs)


def functions(path: Path) -> list[ast.FunctionDef | ast.AsyncFunctionDef]:
    tree = ast.parse(path.read_text("utf8"))
    return [n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef)]


def body_of(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Lines of the body, without the docstring."""
    body = function.body[1:] if ast.get_docstring(function) and len(function.body) > 1 else function.body
    return function.end_lineno - body[0].lineno + 1


def test_functions_are_short():
    long = [
        f"{path.relative_to(ROOT)}:{f.lineno} {f.name}: {body_of(f)} lines, at most {FUNCTION}"
        for path in sources("handbook_src", "kernels", "tests")
        for f in functions(path)
        if body_of(f) > FUNCTION
    ]
    assert not long, "\n".join(long)


def test_files_are_short():
    long = []
    for path in sources("handbook_src", "kernels"):
        most = KERNEL_FILE if "kernels" in path.parts else FILE
        if (count := lines_of(path)) > most:
            long.append(f"{path.relative_to(ROOT)}: {count} lines without docstrings, at most {most}")
    assert not long, "\n".join(long)


def is_drop_in(path: Path, constructor: ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
    """Whether the arguments are torch's own, in torch's order, and then ``backend``."""
    theirs = DROP_INS.get(path.relative_to(PACKAGE).as_posix())
    if theirs is None:
        return False
    a = constructor.args
    return [*(x.arg for x in a.args), *(x.arg for x in a.kwonlyargs)] == [
        *inspect.signature(getattr(torch.nn, theirs).__init__).parameters,
        "backend",
    ]


def test_constructors_take_few_arguments():
    wide = []
    for path in sources("handbook_src"):
        for f in functions(path):
            a = f.args
            count = len(a.posonlyargs) + len(a.args) + len(a.kwonlyargs) - 1
            if f.name == "__init__" and count >= CONSTRUCTOR and not is_drop_in(path, f):
                wide.append(f"{path.relative_to(ROOT)}:{f.lineno}: {count} arguments, under {CONSTRUCTOR}")
    assert not wide, "\n".join(wide)


ROOMS = ("kernels", "functional", "layers", "losses", "optim", "metrics", "data", "models", "training")


def modules(*rooms: str) -> list[str]:
    found = [p for room in rooms for p in sorted((PACKAGE / room).rglob("*.py")) if p.stem != "__init__"]
    return [p.relative_to(PACKAGE).as_posix() for p in found]


@pytest.mark.parametrize("module", modules(*ROOMS))
def test_a_topic_keeps_its_address_in_the_tests(module):
    """``layers/pooling/random_pooling.py``: ``tests/layers/pooling/test_random_pooling.py`` or ``test_pooling.py``."""
    folder, stem = Path(module).parent, Path(module).stem
    if module in TESTED_ELSEWHERE:
        assert (ROOT / TESTED_ELSEWHERE[module]).exists()
        return
    words = stem.strip("_").split("_")
    spans = {"_".join(words[i:j]) for i in range(len(words)) for j in range(i + 1, len(words) + 1)}
    wanted = [ROOT / "tests" / folder / f"test_{span}.py" for span in spans]
    assert any(p.exists() for p in wanted), f"no tests/{folder}/test_{stem}.py"


def test_every_topic_stands_in_the_folder_of_a_part():
    """``<floor>/<part>/<topic>.py``; the folders are the parts of the catalogue."""
    places = [Path(m) for m in modules(*FLOORS)]
    assert not [str(p) for p in places if len(p.parts) != 3 or p.parts[1] not in PARTS]
    assert {c.part for c in components()} <= set(PARTS)


def test_a_part_uses_only_the_parts_that_it_may():
    wrong = []
    for module in modules(*FLOORS):
        part = Path(module).parts[1]
        for node in ast.walk(ast.parse((PACKAGE / module).read_text("utf8"))):
            where = (node.module or "").split(".") if isinstance(node, ast.ImportFrom) else []
            if len(where) > 2 and where[1] in FLOORS and where[2] not in {part, *MAY_USE.get(part, ())}:
                wrong.append(f"{module}:{node.lineno}: {part} may not use {where[2]}")
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("room", ["data", "functional", "layers", "losses", "metrics", "models", "training"])
def test_the_public_face_hands_out_every_name(room):
    """Also in ``dir()``, and a function wins over the module of its name, in whatever order they are imported."""
    face = public_face(PACKAGE / room)
    package = importlib.import_module(f"handbook_src.{room}")
    assert sorted(face) == package.__all__ == dir(package)
    for name, file in face.items():
        importlib.import_module(".".join(file.relative_to(ROOT).with_suffix("").parts))
        assert not inspect.ismodule(getattr(package, name)), name


def test_the_workshop_shadows_nobody():
    """A root package named kernels would hide the one that transformers looks for."""
    assert not (ROOT / "kernels" / "__init__.py").exists()


#: One letter of each stands in brackets, so that this file passes its own test.
FOREIGN = re.compile(
    "|".join(
        [
            "/[r]oot/",
            r"/[h]ome/\w+/",
            "/[w]ork/(main|shared|tmp)",
            r"\.librar[y]/",
            r"[p]ypi\.org/(simple|packages)",
            r"[p]ythonhosted\.org",
            r"download\.[p]ytorch\.org",
            "(extra-)?[i]ndex-url",
        ]
    )
)


def tracked() -> list[Path]:
    done = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        pytest.skip("not a git checkout")
    return [ROOT / name for name in done.stdout.split("\0") if name]


def test_the_tree_names_no_machine_and_no_registry():
    found = []
    for path in tracked():
        try:
            text = path.read_text("utf8")
        except (UnicodeDecodeError, FileNotFoundError):
            continue
        found += [f"{path.relative_to(ROOT)}: {m[0]}" for m in FOREIGN.finditer(text)]
    assert not found, "\n".join(found)


def test_text_sources_carry_no_outputs():
    assert not [p for p in tracked() if p.suffix == ".ipynb"]


COST = """
import sys, time
import torch
before = set(sys.modules)
start = time.perf_counter()
import handbook_src
seconds = time.perf_counter() - start
heavy = {"triton", "transformers", "sklearn", "matplotlib", "tokenizers", "scipy", "IPython"}
assert not heavy & (set(sys.modules) - before), heavy & (set(sys.modules) - before)
sys.stderr.write(str(seconds))
"""


def test_the_import_is_cheap_and_silent():
    """At most 100 ms beyond torch; the best of five, because the machine may be busy."""
    seconds = []
    for _ in range(5):
        done = run("-W", "error", "-c", COST)
        assert done.returncode == 0, done.stderr
        assert done.stdout == ""
        seconds.append(float(done.stderr))
        if seconds[-1] <= 0.1:
            return
    raise AssertionError(f"import handbook_src costs {min(seconds) * 1e3:.0f} ms beyond torch, at most 100")


LIGHT = """
import sys, importlib
import torch
sys.modules["triton"] = None  # as on a machine without it
before = set(sys.modules)
for name in sys.argv[1:]:
    importlib.import_module(name)
heavy = {"transformers", "sklearn", "matplotlib", "tokenizers", "scipy", "IPython", "pandas"}
assert not heavy & (set(sys.modules) - before), heavy & (set(sys.modules) - before)
from handbook_src.functional.normalisation.norm import rms_norm
rms_norm(torch.ones(2, 3), torch.ones(3))
"""


def test_the_house_stands_without_triton_and_oracles():
    rooms = [m for m in modules(*ROOMS) if not m.startswith("kernels/")]
    names = [f"handbook_src.{m.removesuffix('.py').replace('/', '.')}" for m in rooms]
    done = run("-W", "error", "-c", LIGHT, *names)
    assert done.returncode == 0, done.stderr
    assert done.stdout == done.stderr == ""
