r"""Activation functions: one number in, one number out, the same for every element.

Every reference is the formula written so that neither it nor its gradient overflows:
exponentials are taken of :math:`-|x|` only.  Each function takes the derivative that torch
takes where its graph has a corner, and passes NaN through.  The reference of a float16 or
bfloat16 input is computed in float32 and rounded once, at the end.

In :math:`x\,\sigma(x)` and its relatives minus infinity is :math:`-\infty \cdot 0`, which is
NaN, here as in torch.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from handbook_src.check import check_finite, check_floating, check_positive, check_probability
from handbook_src.dispatch import Backend
from handbook_src.errors import ConfigError, ShapeError
from handbook_src.operation import operation

#: The two constants of SELU, from :math:`E[f(z)] = 0` and :math:`E[f(z)^2] = 1` for a standard normal z.
SELU_ALPHA = 1.6732632423543772848170429916717
SELU_LAMBDA = 1.0507009873554804934193349852946


def _not_in_place(inplace: bool) -> str | None:
    return "inplace=False: the written-out maths makes a new tensor" if inplace else None


@operation(needs=_not_in_place)
def relu(x: Float[Tensor, "*shape"], inplace: bool = False, *, backend: Backend = "auto") -> Float[Tensor, "*shape"]:
    r"""Keep what is positive, replace the rest by zero.

    .. math:: f(x) = \max(x, 0), \qquad f'(x) = 1 \text{ if } x > 0 \text{ else } 0

    The derivative at 0 is 0.

    Args:
        x: any shape.
        inplace: overwrite ``x``; torch's operation only.
        backend: ``auto`` takes torch's operation.

    Raises:
        ShapeError: ``x`` is not floating.
        KernelUnavailable: ``inplace`` with the reference.

    Source:
        Nair & Hinton 2010, section 2 (rectified linear units); Glorot, Bordes & Bengio 2011, section 3
    """
    return torch.where(x <= 0, 0.0, x)  # max(x, 0), and NaN for NaN


@operation(widens="x", needs=_not_in_place)
def leaky_relu(
    x: Float[Tensor, "*shape"], negative_slope: float = 0.01, inplace: bool = False, *, backend: Backend = "auto"
) -> Float[Tensor, "*shape"]:
    r"""ReLU with a small slope on the negative side, so that some gradient always flows.

    .. math:: f(x) = \max(x, 0) + a \min(x, 0), \qquad f'(x) = 1 \text{ if } x > 0 \text{ else } a

    The derivative at 0 is ``negative_slope``.

    Args:
        x: any shape.
        negative_slope: :math:`a`.
        inplace: overwrite ``x``; torch's operation only, and not for a negative slope.
        backend: ``auto`` takes torch's operation.

    Raises:
        ConfigError: ``negative_slope`` is not a finite number, or is negative with ``inplace``.
        ShapeError: ``x`` is not floating.
        KernelUnavailable: ``inplace`` with the reference.

    Source:
        Maas, Hannun & Ng 2013, section 2
    """
    return torch.where(x > 0, x, negative_slope * x)  # x, or a x


@leaky_relu.refuses
def _(negative_slope: float, inplace: bool) -> None:
    check_finite("leaky_relu", "negative_slope", negative_slope)
    if inplace and negative_slope < 0:  # the sign of x, which the gradient needs, is gone from the result
        raise ConfigError(
            "leaky_relu negative_slope", got=negative_slope, want="at least 0 with inplace", remedy="Drop inplace."
        )


@operation(widens="x weight")
def prelu(
    x: Float[Tensor, "*shape"], weight: Float[Tensor, "*one_or_channels"], *, backend: Backend = "auto"
) -> Float[Tensor, "*shape"]:
    r"""Leaky ReLU whose slope is learned: one for all, or one for each channel.

    .. math::
        f(x_c) = \max(x_c, 0) + a_c \min(x_c, 0), \qquad
        \frac{\partial f}{\partial x_c} = 1 \text{ if } x_c > 0 \text{ else } a_c, \quad
        \frac{\partial f}{\partial a_c} = \min(x_c, 0)

    The derivative at 0 is the slope.

    Args:
        x: any shape; with one slope for each channel, channels are axis 1.
        weight: the slopes, ``(1,)`` or ``(channels,)``.
        backend: ``auto`` takes torch's operation where ``weight`` has the dtype of ``x``.

    Raises:
        ShapeError: ``x`` or ``weight`` is not floating, or there are neither one nor ``channels`` slopes.

    Source:
        He, Zhang, Ren & Sun 2015, eq. 1 and 3, arXiv:1502.01852
    """
    a = weight.reshape(()) if weight.numel() == 1 else weight.view(-1, *[1] * (x.ndim - 2))  # channels are axis 1
    return torch.where(x > 0, x, a * x.clamp(max=0))  # clamped: 0 * inf in the slope's gradient


@prelu.refuses
def _(x: Tensor, weight: Tensor) -> None:
    check_floating("prelu", weight)
    channels = 1 if weight.numel() == 1 or x.ndim < 2 else x.shape[1]
    if weight.ndim > 1 or weight.numel() not in (1, channels):
        raise ShapeError(
            "prelu weight",
            got=f"{tuple(weight.shape)} for an input of shape {tuple(x.shape)}",
            want=f"one slope, shape (1,), or {channels}: one for each channel of axis 1",
            remedy="Build the layer with num_parameters=1 or the number of channels.",
        )


@prelu.torch(needs=lambda x, weight: None if weight.dtype == x.dtype else f"a weight of dtype {x.dtype}")
def _(x: Tensor, weight: Tensor) -> Tensor:
    return F.prelu(x, weight)


@operation(widens="x", needs=_not_in_place)
def elu(
    x: Float[Tensor, "*shape"], alpha: float = 1.0, inplace: bool = False, *, backend: Backend = "auto"
) -> Float[Tensor, "*shape"]:
    r"""The identity above zero, an exponential that settles at :math:`-\alpha` below.

    .. math::
        f(x) = \begin{cases} x & x > 0 \\ \alpha\,(e^x - 1) & x \le 0 \end{cases}, \qquad
        f'(x) = \begin{cases} 1 & x > 0 \\ \alpha\, e^x & x \le 0 \end{cases}

    ``expm1`` keeps the digits near 0, where :math:`e^x - 1` cancels.
    The derivative at 0 is ``alpha``.

    Args:
        x: any shape.
        alpha: minus the floor.
        inplace: overwrite ``x``; torch's operation only.
        backend: ``auto`` takes torch's operation.

    Raises:
        ConfigError: ``alpha`` is not positive.
        ShapeError: ``x`` is not floating.
        KernelUnavailable: ``inplace`` with the reference.

    Source:
        Clevert, Unterthiner & Hochreiter 2015, section 3, arXiv:1511.07289
    """
    return torch.where(x > 0, x, alpha * torch.expm1(x.clamp(max=0)))  # clamped: inf * 0 in the branch not taken


@elu.refuses
def _(alpha: float) -> None:
    check_positive("elu", "alpha", alpha)


@operation(widens="x", needs=_not_in_place)
def selu(x: Float[Tensor, "*shape"], inplace: bool = False, *, backend: Backend = "auto") -> Float[Tensor, "*shape"]:
    r"""ELU, scaled so that mean 0 and variance 1 reproduce themselves from layer to layer.

    .. math::
        f(x) = \lambda \begin{cases} x & x > 0 \\ \alpha\,(e^x - 1) & x \le 0 \end{cases}, \qquad
        f'(x) = \lambda \begin{cases} 1 & x > 0 \\ \alpha\, e^x & x \le 0 \end{cases}

    with :math:`\lambda \approx 1.0507` and :math:`\alpha \approx 1.6733`.
    The derivative at 0 is :math:`\lambda\alpha`.

    Args:
        x: any shape.
        inplace: overwrite ``x``; torch's operation only.
        backend: ``auto`` takes torch's operation.

    Raises:
        ShapeError: ``x`` is not floating.
        KernelUnavailable: ``inplace`` with the reference.

    Source:
        Klambauer, Unterthiner, Mayr & Hochreiter 2017, eq. 2, constants in eq. 14, arXiv:1706.02515
    """
    return SELU_LAMBDA * elu.maths(x, SELU_ALPHA)


@operation(widens="x")
def gelu(
    x: Float[Tensor, "*shape"], *, approximate: Literal["none", "tanh"] = "none", backend: Backend = "auto"
) -> Float[Tensor, "*shape"]:
    r"""The input times the probability that a standard normal lies below it.

    .. math::
        f(x) = x\,\Phi(x) = \tfrac{x}{2} \operatorname{erfc}\!\big({-x}/{\sqrt 2}\big), \qquad
        f'(x) = \Phi(x) + x\,\varphi(x)

    .. math::
        f_{\tanh}(x) = \tfrac{x}{2} \Big(1 + \tanh\!\big(\sqrt{2/\pi}\,(x + 0.044715\, x^3)\big)\Big)

    The reference takes ``erfc``, which keeps its digits in the left tail, where
    :math:`1 + \operatorname{erf}` cancels to 0.

    Args:
        x: any shape.
        approximate: ``none`` for the first formula, ``tanh`` for the second.
        backend: ``auto`` takes torch's operation.

    Raises:
        ConfigError: ``approximate`` is neither.
        ShapeError: ``x`` is not floating.

    Source:
        Hendrycks & Gimpel 2016, section 2, arXiv:1606.08415
    """
    if approximate == "none":
        return 0.5 * x * torch.erfc(-x / math.sqrt(2))  # x Phi(x)
    inner = math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)
    return 0.5 * x * (1 + tanh.maths(inner))


@gelu.refuses
def _(approximate: str) -> None:
    if approximate not in ("none", "tanh"):
        raise ConfigError(
            "gelu approximate", got=repr(approximate), want="'none' or 'tanh'", remedy="GPT-2's gelu_new is 'tanh'."
        )


@gelu.torch()
def _(x: Tensor, approximate: str) -> Tensor:
    return F.gelu(x, approximate=approximate)


@operation(widens="x", needs=_not_in_place)
def silu(x: Float[Tensor, "*shape"], inplace: bool = False, *, backend: Backend = "auto") -> Float[Tensor, "*shape"]:
    r"""The input times its own sigmoid: :func:`swish` with :math:`\beta = 1`.

    .. math::
        f(x) = x\,\sigma(x), \qquad f'(x) = \sigma(x)\,\bigl(1 + x\,(1 - \sigma(x))\bigr)

    Args:
        x: any shape.
        inplace: overwrite ``x``; torch's operation only.
        backend: ``auto`` takes torch's operation.

    Raises:
        ShapeError: ``x`` is not floating.
        KernelUnavailable: ``inplace`` with the reference.

    Source:
        Elfwing, Uchibe & Doya 2017, section 2, arXiv:1702.03118
    """
    return x * sigmoid.maths(x)


@operation(widens="x")
def swish(
    x: Float[Tensor, "*shape"], beta: float | Float[Tensor, ""] = 1.0, *, backend: Backend = "auto"
) -> Float[Tensor, "*shape"]:
    r"""The input times the sigmoid of :math:`\beta` times it.

    .. math::
        f(x) = x\,\sigma(\beta x), \qquad
        \frac{\partial f}{\partial x} = \sigma(\beta x)\,\bigl(1 + \beta x\,(1 - \sigma(\beta x))\bigr), \quad
        \frac{\partial f}{\partial \beta} = x^2\, \sigma(\beta x)\, (1 - \sigma(\beta x))

    From :math:`x/2` at :math:`\beta = 0` towards ReLU as :math:`\beta \to \infty`; 1.702 is the quick form of GELU.

    Args:
        x: any shape.
        beta: a number, or a scalar tensor that may be learned.
        backend: ``auto`` takes torch's: ``silu`` for a ``beta`` of 1, else ``sigmoid`` and two products.

    Raises:
        ConfigError: ``beta`` is not a finite number.
        ShapeError: ``x`` or ``beta`` is not floating, or ``beta`` is no scalar.

    Source:
        Ramachandran, Zoph & Le 2017, section 4, arXiv:1710.05941
    """
    return x * sigmoid.maths(beta * x)


@swish.refuses
def _(beta: float | Tensor) -> None:
    if not isinstance(beta, Tensor):
        check_finite("swish", "beta", beta)
        return
    check_floating("swish", beta)
    if beta.ndim != 0:
        raise ShapeError(
            "swish beta", got=tuple(beta.shape), want="a scalar, shape ()", remedy="Reshape it with reshape(())."
        )


@swish.torch()
def _(x: Tensor, beta: float | Tensor) -> Tensor:
    return F.silu(x) if not isinstance(beta, Tensor) and beta == 1 else x * torch.sigmoid(beta * x)


@operation(widens="x", needs=_not_in_place)
def mish(x: Float[Tensor, "*shape"], inplace: bool = False, *, backend: Backend = "auto") -> Float[Tensor, "*shape"]:
    r"""The input times the hyperbolic tangent of its softplus.

    .. math::
        f(x) = x \tanh(s), \quad s = \ln(1 + e^x), \qquad
        f'(x) = \tanh(s) + x\,\sigma(x)\,(1 - \tanh^2 s)

    Args:
        x: any shape.
        inplace: overwrite ``x``; torch's operation only.
        backend: ``auto`` takes torch's operation.

    Raises:
        ShapeError: ``x`` is not floating.
        KernelUnavailable: ``inplace`` with the reference.

    Source:
        Misra 2019, abstract, arXiv:1908.08681
    """
    return x * tanh.maths(_softplus(x))


@operation(widens="x")
def sigmoid(x: Float[Tensor, "*shape"], *, backend: Backend = "auto") -> Float[Tensor, "*shape"]:
    r"""Squeeze a number into (0, 1).

    .. math:: \sigma(x) = \frac{1}{1 + e^{-x}} = \frac{e^x}{1 + e^x}, \qquad \sigma'(x) = \sigma(x)\,(1 - \sigma(x))

    The first form for positive, the second for negative ``x``: neither exponential can overflow.

    Args:
        x: any shape.
        backend: ``auto`` takes torch's operation.

    Raises:
        ShapeError: ``x`` is not floating.

    Source:
        Rumelhart, Hinton & Williams 1986, eq. 2, doi:10.1038/323533a0
    """
    e = torch.exp(_minus_abs(x))
    return torch.where(x > 0, 1.0, e) / (1 + e)  # 1 / (1 + e^-x), or e^x / (1 + e^x)


@operation(widens="x")
def tanh(x: Float[Tensor, "*shape"], *, backend: Backend = "auto") -> Float[Tensor, "*shape"]:
    r"""Squeeze a number into (-1, 1), symmetrically.

    .. math::
        \tanh(x) = \frac{e^x - e^{-x}}{e^x + e^{-x}} = 2\,\sigma(2x) - 1, \qquad \tanh'(x) = 1 - \tanh^2(x)

    The reference divides by :math:`e^{|x|}` and takes ``expm1``, which keeps the digits of small ``x``.

    Args:
        x: any shape.
        backend: ``auto`` takes torch's operation.

    Raises:
        ShapeError: ``x`` is not floating.

    Source:
        LeCun, Bottou, Orr & Müller 1998, Efficient BackProp, section 4.4
    """
    t = torch.expm1(2 * _minus_abs(x))
    below = t / (2 + t)  # tanh(-|x|)
    return torch.where(x > 0, -below, below)


@operation(widens="x", needs=_not_in_place)
def hardsigmoid(
    x: Float[Tensor, "*shape"], inplace: bool = False, *, backend: Backend = "auto"
) -> Float[Tensor, "*shape"]:
    r"""A line of slope 1/6, clipped to [0, 1]: the sigmoid without an exponential.

    .. math::
        f(x) = \frac{\min(\max(x + 3, 0), 6)}{6}, \qquad f'(x) = \tfrac16 \text{ if } |x| < 3 \text{ else } 0

    Args:
        x: any shape.
        inplace: overwrite ``x``; torch's operation only.
        backend: ``auto`` takes torch's operation.

    Raises:
        ShapeError: ``x`` is not floating.
        KernelUnavailable: ``inplace`` with the reference.

    Source:
        Howard et al. 2019, section 5.2, arXiv:1905.02244; the slope 1/6 is theirs, older texts have 1/5
    """
    return torch.where(x <= -3, 0.0, torch.where(x >= 3, 1.0, (x + 3) / 6))  # clamp's derivative is 1 at the corners


@operation(widens="x", needs=_not_in_place)
def hardswish(
    x: Float[Tensor, "*shape"], inplace: bool = False, *, backend: Backend = "auto"
) -> Float[Tensor, "*shape"]:
    r"""The input times its :func:`hardsigmoid`: zero, then a parabola, then the identity.

    .. math::
        f(x) = x\, \frac{\min(\max(x + 3, 0), 6)}{6}, \qquad
        f'(x) = \begin{cases} 0 & x \le -3 \\ (2x + 3)/6 & -3 < x < 3 \\ 1 & x \ge 3 \end{cases}

    Args:
        x: any shape.
        inplace: overwrite ``x``; torch's operation only.
        backend: ``auto`` takes torch's operation.

    Raises:
        ShapeError: ``x`` is not floating.
        KernelUnavailable: ``inplace`` with the reference.

    Source:
        Howard et al. 2019, section 5.2, arXiv:1905.02244
    """
    return x * hardsigmoid.maths(x)


@operation(widens="x", needs=_not_in_place)
def alpha_dropout(
    x: Float[Tensor, "*shape"],
    p: float = 0.5,
    training: bool = False,
    inplace: bool = False,
    *,
    backend: Backend = "auto",
) -> Float[Tensor, "*shape"]:
    r"""Dropout for :func:`selu`: dropped elements go to its floor, then mean and variance are restored.

    .. math::
        y = a\,\bigl(x\,d + \alpha' (1 - d)\bigr) + b, \qquad d \sim \operatorname{Bernoulli}(q), \quad q = 1 - p,

    .. math::
        \alpha' = -\lambda\alpha, \quad a = \bigl(q + \alpha'^2 q\,p\bigr)^{-1/2}, \quad b = -a\,p\,\alpha' .

    With ``p = 1`` nothing is left, and the result is 0. The two backends draw the same mask from the same
    generator state.

    Args:
        x: any shape; of mean 0 and variance 1, if these are to be kept.
        p: the share that is dropped.
        training: off, the function is the identity.
        inplace: overwrite ``x``; torch's operation only.
        backend: ``auto`` takes torch's operation.

    Raises:
        ConfigError: ``p`` is no probability.
        ShapeError: ``x`` is not floating.
        KernelUnavailable: ``inplace`` with the reference.

    Source:
        Klambauer, Unterthiner, Mayr & Hochreiter 2017, section 3, new dropout technique, arXiv:1706.02515
    """
    if not training or p == 0:
        return x
    if p == 1:
        return x * 0.0
    q, floor = 1 - p, -SELU_LAMBDA * SELU_ALPHA  # kept with probability q; what is dropped falls to SELU's floor
    a = (q + floor**2 * q * p) ** -0.5
    b = -a * p * floor
    keep = torch.empty_like(x).bernoulli_(q).bool()
    return a * torch.where(keep, x, floor) + b


@alpha_dropout.refuses
def _(p: float) -> None:
    check_probability("alpha_dropout", "p", p, below_one=False)


def _minus_abs(x: Tensor) -> Tensor:
    """``-|x|``, with derivative 1 at 0: torch's ``abs`` has 0 there, and everything built on it would, too."""
    return torch.where(x > 0, -x, x)


def _softplus(x: Tensor) -> Tensor:
    return torch.where(x > 0, x, 0.0) + torch.log1p(torch.exp(_minus_abs(x)))


def _check_of(op: str) -> Callable[[Tensor], None]:
    def check(x: Tensor) -> None:
        check_floating(op, x)

    return check


def _way_of(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Torch's own operation, argument for argument."""

    def way(*given: Any) -> Tensor:
        return function(*given)

    return way


TORCHS: dict[Any, Callable[..., Tensor]] = {
    relu: F.relu, leaky_relu: F.leaky_relu, elu: F.elu, selu: F.selu, silu: F.silu, mish: F.mish,
    sigmoid: torch.sigmoid, tanh: torch.tanh, hardsigmoid: F.hardsigmoid, hardswish: F.hardswish,
    alpha_dropout: F.alpha_dropout,
}  # fmt: skip
for ours, torchs in TORCHS.items():
    ours.torch()(_way_of(torchs))
for ours in (*TORCHS, prelu, gelu, swish):
    ours.refuses(_check_of(ours.__name__))
