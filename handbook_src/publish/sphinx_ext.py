"""What the site needs and no option of Jupyter Book offers.

* launch and edit buttons follow the text sources; downloads are the plain notebook,
* MathJax comes from the site itself and the Thebe loader, which names a CDN, is dropped,
* each chapter carries a stamp: when and on what it was last executed,
* first uses of glossary terms are linked (``terms``), pages are drawn from the catalogue (``pages``).
"""

from __future__ import annotations

import gc
import importlib
import importlib.util
import json
import re
import shutil
from datetime import datetime
from functools import cache
from pathlib import Path
from typing import Any

import pybtex.plugin
from docutils import nodes
from sphinx import addnodes
from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment
from sphinx.transforms import SphinxTransform
from sphinx.util.nodes import make_refnode

from handbook_src.publish import pages, terms

NOTEBOOK_BRANCH = "gh-pages"
# What tex-chtml.js loads on demand: 2.5 MB of the 24 MB that the wheel carries.
MATHJAX = ["tex-chtml.js", "output/chtml/fonts/woff-v2", "input/tex/extensions", "ui", "a11y/assistive-mml.js"]
FILTERED = ("book/components", "book/claims")
REDIRECT = """<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title>
<meta http-equiv="refresh" content="0; url={url}"><link rel="canonical" href="{url}"></head>
<body><p><a href="{url}">{title}</a></p></body></html>
"""


class Stamp(SphinxTransform):
    """Set the facts of the last execution under the title of an executed chapter."""

    default_priority = 400

    def apply(self, **kwargs: Any) -> None:
        source = Path(self.env.doc2path(self.env.docname))
        if source.suffix != ".ipynb":
            return
        facts = json.loads(source.read_text("utf8"))["metadata"].get("handbook", {}).get("verified")
        title = next(iter(self.document.findall(nodes.title)), None)
        if facts and title is not None:
            title.parent.insert(title.parent.index(title) + 1, stamp(facts))


def stamp(facts: dict[str, Any]) -> nodes.paragraph:
    """One line: when, on what, with which versions, how long, with which parameters."""
    day = str(facts.get("date", ""))
    try:
        when = datetime.fromisoformat(day)
        day = f"{when.day} {when:%B %Y}"
    except ValueError:
        pass
    parts = [str(facts.get("device", "cpu"))]
    parts += [f"{name} {facts[name]}" for name in ("torch", "triton") if facts.get(name)]
    if "seconds" in facts:
        parts.append(f"{float(facts['seconds']):.0f} s")
    parts += [f"{k}={v!r}" for k, v in (facts.get("parameters") or {}).items()]
    line = nodes.paragraph("", "", classes=["handbook-stamp"])
    line += [nodes.strong("", f"Last verified {day}"), nodes.Text(" on " + " · ".join(parts))]
    return line


def link_to_staged(app: Sphinx, docname: str, source: list[str]) -> None:
    """Let authors link to ``norm.md``, the file they see; what Sphinx sees is ``norm.ipynb``."""
    folder = Path(app.env.doc2path(docname)).parent

    def staged(match: re.Match[str]) -> str:
        notebook = folder / f"{match[1]}.ipynb"
        return f"]({match[1]}.ipynb{match[2] or ''})" if notebook.exists() else match[0]

    source[0] = re.sub(r"\]\(([^)\s#:]+)\.md(#[^)\s]*)?\)", staged, source[0])


def resolve_python(
    app: Sphinx, env: BuildEnvironment, node: addnodes.pending_xref, contnode: nodes.Element
) -> nodes.Node | None:
    """Follow re-exports to where an object is documented, and let foreign types be.

    A type in a signature that isn't the handbook's own has no page here; a
    ``handbook_src`` name that leads nowhere stays a warning.
    """
    if node.get("refdomain") != "py":
        return None
    target = str(node.get("reftarget", ""))
    quiet = node.get("reftype") in ("class", "attr", "data", "obj")
    if not target.startswith("handbook_src.") or "._" in target:
        return contnode if quiet else None
    found = imported(target)
    full = f"{getattr(found, '__module__', '')}.{getattr(found, '__qualname__', '')}"
    entry = env.domaindata["py"]["objects"].get(full)
    if entry:
        return make_refnode(app.builder, node["refdoc"], entry.docname, entry.node_id, contnode, full)
    return contnode if quiet and found is not None and not isinstance(found, type) else None  # an alias of types


def imported(name: str) -> object | None:
    """The object with this dotted name, wherever it was defined."""
    module, _, attribute = name.rpartition(".")
    try:
        return getattr(importlib.import_module(module), attribute, None)
    except ImportError:
        return None


def fix_page(app: Sphinx, pagename: str, templatename: str, context: dict[str, Any], doctree: nodes.document) -> None:
    """Drop Thebe, load the filter and the search's mend where they are needed, mend the buttons."""
    if pagename in FILTERED:
        app.add_js_file("handbook-filter.js", loading_method="defer")
    if pagename == "search":
        app.add_js_file("handbook-search.js", loading_method="defer")
    context["script_files"] = [
        s
        for s in context.get("script_files", [])
        if "THEBE_JS_URL" not in (getattr(s, "attributes", {}).get("body") or "")
        and "thebe" not in str(getattr(s, "filename", s))
    ]
    notebook = (Path(app.srcdir) / f"{pagename}.ipynb").exists()

    def visit(buttons: list[dict[str, Any]]) -> None:
        for b in buttons:
            url = b.get("url") or ""
            if "colab.research.google.com" in url:
                b["url"] = url.replace(f"/blob/{context['github_version']}/", f"/blob/{NOTEBOOK_BRANCH}/")
            elif "/edit/" in url or "/blob/" in url:
                b["url"] = url.replace(f"{pagename}.ipynb", f"{pagename}.md")
            elif b.get("label") == "download-source-button" and notebook:
                b["url"] = pagename.rpartition("/")[2] + ".ipynb"  # the plain notebook, beside the page
                b["tooltip"] = "Download the notebook"
            visit(b.get("buttons", []))

    visit(context.get("header_buttons", []))
    name_the_toggles(context)


def draw_titles_only(app: Sphinx, pagename: str, templatename: str, context: dict[str, Any], *_: object) -> None:
    """Draw the navigation from the pages' titles alone; Sphinx copies every heading first, 0.15 s a page."""
    draw, env = context["toctree"], app.env

    def toctree(**options: Any) -> str:
        if not options.get("titles_only"):
            return str(draw(**options))
        whole, env.tocs = env.tocs, titles(env)
        try:
            return str(draw(**options))
        finally:
            env.tocs = whole

    context["toctree"] = toctree


@cache
def titles(env: BuildEnvironment) -> dict[str, nodes.bullet_list]:
    """Each page's contents cut down to its title and the pages below it."""
    found = {name: toc.deepcopy() for name, toc in env.tocs.items()}
    for item in [item for toc in found.values() for item in toc if len(item) > 1]:
        if below := list(item.findall(addnodes.toctree)):
            item[1][:] = below
        else:
            item.pop(1)
    return found


def name_the_toggles(context: dict[str, Any]) -> None:
    """Give the arrows that unfold the navigation a name for screen readers; the theme gives none."""
    draw = context.get("generate_toctree_html")
    if draw is not None:
        bare, named = "<summary>", '<summary aria-label="Show or hide the pages below">'
        context["generate_toctree_html"] = lambda *args, **options: str(draw(*args, **options)).replace(bare, named)


def bundle_mathjax(app: Sphinx, exc: Exception | None) -> None:
    """Copy what the pages need of MathJax out of the installed wheel."""
    if exc is not None or app.builder.format != "html":
        return
    spec = importlib.util.find_spec("sphinx-mathjax-offline")
    if spec is None or spec.origin is None:
        raise RuntimeError("sphinx-mathjax-offline is not installed; formulas would need the network")
    source = Path(spec.origin).parent / "static" / "mathjax"
    target = Path(app.outdir) / "_static" / "mathjax"
    for name in MATHJAX:
        if (source / name).is_dir():
            shutil.copytree(source / name, target / name, dirs_exist_ok=True)
        else:
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(source / name, target / name)


def write_redirect(app: Sphinx, exc: Exception | None) -> None:
    """A valid /index.html (the one that etoc writes has no doctype or title)."""
    root = app.config.root_doc
    if exc is None and app.builder.format == "html" and root != "index":
        page = REDIRECT.format(title=app.config.html_title, url=root + ".html")
        (Path(app.outdir) / "index.html").write_text(page, "utf8")


def write_labels(app: Sphinx, exc: Exception | None) -> None:
    """Leave what cross-references resolve to for the notebooks made after the site."""
    if exc is not None or app.builder.format != "html":
        return
    env = app.env
    sections = env.domaindata["std"]["labels"]
    labels = {name: {"page": page, "anchor": anchor, "text": text} for name, (page, anchor, text) in sections.items()}
    for name, (page, anchor) in env.domaindata["std"]["anonlabels"].items():
        labels.setdefault(name, {"page": page, "anchor": anchor, "text": name})
    for page, kinds in env.toc_fignumbers.items():
        for kind, numbers in kinds.items():
            word = {"figure": "Fig.", "table": "Table", "code-block": "Listing"}.get(kind, kind)
            for anchor, number in numbers.items():
                for entry in labels.values():
                    if (entry["page"], entry["anchor"]) == (page, anchor):
                        entry["number"] = f"{word} {'.'.join(map(str, number))}"
    for name, (page, number) in env.domaindata["math"]["objects"].items():
        chapter = env.toc_secnumbers.get(page, {}).get("", ())[: app.config.math_numfig]
        shown = ".".join(map(str, (*chapter, number)))
        labels[name] = {"page": page, "anchor": f"equation-{name}", "text": name, "number": f"({shown})"}
    objects = {name: [o.docname, o.node_id] for name, o in env.domaindata["py"]["objects"].items()}
    (Path(app.doctreedir) / "handbook-labels.json").write_text(
        json.dumps({"labels": labels, "objects": objects}, default=str)
    )


def hurry() -> None:
    """Spend less on what grows with the book and changes nothing: 51 s of rendering become 39."""
    gc.set_threshold(100_000, 20, 100)  # millions of nodes live to the end; 0.9 GB at the peak instead of 0.8
    pybtex.plugin.find_plugin = cache(pybtex.plugin.find_plugin)  # each citation searched all installed packages


def setup(app: Sphinx) -> dict[str, Any]:
    """Register everything."""
    hurry()
    app.config.html_static_path.append(str(Path(app.srcdir) / "book" / "_static"))
    app.add_css_file("handbook.css")
    app.config.mathjax_path = "mathjax/tex-chtml.js"
    app.add_transform(Stamp)
    app.setup_extension(pages.__name__)
    app.setup_extension(terms.__name__)
    app.connect("source-read", link_to_staged)
    app.connect("missing-reference", resolve_python)
    app.connect("html-page-context", draw_titles_only, priority=100)
    app.connect("html-page-context", fix_page, priority=900)
    app.connect("build-finished", bundle_mathjax)
    app.connect("build-finished", write_labels)
    app.connect("build-finished", write_redirect, priority=900)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
