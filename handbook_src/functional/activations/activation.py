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
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from handbook_src.check import check_finite, check_floating, check_positive, check_probability
from handbook_src.dispatch import Backend, Resolved, resolve
from handbook_src.errors import ConfigError, ShapeError
from handbook_src.precision import at_least_float32

#: The two constants of SELU, from :math:`E[f(z)] = 0` and :math:`E[f(z)^2] = 1` for a standard normal z.
SELU_ALPHA = 1.6732632423543772848170429916717
SELU_LAMBDA = 1.0507009873554804934193349852946


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
    if _runs("relu", x, backend, inplace) == "torch":
        return F.relu(x, inplace)
    return torch.where(x <= 0, 0.0, x)


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
    check_finite("leaky_relu", "negative_slope", negative_slope)
    if inplace and negative_slope < 0:  # the sign of x, which the gradient needs, is gone from the result
        raise ConfigError(
            "leaky_relu negative_slope", got=negative_slope, want="at least 0 with inplace", remedy="Drop inplace."
        )
    if _runs("leaky_relu", x, backend, inplace) == "torch":
        return F.leaky_relu(x, negative_slope, inplace)
    wide = at_least_float32(x)
    return torch.where(wide > 0, wide, negative_slope * wide).to(x.dtype)


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
    check_floating("prelu", weight)
    slopes = weight.numel()
    channels = 1 if slopes == 1 or x.ndim < 2 else x.shape[1]
    if weight.ndim > 1 or slopes not in (1, channels):
        raise ShapeError(
            "prelu weight",
            got=f"{tuple(weight.shape)} for an input of shape {tuple(x.shape)}",
            want=f"one slope, shape (1,), or {channels}: one for each channel of axis 1",
            remedy="Build the layer with num_parameters=1 or the number of channels.",
        )
    same = None if weight.dtype == x.dtype else f"a weight of dtype {x.dtype}"
    if _runs("prelu", x, backend, torch_lacks=same) == "torch":
        return F.prelu(x, weight)
    wide, slope = at_least_float32(x), at_least_float32(weight)
    slope = slope.reshape(()) if slopes == 1 else slope.view(-1, *[1] * (x.ndim - 2))
    return torch.where(wide > 0, wide, slope * wide.clamp(max=0)).to(
        x.dtype
    )  # clamped: 0 * inf in the slope's gradient


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
    check_positive("elu", "alpha", alpha)
    if _runs("elu", x, backend, inplace) == "torch":
        return F.elu(x, alpha, inplace)
    return _elu(at_least_float32(x), alpha).to(x.dtype)


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
    if _runs("selu", x, backend, inplace) == "torch":
        return F.selu(x, inplace)
    return (SELU_LAMBDA * _elu(at_least_float32(x), SELU_ALPHA)).to(x.dtype)


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
    if approximate not in ("none", "tanh"):
        raise ConfigError(
            "gelu approximate", got=repr(approximate), want="'none' or 'tanh'", remedy="GPT-2's gelu_new is 'tanh'."
        )
    if _runs("gelu", x, backend) == "torch":
        return F.gelu(x, approximate=approximate)
    wide = at_least_float32(x)
    if approximate == "none":
        return (0.5 * wide * torch.erfc(-wide / math.sqrt(2))).to(x.dtype)
    inner = math.sqrt(2 / math.pi) * (wide + 0.044715 * wide**3)
    return (0.5 * wide * (1 + _tanh(inner))).to(x.dtype)


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
    if _runs("silu", x, backend, inplace) == "torch":
        return F.silu(x, inplace)
    wide = at_least_float32(x)
    return (wide * _sigmoid(wide)).to(x.dtype)


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
    if isinstance(beta, Tensor):
        check_floating("swish", beta)
        if beta.ndim != 0:
            raise ShapeError(
                "swish beta", got=tuple(beta.shape), want="a scalar, shape ()", remedy="Reshape it with reshape(())."
            )
    else:
        check_finite("swish", "beta", beta)
    if _runs("swish", x, backend) == "torch":
        if not isinstance(beta, Tensor) and beta == 1:
            return F.silu(x)
        return x * torch.sigmoid(beta * x)
    wide = at_least_float32(x)
    return (wide * _sigmoid(beta * wide)).to(x.dtype)


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
    if _runs("mish", x, backend, inplace) == "torch":
        return F.mish(x, inplace)
    wide = at_least_float32(x)
    return (wide * _tanh(_softplus(wide))).to(x.dtype)


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
    if _runs("sigmoid", x, backend) == "torch":
        return torch.sigmoid(x)
    return _sigmoid(at_least_float32(x)).to(x.dtype)


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
    if _runs("tanh", x, backend) == "torch":
        return torch.tanh(x)
    return _tanh(at_least_float32(x)).to(x.dtype)


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
    if _runs("hardsigmoid", x, backend, inplace) == "torch":
        return F.hardsigmoid(x, inplace)
    return _hardsigmoid(at_least_float32(x)).to(x.dtype)


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
    if _runs("hardswish", x, backend, inplace) == "torch":
        return F.hardswish(x, inplace)
    wide = at_least_float32(x)
    return (wide * _hardsigmoid(wide)).to(x.dtype)


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
    check_probability("alpha_dropout", "p", p, below_one=False)
    if _runs("alpha_dropout", x, backend, inplace) == "torch":
        return F.alpha_dropout(x, p, training, inplace)
    if not training or p == 0:
        return x
    if p == 1:
        return x * 0.0
    q, floor = 1 - p, -SELU_LAMBDA * SELU_ALPHA
    a = (q + floor**2 * q * p) ** -0.5
    b = -a * p * floor
    wide, keep = at_least_float32(x), torch.empty_like(x).bernoulli_(q).bool()
    return (a * torch.where(keep, wide, floor) + b).to(x.dtype)


def _runs(op: str, x: Tensor, backend: Backend, inplace: bool = False, torch_lacks: str | None = None) -> Resolved:
    if backend == "auto" and torch_lacks is None and x.is_floating_point():
        return "torch"  # what resolve would say, 1 us sooner: a twentieth of a ReLU of 65,536 numbers
    check_floating(op, x)
    reference = "inplace=False: the written-out maths makes a new tensor" if inplace else None
    return resolve(op, backend, {"torch": torch_lacks, "reference": reference})


def _minus_abs(x: Tensor) -> Tensor:
    """``-|x|``, with derivative 1 at 0: torch's ``abs`` has 0 there, and everything built on it would, too."""
    return torch.where(x > 0, -x, x)


def _sigmoid(x: Tensor) -> Tensor:
    e = torch.exp(_minus_abs(x))
    return torch.where(x > 0, 1.0, e) / (1 + e)


def _tanh(x: Tensor) -> Tensor:
    t = torch.expm1(2 * _minus_abs(x))
    below = t / (2 + t)  # tanh(-|x|)
    return torch.where(x > 0, -below, below)


def _softplus(x: Tensor) -> Tensor:
    return torch.where(x > 0, x, 0.0) + torch.log1p(torch.exp(_minus_abs(x)))


def _hardsigmoid(x: Tensor) -> Tensor:
    return torch.where(x <= -3, 0.0, torch.where(x >= 3, 1.0, (x + 3) / 6))  # clamp's derivative is 1 at the corners


def _elu(x: Tensor, alpha: float) -> Tensor:
    return torch.where(x > 0, x, alpha * torch.expm1(x.clamp(max=0)))  # clamped: inf * 0 in the branch not taken
