"""Link the first use of each glossary term on a page, and index components by name.

An author writes plain text; on every chapter the first use of a term in running
text becomes a link to its definition. Headings, links, code, formulas and captions
stay as they are, and so does a term that the author has linked by hand.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from docutils import nodes
from sphinx import addnodes
from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment
from sphinx.transforms import SphinxTransform

from handbook_src import catalogue
from handbook_src.catalogue import components

GLOSSARY = "book/glossary"
INDEX = "book/components"
#: What a term may not stand in to be linked.
CLOSED = (
    nodes.title,
    nodes.subtitle,
    nodes.rubric,
    nodes.reference,
    nodes.literal,
    nodes.literal_block,
    nodes.math,
    nodes.math_block,
    nodes.raw,
    nodes.caption,
    nodes.term,
    nodes.strong,
    nodes.table,
    addnodes.pending_xref,
    addnodes.desc,
    addnodes.index,
)


def pattern(term: str) -> str:
    """A term as it may stand in text: abbreviations exactly, words in any case and plural."""
    text = re.escape(term).replace(r"\ ", r"[\s-]")
    if any(c.isupper() for c in term[1:]):
        return rf"{text}s?"
    return rf"(?i:{text}(?:e?s)?)"


class Terms:
    """The glossary's terms with their anchors, and one expression that finds them."""

    def __init__(self, anchors: dict[str, str]) -> None:
        self.anchors = anchors
        longest_first = sorted(anchors, key=len, reverse=True)
        self.names = dict(zip((f"t{i}" for i in range(len(anchors))), longest_first, strict=True))
        groups = "|".join(f"(?P<{g}>{pattern(t)})" for g, t in self.names.items())
        self.expression = re.compile(rf"(?<![\w-])(?:{groups})(?![\w-])") if anchors else None

    def in_text(self, text: str) -> Iterator[tuple[str, re.Match[str]]]:
        """Every use in ``text`` as (anchor, match)."""
        for match in self.expression.finditer(text) if self.expression else ():
            yield self.anchors[self.names[str(match.lastgroup)]], match


def glossary_terms(env: BuildEnvironment) -> Terms:
    """The terms that the glossary page defines."""
    objects = env.domaindata["std"]["objects"]
    return Terms({name: anchor for (kind, name), (page, anchor) in objects.items() if kind == "term"})


def is_open(node: nodes.Node) -> bool:
    """Whether text here may be linked: inside a paragraph, and in nothing closed."""
    paragraph = False
    while node is not None:
        if isinstance(node, CLOSED) or "cell" in getattr(node, "attributes", {}).get("classes", []):
            return False
        paragraph = paragraph or isinstance(node, nodes.paragraph)
        node = node.parent
    return paragraph


def link_first_uses(app: Sphinx, doctree: nodes.document, docname: str) -> None:
    """Turn the first use of each term on a chapter into a link."""
    if app.builder.format != "html" or not app.env.doc2path(docname).endswith(".ipynb"):
        return
    terms = glossary_terms(app.env)
    base = app.builder.get_relative_uri(docname, GLOSSARY)
    linked = {r["refuri"].partition("#")[2] for r in doctree.findall(nodes.reference) if "#" in r.get("refuri", "")}
    for text in [t for t in doctree.findall(nodes.Text) if is_open(t)]:
        pieces: list[nodes.Node] = []
        position, source = 0, str(text)
        for anchor, match in terms.in_text(source):
            if anchor in linked:
                continue
            linked.add(anchor)
            pieces.append(nodes.Text(source[position : match.start()]))
            pieces.append(
                nodes.reference("", match[0], internal=True, refuri=f"{base}#{anchor}", classes=["handbook-term"])
            )
            position = match.end()
        if pieces:
            pieces.append(nodes.Text(source[position:]))
            text.parent.replace(text, [p for p in pieces if p.astext()])


def outdated_by_glossary(
    app: Sphinx, env: BuildEnvironment, added: set[str], changed: set[str], removed: set[str]
) -> list[str]:
    """A changed glossary changes the links of every page."""
    return sorted(env.found_docs) if GLOSSARY in changed else []


class ComponentIndex(SphinxTransform):
    """Give a component's section, or its row while planned, every name it goes by.

    Sphinx puts index entries into the site's search, so "Swish" leads to the
    section that explains SiLU even where the text never says Swish.
    """

    default_priority = 700

    def apply(self, **kwargs: Any) -> None:
        here = self.env.docname
        wanted = {c.id: c for c in components() if c.status == "published" and c.chapter == here}
        if here == INDEX:
            wanted |= {f"component-{c.id}": c for c in components() if c.status != "published"}
        if here == INDEX or self.env.doc2path(here).endswith(".ipynb"):
            self.env.note_dependency(str(Path(catalogue.__file__).parent / "components.tsv"))
        for node in list(self.document.findall(nodes.Element)) if wanted else []:
            for anchor in [i for i in node.get("ids", []) if i in wanted]:
                place(node, wanted.pop(anchor).names, anchor)


def place(node: nodes.Element, names: tuple[str, ...], anchor: str) -> None:
    """Put an index node for ``names`` where the tree allows it."""
    entries = [("single", name.replace(";", ","), anchor, "", None) for name in dict.fromkeys(names)]
    index = addnodes.index(entries=entries)
    host: nodes.Element = node
    if isinstance(node, nodes.row):
        host = node[0]
        host.insert(0, index)
    elif isinstance(node, nodes.section):
        host.insert(1, index)
    else:
        host.parent.insert(host.parent.index(host), index)


def setup(app: Sphinx) -> dict[str, Any]:
    """Register the linker and the index."""
    app.add_transform(ComponentIndex)
    app.connect("doctree-resolved", link_first_uses)
    app.connect("env-get-outdated", outdated_by_glossary)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
