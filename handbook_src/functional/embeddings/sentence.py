"""From the vectors of a sentence's tokens to one vector for the sentence."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from handbook_src.check import check_floating, check_rank
from handbook_src.errors import ShapeError
from handbook_src.precision import at_least_float32


def mean_pool(
    x: Float[Tensor, "b t d"], mask: Bool[Tensor, "b t"] | Int[Tensor, "b t"] | None = None
) -> Float[Tensor, "b d"]:
    r"""Average the tokens that the mask keeps.

    .. math:: u = \frac{\sum_t m_t\, x_t}{\max(\sum_t m_t,\, 1)}

    What stands under the mask does not enter, not even a NaN. Nothing kept gives zero. Halves are
    added in float32 and rounded once.

    Args:
        x: vectors of the tokens.
        mask: 1 or true for tokens, 0 or false for padding; all are tokens unless given.

    Raises:
        ShapeError: another rank, a mask of another shape or dtype.

    Source:
        Reimers & Gurevych 2019, section 3 (MEAN strategy), arXiv:1908.10084
    """
    check_floating("mean_pool", x)
    check_rank("mean_pool", x, (3,), "(batch, tokens, features)")
    wide = at_least_float32(x)
    if mask is None:
        mask = torch.ones(x.shape[:2], dtype=torch.bool, device=x.device)
    if mask.shape != x.shape[:2] or mask.is_floating_point() or mask.is_complex():
        raise ShapeError(
            "mean_pool mask",
            got=f"{tuple(mask.shape)} of {mask.dtype}",
            want=f"{tuple(x.shape[:2])} of integers or booleans",
            remedy="One entry for each token: the tokeniser's attention_mask.",
        )
    kept = mask.bool()
    total = wide.masked_fill(~kept[..., None], 0.0).sum(1)
    return (total / kept.sum(1, keepdim=True).clamp_min(1)).to(x.dtype)


def sentence_embedding(
    x: Float[Tensor, "b t d"], mask: Bool[Tensor, "b t"] | Int[Tensor, "b t"] | None = None
) -> Float[Tensor, "b d"]:
    r"""Average the tokens that the mask keeps, and scale the mean to length one.

    .. math:: y = \frac{u}{\max(\lVert u \rVert_2,\, 10^{-12})}, \qquad u = \frac{\sum_t m_t\, x_t}{\sum_t m_t}

    The dot product of two such vectors is the cosine of their angle. A mean of zero stays zero. A mean with
    entries above 1e18 is divided by the largest before its length is taken: float32 could not hold their squares.

    Args:
        x: vectors of the tokens.
        mask: 1 or true for tokens, 0 or false for padding.

    Raises:
        ShapeError: as :func:`mean_pool`.

    Source:
        Reimers & Gurevych 2019, section 3, arXiv:1908.10084; the length is the released model's last step
    """
    u = mean_pool(x, mask)
    wide = at_least_float32(u)
    largest = wide.detach().abs().amax(-1, keepdim=True)
    wide = wide / largest.where(largest > 1e18, 1.0)
    return (wide / wide.norm(dim=-1, keepdim=True).clamp_min(1e-12)).to(u.dtype)
