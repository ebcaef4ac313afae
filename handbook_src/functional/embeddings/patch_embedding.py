"""Images to tokens: each patch, flattened, goes through one linear layer."""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float
from torch import Tensor

from handbook_src.check import as_tuple, check_features, check_floating, check_rank
from handbook_src.dispatch import Backend, resolve
from handbook_src.errors import ShapeError
from handbook_src.functional.convolution.conv import in_float32
from handbook_src.functional.convolution.conv_input import check_alike

_OP = "patch_embedding"


def patchify(
    x: Float[Tensor, "b channels height width"], patch: int | Sequence[int]
) -> Float[Tensor, "b patches pixels"]:
    """Cut images into patches, row by row, each flattened as channels, then rows, then columns.

    Raises:
        ConfigError: ``patch`` is no positive size, or other than one or two.
        ShapeError: not four axes, or sides that the patch does not divide.
    """
    check_rank(_OP, x, (4,), "(batch, channels, height, width)")
    p, q = as_tuple("patchify", "patch", patch, 2)
    check_sides(x, (p, q))
    return rearrange(x, "b c (rows p) (columns q) -> b (rows columns) (c p q)", p=p, q=q)


def patch_embedding(
    x: Float[Tensor, "b channels height width"],
    weight: Float[Tensor, "d channels p q"],
    bias: Float[Tensor, " d"] | None = None,
    *,
    backend: Backend = "auto",
) -> Float[Tensor, "b patches d"]:
    r"""Map every patch of an image to a vector by one shared linear layer.

    .. math:: y_n = W\, \operatorname{vec}(x^{(n)}) + b

    A convolution whose stride is its kernel size is the same sum (torch's way); patches
    are numbered row by row. Half precision: the reference multiplies in float32 and rounds once.

    Args:
        x: images.
        weight: in a convolution's layout, so that checkpoints fit; its last axes are the patch.
        bias: one shift for each feature.
        backend: ``reference`` cuts and multiplies, ``torch`` is the strided convolution.

    Raises:
        ShapeError: sides that the patch does not divide, another channel count, another rank, not floating,
            mixed dtypes, a weight without entries.

    Source:
        Dosovitskiy et al. 2020, eq. 1, arXiv:2010.11929
    """
    check_floating(_OP, x, weight, bias)
    check_rank(_OP, x, (4,), "(batch, channels, height, width)")
    check_rank(f"{_OP} weight", weight, (4,), "(features, channels, patch height, patch width)")
    check_alike(_OP, x, weight, bias)
    if 0 in weight.shape:
        raise ShapeError(f"{_OP} weight", got=tuple(weight.shape), want="no empty axis", remedy="A patch has a pixel.")
    check_features(_OP, x, weight.shape[1], axis=1)
    if bias is not None and tuple(bias.shape) != (weight.shape[0],):
        raise ShapeError(
            f"{_OP} bias", got=tuple(bias.shape), want=f"{(weight.shape[0],)}", remedy="One entry for each feature."
        )
    patch = (weight.shape[2], weight.shape[3])
    check_sides(x, patch)
    if resolve(_OP, backend, {"torch": None, "reference": None}) == "torch":
        return F.conv2d(x, weight, bias, stride=patch).flatten(2).transpose(1, 2)
    return in_float32(_cut_and_multiply, x, weight, bias)


def _cut_and_multiply(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    y = patchify(x, weight.shape[2:]) @ weight.flatten(1).T
    return y if bias is None else y + bias


def check_sides(x: Tensor, patch: tuple[int, int]) -> None:
    """Check that the patch tiles the image.

    Raises:
        ShapeError: a rest would be cut off.
    """
    height, width = x.shape[-2:]
    if min(height, width) < 1 or height % patch[0] or width % patch[1]:
        raise ShapeError(
            f"{_OP} image",
            got=f"{height} x {width}",
            want=f"positive multiples of the patch, {patch[0]} x {patch[1]}",
            remedy="Resize, crop or pad the image; a rest would be dropped without a word.",
        )
