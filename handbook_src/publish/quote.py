"""What a page quotes of the source: the lines of a ``literalinclude``, the function of a ``handbook-maths``."""

from __future__ import annotations

import ast
import textwrap
from pathlib import Path

from handbook_src.catalogue.docstring import definition
from handbook_src.errors import DataError


def excerpt(source: str, options: dict[str, str]) -> str:
    """What ``:pyobject:``, ``:start-after:``, ``:end-before:`` and ``:lines:`` leave of a file.

    Raises:
        DataError: the object or the marker is not in the file.
    """
    lines = source.splitlines()
    if "pyobject" in options:
        first, last = extent(ast.parse(source), options["pyobject"])
        lines = lines[first - 1 : last]
    if "start-after" in options or "start-at" in options:
        marker = options.get("start-after") or options["start-at"]
        lines = lines[find(lines, marker) + ("start-after" in options) :]
    if "end-before" in options or "end-at" in options:
        marker = options.get("end-before") or options["end-at"]
        lines = lines[: find(lines, marker) + ("end-at" in options)]
    if "lines" in options:
        lines = [lines[i - 1] for i in numbers(options["lines"], len(lines))]
    return textwrap.dedent("\n".join(lines))


def maths(name: str) -> tuple[Path, str]:
    """The file and the source of a public name of the package (``functional.rms_norm``), without its docstring.

    Raises:
        DataError: the package has no such name.
    """
    found = definition(f"handbook_src.{name}")
    if found is None:
        raise DataError(
            "handbook-maths", got=name, want="a public name, such as functional.rms_norm", remedy="Check it."
        )
    _, file, node = found
    lines = file.read_text("utf8").splitlines()
    first, last = span(node)
    if ast.get_docstring(node) is None:
        return file, "\n".join(lines[first - 1 : last])
    words = node.body[0]
    return file, "\n".join(lines[first - 1 : words.lineno - 1] + lines[words.end_lineno : last])


def extent(tree: ast.Module, dotted: str) -> tuple[int, int]:
    """First and last line of a function, class or method."""
    body: list[ast.stmt] = tree.body
    found: ast.stmt | None = None
    for name in dotted.split("."):
        found = next((n for n in body if getattr(n, "name", None) == name), None)
        if found is None:
            raise DataError("literalinclude", got=dotted, want="an object of the file", remedy="Check :pyobject:.")
        body = getattr(found, "body", [])
    assert found is not None
    return span(found)


def span(node: ast.stmt) -> tuple[int, int]:
    """First line, decorators included, and last line of a definition."""
    decorators = getattr(node, "decorator_list", [])
    return min([node.lineno, *(d.lineno for d in decorators)]), node.end_lineno or node.lineno


def find(lines: list[str], marker: str) -> int:
    """The index of the first line that holds ``marker``."""
    for i, line in enumerate(lines):
        if marker in line:
            return i
    raise DataError("literalinclude", got=repr(marker), want="a marker that stands in the file", remedy="Check it.")


def numbers(spec: str, last: int) -> list[int]:
    """``1,3-5,8-`` as line numbers."""
    found: list[int] = []
    for part in spec.split(","):
        first, dash, end = part.strip().partition("-")
        found += range(int(first or 1), (int(end) if end else last) + 1) if dash else [int(first)]
    return found
