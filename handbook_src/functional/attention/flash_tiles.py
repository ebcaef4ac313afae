r"""Flash attention as a tile loop in PyTorch: what the kernel does, with every read and write counted.

The queries, keys, values and the output lie in a large slow memory; the arithmetic happens on tiles
that fit a small fast one.  Each tile is fetched through :class:`SlowMemory`, which counts.  This is for
reading and counting, not for speed: :func:`handbook_src.functional.flash_attention` is that.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable

from handbook_src.check import check_size, known_finite
from handbook_src.errors import ConfigError, ShapeError
from handbook_src.functional.attention.attention import broken_rows, check_numbers, check_qkv, without_nan
from handbook_src.functional.attention.mask import causal as causal_rule
from handbook_src.precision import statistic_dtype


@dataclass
class SlowMemory:
    """A large memory that counts the numbers that pass between it and the fast one."""

    #: numbers fetched into fast memory.
    reads: int = 0
    #: numbers written back.
    writes: int = 0
    #: the most numbers that one step of the loop held in fast memory.
    held: int = 0

    @property
    def traffic(self) -> int:
        """Numbers moved, both ways."""
        return self.reads + self.writes

    def load(self, x: Tensor, rows: slice) -> Tensor:
        """Fetch some rows of ``x``."""
        part = x[..., rows, :]
        self.reads += part.numel()
        return part

    def store(self, x: Tensor, rows: slice, value: Tensor) -> None:
        """Write some rows of ``x``."""
        x[..., rows, :] = value
        self.writes += value.numel()

    def hold(self, *tiles: Tensor) -> None:
        """Note what stands in fast memory at the same time, of one sample and head."""
        self.held = max(self.held, sum(t.shape[-2:].numel() for t in tiles))


@dataclass(frozen=True)
class Tiles:
    """How many queries and how many keys one step of the loop takes.

    Args:
        rows: queries of a tile.
        columns: keys of a tile.
    """

    rows: int = 64
    columns: int = 64

    def __post_init__(self) -> None:
        check_size("Tiles", "rows", self.rows)
        check_size("Tiles", "columns", self.columns)

    @staticmethod
    def fitting(memory: int, features: int) -> Tiles:
        r"""Return the tile of most queries of which everything fits into ``memory`` numbers.

        .. math::
            \underbrace{2 B_r e}_{Q_i,\, O_i} + \underbrace{2 B_c e}_{K_j,\, V_j} + \underbrace{B_r B_c}_{S_{ij}}
            + \underbrace{2 B_r}_{m_i,\, \ell_i} \le M, \qquad B_c = \min(B_r, e)

        Keys and values are fetched once for each tile of queries, so its rows :math:`B_r = \Theta(M / e)` are
        what saves traffic; more than :math:`e` columns would only crowd them out.

        Args:
            memory: numbers that fit into fast memory, :math:`M`.
            features: of a head, :math:`e`.

        Raises:
            ConfigError: not even one query and one key fit.

        Source:
            after Dao et al. 2022, algorithm 1, line 1, arXiv:2205.14135, whose outer loop goes over the keys, so
            that :math:`B_c` is the large one there
        """
        check_size("Tiles.fitting", "memory", memory)
        check_size("Tiles.fitting", "features", features)
        half = 2 * features + 1
        size = math.isqrt(half * half + memory) - half  # a square one: 4 B e + B**2 + 2 B
        if size < 1:
            need = 4 * features + 3
            raise ConfigError("fast memory", got=memory, want=f"at least {need} numbers", remedy="Use smaller heads.")
        if size < features:
            return Tiles(size, size)
        return Tiles((memory - 2 * features * features) // (3 * features + 2), features)


def tiled_attention(
    q: Float[Tensor, "b t h e"],
    k: Float[Tensor, "b s h e"],
    v: Float[Tensor, "b s h e"],
    *,
    causal: bool = False,
    scale: float | None = None,
    tiles: Tiles = Tiles(),
    memory: SlowMemory | None = None,
) -> Float[Tensor, "b t h e"]:
    r"""Attention without its matrix: a running softmax over tiles of keys, exact, and again in the backward pass.

    For the queries of tile :math:`i`, over the tiles :math:`j` of keys:

    .. math::
        \begin{aligned}
        m' &= \max(m, \operatorname{rowmax} S_{ij}), & P &= e^{S_{ij} - m'}, \\
        \ell' &= e^{m - m'} \ell + \operatorname{rowsum} P, & O' &= e^{m - m'} O + P V_j,
        \end{aligned}

    and at the end :math:`O_i = O / \ell`, :math:`L_i = m + \log \ell`.  :math:`L` is all that the backward pass
    needs to form a tile of weights again, :math:`P_{ij} = e^{S_{ij} - L_i}`.  Under ``causal`` a tile of keys
    that no query of the tile may see is not fetched.

    Half precision is widened to float32 when a tile is fetched, and rounded once at the end.
    A NaN or infinite key or value reaches no query that it is hidden from, forward or backward: where one is
    found, the queries that see it are marked after the loop.

    Args:
        q: queries.
        k: keys.
        v: values.
        causal: queries are the last ``t`` of ``s`` positions and see no later key.
        scale: factor on the scores; :math:`1/\sqrt e` unless given.
        tiles: how many queries and keys a step takes; the result does not depend on it.
        memory: counts the traffic, forward and, when it happens, backward.

    Raises:
        ShapeError: shapes that don't fit, fewer key heads than query heads, more queries than keys under ``causal``.
        ConfigError: ``scale`` is not positive, ``tiles`` or ``memory`` are something else.

    Source:
        Dao 2023, algorithms 1 and 2, arXiv:2307.08691; Dao et al. 2022, arXiv:2205.14135
    """
    _check("tiled_attention", q, k, v, scale, memory)
    if not isinstance(tiles, Tiles):
        raise ConfigError("tiled_attention tiles", got=repr(tiles), want="Tiles", remedy="Pass Tiles(64, 64).")
    if causal and q.shape[1] > k.shape[1]:
        raise ShapeError(
            "queries under causal",
            got=f"t={q.shape[1]} queries for s={k.shape[1]} keys",
            want="t <= s, the queries being the last positions",
            remedy="Drop causal= for cross-attention.",
        )
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    broken = None
    if not known_finite(q, k, v):
        (q, k, v), (bad_q, bad_k, bad_v) = without_nan(q, k, v)
        seen = causal_rule.sdpa(q.shape[1], k.shape[1], device=q.device) if causal else None
        broken = broken_rows(bad_q, bad_k | bad_v, seen).transpose(1, 2)
    out: Tensor = _Tiled.apply(
        *(x.transpose(1, 2) for x in (q, k, v)), scale, causal, tiles, SlowMemory() if memory is None else memory
    )
    out = out.transpose(1, 2)
    return out if broken is None else out.masked_fill(broken, math.nan)


def _check(op: str, q: Tensor, k: Tensor, v: Tensor, scale: float | None, memory: SlowMemory | None) -> None:
    check_qkv(q, k, v)
    check_numbers(scale, 0.0)
    if q.shape[2] != k.shape[2] or v.shape[3] != q.shape[3]:
        raise ShapeError(
            f"{op} heads",
            got=f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}",
            want="as many key heads as query heads, and values as wide as keys",
            remedy="flash_attention shares key heads.",
        )
    if memory is not None and not isinstance(memory, SlowMemory):
        raise ConfigError(f"{op} memory", got=repr(memory), want="a SlowMemory", remedy="Pass SlowMemory().")


class _Tiled(torch.autograd.Function):
    """Keeps the inputs, the output and one number a query: the weights are formed again."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool, tiles: Tiles, memory: SlowMemory
    ) -> Tensor:
        out, lse = _forward(q, k, v, scale, causal, tiles, memory)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.rest = (scale, causal, tiles, memory)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return (*_backward(grad, *ctx.saved_tensors, *ctx.rest), None, None, None, None)


def _forward(
    q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool, tiles: Tiles, memory: SlowMemory
) -> tuple[Tensor, Tensor]:
    """Walk over the queries; for each tile of them, over the keys."""
    out = torch.empty_like(q)
    lse = q.new_empty(*q.shape[:-1], 1, dtype=statistic_dtype(q))
    for rows in _steps(q.shape[-2], tiles.rows):
        q_i = memory.load(q, rows).to(statistic_dtype(q)) * scale
        best = torch.full_like(q_i[..., :1], -math.inf)
        total, mixed = torch.zeros_like(best), torch.zeros_like(q_i)
        for columns in _steps(_visible(rows, q, k, causal), tiles.columns):
            k_j, v_j = (memory.load(x, columns).to(statistic_dtype(q)) for x in (k, v))
            scores = _hidden(q_i @ k_j.mT, rows, columns, q, k, causal)
            memory.hold(q_i, k_j, v_j, scores, mixed, best, total)
            higher = torch.maximum(best, scores.amax(-1, keepdim=True))
            weights, fade = (scores - higher).exp(), (best - higher).exp()
            total = fade * total + weights.sum(-1, keepdim=True)
            mixed = fade * mixed + weights @ v_j
            best = higher
        nothing = total == 0
        memory.store(out, rows, (mixed / total.masked_fill(nothing, 1.0)).to(q.dtype))
        memory.store(lse, rows, (best + total.log()).masked_fill(nothing, 0.0))
    return out, lse


def _backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    scale: float,
    causal: bool,
    tiles: Tiles,
    memory: SlowMemory,
) -> tuple[Tensor, Tensor, Tensor]:
    """Walk over the keys; for each tile of them, over the queries, whose gradient is added up in slow memory."""
    wide = statistic_dtype(q)
    dq = torch.zeros_like(q, dtype=wide)
    dk, dv = torch.zeros_like(k), torch.zeros_like(v)
    delta = torch.empty_like(lse)
    for rows in _steps(q.shape[-2], tiles.rows):
        product = memory.load(grad, rows).to(wide) * memory.load(out, rows).to(wide)
        memory.store(delta, rows, product.sum(-1, keepdim=True))
    for columns in _steps(k.shape[-2], tiles.columns):
        k_j, v_j = (memory.load(x, columns).to(wide) for x in (k, v))
        dk_j, dv_j = torch.zeros_like(k_j), torch.zeros_like(v_j)
        for rows in _steps(q.shape[-2], tiles.rows):
            if columns.start >= _visible(rows, q, k, causal):
                continue
            q_i, g_i = (memory.load(x, rows).to(wide) for x in (q, grad))
            lse_i, delta_i = (memory.load(x, rows) for x in (lse, delta))
            weights = (_hidden(q_i @ k_j.mT * scale, rows, columns, q, k, causal) - lse_i).exp()
            inner = weights * (g_i @ v_j.mT - delta_i) * scale
            dv_j += weights.mT @ g_i
            dk_j += inner.mT @ q_i
            memory.store(dq, rows, memory.load(dq, rows) + inner @ k_j)
        memory.store(dk, columns, dk_j.to(k.dtype))
        memory.store(dv, columns, dv_j.to(v.dtype))
    return dq.to(q.dtype), dk, dv


def standard_attention(
    q: Float[Tensor, "b t h e"],
    k: Float[Tensor, "b s h e"],
    v: Float[Tensor, "b s h e"],
    *,
    scale: float | None = None,
    memory: SlowMemory | None = None,
) -> Float[Tensor, "b t h e"]:
    r"""Attention in three steps, each of which reads its input from slow memory and writes its result there.

    .. math:: S = Q K^\top / \sqrt e, \qquad P = \operatorname{softmax}(S), \qquad O = P V

    The two square matrices are written once and read once each: :math:`4 t s + 2 (t + s) e` numbers a head.
    Here each product may keep its whole input in fast memory, which flatters it.

    Args:
        q: queries.
        k: keys.
        v: values.
        scale: factor on the scores; :math:`1/\sqrt e` unless given.
        memory: counts the traffic.

    Raises:
        ShapeError: shapes that don't fit, fewer key heads than query heads.
        ConfigError: ``scale`` is not positive, ``memory`` is something else.

    Source:
        Dao et al. 2022, algorithm 0, arXiv:2205.14135
    """
    _check("standard_attention", q, k, v, scale, memory)
    memory = SlowMemory() if memory is None else memory
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    scores, weights = (q.new_empty(*q.shape[:-1], k.shape[-2]) for _ in range(2))
    out, every = torch.empty_like(q), slice(None)
    memory.store(scores, every, memory.load(q, every) @ memory.load(k, every).mT * scale)
    memory.store(weights, every, memory.load(scores, every).softmax(-1))
    memory.store(out, every, memory.load(weights, every) @ memory.load(v, every))
    return out.transpose(1, 2)


def _steps(length: int, size: int) -> Iterator[slice]:
    for start in range(0, length, size):
        yield slice(start, min(start + size, length))


def _visible(rows: slice, q: Tensor, k: Tensor, causal: bool) -> int:
    """How many keys the last query of a tile may see."""
    return rows.stop + k.shape[-2] - q.shape[-2] if causal else k.shape[-2]


def _hidden(scores: Tensor, rows: slice, columns: slice, q: Tensor, k: Tensor, causal: bool) -> Tensor:
    """Take the future out of a tile of scores; most tiles hold none and are left alone."""
    first = rows.start + k.shape[-2] - q.shape[-2]  # position of the first query
    if not causal or columns.stop <= first + 1:
        return scores
    positions = torch.arange(first, first + scores.shape[-2], device=scores.device)
    keys = torch.arange(columns.start, columns.start + scores.shape[-1], device=scores.device)
    return scores.masked_fill(keys > positions[:, None], -math.inf)
