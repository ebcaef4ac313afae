"""Axial attention as layers: along one axis of a grid, and in raster order."""

from __future__ import annotations

from typing import final

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from handbook_src.errors import ConfigError, ShapeError
from handbook_src.functional.attention.axial_attention import axial_attention, axis_of, shift
from handbook_src.functional.attention.mask import along, causal
from handbook_src.layers.attention.attention import MultiHeadAttention, check_input


@final
class AxialAttention(MultiHeadAttention):
    r"""Self-attention along one axis of a grid: each row for itself, or each column.

    .. math:: y_{ij} = \sum_{j'} \operatorname{softmax}_{j'}\!\Big(\frac{q_{ij} \cdot k_{ij'}}{\sqrt e}\Big)\, v_{ij'}

    The maths is :func:`handbook_src.functional.axial_attention`.  Two layers, one for each axis, lead
    from any cell to any other.

    Args:
        dim: features of ``x`` and of the output.
        heads: number of heads.
        axis: of the grid, from 0 (the first after the batch) or from -1 (the last).
        causal: whether later cells of the line are hidden.
        dropout: share of the weights dropped in training.
        bias: whether the projections have one.
        device: of the parameters.
        dtype: of the parameters.

    Shape:
        ``x`` and the output are ``b *axes d``: pictures ``b height width d``, video ``b time height width d``.

    Typical values:
        one axis after the other; 8 heads in Axial-DeepLab, with relative positions.

    Raises:
        ConfigError: ``axis`` is no integer; sizes as for :class:`handbook_src.layers.MultiHeadAttention`.

    Source:
        Ho et al. 2019, section 3, arXiv:1912.12180
    """

    def __init__(
        self,
        dim: int,
        heads: int = 1,
        *,
        axis: int,
        causal: bool = False,
        dropout: float = 0.0,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        if not isinstance(axis, int) or isinstance(axis, bool):
            raise ConfigError("AxialAttention axis", got=repr(axis), want="an integer", remedy="0 is the first axis.")
        super().__init__(dim, heads, dropout=dropout, bias=bias, device=device, dtype=dtype)
        self.axis, self.causal = axis, bool(causal)

    def forward(self, x: Float[Tensor, "b *axes d"]) -> Float[Tensor, "b *axes d"]:  # type: ignore[override]
        """Attend along the axis."""
        check_input("AxialAttention", x, self.q_proj)
        _check_grid(x, self.dim, 1)
        q, k, v = (
            rearrange(proj(x), "... (h e) -> ... h e", e=self.head_dim)
            for proj in (self.q_proj, self.k_proj, self.v_proj)
        )
        dropout = self.dropout if self.training else 0.0
        out = axial_attention(q, k, v, self.axis, causal=self.causal, dropout=dropout)
        return self.out_proj(rearrange(out, "... h e -> ... (h e)"))

    def weights(self, x: Float[Tensor, "b *axes d"]) -> Float[Tensor, "b h n n"]:  # type: ignore[override]
        """Return each head's weights between all cells, the grid read row by row, without dropout."""
        check_input("AxialAttention", x, self.q_proj)
        _check_grid(x, self.dim, 1)
        rule = along(axis_of(x.ndim - 2, self.axis), *x.shape[1:-1])
        return super().weights(x.flatten(1, -2), mask=causal & rule if self.causal else rule)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, axis={self.axis}, causal={self.causal}"


@final
class RasterAttention(nn.Module):
    r"""Axial attention that writes a picture row by row: a cell sees itself and all cells before it in raster order.

    .. math::
        u = \operatorname{Column}^{\downarrow}\!\big(\operatorname{Row}(x)\big), \qquad
        y = \operatorname{Row}^{\rightarrow}\!\big(x + \operatorname{ShiftDown}(u)\big)

    Rows are read whole, then columns downwards: :math:`u_{ij}` knows all rows up to the :math:`i`-th.  One step down,
    it knows all rows *above*, and the masked row adds what stands to the left.
    The maths is :func:`handbook_src.functional.axial_attention` and
    :func:`handbook_src.functional.attention.axial_attention.shift`.

    Args:
        dim: features of ``x`` and of the output.
        heads: number of heads.
        dropout: share of the weights dropped in training.
        bias: whether the projections have one.
        device: of the parameters.
        dtype: of the parameters.

    Shape:
        ``x`` and the output are ``b height width d``.

    Typical values:
        as for :class:`AxialAttention`.

    Raises:
        ConfigError: sizes as for :class:`handbook_src.layers.MultiHeadAttention`.

    Source:
        Ho et al. 2019, section 3.2, arXiv:1912.12180
    """

    def __init__(
        self,
        dim: int,
        heads: int = 1,
        *,
        dropout: float = 0.0,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.dim = dim
        self.row = AxialAttention(dim, heads, axis=1, dropout=dropout, bias=bias, device=device, dtype=dtype)
        self.column, self.masked_row = (
            AxialAttention(dim, heads, axis=a, causal=True, dropout=dropout, bias=bias, device=device, dtype=dtype)
            for a in (0, 1)
        )

    def reset_parameters(self) -> None:
        """Draw the weights anew."""
        for part in (self.row, self.column, self.masked_row):
            part.reset_parameters()

    def forward(self, x: Float[Tensor, "b height width d"]) -> Float[Tensor, "b height width d"]:
        """Attend to the cells before, and to the cell itself."""
        check_input("RasterAttention", x, self.row.q_proj)
        _check_grid(x, self.dim, 2, exactly=True)
        above = shift(self.column(self.row(x)), 0)
        return self.masked_row(x + above)


def _check_grid(x: Tensor, dim: int, axes: int, *, exactly: bool = False) -> None:
    if x.ndim < axes + 2 or x.shape[-1] != dim or (exactly and x.ndim > axes + 2):
        want = f"(b, height, width, {dim})" if exactly else f"(b, *axes, {dim})"
        raise ShapeError("grid of features", got=tuple(x.shape), want=want, remedy="Move the features to the end.")
