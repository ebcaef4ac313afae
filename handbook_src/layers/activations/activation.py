"""Activation layers with torch's names, arguments and state dict.

Each is at most one parameter and one call of :mod:`handbook_src.functional.activations.activation`;
replacing ``torch.nn.ReLU`` by this module's changes neither the outputs nor a checkpoint's keys.
"""

from __future__ import annotations

from typing import Any, Literal, final

import torch
from torch import Tensor, nn

from handbook_src.check import check_finite, check_positive, check_probability, check_size
from handbook_src.dispatch import Backend
from handbook_src.errors import ConfigError
from handbook_src.functional.activations import activation as maths


class _Plain(nn.Module):
    """An activation without settings."""

    def __init__(self, *, backend: Backend = "auto") -> None:
        super().__init__()
        self.backend = backend


class _InPlace(nn.Module):
    """An activation that may overwrite its input."""

    def __init__(self, inplace: bool = False, *, backend: Backend = "auto") -> None:
        super().__init__()
        self.inplace, self.backend = inplace, backend

    def extra_repr(self) -> str:
        return "inplace=True" if self.inplace else ""


@final
class ReLU(_InPlace):
    r"""The positive part: see :func:`handbook_src.functional.relu`.

    Args:
        inplace: overwrite the input; torch's operation only.
        backend: who runs it.

    Shape:
        Any to the same.

    Raises:
        ShapeError: the input is not floating.

    Source:
        Nair & Hinton 2010, section 2; Glorot, Bordes & Bengio 2011, section 3
    """

    def forward(self, x: Tensor) -> Tensor:
        return maths.relu(x, self.inplace, backend=self.backend)


@final
class LeakyReLU(nn.Module):
    r"""ReLU with a small slope below zero: see :func:`handbook_src.functional.leaky_relu`.

    Args:
        negative_slope: the slope below zero.
        inplace: overwrite the input; torch's operation only.
        backend: who runs it.

    Shape:
        Any to the same.

    Typical values:
        ``negative_slope`` 0.01 (Maas et al. 2013, torch), 0.1 (YOLO), 0.2 (DCGAN's critic, graph attention).

    Raises:
        ConfigError: ``negative_slope`` is not a finite number.
        ShapeError: the input is not floating.

    Source:
        Maas, Hannun & Ng 2013, section 2
    """

    def __init__(self, negative_slope: float = 0.01, inplace: bool = False, *, backend: Backend = "auto") -> None:
        super().__init__()
        check_finite("LeakyReLU", "negative_slope", negative_slope)
        self.negative_slope, self.inplace, self.backend = negative_slope, inplace, backend

    def forward(self, x: Tensor) -> Tensor:
        return maths.leaky_relu(x, self.negative_slope, self.inplace, backend=self.backend)

    def extra_repr(self) -> str:
        return f"negative_slope={self.negative_slope}" + (", inplace=True" if self.inplace else "")


@final
class PReLU(nn.Module):
    r"""Leaky ReLU with learned slopes: see :func:`handbook_src.functional.prelu`.

    Leave ``weight`` out of weight decay, which pulls the slopes to zero: to ReLU.

    Args:
        num_parameters: 1 for a shared slope, or the number of channels (axis 1).
        init: what the slopes start from.
        device: of the slopes.
        dtype: of the slopes.
        backend: who runs it.

    Shape:
        ``(b, num_parameters, ...)`` to the same; any shape with one shared slope.

    Typical values:
        ``init`` 0.25 (He et al. 2015).

    Raises:
        ConfigError: ``num_parameters`` is not a positive integer, or ``init`` not a finite number.
        ShapeError: the input has another number of channels, or is not floating.

    Source:
        He, Zhang, Ren & Sun 2015, eq. 1, arXiv:1502.01852
    """

    def __init__(
        self,
        num_parameters: int = 1,
        init: float = 0.25,
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        backend: Backend = "auto",
    ) -> None:
        super().__init__()
        check_size("PReLU", "num_parameters", num_parameters)
        check_finite("PReLU", "init", init)
        self.num_parameters, self.init, self.backend = num_parameters, init, backend
        self.weight = nn.Parameter(torch.empty(num_parameters, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set every slope to ``init``."""
        nn.init.constant_(self.weight, self.init)

    def forward(self, x: Tensor) -> Tensor:
        return maths.prelu(x, self.weight, backend=self.backend)

    def extra_repr(self) -> str:
        return f"num_parameters={self.num_parameters}"


@final
class ELU(nn.Module):
    r"""An exponential below zero: see :func:`handbook_src.functional.elu`.

    Args:
        alpha: minus the floor.
        inplace: overwrite the input; torch's operation only.
        backend: who runs it.

    Shape:
        Any to the same.

    Typical values:
        ``alpha`` 1 (Clevert et al. 2015): the only value whose derivative has no jump at 0.

    Raises:
        ConfigError: ``alpha`` is not positive.
        ShapeError: the input is not floating.

    Source:
        Clevert, Unterthiner & Hochreiter 2015, section 3, arXiv:1511.07289
    """

    def __init__(self, alpha: float = 1.0, inplace: bool = False, *, backend: Backend = "auto") -> None:
        super().__init__()
        check_positive("ELU", "alpha", alpha)
        self.alpha, self.inplace, self.backend = alpha, inplace, backend

    def forward(self, x: Tensor) -> Tensor:
        return maths.elu(x, self.alpha, self.inplace, backend=self.backend)

    def extra_repr(self) -> str:
        return f"alpha={self.alpha}" + (", inplace=True" if self.inplace else "")


@final
class SELU(_InPlace):
    r"""ELU with the fixed point mean 0, variance 1: see :func:`handbook_src.functional.selu`.

    Args:
        inplace: overwrite the input; torch's operation only.
        backend: who runs it.

    Shape:
        Any to the same.

    Typical values:
        No setting; LeCun-normal weights, :class:`AlphaDropout` of 0.05 to 0.1 (Klambauer et al. 2017).

    Raises:
        ShapeError: the input is not floating.

    Source:
        Klambauer, Unterthiner, Mayr & Hochreiter 2017, eq. 2, arXiv:1706.02515
    """

    def forward(self, x: Tensor) -> Tensor:
        return maths.selu(x, self.inplace, backend=self.backend)


@final
class AlphaDropout(nn.Module):
    r"""Dropout that keeps mean 0 and variance 1: see :func:`handbook_src.functional.alpha_dropout`.

    Args:
        p: the share that is dropped.
        inplace: overwrite the input; torch's operation only.
        backend: who runs it.

    Shape:
        Any to the same.

    Typical values:
        ``p`` 0.05 to 0.1 (Klambauer et al. 2017); torch's default of 0.5 is dropout's.

    Raises:
        ConfigError: ``p`` is no probability.
        ShapeError: the input is not floating.

    Source:
        Klambauer, Unterthiner, Mayr & Hochreiter 2017, section 3, arXiv:1706.02515
    """

    def __init__(self, p: float = 0.5, inplace: bool = False, *, backend: Backend = "auto") -> None:
        super().__init__()
        check_probability("AlphaDropout", "p", p, below_one=False)
        self.p, self.inplace, self.backend = p, inplace, backend

    def forward(self, x: Tensor) -> Tensor:
        return maths.alpha_dropout(x, self.p, self.training, self.inplace, backend=self.backend)

    def extra_repr(self) -> str:
        return f"p={self.p}, inplace={self.inplace}"


@final
class GELU(nn.Module):
    r"""The input times the probability that a standard normal lies below it.

    See :func:`handbook_src.functional.gelu`.

    Args:
        approximate: ``none`` for the exact form, ``tanh`` for GPT-2's.
        backend: who runs it.

    Shape:
        Any to the same.

    Typical values:
        ``none`` in BERT and ViT, ``tanh`` in GPT-2 and in T5 v1.1's gate.

    Raises:
        ConfigError: ``approximate`` is neither.
        ShapeError: the input is not floating.

    Source:
        Hendrycks & Gimpel 2016, section 2, arXiv:1606.08415
    """

    def __init__(self, approximate: Literal["none", "tanh"] = "none", *, backend: Backend = "auto") -> None:
        super().__init__()
        if approximate not in ("none", "tanh"):
            raise ConfigError(
                "GELU approximate", got=repr(approximate), want="'none' or 'tanh'", remedy="'none' is the exact form."
            )
        self.approximate, self.backend = approximate, backend

    def forward(self, x: Tensor) -> Tensor:
        return maths.gelu(x, approximate=self.approximate, backend=self.backend)

    def extra_repr(self) -> str:
        return f"approximate={self.approximate!r}"


@final
class SiLU(_InPlace):
    r"""The input times its sigmoid: see :func:`handbook_src.functional.silu`.

    Args:
        inplace: overwrite the input; torch's operation only.
        backend: who runs it.

    Shape:
        Any to the same.

    Raises:
        ShapeError: the input is not floating.

    Source:
        Elfwing, Uchibe & Doya 2017, section 2, arXiv:1702.03118; Ramachandran, Zoph & Le 2017, arXiv:1710.05941
    """

    def forward(self, x: Tensor) -> Tensor:
        return maths.silu(x, self.inplace, backend=self.backend)


@final
class Swish(nn.Module):
    r"""SiLU with a slope inside, fixed or learned: see :func:`handbook_src.functional.swish`.

    A learned ``beta`` is the only entry of the state dict; a fixed one leaves it empty.

    Args:
        beta: the slope, or where it starts.
        learnable: make it a parameter.
        device: of the parameter.
        dtype: of the parameter.
        backend: who runs it.

    Shape:
        Any to the same.

    Typical values:
        ``beta`` 1 (then it is SiLU); 1.702 is the quick form of GELU, CLIP's.

    Raises:
        ConfigError: ``beta`` is not a finite number.
        ShapeError: the input is not floating.

    Source:
        Ramachandran, Zoph & Le 2017, section 4, arXiv:1710.05941
    """

    def __init__(
        self,
        beta: float = 1.0,
        learnable: bool = False,
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        backend: Backend = "auto",
    ) -> None:
        super().__init__()
        check_finite("Swish", "beta", beta)
        self.learnable, self.start, self.backend = learnable, beta, backend
        self.beta = nn.Parameter(torch.empty((), device=device, dtype=dtype)) if learnable else beta
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set a learned slope to where it starts."""
        if isinstance(self.beta, Tensor):
            nn.init.constant_(self.beta, self.start)

    def forward(self, x: Tensor) -> Tensor:
        return maths.swish(x, self.beta, backend=self.backend)

    def extra_repr(self) -> str:
        return f"beta={self.start}, learnable={self.learnable}"


@final
class Mish(_InPlace):
    r"""The input times the tanh of its softplus: see :func:`handbook_src.functional.mish`.

    Args:
        inplace: overwrite the input; torch's operation only.
        backend: who runs it.

    Shape:
        Any to the same.

    Raises:
        ShapeError: the input is not floating.

    Source:
        Misra 2019, abstract, arXiv:1908.08681
    """

    def forward(self, x: Tensor) -> Tensor:
        return maths.mish(x, self.inplace, backend=self.backend)


@final
class Sigmoid(_Plain):
    r"""A number squeezed into (0, 1): see :func:`handbook_src.functional.sigmoid`.

    Args:
        backend: who runs it.

    Shape:
        Any to the same.

    Raises:
        ShapeError: the input is not floating.

    Source:
        Rumelhart, Hinton & Williams 1986, eq. 2, doi:10.1038/323533a0
    """

    def forward(self, x: Tensor) -> Tensor:
        return maths.sigmoid(x, backend=self.backend)


@final
class Tanh(_Plain):
    r"""A number squeezed into (-1, 1): see :func:`handbook_src.functional.tanh`.

    Args:
        backend: who runs it.

    Shape:
        Any to the same.

    Raises:
        ShapeError: the input is not floating.

    Source:
        LeCun, Bottou, Orr & Müller 1998, Efficient BackProp, section 4.4
    """

    def forward(self, x: Tensor) -> Tensor:
        return maths.tanh(x, backend=self.backend)


@final
class Hardsigmoid(_InPlace):
    r"""A clipped line in place of the sigmoid: see :func:`handbook_src.functional.hardsigmoid`.

    Args:
        inplace: overwrite the input; torch's operation only.
        backend: who runs it.

    Shape:
        Any to the same.

    Raises:
        ShapeError: the input is not floating.

    Source:
        Howard et al. 2019, section 5.2, arXiv:1905.02244
    """

    def forward(self, x: Tensor) -> Tensor:
        return maths.hardsigmoid(x, self.inplace, backend=self.backend)


@final
class Hardswish(_InPlace):
    r"""The input times a clipped line: see :func:`handbook_src.functional.hardswish`.

    Args:
        inplace: overwrite the input; torch's operation only.
        backend: who runs it.

    Shape:
        Any to the same.

    Raises:
        ShapeError: the input is not floating.

    Source:
        Howard et al. 2019, section 5.2, arXiv:1905.02244
    """

    def forward(self, x: Tensor) -> Tensor:
        return maths.hardswish(x, self.inplace, backend=self.backend)
