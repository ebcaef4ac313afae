"""Half precision: statistics and sums are computed in float32 and rounded once at the end."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor


def at_least_float32(x: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """Widen float16 and bfloat16 to float32; leave float32 and float64 alone."""
    return x.to(statistic_dtype(x))


def statistic_dtype(x: Float[Tensor, "*shape"]) -> torch.dtype:
    """The dtype in which the statistics of ``x`` are computed."""
    return torch.promote_types(x.dtype, torch.float32)
