r"""Gated linear units: an activation of one projection multiplies another.

=========  =======================  ===================================
unit       activation of the gate   used by
=========  =======================  ===================================
GLU        sigmoid                  gated convolutional language models
ReGLU      ReLU                     experiments of Shazeer 2020
GEGLU      GELU                     T5 v1.1 (tanh form), Gemma
SwiGLU     SiLU                     PaLM, LLaMA, Mistral
=========  =======================  ===================================

Half precision is computed in float32 by ``reference`` and ``triton`` and rounded
once; ``torch`` rounds the activation and then the product.
"""

from __future__ import annotations

import math
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from handbook_src.check import check_floating, check_positive, check_size
from handbook_src.dispatch import Backend, Resolved, needs_for_triton, resolve
from handbook_src.errors import ConfigError, ShapeError
from handbook_src.precision import statistic_dtype

#: What may be applied to the gate.
Gate = Literal["sigmoid", "relu", "gelu", "gelu_tanh", "silu"]
GATES: tuple[str, ...] = get_args(Gate)


def gated(
    gate: Float[Tensor, "*shape"],
    value: Float[Tensor, "*shape"],
    activation: Gate = "silu",
    *,
    backend: Backend = "auto",
) -> Float[Tensor, "*shape"]:
    r"""Multiply ``value`` by an activation of ``gate``.

    .. math:: y = \phi(g) \odot v

    Args:
        gate: what the activation is applied to.
        value: what it lets through, of the same shape and dtype.
        activation: ``sigmoid``, ``relu``, ``gelu``, ``gelu_tanh`` or ``silu``.
        backend: ``auto`` takes the fastest that can run.

    Raises:
        ConfigError: another activation.
        ShapeError: shapes, dtypes or devices differ, or they are not floating.

    Source:
        Shazeer 2020, eq. 4 to 5, arXiv:2002.05202
    """
    _check(activation, gate, value)
    runs = resolve(activation_name(activation), backend, _candidates(backend, gate, value))
    if runs == "triton":
        from handbook_src.kernels.glu import glu_triton

        return glu_triton(gate, value, activation)
    if runs == "torch":
        return _of_torch(gate, activation) * value
    wide = statistic_dtype(gate)
    return (_written_out(gate.to(wide), activation) * value.to(wide)).to(gate.dtype)


def glu(input: Float[Tensor, "*shape"], dim: int = -1, *, backend: Backend = "auto") -> Float[Tensor, "*half"]:
    r"""Halve ``input`` along ``dim``; the sigmoid of the second half gates the first.

    .. math:: \mathrm{GLU}(a, b) = a \odot \sigma(b)

    Args:
        input: values, then gates, along ``dim``.
        dim: the axis that is halved.
        backend: ``auto`` takes the fastest that can run.

    Raises:
        ConfigError: ``input`` has no axis ``dim``.
        ShapeError: axis ``dim`` has an odd size, or ``input`` is not floating.

    Source:
        Dauphin et al. 2016, eq. 1, arXiv:1612.08083
    """
    check_floating("glu", input)
    if not isinstance(dim, int) or isinstance(dim, bool) or not -input.ndim <= dim < input.ndim:
        raise ConfigError(
            "glu dim", got=dim, want=f"an axis of an input of shape {tuple(input.shape)}", remedy="Pass dim=-1."
        )
    if input.shape[dim] % 2:
        raise ShapeError(
            "glu input",
            got=f"{input.shape[dim]} on axis {dim} of {tuple(input.shape)}",
            want="an even size: values, then gates",
            remedy="Project to twice the width, or call gated(gate, value, 'sigmoid').",
        )
    value, gate = input.chunk(2, dim)
    runs = resolve("glu", backend, _candidates(backend, gate, value))
    return F.glu(input, dim) if runs == "torch" else gated(gate, value, "sigmoid", backend=runs)


def reglu(
    gate: Float[Tensor, "*shape"], value: Float[Tensor, "*shape"], *, backend: Backend = "auto"
) -> Float[Tensor, "*shape"]:
    r"""Gate by a rectifier.

    .. math:: \mathrm{ReGLU}(g, v) = \max(0, g) \odot v

    Args:
        gate: what the rectifier is applied to.
        value: what it lets through.
        backend: ``auto`` takes the fastest that can run.

    Raises:
        ShapeError: shapes, dtypes or devices differ, or they are not floating.

    Source:
        Shazeer 2020, eq. 5, arXiv:2002.05202
    """
    return gated(gate, value, "relu", backend=backend)


def geglu(
    gate: Float[Tensor, "*shape"],
    value: Float[Tensor, "*shape"],
    approximate: Literal["none", "tanh"] = "none",
    *,
    backend: Backend = "auto",
) -> Float[Tensor, "*shape"]:
    r"""Gate by a Gaussian error linear unit.

    .. math:: \mathrm{GEGLU}(g, v) = g\, \Phi(g) \odot v

    ``tanh`` replaces :math:`\Phi(g)` by
    :math:`\tfrac12 (1 + \tanh(\sqrt{2/\pi}\,(g + 0.044715\, g^3)))`.

    Args:
        gate: what the GELU is applied to.
        value: what it lets through.
        approximate: ``none`` for the error function, ``tanh`` as T5 v1.1 was trained with.
        backend: ``auto`` takes the fastest that can run.

    Raises:
        ConfigError: ``approximate`` is neither ``none`` nor ``tanh``.
        ShapeError: shapes, dtypes or devices differ, or they are not floating.

    Source:
        Shazeer 2020, eq. 5, arXiv:2002.05202
    """
    if approximate not in ("none", "tanh"):
        raise ConfigError(
            "geglu approximate", got=repr(approximate), want="'none' or 'tanh'", remedy="Pass 'none' for the exact one."
        )
    return gated(gate, value, "gelu" if approximate == "none" else "gelu_tanh", backend=backend)


def swiglu(
    gate: Float[Tensor, "*shape"], value: Float[Tensor, "*shape"], *, backend: Backend = "auto"
) -> Float[Tensor, "*shape"]:
    r"""Gate by SiLU (Swish with :math:`\beta = 1`).

    .. math:: \mathrm{SwiGLU}(g, v) = g\, \sigma(g) \odot v

    Args:
        gate: what the SiLU is applied to.
        value: what it lets through.
        backend: ``auto`` takes the fastest that can run.

    Raises:
        ShapeError: shapes, dtypes or devices differ, or they are not floating.

    Source:
        Shazeer 2020, eq. 5, arXiv:2002.05202
    """
    return gated(gate, value, "silu", backend=backend)


def gated_hidden_dim(dim: int, expansion: float = 4.0, multiple_of: int = 1) -> int:
    r"""Return the hidden width at which three matrices have the parameters of two.

    .. math:: f = m \left\lceil \frac{\max(1, \lfloor \tfrac23 \lfloor k d \rfloor \rfloor)}{m} \right\rceil

    A plain layer of width :math:`k d` has :math:`2 k d^2` weights, a gated one of
    width :math:`f` has :math:`3 d f`; equal at :math:`f = \tfrac23 k d`.

    Args:
        dim: features, ``d``.
        expansion: what the plain layer would be widened by, ``k``.
        multiple_of: round up to a multiple of this, for the sake of the hardware.

    Raises:
        ConfigError: a size is not a positive integer, or ``expansion`` is not positive.

    Source:
        Shazeer 2020, section 2, arXiv:2002.05202; Touvron et al. 2023, section 2.2, arXiv:2302.13971

    Example:
        >>> gated_hidden_dim(4096, multiple_of=256)  # LLaMA 7B
        11008
    """
    check_size("gated_hidden_dim", "dim", dim)
    check_positive("gated_hidden_dim", "expansion", expansion)
    check_size("gated_hidden_dim", "multiple_of", multiple_of)
    width = max(1, int(2 * int(expansion * dim) / 3))
    return multiple_of * math.ceil(width / multiple_of)


def activation_name(activation: Gate) -> str:
    """The unit that an activation makes, for messages."""
    names = {"sigmoid": "glu", "relu": "reglu", "gelu": "geglu", "gelu_tanh": "geglu", "silu": "swiglu"}
    return names[activation]


def check_gate(op: str, activation: str) -> None:
    """Refuse an activation that is no gate here.

    Raises:
        ConfigError: it is not one of ``GATES``.
    """
    if activation not in GATES:
        raise ConfigError(f"{op} activation", got=repr(activation), want=f"one of {GATES}", remedy="Pass 'silu'.")


def _check(activation: str, gate: Tensor, value: Tensor) -> None:
    check_gate("gated", activation)
    check_floating("gated", gate, value)
    for what in ("shape", "dtype", "device"):
        mine, other = getattr(gate, what), getattr(value, what)
        if mine != other:
            raise ShapeError(
                f"gated {what}",
                got=f"gate {_plain(mine)}, value {_plain(other)}",
                want="the same for both",
                remedy="Both are projections of one input to one width; a gate that broadcasts is a lost axis.",
            )


def _plain(fact: object) -> object:
    return tuple(fact) if isinstance(fact, torch.Size) else fact


def _of_torch(x: Tensor, activation: str) -> Tensor:
    if activation.startswith("gelu"):
        return F.gelu(x, approximate="tanh" if activation == "gelu_tanh" else "none")
    if activation == "relu":
        return F.relu(x)
    return torch.sigmoid(x) if activation == "sigmoid" else F.silu(x)


def _written_out(x: Tensor, activation: str) -> Tensor:
    if activation == "relu":
        return torch.where(x <= 0, 0, x)  # slope 0 at 0, as everywhere; NaN passes
    if activation == "gelu":
        return 0.5 * x * (1 + torch.erf(x / math.sqrt(2)))
    if activation == "gelu_tanh":
        return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
    return torch.sigmoid(x) if activation == "sigmoid" else x * torch.sigmoid(x)


def _candidates(backend: Backend, gate: Tensor, value: Tensor) -> dict[Resolved, str | None]:
    # By bytes the kernel wins on a GPU, 3e + 5e against 5e + 9e in eager torch.  But no GPU has run it, neither for
    # time nor for correctness, and inside torch.compile Inductor fuses the two operations itself: torch first.
    able: dict[Resolved, str | None] = {"torch": None, "triton": "a reason to prefer it: torch's own can run"}
    if gate.dtype == torch.float64:
        able["triton"] = "float16, bfloat16 or float32: the kernel computes in float32"
    elif backend == "triton":
        able["triton"] = needs_for_triton(gate, value)
    able["reference"] = None
    return able
