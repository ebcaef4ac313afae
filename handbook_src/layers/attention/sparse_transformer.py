"""The Sparse Transformer's two attentions as layers."""

from __future__ import annotations

from typing import final

import torch
from jaxtyping import Float
from torch import Tensor

from handbook_src.functional.attention.mask import Mask
from handbook_src.functional.attention.sparse_transformer import (
    FixedPart,
    StridedPart,
    fixed_attention,
    fixed_rule,
    strided_attention,
    strided_rule,
)
from handbook_src.layers.attention.attention import KeyValueCache, MultiHeadAttention
from handbook_src.layers.attention.chunked_attention import PatternAttention


@final
class StridedAttention(PatternAttention):
    r"""Causal self-attention to the positions just before, and to every ``stride``-th one.

    .. math:: A_i = \{\max(0, i - l), \dots, i\} \cup \{\, j \le i : (i - j) \bmod l = 0 \,\}

    The maths is :func:`handbook_src.functional.strided_attention`.  The paper's first way of
    putting the halves together is one layer with ``part="local"``, the next with ``part="column"``.

    Args:
        dim: features of ``x`` and of the output.
        heads: number of heads.
        stride: near the root of the length; the width of a picture.
        part: ``both``, ``local`` or ``column``.
        dropout: share of the weights dropped in training.
        bias: whether the projections have one.
        device: of the parameters.
        dtype: of the parameters.

    Shape:
        ``x`` and the output are ``b t d``; padding belongs to the right, where no query looks.

    Typical values:
        ``stride`` 128 for the 3072 positions of CIFAR-10 and the 12288 of ImageNet 64 by 64.

    Raises:
        ConfigError: ``stride`` or ``part`` is none; sizes as for
            :class:`handbook_src.layers.MultiHeadAttention`.

    Source:
        Child et al. 2019, sections 4.2 and 4.3, arXiv:1904.10509
    """

    def __init__(
        self,
        dim: int,
        heads: int = 1,
        *,
        stride: int,
        part: StridedPart = "both",
        dropout: float = 0.0,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        strided_rule(stride, part)  # refuses what is none
        self._make(dim, heads, dropout, bias, device, dtype)
        self.stride, self.part = int(stride), part

    @property
    def rule(self) -> Mask:  # type: ignore[override]
        """The mask rule: strided, or a half of it."""
        return strided_rule(self.stride, self.part)

    def forward(  # type: ignore[override]
        self, x: Float[Tensor, "b t d"], cache: KeyValueCache | None = None
    ) -> Float[Tensor, "b t d"]:
        """Attend under the pattern."""
        return self._patterned(x, None, cache)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, lengths: Tensor | None, dropout: float) -> Tensor:
        return strided_attention(q, k, v, self.stride, part=self.part, dropout=dropout)

    def extra_repr(self) -> str:
        return f"{MultiHeadAttention.extra_repr(self)}, stride={self.stride}, part={self.part!r}"


@final
class FixedAttention(PatternAttention):
    r"""Causal self-attention within blocks, and to the last ``summary`` positions of every earlier block.

    .. math:: A_i = \{\, j \le i : \lfloor j / l \rfloor = \lfloor i / l \rfloor \,\}
        \cup \{\, j \le i : j \bmod l \ge l - c \,\}

    The maths is :func:`handbook_src.functional.fixed_attention`.

    Args:
        dim: features of ``x`` and of the output.
        heads: number of heads.
        stride: length of a block.
        summary: positions of a block that all later ones see.
        part: ``both``, ``local`` or ``summary``.
        dropout: share of the weights dropped in training.
        bias: whether the projections have one.
        device: of the parameters.
        dtype: of the parameters.

    Shape:
        ``x`` and the output are ``b t d``; padding belongs to the right, where no query looks.

    Typical values:
        ``stride`` 128 or 256 with ``summary`` 8, 16 or 32; 128 and 32 for text (enwik8).

    Raises:
        ConfigError: ``stride``, ``summary`` or ``part`` is none; sizes as for
            :class:`handbook_src.layers.MultiHeadAttention`.

    Source:
        Child et al. 2019, sections 4.2 and 4.3, arXiv:1904.10509
    """

    def __init__(
        self,
        dim: int,
        heads: int = 1,
        *,
        stride: int,
        summary: int = 1,
        part: FixedPart = "both",
        dropout: float = 0.0,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        fixed_rule(stride, summary, part)  # refuses what is none
        self._make(dim, heads, dropout, bias, device, dtype)
        self.stride, self.summary, self.part = int(stride), int(summary), part

    @property
    def rule(self) -> Mask:  # type: ignore[override]
        """The mask rule: fixed, or a half of it."""
        return fixed_rule(self.stride, self.summary, self.part)

    def forward(  # type: ignore[override]
        self, x: Float[Tensor, "b t d"], cache: KeyValueCache | None = None
    ) -> Float[Tensor, "b t d"]:
        """Attend under the pattern."""
        return self._patterned(x, None, cache)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, lengths: Tensor | None, dropout: float) -> Tensor:
        return fixed_attention(q, k, v, self.stride, self.summary, part=self.part, dropout=dropout)

    def extra_repr(self) -> str:
        facts = f"stride={self.stride}, summary={self.summary}, part={self.part!r}"
        return f"{MultiHeadAttention.extra_repr(self)}, {facts}"
