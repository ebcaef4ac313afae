"""The first layer of a Vision Transformer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, final

import torch
from jaxtyping import Float
from torch import Tensor, nn

from handbook_src.check import as_tuple, check_features, check_rank, check_size
from handbook_src.dispatch import Backend
from handbook_src.errors import ShapeError
from handbook_src.functional.embeddings import patch_embedding as maths


@final
class PatchEmbedding(nn.Module):
    r"""Images to one vector a patch: see :func:`handbook_src.functional.patch_embedding`.

    The names of the state dict are timm's (``proj.weight``, ``proj.bias``). The class token and the positions are
    not part of it. Weights start as torch's convolution does.

    Args:
        image_size: refuse images of another size; None takes every size that the patch divides.
        patch_size: sides of a patch; one number for a square.
        in_channels: channels of the image.
        dim: features of a patch's vector.
        bias: whether there is one.
        device: of the parameters.
        dtype: of the parameters.
        backend: who runs it.

    Shape:
        ``b in_channels height width`` to ``b (height/p * width/q) dim``.

    Typical values:
        16 x 16 patches of 224 x 224 images: 196 tokens (ViT-B/16); 14 in ViT-H/14, 32 in ViT-B/32; no bias in CLIP.

    Raises:
        ConfigError: a size that is not positive.
        ShapeError: an image of another size, or one that the patch does not divide; other channels or rank.

    Source:
        Dosovitskiy et al. 2020, eq. 1, arXiv:2010.11929
    """

    def __init__(
        self,
        image_size: int | Sequence[int] | None = None,
        patch_size: int | Sequence[int] = 16,
        in_channels: int = 3,
        dim: int = 768,
        *,
        bias: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
        backend: Backend = "auto",
    ) -> None:
        super().__init__()
        check_size("PatchEmbedding", "in_channels", in_channels)
        check_size("PatchEmbedding", "dim", dim)
        height, width = as_tuple("PatchEmbedding", "patch_size", patch_size, 2)
        self.patch_size = (height, width)
        self.image_size = None if image_size is None else as_tuple("PatchEmbedding", "image_size", image_size, 2)
        if self.image_size is not None:
            maths.check_sides(torch.empty(*self.image_size, device="meta"), self.patch_size)
        self.backend = backend
        self.proj = nn.Conv2d(in_channels, dim, self.patch_size, self.patch_size, bias=bias, device=device, dtype=dtype)

    def reset_parameters(self) -> None:
        """Draw as torch's convolution does."""
        self.proj.reset_parameters()

    @property
    def num_patches(self) -> int | None:
        """Tokens of an image; None where the image size was left open."""
        if self.image_size is None:
            return None
        return (self.image_size[0] // self.patch_size[0]) * (self.image_size[1] // self.patch_size[1])

    def forward(self, x: Float[Tensor, "b channels height width"]) -> Float[Tensor, "b patches d"]:
        check_rank("PatchEmbedding", x, (4,), "(batch, channels, height, width)")
        check_features("PatchEmbedding", x, self.proj.in_channels, axis=1)
        if self.image_size is not None and tuple(x.shape[2:]) != self.image_size:
            raise ShapeError(
                "PatchEmbedding image",
                got=tuple(x.shape[2:]),
                want=f"{self.image_size}, as the layer was built",
                remedy="Resize the image, or build the layer with image_size=None.",
            )
        return maths.patch_embedding(x, self.proj.weight, self.proj.bias, backend=self.backend)

    def extra_repr(self) -> str:
        return f"image_size={self.image_size}, patch_size={self.patch_size}"
