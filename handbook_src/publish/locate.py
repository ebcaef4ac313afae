"""From a place in a staged notebook back to the line of the text that people edit."""

from __future__ import annotations

import re
from pathlib import Path

import nbformat

from handbook_src.publish.book import Book

FENCE = re.compile(r"^(`{3,}|~{3,})\{code-cell\}")
#: MyST-NB counts this many lines a cell: norm.ipynb:40002 is cell 4, line 1 of its paragraph.
LINES_A_CELL = 10_000


def line_of_cell(source: Path, number: int) -> int | None:
    """Line, from 1, of the first line of code in the code cell of this number, from 0."""
    lines = source.read_text("utf8").splitlines()
    fences = [i for i, line in enumerate(lines) if FENCE.match(line)]
    if number >= len(fences):
        return None
    at = fences[number] + 1
    if at < len(lines) and lines[at].strip() == "---":
        at += 1
        while at < len(lines) and lines[at].strip() != "---":
            at += 1
        at += 1
    while at < len(lines) and (not lines[at].strip() or lines[at].startswith(":")):
        at += 1
    return at + 1


def locate(message: str, book: Book) -> str:
    """Point a message of Sphinx about a staged page at its text."""
    match = re.search(r"\S*_build/stage/(\S+)\.ipynb(?::(\d+))?", message)
    if not match:
        return message.replace(f"{book.stage}/", "").replace(f"{book.root}/", "")
    page, source = match[1], book.root / f"{match[1]}.md"
    if not source.exists():
        return message.replace(f"{book.stage}/", "")
    line = _line(book, page, source, int(match[2])) if match[2] else None
    return message.replace(match[0], f"{page}.md" + (f":{line}" if line else ""))


def _line(book: Book, page: str, source: Path, place: int) -> int | None:
    cell, line = divmod(place, LINES_A_CELL)
    cells = nbformat.read(book.staged(page), as_version=4).cells
    if not 0 < cell <= len(cells):
        return None
    wanted = cells[cell - 1].source.splitlines()[max(line - 2, 0) :][:1]
    if not wanted:
        return None
    for number, text in enumerate(source.read_text("utf8").splitlines(), 1):
        if text == wanted[0]:
            return number
    return None
