"""A book of a few lines, built for real in a temporary folder."""

from __future__ import annotations

from pathlib import Path

import pytest

from handbook_src.publish import build
from handbook_src.publish.book import Book

HEADER = "---\nkernelspec: {display_name: Python 3, language: python, name: python3}\n"


class TinyBook:
    """Writes chapters, builds them, says what came of each."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.book = Book(root)
        self.pages: list[str] = []
        self.rendered = 0
        self.write("handbook_src/__init__.py", "")
        self.write("handbook_src/layer.py", "def double(x):\n    return 2 * x\n")
        self.write("constraints.txt", "numpy==0\n")
        self.page("index", "# Index\n")

    def write(self, name: str, text: str) -> Path:
        path = self.root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, "utf8")
        return path

    def page(self, name: str, text: str) -> Path:
        if name not in self.pages:
            self.pages.append(name)
            rest = "".join(f"  - file: book/{page}\n" for page in self.pages[1:])
            self.write("_toc.yml", "format: jb-book\nroot: book/index\n" + (f"chapters:\n{rest}" if rest else ""))
        return self.write(f"book/{name}.md", text)

    def chapter(self, name: str, *cells: str, budget: float = 20, prose: str = "Some prose.") -> Path:
        body = "".join(f"\n```{{code-cell}}\n{cell}\n```\n" for cell in cells)
        return self.page(name, f"{HEADER}handbook: {{budget: {budget}}}\n---\n\n({name})=\n# {name}\n\n{prose}\n{body}")

    def build(self, **options: object) -> int:
        def render(book: Book, strict: bool) -> int:
            self.rendered += 1
            return 0

        return build.book(self.root, build.Options(**options), render)  # type: ignore[arg-type]


@pytest.fixture(scope="session")
def make_tiny() -> type[TinyBook]:
    return TinyBook


@pytest.fixture
def tiny(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> TinyBook:
    """On a machine as fast as the one of the budgets, which then need not be measured."""
    monkeypatch.setattr(build, "slowness", lambda settings: 1.0)
    return TinyBook(tmp_path)
