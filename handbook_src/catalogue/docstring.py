"""Reads what a docstring says of an object, from its source, without importing it.

Reading the syntax tree keeps ``show`` at a tenth of a second: importing a layer
would load torch first.
"""

from __future__ import annotations

import ast
import importlib.util
import inspect
import re
import textwrap
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

Definition = ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
POINTER = re.compile(r":(?:func|class|meth):`~?\.?([\w.]+)`")
SECTION = re.compile(r"(Args|Attributes|Raises|Returns|Yields|Shape|Typical values|Source|Example|Note)s?:\s*(.*)")


@dataclass(frozen=True)
class Facts:
    """What the source of one object says of it."""

    path: str
    file: Path
    sentence: str = ""
    formulas: tuple[str, ...] = ()
    sections: dict[str, str] = field(default_factory=dict)
    shapes: tuple[str, ...] = ()
    pointers: tuple[str, ...] = ()


def facts(path: str) -> Facts | None:
    """What the object at the dotted ``path`` says of itself; None when its source is not found."""
    found = definition(path)
    if found is None:
        return None
    module, file, node = found
    line = [node, *_bases(node, file)]
    text = inspect.cleandoc(next(filter(None, map(ast.get_docstring, line)), ""))
    return Facts(
        path=path,
        file=file,
        sentence=_sentence(text),
        formulas=tuple(_formulas(text)),
        sections=_sections(text),
        shapes=tuple(next(filter(None, map(_shapes, line)), [])),
        pointers=tuple(p for p in (_resolve(name, module, file) for name in POINTER.findall(text)) if p),
    )


def followed(path: str) -> list[Facts]:
    """The object's facts, then those of the objects its docstring points to."""
    first = facts(path)
    if first is None:
        return []
    return [first, *(f for f in map(facts, dict.fromkeys(first.pointers)) if f is not None and f.path != path)]


@cache
def _tree(file: Path) -> ast.Module:
    return ast.parse(file.read_text(encoding="utf-8"))


def _module_file(name: str) -> Path | None:
    """The file of a module, found on disk: ``find_spec`` would import what stands around it.

    Of a room with a public face it is the stub, which says where each name comes from.
    """
    top, *inner = name.split(".")
    spec = importlib.util.find_spec(top) if top else None
    if spec is None or not spec.origin:
        return None
    base = Path(spec.origin)
    if inner:
        base = base.parent.joinpath(*inner)
        base = base / "__init__.py" if base.is_dir() else base.with_suffix(".py")
    stub = base.with_name("__init__.pyi")
    if base.name == "__init__.py" and stub.is_file():
        return stub
    return base if base.suffix == ".py" and base.is_file() else None


def definition(path: str) -> tuple[str, Path, Definition] | None:
    """The module, file and definition of a dotted path, through one re-export at most."""
    module, _, name = path.rpartition(".")
    file = _module_file(module) if module else None
    if file is None:
        outer = definition(module) if "." in module else None
        if outer is not None and isinstance(outer[2], ast.ClassDef):
            return _member(outer, name)
        return None
    for node in _tree(file).body:
        if isinstance(node, Definition) and node.name == name:
            return module, file, node
    target = _imported(name, module, file)
    return definition(target) if target and target != path else None


def _bases(node: Definition, file: Path) -> list[Definition]:
    """The classes of the same file that a class builds on, nearest first: it inherits their words."""
    names = [b.id for b in node.bases if isinstance(b, ast.Name)] if isinstance(node, ast.ClassDef) else []
    direct = [n for n in _tree(file).body if isinstance(n, ast.ClassDef) and n.name in names and n is not node]
    return [found for base in direct for found in (base, *_bases(base, file))]


def _member(outer: tuple[str, Path, Definition], name: str) -> tuple[str, Path, Definition] | None:
    module, file, cls = outer
    for node in cls.body:
        if isinstance(node, Definition) and node.name == name:
            return module, file, node
    return None


def _imported(name: str, module: str, file: Path) -> str | None:
    """Where ``name`` comes from, if the file imports it by name."""
    for node in ast.walk(_tree(file)):
        if isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                if (alias.asname or alias.name) == name:
                    return f"{module}.{node.module}.{alias.name}" if node.level else f"{node.module}.{alias.name}"
    return None


def _resolve(name: str, module: str, file: Path) -> str | None:
    """The dotted path that a docstring's pointer means, if it is one of ours."""
    if name.startswith("handbook_src."):
        return name
    head, _, rest = name.partition(".")
    if any(isinstance(n, Definition) and n.name == head for n in _tree(file).body):
        return f"{module}.{name}"
    target = _imported(head, module, file)
    return ".".join(filter(None, [target, rest])) if target and target.startswith("handbook_src") else None


def _sentence(text: str) -> str:
    """The docstring's first paragraph in plain words."""
    first = re.split(r"\n\s*\n|\n\s*\.\. ", text, maxsplit=1)[0]
    return plain(first)


def plain(text: str) -> str:
    """Reading text without reStructuredText marks, on one line."""
    text = re.sub(r":\w+(?::\w+)?:`~?([^`<]+?)(?:\s*<[^>]*>)?`", lambda m: m.group(1), text)
    return re.sub(r"\s+", " ", text.replace("``", "")).strip()


def _formulas(text: str) -> list[str]:
    """The bodies of the ``.. math::`` blocks, tidied."""
    lines, found = text.splitlines(), []
    for at, line in enumerate(lines):
        mark = re.match(r"(\s*)\.\. math::\s*(.*)", line)
        if not mark:
            continue
        body = [mark.group(2)] if mark.group(2) else []
        for following in lines[at + 1 :]:
            inside = len(following) - len(following.lstrip()) > len(mark.group(1))
            if following.strip() and not inside:
                break
            if not re.match(r"\s*:\w+:", following):
                body.append(following.strip())
        found.append("\n".join(re.sub(r"[ \t]+", " ", b) for b in body if b))
    return found


def _sections(text: str) -> dict[str, str]:
    """The named sections, dedented: ``Source``, ``Shape``, ``Typical values`` and so on."""
    found: dict[str, list[str]] = {}
    name = None
    for line in text.splitlines():
        head = SECTION.fullmatch(line) if not line.startswith(" ") else None
        if head:
            name = head.group(1)
            found[name] = [head.group(2)] if head.group(2) else []
        elif line.strip() and not line.startswith(" "):
            name = None
        elif name:
            found[name].append(line)
    return {k: textwrap.dedent("\n".join(v)).strip() for k, v in found.items()}


def _shapes(node: Definition) -> list[str]:
    """The tensor arguments and the result, as the signature annotates them."""
    if isinstance(node, ast.ClassDef):
        forward = [n for n in node.body if isinstance(n, ast.FunctionDef) and n.name in ("forward", "__call__")]
        return _shapes(forward[0]) if forward else []
    arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
    pairs = [(a.arg, a.annotation) for a in arguments] + [("returns", node.returns)]
    return [f"{name}: {_shape(note)}" for name, note in pairs if note is not None and "Tensor" in ast.unparse(note)]


def _shape(note: ast.expr) -> str:
    """``Float[Tensor, "*lead d"] | None`` as ``(*lead d) float, optional``."""
    text = ast.unparse(note)
    text = re.sub(r"(\w+)\[Tensor, ['\"]\s*([^'\"]*)['\"]\]", lambda m: f"({m[2].strip()}) {m[1].lower()}", text)
    return re.sub(r"\s*\|\s*None\b", ", optional", text)
