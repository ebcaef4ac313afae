"""Linear attention as a layer, with a decoding step of constant cost."""

from __future__ import annotations

from typing import final

import torch
from einops import rearrange
from jaxtyping import Bool, Float
from torch import Tensor

from handbook_src.check import check_size
from handbook_src.errors import ShapeError
from handbook_src.functional.attention.linear_attention import (
    FeatureMap,
    LinearState,
    feature_function,
    linear_attention,
    linear_attention_state,
    linear_attention_step,
)
from handbook_src.functional.attention.mask import Mask
from handbook_src.layers.attention.attention import MultiHeadAttention, with_broken


@final
class LinearAttention(MultiHeadAttention):
    r"""Multi-head attention whose weights are inner products of features: linear in the length.

    .. math::
        y_i = \frac{\phi(q_i)^\top \sum_j \phi(k_j)\, v_j^\top}{\phi(q_i)^\top \sum_j \phi(k_j)}, \qquad
        \phi(x) = \operatorname{elu}(x) + 1

    Each head is :func:`handbook_src.functional.linear_attention`.  Parameters and their
    initialisation are :class:`handbook_src.layers.MultiHeadAttention`'s, state dict included.

    Args:
        dim: features of ``x`` and of the output.
        heads: number of heads.
        kv_dim: features of ``memory``; ``dim`` unless given.
        head_dim: features of a head; ``dim // heads`` unless given.
        bias: whether the four projections have one.
        feature_map: ``elu``, ``relu``, or a function from ``... e`` to ``... f``.
        chunk: positions of a chunk of the causal form.

    Shape:
        ``x`` is ``b t d``, ``memory`` is ``b s kv_dim``, the output is ``b t d``.

    Typical values:
        8 heads of 32 (Katharopoulos et al. 2020, images); chunks of 64 to 256.

    Raises:
        ConfigError: sizes that are not positive, heads that don't divide ``dim``, an unknown feature map.

    Source:
        Katharopoulos et al. 2020, section 3, arXiv:2006.16236
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        *,
        kv_dim: int | None = None,
        head_dim: int | None = None,
        bias: bool = True,
        feature_map: FeatureMap = "elu",
        chunk: int = 64,
    ) -> None:
        check_size("linear attention", "heads", heads)
        check_size("linear attention", "chunk", chunk)
        feature_function(feature_map)
        super().__init__(dim, heads, kv_dim=kv_dim, head_dim=head_dim, bias=bias)
        self.feature_map, self.chunk = feature_map, chunk

    def forward(  # type: ignore[override]
        self,
        x: Float[Tensor, "b t d"],
        memory: Float[Tensor, "b s kv_dim"] | None = None,
        mask: Mask | Bool[Tensor, ...] | None = None,
        causal: bool = False,
        state: LinearState | None = None,
    ) -> Float[Tensor, "b t d"]:
        """Attend from ``x`` to ``memory`` (or to ``x`` itself), and to what ``state`` has summed up before."""
        x, memory, _, broken = self._shielded(x, memory, mask, None, by_key=True)
        q, k, v = self._project(x, memory, None)
        out = linear_attention(
            q, k, v, mask, feature_map=self.feature_map, causal=causal, chunk=self.chunk, state=state
        )
        return with_broken(self.out_proj(rearrange(out, "b t h e -> b t (h e)")), broken)

    def summed(self, x: Float[Tensor, "b t d"], mask: Mask | Bool[Tensor, ...] | None = None) -> LinearState:
        """Return the state after a prompt, which :meth:`step` goes on from."""
        _, k, v = self._project(x, None, None)
        return linear_attention_state(k, v, mask, feature_map=self.feature_map)

    def step(
        self, x: Float[Tensor, "b d"], state: LinearState | None = None
    ) -> tuple[Float[Tensor, "b d"], LinearState]:
        """Decode one position; time and memory do not depend on how many came before."""
        if x.ndim != 2:
            raise ShapeError("decoding step", got=tuple(x.shape), want=f"(b, {self.dim})", remedy="Take x[:, i].")
        q, k, v = (y[:, 0] for y in self._project(x[:, None], None, None))
        out, state = linear_attention_step(state, q, k, v, feature_map=self.feature_map)
        return self.out_proj(out.flatten(1)), state

    def weights(
        self,
        x: Float[Tensor, "b t d"],
        memory: Float[Tensor, "b s kv_dim"] | None = None,
        mask: Mask | Bool[Tensor, ...] | None = None,
        causal: bool = False,
    ) -> Float[Tensor, "b h t s"]:
        """Return each head's weights, which the layer itself never writes out: what it makes of one-hot values."""
        q, k, _ = self._project(x, memory, None)
        b, s, h, _ = k.shape
        one_hot = torch.eye(s, dtype=k.dtype, device=k.device)[None, :, None].expand(b, s, h, s)
        out = linear_attention(q, k, one_hot, mask, feature_map=self.feature_map, causal=causal)
        return rearrange(out, "b t h s -> b h t s")

    def extra_repr(self) -> str:
        return f"{self.dim}, heads={self.heads}, head_dim={self.head_dim}, feature_map={self.feature_map}"
