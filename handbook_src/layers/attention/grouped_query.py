"""Attention whose query heads share key and value heads: grouped-query and multi-query."""

from __future__ import annotations

from typing import final

import torch
from torch import Tensor

from handbook_src.check import check_size
from handbook_src.errors import ConfigError
from handbook_src.functional.attention.grouped_query import mean_pool_heads
from handbook_src.layers.attention.attention import KeyValueCache, MultiHeadAttention
from handbook_src.layers.attention.kv_cache import KVCache
from handbook_src.layers.positions.rope import RotaryEmbedding


class GroupedQueryAttention(MultiHeadAttention):
    r"""Multi-head attention in which groups of query heads share a key and a value head.

    .. math::
        \operatorname{head}_i = \operatorname{Attention}(X W_i^Q,\; X W_{\lfloor i g / h \rfloor}^K,\;
        X W_{\lfloor i g / h \rfloor}^V), \qquad i = 0, \dots, h - 1

    A cache holds :math:`g / h` of the bytes of multi-head attention's.  With
    ``kv_heads == heads`` it is :class:`handbook_src.layers.MultiHeadAttention`, with 1
    :class:`MultiQueryAttention`.  Heads meet in
    :func:`handbook_src.functional.scaled_dot_product_attention`.

    Args:
        dim: features of ``x`` and of the output.
        heads: number of query heads.
        kv_heads: number of key and value heads, a divisor of ``heads``.
        head_dim: features of a head; ``dim // heads`` unless given.
        dropout: share of the weights dropped in training.
        bias: whether the four projections have one.
        rope: turns queries and keys by their positions, which count on from what a cache has seen.
        device: of the parameters.
        dtype: of the parameters.

    Shape:
        ``x`` and the output are ``b t d``; a cache holds ``b s g e`` twice.

    Typical values:
        8 key heads for 64 query heads (Llama 2 70B), 8 for 32 (Mistral 7B, Llama 3 8B); no bias.

    Raises:
        ConfigError: sizes that are not positive integers, heads that don't divide, dropout outside [0, 1),
            ``rope`` with a memory, or with a cache that does not count positions.

    Source:
        Ainslie et al. 2023, section 2.2, arXiv:2305.13245
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        kv_heads: int,
        *,
        head_dim: int | None = None,
        dropout: float = 0.0,
        bias: bool = False,
        rope: RotaryEmbedding | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        name = type(self).__name__
        check_size(name, "kv_heads", kv_heads)  # None would mean as many as heads
        if rope is not None and not isinstance(rope, RotaryEmbedding):
            raise ConfigError(
                f"{name} rope", got=repr(rope), want="a RotaryEmbedding", remedy="For instance RotaryEmbedding(64)."
            )
        super().__init__(
            dim, heads, kv_heads=kv_heads, head_dim=head_dim, dropout=dropout, bias=bias, device=device, dtype=dtype
        )
        if rope is not None and rope.dim > self.head_dim:
            raise ConfigError(
                f"{name} rope",
                got=f"{rope.dim} features for heads of {self.head_dim}",
                want="at most a head's",
                remedy=f"Pass RotaryEmbedding({self.head_dim}).",
            )
        self.rope = rope

    def _turned(
        self, q: Tensor, k: Tensor, memory: Tensor | None, cache: KeyValueCache | None
    ) -> tuple[Tensor, Tensor]:
        if self.rope is None:
            return q, k
        if memory is not None or not (cache is None or isinstance(cache, KVCache)):
            raise ConfigError(
                f"{type(self).__name__} rope",
                got="a memory" if memory is not None else f"a {type(cache).__name__} without `seen`",
                want="self-attention, with a KVCache if any",
                remedy="Positions count on from what the cache has seen; a memory has none of them.",
            )
        return self.rope(q, k, offset=0 if cache is None else cache.seen)


@final
class MultiQueryAttention(GroupedQueryAttention):
    r"""Multi-head attention in which all query heads share one key and one value head.

    .. math:: \operatorname{head}_i = \operatorname{Attention}(X W_i^Q,\; X W^K,\; X W^V)

    :class:`GroupedQueryAttention` with ``kv_heads`` 1: a cache holds :math:`1 / h` of the bytes.

    Args:
        dim: features of ``x`` and of the output.
        heads: number of query heads.
        head_dim: features of a head; ``dim // heads`` unless given.
        dropout: share of the weights dropped in training.
        bias: whether the four projections have one.
        rope: turns queries and keys by their positions, which count on from what a cache has seen.
        device: of the parameters.
        dtype: of the parameters.

    Shape:
        ``x`` and the output are ``b t d``; a cache holds ``b s 1 e`` twice.

    Typical values:
        16 heads of 256 in PaLM 8B, 71 of 64 in Falcon 7B; no bias.

    Raises:
        ConfigError: as for :class:`GroupedQueryAttention`.

    Source:
        Shazeer 2019, section 3, arXiv:1911.02150
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        *,
        head_dim: int | None = None,
        dropout: float = 0.0,
        bias: bool = False,
        rope: RotaryEmbedding | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            dim, heads, 1, head_dim=head_dim, dropout=dropout, bias=bias, rope=rope, device=device, dtype=dtype
        )


def share_key_heads(layer: MultiHeadAttention, kv_heads: int) -> GroupedQueryAttention:
    r"""Convert a trained layer: key and value heads are mean-pooled over their groups, the rest is copied.

    .. math:: \bar W_j = \frac{1}{r} \sum_{i = j r}^{(j + 1) r - 1} W_i, \qquad r = h / g

    The result needs some more training, the paper's *uptraining*.  ``layer`` is not changed, and the
    weights are :func:`handbook_src.functional.mean_pool_heads` of its own.
    With ``kv_heads`` 1, :class:`MultiQueryAttention` loads the state dict.

    Args:
        layer: self-attention; its key heads are a multiple of ``kv_heads``.
        kv_heads: how many are wanted.

    Raises:
        ConfigError: a layer that reads a memory of another width, or was pruned; ``kv_heads`` that
            don't divide its key heads.

    Source:
        Ainslie et al. 2023, section 2.1, arXiv:2305.13245
    """
    if not isinstance(layer, MultiHeadAttention):
        got = type(layer).__name__
        raise ConfigError("share_key_heads layer", got=got, want="a MultiHeadAttention", remedy="Pass the layer.")
    if layer.kv_dim != layer.dim or layer.kept_heads != list(range(layer.heads)):
        raise ConfigError(
            "share_key_heads layer",
            got=repr(layer),
            want="self-attention with all its heads",
            remedy="Convert first, prune then.",
        )
    pooled = {
        key: mean_pool_heads(value, layer.kv_heads, kv_heads) if key.startswith(("k_proj", "v_proj")) else value
        for key, value in layer.state_dict().items()
    }
    weight = layer.q_proj.weight
    shared = GroupedQueryAttention(
        layer.dim,
        layer.heads,
        kv_heads,
        head_dim=layer.head_dim,
        dropout=layer.dropout,
        bias=layer.q_proj.bias is not None,
        rope=getattr(layer, "rope", None),
        device=weight.device,
        dtype=weight.dtype,
    )
    shared.load_state_dict(pooled)
    return shared.train(layer.training)
