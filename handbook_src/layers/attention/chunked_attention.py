"""Chunked attention as a layer, and what layers under a fixed pattern share."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import final

import torch
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor

from handbook_src.check import check_size
from handbook_src.errors import ConfigError
from handbook_src.functional.attention.chunked_attention import check_lengths, chunk_rule, chunked_attention
from handbook_src.functional.attention.mask import Mask, padding
from handbook_src.layers.attention.attention import (
    KeyValueCache,
    MultiHeadAttention,
    SelfAttention,
    check_input,
    forgets,
    with_broken,
)
from handbook_src.layers.attention.kv_cache import KVCache


class PatternAttention(SelfAttention, ABC):
    """Self-attention under a pattern that is computed without the hidden pairs; ``rule`` says which they are."""

    def _make(
        self,
        dim: int,
        heads: int,
        dropout: float,
        bias: bool,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
    ) -> None:
        """Make the projections; the rule is a property, so that the layer pickles."""
        MultiHeadAttention.__init__(self, dim, heads, dropout=dropout, bias=bias, device=device, dtype=dtype)

    @property
    @abstractmethod
    def rule(self) -> Mask:  # type: ignore[override]
        """The mask rule that the layer obeys."""

    @abstractmethod
    def _attend(self, q: Tensor, k: Tensor, v: Tensor, lengths: Tensor | None, dropout: float) -> Tensor:
        """One call of the function."""

    def _patterned(self, x: Tensor, lengths: Tensor | None, cache: KeyValueCache | None) -> Tensor:
        if lengths is not None:
            check_input(type(self).__name__, x, self.q_proj)
            check_lengths(type(self).__name__, lengths, x)
        check_keeps_all(type(self).__name__, cache, x.shape[1])
        padded = None if lengths is None else padding(lengths)
        x, _, _, broken = self._shielded(x, None, padded, cache, by_key=True)
        q, k, v = self._project(x, None, cache)
        out = self._attend(q, k, v, lengths, self.dropout if self.training else 0.0)
        return with_broken(self.out_proj(rearrange(out, "b t h e -> b t (h e)")), broken)


def check_keeps_all(name: str, cache: KeyValueCache | None, t: int) -> None:
    """Refuse a cache that forgets: a pattern counts places from the first token."""
    if forgets(cache, t):
        assert isinstance(cache, KVCache)
        raise ConfigError(
            f"{name} with a cache", got=f"one that keeps {cache.after(t)} of {cache.seen + t} tokens",
            want="one that keeps all",
            remedy="Use AppendCache, StaticCache or PagedCache, or SlidingWindowAttention, which may forget.",
        )  # fmt: skip


@final
class ChunkedAttention(PatternAttention):
    r"""Self-attention within blocks of ``chunk`` positions, which never see each other.

    .. math:: A_i = \{\, j : \lfloor j / l \rfloor = \lfloor i / l \rfloor \,\}

    The maths is :func:`handbook_src.functional.chunked_attention`.  However many such layers are
    stacked, nothing crosses the border of a chunk: something else must, as a shifted or coarser layer in between.

    Args:
        dim: features of ``x`` and of the output.
        heads: number of heads.
        chunk: positions of a block.
        causal: whether later keys are hidden as well.
        dropout: share of the weights dropped in training.
        bias: whether the projections have one.
        device: of the parameters.
        dtype: of the parameters.

    Shape:
        ``x`` and the output are ``b t d``.

    Typical values:
        ``chunk`` 128 to 512; 8192, causal, in three of four layers of Llama 4; 49 (7 by 7) in Swin's windows.

    Raises:
        ConfigError: ``chunk`` is not an integer of at least 1; sizes as for
            :class:`handbook_src.layers.MultiHeadAttention`.

    Source:
        Child et al. 2019, section 4.3, arXiv:1904.10509
    """

    def __init__(
        self,
        dim: int,
        heads: int = 1,
        *,
        chunk: int,
        causal: bool = False,
        dropout: float = 0.0,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        check_size("ChunkedAttention", "chunk", chunk)
        self._make(dim, heads, dropout, bias, device, dtype)
        self.chunk, self.causal = int(chunk), bool(causal)

    @property
    def rule(self) -> Mask:  # type: ignore[override]
        """The mask rule: block-diagonal."""
        return chunk_rule(self.chunk, self.causal)

    def forward(  # type: ignore[override]
        self,
        x: Float[Tensor, "b t d"],
        lengths: Int[Tensor, " b"] | None = None,
        cache: KeyValueCache | None = None,
    ) -> Float[Tensor, "b t d"]:
        """Attend within the chunks; ``lengths`` where the batch is padded on the right."""
        return self._patterned(x, lengths, cache)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, lengths: Tensor | None, dropout: float) -> Tensor:
        return chunked_attention(q, k, v, self.chunk, causal=self.causal, lengths=lengths, dropout=dropout)

    def extra_repr(self) -> str:
        return f"{MultiHeadAttention.extra_repr(self)}, chunk={self.chunk}, causal={self.causal}"
