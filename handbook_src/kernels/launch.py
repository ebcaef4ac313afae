"""What every kernel's launcher needs before it launches: checks, rows, and the size of the GPU."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping

import torch
from torch import Tensor

from handbook_src.dispatch import needs_for_triton
from handbook_src.errors import KernelUnavailable, ShapeError

#: Threads of a warp: 64 on AMD's CDNA; a program has at most 1024 threads on either.
LANES = 64 if torch.version.hip else 32


def as_rows(x: Tensor) -> Tensor:
    """Return ``x`` as rows whose last axis is contiguous; a view wherever one exists."""
    rows = x.reshape(math.prod(x.shape[:-1]), x.shape[-1])
    return rows if rows.stride(1) == 1 or rows.shape[1] == 1 else rows.contiguous()


def packed(values: Tensor | None) -> Tensor | None:
    """Return one value per feature at stride 1, as kernels read them."""
    return None if values is None else values.contiguous()


def multiprocessors(x: Tensor) -> int:
    """Return how many programs run at the same time at least; 3 under the interpreter, so that partials are several."""
    return torch.cuda.get_device_properties(x.device).multi_processor_count if x.is_cuda else 3


def check_tensors(
    op: str,
    x: Tensor,
    dtypes: Collection[torch.dtype],
    *,
    like_x: Mapping[str, Tensor | None],
    per_feature: Mapping[str, Tensor | None],
) -> None:
    """Refuse what the kernel would read wrongly.

    Args:
        op: the operation's name, for the message.
        x: the activations.
        dtypes: the dtypes the kernel takes.
        like_x: tensors that must have ``x``'s shape.
        per_feature: tensors with one value per feature.

    Raises:
        KernelUnavailable: a tensor is where no kernel can run.
        ShapeError: a shape, device or dtype does not fit.
    """
    tensors = {"x": x, **like_x, **per_feature}
    missing = needs_for_triton(*tensors.values())
    if missing is not None:
        raise KernelUnavailable(op, got=f"a tensor on {x.device}", want=missing, remedy="Use backend='auto'.")
    if x.ndim == 0 or x.shape[-1] == 0:
        raise ShapeError("x", got=tuple(x.shape), want="a last axis of one feature or more", remedy="Check the input.")
    for name, tensor in tensors.items():
        want = x.shape[-1:] if name in per_feature else x.shape
        if tensor is None:
            continue
        if tensor.shape != want:
            raise ShapeError(name, got=tuple(tensor.shape), want=str(tuple(want)), remedy=f"x is {tuple(x.shape)}.")
        if tensor.device != x.device:
            raise ShapeError(name, got=tensor.device, want=str(x.device), remedy=f"Move {name} beside x.")
        if tensor.dtype not in dtypes:
            raise ShapeError(name, got=tensor.dtype, want=f"one of {dtypes}", remedy="Use backend='reference'.")


def family(x: Tensor) -> str:
    """Return whose tiles suit a GPU: ``hopper``, ``blackwell`` (227 KB), ``ampere`` (163), ``amd``, ``small``."""
    if torch.version.hip:
        return "amd"
    if not x.is_cuda:
        return "hopper"
    major, minor = torch.cuda.get_device_capability(x.device)
    if major in (9, 10):
        return "hopper" if major == 9 else "blackwell"
    return "ampere" if (major, minor) == (8, 0) else "small"


def check_runs(
    op: str, tensors: Mapping[str, Tensor | None], dtypes: Collection[torch.dtype], *, heads: tuple[str, ...], most: int
) -> None:
    """Refuse what an attention kernel would read wrongly.

    Args:
        op: the operation's name, for the message.
        tensors: everything the kernel reads, the one that says where first.
        dtypes: the dtypes the kernel takes.
        heads: names of the tensors whose last axis is a head's features.
        most: the widest head.

    Raises:
        KernelUnavailable: a tensor is where no kernel can run.
        ShapeError: a device, dtype or width does not fit.
    """
    first = next(x for x in tensors.values() if x is not None)
    missing = needs_for_triton(*tensors.values())
    if missing is not None:
        raise KernelUnavailable(op, got=f"a tensor on {first.device}", want=missing, remedy="Use backend='auto'.")
    for name, x in tensors.items():
        if x is None:
            continue
        if x.device != first.device:
            raise ShapeError(f"{op} {name}", got=x.device, want=str(first.device), remedy="Move it beside the others.")
        if x.is_floating_point() and x.dtype not in dtypes:
            raise ShapeError(f"{op} {name}", got=x.dtype, want=f"one of {dtypes}", remedy="Use backend='reference'.")
        if name in heads and not 0 < x.shape[-1] <= most:
            want = f"1 to {most} features a head"
            raise ShapeError(f"{op} {name}", got=tuple(x.shape), want=want, remedy="Use backend='reference'.")
