"""Sliding-window attention as a layer."""

from __future__ import annotations

from typing import final

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor

from handbook_src.check import check_size
from handbook_src.functional.attention.attention import MaskLike
from handbook_src.functional.attention.block_sparse import block_sparse_attention
from handbook_src.functional.attention.mask import Mask
from handbook_src.functional.attention.sliding_window import sliding_window_attention, window_rule
from handbook_src.layers.attention.attention import (
    KeyValueCache,
    MultiHeadAttention,
    SelfAttention,
    forgets,
    with_broken,
)


@final
class SlidingWindowAttention(SelfAttention):
    r"""Self-attention in which a position sees only what is near it; linear in the length.

    .. math:: y_t = \operatorname{Attention}(q_t, K_{N(t)}, V_{N(t)}), \qquad N(t) = \{\, s : |t - s| < n \,\}

    The maths is :func:`handbook_src.functional.sliding_window_attention`.
    A stack of ``L`` such layers reaches ``L (n - 1)`` positions far.

    Args:
        dim: features of ``x`` and of the output.
        heads: number of heads.
        window: the distance ``n`` from which on a key is hidden; causal, a position sees ``n`` keys.
        causal: whether later keys are hidden as well.
        kv_heads: number of key and value heads; ``heads`` unless given.
        dropout: share of the weights dropped in training.
        bias: whether the projections have one.
        device: of the parameters.
        dtype: of the parameters.

    Shape:
        ``x`` and the output are ``b t d``.

    Typical values:
        ``window`` 4096, causal, 8 key heads for 32 in Mistral 7B; 257, both sides, in Longformer-base
        (its ``attention_window`` 512).

    Raises:
        ConfigError: ``window`` is not an integer of at least 1; sizes as for
            :class:`handbook_src.layers.MultiHeadAttention`.

    Source:
        Beltagy et al. 2020, section 3.1, arXiv:2004.05150; Jiang et al. 2023, section 2, arXiv:2310.06825
    """

    def __init__(
        self,
        dim: int,
        heads: int = 1,
        *,
        window: int,
        causal: bool = False,
        kv_heads: int | None = None,
        dropout: float = 0.0,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        check_size("SlidingWindowAttention", "window", window)
        MultiHeadAttention.__init__(
            self, dim, heads, kv_heads=kv_heads, dropout=dropout, bias=bias, device=device, dtype=dtype
        )
        self.window, self.causal = int(window), bool(causal)

    @property
    def rule(self) -> Mask:  # type: ignore[override]
        """The mask rule; made of two numbers, so that the layer pickles."""
        return window_rule(self.window, self.causal)

    def forward(  # type: ignore[override]
        self,
        x: Float[Tensor, "b t d"],
        mask: MaskLike | None = None,
        cache: KeyValueCache | None = None,
    ) -> Float[Tensor, "b t d"]:
        """Attend within the window, and under ``mask`` where given: a rule keeps the work linear, a tensor is dense."""
        if not isinstance(mask, Mask | None) or (cache is not None and forgets(cache, x.shape[1])):  # and leaves a gap
            return super().forward(x, mask, cache)
        rule = None if mask is None else self.rule & mask
        x, _, _, broken = self._shielded(x, None, mask, cache, by_key=True)
        q, k, v = self._project(x, None, cache, rule)
        dropout = self.dropout if self.training else 0.0
        if rule is None:
            out = sliding_window_attention(q, k, v, self.window, causal=self.causal, dropout=dropout)
        else:
            out = block_sparse_attention(q, k, v, rule, dropout=dropout)
        return with_broken(self.out_proj(rearrange(out, "b t h e -> b t (h e)")), broken)

    def extra_repr(self) -> str:
        return f"{MultiHeadAttention.extra_repr(self)}, window={self.window}, causal={self.causal}"
