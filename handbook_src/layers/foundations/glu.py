"""The gated feed-forward layer of LLaMA, PaLM and T5 v1.1: three matrices and a gate.

The names are LLaMA's: ``gate_proj``, ``up_proj``, ``down_proj``. T5 calls the same
three ``wi_0``, ``wi_1`` and ``wo``.
"""

from __future__ import annotations

from typing import Any, final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from handbook_src.check import (
    check_features,
    check_floating,
    check_parameter_dtype,
    check_probability,
    check_size,
)
from handbook_src.dispatch import Backend
from handbook_src.functional.foundations.glu import Gate, check_gate, gated
from handbook_src.functional.foundations.linear import check_together


@final
class GatedFeedForward(nn.Module):
    r"""Widen twice, let one projection gate the other, narrow: see :func:`handbook_src.functional.gated`.

    .. math:: y = W_{\mathrm{down}} \bigl( \phi(W_{\mathrm{gate}}\, x) \odot W_{\mathrm{up}}\, x \bigr)

    Args:
        dim: features of the input and the output.
        hidden_dim: width between; :func:`handbook_src.functional.gated_hidden_dim` gives the one that costs
            as much as a plain layer.
        activation: of the gate: ``silu`` (SwiGLU), ``gelu`` or ``gelu_tanh`` (GEGLU), ``relu`` (ReGLU) or
            ``sigmoid`` (GLU).
        bias: learn a bias in each of the three projections.
        dropout: probability of dropping entries of the product.
        device: of the parameters.
        dtype: of the parameters.
        backend: who computes the gate.

    Shape:
        ``(..., dim)`` to the same.

    Typical values:
        ``hidden_dim`` 8/3 of ``dim``, rounded up: 11008 for 4096 in LLaMA 7B, 2 to 2.75 times in T5 v1.1;
        ``bias=False``; ``dropout`` 0 (LLaMA), 0.1 (T5, fine-tuning).

    Raises:
        ConfigError: a size is not a positive integer, another activation, or ``dropout`` outside [0, 1).
        ShapeError: the input has another last axis, or is not floating.

    Source:
        Shazeer 2020, eq. 6, arXiv:2002.05202; Dauphin et al. 2016, eq. 1, arXiv:1612.08083
    """

    def __init__(
        self,
        dim: int,
        hidden_dim: int,
        activation: Gate = "silu",
        bias: bool = False,
        dropout: float = 0.0,
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        backend: Backend = "auto",
    ) -> None:
        super().__init__()
        check_size("GatedFeedForward", "dim", dim)
        check_size("GatedFeedForward", "hidden_dim", hidden_dim)
        check_gate("GatedFeedForward", activation)
        check_parameter_dtype("GatedFeedForward", dtype)
        check_probability("GatedFeedForward", "dropout", dropout)
        self.dim, self.hidden_dim, self.activation = dim, hidden_dim, activation
        self.dropout, self.backend = dropout, backend
        made: dict[str, Any] = {"bias": bias, "device": device, "dtype": dtype}
        self.gate_proj = nn.Linear(dim, hidden_dim, **made)
        self.up_proj = nn.Linear(dim, hidden_dim, **made)
        self.down_proj = nn.Linear(hidden_dim, dim, **made)

    def reset_parameters(self) -> None:
        """Draw the three projections anew, as ``nn.Linear`` does."""
        for projection in (self.gate_proj, self.up_proj, self.down_proj):
            projection.reset_parameters()

    def forward(self, x: Tensor) -> Tensor:
        check_floating("GatedFeedForward", x)
        check_features("GatedFeedForward", x, self.dim)
        check_together("GatedFeedForward", x, weight=self.gate_proj.weight)
        product = gated(self.gate_proj(x), self.up_proj(x), self.activation, backend=self.backend)
        return self.down_proj(F.dropout(product, self.dropout, self.training))

    def extra_repr(self) -> str:
        return f"{self.dim}, {self.hidden_dim}, activation={self.activation!r}, dropout={self.dropout}"
