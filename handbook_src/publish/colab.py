"""The notebook that readers take away: executed, plain Markdown, one install cell in front.

Colab and Jupyter know nothing of MyST, so roles become text and links to the site,
glued values their numbers, ``literalinclude`` the source it quotes, and directives
quotes. Labels are resolved with what Sphinx left in ``handbook-labels.json``.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import nbformat

from handbook_src.publish import site
from handbook_src.publish.book import write
from handbook_src.publish.quote import excerpt, maths

GLUE = "application/papermill.record/"
FENCE = re.compile(r"^(?P<indent>\s*)(?P<mark>`{3,}|:{3,}|~{3,})\{(?P<name>[\w:-]+)\}[ \t]*(?P<argument>.*)$")
CODE_FENCE = re.compile(r"^\s*(`{3,}|~{3,})(?!\{)")
ROLE = re.compile(r"\{(?P<name>[\w:+-]+)\}(?P<ticks>`+)(?P<text>.+?)(?P=ticks)", re.S)
#: Directives that only group or place what they hold.
TRANSPARENT = {"div", "grid", "grid-item", "tab-set", "card", "container", "margin", "table", "only"}
#: How a cell is hidden in Jupyter and in Colab.
FOLDED = {"jupyter": {"source_hidden": True}, "cellView": "form", "tags": ["records"]}
TITLES = {"note", "tip", "warning", "important", "seealso", "hint", "caution", "attention", "danger", "error"}


@dataclass
class Context:
    """What prose is resolved against: this notebook's values, the site's labels, its own place."""

    page: str
    folder: Path
    labels: Mapping[str, Any] = field(default_factory=dict)
    values: Mapping[str, str] = field(default_factory=dict)

    def link(self, label: str, text: str = "", kind: str = "text") -> str:
        """A Markdown link to a label, or plain text where the label is unknown."""
        entry = self.labels.get("labels", {}).get(label) or self.labels.get("labels", {}).get(label.lower())
        if entry is None:
            return text or label
        shown = text or str(entry.get(kind) or entry["text"])
        return f"[{shown}]({site.site_url()}/{entry['page']}.html#{entry['anchor']})"


# ------------------------------------------------------------------ values
def glued(notebook: Any) -> dict[str, str]:
    """The plain text of every value that a cell glued."""
    found = {}
    for cell in notebook.cells:
        for output in cell.get("outputs", ()):
            name = output.get("metadata", {}).get("scrapbook", {}).get("name")
            data = output.get("data", {})
            text = data.get(GLUE + "text/plain", data.get("text/plain"))
            if name and text is not None:
                found[name] = "".join(text)
    return found


def glue_text(spec: str, values: Mapping[str, str]) -> str:
    """``name`` or ``name:.2f`` (or ``page.ipynb::name:.2f``) as the page shows it."""
    name, _, form = spec.rpartition("::")[2].partition(":")
    text = values.get(name, "").strip()
    if form and text:
        try:
            return format(float(text), form)
        except ValueError:
            pass
    return text[1:-1] if len(text) > 1 and text[0] == text[-1] and text[0] in "'\"" else text


# ------------------------------------------------------------------ citations
@cache
def papers() -> dict[str, tuple[str, str, str]]:
    """Key to (authors, year, address) of every paper of the bibliography."""
    from pybtex.database import parse_file

    found = {}
    for key, entry in parse_file(str(site.ROOT / "book" / "references.bib")).entries.items():
        names = [re.sub(r"[{}\\]", "", " ".join(p.last_names)) for p in entry.persons.get("author", ())]
        short = names[0] + (" et al." if len(names) > 2 else f" & {names[1]}" if len(names) == 2 else "")
        fields = entry.fields
        address = f"https://arxiv.org/abs/{fields['eprint']}" if "eprint" in fields else fields.get("url", "")
        if not address and "doi" in fields:
            address = f"https://doi.org/{fields['doi']}"
        found[key] = (short, fields.get("year", ""), address)
    return found


def cite(keys: str, parenthesised: bool) -> str:
    """``zhang2019root`` as (Zhang & Sennrich 2019), linked to the paper."""
    shown = []
    for key in (k.strip() for k in keys.split(",")):
        short, year, address = papers().get(key, (key, "", ""))
        text = f"{short} {year}".strip() if parenthesised else f"{short} ({year})"
        shown.append(f"[{text}]({address})" if address else text)
    joined = ", ".join(shown)
    return f"({joined})" if parenthesised else joined


# ------------------------------------------------------------------ roles
def split_target(text: str) -> tuple[str, str]:
    """``words <target>`` as (target, words); a bare target has no words."""
    found = re.fullmatch(r"(.*?)\s*<(.+?)>", text, re.S)
    return (found[2], found[1]) if found else (text, "")


def role(name: str, text: str, context: Context) -> str:
    """One role as plain Markdown."""
    if name.startswith("glue"):
        return glue_text(text, context.values)
    if name.startswith("cite"):
        return cite(text, parenthesised=not name.endswith((":t", ":ts")))
    target, words = split_target(text)
    if name in ("ref", "std:ref"):
        return context.link(target, words)
    if name in ("numref", "eq"):
        return context.link(target, "" if "%s" in words else words, "number")
    if name == "doc":
        page = re.sub(r"\.(md|ipynb)$", "", target)
        where = (context.folder / page).resolve().relative_to(site.ROOT.resolve()).as_posix()
        return f"[{words or where.rpartition('/')[2]}]({site.site_url()}/{where}.html)"
    if name == "term":
        return words or target
    if name in ("math", "kbd"):
        return f"${text}$" if name == "math" else f"<kbd>{text}</kbd>"
    if name.startswith("py:") or name in ("func", "class", "meth", "mod", "attr", "exc", "obj"):
        return api(target, words, context)
    return words or target


def api(target: str, words: str, context: Context) -> str:
    """A reference to the API, linked where the site documents the object."""
    full = target.lstrip("~!.")
    shown = words or (full.rpartition(".")[2] if target.startswith("~") else full)
    where = context.labels.get("objects", {}).get(full)
    return f"[`{shown}`]({site.site_url()}/{where[0]}.html#{where[1]})" if where else f"`{shown}`"


def inline(text: str, context: Context) -> str:
    """A paragraph's roles, local links and equation labels."""
    text = ROLE.sub(lambda m: role(m["name"], m["text"], context), text)

    def page(match: re.Match[str]) -> str:
        path, _, anchor = match[2].partition("#")
        if not path:
            return context.link(anchor, match[1])
        where = (context.folder / path).resolve()
        if where.suffix not in (".md", ".ipynb") or not where.is_relative_to(site.ROOT.resolve()):
            return match[0]
        address = where.relative_to(site.ROOT.resolve()).with_suffix(".html").as_posix()
        return f"[{match[1]}]({site.site_url()}/{address}{'#' + anchor if anchor else ''})"

    text = re.sub(r"(?<!!)\[([^\]]*)\]\((?!\w+:|//)([^)\s]+)\)", page, text)
    return re.sub(r"(\]\([^)]*\)|[.)\w])\{[.#][^}\n]*\}", r"\1", text)  # attributes such as {.primary}


# ------------------------------------------------------------------ directives
def options_and_body(lines: list[str]) -> tuple[dict[str, str], list[str]]:
    """The ``:key: value`` lines (or the YAML block) of a directive, and the rest."""
    options: dict[str, str] = {}
    rest = list(lines)
    if rest and rest[0].strip() == "---":
        end = next((i for i, x in enumerate(rest[1:], 1) if x.strip() == "---"), len(rest) - 1)
        for line in rest[1:end]:
            key, _, value = line.partition(":")
            options[key.strip()] = value.strip().strip("\"'")
        return options, rest[end + 1 :]
    while rest and (found := re.match(r"\s*:([\w-]+):\s*(.*)$", rest[0])):
        options[found[1]] = found[2].strip().strip("\"'")
        rest.pop(0)
    return options, rest


def quote(title: str, body: list[str], context: Context) -> list[str]:
    """An admonition as a Markdown quote with a bold title."""
    inner = [f"**{inline(title, context)}**", "", *blocks(body, context)] if title else blocks(body, context)
    while inner and not inner[-1].strip():
        inner.pop()
    return ["", *(f"> {line}".rstrip() for line in inner), ""]


def literalinclude(argument: str, options: dict[str, str], context: Context) -> list[str]:
    """The quoted source itself, under a line that says where it is from."""
    path = (context.folder / argument.strip()).resolve()
    return listing(path, excerpt(path.read_text("utf8"), options), options.get("language", "python"))


def listing(path: Path, code: str, language: str = "python") -> list[str]:
    """Quoted code under a line that says where it is from."""
    where = path.relative_to(site.ROOT.resolve()).as_posix() if path.is_relative_to(site.ROOT.resolve()) else path.name
    link = f"[`{where}`]({site.repository()}/blob/main/{where})"
    return ["", f"From {link}:", "", f"```{language}", *code.splitlines(), "```", ""]


def list_table(argument: str, body: list[str], context: Context) -> list[str]:
    """A ``list-table`` as a Markdown table."""
    rows: list[list[str]] = []
    for line in body:
        if found := re.match(r"\s*[*-] [*-] ?(.*)$", line):
            rows.append([found[1]])
        elif found := re.match(r"\s+[*-] ?(.*)$", line):
            rows[-1].append(found[1])
        elif line.strip() and rows:
            rows[-1][-1] += " " + line.strip()
    shown = [f"| {' | '.join(inline(c, context) for c in row)} |" for row in rows]
    head = [f"**{inline(argument, context)}**", ""] if argument else []
    rule = "|" + "---|" * (len(rows[0]) if rows else 0)
    return ["", *head, *shown[:1], rule, *shown[1:], ""]


def directive(name: str, argument: str, content: list[str], context: Context) -> list[str]:
    """One directive as plain Markdown lines."""
    options, body = options_and_body(content)
    if name == "math":
        return ["", "$$", *([argument] if argument else []), *body, "$$", ""]
    if name == "literalinclude":
        return literalinclude(argument, options, context)
    if name == "handbook-maths":
        return listing(*maths(argument.strip()))
    if name == "list-table":
        return list_table(argument, body, context)
    if name in ("code-block", "code", "sourcecode"):
        return ["", f"```{argument}", *body, "```", ""]
    if name in ("figure", "image", "glue:figure", "glue:", "raw", "bibliography", "contents"):
        caption = blocks(body, context) if name in ("figure", "glue:figure") else []
        return ["", *caption, ""]
    if name in TRANSPARENT:
        head = [f"**{inline(argument, context)}**", ""] if argument and name == "table" else []
        return ["", *head, *blocks(body, context), ""]
    if name in ("dropdown", "details") or options.get("class", "").find("dropdown") >= 0:
        inner = blocks(body, context)
        return [
            "",
            f"<details><summary>{inline(argument, context) or 'Show'}</summary>",
            "",
            *inner,
            "",
            "</details>",
            "",
        ]
    title = argument or (name.capitalize() if name in TITLES else "")
    return quote(title, body, context)


# ------------------------------------------------------------------ blocks
def fenced(lines: list[str], start: int, mark: str) -> int:
    """The index of the line that closes the fence opened at ``start``."""
    closing = re.compile(rf"^\s*{re.escape(mark[0])}{{{len(mark)},}}\s*$")
    for i in range(start + 1, len(lines)):
        if closing.match(lines[i]):
            return i
    return len(lines)


def blocks(lines: list[str], context: Context) -> list[str]:
    """Markdown lines with every directive, label, comment and role resolved."""
    out: list[str] = []
    prose: list[str] = []

    def flush() -> None:
        out.extend(inline("\n".join(prose), context).split("\n") if prose else [])
        prose.clear()

    i = 0
    while i < len(lines):
        line = lines[i]
        if found := FENCE.match(line):
            end = fenced(lines, i, found["mark"])
            flush()
            out += directive(found["name"], found["argument"].strip(), dedent(lines[i + 1 : end]), context)
            i = end + 1
            continue
        if found := CODE_FENCE.match(line):
            end = fenced(lines, i, found[1])
            flush()
            out += lines[i : end + 1]
            i = end + 1
            continue
        if not (line.startswith("%") or re.match(r"^\([\w:.-]+\)=\s*$", line)):
            prose.append(re.sub(r"^(\s*.*\$\$)\s*\([\w:.-]+\)\s*$", r"\1", line))
        i += 1
    flush()
    return out


def dedent(lines: list[str]) -> list[str]:
    """Lines without their common indentation."""
    widths = [len(x) - len(x.lstrip()) for x in lines if x.strip()]
    cut = min(widths, default=0)
    return [x[cut:] for x in lines]


def plain(text: str, context: Context) -> str:
    """A cell of MyST Markdown as Markdown that any notebook program shows."""
    return re.sub(r"\n{3,}", "\n\n", "\n".join(blocks(text.split("\n"), context))).strip()


# ------------------------------------------------------------------ notebooks
def install_line() -> str:
    """The first cell: the package with what the chapters use, from the repository."""
    return f'%pip install -q "handbook-src[notebook] @ git+{site.repository()}"  # once per session'


def compact(path: Path) -> str:
    """A chapter's records on one line."""
    return json.dumps(json.loads(path.read_text("utf8")), separators=(",", ":"))


def convert(notebook: Any, context: Context) -> Any:
    """The plain copy of an executed chapter."""
    context.values = glued(notebook)
    first = (
        f"*This is the notebook of [a page of the handbook]({site.site_url()}/{context.page}.html). "
        "Run the next cell once, then from top to bottom.*"
    )
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            cell.source = plain(cell.source, context)
    notebook.cells = [c for c in notebook.cells if c.cell_type == "code" or c.source]
    path = context.folder / f"{Path(context.page).name}.record.json"
    if path.exists():
        call = f"carry({path.name.partition('.')[0]!r}, {compact(path)!r})"
        carried = f"from handbook_src.experiment import carry\n\n{call}"
        notebook.cells[:0] = [nbformat.v4.new_code_cell(carried, id="handbook-records", metadata=FOLDED)]
    head = nbformat.v4.new_markdown_cell(first, id="handbook-about")
    install = nbformat.v4.new_code_cell(install_line(), id="handbook-install", metadata={"tags": ["install"]})
    notebook.cells[:0] = [head, install]
    return notebook


def write_all(stage: Path, html: Path, labels: Mapping[str, Any], pages: list[str]) -> None:
    """Set the plain notebook of each executed page beside its HTML."""
    for page in pages:
        source = stage / f"{page}.ipynb"
        if source.exists():
            context = Context(page, (site.ROOT / page).parent, labels)
            notebook = convert(nbformat.read(source, as_version=4), context)
            write(html / f"{page}.ipynb", nbformat.writes(notebook).encode())
