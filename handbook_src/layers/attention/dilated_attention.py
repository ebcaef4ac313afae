"""Dilated attention as a layer: a window with gaps."""

from __future__ import annotations

from typing import final

import torch
from jaxtyping import Float, Int
from torch import Tensor

from handbook_src.check import check_size
from handbook_src.functional.attention.dilated_attention import dilated_attention, dilated_rule
from handbook_src.functional.attention.mask import Mask
from handbook_src.layers.attention.attention import KeyValueCache, MultiHeadAttention
from handbook_src.layers.attention.chunked_attention import PatternAttention


@final
class DilatedAttention(PatternAttention):
    r"""Self-attention to every ``dilation``-th position within reach.

    .. math:: A_i = \{\, j : (i - j) \bmod r = 0,\; |i - j| < w r \,\}

    The maths is :func:`handbook_src.functional.dilated_attention`.  A stack with one dilation
    never leaves its stream of positions: give layers (or heads) different ones, 1 among them.

    Args:
        dim: features of ``x`` and of the output.
        heads: number of heads.
        reach: keys to one side with the query's own.
        dilation: the gap; 1 is the plain sliding window.
        causal: whether later keys are hidden as well.
        dropout: share of the weights dropped in training.
        bias: whether the projections have one.
        device: of the parameters.
        dtype: of the parameters.

    Shape:
        ``x`` and the output are ``b t d``.

    Typical values:
        dilations growing from layer to layer, 1 in the lowest (Longformer's character model: 0 to 3 gaps on two
        heads of the upper layers).

    Raises:
        ConfigError: ``reach`` or ``dilation`` is not an integer of at least 1; sizes as for
            :class:`handbook_src.layers.MultiHeadAttention`.

    Source:
        Beltagy et al. 2020, sections 3.1 and 4, arXiv:2004.05150
    """

    def __init__(
        self,
        dim: int,
        heads: int = 1,
        *,
        reach: int,
        dilation: int,
        causal: bool = False,
        dropout: float = 0.0,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        check_size("DilatedAttention", "reach", reach)
        check_size("DilatedAttention", "dilation", dilation)
        self._make(dim, heads, dropout, bias, device, dtype)
        self.reach, self.dilation, self.causal = int(reach), int(dilation), bool(causal)

    @property
    def rule(self) -> Mask:  # type: ignore[override]
        """The mask rule: a window with gaps."""
        return dilated_rule(self.reach, self.dilation, self.causal)

    def forward(  # type: ignore[override]
        self,
        x: Float[Tensor, "b t d"],
        lengths: Int[Tensor, " b"] | None = None,
        cache: KeyValueCache | None = None,
    ) -> Float[Tensor, "b t d"]:
        """Attend within the streams; ``lengths`` where the batch is padded on the right."""
        return self._patterned(x, lengths, cache)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, lengths: Tensor | None, dropout: float) -> Tensor:
        return dilated_attention(
            q, k, v, self.reach, self.dilation, causal=self.causal, lengths=lengths, dropout=dropout
        )

    def extra_repr(self) -> str:
        facts = f"reach={self.reach}, dilation={self.dilation}, causal={self.causal}"
        return f"{MultiHeadAttention.extra_repr(self)}, {facts}"
