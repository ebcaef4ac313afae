"""Keys and values kept between decoding steps: append, static, quantised, streaming.

Each attention layer owns one cache and hands it the keys and values of the new
tokens; it gets back all that a query may look at. All kinds answer to the same
``update``, ``length``, ``seen``, ``bytes`` and ``reset``. The paged kind has a file of
its own, ``paged_kv_cache.py``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, final

import torch
from jaxtyping import Float, Int
from torch import Tensor

from handbook_src.check import check_size, check_tensors
from handbook_src.errors import ConfigError, ShapeError
from handbook_src.functional.compression.quantize import QUANTIZED, quantize

KV = tuple[Float[Tensor, "b s h e"], Float[Tensor, "b s h c"]]


class KVCache(ABC):
    r"""What every cache promises: the keys and values of the past are not computed again.

    .. math:: \text{bytes} = 2 \cdot b \cdot s \cdot h \cdot e \cdot \text{bytes per element}

    for each layer: linear in the tokens ``s`` kept. The new tokens' keys and values are
    the last rows of what ``update()`` returns, so causal attention aligns
    bottom-right. Nothing is rounded unless the kind says so.

    Shape:
        ``k`` is ``b t h e`` and ``v`` is ``b t h c`` of the new tokens in, with ``s`` for ``t`` of all kept
        tokens out; ``c = e`` as a rule, and not for latent or differential attention.

    Typical values:
        float16 or bfloat16 storage; GPT-2 124M keeps 36 KiB a token in float16.

    Source:
        Pope et al. 2022, section 2, arXiv:2211.05102; the recurrence is Shazeer 2019, section 2.4, arXiv:1911.02150
    """

    def __init__(self) -> None:
        self.seen = 0
        self._like: tuple[object, ...] | None = None

    def update(self, k: Float[Tensor, "b t h e"], v: Float[Tensor, "b t h c"]) -> KV:
        """Store the keys and values of new tokens and return all that may be attended to.

        Raises:
            ShapeError: not ``b t h e`` floats, or another batch, head layout, dtype or device than before;
                no room left; or gradients asked of a kind that stores copies.
        """
        self._check(k, v)
        kv = self._store(k, v)
        if self._like is None:  # after the store: a refused update binds nothing
            self._like = _layout(k, v)
        self.seen += k.shape[1]
        return kv

    def __copy__(self) -> KVCache:
        copied: KVCache = with_own_storage(self)
        return copied

    def after(self, t: int) -> int:
        """How many keys an update of ``t`` tokens gives back, which a mask must fit."""
        return self.length + t

    def kept(self, t: int) -> Int[Tensor, " s"]:
        """Places in the text of the keys that an update of ``t`` tokens gives back."""
        return torch.arange(self.seen + t)

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
        check_tensors(f"{name}.update", k, v)
        if k.ndim != 4 or v.ndim != 4 or k.shape[:3] != v.shape[:3] or 0 in (*k.shape[2:], v.shape[3]):
            raise ShapeError(
                f"{name}.update k, v",
                got=f"{tuple(k.shape)} and {tuple(v.shape)}",
                want="k b t h e and v b t h c, of the same tokens and heads",
                remedy="Split the heads before caching.",
            )
        if (k.dtype, k.device) != (v.dtype, v.device) or not k.is_floating_point():
            raise ShapeError(
                f"{name}.update k, v",
                got=f"{k.dtype} on {k.device} and {v.dtype} on {v.device}",
                want="floats of one dtype on one device",
                remedy="Convert one of them with .to().",
            )
        if self._like is not None and self._like != _layout(k, v):
            raise ShapeError(
                f"{name}.update batch, heads, features of k and v, dtype, device",
                got=_layout(k, v),
                want=f"{self._like}, as in the first update",
                remedy="Call reset() before another batch, and one cache a layer.",
            )
        if not isinstance(self, AppendCache) and torch.is_grad_enabled() and (k.requires_grad or v.requires_grad):
            raise ShapeError(
                f"{name}.update",
                got="tensors that require grad",
                want="plain values: this kind stores copies, through which no gradient would flow",
                remedy="Decode under torch.no_grad(), or use AppendCache.",
            )


def _layout(k: Tensor, v: Tensor) -> tuple[object, ...]:
    """What must not change between two updates."""
    return (k.shape[0], *k.shape[2:], v.shape[3], k.dtype, k.device)


def room(like: Tensor, *shape: int) -> Tensor:
    """Return an unfilled block to write tokens into, within inference mode and outside it."""
    if torch.compiler.is_compiling():
        return like.new_empty(shape)
    with torch.inference_mode(False):
        return like.new_empty(shape)


def with_own_storage(cache: Any) -> Any:
    """Return a shallow copy whose tensors are its own: in one block two texts would overwrite each other."""
    twin = object.__new__(type(cache))
    for name, x in vars(cache).items():
        setattr(twin, name, x.clone() if isinstance(x, Tensor) else list(x) if isinstance(x, list) else x)
    return twin


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
        check_size("StaticCache", "capacity", capacity)
        self.capacity = capacity
        self._k, self._v = torch.empty(0), torch.empty(0)
        self._held: tuple[object, ...] = ()

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
        layout = _layout(k, v)
        if self._held != layout:
            self._k, self._v = (room(x, x.shape[0], self.capacity, *x.shape[2:]) for x in (k, v))
            self._held = layout
        self._k[:, self.seen : end] = k
        self._v[:, self.seen : end] = v
        return self._k[:, :end], self._v[:, :end]

    def _clear(self) -> None:
        """Keep the block: the next text writes over it."""


@final
class QuantizedCache(KVCache):
    """Store int8 or fp8 with one float32 scale a token and head; give back the dtype that came.

    Bytes: ``e + 4`` a vector, against ``2e`` in float16: 53 % at ``e = 64``. Every token is
    rounded once, when it is stored, so reading order does not matter; :func:`handbook_src.functional.quantize`
    has the bounds.

    Args:
        dtype: ``torch.int8`` or ``torch.float8_e4m3fn``.
    """

    def __init__(self, dtype: torch.dtype = torch.int8) -> None:
        super().__init__()
        if not isinstance(dtype, torch.dtype) or dtype not in QUANTIZED:
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

    Token by token this equals full attention under the rule ``causal & (window | sinks)``.  A mask given beside it
    counts places from the first token, dropped or not: a rule is joined to that one, a tensor has a column for each.
    A chunk of ``t`` tokens is attended before it evicts: its first query sees its own
    window and the later ones up to ``t - 1`` tokens more.

    Positions are the model's affair: a key keeps whatever position it was computed with.  For an endless
    text, store keys before their rotation and count positions inside what ``update()`` returns,
    0 to ``s - 1``, as the paper does.

    Args:
        sinks: tokens at the start that are never dropped; 0 gives a plain sliding window.
        window: the latest tokens, the newest included.

    Source:
        Xiao et al. 2023, section 3.2, arXiv:2309.17453
    """

    def __init__(self, sinks: int = 4, window: int = 1020) -> None:
        super().__init__()
        check_size("SinkCache", "sinks", sinks, least=0)
        check_size("SinkCache", "window", window)
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

    def after(self, t: int) -> int:
        return len(self.kept(t))

    def kept(self, t: int) -> Int[Tensor, " s"]:
        end = self.seen + t
        last = max(end - (self.window + max(t, 1) - 1), self.sinks)
        return torch.cat((torch.arange(min(self.sinks, end)), torch.arange(last, max(last, end))))

    def _evict(self, x: Tensor, last: int) -> Tensor:
        if x.shape[1] <= self.sinks + last:
            return x
        return torch.cat([x[:, : self.sinks], x[:, x.shape[1] - last :]], 1)

    def _clear(self) -> None:
        self._kv = None
