r"""Which query may look at which key: rules, not tensors.

A rule is a pure function of four indices, :math:`M(b, h, t, s) \in \{0, 1\}`, and
rules compose: ``causal & (window(256) | sinks(4))``.  One object gives the dense
matrix for a figure, the ``attn_mask`` of torch's SDPA, and the ``mask_mod`` of
FlexAttention.  In every form *true means: may attend*.

Positions are absolute.  With ``t`` queries and ``s >= t`` keys the queries are the
last ``t`` positions (``offset = s - t``, "bottom right"), which is what decoding
with a cache needs; torch's ``is_causal=True`` aligns top left instead.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from functools import reduce
from typing import TYPE_CHECKING, Any, final

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from handbook_src.check import check_probability
from handbook_src.errors import ConfigError, ShapeError

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

#: ``(b, h, t, s) -> may attend``, on index tensors that broadcast; FlexAttention's ``mask_mod``
MaskMod = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


@final
class Mask:
    r"""A rule that says which query may attend to which key.

    .. math:: \tilde{S}_{bhts} = \begin{cases} S_{bhts} & M(b, h, t, s) \\ -\infty & \text{otherwise} \end{cases}

    Rules compose with ``&`` (both), ``|`` (either) and ``~`` (not).  The vocabulary:
    ``full``, ``causal``, ``anticausal``, ``window``, ``sinks``, ``prefix``,
    ``prefix_lm``, ``padding``, ``left_padding``, ``dilated``, ``global_tokens``,
    ``marked``, ``random``, ``block``, ``strided``, ``fixed``, ``along``, ``documents``
    and ``per_head``.  A rule of one's own:
    ``Mask("even", lambda b, h, t, s: s % 2 == 0)``.

    Args:
        text: how the rule prints.
        allows: the rule itself, from index tensors that broadcast to a boolean one.
        positional: it compares the query's position with the key's.
        batch: number of samples that it knows, if it knows samples.
        heads: number of heads that it knows, if it knows heads.
        extent: number of positions that it knows, if they are limited.

    Shape:
        ``dense(t, s)`` is ``t s``, or ``b h t s`` where the rule knows samples or heads.

    Typical values:
        ``causal & window(4096)`` (Mistral 7B), ``window(257) | global_tokens(0)``
        (Longformer), ``causal & (window(1020) | sinks(4))`` (StreamingLLM).

    Source:
        Vaswani et al. 2017, section 3.2.3, arXiv:1706.03762; FlexAttention, arXiv:2412.05496
    """

    def __init__(
        self,
        text: str,
        allows: MaskMod,
        *,
        positional: bool = True,
        batch: int | None = None,
        heads: int | None = None,
        extent: int | None = None,
    ) -> None:
        self.text, self.allows, self.positional = text, allows, positional
        self.batch, self.heads, self.extent = batch, heads, extent
        self._outermost = ""  # the operator that was applied last, for brackets in print

    def __and__(self, other: Mask) -> Mask:
        if not isinstance(other, Mask):
            return NotImplemented
        left, right = (f"({m.text})" if m._outermost == "|" else m.text for m in (self, other))
        return _composed("&", f"{left} & {right}", lambda *i: self.allows(*i) & other.allows(*i), self, other)

    def __or__(self, other: Mask) -> Mask:
        if not isinstance(other, Mask):
            return NotImplemented
        text = f"{self.text} | {other.text}"
        return _composed("|", text, lambda *i: self.allows(*i) | other.allows(*i), self, other)

    def __invert__(self) -> Mask:
        text = f"~({self.text})" if self._outermost in ("&", "|") else f"~{self.text}"
        return _composed("~", text, lambda *i: ~self.allows(*i), self)

    def __bool__(self) -> bool:
        raise ConfigError(
            "truth of a mask rule", got=self.text, want="&, | or ~", remedy="Python's and / or / not drop one operand."
        )

    def __repr__(self) -> str:
        return self.text

    def __copy__(self) -> Mask:
        return self  # rules never change, and ``is full`` and ``is causal`` choose the fast paths

    def __deepcopy__(self, memo: dict[int, Any]) -> Mask:
        return self

    def __reduce__(self) -> str:
        for name, rule in (("full", full), ("causal", causal), ("anticausal", anticausal)):
            if self is rule:
                return name
        raise ConfigError(
            "mask rule to pickle",
            got=self.text,
            want="full, causal or anticausal",
            remedy="A rule is a function: save the layer's state_dict(), and make the rule again when loading.",
        )

    def dense(
        self, t: int, s: int | None = None, *, offset: int | None = None, device: torch.device | str | None = None
    ) -> Bool[Tensor, "*lead t s"]:
        """Write the rule out as a boolean matrix, true where the query may attend.

        Args:
            t: number of queries.
            s: number of keys; ``t`` unless given.
            offset: position of the first query; ``s - t`` unless given.
            device: where the matrix is made.

        Raises:
            ShapeError: more queries than keys under a rule that compares positions,
                or positions that the rule was not made for.
        """
        s = t if s is None else s
        start = self._start(t, s, offset)
        samples = 1 if self.batch is None else self.batch
        b = torch.arange(samples, device=device).view(-1, 1, 1, 1)
        h = torch.arange(self.heads or 1, device=device).view(-1, 1, 1)
        queries, keys = torch.arange(t, device=device)[:, None] + start, torch.arange(s, device=device)
        matrix = self.allows(b, h, queries, keys).expand(samples, self.heads or 1, t, s)
        return matrix[0, 0] if self.batch is None and self.heads is None else matrix

    def sdpa(
        self, t: int, s: int | None = None, *, offset: int | None = None, device: torch.device | str | None = None
    ) -> Bool[Tensor, "b h t s"] | None:
        """Return ``attn_mask`` for torch's SDPA, broadcastable to ``b h t s``; ``None`` where nothing is hidden."""
        if self is full:
            return None
        matrix = self.dense(t, s, offset=offset, device=device)
        return matrix if matrix.ndim == 4 else matrix[None, None]

    def flex(self, *, offset: int = 0) -> MaskMod:
        """Return ``mask_mod`` for FlexAttention, with the first query at position ``offset``."""
        return lambda b, h, q_idx, kv_idx: self.allows(b, h, q_idx + offset, kv_idx)

    def block_mask(
        self, t: int, s: int | None = None, *, offset: int | None = None, device: torch.device | str = "cpu"
    ) -> BlockMask:
        """Return FlexAttention's block-sparse form of the rule, which skips blocks that are all hidden."""
        from torch.nn.attention.flex_attention import create_block_mask

        s = t if s is None else s
        start = self._start(t, s, offset)
        for what, n in (("queries", t), ("keys", s)):
            _at_least(what, n, 1)  # torch makes none of nothing
        return create_block_mask(self.flex(offset=start), self.batch, self.heads, t, s, device=str(device))

    def _start(self, t: int, s: int, offset: int | None) -> int:
        """Check the sizes and return the position of the first query."""
        _check_sizes(t, s, offset)
        if offset is None and self.positional and t > s:
            raise ShapeError(
                f"queries under {self}",
                got=f"t={t} queries for s={s} keys",
                want="t <= s, the queries being the last positions",
                remedy="Pass offset= to place the first query, or drop the rule for cross-attention.",
            )
        start = max(s - t, 0) if offset is None else offset
        if self.extent is not None and start < 0:
            raise ShapeError(
                f"offset under {self}",
                got=start,
                want="at least 0",
                remedy="The rule looks positions up in a table, which begins at 0.",
            )
        if self.extent is not None and max(start + t, s) > self.extent:
            raise ShapeError(
                f"positions under {self}",
                got=max(start + t, s),
                want=f"at most {self.extent}",
                remedy="Make the rule for the longest sequence.",
            )
        return start


full = Mask("full", lambda b, h, t, s: (t >= 0) & (s >= 0), positional=False)
full.__doc__ = "Bidirectional attention: every query sees every key, :math:`M(t, s) = 1`."
causal = Mask("causal", lambda b, h, t, s: s <= t)
causal.__doc__ = r"Causal attention: a query sees itself and what came before, :math:`M(t, s) = [s \le t]`."
anticausal = Mask("anticausal", lambda b, h, t, s: s >= t)
anticausal.__doc__ = "A query sees itself and what comes after.  Not ``~causal``, which hides the query from itself."


def window(n: int) -> Mask:
    r"""Keys nearer than ``n`` positions: :math:`|t - s| < n`.

    So ``causal & window(n)`` sees ``n`` keys, the query's own among them.
    """
    _at_least("window size", n, 1)
    return Mask(f"window({n})", lambda b, h, t, s: (t - s).abs() < n)


def sinks(n: int) -> Mask:
    """The first ``n`` keys, which StreamingLLM keeps for ever (arXiv:2309.17453)."""
    _at_least("number of sinks", n, 0)
    return Mask(f"sinks({n})", lambda b, h, t, s: s < n, positional=False)


def prefix(lengths: int | Int[Tensor, " b"]) -> Mask:
    """The keys of a prefix: one length for all, or one for each sample."""
    text = f"prefix({_brief(lengths)})"
    if isinstance(lengths, int):
        _at_least("prefix length", lengths, 0)
        return Mask(text, lambda b, h, t, s: s < lengths, positional=False)
    _one_a_sample("prefix lengths", lengths)
    return Mask(text, lambda b, h, t, s: s < lengths.to(b.device)[b], positional=False, batch=len(lengths))


def prefix_lm(lengths: int | Int[Tensor, " b"]) -> Mask:
    r"""Prefix language model: the prefix is read in both directions, the rest is causal.

    .. math:: M(t, s) = [s \le t] \lor [s < p]

    Args:
        lengths: of the prefix, :math:`p`: one for all, or one for each sample.

    Raises:
        ConfigError: a negative length.
        ShapeError: lengths that are not one integer a sample.

    Shape:
        ``t s``, or ``b 1 t s`` with one length for each sample.

    Typical values:
        the length of the prompt; GLM, UL2's S-denoiser and the prefix LM in T5's
        comparison use it.  PaLM does not: it is causal.

    Source:
        Raffel et al. 2020, section 3.2.1 and figure 4, arXiv:1910.10683
    """
    return causal | prefix(lengths)


def padding(lengths: Int[Tensor, " b"]) -> Mask:
    """Keys that are not padding, where each sample has its length and is padded on the right."""
    _one_a_sample("padding lengths", lengths)
    text = f"padding({_brief(lengths)})"
    return Mask(text, lambda b, h, t, s: s < lengths.to(b.device)[b], positional=False, batch=len(lengths))


def left_padding(counts: Int[Tensor, " b"]) -> Mask:
    """Keys that are not padding, where each sample begins with its own number of padding positions."""
    _one_a_sample("padding counts", counts)
    text = f"left_padding({_brief(counts)})"
    return Mask(text, lambda b, h, t, s: s >= counts.to(b.device)[b], positional=False, batch=len(counts))


def dilated(step: int) -> Mask:
    """Every ``step``-th key, counted from the query; with a reach: ``window(n) & dilated(step)``."""
    _at_least("dilation step", step, 1)
    return Mask(f"dilated({step})", lambda b, h, t, s: (t - s) % step == 0)


def global_tokens(*positions: int) -> Mask:
    """Positions that see all and are seen by all (Longformer, arXiv:2004.05150)."""
    if not positions:
        raise ConfigError("global tokens", got="none", want="at least one position", remedy="Name the positions.")
    for p in positions:
        _at_least("position of a global token", p, 0)
    text = f"global_tokens({', '.join(map(str, positions))})"
    return Mask(text, lambda b, h, t, s: reduce(operator.or_, ((t == p) | (s == p) for p in positions)))


def marked(which: Bool[Tensor, "b n"], *, rows: bool = True) -> Mask:
    """Global positions, marked for each sample: seen by all, and with ``rows`` seeing all."""
    if not isinstance(which, Tensor) or which.ndim != 2 or which.dtype != torch.bool:
        got = f"{tuple(which.shape)} {which.dtype}" if isinstance(which, Tensor) else repr(which)
        raise ShapeError("marks", got=got, want="booleans, b n", remedy="Mark each position of each sample.")

    def either(b: Any, h: Any, t: Any, s: Any) -> Any:
        seen = _looked_up(which, b, s)
        return seen | _looked_up(which, b, t) if rows else seen

    return Mask(f"marked({_brief(which)})", either, batch=which.shape[0], extent=which.shape[1])


def random(share: float, seed: int = 0) -> Mask:
    """A share of all pairs, drawn by hashing (seed, t, s): the same pair is always drawn alike.

    BigBird (arXiv:2007.14062) draws a fixed number of key blocks for each query
    block; here each pair is drawn on its own, so a row may stay empty: add
    ``window`` or ``global_tokens``, as BigBird does.
    """
    check_probability("random", "share", share, below_one=False)
    _at_least("random seed", seed, 0)
    limit, salt = int(share * 2**32), (seed + 1) * 0x9E3779B1 & 0xFFFFFFFF

    def drawn(b: Tensor, h: Tensor, t: Tensor, s: Tensor) -> Tensor:
        return _mix(_mix(t.to(torch.int64) + salt) + s.to(torch.int64)) < limit

    return Mask(f"random({share}, seed={seed})", drawn)


def block(n: int, layout: Bool[Tensor, "*heads rows rows"] | None = None) -> Mask:
    """Blocks of ``n`` positions that see only themselves, or the key blocks that ``layout`` grants them.

    A layout may have a leading axis: one matrix for each head.
    """
    _at_least("block size", n, 1)
    if layout is None:
        return Mask(f"block({n})", lambda b, h, t, s: t // n == s // n)
    fits = isinstance(layout, Tensor) and layout.ndim in (2, 3) and layout.dtype == torch.bool
    if not fits or layout.shape[-2] != layout.shape[-1] or 0 in layout.shape[:-2]:
        got = f"{tuple(layout.shape)} {layout.dtype}" if isinstance(layout, Tensor) else repr(layout)
        remedy = "One row for each query block, one column for each key block; heads, if any, first."
        raise ShapeError("block layout", got=got, want="a square boolean matrix", remedy=remedy)
    text, extent = f"block({n}, layout={_brief(layout)})", n * layout.shape[-1]
    if layout.ndim == 3:
        by_head: MaskMod = lambda b, h, t, s: layout.to(t.device)[h, t // n, s // n]  # noqa: E731
        return Mask(text, by_head, heads=len(layout), extent=extent)
    return Mask(text, lambda b, h, t, s: layout.to(t.device)[t // n, s // n], extent=extent)


def strided(stride: int) -> Mask:
    r"""The Sparse Transformer's strided pattern: the ``stride`` keys before the query, and every ``stride``-th.

    .. math:: M(t, s) = [s \le t] \land \big( [t - s \le l] \lor [(t - s) \bmod l = 0] \big)

    Child et al. 2019, section 4.3, arXiv:1904.10509.  The first half alone is ``causal & window(stride + 1)``, the
    second ``causal & dilated(stride)``.
    """
    _at_least("stride", stride, 1)
    rule = causal & (window(stride + 1) | dilated(stride))
    rule.text, rule._outermost = f"strided({stride})", ""
    return rule


def fixed(stride: int, summary: int = 1) -> Mask:
    r"""The Sparse Transformer's fixed pattern: the query's own block, and the last ``summary`` keys of every block.

    .. math:: M(t, s) = [s \le t] \land
        \big( [\lfloor t / l \rfloor = \lfloor s / l \rfloor] \lor [s \bmod l \ge l - c] \big)

    Child et al. 2019, section 4.3, arXiv:1904.10509.  The first half alone is ``causal & block(stride)``.
    """
    _at_least("stride", stride, 1)
    _at_least("summary keys of a block", summary, 1)
    if summary > stride:
        remedy = "With summary = stride it is the causal rule."
        raise ConfigError("summary keys of a block", got=summary, want=f"at most the stride {stride}", remedy=remedy)
    ends = Mask("ends", lambda b, h, t, s: s % stride >= stride - summary)
    rule = causal & (block(stride) | ends)
    rule.text, rule._outermost = f"fixed({stride}, {summary})", ""
    return rule


def along(axis: int, *shape: int) -> Mask:
    """Positions of a grid that differ along ``axis`` alone, the grid being read row by row.

    On a picture of ``height`` by ``width``, ``along(1, height, width)`` is ``block(width)``, the rows, and
    ``along(0, height, width)`` is ``dilated(width)``, the columns.
    """
    for n in shape:
        _at_least("axis of a grid", n, 1)
    if not isinstance(axis, int) or isinstance(axis, bool) or not 0 <= axis < len(shape):
        want = f"0 to {len(shape) - 1}" if shape else "a grid of one axis or more"
        raise ConfigError("axis of a grid", got=repr(axis), want=want, remedy="Count the axes from the first.")
    step = reduce(operator.mul, shape[axis + 1 :], 1)

    def same_line(b: Tensor, h: Tensor, t: Tensor, s: Tensor) -> Tensor:
        return (t - t // step % shape[axis] * step) == (s - s // step % shape[axis] * step)

    return Mask(f"along({axis}, {', '.join(map(str, shape))})", same_line, extent=reduce(operator.mul, shape))


def documents(ids: Int[Tensor, "b n"]) -> Mask:
    """Positions of the same document, where several are packed into one row."""
    if not isinstance(ids, Tensor) or ids.ndim != 2 or ids.dtype not in (torch.int32, torch.int64):
        got = f"{tuple(ids.shape)} {ids.dtype}" if isinstance(ids, Tensor) else repr(ids)
        raise ShapeError("document ids", got=got, want="integers, b n", remedy="Give each position its document.")

    def same(b: Tensor, h: Tensor, t: Tensor, s: Tensor) -> Tensor:
        here = ids.to(b.device)
        return here[b, t] == here[b, s]

    return Mask(f"documents({_brief(ids)})", same, batch=ids.shape[0], extent=ids.shape[1])


def per_head(*rules: Mask) -> Mask:
    """A rule of its own for each head: ``per_head(causal, causal & window(64))``."""
    if not rules or not all(isinstance(rule, Mask) for rule in rules):
        got = repr(rules) if rules else "none"
        raise ConfigError("per_head rules", got=got, want="one rule a head", remedy="Pass the rules, not a list.")

    def chosen(b: Tensor, h: Tensor, t: Tensor, s: Tensor) -> Tensor:
        return reduce(operator.or_, ((h == i) & r.allows(b, h, t, s) for i, r in enumerate(rules)))

    mask = _composed("", f"per_head({', '.join(map(str, rules))})", chosen, *rules)
    mask.heads = len(rules)
    return mask


def _looked_up(table: Tensor, rows: Any, columns: Any) -> Any:
    """Entries of a table; the spans of ``block_plan`` look whole blocks up."""
    return table.to(rows.device)[rows, columns] if isinstance(columns, Tensor) else columns.lookup(table, rows)


def _composed(outermost: str, text: str, allows: MaskMod, *parts: Mask) -> Mask:
    """A rule made of rules: it knows what its parts know."""
    extents = [p.extent for p in parts if p.extent is not None]
    mask = Mask(
        text,
        allows,
        positional=any(p.positional for p in parts),
        batch=_shared(f"batch in {text}", [p.batch for p in parts]),
        heads=_shared(f"heads in {text}", [p.heads for p in parts]),
        extent=min(extents) if extents else None,
    )
    mask._outermost = outermost
    return mask


def _shared(what: str, sizes: list[int | None]) -> int | None:
    known = [n for n in sizes if n is not None]
    if any(n != known[0] for n in known):
        raise ShapeError(what, got=known, want="one size", remedy="Make the parts alike.")
    return known[0] if known else None


def _brief(value: int | Tensor) -> str:
    """A tensor by dtype and shape: its values may stand on a GPU, and reading them would wait for it."""
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')}{list(value.shape)}"
    return repr(value)


def _at_least(what: str, value: Any, low: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < low:
        raise ConfigError(what, got=repr(value), want=f"an integer of at least {low}", remedy="Count positions.")


def _check_sizes(t: Any, s: Any, offset: Any) -> None:
    """Lengths are integers, not negative, and so is an offset, which may be; under a compiler they may be symbols."""
    for what, n in (("queries", t), ("keys", s), ("offset", offset)):
        if isinstance(n, torch.SymInt) or (what == "offset" and (n is None or (type(n) is int and n < 0))):
            continue
        _at_least(what, n, 0)


def _one_a_sample(what: str, counts: Any) -> None:
    if not isinstance(counts, Tensor) or counts.ndim != 1 or counts.dtype not in (torch.int32, torch.int64):
        got = f"{tuple(counts.shape)} {counts.dtype}" if isinstance(counts, Tensor) else repr(counts)
        raise ShapeError(what, got=got, want="one integer a sample", remedy="Pass an int64 tensor of shape (b,).")


def _mix(x: Tensor) -> Tensor:
    """Hash 32 bits; both factors stay below 2**31, so that no int64 product overflows."""
    x = x & 0xFFFFFFFF
    x = ((x ^ (x >> 16)) * 0x21F0AAAD) & 0xFFFFFFFF
    x = ((x ^ (x >> 15)) * 0x735A2D97) & 0xFFFFFFFF
    return x ^ (x >> 15)
