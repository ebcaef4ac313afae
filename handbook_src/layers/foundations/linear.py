"""Linear and bilinear layers with torch's names, arguments, initialisation and state dict."""

from __future__ import annotations

import math
from typing import Any, final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from handbook_src.check import check_parameter_dtype, check_size
from handbook_src.dispatch import Backend
from handbook_src.functional.foundations import linear as maths


@final
class Linear(nn.Module):
    r"""Weigh and sum the features, once for each output: see :func:`handbook_src.functional.linear`.

    Args:
        in_features: features of the input.
        out_features: features of the output.
        bias: add a learned number to each output.
        device: of the parameters.
        dtype: of the parameters.
        backend: who runs it.

    Shape:
        ``(..., in_features)`` to ``(..., out_features)``.

    Typical values:
        Without bias in front of a norm and in recent language models (LLaMA, PaLM); with one in GPT-2, BERT, ViT.

    Raises:
        ConfigError: a size is not a positive integer.
        ShapeError: the input has other features, another dtype or device than the parameters, or is not floating.

    Source:
        Rosenblatt 1958, doi:10.1037/h0042519; initial values as torch's, of a third of the variance that
        LeCun, Bottou, Orr & Müller 1998, section 4.6, doi:10.1007/3-540-49430-8_2 ask for
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        backend: Backend = "auto",
    ) -> None:
        super().__init__()
        check_size("Linear", "in_features", in_features)
        check_size("Linear", "out_features", out_features)
        check_parameter_dtype("Linear", dtype)
        self.in_features, self.out_features, self.backend = in_features, out_features, backend
        self.weight = nn.Parameter(torch.empty(out_features, in_features, device=device, dtype=dtype))
        self.register_parameter("bias", None)
        if bias:
            self.bias = nn.Parameter(torch.empty(out_features, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        r"""Draw weight and bias from :math:`U(-1/\sqrt{d}, 1/\sqrt{d})`, ``d`` inputs, in torch's order.

        The variance is :math:`1/(3d)`.
        """
        reset_uniform(self.weight, self.bias, self.in_features)

    def forward(self, input: Tensor) -> Tensor:
        if self.backend == "auto":
            # Checked after a refusal only: the checks take 2 us, as long as the product of a small layer.
            try:
                return F.linear(input, self.weight, self.bias)
            except RuntimeError:
                maths.check_linear("Linear", input, self.weight, self.bias)
                raise
        return maths.linear(input, self.weight, self.bias, backend=self.backend)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"


@final
class Bilinear(nn.Module):
    r"""Weigh and sum the products of two inputs' features: see :func:`handbook_src.functional.bilinear`.

    Args:
        in1_features: features of the first input.
        in2_features: features of the second input.
        out_features: features of the output.
        bias: add a learned number to each output.
        device: of the parameters.
        dtype: of the parameters.
        backend: who runs it.

    Shape:
        ``(..., in1_features)`` and ``(..., in2_features)`` to ``(..., out_features)``.

    Typical values:
        ``in1_features * in2_features * out_features`` weights: sizes of 100 to 500, or a low-rank form beyond.

    Raises:
        ConfigError: a size is not a positive integer.
        ShapeError: the inputs have other features or leading axes, another dtype or device, or are not floating.

    Source:
        Tenenbaum & Freeman 2000, section 2, doi:10.1162/089976600300015349
    """

    def __init__(
        self,
        in1_features: int,
        in2_features: int,
        out_features: int,
        bias: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        backend: Backend = "auto",
    ) -> None:
        super().__init__()
        sizes = {"in1_features": in1_features, "in2_features": in2_features, "out_features": out_features}
        for name, size in sizes.items():
            check_size("Bilinear", name, size)
        self.in1_features, self.in2_features, self.out_features = in1_features, in2_features, out_features
        self.backend = backend
        self.weight = nn.Parameter(torch.empty(out_features, in1_features, in2_features, device=device, dtype=dtype))
        self.register_parameter("bias", None)
        if bias:
            self.bias = nn.Parameter(torch.empty(out_features, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        r"""Draw weight and bias from :math:`U(-1/\sqrt{d_1}, 1/\sqrt{d_1})`, as torch does."""
        reset_uniform(self.weight, self.bias, self.in1_features)

    def forward(self, input1: Tensor, input2: Tensor) -> Tensor:
        return maths.bilinear(input1, input2, self.weight, self.bias, backend=self.backend)

    def extra_repr(self) -> str:
        sizes = f"in1_features={self.in1_features}, in2_features={self.in2_features}, out_features={self.out_features}"
        return f"{sizes}, bias={self.bias is not None}"


def reset_uniform(weight: Tensor, bias: Tensor | None, inputs: int) -> None:
    """Draw uniformly within one over the root of ``inputs``, the weight first."""
    bound = 1 / math.sqrt(inputs)
    nn.init.uniform_(weight, -bound, bound)
    if bias is not None:
        nn.init.uniform_(bias, -bound, bound)
