"""BigBird's attention: neighbours, a few global blocks, and a few blocks drawn at random."""

from __future__ import annotations

from functools import lru_cache

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from handbook_src.check import check_size
from handbook_src.dispatch import Backend
from handbook_src.errors import ConfigError
from handbook_src.functional.attention.attention import check_qkv
from handbook_src.functional.attention.block_sparse import block_sparse_attention
from handbook_src.functional.attention.mask import Mask, block

Layout = Bool[Tensor, "n n"] | Bool[Tensor, "h n n"]


def bigbird_layout(
    blocks: int, *, window: int = 3, random: int = 3, ends: int = 1, seed: int = 0
) -> Bool[Tensor, "n n"]:
    r"""Draw which block of queries sees which block of keys.

    .. math:: L_{ij} = [\,|i - j| \le \tfrac{w - 1}{2}\,] \lor [i \in G] \lor [j \in G] \lor [j \in R_i]

    :math:`G` holds the first and the last ``ends`` blocks, :math:`R_i` is a sample without
    replacement of the blocks that row :math:`i` does not see otherwise (fewer where there are fewer).
    The same numbers always give the same layout, on every device.

    Args:
        blocks: number of blocks, of queries as of keys.
        window: blocks of the window :math:`w`, the row's own among them; odd.
        random: blocks drawn for each row.
        ends: global blocks at each end of the sequence.
        seed: of the draw.

    Raises:
        ConfigError: a negative number, a fraction, or an even window.

    Source:
        Zaheer et al. 2020, section 2 and appendix D, arXiv:2007.14062
    """
    check_size("bigbird_layout", "blocks", blocks, least=0)
    _check_layout(window, random, ends, seed)
    i = torch.arange(blocks, device="cpu")
    outer = (i < ends) | (i >= blocks - ends)
    layout = ((i[:, None] - i).abs() <= window // 2) | outer | outer[:, None]
    order = torch.rand(blocks, blocks, generator=torch.Generator().manual_seed(seed), device="cpu").masked_fill(
        layout, 2.0
    )
    drawn = torch.zeros_like(layout).scatter(1, order.argsort(1)[:, :random], True)
    return layout | drawn


def random_attention(
    q: Float[Tensor, "b t h e"],
    k: Float[Tensor, "b s g e"],
    v: Float[Tensor, "b s g c"],
    *,
    block_size: int = 64,
    window: int = 3,
    random: int = 3,
    ends: int = 1,
    seed: int = 0,
    layout: Layout | None = None,
    mask: Mask | None = None,
    scale: float | None = None,
    dropout: float = 0.0,
    backend: Backend = "auto",
) -> Float[Tensor, "b t h c"]:
    r"""Attend to the blocks that :func:`bigbird_layout` grants (BigBird's internal form, ITC).

    .. math:: Y_i = \operatorname{softmax}\!\Big(\frac{Q_i K_{N(i)}^\top}{\sqrt e}\Big) V_{N(i)},
        \qquad N(i) = \{\, j : L_{ij} = 1 \,\}

    Each visible key counts once, however many of the three reasons make it visible.  The work
    grows with ``t block_size (window + random + 2 ends)``.

    Args:
        q: queries, the last ``t`` of ``s`` positions.
        k: keys; fewer heads than ``q`` are shared by groups of consecutive query heads.
        v: values.
        block_size: positions of a block; the last one may be shorter.
        window: blocks of the window, odd.
        random: blocks drawn for each row of blocks.
        ends: global blocks at each end.
        seed: of the draw.
        layout: a layout of one's own instead, ``n n``, or ``h n n`` for each head; it must be wide enough for
            ``s`` positions.
        mask: a further rule, for instance ``padding(lengths)``; joined by *and*.
        scale: factor on the scores; :math:`1/\sqrt e` unless given.
        dropout: share of the weights that are dropped; pass 0 outside training.
        backend: ``reference`` is the dense masked formula; ``torch`` and ``auto`` work by blocks.

    Raises:
        ConfigError: sizes that are negative, zero where they may not be, or fractions; an even window;
            a mask that is no rule.
        ShapeError: shapes that don't fit; a layout that is not square, not boolean, or too small.

    Source:
        Zaheer et al. 2020, section 2 and appendix D, arXiv:2007.14062
    """
    check_qkv(q, k, v)
    check_size("random_attention", "block_size", block_size)
    if mask is not None and not isinstance(mask, Mask):
        raise ConfigError(
            "random_attention mask", got=type(mask).__name__, want="a Mask", remedy="Use padding(lengths)."
        )
    if layout is None:
        rule = bigbird_rule(k.shape[1], block_size, window, random, ends, seed)
    else:
        rule = _ruled(layout, block_size)
    rule = rule if mask is None else rule & mask
    return block_sparse_attention(q, k, v, rule, block_size=block_size, scale=scale, dropout=dropout, backend=backend)


def bigbird_rule(s: int, block_size: int = 64, window: int = 3, random: int = 3, ends: int = 1, seed: int = 0) -> Mask:
    """Return :func:`bigbird_layout` for ``s`` positions as a rule; the same object each time."""
    check_size("bigbird_rule", "s", s, least=0)
    check_size("bigbird_rule", "block_size", block_size)
    _check_layout(window, random, ends, seed)
    return _kept(int(s), int(block_size), int(window), int(random), int(ends), int(seed))


@lru_cache(maxsize=64)
def _kept(s: int, block_size: int, window: int, random: int, ends: int, seed: int) -> Mask:
    blocks = max(1, -(-s // block_size))
    with torch.inference_mode(False):  # the layout outlives the call
        return block(block_size, bigbird_layout(blocks, window=window, random=random, ends=ends, seed=seed))


def _check_layout(window: int, random: int, ends: int, seed: int) -> None:
    """Refuse before the cache looks: to it, 3.0 is 3 and True is 1."""
    for name, value, least in (("window", window, 1), ("random", random, 0), ("ends", ends, 0), ("seed", seed, 0)):
        check_size("bigbird_layout", name, value, least=least)
    if window % 2 == 0:
        raise ConfigError("bigbird_layout window", got=window, want="an odd number", remedy=f"Pass {window + 1}.")


def _ruled(layout: Tensor, block_size: int) -> Mask:
    """The layout as a rule: the same object while size and content are the same, so that its plans are kept."""
    known = isinstance(layout, Tensor) and layout.dtype == torch.bool and layout.numel() and not layout.is_meta
    if not known or torch.compiler.is_compiling():
        return block(block_size, layout)  # which refuses what is none
    return _granted(layout.cpu().numpy().tobytes(), tuple(layout.shape), int(block_size))


@lru_cache(maxsize=16)
def _granted(content: bytes, shape: tuple[int, ...], block_size: int) -> Mask:
    with torch.inference_mode(False):  # the layout outlives the call
        return block(block_size, torch.frombuffer(bytearray(content), dtype=torch.bool).view(shape))
