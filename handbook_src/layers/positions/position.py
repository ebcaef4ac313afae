"""Position codes as layers: sinusoidal, learned, ALiBi and T5's relative bias."""

from __future__ import annotations

from collections.abc import Callable
from typing import final

import torch
from jaxtyping import Float
from torch import Tensor, nn

from handbook_src.check import check_features, check_floating, check_positive, check_rank, check_size
from handbook_src.functional.positions.position import (
    _check_buckets,
    alibi_bias,
    alibi_slopes,
    learned_positions,
    sinusoidal_positions,
    t5_relative_bias,
)


class FixedTable(nn.Module):
    """A layer whose buffers are computed, not trained: made anew when it moves or is cast.

    Casting a float32 table to bfloat16 and back would leave bfloat16's rounding in it,
    and ``to_empty`` would leave garbage.  The buffers are not in the state dict.
    """

    def reset_buffers(self, device: torch.device, dtype: torch.dtype) -> None:
        """Compute the buffers for a device and dtype."""
        raise NotImplementedError

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> FixedTable:
        super()._apply(fn, recurse)
        here = next(self.buffers(recurse=False))
        self.reset_buffers(here.device, here.dtype)
        return self


@final
class SinusoidalPositionalEncoding(FixedTable):
    r"""Adds sines and cosines of the position to the embeddings.

    .. math:: y_t = x_t + \mathrm{PE}_{t + \text{offset}}

    The code is :func:`handbook_src.functional.sinusoidal_positions`; nothing is trained
    and the state dict is empty.

    Args:
        dim: features.
        base: the slowest wave is almost :math:`2\pi\,\text{base}` positions long.
        max_positions: how many rows are kept; later positions are computed when they come.
        device: where the kept rows are.
        dtype: of the kept rows.

    Shape:
        ``x`` and the output are ``b t d``.

    Typical values:
        base 10000; embeddings scaled by :math:`\sqrt d` before, as in the paper.

    Raises:
        ConfigError: a size that is not positive, a negative ``offset``.
        ShapeError: an input of another rank, width or dtype.

    Source:
        Vaswani et al. 2017, section 3.5, arXiv:1706.03762
    """

    codes: Tensor

    def __init__(
        self,
        dim: int,
        *,
        base: float = 10000.0,
        max_positions: int = 1024,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_size("SinusoidalPositionalEncoding", "dim", dim)
        check_positive("SinusoidalPositionalEncoding", "base", base)
        check_size("SinusoidalPositionalEncoding", "max_positions", max_positions, least=0)
        self.dim, self.base, self.max_positions = dim, base, max_positions
        like = torch.empty(0, device=device, dtype=dtype)
        self.register_buffer("codes", like, persistent=False)
        self.reset_buffers(like.device, like.dtype)

    def reset_buffers(self, device: torch.device, dtype: torch.dtype) -> None:
        """Compute the kept rows."""
        self.codes = sinusoidal_positions(self.max_positions, self.dim, base=self.base, device=device, dtype=dtype)

    def forward(self, x: Float[Tensor, "b t d"], offset: int = 0) -> Float[Tensor, "b t d"]:
        """Add the codes of positions ``offset`` to ``offset + t - 1``."""
        _check_sequence("SinusoidalPositionalEncoding", x, self.dim)
        check_size("SinusoidalPositionalEncoding", "offset", offset, least=0)
        end = offset + x.shape[1]
        if end <= self.max_positions:
            codes = self.codes[offset:end]
        else:
            codes = sinusoidal_positions(
                x.shape[1], self.dim, offset=offset, base=self.base, device=x.device, dtype=self.codes.dtype
            )
        return x + codes.to(x.dtype)

    def extra_repr(self) -> str:
        return f"{self.dim}, base={self.base}"


@final
class LearnedPositionalEmbedding(nn.Module):
    r"""Adds a trained vector for each position to the embeddings.

    .. math:: y_t = x_t + W_{t + \text{offset}}

    The rows are picked by :func:`handbook_src.functional.learned_positions`.  A position
    that has no row is refused; a row that training never reached is noise, and nothing can tell.

    Args:
        max_positions: rows of the table: the longest sequence there can be.
        dim: features.
        device: where the weight is made.
        dtype: of the weight.

    Shape:
        ``x`` and the output are ``b t d``.

    Typical values:
        512 positions (BERT), 1024 (GPT-2), 197 patches (ViT-B/16); initialised with deviation 0.02.

    Raises:
        ConfigError: a size that is not positive, a negative ``offset``.
        ShapeError: positions beyond the table, an input of another rank, width or dtype.

    Source:
        Gehring et al. 2017, section 3.1, arXiv:1705.03122; initialised as Radford et al. 2019's GPT-2
    """

    def __init__(
        self,
        max_positions: int,
        dim: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_size("LearnedPositionalEmbedding", "max_positions", max_positions)
        check_size("LearnedPositionalEmbedding", "dim", dim)
        self.max_positions, self.dim = max_positions, dim
        self.weight = nn.Parameter(torch.empty(max_positions, dim, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the rows with deviation 0.02: torch's embedding has 1, which would drown the tokens."""
        nn.init.normal_(self.weight, std=0.02)

    def forward(self, x: Float[Tensor, "b t d"], offset: int = 0) -> Float[Tensor, "b t d"]:
        """Add the rows of positions ``offset`` to ``offset + t - 1``."""
        _check_sequence("LearnedPositionalEmbedding", x, self.dim)
        return x + learned_positions(self.weight, x.shape[1], offset=offset).to(x.dtype)

    def extra_repr(self) -> str:
        return f"{self.max_positions}, {self.dim}"


@final
class ALiBi(FixedTable):
    r"""Attention with linear biases: each head prefers near keys, by a slope of its own.

    .. math:: B_{hts} = -m_h\, |t - s|, \qquad m_k = 2^{-8k/h}

    Returns :func:`handbook_src.functional.alibi_bias` for attention's ``mask``.  Nothing is
    trained and the state dict is empty.

    Args:
        heads: number of heads.
        causal: hide later keys too; then the bias is all the mask that a decoder needs.
        device: where the bias is made.
        dtype: of the bias.

    Shape:
        The output is ``1 h t s``.

    Typical values:
        112 heads in BLOOM, 32 in MPT-7B, both causal.

    Raises:
        ConfigError: ``heads`` is not positive, a negative size or ``offset``.
        ShapeError: more queries than keys without an ``offset``.

    Source:
        Press, Smith & Lewis 2021, section 3, arXiv:2108.12409
    """

    slopes: Tensor

    def __init__(
        self,
        heads: int,
        *,
        causal: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.heads, self.causal = heads, causal
        like = torch.empty(0, device=device, dtype=dtype)
        check_size("ALiBi", "heads", heads)
        self.register_buffer("slopes", like, persistent=False)
        self.reset_buffers(like.device, like.dtype)

    def reset_buffers(self, device: torch.device, dtype: torch.dtype) -> None:
        """Compute the slopes."""
        self.slopes = alibi_slopes(self.heads, device=device, dtype=dtype)

    def forward(self, t: int, s: int | None = None, *, offset: int | None = None) -> Float[Tensor, "1 h t s"]:
        """Return the bias of ``t`` queries, the last of ``s`` positions, on all of them."""
        slopes = self.slopes
        if slopes.dtype.itemsize == 2:  # .half() has rounded them; the product is to be rounded, once
            slopes = alibi_slopes(self.heads, device=slopes.device)
        return alibi_bias(slopes, t, s, offset=offset, causal=self.causal).to(self.slopes.dtype)

    def extra_repr(self) -> str:
        return f"{self.heads}, causal={self.causal}"


@final
class T5RelativePositionBias(nn.Module):
    r"""A trained number for each head and bucket of distances, added to the scores.

    .. math:: B_{hts} = W_{\operatorname{bucket}(s - t),\, h}

    Returns :func:`handbook_src.functional.t5_relative_bias` for attention's ``mask``.  T5 shares one
    such table among all layers and does not divide the scores by :math:`\sqrt e`.  The table starts at zero;
    the published code draws it with deviation ``factor * d_model ** -0.5``, from a size not known here.

    Args:
        heads: number of heads.
        num_buckets: how many numbers a head has.
        max_distance: from here on all distances share a bucket.
        bidirectional: tell before from after (encoder); a decoder doesn't, and needs its causal mask beside it.
        device: where the weight is made.
        dtype: of the weight.

    Shape:
        The output is ``1 h t s``; ``weight`` is ``buckets h``, as in transformers.

    Typical values:
        32 buckets, distance 128 (T5, all sizes); 320 and 800 in WavLM, which uses the same buckets.

    Raises:
        ConfigError: sizes that are not positive, too few buckets, an odd number of them in two
            directions, a ``max_distance`` that the exact buckets already reach.
        ShapeError: more queries than keys without an ``offset``.

    Source:
        Raffel et al. 2019, section 2.1, arXiv:1910.10683; after Shaw et al. 2018, arXiv:1803.02155
    """

    def __init__(
        self,
        heads: int,
        *,
        num_buckets: int = 32,
        max_distance: int = 128,
        bidirectional: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_size("T5RelativePositionBias", "heads", heads)
        _check_buckets(bidirectional, num_buckets, max_distance)
        self.heads, self.num_buckets = heads, num_buckets
        self.max_distance, self.bidirectional = max_distance, bidirectional
        self.weight = nn.Parameter(torch.empty(num_buckets, heads, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Start at zero: all distances alike until training tells them apart.

        The published code draws a normal of deviation ``factor * d_model ** -0.5``; the table has no ``d_model``.
        """
        nn.init.zeros_(self.weight)

    def forward(self, t: int, s: int | None = None, *, offset: int | None = None) -> Float[Tensor, "1 h t s"]:
        """Return the bias of ``t`` queries, the last of ``s`` positions, on all of them."""
        return t5_relative_bias(
            self.weight, t, s, offset=offset, bidirectional=self.bidirectional, max_distance=self.max_distance
        )

    def extra_repr(self) -> str:
        return (
            f"{self.heads}, num_buckets={self.num_buckets}, max_distance={self.max_distance}, "
            f"bidirectional={self.bidirectional}"
        )


def _check_sequence(op: str, x: Tensor, dim: int) -> None:
    check_rank(op, x, (3,), "(batch, time, features)")
    check_features(op, x, dim)
    check_floating(op, x)
