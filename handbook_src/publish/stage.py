"""Lay out what Sphinx reads: executed notebooks, plain pages, and the sources they quote."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nbformat

from handbook_src.experiment import Records, stamp
from handbook_src.program import traced
from handbook_src.publish.book import Book, write
from handbook_src.publish.chapters import Chapter, names, source
from handbook_src.publish.execute import merge, read

#: Files beside the pages that pages use.
ASSETS = {".bib", ".css", ".csv", ".html", ".js", ".json", ".png", ".svg", ".tsv", ".txt", ".woff2"}
#: What pages quote from the code and from the workshop.
QUOTED = {"handbook_src": {".py", ".tsv"}, "kernels": {".py", ".md", ".csv"}}


class Stage:
    """Writes the stage and remembers what it wrote, so that what is gone from the book goes there too."""

    def __init__(self, book: Book) -> None:
        self.book = book
        self.kept: set[Path] = set()

    def put(self, path: Path, data: bytes) -> None:
        self.kept.add(path)
        write(path, data)

    def plain(self, chapters: list[Chapter]) -> None:
        """Pages without code, assets, quoted sources, and the two files that steer Jupyter Book."""
        executed = {c.page for c in chapters}
        for page in names(self.book):
            if page not in executed:
                self.put(self.book.staged(page, ".md"), source(self.book, page).read_bytes())
        for path in self._assets():
            self.put(self.book.stage / path.relative_to(self.book.root), path.read_bytes())

    def _assets(self) -> Iterator[Path]:
        yield from (p for p in (self.book.toc, self.book.root / "_config.yml") if p.exists())
        for folder, suffixes in {"book": ASSETS, **QUOTED}.items():
            for path in (self.book.root / folder).rglob("*"):
                if path.is_file() and path.suffix in suffixes and "__pycache__" not in path.parts:
                    yield path

    def chapter(self, chapter: Chapter, kept: Path) -> None:
        """The page with the outputs of the kept execution."""
        notebook = merge(read(chapter.source), nbformat.read(kept, as_version=4))
        notebook.cells = list(stamped(notebook.cells, Records.load(chapter.source.stem, chapter.source.parent)))
        self.put(self.book.staged(chapter.page), nbformat.writes(notebook).encode())
        self.book.staged(chapter.page, ".md").unlink(missing_ok=True)

    def stub(self, chapter: Chapter, reason: str) -> None:
        """A page that stands in for one without outputs, with the labels that others refer to."""
        self.put(self.book.staged(chapter.page, ".md"), stub(chapter.source, reason).encode())
        self.book.staged(chapter.page).unlink(missing_ok=True)

    def close(self) -> None:
        """Remove what an earlier run staged and this one did not."""
        record = self.book.build / "staged.json"
        before = json.loads(record.read_text("utf8")) if record.exists() else []
        now = sorted(p.relative_to(self.book.stage).as_posix() for p in self.kept)
        for name in set(before) - set(now):
            (self.book.stage / name).unlink(missing_ok=True)
        write(record, json.dumps(now).encode())


def stub(path: Path, reason: str) -> str:
    """Labels and headings of a page, and why there is no more of it."""
    body = re.sub(r"(?ms)^(`{3,}|~{3,}).*?^\1\s*$", "", path.read_text("utf8").partition("\n---\n")[2])
    lines = [line for line in body.splitlines() if re.match(r"(#+ |\([\w-]+\)=\s*$)", line)]
    title = next((i for i, line in enumerate(lines) if line.startswith("# ")), -1)
    notice = ["", "```{warning}", reason, "```", ""]
    return "\n".join([*lines[: title + 1], *notice, *lines[title + 1 :]]) + "\n"


def stamped(cells: list[Any], records: Records) -> Iterator[Any]:
    """The cells, with a line under each figure and table that says which recording it shows."""
    reads = iter(traced([c.source for c in cells if c.cell_type == "code"]))
    for cell in cells:
        yield cell
        names = next(reads) if cell.cell_type == "code" else set()
        entries = [entry for name in sorted(names) for entry in records.entries.get(name, {}).values()]
        if entries and any(shows(output) for output in cell.outputs):
            lines = "<br>".join(dict.fromkeys(map(stamp, entries)))
            yield nbformat.v4.new_markdown_cell(f'<p class="handbook-stamp">{lines}</p>', id=f"{cell['id']}-stamp")


def shows(output: Any) -> bool:
    """Whether an output is a figure or a table."""
    data = output.get("data", {})
    return any(kind.startswith("image/") for kind in data) or "handbook-table" in "".join(data.get("text/html", ""))
