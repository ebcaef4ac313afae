"""Attention through a small array of latents, whose size does not depend on the input's."""

from __future__ import annotations

from typing import Any, final

import torch
from jaxtyping import Float
from torch import Tensor, nn

from handbook_src.check import (
    check_features,
    check_floating,
    check_one_dtype,
    check_parameter_dtype,
    check_probability,
    check_rank,
    check_size,
)
from handbook_src.errors import ConfigError
from handbook_src.functional.attention.attention import MaskLike
from handbook_src.layers.attention.attention import CrossAttention, SelfAttention, shield_padding
from handbook_src.layers.foundations.mlp import MLP
from handbook_src.layers.normalisation.norm import LayerNorm


@final
class LatentCrossAttention(nn.Module):
    r"""Queries read a memory of any size: pre-norm cross-attention, then a feed-forward network.

    .. math::
        Z' = Z + \operatorname{CrossAttend}(\operatorname{norm}(Z), \operatorname{norm}(X)), \qquad
        Z'' = Z' + \operatorname{MLP}(\operatorname{norm}(Z'))

    The attention is :func:`handbook_src.functional.scaled_dot_product_attention` with ``m`` queries and
    ``n`` keys: :math:`m n` scores.  It encodes (latents read the input) and decodes (output queries read the latents).

    Args:
        dim: features of the queries and of the output.
        kv_dim: features of the memory.
        heads: number of heads.
        widening: hidden width of the feed-forward network, in multiples of ``dim``.
        dropout: share of the attention weights dropped in training.
        residual: add the queries to what they read; a decoder whose queries are only positions leaves it out.
        device: of the parameters.
        dtype: of the parameters.

    Shape:
        ``b m dim`` and ``b n kv_dim`` to ``b m dim``.

    Typical values:
        one head, ``widening=1`` (Perceiver on ImageNet); 8 heads in Perceiver IO for text.

    Raises:
        ConfigError: sizes that are not positive integers, heads that don't divide, ``dropout`` outside [0, 1).
        ShapeError: queries or memory of another rank or width, a mask that doesn't fit.

    Source:
        Jaegle et al. 2021, section 3.1, arXiv:2103.03206; Perceiver IO, section 3.1 and appendix E, arXiv:2107.14795
    """

    def __init__(
        self,
        dim: int,
        kv_dim: int,
        heads: int = 1,
        *,
        widening: int = 1,
        dropout: float = 0.0,
        residual: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        for name, size in (("dim", dim), ("kv_dim", kv_dim), ("heads", heads), ("widening", widening)):
            check_size("LatentCrossAttention", name, size)
        check_parameter_dtype("LatentCrossAttention", dtype)
        check_probability("LatentCrossAttention", "dropout", dropout)
        like = {"device": device, "dtype": dtype}
        self.dim, self.kv_dim, self.residual = dim, kv_dim, residual
        self.norm_q, self.norm_kv, self.norm_mlp = (LayerNorm(n, **like) for n in (dim, kv_dim, dim))
        self.attention = CrossAttention(dim, kv_dim, heads, dropout=dropout).to(**like)
        self.mlp = MLP(dim, widening * dim, **like)

    def reset_parameters(self) -> None:
        """Draw all weights anew."""
        for part in (self.norm_q, self.norm_kv, self.norm_mlp, self.attention, self.mlp):
            part.reset_parameters()

    def forward(
        self, z: Float[Tensor, "b m d"], x: Float[Tensor, "b n kv_dim"], mask: MaskLike | None = None
    ) -> Float[Tensor, "b m d"]:
        """Read ``x``; ``mask`` is most often ``padding(lengths)``."""
        check_memory("LatentCrossAttention", z, self.dim, "queries", self.norm_q.weight)
        check_memory("LatentCrossAttention", x, self.kv_dim, "memory", self.norm_q.weight)
        if len(x) == len(z):  # before the norm, whose weights would get the NaN
            x, mask, _ = shield_padding(x, mask, z.shape[1], self.attention.heads)
        read = self.attention(self.norm_q(z), self.norm_kv(x), mask)
        z = z + read if self.residual else read
        out: Tensor = z + self.mlp(self.norm_mlp(z))
        return out

    def extra_repr(self) -> str:
        return f"residual={self.residual}"


@final
class LatentSelfAttention(nn.Module):
    r"""One pre-norm Transformer block on the latents.

    .. math::
        Z' = Z + \operatorname{SelfAttend}(\operatorname{norm}(Z)), \qquad
        Z'' = Z' + \operatorname{MLP}(\operatorname{norm}(Z'))

    :math:`m^2` scores, whatever the size of the input.

    Args:
        dim: features.
        heads: number of heads.
        widening: hidden width of the feed-forward network, in multiples of ``dim``.
        dropout: share of the attention weights dropped in training.
        device: of the parameters.
        dtype: of the parameters.

    Shape:
        ``b m dim`` to ``b m dim``.

    Typical values:
        8 heads, ``widening=1``, 6 blocks (Perceiver on ImageNet).

    Raises:
        ConfigError: sizes that are not positive integers, heads that don't divide, ``dropout`` outside [0, 1).
        ShapeError: an input of another rank or width.

    Source:
        Jaegle et al. 2021, section 3.1, arXiv:2103.03206
    """

    def __init__(
        self,
        dim: int,
        heads: int = 8,
        *,
        widening: int = 1,
        dropout: float = 0.0,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        for name, size in (("dim", dim), ("heads", heads), ("widening", widening)):
            check_size("LatentSelfAttention", name, size)
        check_parameter_dtype("LatentSelfAttention", dtype)
        check_probability("LatentSelfAttention", "dropout", dropout)
        like = {"device": device, "dtype": dtype}
        self.dim = dim
        self.norm, self.norm_mlp = LayerNorm(dim, **like), LayerNorm(dim, **like)
        self.attention = SelfAttention(dim, heads, dropout=dropout).to(**like)
        self.mlp = MLP(dim, widening * dim, **like)

    def reset_parameters(self) -> None:
        """Draw all weights anew."""
        for part in (self.norm, self.norm_mlp, self.attention, self.mlp):
            part.reset_parameters()

    def forward(self, z: Float[Tensor, "b m d"]) -> Float[Tensor, "b m d"]:
        check_memory("LatentSelfAttention", z, self.dim, "latents", self.norm.weight)
        z = z + self.attention(self.norm(z))
        out: Tensor = z + self.mlp(self.norm_mlp(z))
        return out


@final
class PerceiverAttention(nn.Module):
    r"""A small learned array reads an input of any size, and thinks about it on its own.

    .. math:: Z_0 = L, \qquad Z_{i+1} = \operatorname{SelfAttend}^{\,depth}\big(\operatorname{CrossAttend}(Z_i, X)\big)

    ``L`` is ``m`` learned latents.  Reading costs :math:`m n` scores, thinking :math:`m^2`, and the output has ``m``
    rows whatever ``n``.  The input has no order here: give it positions as features.  With ``repeats`` the latents read
    again; ``shared`` repeats use one set of weights after the first reading, as in a recurrent network.

    Args:
        latents: their number, ``m``.
        dim: features of a latent.
        input_dim: features of the input.
        heads: of the latents' self-attention; the reading has one head.
        depth: self-attention blocks after each reading; 0 only reads.
        repeats: how often the input is read.
        shared: whether readings after the first, and all self-attention blocks, share their weights.
        device: of the parameters.
        dtype: of the parameters.

    Shape:
        ``b n input_dim`` to ``b latents dim``.

    Typical values:
        512 latents of 1024, ``depth=6``, ``repeats=8``, ``heads=8`` for ImageNet's 50 176 pixels.

    Raises:
        ConfigError: sizes that are not positive integers, heads that don't divide.
        ShapeError: an input of another rank or width, a mask that doesn't fit.

    Source:
        Jaegle et al. 2021, sections 3.1 and 3.2, arXiv:2103.03206
    """

    def __init__(
        self,
        latents: int,
        dim: int,
        input_dim: int,
        heads: int = 1,
        *,
        depth: int = 0,
        repeats: int = 1,
        shared: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        sizes = (("latents", latents), ("dim", dim), ("input_dim", input_dim), ("heads", heads), ("repeats", repeats))
        for name, size in sizes:
            check_size("PerceiverAttention", name, size)
        check_parameter_dtype("PerceiverAttention", dtype)
        check_size("PerceiverAttention", "depth", depth, least=0)
        if dim % heads:
            got = f"{heads} for dim {dim}"
            raise ConfigError("PerceiverAttention heads", got=got, want="a divisor of dim", remedy="Share dim evenly.")
        like = {"device": device, "dtype": dtype}
        self.input_dim, self.repeats = input_dim, repeats
        self.latents = nn.Parameter(torch.empty(latents, dim, **like))
        reads, thinks = (min(repeats, 2), 1) if shared else (repeats, repeats)
        self.read = nn.ModuleList(LatentCrossAttention(dim, input_dim, **like) for _ in range(reads))
        self.think = nn.ModuleList(
            nn.Sequential(*(LatentSelfAttention(dim, heads, **like) for _ in range(depth))) for _ in range(thinks)
        )
        nn.init.trunc_normal_(self.latents, std=0.02, a=-2.0, b=2.0)

    def reset_parameters(self) -> None:
        """Draw the latents (normal, 0.02, cut at 2, as in the paper) and all other weights anew."""
        nn.init.trunc_normal_(self.latents, std=0.02, a=-2.0, b=2.0)
        for part in self.modules():
            if isinstance(part, LatentCrossAttention | LatentSelfAttention):
                part.reset_parameters()

    def forward(self, x: Float[Tensor, "b n input_dim"], mask: MaskLike | None = None) -> Float[Tensor, "b m d"]:
        """Read ``x``; ``mask`` is most often ``padding(lengths)``."""
        check_memory("PerceiverAttention", x, self.input_dim, "input", self.latents)
        z = self.latents.expand(x.shape[0], -1, -1)
        for i in range(self.repeats):
            z = self.read[min(i, len(self.read) - 1)](z, x, mask)
            z = self.think[min(i, len(self.think) - 1)](z)
        return z

    def extra_repr(self) -> str:
        return f"latents={tuple(self.latents.shape)}, input_dim={self.input_dim}, repeats={self.repeats}"


def check_memory(op: str, x: Tensor, features: int, name: str, weight: Tensor | None) -> None:
    """Refuse an array that is not ``b n features`` or not of the weights' dtype."""
    check_rank(op, x, (3,), "(batch, positions, features)")
    check_features(op, x, features, name=name)
    check_floating(op, x)
    kind = x.device.type if torch.amp.is_autocast_available(x.device.type) else "cpu"
    if weight is not None and not torch.is_autocast_enabled(kind):
        check_one_dtype(op, weight, x)
