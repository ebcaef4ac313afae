"""Keys and values kept between decoding steps: append, static, quantised, streaming.

Each attention layer owns one cache and hands it the keys and values of the new
tokens; it gets back all that a query may look at. All kinds answer to the same
``update``, ``length``, ``seen``, ``bytes`` and ``reset``. The paged kind has a file of
its own, ``paged_kv_cache.py``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import final

import torch
from jaxtyping import Float
from torch import Tensor

from handbook_src.errors import ConfigError, ShapeError
from handbook_src.functional.quantize import QUANTIZED, quantize

KV = tuple[Float[Tensor, "b s h e"], Float[Tensor, "b s h e"]]


class KVCache(ABC):
    r"""What every cache promises: the keys and values of the past are not computed again.

    .. math:: \text{bytes} = 2 \cdot b \cdot s \cdot h \cdot e \cdot \text{bytes per element}

    for each layer: linear in the tokens ``s`` kept. The new tokens' keys and values are
    the last rows of what :meth:`update` returns, so causal attention aligns
    bottom-right. Nothing is rounded unless the kind says so.

    Shape:
        ``k, v``: ``b t h e`` of the new tokens in; ``b s h e`` of all kept tokens out.

    Typical values:
        float16 or bfloat16 storage; GPT-2 124M keeps 36 KiB a token in float16.

    Source:
        Pope et al. 2022, section 2, arXiv:2211.05102; the recurrence is Shazeer 2019, section 2.4, arXiv:1911.02150
    """

    def __init__(self) -> None:
        self.seen = 0
        self._like: Tensor | None = None

    def update(self, k: Float[Tensor, "b t h e"], v: Float[Tensor, "b t h e"]) -> KV:
        """Store the keys and values of new tokens and return all that may be attended to.

        Raises:
            ShapeError: not ``b t h e``, or another batch, head layout, dtype or device than before;
                no room left; or gradients asked of a kind that writes in place.
        """
        self._check(k, v)
        kv = self._store(k, v)
        if self._like is None:  # after the store: a refused update binds nothing
            self._like = k.detach()[:, :0]
        self.seen += k.shape[1]
        return kv

    def reset(self) -> None:
        """Forget every token; the next update may bring another batch."""
        self.seen = 0
        self._like = None
        self._clear()

    @property
    @abstractmethod
    def length(self) -> int:
        """How many tokens are kept. :attr:`seen` counts those ever stored."""

    @property
    @abstractmethod
    def bytes(self) -> int:
        """How much storage is held now."""

    @abstractmethod
    def _store(self, k: Tensor, v: Tensor) -> KV: ...

    @abstractmethod
    def _clear(self) -> None: ...

    def _check(self, k: Tensor, v: Tensor) -> None:
        name = type(self).__name__
        if k.ndim != 4 or k.shape != v.shape:
            raise ShapeError(
                f"{name}.update k, v",
                got=f"{tuple(k.shape)} and {tuple(v.shape)}",
                want="two tensors b t h e of one shape",
                remedy="Split the heads before caching.",
            )
        like = self._like
        if like is not None:
            was = (like.shape[0], *like.shape[2:], like.dtype, like.device)
            now = (k.shape[0], *k.shape[2:], k.dtype, k.device)
            if was != now:
                raise ShapeError(
                    f"{name}.update batch, heads, features, dtype, device",
                    got=now,
                    want=f"{was}, as in the first update",
                    remedy="Call reset() before another batch, and one cache a layer.",
                )
        if not isinstance(self, AppendCache) and torch.is_grad_enabled() and (k.requires_grad or v.requires_grad):
            raise ShapeError(
                f"{name}.update",
                got="tensors that require grad",
                want="plain values: this kind stores copies, through which no gradient would flow",
                remedy="Decode under torch.no_grad(), or use AppendCache.",
            )


def held_bytes(*tensors: Tensor | None) -> int:
    """Return the bytes of what is there."""
    return sum(t.numel() * t.element_size() for t in tensors if t is not None)


@final
class AppendCache(KVCache):
    """Concatenate: as long as the text, differentiable, and copied whole at every step.

    Bytes: exactly those of the kept tokens; writing token ``s`` moves all ``s``.
    """

    def __init__(self) -> None:
        super().__init__()
        self._kv: KV | None = None

    @property
    def length(self) -> int:
        return 0 if self._kv is None else self._kv[0].shape[1]

    @property
    def bytes(self) -> int:
        return 0 if self._kv is None else held_bytes(*self._kv)

    def _store(self, k: Tensor, v: Tensor) -> KV:
        if self._kv is not None:
            k, v = torch.cat([self._kv[0], k], 1), torch.cat([self._kv[1], v], 1)
        self._kv = (k, v)
        return self._kv

    def _clear(self) -> None:
        self._kv = None


@final
class StaticCache(KVCache):
    """Write into a block allocated once: no copies, and no token beyond ``capacity``.

    Bytes: those of ``capacity`` tokens from the first update on, used or not.

    Args:
        capacity: the most tokens it can hold.
    """

    def __init__(self, capacity: int) -> None:
        super().__init__()
        if capacity < 1:
            raise ConfigError(
                "StaticCache capacity", got=capacity, want="at least 1", remedy="Pass the context length."
            )
        self.capacity = capacity
        self._k, self._v = torch.empty(0), torch.empty(0)

    @property
    def length(self) -> int:
        return self.seen

    @property
    def bytes(self) -> int:
        return held_bytes(self._k, self._v)

    def _store(self, k: Tensor, v: Tensor) -> KV:
        end = self.seen + k.shape[1]
        if end > self.capacity:
            raise ShapeError(
                "StaticCache.update",
                got=f"{k.shape[1]} tokens on top of {self.seen}",
                want=f"at most {self.capacity} in all",
                remedy="Allocate more, or use AppendCache or SinkCache.",
            )
        shape = (k.shape[0], self.capacity, *k.shape[2:])
        wanted = (shape, k.dtype, k.device)
        if (self._k.shape, self._k.dtype, self._k.device) != wanted:
            self._k, self._v = k.new_empty(shape), v.new_empty(shape)
        self._k[:, self.seen : end] = k
        self._v[:, self.seen : end] = v
        return self._k[:, :end], self._v[:, :end]

    def _clear(self) -> None:
        """Keep the block: the next text writes over it."""


@final
class QuantizedCache(KVCache):
    """Store int8 or fp8 with one float32 scale a token and head; give back the dtype that came.

    Bytes: ``e + 4`` a vector, against ``2e`` in float16: 53 % at ``e = 64``. Every token is
    rounded once, when it is stored, so reading order does not matter; :func:`handbook_src.functional.quantize.quantize`
    has the bounds.

    Args:
        dtype: ``torch.int8`` or ``torch.float8_e4m3fn``.
    """

    def __init__(self, dtype: torch.dtype = torch.int8) -> None:
        super().__init__()
        if dtype not in QUANTIZED:
            raise ConfigError(
                "QuantizedCache dtype", got=dtype, want=f"one of {list(QUANTIZED)}", remedy="Start with torch.int8."
            )
        self.dtype = dtype
        self._parts: list[Tensor] = []

    @property
    def length(self) -> int:
        return self._parts[0].shape[1] if self._parts else 0

    @property
    def bytes(self) -> int:
        return held_bytes(*self._parts)

    def _store(self, k: Tensor, v: Tensor) -> KV:
        new = [*quantize(k, self.dtype), *quantize(v, self.dtype)]
        if self._parts:
            new = [
                torch.cat([old.view(_wire(old)), part.view(_wire(part))], 1).view(part.dtype)
                for old, part in zip(self._parts, new, strict=True)
            ]
        self._parts = new
        kq, ks, vq, vs = new
        return (kq.float() * ks).to(k.dtype), (vq.float() * vs).to(v.dtype)

    def _clear(self) -> None:
        self._parts = []


def _wire(x: Tensor) -> torch.dtype:
    """The dtype to concatenate in: fp8 travels as int8 bits."""
    return torch.int8 if x.element_size() == 1 else x.dtype


@final
class SinkCache(KVCache):
    """Keep the first ``sinks`` and the last ``window`` tokens: constant memory for endless text.

    Token by token this equals full attention under the rule ``causal & (window | sinks)``.
    A chunk of ``t`` tokens is attended before it evicts: its first query sees its own
    window and the later ones up to ``t - 1`` tokens more.

    Positions are the model's affair: keys keep whatever position they were computed with.

    Args:
        sinks: tokens at the start that are never dropped; 0 gives a plain sliding window.
        window: the latest tokens, the newest included.

    Source:
        Xiao et al. 2023, section 3.2, arXiv:2309.17453
    """

    def __init__(self, sinks: int = 4, window: int = 1020) -> None:
        super().__init__()
        if sinks < 0 or window < 1:
            raise ConfigError(
                "SinkCache sinks, window", got=(sinks, window), want="sinks >= 0 and window >= 1", remedy="4 and 1020."
            )
        self.sinks, self.window = sinks, window
        self._kv: KV | None = None

    @property
    def length(self) -> int:
        return 0 if self._kv is None else self._kv[0].shape[1]

    @property
    def bytes(self) -> int:
        return 0 if self._kv is None else held_bytes(*self._kv)

    def _store(self, k: Tensor, v: Tensor) -> KV:
        t = k.shape[1]
        if self._kv is not None:
            k, v = torch.cat([self._kv[0], k], 1), torch.cat([self._kv[1], v], 1)
        last = self.window + max(t, 1) - 1
        k, v = self._evict(k, last), self._evict(v, last)
        self._kv = (self._evict(k, self.window), self._evict(v, self.window))
        return k, v

    def _evict(self, x: Tensor, last: int) -> Tensor:
        if x.shape[1] <= self.sinks + last:
            return x
        return torch.cat([x[:, : self.sinks], x[:, x.shape[1] - last :]], 1)

    def _clear(self) -> None:
        self._kv = None
