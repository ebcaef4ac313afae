"""Linear and bilinear maps: one weighted sum for each output.

Both are contractions.  A linear map sums over the features of one vector, a bilinear
map over all pairs of features of two; with one of the two held fixed it is linear in
the other.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from einops import einsum
from jaxtyping import Float
from torch import Tensor

from handbook_src.check import check_features, check_floating
from handbook_src.dispatch import Backend, Resolved, resolve
from handbook_src.errors import ShapeError
from handbook_src.operation import operation
from handbook_src.precision import at_least_float32

#: Largest intermediate, in numbers, for which ``bilinear`` contracts all outputs at once: 64 MB of float32.
AT_ONCE = 2**24


@operation(widens="input weight bias")
def linear(
    input: Float[Tensor, "*lead d"],
    weight: Float[Tensor, "f d"],
    bias: Float[Tensor, " f"] | None = None,
    *,
    backend: Backend = "auto",
) -> Float[Tensor, "*lead f"]:
    r"""Weigh and sum the features, once for each output, and add a bias.

    .. math:: y_i = \sum_{j=1}^{d} W_{ij}\, x_j + b_i, \qquad \text{that is}\quad y = x W^\top + b

    The reference multiplies half-precision inputs in float32 and rounds once, at the end.

    Args:
        input: activations; any leading axes, each treated alone.
        weight: one row for each output.
        bias: one number for each output.
        backend: ``auto`` is torch's own operation, a single fused product and sum.

    Raises:
        ShapeError: the features, ``weight`` or ``bias`` do not fit each other, or share no dtype and device.

    Source:
        Rosenblatt 1958, doi:10.1037/h0042519; layers of it trained by back-propagation:
        Rumelhart, Hinton & Williams 1986, eq. 1, doi:10.1038/323533a0
    """
    y = einsum(input, weight, "... d, f d -> ... f")  # y_f = sum_d w_fd x_d
    return y if bias is None else y + bias  # + b_f


@linear.refuses
def _(input: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    check_linear("linear", input, weight, bias)


@linear.torch()
def _(input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return F.linear(input, weight, bias)


def bilinear(
    input1: Float[Tensor, "*lead d1"],
    input2: Float[Tensor, "*lead d2"],
    weight: Float[Tensor, "f d1 d2"],
    bias: Float[Tensor, " f"] | None = None,
    *,
    backend: Backend = "auto",
) -> Float[Tensor, "*lead f"]:
    r"""Weigh and sum all products of one feature of each input, once for each output.

    .. math:: y_k = \sum_{i=1}^{d_1} \sum_{j=1}^{d_2} x_i\, W_{kij}\, z_j + b_k = x^\top W_k\, z + b_k

    The reference forms :math:`x^\top W_k` for all outputs at once, in one matrix product,
    which holds ``f d2`` numbers for each sample; torch's operation goes from output to output.
    On CPUs the first takes a fifth to a half of the time, forward and backward
    (``d`` from 8 to 128, batch from 1 to 256), so ``auto`` takes it while it is small.

    Args:
        input1: the left vectors; any leading axes, each treated alone.
        input2: the right vectors, with the same leading axes.
        weight: one matrix for each output.
        bias: one number for each output.
        backend: ``auto`` is the reference on CPUs up to 64 MB of intermediate, else torch's operation.

    Raises:
        ShapeError: leading axes, features, ``weight`` or ``bias`` do not fit each other, or share no dtype and device.

    Source:
        Tenenbaum & Freeman 2000, section 2, doi:10.1162/089976600300015349
    """
    check_bilinear("bilinear", input1, input2, weight, bias)
    held = input1.shape[:-1].numel() * weight.shape[0] * weight.shape[2]
    order: list[Resolved] = ["torch", "reference"]
    if input1.device.type == "cpu" and held <= AT_ONCE:
        order.reverse()
    if resolve("bilinear", backend, dict.fromkeys(order)) == "torch":
        return F.bilinear(input1, input2, weight, bias)
    x, z, w = (at_least_float32(t) for t in (input1, input2, weight))
    left = einsum(x, w, "... d1, f d1 d2 -> ... f d2")
    y = einsum(left, z, "... f d2, ... d2 -> ... f")
    return (y if bias is None else y + bias).to(input1.dtype)


def check_linear(op: str, input: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    """Check that ``weight`` is a matrix over the input's features and ``bias`` has one entry for each of its rows.

    Raises:
        ShapeError: they do not fit each other, are not floating, or share no dtype and device.
    """
    check_floating(op, input, weight, bias)
    if weight.ndim != 2:
        raise ShapeError(
            f"{op} weight",
            got=tuple(weight.shape),
            want="two axes, (outputs, inputs)",
            remedy="For a single output add its axis, weight[None].",
        )
    check_features(op, input, weight.shape[1])
    check_bias(op, weight, bias)
    check_together(op, input, weight=weight, bias=bias)


def check_bilinear(op: str, input1: Tensor, input2: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    """Check that ``weight`` holds one matrix an output over the features of the two inputs.

    Raises:
        ShapeError: something does not fit, is not floating, or the tensors share no dtype and device.
    """
    check_floating(op, input1, input2, weight, bias)
    if weight.ndim != 3:
        raise ShapeError(
            f"{op} weight",
            got=tuple(weight.shape),
            want="three axes, (outputs, features of input1, features of input2)",
            remedy="For a single output add its axis, weight[None].",
        )
    check_features(op, input1, weight.shape[1], name="input1")
    check_features(op, input2, weight.shape[2], name="input2")
    if input1.shape[:-1] != input2.shape[:-1]:
        raise ShapeError(
            f"{op} leading axes",
            got=f"{tuple(input1.shape)} and {tuple(input2.shape)}",
            want="the same axes before the features",
            remedy="Expand one input to the other's leading axes; nothing is broadcast here.",
        )
    check_bias(op, weight, bias)
    check_together(op, input1, input2=input2, weight=weight, bias=bias)


def check_bias(op: str, weight: Tensor, bias: Tensor | None) -> None:
    """Check that ``bias`` has one entry for each output of ``weight``.

    Raises:
        ShapeError: it has another shape; a single number is not broadcast.
    """
    if bias is not None and tuple(bias.shape) != (weight.shape[0],):
        raise ShapeError(
            f"{op} bias",
            got=tuple(bias.shape),
            want=f"{(weight.shape[0],)}, one entry for each output",
            remedy="Pass bias=None for none.",
        )


def check_together(op: str, input: Tensor, **others: Tensor | None) -> None:
    """Check that every tensor is on the input's device and, outside autocast, of its dtype.

    Raises:
        ShapeError: one is not.
    """
    cast = torch.is_autocast_enabled(input.device.type) if input.device.type != "meta" else False
    for name, other in others.items():
        if other is None or (other.device == input.device and (cast or other.dtype == input.dtype)):
            continue
        raise ShapeError(
            f"{op} {name}",
            got=f"{other.dtype} on {other.device}",
            want=f"{input.dtype} on {input.device}, as the input",
            remedy="Move the layer or the input with .to(device, dtype).",
        )
