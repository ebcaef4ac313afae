"""Eight-bit rounding with a scale a vector: how key-value caches are stored small."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from handbook_src.check import check_floating, check_tensors
from handbook_src.errors import ConfigError, ShapeError

#: The largest number each storage type holds.
QUANTIZED = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}


def quantize(x: Float[Tensor, "*lead e"], dtype: torch.dtype = torch.int8) -> tuple[Tensor, Float[Tensor, "*lead 1"]]:
    r"""Round each vector to eight bits with a scale of its own.

    .. math:: s = \frac{\max_j |x_j|}{q_{\max}}, \qquad q_j = \operatorname{round}(x_j / s),
        \qquad |x_j - s\,q_j| \le \tfrac12 s

    The bound is int8's (:math:`q_{\max} = 127`). fp8 (e4m3, :math:`q_{\max} = 448`) has
    three bits of mantissa: :math:`|x_j - s\,q_j| \le \max(2^{-4} |x_j|, 2^{-10} s)`.
    The scale is float32 and never subnormal; a vector of zeros gets scale 1; NaN and
    infinity come back as NaN.

    Args:
        x: vectors of at least one feature; float64 is rounded through float32.
        dtype: ``torch.int8`` or ``torch.float8_e4m3fn``.

    Returns:
        The rounded vectors and their scales.

    Raises:
        ConfigError: ``dtype`` is neither int8 nor float8_e4m3fn.
        ShapeError: integers, or vectors without features.

    Source:
        Dettmers et al. 2022, section 2.1 (absmax), arXiv:2208.07339;
        Micikevicius et al. 2022, table 1, arXiv:2209.05433
    """
    if dtype not in QUANTIZED:
        raise ConfigError(
            "quantize dtype",
            got=dtype,
            want=f"one of {list(QUANTIZED)}",
            remedy="int8 rounds finest on Gaussian values.",
        )
    check_tensors("quantize", x)
    check_floating("quantize", x)
    if x.ndim == 0 or x.shape[-1] == 0:
        raise ShapeError("quantize x", got=tuple(x.shape), want="vectors, *lead e", remedy="Features stand last.")
    top = x.detach().float().abs().amax(-1, keepdim=True)
    scale = torch.where(top == 0, torch.ones_like(top), (top / QUANTIZED[dtype]).clamp_min(torch.finfo(top.dtype).tiny))
    scaled = x.detach().float() / scale
    return (scaled.round() if dtype == torch.int8 else scaled).to(dtype), scale
