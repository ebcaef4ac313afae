"""What a chapter's cells call: ``setup``, ``glue``, ``table``, ``spread`` and ``claim``.

``glue`` writes the same record that ``myst_nb.glue`` writes and ``claim`` writes
one of its own, so chapters need neither MyST-NB nor Sphinx to run (Colab, plain
Jupyter), and the claims ledger is made from the executed notebooks alone.
"""

from __future__ import annotations

import os
import random
import statistics
from collections.abc import Mapping, Sequence
from html import escape
from typing import TYPE_CHECKING, Any

from handbook_src.errors import ConfigError
from handbook_src.judge import OPEN, Judgement

if TYPE_CHECKING:
    import torch

    from handbook_src.catalogue.table import Claim

GLUE_PREFIX = "application/papermill.record/"
CLAIM_TYPE = "application/vnd.handbook.claim+json"
INK, PAPER_INK = "#1f2328", "#d8dee6"

#: Okabe-Ito colours, shifted to read on white and on near-black alike.
COLOURS = ["#2f81d6", "#d2691e", "#0b9e73", "#c46aa0", "#c98a00", "#7a7aee"]

VERDICTS = ("holds", "fails", "depends", "no evidence")


def setup(seed: int = 0, device: str = "cpu") -> torch.device:
    """Seed every generator, choose deterministic algorithms and the figure style."""
    import matplotlib as mpl
    import numpy as np
    import torch
    from cycler import cycler

    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    torch.use_deterministic_algorithms(True, warn_only=True)
    mpl.rcParams.update(
        {
            "axes.prop_cycle": cycler(color=COLOURS),
            "figure.figsize": (6.4, 3.2),
            "figure.dpi": 120,
            "figure.constrained_layout.use": True,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "font.size": 11,
        }
    )
    if os.environ.get("HANDBOOK_FIGURES") == "svg":
        _figures_for_the_book()
    return torch.device(device)


def _figures_for_the_book() -> None:
    """Transparent SVG whose ink follows the reader's light or dark theme."""
    import matplotlib as mpl
    from IPython.core.getipython import get_ipython
    from IPython.core.pylabtools import print_figure
    from matplotlib.figure import Figure

    names = ["text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color", "legend.labelcolor"]
    ink: dict[Any, Any] = dict.fromkeys(names, INK)
    mpl.rcParams.update(ink)
    mpl.rcParams.update({"figure.facecolor": "none", "axes.facecolor": "none"})
    mpl.rcParams.update({"svg.hashsalt": "handbook", "svg.fonttype": "path"})
    style = (
        "<style>@media (prefers-color-scheme: dark){"
        f'[style*="fill: {INK}"]{{fill:{PAPER_INK}!important}}'
        f'[style*="stroke: {INK}"]{{stroke:{PAPER_INK}!important}}'
        "}</style>"
    )

    def to_svg(fig: Figure) -> str:
        svg = print_figure(fig, fmt="svg", metadata={"Date": None})
        head, sep, tail = svg.partition("<defs>")
        return head + style + sep + tail

    ip = get_ipython()
    if ip is None or ip.display_formatter is None:
        return
    from matplotlib_inline.backend_inline import set_matplotlib_formats

    set_matplotlib_formats("svg")
    ip.display_formatter.formatters["image/svg+xml"].for_type(Figure, to_svg)


def glue(name: str, value: Any, show: bool = False) -> None:
    """Store ``value`` under ``name`` for quotation in prose by the role ``glue:text``."""
    from IPython.core.getipython import get_ipython
    from IPython.display import display

    ip = get_ipython()
    if ip is None or ip.display_formatter is None:
        return
    mime, meta = ip.display_formatter.format(value)
    prefix = "" if show else GLUE_PREFIX
    display(
        {prefix + k: v for k, v in mime.items()},
        raw=True,
        metadata={"scrapbook": {"name": name, "mime_prefix": prefix}, **meta},
    )


def table(rows: Sequence[Mapping[str, Any]], caption: str = "") -> None:
    """Show ``rows`` as a table: one mapping a row, its keys the column heads.

    Floats print with three significant digits, so that the low bits that differ
    between processors don't reach the page.
    """
    from IPython.display import display

    heads = list(rows[0]) if rows else []

    def cell(v: Any) -> str:
        return f"{v:.3g}" if isinstance(v, float) else f"{v:,}" if type(v) is int else str(v)

    body = "".join("<tr>" + "".join(f"<td>{escape(cell(r[h]))}</td>" for h in heads) + "</tr>" for r in rows)
    head = "".join(f'<th scope="col">{escape(h)}</th>' for h in heads)
    title = f"<caption>{escape(caption)}</caption>" if caption else ""
    html = f'<table class="table handbook-table">{title}<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>'
    plain = "\n".join(["\t".join(heads), *("\t".join(cell(r[h]) for h in heads) for r in rows)])
    display({"text/html": html, "text/plain": plain}, raw=True)


def spread(values: Sequence[float], digits: int = 2) -> str:
    """Mean and sample deviation, over the seeds for instance, as a table shows them: ``0.91 ± 0.03``."""
    return f"{statistics.mean(values):.{digits}f} ± {statistics.stdev(values):.{digits}f}"


def claim(id: str, verdict: str | Judgement, figures: Mapping[str, Any] | None = None, because: str = "") -> None:
    """Settle one row of the claims ledger from what this notebook shows.

    Args:
        id: the row's id in ``handbook_src/catalogue/claims.tsv``, e.g. ``rms-norm-1``.
        verdict: what :func:`handbook_src.judge.judge` made of recorded samples; or ``holds``, ``fails``,
            ``depends`` or ``no evidence`` where the claim is settled by a proof.
        figures: numbers that decide, by name; a judgement brings effect, interval, samples and rule.
        because: one sentence; for ``depends``, on what.

    Raises:
        ConfigError: the id is not in the ledger, the verdict is not one of the
            four, or there is no figure to back it.
    """
    from IPython.display import display

    from handbook_src.catalogue import claims

    rows = {c.id: c for c in claims()}
    if id not in rows:
        raise ConfigError("claim id", got=repr(id), want="an id of claims.tsv", remedy="See the ledger for the ids.")
    if isinstance(verdict, Judgement):
        figures = {**verdict.figures, **(figures or {})}
        verdict = verdict.verdict
    if verdict == OPEN:
        display({"text/plain": f"{id} is open: no valid record."}, raw=True)
        return
    if verdict not in VERDICTS:
        raise ConfigError("claim verdict", got=repr(verdict), want=f"one of {VERDICTS}", remedy="Choose one.")
    if not figures:
        raise ConfigError(f"claim {id}", got="no figures", want="what was measured", remedy="Pass figures={...}.")
    shown = {k: f"{v:.3g}" if isinstance(v, float) else str(v) for k, v in figures.items()}
    pairs = [[k, v] for k, v in shown.items()]  # nbformat sorts the keys of a mapping
    record = {"id": id, "verdict": verdict, "figures": pairs, "because": because}
    display({CLAIM_TYPE: record, **_box(rows[id], verdict, shown, because)}, raw=True)


def _box(row: Claim, verdict: str, figures: Mapping[str, str], because: str) -> dict[str, str]:
    """What a settled claim looks like, as HTML and as text."""
    from handbook_src.catalogue.table import linked

    before, named = linked(row.source)
    name = f'{before}<a href="{escape(row.link)}">{escape(named)}</a>' if row.link else row.source
    words = f": “{row.quote}”" if row.quote else ""
    items = "".join(f"<dt>{escape(k)}</dt><dd>{escape(v)}</dd>" for k, v in figures.items())
    html = (
        f'<div class="handbook-claim handbook-claim-{verdict.replace(" ", "-")}" id="claim-{row.id}">'
        f'<p><strong class="verdict">{verdict}</strong> {escape(row.claim)}</p>'
        f'<p class="origin">Where it stands: {name}{escape(words)}</p>'
        f"<p>{escape(because)}</p><dl>{items}</dl></div>"
    )
    plain = f"{verdict}: {row.claim}\n{row.source}{words}\n{because}\n"
    return {"text/html": html, "text/plain": plain + ", ".join(f"{k} {v}" for k, v in figures.items())}
