"""Multi-head latent attention, and the cache that keeps one short vector a token."""

from __future__ import annotations

from typing import final

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from handbook_src.check import check_features, check_parameter_dtype, check_rank, check_size
from handbook_src.errors import ConfigError, ShapeError
from handbook_src.functional.attention.attention import MaskLike
from handbook_src.functional.attention.mla import Form, check_form, latent_attention
from handbook_src.functional.positions.rope import apply_rope
from handbook_src.layers.attention.attention import check_ahead, check_input, shield_padding, with_broken
from handbook_src.layers.attention.kv_cache import KVCache, held_bytes, room, with_own_storage
from handbook_src.layers.normalisation.norm import RMSNorm
from handbook_src.layers.positions.rope import RotaryEmbedding


@final
class LatentCache:
    r"""One vector of ``c + r`` features a token, kept between decoding steps.

    .. math:: \text{bytes} = b \cdot s \cdot (c + r) \cdot \text{bytes per element}

    Without a capacity it grows by concatenation and is differentiable; with one it is
    written into a block allocated once, of which :attr:`bytes` counts all.

    Args:
        capacity: the most tokens it can hold; unlimited unless given.

    Shape:
        ``kv``: ``b t (c + r)`` of the new tokens in; ``b s (c + r)`` of all tokens out.

    Typical values:
        576 features a token in DeepSeek-V2 and V3: 512 of the latent, 64 of the rotary key.

    Raises:
        ConfigError: a capacity that is no positive integer.

    Source:
        DeepSeek-AI 2024, section 2.1.4 and table 1, arXiv:2405.04434
    """

    def __init__(self, capacity: int | None = None) -> None:
        if capacity is not None:
            check_size("LatentCache", "capacity", capacity)
        self.capacity = capacity
        self.seen = 0
        self._block: Tensor | None = None

    def __copy__(self) -> LatentCache:
        copied: LatentCache = with_own_storage(self)
        return copied

    @property
    def length(self) -> int:
        """How many tokens are kept."""
        return self.seen

    def after(self, t: int) -> int:
        """How many vectors an update of ``t`` tokens gives back, which a mask must fit."""
        return self.seen + t

    @property
    def bytes(self) -> int:
        """How much storage is held now."""
        return held_bytes(self._block)

    def update(self, kv: Float[Tensor, "b t c_plus_r"]) -> Float[Tensor, "b s c_plus_r"]:
        """Store the vectors of new tokens and return all.

        Raises:
            ShapeError: another batch, width, dtype or device than before, no room left, or gradients
                asked of a block that is written in place.
        """
        self._check(kv)
        end = self.seen + kv.shape[1]
        if self.capacity is None:
            self._block = kv if self._block is None else torch.cat((self._block, kv), 1)
        else:
            if self._block is None:
                self._block = room(kv, kv.shape[0], self.capacity, kv.shape[2])
            self._block[:, self.seen : end] = kv
        self.seen = end
        return self._block[:, :end]

    def reset(self) -> None:
        """Forget every token; the next update may bring another batch."""
        self.seen, self._block = 0, None

    def _check(self, kv: Tensor) -> None:
        check_rank("LatentCache.update", kv, (3,), "(batch, time, features)")
        old = self._block
        if old is not None:
            was, now = ((x.shape[0], x.shape[2], x.dtype, x.device) for x in (old, kv))
            if was != now:
                raise ShapeError(
                    "LatentCache.update batch, features, dtype, device",
                    got=now,
                    want=f"{was}, as in the first update",
                    remedy="Call reset() before another batch, and one cache a layer.",
                )
        if self.capacity is None:
            return
        if self.seen + kv.shape[1] > self.capacity:
            raise ShapeError(
                "LatentCache.update",
                got=f"{kv.shape[1]} tokens on top of {self.seen}",
                want=f"at most {self.capacity} in all",
                remedy="Allocate more, or give no capacity.",
            )
        if torch.is_grad_enabled() and kv.requires_grad:
            raise ShapeError(
                "LatentCache.update",
                got="a tensor that requires grad",
                want="plain values: a block stores copies, through which no gradient would flow",
                remedy="Decode under torch.no_grad(), or give no capacity.",
            )


@final
class MultiHeadLatentAttention(nn.Module):
    r"""Attention whose heads all make their keys and values from one short vector a token.

    .. math::
        c^{KV}_t = \operatorname{norm}(W^{DKV} x_t), \quad k^R_t = \operatorname{RoPE}(W^{KR} x_t), \qquad
        c^Q_t = \operatorname{norm}(W^{DQ} x_t), \quad
        [q^C_{t,i};\, q^R_{t,i}] = [W^{UQ}_i c^Q_t;\; \operatorname{RoPE}(W^{QR}_i c^Q_t)]

    Heads meet in :func:`handbook_src.functional.latent_attention`, which makes keys and values of
    :math:`c^{KV}` or, when decoding, goes to the latents instead.  Rotation and low rank don't
    commute, hence the rotary key of its own, shared by all heads.  The state dict has the keys of the
    released models.  :attr:`scale` is 1/sqrt(e + r); models with YaRN multiply it.

    Args:
        dim: features of ``x`` and of the output.
        heads: number of heads, :math:`h`.
        latent_dim: features of the latent of keys and values, :math:`c`.
        query_latent_dim: features of the queries' latent; none unless given.
        head_dim: features of a head's query and key without positions, :math:`e`.
        value_dim: features of a head's value, :math:`w`; ``head_dim`` unless given.
        rope: rotary features :math:`r`, or the rotary embedding itself.
        device: of the parameters.
        dtype: of the parameters.

    Shape:
        ``x`` and the output are ``b t d``; a cache holds ``b s (c + r)``.

    Typical values:
        DeepSeek-V2 and V3: 128 heads, latent_dim 512, query_latent_dim 1536, head_dim and value_dim 128,
        rope 64; V2-Lite has 16 heads and no latent of the queries.

    Raises:
        ConfigError: sizes that are not positive integers, an odd number of rotary features, a cache that
            counts no positions.
        ShapeError: an input that is not ``b t d``, a mask of the wrong shape.

    Source:
        DeepSeek-AI 2024, section 2.1 and appendix C, arXiv:2405.04434
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        *,
        latent_dim: int,
        query_latent_dim: int | None = None,
        head_dim: int = 128,
        value_dim: int | None = None,
        rope: RotaryEmbedding | int = 64,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        name, value_dim = "MultiHeadLatentAttention", head_dim if value_dim is None else value_dim
        sizes = {"dim": dim, "heads": heads, "latent_dim": latent_dim, "head_dim": head_dim, "value_dim": value_dim}
        if query_latent_dim is not None:
            sizes["query_latent_dim"] = query_latent_dim
        for size, value in sizes.items():
            check_size(name, size, value)
        check_parameter_dtype(name, dtype)
        if not isinstance(rope, RotaryEmbedding):
            check_size(name, "rope", rope, least=2)
            rope = RotaryEmbedding(rope, interleaved=True, device=device)
        self.dim, self.heads, self.latent_dim, self.query_latent_dim = dim, heads, latent_dim, query_latent_dim
        self.head_dim, self.value_dim, self.rope_dim, self.rope = head_dim, value_dim, rope.dim, rope
        width = head_dim + rope.dim
        self.scale = width**-0.5

        def linear(wide: int, out: int) -> nn.Linear:
            return nn.Linear(wide, out, bias=False, device=device, dtype=dtype)

        def norm(wide: int) -> RMSNorm:
            return RMSNorm(wide, eps=1e-6, device=device, dtype=dtype)

        if query_latent_dim is None:
            self.q_proj = linear(dim, heads * width)
        else:
            self.q_a_proj, self.q_a_layernorm = linear(dim, query_latent_dim), norm(query_latent_dim)
            self.q_b_proj = linear(query_latent_dim, heads * width)
        self.kv_a_proj_with_mqa = linear(dim, latent_dim + rope.dim)
        self.kv_a_layernorm = norm(latent_dim)
        self.kv_b_proj = linear(latent_dim, heads * (head_dim + value_dim))
        self.o_proj = linear(heads * value_dim, dim)

    def reset_parameters(self) -> None:
        """Draw every matrix as ``nn.Linear`` does, and set the gains to one."""
        for part in self.children():
            if isinstance(part, nn.Linear | RMSNorm):
                part.reset_parameters()

    def forward(
        self,
        x: Float[Tensor, "b t d"],
        mask: MaskLike | None = None,
        causal: bool = False,
        cache: LatentCache | KVCache | None = None,
        form: Form = "auto",
    ) -> Float[Tensor, "b t d"]:
        """Attend from ``x`` to ``x``, and to what the cache holds.

        A cache of :mod:`handbook_src.layers.attention.kv_cache` serves as well: latents are its keys,
        rotary keys its values.
        """
        check_input("MultiHeadLatentAttention", x, self.kv_a_proj_with_mqa)
        check_rank("MultiHeadLatentAttention", x, (3,), "(batch, time, features)")
        check_features("MultiHeadLatentAttention", x, self.dim)
        seen = 0 if cache is None else self._seen(cache)
        x, mask, broken = shield_padding(x, mask, x.shape[1], self.heads, cache)
        q, kv = self._queries_and_latents(x, seen)
        if cache is not None:
            check_form(form)
            check_ahead(cache, q, mask, causal)
            kv = self._through(cache, kv)
        up = rearrange(self.kv_b_proj.weight.to(q.dtype), "(h f) c -> h f c", h=self.heads)  # as autocast has it
        up_key, up_value = up.split((self.head_dim, self.value_dim), 1)
        out = latent_attention(q, kv, up_key, up_value, mask, causal=causal, scale=self.scale, form=form)
        return with_broken(self.o_proj(rearrange(out, "b t h w -> b t (h w)")), broken)

    def _queries_and_latents(self, x: Tensor, offset: int) -> tuple[Tensor, Tensor]:
        q = self.q_proj(x) if self.query_latent_dim is None else self.q_b_proj(self.q_a_layernorm(self.q_a_proj(x)))
        q = rearrange(q, "b t (h e) -> b t h e", h=self.heads)
        latent, key = self.kv_a_proj_with_mqa(x).split((self.latent_dim, self.rope_dim), -1)
        cos, sin = self.rope.cos_sin(x.shape[1], offset)
        plain, turning = q.split((self.head_dim, self.rope_dim), -1)
        pairs = self.rope.interleaved
        q = torch.cat((plain, apply_rope(turning, cos, sin, interleaved=pairs)), -1)
        key = apply_rope(key[:, :, None], cos, sin, interleaved=pairs)[:, :, 0]
        return q, torch.cat((self.kv_a_layernorm(latent).to(key.dtype), key), -1)

    @staticmethod
    def _seen(cache: LatentCache | KVCache) -> int:
        if not isinstance(cache, LatentCache | KVCache):
            raise ConfigError(
                "MultiHeadLatentAttention cache",
                got=repr(cache),
                want="a LatentCache or a KVCache",
                remedy="Pass LatentCache().",
            )
        return cache.seen

    def _through(self, cache: LatentCache | KVCache, kv: Tensor) -> Tensor:
        if isinstance(cache, LatentCache):
            return cache.update(kv)
        latent, key = kv[:, :, None].split((self.latent_dim, self.rope_dim), -1)
        return torch.cat(cache.update(latent, key), -1)[:, :, 0]

    def extra_repr(self) -> str:
        return (
            f"{self.dim}, heads={self.heads}, latent_dim={self.latent_dim}, query_latent_dim={self.query_latent_dim}, "
            f"head_dim={self.head_dim}, value_dim={self.value_dim}, rope_dim={self.rope_dim}"
        )
