"""Linear maps whose weight is mostly zeros, in the three forms it is stored in.

==============  =======================================  ====================================
form            what is stored                           what it saves
==============  =======================================  ====================================
mask            the dense weight and one flag for each   nothing: zeros are multiplied as well
CSR             the kept values, one column number each  both, where few enough are kept
2:4             two of each four values, two bits each   memory; time on GPUs that skip the zeros
==============  =======================================  ====================================
"""

from __future__ import annotations

import warnings
from functools import cache

import torch
from einops import rearrange
from jaxtyping import Bool, Float, UInt8
from torch import Tensor

from handbook_src.check import check_features, check_floating
from handbook_src.dispatch import Backend
from handbook_src.errors import ConfigError, ShapeError
from handbook_src.functional.foundations.linear import check_bias, check_linear, check_together, linear
from handbook_src.precision import at_least_float32

Packed = tuple[Float[Tensor, "f half"], UInt8[Tensor, "f bytes"]]


def sparse_linear(
    input: Float[Tensor, "*lead d"],
    weight: Float[Tensor, "f d"],
    mask: Bool[Tensor, "f d"],
    bias: Float[Tensor, " f"] | None = None,
    *,
    backend: Backend = "auto",
) -> Float[Tensor, "*lead f"]:
    r"""Weigh and sum the features through the weights that ``mask`` keeps.

    .. math:: y = x\, (W \odot M)^\top + b, \qquad
        \frac{\partial L}{\partial W} = \Big(\frac{\partial L}{\partial y}\Big)^{\!\top} x \odot M

    Removed weights are replaced by zero rather than multiplied with it: a NaN or infinity
    among them stays out, and their gradient is exactly zero.

    Args:
        input: activations; any leading axes.
        weight: one row for each output.
        mask: True where a weight is kept.
        bias: one number for each output.
        backend: who runs the product, as in :func:`handbook_src.functional.linear`.

    Raises:
        ShapeError: the features, ``weight``, ``mask`` or ``bias`` do not fit each other.

    Source:
        Hoefler et al. 2021, section 2, arXiv:2102.00554
    """
    check_linear("sparse_linear", input, weight, bias)
    return linear(input, masked("sparse_linear", weight, mask), bias, backend=backend)


def masked(op: str, weight: Float[Tensor, "f d"], mask: Bool[Tensor, "f d"]) -> Float[Tensor, "f d"]:
    """Return ``weight`` with zeros where ``mask`` is False.

    Raises:
        ShapeError: ``mask`` is not boolean, or has another shape or device.
    """
    check_mask(op, mask, tuple(weight.shape))
    if mask.device != weight.device:
        raise ShapeError(
            f"{op} mask", got=mask.device, want=f"{weight.device}, as the weight", remedy="Move it with .to(device)."
        )
    return torch.where(mask, weight, weight.new_zeros(()))


def check_mask(op: str, mask: Tensor, shape: tuple[int, ...]) -> None:
    """Check that ``mask`` is boolean and of ``shape``.

    Raises:
        ShapeError: it is not.
    """
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool or tuple(mask.shape) != shape:
        got = f"{mask.dtype}, {tuple(mask.shape)}" if isinstance(mask, Tensor) else type(mask).__name__
        raise ShapeError(
            f"{op} mask",
            got=got,
            want=f"torch.bool, {shape}, one flag for each weight",
            remedy="Build it by comparison, for instance weight.abs() > 0.01.",
        )


def magnitude_mask(
    weight: Float[Tensor, "f d"], amount: float, mask: Bool[Tensor, "f d"] | None = None
) -> Bool[Tensor, "f d"]:
    r"""Keep all but the ``amount`` of the weights that are smallest in magnitude.

    .. math:: M_{ij} = 1 \iff |W_{ij}| \text{ is among the largest } n - \mathrm{round}(\text{amount} \cdot n)

    Exactly so many go, ties included; what ``mask`` has removed before goes first and never
    comes back, also where that is more than ``amount``.

    Args:
        weight: the weights to rank.
        amount: the share of all ``n`` weights to remove, in [0, 1].
        mask: an earlier mask.

    Raises:
        ConfigError: ``amount`` is not a share.
        ShapeError: ``weight`` is not floating, or ``mask`` does not fit.

    Source:
        Han, Pool, Tran & Dally 2015, section 3, arXiv:1506.02626
    """
    check_floating("magnitude_mask", weight)
    check_share("magnitude_mask", "amount", amount)
    size = weight.detach().abs()
    if mask is not None:
        check_mask("magnitude_mask", mask, tuple(weight.shape))
        size = torch.where(mask, size, -1.0)
    smallest = torch.topk(size.flatten(), round(amount * size.numel()), largest=False).indices
    keep = torch.ones(size.numel(), dtype=torch.bool, device=size.device)
    keep = keep.index_fill(0, smallest, False).view(size.shape)
    return keep if mask is None else keep & mask


def check_share(op: str, name: str, value: float) -> None:
    """Refuse a share outside [0, 1].

    Raises:
        ConfigError: it is outside, a boolean, or NaN.
    """
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1:
        raise ConfigError(
            f"{op} {name}", got=repr(value), want="a share from 0 to 1", remedy="0.9 removes nine weights of ten."
        )


def semi_structured_mask(weight: Float[Tensor, "f d"]) -> Bool[Tensor, "f d"]:
    r"""Keep the two largest of each four neighbours along the input axis.

    .. math:: M_{i, 4g + r} = 1 \iff |W_{i, 4g + r}| \text{ is among the two largest of }
        |W_{i, 4g}|, \dots, |W_{i, 4g + 3}|

    Of equal magnitudes the earlier stays.

    Args:
        weight: the weights; inputs a multiple of 4.

    Raises:
        ShapeError: the inputs are no multiple of 4, or ``weight`` is not a floating matrix.

    Source:
        Mishra et al. 2021, section 3, arXiv:2104.08378
    """
    groups = _fours("semi_structured_mask", weight).detach().abs()
    order = groups.argsort(dim=-1, descending=True, stable=True)
    return torch.zeros_like(groups, dtype=torch.bool).scatter_(-1, order[..., :2], True).flatten(1)


def pack_semi_structured(weight: Float[Tensor, "f d"]) -> Packed:
    r"""Store two of each four weights and their places, at half the values plus two bits for each.

    .. math:: v_{i, 2g + k} = W_{i,\, 4g + p_{igk}}, \qquad 0 \le p_{ig0} < p_{ig1} \le 3

    A byte holds the places of four values, two groups, low bits first; an odd last group
    fills half a byte.

    Args:
        weight: at most two nonzeros in each four neighbours; inputs a multiple of 4.

    Raises:
        ShapeError: a group has more than two nonzeros, or the inputs are no multiple of 4.

    Source:
        Mishra et al. 2021, figure 2, arXiv:2104.08378
    """
    groups = _fours("pack_semi_structured", weight)
    crowded = ((groups != 0).sum(-1) > 2).sum()
    if crowded:
        raise ShapeError(
            "pack_semi_structured weight",
            got=f"{int(crowded)} groups of four with more than two nonzeros",
            want="at most two in each",
            remedy="Multiply with semi_structured_mask(weight) first.",
        )
    filled = (groups != 0).to(torch.uint8)
    places = filled.argsort(dim=-1, descending=True, stable=True)[..., :2].sort(-1).values
    values = groups.gather(-1, places).flatten(1)
    nibbles = (places[..., 0] | places[..., 1] << 2).to(torch.uint8)
    if nibbles.shape[1] % 2:
        nibbles = torch.nn.functional.pad(nibbles, (0, 1))
    low, high = rearrange(nibbles, "f (bytes two) -> two f bytes", two=2)
    return values, low | high << 4


def unpack_semi_structured(values: Float[Tensor, "f half"], places: UInt8[Tensor, "f bytes"]) -> Float[Tensor, "f d"]:
    """Return the dense weight that :func:`pack_semi_structured` has stored.

    Raises:
        ShapeError: ``values`` and ``places`` do not belong together.
    """
    groups, rows = values.shape[-1] // 2, values.shape[0]
    fits = values.ndim == 2 and values.shape[1] % 2 == 0 and places.dtype == torch.uint8
    if not fits or tuple(places.shape) != (rows, -(-groups // 2)):
        raise ShapeError(
            "unpack_semi_structured",
            got=f"values {tuple(values.shape)}, places {tuple(places.shape)} of {places.dtype}",
            want="two values for each half byte of torch.uint8 places",
            remedy="Take both from pack_semi_structured.",
        )
    nibbles = torch.stack([places & 15, places >> 4], -1).flatten(1)[:, :groups]
    index = torch.stack([nibbles & 3, nibbles >> 2], -1).long()
    pairs = rearrange(values, "f (groups two) -> f groups two", two=2)
    return values.new_zeros(rows, groups, 4).scatter(-1, index, pairs).flatten(1)


def semi_structured_linear(
    input: Float[Tensor, "*lead d"],
    values: Float[Tensor, "f half"],
    places: UInt8[Tensor, "f bytes"],
    bias: Float[Tensor, " f"] | None = None,
) -> Float[Tensor, "*lead f"]:
    """Unpack a 2:4 weight and multiply: torch has a kernel that skips the zeros for CUDA alone.

    So it costs more time than the dense product; what it saves is the memory that the weight
    takes while it waits.

    Args:
        input: activations; any leading axes.
        values: the kept weights.
        places: where they belong.
        bias: one number for each output.

    Raises:
        ShapeError: the tensors do not fit each other.

    Source:
        Mishra et al. 2021, section 3, arXiv:2104.08378
    """
    return linear(input, unpack_semi_structured(values, places), bias)


def to_csr(weight: Float[Tensor, "f d"]) -> Tensor:
    """Return the nonzeros of ``weight`` in compressed sparse rows, with 32-bit indices.

    64-bit ones, torch's default, would double what a float32 value costs to store and
    read: 12 bytes instead of 8.

    Raises:
        ShapeError: ``weight`` is not a floating matrix.
    """
    check_floating("to_csr", weight)
    if weight.ndim != 2:
        raise ShapeError("to_csr weight", got=tuple(weight.shape), want="two axes", remedy="One row for each output.")
    kept = weight.detach() != 0
    rows = torch.nn.functional.pad(kept.sum(1).cumsum(0), (1, 0))
    columns = kept.nonzero()[:, 1]
    return csr(rows.int(), columns.int(), weight.detach()[kept], tuple(weight.shape))


def csr(rows: Tensor, columns: Tensor, values: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Return the CSR tensor of three arrays, unchecked."""
    _hear_beta_note()
    return torch.sparse_csr_tensor(rows, columns, values, shape, check_invariants=False)


@cache
def _hear_beta_note() -> None:
    """Let torch say, unheard, that CSR is in beta: it says so once, of the first such tensor."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Sparse CSR tensor support is in beta", UserWarning)
        torch.eye(1).to_sparse_csr()


def csr_linear(
    input: Float[Tensor, "*lead d"], weight: Tensor, bias: Float[Tensor, " f"] | None = None
) -> Float[Tensor, "*lead f"]:
    r"""Weigh and sum through the stored weights only, one row after the other.

    .. math:: y_i = \sum_{k = r_i}^{r_{i+1} - 1} v_k\, x_{c_k} + b_i

    with row pointers ``r``, column numbers ``c`` and values ``v``.  The product is formed as
    :math:`(W x^\top)^\top`: torch's ``F.linear`` takes a CSR weight as well, but needs two to
    ten times as long.  Half precision is multiplied in float32.  For inference: the
    gradient reaches ``input`` and ``bias``, not the stored values.

    Args:
        input: activations; any leading axes.
        weight: one row for each output, in CSR, for instance from :func:`to_csr`.
        bias: one number for each output.

    Raises:
        ShapeError: ``weight`` is not in CSR, or something does not fit.

    Source:
        Tinney & Walker 1967, doi:10.1109/PROC.1967.6011; Hoefler et al. 2021, section 2.2, arXiv:2102.00554
    """
    if weight.layout != torch.sparse_csr:
        raise ShapeError("csr_linear weight", got=weight.layout, want="torch.sparse_csr", remedy="Call to_csr first.")
    check_floating("csr_linear", input, weight, bias)
    check_features("csr_linear", input, weight.shape[1])
    check_bias("csr_linear", weight, bias)
    check_together("csr_linear", input, weight=weight, bias=bias)
    if input.is_meta:  # torch multiplies no sparse matrix there
        return input.new_empty(*input.shape[:-1], weight.shape[0])
    x = at_least_float32(input).reshape(-1, input.shape[-1])
    w = weight.detach()
    if w.dtype != x.dtype:
        w = csr(w.crow_indices(), w.col_indices(), w.values().to(x.dtype), tuple(w.shape))
    with torch.autocast(x.device.type, enabled=False):  # it would take the product to a half, which CSR lacks
        y = (w @ x.T).T
    y = y if bias is None else y + bias
    return y.to(input.dtype).view(*input.shape[:-1], weight.shape[0])


def _fours(op: str, weight: Tensor) -> Tensor:
    check_floating(op, weight)
    if weight.ndim != 2 or weight.shape[1] % 4:
        raise ShapeError(
            f"{op} weight",
            got=tuple(weight.shape),
            want="two axes, inputs a multiple of 4",
            remedy="Pad the inputs with zeros to the next multiple of 4.",
        )
    return rearrange(weight, "f (groups four) -> f groups four", four=4)
