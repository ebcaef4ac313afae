r"""Where the norm stands around a residual branch: before the sublayer, or after the sum.

====  ===================================  =============================================
pre   :math:`x + f(\mathrm{norm}(x))`      the stream is never normalised on its way
post  :math:`\mathrm{norm}(x + f(x))`      every block rescales the stream
====  ===================================  =============================================
"""

from __future__ import annotations

from typing import Any, final

import torch.nn.functional as F
from torch import Tensor, nn

from handbook_src.check import check_probability
from handbook_src.errors import ShapeError


@final
class PreNorm(nn.Module):
    r"""Normalise the branch's input; leave the stream alone.

    .. math:: y = x + \mathrm{dropout}\bigl(f(\mathrm{norm}(x))\bigr)

    The Jacobian is the identity plus the branch's, so the gradient reaches the
    first block undivided. The stream grows with depth: put one norm after the last block.

    Args:
        norm: applied to the branch's input.
        sublayer: the branch; returns the shape it is given.
        dropout: probability of dropping entries of the branch's output.

    Shape:
        ``x`` of any shape that ``norm`` and ``sublayer`` take, to the same shape.

    Typical values:
        ``dropout`` 0 to 0.1; norm LayerNorm (GPT-2) or RMSNorm (LLaMA).

    Raises:
        ConfigError: ``dropout`` outside [0, 1).
        ShapeError: the branch changed the shape.

    Source:
        Xiong et al. 2020, table 1 (right), arXiv:2002.04745
    """

    def __init__(self, norm: nn.Module, sublayer: nn.Module, *, dropout: float = 0.0) -> None:
        super().__init__()
        check_probability("PreNorm", "dropout", dropout)
        self.norm, self.sublayer, self.dropout = norm, sublayer, dropout

    def forward(self, x: Tensor, *args: Any, **options: Any) -> Tensor:
        """Run the block; further arguments (a mask, a cache) go to the sublayer."""
        return _add(x, self.sublayer(self.norm(x), *args, **options), self.dropout, self.training)

    def extra_repr(self) -> str:
        return f"dropout={self.dropout}"


@final
class PostNorm(nn.Module):
    r"""Normalise the sum of stream and branch, as the first Transformer did.

    .. math:: y = \mathrm{norm}\bigl(x + \mathrm{dropout}(f(x))\bigr)

    What ``LayerNorm(x + f(x))`` computes is post-norm, wherever it is called otherwise.

    Args:
        norm: applied to the sum.
        sublayer: the branch; returns the shape it is given.
        dropout: probability of dropping entries of the branch's output.

    Shape:
        ``x`` of any shape that ``norm`` and ``sublayer`` take, to the same shape.

    Typical values:
        ``dropout=0.1`` (Vaswani et al. 2017, section 5.4), with learning-rate warm-up.

    Raises:
        ConfigError: ``dropout`` outside [0, 1).
        ShapeError: the branch changed the shape.

    Source:
        Vaswani et al. 2017, section 3.1, arXiv:1706.03762; Xiong et al. 2020, table 1 (left), arXiv:2002.04745
    """

    def __init__(self, norm: nn.Module, sublayer: nn.Module, *, dropout: float = 0.0) -> None:
        super().__init__()
        check_probability("PostNorm", "dropout", dropout)
        self.norm, self.sublayer, self.dropout = norm, sublayer, dropout

    def forward(self, x: Tensor, *args: Any, **options: Any) -> Tensor:
        """Run the block; further arguments (a mask, a cache) go to the sublayer."""
        return self.norm(_add(x, self.sublayer(x, *args, **options), self.dropout, self.training))

    def extra_repr(self) -> str:
        return f"dropout={self.dropout}"


def _add(x: Tensor, branch: Tensor, dropout: float, training: bool) -> Tensor:
    if branch.shape != x.shape:
        raise ShapeError(
            "residual branch",
            got=f"{tuple(branch.shape)} from an input of {tuple(x.shape)}",
            want="the input's shape",
            remedy="A sum that broadcasts is nearly always a lost axis; project the branch back.",
        )
    return x + F.dropout(branch, dropout, training)
