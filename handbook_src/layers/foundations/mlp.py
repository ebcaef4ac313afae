"""The multi-layer perceptron: linear layers with an activation between them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any, final

import torch
from torch import Tensor, nn

from handbook_src.check import check_probability, check_size
from handbook_src.errors import ConfigError
from handbook_src.layers.foundations.linear import Linear

Activation = Callable[[Tensor], Tensor]


@final
class MLP(nn.Module):
    r"""Linear layers (:func:`handbook_src.functional.linear`) with an activation after all but the last.

    .. math:: h_0 = x, \qquad h_l = \phi(W_l h_{l-1} + b_l) \;\; (l < L), \qquad y = W_L h_{L-1} + b_L

    Without the activation the layers would collapse into one linear map,
    :math:`W_L \cdots W_1`.  Dropout, where asked for, follows each activation.

    Args:
        in_features: features of the input.
        hidden: width of the hidden layer, or of each of several; ``()`` is a single linear layer.
        out_features: features of the output; ``None`` for as many as the input has.
        activation: a module class, of which each hidden layer gets an instance of its own, or any map of
            tensors, which all share.
        dropout: probability with which a hidden number is dropped in training.
        bias: add a learned number to each output of each layer.
        device: of the parameters.
        dtype: of the parameters.

    Shape:
        ``(..., in_features)`` to ``(..., out_features)``.

    Typical values:
        ``hidden`` four times ``in_features`` in Transformers (Vaswani et al. 2017: 512 and 2048), GELU in GPT-2 and
        BERT, dropout 0 to 0.1.

    Raises:
        ConfigError: a size is not a positive integer, ``dropout`` is no probability, ``activation`` cannot be called.
        ShapeError: the input has other features, another dtype or device than the parameters, or is not floating.

    Source:
        Rumelhart, Hinton & Williams 1986, eq. 1 and 2, doi:10.1038/323533a0; what it can represent:
        Cybenko 1989, doi:10.1007/BF02551274; Hornik et al. 1989, doi:10.1016/0893-6080(89)90020-8
    """

    def __init__(
        self,
        in_features: int,
        hidden: int | Sequence[int],
        out_features: int | None = None,
        activation: type[nn.Module] | Activation = nn.GELU,
        dropout: float = 0.0,
        bias: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        widths = tuple(hidden) if isinstance(hidden, Sequence) and not isinstance(hidden, str) else (hidden,)
        sizes = [in_features, *widths, in_features if out_features is None else out_features]
        for name, size in zip(["in_features", *["hidden"] * len(widths), "out_features"], sizes, strict=True):
            check_size("MLP", name, size)
        check_probability("MLP", "dropout", dropout)
        if not callable(activation):
            raise ConfigError(
                "MLP activation", got=repr(activation), want="a module class or a map of tensors", remedy="Try nn.GELU."
            )
        self.layers = nn.ModuleList(Linear(n, m, bias, device, dtype) for n, m in pairwise(sizes))
        self.activations = nn.ModuleList(_module(activation, device, dtype) for _ in widths)
        self.dropout = nn.Dropout(dropout)

    def reset_parameters(self) -> None:
        """Draw every linear layer anew."""
        for layer in self.layers:
            if isinstance(layer, Linear):
                layer.reset_parameters()

    def forward(self, input: Tensor) -> Tensor:
        *hidden, last = self.layers
        x = input
        for layer, activation in zip(hidden, self.activations, strict=True):
            x = activation(layer(x))
            if self.dropout.p:  # its own mode decides: Monte-Carlo dropout trains it alone
                x = self.dropout(x)
        out: Tensor = last(x)
        return out


class _Map(nn.Module):
    """A plain function in a module's place."""

    def __init__(self, function: Activation) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)

    def extra_repr(self) -> str:
        return getattr(self.function, "__name__", repr(self.function))


def _module(activation: type[nn.Module] | Activation, device: Any, dtype: torch.dtype | None) -> nn.Module:
    if isinstance(activation, type):
        try:
            made = activation()
        except TypeError:
            made = None
        if not isinstance(made, nn.Module):
            raise ConfigError(
                "MLP activation",
                got=activation.__name__,
                want="a module class that needs no arguments",
                remedy="Pass an instance, or a function of one tensor.",
            )
        return made.to(device=device, dtype=dtype)
    return activation if isinstance(activation, nn.Module) else _Map(activation)
