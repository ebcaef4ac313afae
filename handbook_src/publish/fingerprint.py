"""The content key of a chapter: what its execution reads, and nothing else.

Counted: the code cells, the parameters, the bytes of every module of
``handbook_src`` that the code imports (directly or not, read from the syntax
tree, so an import inside a function counts), the data files beside these
modules, the files that the code names by path, the installed versions of what
is pinned, Python's minor version, and the GPU's name.

Not counted: prose. A page's text is merged with the kept outputs at each build,
so an edit of a sentence reaches the page without an execution. Also not counted
are the press itself and the catalogue's two tables, apart from the rows whose id
the chapter's code names.
"""

from __future__ import annotations

import ast
import hashlib
import json
import re
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import cache, cached_property
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from handbook_src.publish import environment
from handbook_src.publish.book import Book

PACKAGE = "handbook_src"
#: Counted up when the press changes so that earlier outputs no longer hold.
FORMAT = 1
#: Imported by nothing that a chapter computes with.
PRESS = f"{PACKAGE}.publish"
#: Tables of which a chapter reads the rows that it names.
TABLES = (f"{PACKAGE}/catalogue/components.tsv", f"{PACKAGE}/catalogue/claims.tsv")
#: Pinned tools that can't reach a chapter's outputs: checkers, testers, renderers.
TOOLS = re.compile(
    r"ruff|mypy|mypy-extensions|codespell|import-linter|grimp|pytest|pytest-.*|execnet|iniconfig|pluggy|nbval|coverage"
    r"|hypothesis|pre-commit|cfgv|identify|nodeenv|virtualenv|distlib|python-discovery|build|pyproject-hooks|hatchling"
    r"|trove-classifiers|playwright|sphinx|sphinx-.*|sphinxcontrib-.*|myst-.*|jupyter-book|jupyter-cache|jupytext"
    r"|pydata-sphinx-theme|accessible-pygments|alabaster|babel|snowballstemmer|imagesize|docutils|pybtex.*|latexcodec"
    r"|beautifulsoup4|soupsieve|linkify-it-py|uc-micro-py|sqlalchemy|greenlet"
)
#: What shapes an execution apart from a cell's source.
TELLING_TAGS = {"parameters", "raises-exception", "skip-execution"}


@dataclass
class Fingerprints:
    """Keys for one book; remembers what it has read, so make one per build."""

    book: Book
    device: str | None = None
    _imports: dict[Path, set[str]] = field(default_factory=dict)
    _bytes: dict[Path, str] = field(default_factory=dict)
    _resolved: dict[str, list[Path]] = field(default_factory=dict)
    _beside: dict[Path, list[Path]] = field(default_factory=dict)

    def key(self, notebook: Any, page: str, parameters: dict[str, Any]) -> str:
        """Twenty hexadecimal digits that change when the outputs may."""
        cells = [c for c in notebook.cells if c.cell_type == "code"]
        sources = [c.source for c in cells]
        tags = [sorted(TELLING_TAGS & set(c.metadata.get("tags", []))) for c in cells]
        facts = [FORMAT, page, sources, tags, parameters, self.versions, sys.version_info[:2], self.gpu(parameters)]
        digest = hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode())
        trees = list(parsed(sources))
        said = set(strings(trees))
        for path in sorted(self.files(trees, said, self.book.root / page)):
            digest.update(f"{path.relative_to(self.book.root).as_posix()}\0{self.digest(path)}\n".encode())
        records = self.book.root / f"{page}.record.json"
        digest.update(records.read_bytes() if records.exists() else b"")
        for row in self.rows(said):
            digest.update(row.encode())
        return digest.hexdigest()[:20]

    @cached_property
    def versions(self) -> dict[str, str]:
        """Installed versions of all pinned packages that a chapter's outputs can depend on."""
        return _versions(tuple(environment.pins(self.book.root)))

    def gpu(self, parameters: dict[str, Any]) -> str | None:
        device = str(parameters.get("device", "cpu"))
        return None if device == "cpu" else device_name(device)

    def digest(self, path: Path) -> str:
        if path not in self._bytes:
            self._bytes[path] = hashlib.sha256(path.read_bytes()).hexdigest()
        return self._bytes[path]

    def files(self, trees: list[ast.AST], said: set[str], page: Path) -> set[Path]:
        """Modules, the data beside them, and files named by path."""
        modules = self.modules(trees)
        return modules | {d for f in {m.parent for m in modules} for d in self.data_in(f)} | set(self.named(said, page))

    def modules(self, trees: Iterable[ast.AST]) -> set[Path]:
        """Files of the package that the code imports, directly or not."""
        todo = [name for tree in trees for name in names_in(tree)]
        seen: set[str] = set()
        files: set[Path] = set()
        while todo:
            name = todo.pop()
            if name in seen or name == PRESS or name.startswith(PRESS + "."):
                continue
            seen.add(name)
            todo += [name.rpartition(".")[0]] if "." in name else []
            for path in self.resolve(name):
                if path not in files:
                    files.add(path)
                    todo += self.imports(path)
        return files

    def resolve(self, name: str) -> list[Path]:
        if name not in self._resolved:
            self._resolved[name] = self._files_of(name)
        return self._resolved[name]

    def _files_of(self, name: str) -> list[Path]:
        """The file of a dotted name; a public name leads to the file behind it, ``room.*`` to all of them."""
        base = self.book.root.joinpath(*name.split("."))
        face = public_face(base.parent)
        if base.name == "*":
            return sorted(set(face.values()))
        paths = (face.get(base.name), base.with_suffix(".py"), base / "__init__.py")
        return [p for p in paths if p is not None and p.exists()][:1]

    def imports(self, path: Path) -> set[str]:
        if path not in self._imports:
            parts = path.relative_to(self.book.root).with_suffix("").parts
            self._imports[path] = _names_of(path.read_text("utf8"), ".".join(parts))
        return self._imports[path]

    def data_in(self, folder: Path) -> list[Path]:
        if folder not in self._beside:
            tables = [self.book.root / table for table in TABLES]
            others = {".py", ".pyi", ".pyc", ".md", ".part"}
            found = [p for p in folder.iterdir() if p.suffix not in others and p.is_file() and p not in tables]
            self._beside[folder] = found
        return self._beside[folder]

    def named(self, said: set[str], page: Path) -> Iterator[Path]:
        """Files that the code names, from the page's folder or from the root; of a folder, all in it."""
        for text in said:
            if not 0 < len(text) < 200 or "\n" in text or "/" not in text:
                continue
            for base in (page.parent, self.book.root):
                path = (base / text).resolve()
                if not path.is_relative_to(self.book.root) or path.is_relative_to(self.book.build):
                    continue
                if path.is_file():
                    yield path
                elif path.is_dir() and len(path.relative_to(self.book.root).parts) > 1:
                    yield from (p for p in path.rglob("*") if p.is_file() and p.suffix != ".pyc")

    def rows(self, said: set[str]) -> list[str]:
        """The rows of the catalogue's tables whose id the code names."""
        return [line for line in self.table_lines if line.partition("\t")[0] in said]

    @cached_property
    def table_lines(self) -> list[str]:
        tables = [self.book.root / table for table in TABLES]
        return [line for path in tables if path.exists() for line in path.read_text("utf8").splitlines()]


def parsed(sources: Iterable[str]) -> Iterator[ast.AST]:
    """Syntax trees of cells; IPython's own lines are left out, and so is a cell that doesn't parse."""
    for text in sources:
        plain = "\n".join("" if line.lstrip().startswith(("%", "!")) else line for line in text.splitlines())
        try:
            yield ast.parse(plain)
        except SyntaxError:  # its execution will say so
            continue


def names_in(tree: ast.AST, here: str = "") -> set[str]:
    """Dotted names of the package that a syntax tree imports, touches or spells out; ``room.*`` is all of a room."""
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {f"{a.name}.*" if a.asname else a.name for a in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                base = ".".join([*here.split(".")[: -node.level], *filter(None, [base])])
            found |= {base} | {f"{base}.{a.name}{end}" for a in node.names for end in ("", ".*")}
        elif isinstance(node, ast.Attribute):
            found.add(_chain(node))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            found.add(node.value)  # importlib.import_module("handbook_src....")
    return {n for n in found if re.fullmatch(rf"{PACKAGE}(\.\w+)*(\.\*)?", n)}


@cache
def public_face(package: Path) -> dict[str, Path]:
    """The names that ``__init__.pyi`` hands out, each with the file that defines it."""
    stub = package / "__init__.pyi"
    lines = ast.parse(stub.read_text("utf8")).body if stub.exists() else []
    return {
        name.name: package.joinpath(*(line.module or "").split(".")).with_suffix(".py")
        for line in lines
        if isinstance(line, ast.ImportFrom)
        for name in line.names
    }


@cache
def _names_of(text: str, here: str) -> set[str]:
    try:
        return names_in(ast.parse(text), here)
    except SyntaxError:  # its bytes still count, and its import will say so
        return set()


def _chain(node: ast.expr) -> str:
    parts: list[str] = []
    while isinstance(node, ast.Attribute):
        parts.append(node.attr)
        node = node.value
    return ".".join([node.id, *reversed(parts)]) if isinstance(node, ast.Name) else ""


def strings(trees: Iterable[ast.AST]) -> Iterator[str]:
    for tree in trees:
        for node in ast.walk(tree):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                yield node.value


@cache
def _versions(names: tuple[str, ...]) -> dict[str, str]:
    """Read once a process: 140 look-ups take 0.1 s, and the ledger asks for every chapter."""
    return {name: found for name in names if (found := _version(name))}


def _version(name: str) -> str | None:
    if TOOLS.fullmatch(name):
        return None
    try:
        return version(name)
    except PackageNotFoundError:
        return "-"


def device_name(device: str) -> str:
    """The accelerator's own name, which belongs beside every figure measured on it."""
    import torch

    if torch.device(device).type == "cuda" and torch.cuda.is_available():
        return torch.cuda.get_device_name(torch.device(device))
    return device
