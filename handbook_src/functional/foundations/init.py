r"""Initialisation: one variance per weight, chosen so that depth neither silences nor deafens.

For a layer with ``fan_in`` inputs per output and ``fan_out`` outputs per input:

=========  =========================================  ===========================
scheme     :math:`\mathrm{Var}(W)`                      keeps
=========  =========================================  ===========================
LeCun      :math:`1 / n_{in}`                          the forward signal
Xavier     :math:`2 / (n_{in} + n_{out})`              a compromise of both ways
He         :math:`\mathrm{gain}^2 / n_{in}` (or out)   one way, through a ReLU
=========  =========================================  ===========================

All fill the tensor in place and return it, draw from ``generator`` if one is given, and
leave no trace in autograd, as ``torch.nn.init`` does.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from jaxtyping import Float
from torch import Generator, Tensor

from handbook_src.check import check_floating, check_positive
from handbook_src.errors import ConfigError, ShapeError

Mode = Literal["fan_in", "fan_out"]

#: What one layer's activation does to a zero-mean signal, undone: torch's table.
GAINS = {"linear": 1.0, "sigmoid": 1.0, "tanh": 5 / 3, "relu": math.sqrt(2), "selu": 3 / 4}
_CONVOLUTIONS = {f"conv{t}{n}d" for n in (1, 2, 3) for t in ("", "_transpose")}


def fans(weight: Float[Tensor, "*shape"]) -> tuple[int, int]:
    r"""Return how many numbers each output sums, and how many outputs each input reaches.

    .. math:: n_{in} = c_{in} \prod_i k_i, \qquad n_{out} = c_{out} \prod_i k_i

    for a weight of shape ``out in *kernel``.  A transposed convolution stores ``in out *kernel``:
    its two fans come out exchanged, here as in torch.  A grouped convolution stores ``out in/groups *kernel``:
    :math:`n_{in}` is right, :math:`n_{out}` is ``groups`` times what one input reaches, again as in torch.

    Args:
        weight: at least two axes.

    Raises:
        ShapeError: fewer than two axes.

    Source:
        Glorot & Bengio 2010, section 4.2.1, proceedings.mlr.press/v9/glorot10a
    """
    if weight.ndim < 2:
        raise ShapeError(
            "init weight",
            got=tuple(weight.shape),
            want="at least two axes: outputs, inputs, then the kernel's",
            remedy="A bias or a gain has no fan; fill it with zeros_ or ones_.",
        )
    taps = math.prod(weight.shape[2:])
    return weight.shape[1] * taps, weight.shape[0] * taps


def gain(nonlinearity: str, param: float | None = None) -> float:
    r"""Return the factor on the deviation that makes up for what an activation takes.

    .. math:: \mathrm{gain}^2 = \frac{1}{E[\phi(z)^2]}, \quad z \sim N(0, 1)

    holds exactly for ``linear``, ``relu`` (:math:`\sqrt 2`) and ``leaky_relu``
    (:math:`\sqrt{2 / (1 + a^2)}`).  The rest of torch's table is convention: 5/3 for
    ``tanh`` (the formula gives 1.59), 1 for ``sigmoid``, and 3/4 for ``selu``, whose own
    fixed point asks for 1.

    Args:
        nonlinearity: ``linear``, ``conv1d`` and so on (all 1), ``sigmoid``, ``tanh``, ``relu``,
            ``leaky_relu`` or ``selu``.
        param: the negative slope :math:`a` of ``leaky_relu``; 0.01 if not given.

    Raises:
        ConfigError: another name, or a slope that is not a finite number.

    Source:
        He et al. 2015, eq. 10 and 15, arXiv:1502.01852
    """
    if nonlinearity in _CONVOLUTIONS:
        return 1.0
    if nonlinearity == "leaky_relu":
        slope = 0.01 if param is None else param
        if isinstance(slope, bool) or not isinstance(slope, int | float) or not math.isfinite(slope):
            raise ConfigError("leaky_relu slope", got=repr(slope), want="a finite number", remedy="0.01 is usual.")
        return math.sqrt(2 / (1 + slope**2))
    if nonlinearity not in GAINS:
        raise ConfigError(
            "gain nonlinearity",
            got=repr(nonlinearity),
            want=f"one of {[*GAINS, 'leaky_relu', *sorted(_CONVOLUTIONS)]}",
            remedy="For GELU, SiLU and Mish take 'relu'; for a self-normalising SELU layer take lecun_normal_.",
        )
    return GAINS[nonlinearity]


def xavier_uniform_(
    tensor: Float[Tensor, "*shape"], gain: float = 1.0, generator: Generator | None = None
) -> Float[Tensor, "*shape"]:
    r"""Fill from a uniform distribution whose variance weighs both directions alike.

    .. math::
        W \sim U(-a, a), \qquad a = \mathrm{gain} \sqrt{\frac{6}{n_{in} + n_{out}}}, \qquad
        \mathrm{Var}(W) = \mathrm{gain}^2\, \frac{2}{n_{in} + n_{out}}

    Args:
        tensor: the weight, ``out in *kernel``; filled in place.
        gain: factor on the deviation, see :func:`gain`.
        generator: where the numbers come from.

    Raises:
        ConfigError: ``gain`` is not positive.
        ShapeError: fewer than two axes, or not floating.

    Source:
        Glorot & Bengio 2010, eq. 16, proceedings.mlr.press/v9/glorot10a
    """
    n_in, n_out = _checked("xavier_uniform_", tensor, gain)
    return _uniform(tensor, gain * math.sqrt(2 / max(n_in + n_out, 1)), generator)


def xavier_normal_(
    tensor: Float[Tensor, "*shape"], gain: float = 1.0, generator: Generator | None = None
) -> Float[Tensor, "*shape"]:
    r"""Fill from a normal distribution with the variance of :func:`xavier_uniform_`.

    .. math:: W \sim N\Bigl(0,\ \mathrm{gain}^2\, \frac{2}{n_{in} + n_{out}}\Bigr)

    Args:
        tensor: the weight, ``out in *kernel``; filled in place.
        gain: factor on the deviation, see :func:`gain`.
        generator: where the numbers come from.

    Raises:
        ConfigError: ``gain`` is not positive.
        ShapeError: fewer than two axes, or not floating.

    Source:
        Glorot & Bengio 2010, eq. 12, proceedings.mlr.press/v9/glorot10a
    """
    n_in, n_out = _checked("xavier_normal_", tensor, gain)
    return _normal(tensor, gain * math.sqrt(2 / max(n_in + n_out, 1)), generator)


def kaiming_uniform_(
    tensor: Float[Tensor, "*shape"],
    a: float = 0.0,
    mode: Mode = "fan_in",
    nonlinearity: str = "leaky_relu",
    generator: Generator | None = None,
) -> Float[Tensor, "*shape"]:
    r"""Fill from a uniform distribution with the variance of :func:`kaiming_normal_`.

    .. math:: W \sim U(-b, b), \qquad b = \mathrm{gain} \sqrt{3 / n}

    torch's own ``nn.Linear`` and convolutions call this with ``a`` = :math:`\sqrt 5`, which is
    :math:`U(\pm 1/\sqrt{n_{in}})`, of variance :math:`1/(3 n_{in})`: a third of LeCun's.

    Args:
        tensor: the weight, ``out in *kernel``; filled in place.
        a: the negative slope, with ``leaky_relu``.
        mode: ``fan_in`` keeps the forward signal, ``fan_out`` the backward one.
        nonlinearity: what follows the layer, see :func:`gain`.
        generator: where the numbers come from.

    Raises:
        ConfigError: an unknown ``mode`` or ``nonlinearity``, or a slope that is not finite.
        ShapeError: fewer than two axes, or not floating.

    Source:
        He et al. 2015, eq. 10 and 14, arXiv:1502.01852
    """
    return _uniform(tensor, _he("kaiming_uniform_", tensor, a, mode, nonlinearity), generator)


def kaiming_normal_(
    tensor: Float[Tensor, "*shape"],
    a: float = 0.0,
    mode: Mode = "fan_in",
    nonlinearity: str = "leaky_relu",
    generator: Generator | None = None,
) -> Float[Tensor, "*shape"]:
    r"""Fill so that a layer followed by a ReLU keeps the second moment of its input.

    .. math::
        W \sim N\Bigl(0,\ \frac{\mathrm{gain}^2}{n}\Bigr), \qquad
        \mathrm{gain}^2 = \frac{2}{1 + a^2}, \qquad n = n_{in} \text{ or } n_{out}

    Args:
        tensor: the weight, ``out in *kernel``; filled in place.
        a: the negative slope, with ``leaky_relu``.
        mode: ``fan_in`` keeps the forward signal, ``fan_out`` the backward one.
        nonlinearity: what follows the layer, see :func:`gain`.
        generator: where the numbers come from.

    Raises:
        ConfigError: an unknown ``mode`` or ``nonlinearity``, or a slope that is not finite.
        ShapeError: fewer than two axes, or not floating.

    Source:
        He et al. 2015, eq. 10, 14 and 15, arXiv:1502.01852
    """
    return _normal(tensor, _he("kaiming_normal_", tensor, a, mode, nonlinearity), generator)


def lecun_normal_(tensor: Float[Tensor, "*shape"], generator: Generator | None = None) -> Float[Tensor, "*shape"]:
    r"""Fill so that each output has the variance of one input; SELU's fixed point needs it.

    .. math:: W \sim N\Bigl(0,\ \frac{1}{n_{in}}\Bigr)

    The normal is whole.  Keras and JAX cut theirs at two deviations and rescale it.

    Args:
        tensor: the weight, ``out in *kernel``; filled in place.
        generator: where the numbers come from.

    Raises:
        ShapeError: fewer than two axes, or not floating.

    Source:
        LeCun et al. 1998, Efficient BackProp, eq. 16; Klambauer et al. 2017, section 3, arXiv:1706.02515
    """
    n_in, _ = _checked("lecun_normal_", tensor, 1.0)
    return _normal(tensor, math.sqrt(1 / max(n_in, 1)), generator)


def lecun_uniform_(tensor: Float[Tensor, "*shape"], generator: Generator | None = None) -> Float[Tensor, "*shape"]:
    r"""Fill from a uniform distribution with the variance of :func:`lecun_normal_`.

    .. math:: W \sim U(-a, a), \qquad a = \sqrt{3 / n_{in}}

    Args:
        tensor: the weight, ``out in *kernel``; filled in place.
        generator: where the numbers come from.

    Raises:
        ShapeError: fewer than two axes, or not floating.

    Source:
        LeCun et al. 1998, Efficient BackProp, eq. 16
    """
    n_in, _ = _checked("lecun_uniform_", tensor, 1.0)
    return _uniform(tensor, math.sqrt(1 / max(n_in, 1)), generator)


def _checked(op: str, tensor: Tensor, gain: float) -> tuple[int, int]:
    check_floating(op, tensor)
    check_positive(op, "gain", gain)
    return fans(tensor)


def _he(op: str, tensor: Tensor, a: float, mode: Mode, nonlinearity: str) -> float:
    n_in, n_out = _checked(op, tensor, 1.0)
    if mode not in ("fan_in", "fan_out"):
        raise ConfigError(
            f"{op} mode",
            got=repr(mode),
            want="'fan_in' or 'fan_out'",
            remedy="fan_in keeps the forward signal, fan_out the backward one.",
        )
    return gain(nonlinearity, a) / math.sqrt(max(n_in if mode == "fan_in" else n_out, 1))


@torch.no_grad()
def _uniform(tensor: Tensor, deviation: float, generator: Generator | None) -> Tensor:
    bound = math.sqrt(3) * deviation
    return tensor.uniform_(-bound, bound, generator=generator)


@torch.no_grad()
def _normal(tensor: Tensor, deviation: float, generator: Generator | None) -> Tensor:
    return tensor.normal_(0, deviation, generator=generator)
