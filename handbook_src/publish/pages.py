"""Directives that draw pages from the catalogue, so that no count or row is typed.

``{handbook-components}`` the index of components, ``{handbook-claims}`` the ledger,
``{handbook-modules}`` the API reference of a package, ``{handbook-maths}`` the source of a function; for the front page
``{handbook-counts}``, ``{handbook-verdicts}``, ``{handbook-map}`` with one square a
component, and ``{handbook-hero}``. All emit plain tables and lists that read without
JavaScript; ``handbook-filter.js`` adds the filters.
"""

from __future__ import annotations

import importlib
import pkgutil
import posixpath
from collections import Counter
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path
from typing import Any, cast

from docutils import nodes
from docutils.parsers.rst import directives
from docutils.statemachine import StringList
from sphinx import addnodes
from sphinx.application import Sphinx
from sphinx.directives.code import container_wrapper
from sphinx.util.docutils import SphinxDirective

from handbook_src import catalogue
from handbook_src.catalogue.ledger import Entry, ledger
from handbook_src.catalogue.table import Component, linked
from handbook_src.publish import quote

#: The word on the page and the sign before it: verdicts never speak by colour alone.
SIGNS = {"open": "○", "holds": "✓", "fails": "✗", "depends": "◐", "no evidence": "∅"}

#: What a judgement measured: the head of its column in the ledger, and its name among the figures.
JUDGED = {"Effect": "effect", "95 % interval": "95 % interval", "Seeds or rounds": "samples", "Rule": "rule"}


def tag(word: str, kind: str) -> nodes.inline:
    """A small label such as ``published`` or ``holds``, styled by its class."""
    slug = word.replace(" ", "-")
    return nodes.inline("", word, classes=["handbook-tag", f"{kind}-{slug}"])


def paragraph(*parts: nodes.Node | str, css: str = "") -> nodes.paragraph:
    """A paragraph of nodes and plain strings."""
    children = [nodes.Text(p) if isinstance(p, str) else p for p in parts]
    return nodes.paragraph("", "", *children, classes=[css] if css else [])


def label_reference(label: str, text: str, docname: str) -> addnodes.pending_xref:
    """A link to a section by its label; a missing label is a build warning."""
    return addnodes.pending_xref(
        "",
        nodes.inline("", text, classes=["std", "std-ref"]),
        refdomain="std",
        reftype="ref",
        reftarget=label,
        refexplicit=True,
        refdoc=docname,
        refwarn=True,
    )


def page_reference(here: str, docname: str, anchor: str, text: str) -> nodes.reference:
    """A link to an anchor that Sphinx doesn't know (it stands in a cell's output)."""
    uri = posixpath.relpath(docname + ".html", posixpath.dirname(here)) + f"#{anchor}"
    return nodes.reference("", text, internal=True, refuri=uri)


Cell = Sequence[nodes.Node]
Row = tuple[str, list[str], list[Cell]]


def build_table(heads: Sequence[tuple[str, str]], rows: Iterable[Row]) -> nodes.table:
    """A table from heads ``(text, css)`` and rows ``(anchor, css, cells)``."""
    body = nodes.tbody()
    for anchor, classes, cells in rows:
        row = nodes.row("", ids=[anchor], classes=classes)
        for (_, css), content in zip(heads, cells, strict=True):
            row += nodes.entry("", *content, classes=[css])
        body += row
    head = nodes.row("")
    for text, css in heads:
        head += nodes.entry("", paragraph(text), classes=[css])
    group = nodes.tgroup("", cols=len(heads))
    group += [nodes.colspec(colwidth=1) for _ in heads]
    group += nodes.thead("", head)
    group += body
    return nodes.table("", group, classes=["handbook-filterable"])


class CataloguePage(SphinxDirective):
    """What the directives share: they are read again when their tables change."""

    def note_tables(self) -> None:
        here = Path(catalogue.__file__).parent
        for name in ("components.tsv", "claims.tsv"):
            self.env.note_dependency(str(here / name))

    def entries(self) -> list[Entry]:
        """The ledger as the staged notebooks settle it."""
        stage = Path(self.env.srcdir)
        for notebook in sorted(stage.glob("book/**/*.ipynb")):
            self.env.note_dependency(str(notebook))
        return ledger(stage)


class Components(CataloguePage):
    """The index of components: one row each, with anchor ``component-<id>``."""

    def run(self) -> list[nodes.Node]:
        self.note_tables()
        heads = [("Component", "name"), ("Part", "part filter"), ("Status", "status filter"), ("Oracle", "oracle")]
        rows: list[Row] = [
            (f"component-{c.id}", [], [self.names(c), [paragraph(c.part_name)], self.status(c), [paragraph(c.oracle)]])
            for c in catalogue.components()
        ]
        return [build_table(heads, rows)]

    def names(self, c: Component) -> Cell:
        title: nodes.Node = nodes.strong("", c.title)
        if c.status == "published":
            title = label_reference(c.id, c.title, self.env.docname)
        second: list[nodes.Node | str] = [nodes.literal("", c.id)]
        if c.synonyms:
            second.append(" also: " + ", ".join(c.synonyms))
        return [paragraph(title), paragraph(*second, css="synonyms")]

    def status(self, c: Component) -> Cell:
        return [paragraph(tag(c.status, "status"))]


class Claims(CataloguePage):
    """The claims ledger: one row each with the verdict of the last run, the settled ones first."""

    def run(self) -> list[nodes.Node]:
        self.note_tables()
        heads = [
            ("Claim", "name"),
            ("Where it stands", "origin"),
            ("Verdict", "verdict filter"),
            *((head, "judged") for head in JUDGED),
            ("What decides", "evidence"),
        ]
        rows: list[Row] = [
            (f"claim-{e.id}", [], self.cells(e)) for e in sorted(self.entries(), key=lambda e: e.verdict == "open")
        ]
        return [build_table(heads, rows)]

    def cells(self, e: Entry) -> list[Cell]:
        judged = [[paragraph(e.figures.get(figure, ""))] for figure in JUDGED.values()]
        return [self.statement(e), self.origin(e), [paragraph(self.verdict(e))], *judged, self.evidence(e)]

    def origin(self, e: Entry) -> Cell:
        before, named = linked(e.source)
        name = nodes.reference("", named, refuri=e.link) if e.link else named
        return [paragraph(before, name, f": “{e.quote}”" if e.quote else "")]

    def statement(self, e: Entry) -> Cell:
        where = nodes.reference(
            "", e.component, internal=True, refuri=f"components.html#component-{e.component}", classes=["component"]
        )
        return [paragraph(e.claim), paragraph(nodes.literal("", e.id), " on ", where, css="synonyms")]

    def verdict(self, e: Entry) -> nodes.inline:
        return tag(e.verdict, "verdict")

    def evidence(self, e: Entry) -> Cell:
        if e.verdict == "open":
            return [paragraph("To settle: " + e.how, css="planned")]
        cell = page_reference(self.env.docname, e.chapter, e.anchor, "the cell that decides")
        others = [(k, v) for k, v in e.figures.items() if k not in JUDGED.values()]
        items = [nodes.list_item("", paragraph(f"{k}: ", nodes.strong("", v))) for k, v in others]
        figures = [nodes.bullet_list("", *items, classes=["figures"])] if items else []
        return [paragraph(e.because), *figures, paragraph(cell)]


class Counts(CataloguePage):
    """How far the book is: components and claims, with links to both pages."""

    def run(self) -> list[nodes.Node]:
        self.note_tables()
        rows = catalogue.components()
        entries = self.entries()
        published = sum(c.status == "published" for c in rows)
        settled = sum(e.verdict != "open" for e in entries)
        figures = [
            (published, "components published", "components.html?status=published"),
            (len(rows) - published, "components planned", "components.html?status=planned"),
            (settled, "claims settled by a run", "claims.html?verdict=settled"),
            (len(entries) - settled, "claims still open", "claims.html?verdict=open"),
        ]
        items = "".join(
            f'<li><a href="{escape(url)}"><strong>{n}</strong> <span>{escape(text)}</span></a></li>'
            for n, text, url in figures
        )
        return [nodes.raw("", f'<ul class="handbook-counts">{items}</ul>', format="html")]


class Verdicts(CataloguePage):
    """A few settled claims for the front page, those that surprise first."""

    WANTED = ("fails", "depends", "fails", "holds")

    def run(self) -> list[nodes.Node]:
        self.note_tables()
        settled = [e for e in self.entries() if e.verdict != "open"]
        chosen: list[Entry] = []
        for verdict in self.WANTED:
            chosen += [e for e in settled if e.verdict == verdict and e not in chosen][:1]
        chosen += [e for e in settled if e not in chosen][: len(self.WANTED) - len(chosen)]
        items = [nodes.list_item("", *self.verdict(e)) for e in chosen]
        return [nodes.bullet_list("", *items, classes=["handbook-verdicts"])] if items else []

    def verdict(self, e: Entry) -> Cell:
        claim = e.claim[0].upper() + e.claim[1:]
        cell = page_reference(self.env.docname, e.chapter, e.anchor, "the cell")
        return [
            paragraph(tag(e.verdict, "verdict"), " ", nodes.strong("", claim)),
            paragraph(e.because, " (", cell, ")", css="synonyms"),
            paragraph("Where it stands: ", e.source, css="synonyms"),
        ]


class Map(CataloguePage):
    """The parts of the book, one square a component, filled where it is published."""

    def run(self) -> list[nodes.Node]:
        self.note_tables()
        rows = catalogue.components()
        done = Counter(c.part_name for c in rows if c.status == "published")
        parts: dict[str, list[Component]] = {}
        for c in rows:
            parts.setdefault(c.part_name, []).append(c)
        items = "".join(self.part(name, members, done[name]) for name, members in parts.items())
        return [nodes.raw("", f'<ul class="handbook-map">{items}</ul>', format="html")]

    def part(self, name: str, members: list[Component], done: int) -> str:
        squares = "".join(f'<i class="{c.status}" title="{escape(c.title)}"></i>' for c in members)
        url = f"components.html?part={escape(name.replace(' ', '+'))}"
        title = name[0].upper() + name[1:]
        return (
            f'<li><a href="{url}">{escape(title)}</a> <small>{done} of {len(members)}</small>'
            f'<span class="squares" aria-hidden="true">{squares}</span></li>'
        )


class Hero(SphinxDirective):
    """The figure of the front page, computed while the site is built."""

    def run(self) -> list[nodes.Node]:
        from handbook_src.publish import hero

        self.env.note_dependency(hero.__file__)
        return [nodes.raw("", hero.svg(), format="html")]


class Maths(SphinxDirective):
    """The source of a public function, without its docstring: ``{handbook-maths} functional.rms_norm``."""

    required_arguments = 1
    option_spec = {"caption": directives.unchanged, "name": directives.unchanged}  # noqa: RUF012

    def run(self) -> list[nodes.Node]:
        file, code = quote.maths(self.arguments[0])
        self.env.note_dependency(str(file))
        block: nodes.Element = nodes.literal_block(code, code, language="python")
        if caption := self.options.get("caption"):
            block = container_wrapper(self, cast(nodes.literal_block, block), caption)
        self.add_name(block)
        return [block]


class Modules(SphinxDirective):
    """API sections for the public modules of the packages and modules named, one a line."""

    has_content = True

    def run(self) -> list[nodes.Node]:
        roots = [line.strip() for line in self.content if line.strip()]
        for root in roots:  # a folder's time changes when a module comes or goes
            file = Path(importlib.import_module(root).__file__ or "")
            self.env.note_dependency(str(file.parent if file.name == "__init__.py" else file))
        names = [n for root in roots for n in public_modules(root)]
        return [self.section(name) for name in names]

    def section(self, name: str) -> nodes.section:
        section = nodes.section("", nodes.title("", "", nodes.literal("", name)), ids=[f"api-{name.replace('.', '-')}"])
        package = hasattr(importlib.import_module(name), "__path__")  # its members have sections of their own
        members = [] if package else ["   :members:", "   :show-inheritance:"]
        text = ["```{eval-rst}", f".. automodule:: {name}", *members, "```"]
        self.state.nested_parse(StringList(text, source=self.env.docname), self.content_offset, section)
        return section


def public_modules(name: str) -> list[str]:
    """``name`` and, for a package, its public modules that import on this machine."""
    try:
        module = importlib.import_module(name)
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("handbook_src"):
            raise
        return []  # Triton exists for Linux only; its pages are left out elsewhere
    names = [i.name for i in pkgutil.iter_modules(getattr(module, "__path__", [])) if not i.name.startswith("_")]
    children = [m for child in names for m in public_modules(f"{name}.{child}")]
    return [*([name] if module.__doc__ else []), *children]


def setup(app: Sphinx) -> dict[str, Any]:
    """Register the directives."""
    for name, directive in {
        "components": Components,
        "claims": Claims,
        "counts": Counts,
        "verdicts": Verdicts,
        "map": Map,
        "hero": Hero,
        "modules": Modules,
        "maths": Maths,
    }.items():
        app.add_directive(f"handbook-{name}", directive)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
