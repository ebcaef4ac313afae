"""Attention as layers: multi-head, self, cross, bidirectional, causal."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable
from numbers import Integral
from typing import Protocol, final, runtime_checkable

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from handbook_src.check import (
    check_floating,
    check_one_dtype,
    check_parameter_dtype,
    check_probability,
    check_size,
    check_tensors,
    known_finite,
)
from handbook_src.errors import ConfigError, ShapeError
from handbook_src.functional.attention.attention import (
    MaskLike,
    attention_weights,
    autocasting,
    check_mask,
    scaled_dot_product_attention,
    seen_by_any,
)
from handbook_src.functional.attention.mask import Mask, full
from handbook_src.functional.attention.mask import causal as causal_rule
from handbook_src.layers.attention.kv_cache import KVCache


@runtime_checkable
class KeyValueCache(Protocol):
    """What a cache must do: append the new keys and values, return all of them (``b s h e``).

    One that drops keys is a :class:`handbook_src.layers.KVCache`, which says which it kept.
    """

    def update(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]: ...


class MultiHeadAttention(nn.Module):
    r"""Several attentions side by side, each in a subspace of its own.

    .. math::
        \operatorname{head}_i = \operatorname{Attention}(X W_i^Q, Y W_i^K, Y W_i^V), \qquad
        \operatorname{MultiHead}(X, Y) = [\operatorname{head}_1; \dots; \operatorname{head}_h]\, W^O

    Self-attention has :math:`Y = X`; cross-attention reads a ``memory`` :math:`Y`.
    Each head is :func:`handbook_src.functional.scaled_dot_product_attention`.

    A position that a padding rule or a mask tensor hides from every query may hold NaN or infinity: they reach no
    other position and no gradient of a weight, where torch's layer gives NaN times zero.  Its own output is NaN.

    Args:
        dim: features of ``x`` and of the output.
        heads: number of heads.
        kv_heads: number of key and value heads, each shared by ``heads // kv_heads`` consecutive query heads;
            ``heads`` unless given.  :mod:`handbook_src.layers.attention.grouped_query` has the layers of that name.
        kv_dim: features of ``memory``; ``dim`` unless given.
        head_dim: features of a head; ``dim // heads`` unless given.
        dropout: share of the weights dropped in training.
        bias: whether the four projections have one.
        device: of the parameters.
        dtype: of the parameters.

    Shape:
        ``x`` is ``b t d``, ``memory`` is ``b s kv_dim``, the output is ``b t d``.

    Typical values:
        head_dim 64 (GPT-2, BERT) or 128 (Llama); dropout 0.1 in small models, 0 in
        large ones; bias in GPT-2 and BERT, none in Llama and PaLM.

    Raises:
        ConfigError: sizes that are not positive integers, heads that don't divide ``dim``,
            ``kv_heads`` that don't divide ``heads``, dropout outside [0, 1), a dtype that is not
            floating point.

    Source:
        Vaswani et al. 2017, section 3.2.2, arXiv:1706.03762
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        *,
        kv_heads: int | None = None,
        kv_dim: int | None = None,
        head_dim: int | None = None,
        dropout: float = 0.0,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        kv_dim = dim if kv_dim is None else kv_dim
        kv_heads = heads if kv_heads is None else kv_heads
        name = type(self).__name__
        for size, value in (("dim", dim), ("heads", heads), ("kv_heads", kv_heads), ("kv_dim", kv_dim)):
            check_size(name, size, value)
        if head_dim is None and dim % heads:
            raise ConfigError(
                "heads", got=f"{heads} for dim {dim}", want="a divisor of dim", remedy="Or give head_dim itself."
            )
        head_dim = dim // heads if head_dim is None else head_dim
        check_size(name, "head_dim", head_dim)
        check_parameter_dtype(name, dtype)
        if heads % kv_heads:
            raise ConfigError(
                "kv_heads", got=f"{kv_heads} for {heads} heads", want="a divisor of heads", remedy="1 shares one head."
            )
        check_probability("attention", "dropout", dropout)
        self.dim, self.heads, self.kv_dim, self.head_dim, self.dropout = dim, heads, kv_dim, head_dim, dropout
        self.kv_heads, out, shared = kv_heads, heads * head_dim, kv_heads * head_dim
        self.q_proj = nn.Linear(dim, out, bias=bias, device=device, dtype=dtype)
        self.k_proj = nn.Linear(kv_dim, shared, bias=bias, device=device, dtype=dtype)
        self.v_proj = nn.Linear(kv_dim, shared, bias=bias, device=device, dtype=dtype)
        self.out_proj = nn.Linear(out, dim, bias=bias, device=device, dtype=dtype)
        self.kept_heads = list(range(heads))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the weights (Glorot, uniform) and zero the biases."""
        for proj in (self.q_proj, self.k_proj, self.v_proj, self.out_proj):
            nn.init.xavier_uniform_(proj.weight)
            if proj.bias is not None:
                nn.init.zeros_(proj.bias)

    def forward(
        self,
        x: Float[Tensor, "b t d"],
        memory: Float[Tensor, "b s kv_dim"] | None = None,
        mask: MaskLike | None = None,
        causal: bool = False,
        cache: KeyValueCache | None = None,
    ) -> Float[Tensor, "b t d"]:
        """Attend from ``x`` to ``memory`` (or to ``x`` itself, and to what the cache holds)."""
        x, memory, mask, broken = self._shielded(x, memory, mask, cache)
        q, k, v = self._project(x, memory, cache, mask, causal)
        dropout = self.dropout if self.training else 0.0
        out = scaled_dot_product_attention(q, k, v, mask, causal=causal, dropout=dropout)
        return with_broken(self.out_proj(rearrange(out, "b t h e -> b t (h e)")), broken)

    def weights(
        self,
        x: Float[Tensor, "b t d"],
        memory: Float[Tensor, "b s kv_dim"] | None = None,
        mask: MaskLike | None = None,
        causal: bool = False,
    ) -> Float[Tensor, "b h t s"]:
        """Return each head's attention weights, without dropout."""
        q, k, _ = self._project(x, memory, None)
        return attention_weights(q, k, mask, causal=causal)

    def _project(
        self,
        x: Tensor,
        memory: Tensor | None,
        cache: KeyValueCache | None,
        mask: MaskLike | None = None,
        causal: bool = False,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values by head, those of the cache with them; a mask that won't fit is refused first."""
        source = self._checked(x, memory, cache)
        q, k, v = (
            rearrange(proj(y), "b t (h e) -> b t h e", e=self.head_dim)
            for proj, y in ((self.q_proj, x), (self.k_proj, source), (self.v_proj, source))
        )
        q, k = self._turned(q, k, memory, cache)
        if cache is not None:
            check_ahead(cache, q, mask, causal)
            k, v = cache.update(k, v)
        return q, k, v

    def _checked(self, x: Tensor, memory: Tensor | None, cache: KeyValueCache | None) -> Tensor:
        """Refuse what the projections would stumble over; return what keys and values are made of."""
        if cache is not None and memory is not None:
            raise ConfigError(
                "cache with memory",
                got="both",
                want="one of them",
                remedy="A memory does not grow: its keys and values are the same at each step.",
            )
        source = x if memory is None else memory
        check_input(type(self).__name__, x, self.q_proj)
        if memory is not None:
            check_input(type(self).__name__, memory, self.k_proj)
        if cache is not None and not hasattr(cache, "update"):
            raise ConfigError("cache", got=repr(cache), want="something with update(k, v)", remedy="Try AppendCache().")
        if not x.ndim == source.ndim == 3 or x.shape[-1] != self.dim or source.shape[-1] != self.kv_dim:
            raise ShapeError(
                "features",
                got=f"x {tuple(x.shape)}, memory {tuple(source.shape)}",
                want=f"x (b, t, {self.dim}), memory (b, s, {self.kv_dim})",
                remedy="Give kv_dim= where the memory is of another width.",
            )
        return source

    def _shielded(
        self,
        x: Tensor,
        memory: Tensor | None,
        mask: MaskLike | None,
        cache: KeyValueCache | None,
        by_key: bool = False,
    ) -> tuple[Tensor, Tensor | None, MaskLike | None, Tensor | None]:
        """Shield what keys and values are made of; say where the output is NaN for it, ``b t 1``."""
        source, written, hidden = self._checked(x, memory, cache), mask, None
        if len(source) == len(x):
            source, written, hidden = shield_padding(source, mask, x.shape[1], self.heads, cache, by_key)
        return (source, None, written, hidden) if memory is None else (x, source, written, None)

    def _turned(
        self, q: Tensor, k: Tensor, memory: Tensor | None, cache: KeyValueCache | None
    ) -> tuple[Tensor, Tensor]:
        """Give queries and keys their positions, where a layer has them; before a cache sees the keys."""
        return q, k

    @torch.no_grad()
    def prune_heads(self, heads: Iterable[int]) -> None:
        """Remove heads for good, by their original numbers: the layer becomes smaller and faster.

        The output equals that of a layer in which these heads' columns of
        ``out_proj`` are zero.  Parameters are new objects: build the optimizer after.
        A shared key and value head goes with the last query head that reads it.

        Args:
            heads: original numbers of the heads to remove; ``kept_heads`` lists what is left.

        Raises:
            ConfigError: a head that is not there (any more), no head would be left, or the key heads that
                stay would be shared by unequal numbers of query heads.

        Source:
            Michel et al. 2019, arXiv:1905.10650
        """
        gone = _head_numbers(heads)
        if not gone <= set(self.kept_heads) or len(gone) == len(self.kept_heads):
            raise ConfigError(
                "heads to prune",
                got=sorted(gone),
                want=f"some of {self.kept_heads}, not all",
                remedy="Heads keep their original numbers when others are pruned.",
            )
        keep = [i for i, head in enumerate(self.kept_heads) if head not in gone]
        readers = Counter(i // (self.heads // self.kv_heads) for i in keep)  # of each key head that stays
        if len(set(readers.values())) > 1:
            raise ConfigError(
                "heads to prune",
                got=f"{sorted(gone)}, which leaves groups of {list(readers.values())}",
                want="groups of one size",
                remedy="Prune as many heads of each group, or a whole group.",
            )
        rows, shared = (
            (torch.tensor(kept)[:, None] * self.head_dim + torch.arange(self.head_dim)).flatten()
            for kept in (keep, list(readers))
        )
        for proj, left in ((self.q_proj, rows), (self.k_proj, shared), (self.v_proj, shared)):
            proj.weight = select(proj.weight, left, 0)
            if proj.bias is not None:
                proj.bias = select(proj.bias, left, 0)
            proj.out_features = len(left)
        self.out_proj.weight = select(self.out_proj.weight, rows, 1)
        self.out_proj.in_features = len(rows)
        self.kept_heads = [head for head in self.kept_heads if head not in gone]
        self.heads, self.kv_heads = len(self.kept_heads), len(readers)

    def extra_repr(self) -> str:
        pruned = "" if self.kept_heads == list(range(self.heads)) else f", kept_heads={self.kept_heads}"
        shared = "" if self.kv_heads == self.heads else f", kv_heads={self.kv_heads}"
        return f"{self.dim}, heads={self.heads}{shared}, head_dim={self.head_dim}, dropout={self.dropout}{pruned}"


def _head_numbers(heads: object) -> set[int]:
    """Numbers of heads as a set; one number alone, or what is no number, is refused."""
    numbers = list(heads) if isinstance(heads, Iterable) and not isinstance(heads, Tensor | str) else [None]
    if not all(isinstance(n, Integral) and not isinstance(n, bool) for n in numbers):
        raise ConfigError("heads to prune", got=repr(heads), want="a list of integers", remedy="Pass [0, 3].")
    return {int(n) for n in numbers}  # type: ignore[arg-type]


def check_input(op: str, x: Tensor, projection: nn.Module) -> None:
    """Refuse what a projection would stumble over: no tensor, integers, another dtype (unless autocast joins them).

    Args:
        op: the layer's name, for messages.
        x: what comes in.
        projection: what reads it first.

    Raises:
        ConfigError: ``x`` is no tensor.
        ShapeError: ``x`` has another dtype.
    """
    check_tensors(op, x)
    check_floating(op, x)
    weight = getattr(projection, "weight", x)  # none where an adapter stands in its place
    if weight.dtype != x.dtype and weight.is_floating_point() and not autocasting(x):
        check_one_dtype(op, weight, x)


def shield_padding(
    source: Tensor, mask: MaskLike | None, t: int, heads: int, cache: object = None, by_key: bool = False
) -> tuple[Tensor, MaskLike | None, Tensor | None]:
    """Zero what is not finite where a mask hides it from all: zero times NaN is NaN in a projection's gradient.

    Args:
        source: what keys and values are made of, ``b s d``.
        mask: the rule or tensor of the attention.
        t: queries.
        heads: of the queries.
        cache: what it holds comes before ``source``; of what it dropped the mask loses the columns.
        by_key: ask only rules about keys alone, about one query: the work stays linear.

    Returns:
        The source; the mask, or what was written of it (unless ``by_key``); which positions were zeroed, ``b s 1``.

    Raises:
        ShapeError: the mask is of the wrong shape or dtype.
        ConfigError: it is neither rule nor tensor.
    """
    mask = of_kept_keys(mask, source, heads, t, cache)
    if mask is None or (isinstance(mask, Mask) and mask.batch is None) or known_finite(source):
        return source, mask, None  # rules that know no samples hold no padding
    if (cache is not None and not hasattr(cache, "after")) or (by_key and isinstance(mask, Mask) and mask.positional):
        return source, mask, None  # nobody knows which keys the mask means
    b, keys = source.shape[:2]
    s = keys if cache is None else cache.after(keys)
    check_mask(mask, b, heads, t, s)
    written: MaskLike | None = mask
    if isinstance(mask, Mask):
        written = mask.sdpa(1, s, offset=0, device=source.device) if by_key else mask.sdpa(t, s, device=source.device)
    assert isinstance(written, Tensor)  # ``full`` knows no samples
    hidden = (~seen_by_any(written)[..., s - keys :] & ~source.isfinite().all(-1))[..., None]
    return source.masked_fill(hidden, 0.0), mask if by_key else written, hidden


def forgets(cache: object, t: int) -> bool:
    """Whether a cache gives back fewer keys than it has seen, those of ``t`` new tokens included."""
    return isinstance(cache, KVCache) and cache.after(t) < cache.seen + t


def of_kept_keys(mask: MaskLike | None, x: Tensor, heads: int, t: int, cache: object) -> MaskLike | None:
    """Leave a mask only the columns of the keys that a cache kept: rules and columns count from the first key."""
    if mask is None or mask is full or mask is causal_rule or not forgets(cache, t):
        return mask  # which key came first can still be told
    assert isinstance(cache, KVCache)
    s = cache.seen + t
    check_mask(mask, len(x), heads, t, s)
    every = mask.dense(t, s, device=x.device) if isinstance(mask, Mask) else mask
    return every[..., cache.kept(t).to(x.device)]


def check_ahead(cache: object, q: Tensor, mask: MaskLike | None, causal: bool) -> None:
    """Refuse a mask that won't fit while the cache is still as it was: a refused call must not store its tokens.

    Args:
        cache: asked for ``after(t)``, how many keys it will give back; one of one's own may lack it.
        q: the new queries, heads third.
        mask: as for :func:`handbook_src.functional.scaled_dot_product_attention`.
        causal: as there.

    Raises:
        ShapeError: the mask is of the wrong shape or dtype.
        ConfigError: it is neither rule nor tensor.
    """
    after = getattr(cache, "after", None)
    if after is None:
        return
    b, t, h, _ = q.shape
    for rule in (mask, causal_rule if causal else None):
        check_mask(rule, b, h, t, after(t))


def with_broken(out: Tensor, broken: Tensor | None) -> Tensor:
    """Write NaN where a position came in broken, which no gradient passes."""
    return out if broken is None else out.masked_fill(broken, math.nan)


def select(old: Tensor, index: Tensor, dim: int) -> nn.Parameter:
    """Some rows or columns of a parameter; a frozen one stays frozen."""
    return nn.Parameter(old.index_select(dim, index.to(old.device)), requires_grad=old.requires_grad)


class SelfAttention(MultiHeadAttention):
    r"""Attention of a sequence to itself: queries, keys and values are made of the same vectors.

    .. math:: Y = \operatorname{softmax}\!\Big(\frac{(X W^Q)(X W^K)^\top}{\sqrt e}\Big) X W^V

    The layer carries its mask rule, so that a stack of layers reads as a list of rules.
    Without a rule and without positions it is permutation equivariant.

    Args:
        dim: features of ``x`` and of the output.
        heads: number of heads; 1 is the plain form.
        rule: the mask of this layer, for instance ``causal``; all see all unless given.
        dropout: share of the weights dropped in training.
        bias: whether the projections have one.

    Shape:
        ``x`` and the output are ``b t d``.

    Typical values:
        as for :class:`MultiHeadAttention`.

    Source:
        Vaswani et al. 2017, section 3.2.3, arXiv:1706.03762
    """

    def __init__(
        self, dim: int, heads: int = 1, *, rule: Mask | None = None, dropout: float = 0.0, bias: bool = True
    ) -> None:
        super().__init__(dim, heads, dropout=dropout, bias=bias)
        self.rule = full if rule is None else rule

    def forward(  # type: ignore[override]
        self,
        x: Float[Tensor, "b t d"],
        mask: MaskLike | None = None,
        cache: KeyValueCache | None = None,
    ) -> Float[Tensor, "b t d"]:
        """Attend from ``x`` to ``x`` under the layer's rule, and ``mask`` (padding) where given."""
        return super().forward(x, mask=self._under_rule(x, mask), cache=cache)

    def weights(  # type: ignore[override]
        self, x: Float[Tensor, "b t d"], mask: MaskLike | None = None
    ) -> Float[Tensor, "b h t s"]:
        """Return each head's attention weights under the layer's rule, without dropout."""
        return super().weights(x, mask=self._under_rule(x, mask))

    def _under_rule(self, x: Tensor, mask: MaskLike | None) -> MaskLike:
        """Join a mask with the rule; a tensor's last axis says how many keys there are."""
        if mask is None or isinstance(mask, Mask):
            return self.rule if mask is None else self.rule & mask
        (b, t), s = x.shape[:2], mask.shape[-1] if isinstance(mask, Tensor) and mask.ndim else 0
        for part in (mask, self.rule):
            check_mask(part, b, self.heads, t, s)
        seen = self.rule.dense(t, s, device=mask.device)
        return mask & seen if mask.dtype == torch.bool else mask.masked_fill(~seen, -math.inf)

    def prune_heads(self, heads: Iterable[int]) -> None:
        """Remove heads as :meth:`MultiHeadAttention.prune_heads` does; a rule that knows heads is refused."""
        if self.rule.heads is not None:
            raise ConfigError(
                "rule of a layer to prune",
                got=self.rule,
                want="a rule without heads",
                remedy="per_head numbers the heads, which pruning moves: give the layer another rule first.",
            )
        super().prune_heads(heads)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, rule={self.rule}"


@final
class BidirectionalAttention(SelfAttention):
    r"""Self-attention in which every position sees every position: an encoder's.

    .. math:: M(t, s) = 1

    Args:
        dim: features of ``x`` and of the output.
        heads: number of heads; 1 is the plain form.
        dropout: share of the weights dropped in training.
        bias: whether the projections have one.

    Shape:
        ``x`` and the output are ``b t d``.

    Typical values:
        12 heads of 64 in BERT-base and ViT-B.

    Source:
        Vaswani et al. 2017, section 3.2.3, arXiv:1706.03762; Devlin et al. 2018, arXiv:1810.04805
    """

    def __init__(self, dim: int, heads: int = 1, *, dropout: float = 0.0, bias: bool = True) -> None:
        super().__init__(dim, heads, rule=full, dropout=dropout, bias=bias)


@final
class CausalAttention(SelfAttention):
    r"""Self-attention in which a position sees itself and what came before: a decoder's.

    .. math:: M(t, s) = [s \le t]

    With a cache the ``t`` new positions are the last ones, and see all of it.

    Args:
        dim: features of ``x`` and of the output.
        heads: number of heads; 1 is the plain form.
        dropout: share of the weights dropped in training.
        bias: whether the projections have one.

    Shape:
        ``x`` and the output are ``b t d``.

    Typical values:
        12 heads of 64 in GPT-2 small, 32 of 128 in Llama 7B.

    Source:
        Vaswani et al. 2017, section 3.2.3, arXiv:1706.03762
    """

    def __init__(self, dim: int, heads: int = 1, *, dropout: float = 0.0, bias: bool = True) -> None:
        super().__init__(dim, heads, rule=causal_rule, dropout=dropout, bias=bias)


@final
class CrossAttention(MultiHeadAttention):
    r"""Attention of one sequence to another: queries from ``x``, keys and values from ``memory``.

    .. math:: Z = \operatorname{softmax}\!\Big(\frac{(X W^Q)(Y W^K)^\top}{\sqrt e}\Big) Y W^V

    Args:
        dim: features of ``x`` and of the output.
        kv_dim: features of ``memory``.
        heads: number of heads; 1 is the plain form.
        dropout: share of the weights dropped in training.
        bias: whether the projections have one.

    Shape:
        ``x`` and the output are ``b t d``, ``memory`` is ``b s kv_dim``.

    Typical values:
        ``kv_dim == dim`` in translation; 768 (CLIP's text) in Stable Diffusion 1.

    Source:
        Vaswani et al. 2017, section 3.2.3, arXiv:1706.03762
    """

    def __init__(self, dim: int, kv_dim: int, heads: int = 1, *, dropout: float = 0.0, bias: bool = True) -> None:
        super().__init__(dim, heads, kv_dim=kv_dim, dropout=dropout, bias=bias)

    def forward(  # type: ignore[override]
        self,
        x: Float[Tensor, "b t d"],
        memory: Float[Tensor, "b s kv_dim"],
        mask: MaskLike | None = None,
    ) -> Float[Tensor, "b t d"]:
        """Attend from ``x`` to ``memory``; ``mask`` is most often ``padding(lengths)`` of the memory."""
        return super().forward(x, memory, mask)
