"""Performer's attention as a layer: softmax attention estimated by random features."""

from __future__ import annotations

import math
from typing import final

import torch
from einops import rearrange
from jaxtyping import Bool, Float
from torch import Tensor

from handbook_src.check import check_size
from handbook_src.errors import ConfigError
from handbook_src.functional.attention.mask import Mask
from handbook_src.functional.attention.performer import KINDS, Kind, performer_attention, random_features
from handbook_src.layers.attention.attention import MultiHeadAttention, with_broken


@final
class PerformerAttention(MultiHeadAttention):
    r"""Multi-head attention whose softmax kernel is estimated by random features (FAVOR+).

    .. math::
        y_i = \frac{\phi(q_i)^\top \sum_j \phi(k_j)\, v_j^\top}{\phi(q_i)^\top \sum_j \phi(k_j)}, \qquad
        \mathbb E\big[\phi(q)^\top \phi(k)\big] = e^{q^\top k / \sqrt e}

    Each head is :func:`handbook_src.functional.performer_attention`.  Parameters are
    :class:`handbook_src.layers.MultiHeadAttention`'s, so the weights of a softmax layer load
    (with ``strict=False``); the directions are a buffer, shared by the heads and saved with the weights.

    Args:
        dim: features of ``x`` and of the output.
        heads: number of heads.
        features: number of random directions; ``e ln e`` of the head size, rounded down, unless given.
        kv_dim: features of ``memory``; ``dim`` unless given.
        head_dim: features of a head; ``dim // heads`` unless given.
        bias: whether the four projections have one.
        kind: ``positive``, ``hyperbolic``, ``trigonometric`` or ``relu``.
        orthogonal: whether the directions of a block stand at right angles.

    Shape:
        ``x`` is ``b t d``, ``memory`` is ``b s kv_dim``, the output is ``b t d``.

    Typical values:
        256 features for heads of 64; redrawn every 1000 steps in the published code.

    Raises:
        ConfigError: sizes that are not positive, heads that don't divide ``dim``, an unknown kind.

    Source:
        Choromanski et al. 2020, section 2, arXiv:2009.14794
    """

    projection: Tensor

    def __init__(
        self,
        dim: int,
        heads: int,
        features: int | None = None,
        *,
        kv_dim: int | None = None,
        head_dim: int | None = None,
        bias: bool = True,
        kind: Kind = "positive",
        orthogonal: bool = True,
    ) -> None:
        check_size("Performer attention", "heads", heads)
        if features is not None:
            check_size("Performer attention", "features", features)
        if kind not in KINDS:
            raise ConfigError(
                "random features kind", got=repr(kind), want=f"one of {list(KINDS)}", remedy="Choose one."
            )
        super().__init__(dim, heads, kv_dim=kv_dim, head_dim=head_dim, bias=bias)
        self.features = max(int(self.head_dim * math.log(self.head_dim)), 1) if features is None else features
        self.kind, self.orthogonal = kind, orthogonal
        self.register_buffer("projection", random_features(self.head_dim, self.features, orthogonal=orthogonal))

    def reset_parameters(self) -> None:
        """Draw the weights as multi-head attention does, and new directions."""
        super().reset_parameters()
        if "projection" in self._buffers:  # not yet while the layer is made
            self.redraw()

    @torch.no_grad()
    def redraw(self, generator: torch.Generator | None = None) -> None:
        """Draw new directions, in place; call it every few hundred steps of training, and not in evaluation.

        Args:
            generator: the stream to draw from; torch's own unless given.
        """
        new = random_features(self.head_dim, self.features, orthogonal=self.orthogonal, generator=generator)
        self.projection.copy_(new)

    def forward(  # type: ignore[override]
        self,
        x: Float[Tensor, "b t d"],
        memory: Float[Tensor, "b s kv_dim"] | None = None,
        mask: Mask | Bool[Tensor, ...] | None = None,
        causal: bool = False,
    ) -> Float[Tensor, "b t d"]:
        """Attend from ``x`` to ``memory`` (or to ``x`` itself)."""
        x, memory, _, broken = self._shielded(x, memory, mask, None, by_key=True)
        out = performer_attention(*self._project(x, memory, None), self.projection, mask, kind=self.kind, causal=causal)
        return with_broken(self.out_proj(rearrange(out, "b t h e -> b t (h e)")), broken)

    def weights(
        self,
        x: Float[Tensor, "b t d"],
        memory: Float[Tensor, "b s kv_dim"] | None = None,
        mask: Mask | Bool[Tensor, ...] | None = None,
        causal: bool = False,
    ) -> Float[Tensor, "b h t s"]:
        """Return each head's estimated weights, which the layer itself never writes out."""
        q, k, _ = self._project(x, memory, None)
        b, s, h, _ = k.shape
        one_hot = torch.eye(s, dtype=k.dtype, device=k.device)[None, :, None].expand(b, s, h, s)
        out = performer_attention(q, k, one_hot, self.projection, mask, kind=self.kind, causal=causal)
        return rearrange(out, "b t h s -> b h t s")

    def extra_repr(self) -> str:
        sizes = f"{self.dim}, heads={self.heads}, features={self.features}, head_dim={self.head_dim}"
        return f"{sizes}, kind={self.kind}, orthogonal={self.orthogonal}"
