"""Attention with an external memory of past keys and values, searched for the nearest."""

from __future__ import annotations

import math
from typing import final

import torch
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from handbook_src.check import (
    check_features,
    check_parameter_dtype,
    check_positive,
    check_rank,
    check_size,
    check_tensors,
)
from handbook_src.errors import ConfigError, ShapeError
from handbook_src.functional.attention.attention import MaskLike, scaled_dot_product_attention, seen_by_any
from handbook_src.functional.attention.knn_memory import knn_attention, memory_gate, normalize_heads
from handbook_src.functional.attention.mask import Mask
from handbook_src.layers.attention.attention import check_input, shield_padding, with_broken


@final
class KNNMemory:
    r"""Keys and values of the past, per sample and head: appended, capped, searched, never trained.

    .. math:: \text{bytes} = 2 \cdot b \cdot \text{size} \cdot h \cdot e \cdot \text{bytes per element}

    The oldest make room for the newest.  What is stored is detached: it goes stale as the
    weights move, and no gradient reaches it.  What is stored under ``torch.inference_mode()`` serves training
    as well.

    Args:
        size: the most tokens that each sample's memory holds.
        index: a faiss factory string for the search, built afresh at each call; exact in torch unless given.

    Shape:
        ``k, v``: ``b t h e`` of the new tokens; ``attend``: queries ``b t h e`` to ``b t h e``.

    Typical values:
        1536 to 65536 (Wu et al. 2022); up to 262144 at their fine-tuning.

    Raises:
        ConfigError: a size below one, an index that is no string.

    Source:
        Wu et al. 2022, section 3.1, arXiv:2203.08913
    """

    def __init__(self, size: int, *, index: str | None = None) -> None:
        check_size("KNNMemory", "size", size)
        if index is not None and not isinstance(index, str):
            remedy = "Flat, HNSW32; None searches exactly."
            raise ConfigError("KNNMemory index", got=repr(index), want="a factory string of faiss", remedy=remedy)
        self.size, self.index = size, index
        self.reset()

    def reset(self) -> None:
        """Forget everything; the next tokens may come in another batch, dtype or device."""
        self._keys: Tensor | None = None
        self._values: Tensor | None = None
        self._seen = torch.zeros(0, dtype=torch.long)

    @property
    def lengths(self) -> Int[Tensor, " b"]:
        """How many tokens each sample's memory holds now."""
        return self._seen.clamp_max(self.size)

    @property
    def bytes(self) -> int:
        """How much storage is held now."""
        kept = [x for x in (self._keys, self._values) if x is not None]
        return sum(x.numel() * x.element_size() for x in kept)

    def clear(self, which: Bool[Tensor, " b"] | None = None) -> None:
        """Forget what the samples ``which`` hold (all unless given): a document of theirs has ended.

        Raises:
            ShapeError: not one boolean a sample.
        """
        if which is None:
            which = torch.ones_like(self._seen, dtype=torch.bool)
        check_tensors("KNNMemory.clear", which)
        if which.dtype != torch.bool or which.ndim != 1 or (len(which) != len(self._seen) and len(self._seen)):
            raise ShapeError(
                "KNNMemory.clear which",
                got=f"{tuple(which.shape)} of {which.dtype}",
                want=f"({len(self._seen)},) booleans",
                remedy="One for each sample of the batch; leave it out to clear all.",
            )
        if len(self._seen):
            with torch.inference_mode(False):
                self._seen = self._seen.masked_fill(which.to(self._seen.device), 0)

    @torch.inference_mode(False)  # what is made in inference mode could not be written to or trained on outside
    @torch.no_grad()
    def add(
        self, k: Float[Tensor, "b t h e"], v: Float[Tensor, "b t h e"], real: Bool[Tensor, "b t"] | None = None
    ) -> None:
        """Store the keys and values of new tokens, over the oldest where there is no room.

        Args:
            k: keys.
            v: values.
            real: which tokens are no padding; all unless given.

        Raises:
            ShapeError: not ``b t h e``, or another batch, head layout, dtype or device than before; not one
                boolean a token.
        """
        self._check(k, v)
        if real is not None:
            check_tensors("KNNMemory", real)
            if real.dtype != torch.bool or real.shape != k.shape[:2]:
                got, want = f"{tuple(real.shape)} of {real.dtype}", f"{tuple(k.shape[:2])} booleans"
                raise ShapeError("KNNMemory.add real", got=got, want=want, remedy="True where a token is no padding.")
        if self._keys is None or self._values is None:
            shape = (k.shape[0], self.size, *k.shape[2:])
            self._keys, self._values = k.new_zeros(shape), v.new_zeros(shape)
            self._seen = torch.zeros(k.shape[0], dtype=torch.long, device=k.device)
        if real is not None:
            place = real.cumsum(1) - 1  # among the sample's own tokens
            kept = real & (place >= place[:, -1:] + 1 - self.size) if k.shape[1] else real
            sample, new = kept.nonzero(as_tuple=True)
            slot = (self._seen[sample] + place[sample, new]) % self.size
            self._keys[sample, slot] = k.detach()[sample, new]
            self._values[sample, slot] = v.detach()[sample, new]
            self._seen = self._seen + real.sum(1)
            return
        t = k.shape[1]
        new = torch.arange(max(0, t - self.size), t, device=k.device)  # more than fits: the last ones
        slot = (self._seen[:, None] + new) % self.size
        sample = torch.arange(k.shape[0], device=k.device)[:, None]
        self._keys[sample, slot] = k.detach()[:, new]
        self._values[sample, slot] = v.detach()[:, new]
        self._seen = self._seen + t

    def attend(self, q: Float[Tensor, "b t h e"], k: int, *, scale: float | None = None) -> Float[Tensor, "b t h e"]:
        """Attend to the ``k`` nearest stored keys; zeros where nothing is stored.

        Raises:
            ShapeError: queries of another batch, head layout, dtype or device than what is stored.
            ConfigError: ``k`` below one.
        """
        check_size("KNNMemory.attend", "k", k)
        self._check(q, q)
        if self._keys is None or self._values is None:
            return torch.zeros_like(q)
        stored = int(self.lengths.max()) if len(self.lengths) and not q.is_meta else self.size
        keys, values = self._keys[:, :stored], self._values[:, :stored]
        return knn_attention(q, keys, values, k, lengths=self.lengths, scale=scale, index=self.index)

    def _check(self, k: Tensor, v: Tensor) -> None:
        check_tensors("KNNMemory", k, v)
        if k.ndim != 4 or k.shape != v.shape or k.dtype != v.dtype or not k.is_floating_point():
            raise ShapeError(
                "KNNMemory k, v",
                got=f"{tuple(k.shape)} of {k.dtype} and {tuple(v.shape)} of {v.dtype}",
                want="two floating tensors b t h e of one shape",
                remedy="Split the heads first.",
            )
        if self._keys is not None:
            like = self._keys
            was = (like.shape[0], *like.shape[2:], like.dtype, like.device)
            now = (k.shape[0], *k.shape[2:], k.dtype, k.device)
            if was != now:
                raise ShapeError(
                    "KNNMemory batch, heads, features, dtype, device",
                    got=now,
                    want=f"{was}, as stored",
                    remedy="Call reset() before another batch, and keep one memory a layer.",
                )


@final
class MemorizingAttention(nn.Module):
    r"""Causal attention to the segment, and to the nearest keys of a memory of all earlier segments.

    .. math::
        V_a = g \odot V_m + (1 - g) \odot V_c, \qquad g = \sigma(b_g)

    :math:`V_c` is local attention and :math:`V_m` is
    :func:`handbook_src.functional.knn_attention`; both use the same queries and keys,
    scaled to length one and multiplied by a trained factor a head.
    :func:`handbook_src.functional.memory_gate` mixes them.  The segment's own keys and
    values enter the memory after it was read, so nothing is seen twice.

    Args:
        dim: features of ``x`` and of the output.
        heads: number of heads.
        k: neighbours that each query of each head retrieves.
        scale: factor on the cosines, at the start.
        bias: whether the four projections have one.
        device: where the parameters are made.
        dtype: of the parameters.

    Shape:
        ``x`` and the output are ``b t d``.

    Typical values:
        k 32, one such layer near the top (the 9th of 12), memories of 8192 tokens and more; scale 10 to 20.

    Raises:
        ConfigError: sizes that are not positive, heads that don't divide ``dim``.

    Source:
        Wu et al. 2022, eqs. 1 and 2 and section 3, arXiv:2203.08913; unit queries and keys are
        Henry et al. 2020, arXiv:2010.04245
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        *,
        k: int = 32,
        scale: float = 10.0,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        for name, value in (("dim", dim), ("heads", heads), ("k", k)):
            check_size("MemorizingAttention", name, value)
        check_positive("MemorizingAttention", "scale", scale)
        check_parameter_dtype("MemorizingAttention", dtype)
        if dim % heads:
            raise ConfigError(
                "MemorizingAttention heads", got=f"{heads} for dim {dim}", want="a divisor of dim", remedy="64 a head."
            )
        self.dim, self.heads, self.k, self.scale = dim, heads, k, scale
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (
            nn.Linear(dim, dim, bias=bias, device=device, dtype=dtype) for _ in range(4)
        )
        self.gate_bias = nn.Parameter(torch.empty(heads, device=device, dtype=dtype))
        self.log_scale = nn.Parameter(torch.empty(heads, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the projections (Glorot, uniform), zero the biases, and open each gate half."""
        for proj in (self.q_proj, self.k_proj, self.v_proj, self.out_proj):
            nn.init.xavier_uniform_(proj.weight)
            if proj.bias is not None:
                nn.init.zeros_(proj.bias)
        nn.init.zeros_(self.gate_bias)
        nn.init.constant_(self.log_scale, math.log(self.scale))

    def forward(
        self,
        x: Float[Tensor, "b t d"],
        memory: KNNMemory | None = None,
        mask: MaskLike | None = None,
    ) -> Float[Tensor, "b t d"]:
        """Attend to the segment and to ``memory``, then store the segment in it.

        Args:
            x: one segment; the next call brings the next one.
            memory: what earlier segments left; local attention alone unless given.
            mask: a further rule, or a bias added to the local scores (T5's in the paper); the
                memory has no positions.  What a padding rule or a mask tensor hides from every query is not stored.

        Raises:
            ShapeError: other features, a mask of another shape, a memory of another batch.
        """
        check_input("MemorizingAttention", x, self.q_proj)
        check_rank("MemorizingAttention", x, (3,), "(batch, tokens, features)")
        check_features("MemorizingAttention", x, self.dim)
        if memory is not None and not hasattr(memory, "attend"):
            got = type(memory).__name__
            raise ConfigError("MemorizingAttention memory", got=got, want="a KNNMemory", remedy="Pass KNNMemory(8192).")
        x, mask, broken = shield_padding(x, mask, x.shape[1], self.heads)
        q, k, v = (
            rearrange(proj(x), "b t (h e) -> b t h e", h=self.heads) for proj in (self.q_proj, self.k_proj, self.v_proj)
        )
        q, k = normalize_heads(q) * self.log_scale.exp().to(q.dtype)[:, None], normalize_heads(k)
        out = scaled_dot_product_attention(q, k, v, mask, causal=True, scale=1.0)
        if memory is not None:
            retrieved = memory.attend(q, self.k, scale=1.0)
            present = memory.lengths > 0 if len(memory.lengths) else x.new_zeros(len(x), dtype=torch.bool)
            out = memory_gate(out, retrieved, self.gate_bias, present)
            memory.add(k, v, self._real(mask, q))
        return with_broken(self.out_proj(rearrange(out, "b t h e -> b t (h e)")), broken)

    @staticmethod
    def _real(mask: MaskLike | None, q: Tensor) -> Tensor | None:
        """Which tokens any query may see, ``b t``; None where the mask knows no samples and so no padding."""
        b, t = q.shape[:2]
        if mask is None or q.is_meta or (isinstance(mask, Mask) and mask.batch is None):
            return None
        written = mask.sdpa(t, t, device=q.device) if isinstance(mask, Mask) else mask
        return None if written is None else seen_by_any(written).expand(b, t)

    def gates(self) -> Float[Tensor, " h"]:
        """Return each head's gate, :math:`g`: 0 is local attention alone, 1 the memory alone."""
        return torch.sigmoid(self.gate_bias.detach())

    def extra_repr(self) -> str:
        return f"{self.dim}, heads={self.heads}, k={self.k}"
