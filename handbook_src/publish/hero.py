"""The figure of the front page: activations down twenty layers, without and with RMSNorm.

The numbers are computed by the handbook's own function while the site is built,
and the drawing is inline SVG in the theme's colours, so it follows light and dark.
"""

from __future__ import annotations

from functools import cache
from html import escape

LAYERS, WIDTH, BATCH = 20, 256, 64
LOW, HIGH, POINTS = -10.2, 1.4, 96  # log10 of an activation's size
VIEW = (500, 470)
PANEL, GAP, LEFT, TOP, STEP, PEAK = 214.0, 16.0, 54.0, 34.0, 15.0, 84.0


def sizes(normalised: bool, seed: int = 0) -> list[list[float]]:
    """log10 of the activations' sizes, one list a layer, in a net as torch initialises it."""
    import torch

    from handbook_src.functional.normalisation.norm import rms_norm

    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(BATCH, WIDTH, generator=generator)
    bound = WIDTH**-0.5  # what torch.nn.Linear draws from
    found = []
    for _ in range(LAYERS):
        weight = (torch.rand(WIDTH, WIDTH, generator=generator) * 2 - 1) * bound
        x = (rms_norm(x, backend="reference") if normalised else x) @ weight.T
        found.append(x.abs().clamp_min(1e-12).log10().flatten().tolist())
        x = x.relu()
    return found


def density(values: list[float]) -> list[float]:
    """A smoothed histogram over the axis, scaled to a peak of one."""
    counts = [0.0] * POINTS
    for v in values:
        i = int((v - LOW) / (HIGH - LOW) * POINTS)
        if 0 <= i < POINTS:
            counts[i] += 1
    kernel = (1, 4, 6, 4, 1)
    padded = [0.0, 0.0, *counts, 0.0, 0.0]
    smooth = [sum(k * padded[i + j] for j, k in enumerate(kernel)) for i in range(POINTS)]
    top = max(smooth) or 1.0
    return [s / top for s in smooth]


def ridge(values: list[float], left: float, base: float) -> str:
    """The outline of one layer's histogram as an SVG path."""
    xs = [left + PANEL * (i + 0.5) / POINTS for i in range(POINTS)]
    ys = [base - PEAK * h for h in density(values)]
    points = " ".join(f"{x:.0f},{y:.1f}" for x, y in zip(xs, ys, strict=True))
    return f"M{left:g},{base:g} L{points} {left + PANEL:g},{base:g}"


def panel(layers: list[list[float]], left: float, title: str) -> str:
    """One network: its layers as ridges from top to bottom over a log axis."""
    paths = []
    for i, values in enumerate(layers):
        share = round(100 * i / (LAYERS - 1))
        paths.append(f'<path d="{ridge(values, left, TOP + PEAK + i * STEP)}" style="--depth:{share}%"/>')
    floor = TOP + PEAK + (LAYERS - 1) * STEP
    ticks = ""
    for power, label in ((-8, "10⁻⁸"), (-4, "10⁻⁴"), (0, "1")):
        x = left + PANEL * (power - LOW) / (HIGH - LOW)
        ticks += f'<line x1="{x:.0f}" x2="{x:.0f}" y1="{floor + 3}" y2="{floor + 8}"/>'
        ticks += f'<text x="{x:.0f}" y="{floor + 23}" text-anchor="middle">{label}</text>'
    head = f'<text class="head" x="{left + PANEL / 2}" y="{TOP - 14}" text-anchor="middle">{escape(title)}</text>'
    return head + "".join(paths) + ticks


def median(values: list[float]) -> float:
    """The middle value."""
    return sorted(values)[len(values) // 2]


@cache
def svg() -> str:
    """The figure with its caption, whose numbers are those drawn."""
    bare, normed = sizes(normalised=False), sizes(normalised=True)
    width, height = VIEW
    first, last = TOP + PEAK, TOP + PEAK + (LAYERS - 1) * STEP
    shrunk = 10 ** (median(bare[0]) - median(bare[-1]))
    moved = abs(10 ** (median(normed[-1]) - median(normed[0])) - 1)
    alt = (
        f"Histograms of activation sizes in each of {LAYERS} layers. Without normalisation they slide "
        "to ever smaller values; with RMSNorm they stay in place."
    )
    labels = "".join(
        f'<text x="{LEFT - 8}" y="{y}" text-anchor="end">{text}</text>'
        for y, text in ((first, "layer 1"), (last, str(LAYERS)))
    )
    body = panel(bare, LEFT, "no normalisation") + panel(normed, LEFT + PANEL + GAP, "RMSNorm in each layer")
    factor = f"{round(shrunk, -len(str(int(shrunk))) + 2):,.0f}"
    return (
        '<figure class="handbook-hero-figure">'
        f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{escape(alt)}">{labels}{body}'
        f'<text x="{LEFT + PANEL + GAP / 2}" y="{last + 46}" text-anchor="middle">size of an activation</text></svg>'
        f"<figcaption>The same {LAYERS}-layer network before training, with the weights that "
        "<code>torch.nn.Linear</code> draws by default. Left, the typical activation shrinks "
        f"{factor}-fold on its way down; right, with one RMSNorm a layer, it moves by {moved:.1%}. "
        "Computed while this page was built.</figcaption></figure>"
    )
