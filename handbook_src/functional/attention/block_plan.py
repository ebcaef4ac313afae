"""Which blocks of a mask rule hold anything, found without writing the mask out.

A rule is a function of indices.  Called with *spans* of indices in their place (one
span for each block of queries, one for each block of keys) it answers for whole blocks
at once: nothing visible, all visible, or mixed.  Only the mixed blocks are then
evaluated pair by pair.  For 128 x 128 blocks of a window that is a thousand times less
work than the dense matrix.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, final

import torch
from torch import Tensor

from handbook_src.check import check_size
from handbook_src.errors import ConfigError
from handbook_src.functional.attention.mask import Mask

#: pairs of positions that are evaluated at once: 4 M booleans, and a few int64 temporaries of 32 MB
_AT_ONCE = 2**22


@dataclass(frozen=True, eq=False)
class Group:
    """Query blocks that see the same number of key blocks, and run as one batch."""

    #: numbers of the query blocks, ``m``.
    rows: Tensor
    #: numbers of their key blocks, ``m width``; a row that has fewer is filled up and masked.
    columns: Tensor
    #: ``m`` or 1, samples or 1, heads or 1, block, ``width * block``; ``None`` where all is visible.
    mask: Tensor | None
    #: first and last key block, where there is one query block and its key blocks are neighbours.
    run: tuple[int, int] | None


@dataclass(frozen=True, eq=False)
class BlockPlan:
    """What :func:`plan_blocks` found: reuse it for every call of the same rule and lengths.

    Args:
        rule: the mask rule.
        t: number of queries.
        s: number of keys.
        block_size: positions of a block.
        live: blocks that hold a visible pair, ``heads or 1, query blocks, key blocks``.
        parts: heads that share a pattern (``None``: all of them), and their groups.
    """

    rule: Mask
    t: int
    s: int
    block_size: int
    live: Tensor
    parts: tuple[tuple[tuple[int, ...] | None, tuple[Group, ...]], ...]

    @property
    def density(self) -> float:
        """Share of the blocks that are computed; full attention is 1."""
        return self.live.double().mean().item() if self.live.numel() else 0.0


def plan_blocks(
    rule: Mask, t: int, s: int | None = None, block_size: int = 64, *, device: torch.device | str = "cpu"
) -> BlockPlan:
    r"""Find the blocks of a mask rule that hold anything, and sort them for batched work.

    .. math:: L_{ij} = \bigvee_{t \in \text{block } i,\; s \in \text{block } j} M(t, s)

    The last 64 plans of rules without samples are kept: the same rule object with the
    same lengths is free.

    Args:
        rule: which query may attend to which key; the queries are the last ``t`` of ``s`` positions.
        t: number of queries.
        s: number of keys; ``t`` unless given.
        block_size: positions of a block, of queries and of keys; at most the longer of both counts.
        device: where the masks of the mixed blocks are made.

    Raises:
        ConfigError: no rule, or a size that is not an integer of at least 1 (lengths: 0).
        ShapeError: more queries than keys under a rule that compares positions.

    Source:
        block-sparse layouts: Child et al. 2019, section 5.5, arXiv:1904.10509
    """
    if not isinstance(rule, Mask):
        raise ConfigError("block rule", got=repr(rule), want="a Mask", remedy="Call the factory, as in window(256).")
    s = t if s is None else s
    check_size("plan_blocks", "t", t, least=0)
    check_size("plan_blocks", "s", s, least=0)
    check_size("plan_blocks", "block_size", block_size)
    # a rule that knows samples (padding) is made anew for each batch: keeping its plan would only cost memory
    planned = _planned if rule.batch is not None else _kept
    size = min(int(block_size), max(int(t), int(s), 1))  # a larger block would hold padding alone
    return planned(rule, int(t), int(s), size, torch.device(device))


def _planned(rule: Mask, t: int, s: int, size: int, device: torch.device) -> BlockPlan:
    # a kept plan serves calls of every kind: made under inference mode, or with another device as the default, it
    # must not differ
    with torch.inference_mode(False), torch.no_grad(), torch.device("cpu"):
        sheet = _Sheet(rule, t, s, size, device)
        patterns: dict[bytes, list[int]] = {}
        for head, live in enumerate(sheet.live):
            patterns.setdefault(live.numpy().tobytes(), []).append(head)
        shared = len(patterns) < 2
        parts = tuple(
            (None if shared else tuple(heads), sheet.groups(slice(None) if shared else heads))
            for heads in ([[0]] if shared else patterns.values())
        )
    return BlockPlan(rule, t, s, size, sheet.live, parts)


_kept = lru_cache(maxsize=64)(_planned)


@final
class _Sheet:
    """A rule over blocks: ``live`` and ``whole`` for each pair of them, masks on demand."""

    def __init__(self, rule: Mask, t: int, s: int, size: int, device: torch.device) -> None:
        self.rule, self.t, self.s, self.size, self.device = rule, t, s, size, device
        self.start = rule._start(t, s, None)
        self.b = torch.arange(1 if rule.batch is None else rule.batch).view(-1, 1, 1, 1)
        self.h = torch.arange(rule.heads or 1).view(-1, 1, 1)
        some, whole = self._from_spans()
        if s % size:
            whole[..., -1] = False  # positions beyond the last key
        mixed = (some & ~whole).any(0).nonzero()  # in any head
        for part in mixed.split(max(1, _AT_ONCE // (size * size * max(1, self.b.numel()) * self.h.numel()))):
            rows, columns = part.T
            some[:, rows, columns] &= self._pairs(rows, columns).flatten(-2).any(-1).any(0)
        self.live, self.whole = some, whole & some

    def _from_spans(self) -> tuple[Tensor, Tensor]:
        """Ask the rule about whole blocks; where it does not answer spans, every block is mixed."""
        queries = _blocks(self.t, self.size, self.start)[:, :, None]
        keys = _blocks(self.s, self.size, 0)[:, None]
        shape = (self.b.numel(), self.h.numel(), queries.shape[1], keys.shape[2])
        try:
            fact = self.rule.allows(self.b, self.h, _Span(*queries), _Span(*keys))  # type: ignore[arg-type]
            some, every = fact.some.expand(shape), fact.every.expand(shape)  # type: ignore[attr-defined]
        except Exception:
            some, every = torch.ones(shape, dtype=torch.bool), torch.zeros(shape, dtype=torch.bool)
        return some.any(0), every.all(0).clone()

    def _pairs(self, rows: Tensor, columns: Tensor) -> Tensor:
        """The rule, pair by pair, in the given blocks: ``b h p size size``."""
        inner = torch.arange(self.size)
        queries = (rows[:, None] * self.size + inner).clamp(max=self.t - 1) + self.start
        keys = (columns[:, None] * self.size + inner)[:, None]
        real = keys < self.s
        index = self.b[..., None], self.h[..., None], queries[:, :, None], keys.clamp(max=self.s - 1)
        seen = self.rule.allows(*index)
        shape = (self.b.numel(), self.h.numel(), len(rows), self.size, self.size)
        return seen.expand(shape) & real

    def groups(self, heads: Any) -> tuple[Group, ...]:
        """Sort the query blocks by how many key blocks they see."""
        live, whole = self.live[heads].any(0), self.whole[heads].all(0)
        counts, clear = live.sum(-1), (whole | ~live).all(-1)
        order: dict[tuple[int, bool], list[int]] = {}
        for row, (count, free) in enumerate(zip(counts.tolist(), clear.tolist(), strict=True)):
            if count:
                width = count if free else _rounded(count)
                order.setdefault((min(width, live.shape[1]), free), []).append(row)
        return tuple(
            self._group(torch.tensor(rows), width, free, live, whole, heads) for (width, free), rows in order.items()
        )

    def _group(self, rows: Tensor, width: int, free: bool, live: Tensor, whole: Tensor, heads: Any) -> Group:
        # stable: the live blocks first, both parts in their order
        columns = (~live[rows]).to(torch.int8).argsort(dim=-1, stable=True)[:, :width]
        there = live[rows].gather(1, columns)
        span = columns[0]
        run = (int(span[0]), int(span[-1])) if len(rows) == 1 and bool((span.diff() == 1).all()) else None
        mask = None if free else self._mask(rows, columns, there, whole, heads).to(self.device)
        return Group(rows.to(self.device), columns.to(self.device), mask, run)

    def _mask(self, rows: Tensor, columns: Tensor, there: Tensor, whole: Tensor, heads: Any) -> Tensor:
        """The small masks of a group, ``m b h size width*size``; ``m`` is 1 where all rows agree."""
        many, width = columns.shape
        samples, count = self.b.numel(), self.h[heads].numel()
        seen = torch.zeros(many, width, samples, count, self.size, self.size, dtype=torch.bool)
        full = there & whole[rows[:, None], columns]
        seen[full] = True
        where = (there & ~full).nonzero()
        for part in where.split(max(1, _AT_ONCE // (self.size * self.size * max(1, samples) * self.h.numel()))):
            i, j = part.T
            pairs = self._pairs(rows[i], columns[i, j])[:, heads]
            seen[i, j] = pairs.permute(2, 0, 1, 3, 4)
        mask = seen.permute(0, 2, 3, 4, 1, 5).flatten(-2)
        return mask[:1].clone() if many > 1 and bool((mask == mask[:1]).all()) else mask.contiguous()


def _blocks(n: int, size: int, start: int) -> Tensor:
    """First and last position of each block, ``2 blocks``."""
    first = torch.arange(0, n, size)
    return torch.stack([first, (first + size - 1).clamp(max=n - 1)]) + start


def _rounded(count: int) -> int:
    """Up to one of four steps between powers of two: few groups, at most a quarter wasted."""
    step = 1 << max(0, count.bit_length() - 3)
    return -(-count // step) * step


@final
class _Span:
    """Integers from ``low`` to ``high``, both inside: what a rule is asked about in place of an index."""

    def __init__(self, low: Tensor, high: Tensor) -> None:
        self.low, self.high = low, high
        self.device = low.device

    def __add__(self, other: _Span | Tensor | int) -> _Span:
        other = _span(other)
        return _Span(self.low + other.low, self.high + other.high)

    def __neg__(self) -> _Span:
        return _Span(-self.high, -self.low)

    def __sub__(self, other: _Span | Tensor | int) -> _Span:
        return self + -_span(other)

    def __rsub__(self, other: Tensor | int) -> _Span:
        return _span(other) - self

    def abs(self) -> _Span:
        least = torch.maximum(self.low, -self.high).clamp(min=0)
        return _Span(least, torch.maximum(-self.low, self.high))

    def __mul__(self, factor: int) -> _Span:
        ends = self.low * factor, self.high * factor
        return _Span(*(ends if factor >= 0 else ends[::-1]))

    def __floordiv__(self, step: int) -> _Span:
        _positive(step)
        return _Span(self.low // step, self.high // step)

    def __mod__(self, step: int) -> _Span:
        _positive(step)
        same = self.low // step == self.high // step
        return _Span(torch.where(same, self.low % step, 0), torch.where(same, self.high % step, step - 1))

    def __lt__(self, other: _Span | Tensor | int) -> _Fact:
        other = _span(other)
        return _Fact(self.low < other.high, self.high < other.low)

    def __le__(self, other: _Span | Tensor | int) -> _Fact:
        other = _span(other)
        return _Fact(self.low <= other.high, self.high <= other.low)

    def __gt__(self, other: _Span | Tensor | int) -> _Fact:
        return _span(other) < self

    def __ge__(self, other: _Span | Tensor | int) -> _Fact:
        return _span(other) <= self

    def __eq__(self, other: _Span | Tensor | int) -> _Fact:  # type: ignore[override]
        other = _span(other)
        single = (self.low == self.high) & (other.low == other.high)
        return _Fact((self.low <= other.high) & (other.low <= self.high), single & (self.low == other.low))

    def __ne__(self, other: _Span | Tensor | int) -> _Fact:  # type: ignore[override]
        return ~(self == other)

    def lookup(self, table: Tensor, rows: _Span | Tensor) -> _Fact:
        """Whether any, and whether all, entries of a boolean table are true in these rows and columns."""
        rows = _span(rows)
        sums = torch.nn.functional.pad(table.cpu().long(), (1, 0, 1, 0)).cumsum(0).cumsum(1)
        top, bottom, left, right = rows.low, rows.high + 1, self.low, self.high + 1
        count = sums[bottom, right] - sums[top, right] - sums[bottom, left] + sums[top, left]
        return _Fact(count > 0, count == (bottom - top) * (right - left))

    __radd__, __rmul__ = __add__, __mul__
    __hash__ = None  # type: ignore[assignment]


@final
class _Fact:
    """What is known of a condition over a block: it holds for some pair perhaps, for every pair surely."""

    def __init__(self, some: Tensor, every: Tensor) -> None:
        self.some, self.every = some, every

    def __and__(self, other: _Fact | Tensor | bool) -> _Fact:
        return self._with(other, operator.and_)

    def __or__(self, other: _Fact | Tensor | bool) -> _Fact:
        return self._with(other, operator.or_)

    def __invert__(self) -> _Fact:
        return _Fact(~self.every, ~self.some)

    def __eq__(self, other: _Fact | Tensor | bool) -> _Fact:  # type: ignore[override]
        return (self & other) | ~(self | other)

    def __ne__(self, other: _Fact | Tensor | bool) -> _Fact:  # type: ignore[override]
        return ~(self == other)

    def _with(self, other: _Fact | Tensor | bool, join: Callable[[Tensor, Tensor], Tensor]) -> _Fact:
        if not isinstance(other, _Fact):
            known = torch.as_tensor(other)
            if known.dtype != torch.bool:
                raise TypeError("a fact joins facts and booleans")
            other = _Fact(known, known)
        return _Fact(join(self.some, other.some), join(self.every, other.every))

    def __bool__(self) -> bool:
        raise TypeError("a fact about a block is neither true nor false")

    __rand__, __ror__ = __and__, __or__
    __xor__ = __rxor__ = __ne__
    __hash__ = None  # type: ignore[assignment]


def _span(x: _Span | Tensor | int) -> _Span:
    if isinstance(x, _Span):
        return x
    known = torch.as_tensor(x)
    return _Span(known, known)


def _positive(step: int) -> None:
    if type(step) is not int or step < 1:
        raise TypeError("spans are divided by positive integers")
