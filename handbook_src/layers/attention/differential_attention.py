"""Differential attention as a layer."""

from __future__ import annotations

from typing import final

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from handbook_src.check import check_features, check_parameter_dtype, check_rank, check_size
from handbook_src.errors import ConfigError
from handbook_src.functional.attention.attention import MaskLike, attention_weights
from handbook_src.functional.attention.differential_attention import (
    differential_attention,
    differential_lambda,
    differential_lambda_init,
)
from handbook_src.functional.positions.rope import apply_rope
from handbook_src.layers.attention.attention import check_ahead, check_input, shield_padding, with_broken
from handbook_src.layers.attention.kv_cache import KVCache
from handbook_src.layers.normalisation.norm import RMSNorm
from handbook_src.layers.positions.rope import RotaryEmbedding
from handbook_src.precision import statistic_dtype


@final
class DifferentialAttention(nn.Module):
    r"""Heads that subtract a second attention map from the first, each normalised on its own.

    .. math::
        \operatorname{head}_i = (1 - \lambda_{\text{init}})\,
        \operatorname{RMSNorm}\big(\operatorname{DiffAttn}(X W^Q_i, X W^K_i, X W^V_i)\big), \qquad
        Y = [\operatorname{head}_1; \dots; \operatorname{head}_h]\, W^O

    The maps meet in :func:`handbook_src.functional.differential_attention`,
    under one :func:`handbook_src.functional.differential_lambda` a layer.
    The norm's gain is one vector for all heads.  A head has two queries and keys of ``head_dim`` features
    and a value of twice as many: with half as many heads as multi-head attention, the same parameters.

    Args:
        dim: features of ``x`` and of the output.
        heads: number of heads, each of two maps.
        kv_heads: number of value heads, a divisor of ``heads``; ``heads`` unless given.
        layer: number of the layer in its stack, from one; sets :math:`\lambda_{\text{init}}`.
        head_dim: features of one map's query and key; ``dim // (2 heads)`` unless given.
        bias: whether the four projections have one.
        rope: turns queries and keys by their positions, which count on from what a cache has seen.
        device: of the parameters.
        dtype: of the parameters.

    Shape:
        ``x`` and the output are ``b t d``; a cache holds two times ``b s (2 g) e``.

    Typical values:
        in the paper's 3B model 12 heads of two maps with 128 features each, where a plain Transformer has 24.

    Raises:
        ConfigError: sizes that are not positive integers, heads that don't divide, a cache that counts no positions.
        ShapeError: an input that is not ``b t d``, a mask of the wrong shape.

    Source:
        Ye et al. 2024, section 2, eqs. 1 to 3, arXiv:2410.05258
    """

    lambda_q1: Tensor
    lambda_k1: Tensor
    lambda_q2: Tensor
    lambda_k2: Tensor

    def __init__(
        self,
        dim: int,
        heads: int,
        *,
        kv_heads: int | None = None,
        layer: int = 1,
        head_dim: int | None = None,
        bias: bool = False,
        rope: RotaryEmbedding | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        kv_heads = heads if kv_heads is None else kv_heads
        _check_sizes(dim, heads, kv_heads, head_dim)
        check_parameter_dtype("DifferentialAttention", dtype)
        head_dim = dim // (2 * heads) if head_dim is None else head_dim
        if rope is not None and (not isinstance(rope, RotaryEmbedding) or rope.dim > head_dim):
            raise ConfigError(
                "DifferentialAttention rope",
                got=repr(rope),
                want=f"a RotaryEmbedding of at most {head_dim} features",
                remedy=f"Pass RotaryEmbedding({head_dim}).",
            )
        self.dim, self.heads, self.kv_heads, self.head_dim = dim, heads, kv_heads, head_dim
        self.layer, self.lambda_init, self.rope = layer, differential_lambda_init(layer), rope

        def linear(wide: int, out: int) -> nn.Linear:
            return nn.Linear(wide, out, bias=bias, device=device, dtype=dtype)

        self.q_proj = linear(dim, 2 * heads * head_dim)
        self.k_proj = linear(dim, 2 * kv_heads * head_dim)
        self.v_proj = linear(dim, 2 * kv_heads * head_dim)
        self.out_proj = linear(2 * heads * head_dim, dim)
        for name in ("lambda_q1", "lambda_k1", "lambda_q2", "lambda_k2"):
            setattr(self, name, nn.Parameter(torch.empty(head_dim, device=device, dtype=dtype)))
        self.norm = RMSNorm(2 * head_dim, eps=1e-5, device=device, dtype=dtype)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the matrices as ``nn.Linear`` does and the vectors of lambda from N(0, 0.01); set the gain to one."""
        for part in (self.q_proj, self.k_proj, self.v_proj, self.out_proj, self.norm):
            part.reset_parameters()
        for vector in (self.lambda_q1, self.lambda_k1, self.lambda_q2, self.lambda_k2):
            nn.init.normal_(vector, std=0.1)

    def lam(self) -> Float[Tensor, ""]:
        r"""Return this layer's :math:`\lambda`."""
        vectors = (self.lambda_q1, self.lambda_k1, self.lambda_q2, self.lambda_k2)
        return differential_lambda(*vectors, init=self.lambda_init)

    def forward(
        self,
        x: Float[Tensor, "b t d"],
        mask: MaskLike | None = None,
        causal: bool = False,
        cache: KVCache | None = None,
    ) -> Float[Tensor, "b t d"]:
        """Attend from ``x`` to ``x``, and to what the cache holds."""
        self._check(x)
        x, mask, broken = shield_padding(x, mask, x.shape[1], self.heads, cache)
        q, k, v = self._project(x, cache, mask, causal)
        out = differential_attention(q, k, v, self.lam(), mask, causal=causal)
        out = (1 - self.lambda_init) * self.norm(out)
        return with_broken(self.out_proj(rearrange(out.to(q.dtype), "b t h c -> b t (h c)")), broken)

    def weights(
        self, x: Float[Tensor, "b t d"], mask: MaskLike | None = None, causal: bool = False
    ) -> Float[Tensor, "b h t s"]:
        """Return each head's difference of maps: rows sum to 1 - lambda, entries may be negative."""
        self._check(x)
        q, k, _ = self._project(x, None)
        wide = statistic_dtype(q)
        q, k = q.to(wide), k.to(wide)
        first, second = (attention_weights(q[:, :, i::2], k[:, :, i::2], mask, causal=causal) for i in (0, 1))
        return (first - self.lam() * second).to(x.dtype)

    def _check(self, x: Tensor) -> None:
        check_input("DifferentialAttention", x, self.q_proj)
        check_rank("DifferentialAttention", x, (3,), "(batch, time, features)")
        check_features("DifferentialAttention", x, self.dim)

    def _project(
        self, x: Tensor, cache: KVCache | None, mask: MaskLike | None = None, causal: bool = False
    ) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = (
            rearrange(proj(x), "b t (h e) -> b t h e", e=self.head_dim)
            for proj in (self.q_proj, self.k_proj, self.v_proj)
        )
        if cache is not None and not isinstance(cache, KVCache):
            raise ConfigError(
                "DifferentialAttention cache", got=repr(cache), want="a KVCache", remedy="For instance AppendCache()."
            )
        if self.rope is not None:
            cos, sin = self.rope.cos_sin(x.shape[1], 0 if cache is None else cache.seen)
            q, k = (apply_rope(y, cos, sin, interleaved=self.rope.interleaved) for y in (q, k))
        if cache is not None:  # a value waits there as two halves: caches want keys and values of one shape
            check_ahead(cache, q[:, :, ::2], mask, causal)
            k, v = cache.update(k, v)
        return q, k, rearrange(v, "b s (g two) e -> b s g (two e)", two=2)

    def extra_repr(self) -> str:
        return (
            f"{self.dim}, heads={self.heads}, kv_heads={self.kv_heads}, head_dim={self.head_dim}, "
            f"layer={self.layer}, lambda_init={self.lambda_init:.3f}"
        )


def _check_sizes(dim: int, heads: int, kv_heads: int, head_dim: int | None) -> None:
    name = "DifferentialAttention"
    for size, value in (("dim", dim), ("heads", heads), ("kv_heads", kv_heads)):
        check_size(name, size, value)
    if head_dim is not None:
        check_size(name, "head_dim", head_dim)
    if heads % kv_heads:
        raise ConfigError(
            f"{name} kv_heads", got=f"{kv_heads} for {heads} heads", want="a divisor of heads", remedy="1 shares one."
        )
    if head_dim is None and dim % (2 * heads):
        raise ConfigError(
            f"{name} heads",
            got=f"{heads} for dim {dim}",
            want="a divisor of dim / 2",
            remedy="Or give head_dim.",
        )
