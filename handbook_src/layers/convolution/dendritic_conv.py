"""Dendritic hypergraph convolution: branches, a soma, and messages along hyperedges."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Literal, final

import torch
from torch import Tensor, nn

from handbook_src.check import as_tuple, check_size
from handbook_src.errors import ConfigError
from handbook_src.functional.convolution import dendritic_conv as maths

Activation = Literal["relu", "tanh", "identity"]


def _identity(x: Tensor) -> Tensor:
    return x


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"relu": torch.relu, "tanh": torch.tanh, "identity": _identity}


@final
class DendriticHypergraphConv4d(nn.Module):
    r"""Dilated 4-d branches summed by a soma, then messages along sets of positions.

    The maths: :func:`handbook_src.functional.dendritic_conv4d` and
    :func:`handbook_src.functional.hyperedge_messages`. Hyperedges are blocks of neighbours
    and each place through all time, unless others are passed.

    Args:
        in_channels: of the input.
        out_channels: of the result.
        kernel_size: taps along all four axes, odd.
        dilations: one branch for each.
        hyperedges: send messages.
        window: side of the blocks; ``None`` for tubes through time alone.
        activation: of the branches: ``relu``, ``tanh`` or ``identity``.

    Shape:
        ``(b, in_channels, t, depth, height, width)`` to ``(b, out_channels, t, depth, height, width)``.

    Typical values:
        None published. The overview draws four branches, of dilation 1, 2, 4 and 8; small grids have no room for
        the last two.

    Raises:
        ConfigError: a size that is none, an even kernel, no branch, or an unknown activation.
        ShapeError: an input that does not fit.

    Source:
        an overview that the handbook began with, without a reference; its parts: Poirazi, Brannon & Mel
        2003, doi:10.1016/S0896-6273(03)00149-1, and Feng et al. 2019, arXiv:1809.09401
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | Sequence[int] = 3,
        dilations: Sequence[int] = (1, 2),
        *,
        hyperedges: bool = True,
        window: int | None = 2,
        activation: Activation = "relu",
    ) -> None:
        super().__init__()
        op = "DendriticHypergraphConv4d"
        check_size(op, "in_channels", in_channels)
        check_size(op, "out_channels", out_channels)
        self.kernel_size = as_tuple(op, "kernel_size", kernel_size, 4)
        for size in self.kernel_size:
            maths.check_odd(op, size)
        if not isinstance(dilations, Sequence) or len(dilations) == 0:
            raise ConfigError(f"{op} dilations", got=repr(dilations), want="one for each branch", remedy="Pass (1,).")
        self.dilations = as_tuple(op, "dilations", tuple(dilations), len(dilations))
        if window is not None:
            check_size(op, "window", window)
        if not isinstance(activation, str) or activation not in ACTIVATIONS:
            raise ConfigError(
                f"{op} activation", got=repr(activation), want=f"one of {[*ACTIVATIONS]}", remedy="Choose one."
            )
        self.window, self.activation = window, activation
        branches = len(self.dilations)
        self.weight = nn.Parameter(torch.empty(branches, out_channels, in_channels, *self.kernel_size))
        self.branch_bias = nn.Parameter(torch.empty(branches, out_channels))
        self.soma = nn.Parameter(torch.empty(branches, out_channels))
        self.bias = nn.Parameter(torch.empty(out_channels))
        self.edge_weight = nn.Parameter(torch.empty(out_channels, out_channels)) if hyperedges else None
        self.edge_bias = nn.Parameter(torch.empty(out_channels)) if hyperedges else None
        self.step = nn.Parameter(torch.empty(())) if hyperedges else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw branches and transform as torch does; the soma starts as the mean, the step at 0.1."""
        bound = 1 / math.sqrt(self.weight[0, 0].numel())
        for i in range(len(self.weight)):
            nn.init.kaiming_uniform_(self.weight[i], a=math.sqrt(5))
        nn.init.uniform_(self.branch_bias, -bound, bound)
        nn.init.constant_(self.soma, 1 / len(self.soma))
        nn.init.zeros_(self.bias)
        if self.edge_weight is not None and self.edge_bias is not None and self.step is not None:
            nn.init.kaiming_uniform_(self.edge_weight, a=math.sqrt(5))
            nn.init.zeros_(self.edge_bias)
            nn.init.constant_(self.step, 0.1)

    def forward(self, x: Tensor, incidence: maths.Incidence | None = None) -> Tensor:
        y = maths.dendritic_conv4d(
            x, self.weight, self.soma, self.branch_bias, self.bias, self.dilations, ACTIVATIONS[self.activation]
        )
        if self.edge_weight is None or self.step is None:
            return y
        if incidence is None:
            incidence = maths.grid_hyperedges(y.shape[2:], self.window, device=y.device)
        return maths.hyperedge_messages(y, incidence, self.edge_weight, self.edge_bias, self.step)

    def extra_repr(self) -> str:
        said = f"{self.weight.shape[2]}, {self.weight.shape[1]}, kernel_size={self.kernel_size}"
        said += f", dilations={self.dilations}, activation={self.activation}"
        return said + f", hyperedges={self.edge_weight is not None}, window={self.window}"
