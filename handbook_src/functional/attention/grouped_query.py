"""From a checkpoint with a key and value head for each query head to one that shares them.

The attention itself is :func:`handbook_src.functional.scaled_dot_product_attention`,
which lets a key head serve a group of consecutive query heads.
"""

from __future__ import annotations

from einops import reduce
from jaxtyping import Float
from torch import Tensor

from handbook_src.check import check_floating, check_size, check_tensors
from handbook_src.errors import ConfigError, ShapeError


def mean_pool_heads(weight: Float[Tensor, "*shape"], heads: int, kv_heads: int) -> Float[Tensor, "*pooled"]:
    r"""Average the key (or value) projections of each group of heads into one.

    .. math:: \bar W_j = \frac{1}{r} \sum_{i = j r}^{(j + 1) r - 1} W_i, \qquad r = h / g

    The mean is formed in the dtype that the weight has.

    Args:
        weight: the weight ``(h e) d`` or bias ``(h e)`` of a key or value projection.
        heads: how many heads the rows hold, :math:`h`.
        kv_heads: how many are wanted, :math:`g`.

    Raises:
        ConfigError: sizes that are not positive integers, or ``kv_heads`` that don't divide ``heads``.
        ShapeError: rows that ``heads`` don't divide, or a weight that is not floating point.

    Source:
        Ainslie et al. 2023, section 2.1 and figure 1, arXiv:2305.13245
    """
    check_size("mean_pool_heads", "heads", heads)
    check_size("mean_pool_heads", "kv_heads", kv_heads)
    check_tensors("mean_pool_heads", weight)
    check_floating("mean_pool_heads", weight)
    if heads % kv_heads:
        raise ConfigError(
            "mean_pool_heads kv_heads", got=f"{kv_heads} for {heads} heads", want="a divisor", remedy="Pool to 1 head."
        )
    if weight.ndim == 0 or weight.shape[0] % heads:
        raise ShapeError(
            "mean_pool_heads weight",
            got=tuple(weight.shape),
            want=f"rows of {heads} heads, (h e) d or (h e)",
            remedy="Pass k_proj.weight, whose rows are the heads' features.",
        )
    return reduce(weight, "(g r e) ... -> (g e) ...", "mean", g=kv_heads, r=heads // kv_heads)
