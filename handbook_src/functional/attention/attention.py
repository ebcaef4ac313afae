"""Scaled dot-product attention as a function.

Tensors are batch first and features last; heads stand before features (``b t h e``).
A mask is a rule of :mod:`handbook_src.functional.attention.mask`, a boolean tensor (true =
may attend) or a floating tensor that is added to the scores.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from jaxtyping import Bool, Float
from torch import Tensor

from handbook_src.check import (
    check_floating,
    check_one_dtype,
    check_positive,
    check_probability,
    check_tensors,
    known_broken,
    known_finite,
)
from handbook_src.dispatch import Backend, resolve
from handbook_src.errors import ConfigError, ShapeError
from handbook_src.functional.attention.mask import Mask, full
from handbook_src.functional.attention.mask import causal as causal_rule
from handbook_src.precision import at_least_float32, statistic_dtype

MaskLike = Mask | Bool[Tensor, "..."] | Float[Tensor, "..."]


def scaled_dot_product_attention(
    q: Float[Tensor, "b t h e"],
    k: Float[Tensor, "b s g e"],
    v: Float[Tensor, "b s g c"],
    mask: MaskLike | None = None,
    *,
    causal: bool = False,
    scale: float | None = None,
    dropout: float = 0.0,
    backend: Backend = "auto",
) -> Float[Tensor, "b t h c"]:
    r"""Average the values, weighted by how well each key matches the query.

    .. math:: \operatorname{Attention}(Q, K, V) = \operatorname{softmax}\!\Big(\frac{QK^\top}{\sqrt{e}} + M\Big) V

    A query that may attend to nothing gets zeros, never NaN, and passes no gradient.
    The reference takes the softmax in float32 at least, and a NaN or infinite key or
    value reaches no query that it is hidden from, forward or backward.  The torch
    backend shields only from keys that a padding rule or a mask tensor hides from every
    query, at the price of a copy of ``k`` and ``v``.

    Args:
        q: queries.
        k: keys; fewer heads than ``q`` are shared by groups of consecutive query heads.
        v: values; their features may differ in number from the keys'.
        mask: a rule, a boolean tensor (true = may attend) or one added to the scores;
            tensors are ``t s`` or broadcast to ``b h t s``.
        causal: queries are the last ``t`` of ``s`` positions and see no later key;
            joined with ``mask`` by *and*.
        scale: factor on the scores; :math:`1/\sqrt e` unless given.
        dropout: share of the weights that are dropped; pass 0 outside training.
        backend: ``auto`` takes torch's fused operation, fastest wherever it was measured.  It multiplies what is hidden
            by zero, and zero times NaN is NaN: where a NaN is seen beforehand (eager, on a CPU) the reference answers.

    Raises:
        ShapeError: shapes, dtypes or devices that don't fit, heads that don't divide, a mask of the
            wrong shape or dtype, more queries than keys under a causal rule.
        ConfigError: ``dropout`` outside [0, 1), ``scale`` not positive and finite, inputs that are no
            tensors, a mask that is neither rule nor tensor.

    Source:
        Vaswani et al. 2017, eq. 1, arXiv:1706.03762
    """
    check_qkv(q, k, v)
    check_numbers(scale, dropout)
    chosen = resolve("scaled_dot_product_attention", backend, {"torch": None, "reference": None})
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    mask = _joined(mask, causal, q, k)
    if chosen == "torch" and (mask is None or not known_broken(q, k, v)):
        return _torch(q, k, v, mask, scale, dropout)
    mask = _dense(mask, q, k)
    (q, k, v), (bad_q, bad_k, bad_v) = without_nan(q, k, v)
    weights = _weights(q, k, mask, scale)
    weights = F.dropout(weights, dropout) if dropout else weights
    out = torch.einsum("bhts,bshc->bthc", weights.to(v.dtype), _for_each_head(v, q))
    return out.masked_fill(broken_rows(bad_q, bad_k | bad_v, mask).transpose(1, 2), math.nan)


def attention_weights(
    q: Float[Tensor, "b t h e"],
    k: Float[Tensor, "b s g e"],
    mask: MaskLike | None = None,
    *,
    causal: bool = False,
    scale: float | None = None,
) -> Float[Tensor, "b h t s"]:
    r"""Return the weights of :func:`scaled_dot_product_attention`, for looking at.

    .. math:: A = \operatorname{softmax}\!\Big(\frac{QK^\top}{\sqrt{e}} + M\Big)

    A row that may attend to nothing is all zero; every other row sums to one.

    Args:
        q: queries.
        k: keys.
        mask: as for :func:`scaled_dot_product_attention`.
        causal: as for :func:`scaled_dot_product_attention`.
        scale: factor on the scores; :math:`1/\sqrt e` unless given.

    Raises:
        ShapeError: shapes that don't fit, or a mask of the wrong shape or dtype.
        ConfigError: ``scale`` is not positive.

    Source:
        Vaswani et al. 2017, eq. 1, arXiv:1706.03762
    """
    check_qkv(q, k, k)
    check_numbers(scale, 0.0)
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    mask = _dense(_joined(mask, causal, q, k), q, k)
    (q, k), bad = without_nan(q, k)
    return _weights(q, k, mask, scale).to(q.dtype).masked_fill(broken_rows(bad[0], bad[1], mask), math.nan)


def _torch(q: Tensor, k: Tensor, v: Tensor, mask: MaskLike | None, scale: float, dropout: float) -> Tensor:
    """Torch's fused operation, which wants ``b h t e``."""
    t, s = q.shape[1], k.shape[1]
    if mask is causal_rule and t == 1:
        mask = None
    # branches: under torch.compile sizes may be symbols, and torch's operation takes no symbolic flag
    is_causal = grouped = False
    if mask is causal_rule and t == s:
        is_causal = True
    if q.shape[2] != k.shape[2]:
        grouped = True
    bias: Tensor | None = None
    if mask is not None and not is_causal:
        bias = mask.sdpa(t, s, device=q.device) if isinstance(mask, Mask) else mask
    if bias is not None and not (isinstance(mask, Mask) and mask.batch is None):
        k, v = _blank(k, v, bias)  # a copy of both; rules that know no samples hold no padding
    if bias is not None:
        bias = bias if bias.dtype == torch.bool else _narrowed(bias, q.dtype)
    wide = v.shape[-1]
    if q.shape[-1] != wide and t > 8 and not dropout and q.device.type == "cpu":
        q, k, v = _of_one_width(q, k, v)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    shape = q.shape[:3]
    if grouped and t == 1 and q.device.type == "cpu" and (bias is None or bias.ndim < 4 or bias.shape[1] == 1):
        # the heads of a group as its queries: torch repeats k and v otherwise, 2 to 4 times the time in decoding
        q, grouped = q.reshape(q.shape[0], k.shape[1], shape[1] // k.shape[1], q.shape[3]), False
    out = F.scaled_dot_product_attention(
        q, k, v, attn_mask=bias, dropout_p=dropout, is_causal=is_causal, scale=scale, enable_gqa=grouped
    ).reshape(*shape, v.shape[3])
    if bias is not None and bias.device.type != "cpu":  # CPU gives zeros by itself (torch 2.11 to 2.13)
        out = out.masked_fill(~_allowed(bias).any(-1, keepdim=True), 0.0)
    return out.transpose(1, 2)[..., :wide]


def _of_one_width(*tensors: Tensor) -> list[Tensor]:
    """Zeros behind the features: torch's tiled kernel for CPUs wants one width, and is 3 to 4 times as fast."""
    width = max(x.shape[-1] for x in tensors)
    return [F.pad(x, (0, width - x.shape[-1])) for x in tensors]


def _narrowed(bias: Tensor, dtype: torch.dtype) -> Tensor:
    """Convert a bias so that what is finite stays finite: no -1e9 may turn into an infinity."""
    limits = torch.finfo(dtype)
    if torch.finfo(bias.dtype).max > limits.max:
        bias = torch.where(bias.isfinite(), bias.clamp(limits.min, limits.max), bias)
    return bias.to(dtype)


def _blank(k: Tensor, v: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """Zero the keys and values that no query of any head may see: 0 * NaN is NaN."""
    seen = seen_by_any(bias)
    hidden = ~seen.expand(k.shape[0] if seen.ndim > 1 else 1, k.shape[1])[..., None, None]
    return k.masked_fill(hidden, 0.0), v.masked_fill(hidden, 0.0)


def seen_by_any(mask: Tensor) -> Tensor:
    """Which keys any query of any head may see: ``s``, or ``b s`` where the mask knows samples."""
    seen = _allowed(mask).any(-2)
    return seen.any(1) if seen.ndim == 3 else seen


def _weights(q: Tensor, k: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    wide = statistic_dtype(q)  # products of finite halves may be infinite
    k = _for_each_head(k, q)
    return masked_softmax(torch.einsum("bthe,bshe->bhts", q.to(wide), k.to(wide)) * scale, mask)


def masked_softmax(scores: Tensor, mask: Tensor | None) -> Tensor:
    """Softmax over the allowed keys, in float32 or better; an empty row is zero."""
    scores = at_least_float32(scores)
    if mask is None:
        return scores.softmax(-1)
    hidden = ~_allowed(mask)
    if mask.is_floating_point():
        scores = scores + mask.masked_fill(hidden, 0.0)
    empty = hidden.all(-1, keepdim=True)
    scores = scores.masked_fill(hidden, -math.inf).masked_fill(empty, 0.0)
    return scores.softmax(-1).masked_fill(hidden, 0.0)


def _allowed(mask: Tensor) -> Tensor:
    return mask if mask.dtype == torch.bool else ~mask.isneginf()


def without_nan(*tensors: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """Replace NaN and infinity by zero; also say in which vectors one stood."""
    return [x.nan_to_num(0.0, 0.0, 0.0) for x in tensors], [~x.isfinite().all(-1) for x in tensors]


def shielded(
    attend: Callable[[Tensor, Tensor, Tensor, float], Tensor], q: Tensor, k: Tensor, v: Tensor, dropout: float
) -> Tensor:
    """Attend so that a NaN or infinite key or value reaches the queries that see it and no other, backward as well.

    Where it is not known that all is finite (something is not, or looking would wait for a device or break a graph),
    attention is taken of zeros in their place, and once more, with one feature, of the marks of what is broken: a
    query that sees one gets a mean above zero.
    """
    if known_finite(q, k, v):
        return attend(q, k, v, dropout)
    (q, k, v), (bad_q, bad_k, bad_v) = without_nan(q, k, v)
    marks = (bad_k | bad_v)[..., None].float()
    sees = attend(torch.zeros_like(bad_q[..., None], dtype=marks.dtype), torch.zeros_like(marks), marks, 0.0) > 0
    return attend(q, k, v, dropout).masked_fill(sees | bad_q[..., None], math.nan)


def under_rule(
    rule: Mask, backend: Backend, q: Tensor, k: Tensor, v: Tensor, scale: float | None, dropout: float
) -> Tensor:
    """Attention under a rule that is written out, shielded whichever backend computes it."""
    attend = partial(_ruled, rule, backend, scale)
    return attend(q, k, v, dropout) if backend == "reference" else shielded(attend, q, k, v, dropout)


def _ruled(
    rule: Mask | None, backend: Backend, scale: float | None, q: Tensor, k: Tensor, v: Tensor, dropout: float
) -> Tensor:
    return scaled_dot_product_attention(q, k, v, rule, scale=scale, dropout=dropout, backend=backend)


def broken_rows(bad_q: Tensor, bad_k: Tensor, mask: Tensor | None) -> Tensor:
    """Rows, ``b h t 1``, whose query is not finite or that may see a key or value that is not."""
    groups = bad_q.shape[2] // bad_k.shape[2]
    seen = repeat(bad_k, "b s g -> b (g r) 1 s", r=groups)
    seen = seen if mask is None else seen & _allowed(mask)
    return rearrange(bad_q, "b t h -> b h t 1") | seen.any(-1, keepdim=True)


def _dense(mask: MaskLike | None, q: Tensor, k: Tensor) -> Tensor | None:
    return mask.sdpa(q.shape[1], k.shape[1], device=q.device) if isinstance(mask, Mask) else mask


def _for_each_head(x: Tensor, q: Tensor) -> Tensor:
    groups = q.shape[2] // x.shape[2]
    return x if groups == 1 else repeat(x, "b s g e -> b s (g r) e", r=groups)


def _joined(mask: MaskLike | None, causal: bool, q: Tensor, k: Tensor) -> MaskLike | None:
    """Check the mask, and join it with the causal rule."""
    b, t, h, _ = q.shape
    s = k.shape[1]
    check_mask(mask, b, h, t, s)
    if isinstance(mask, Tensor) and mask.device != q.device:
        refuse("attention mask", f"one on {mask.device}", f"one on {q.device}", "Move it: mask.to(q.device).")
    if mask is full:
        mask = None
    if not causal:
        return mask
    check_mask(causal_rule, b, h, t, s)
    if mask is None or mask is causal_rule:
        return causal_rule
    if isinstance(mask, Mask):
        return causal_rule & mask
    past = causal_rule.dense(t, s, device=q.device)
    return mask & past if mask.dtype == torch.bool else mask.masked_fill(~past, -math.inf)


def check_mask(mask: MaskLike | None, b: int, h: int, t: int, s: int) -> None:
    if mask is None:
        return
    if isinstance(mask, Mask):
        mask._start(t, s, None)
        shape: tuple[int, ...] = (1 if mask.batch is None else mask.batch, mask.heads or 1, t, s)
    elif not isinstance(mask, Tensor):
        remedy = "Call the factory, as in window(256), or make a list a tensor."
        raise ConfigError("attention mask", got=repr(mask), want="a Mask or a tensor", remedy=remedy)
    elif mask.dtype != torch.bool and not mask.is_floating_point():
        refuse("attention mask dtype", mask.dtype, "bool or floating", "Use mask.bool(), where true = may attend.")
    else:
        shape = tuple(mask.shape)
    fits = len(shape) in (2, 4) and all(n in (1, m) for n, m in zip(shape[::-1], (s, t, h, b), strict=False))
    if not fits or shape[-1:] == (1,) != (s,):
        want = f"({t}, {s}) or broadcastable to {(b, h, t, s)}"
        refuse("attention mask", shape, want, "Name all four axes, b h t s, where it differs by sample or head.")


def check_qkv(q: Tensor, k: Tensor, v: Tensor) -> None:
    """Refuse queries, keys and values that don't fit together."""
    check_alike(q, k, v)
    if q.ndim == 4 and q.shape[3] == 0:
        refuse("attention inputs", f"q {tuple(q.shape)}", "at least one feature a head", "1/sqrt(0) is no scale.")
    if q.ndim == k.ndim == v.ndim == 4 and k.shape[:3] == v.shape[:3] and q.shape[::3] == k.shape[::3]:
        if 0 in (q.shape[2], k.shape[2]) or q.shape[2] % k.shape[2]:
            heads = f"{q.shape[2]} query, {k.shape[2]} key"
            refuse("attention heads", heads, "a multiple", "Share each key head evenly.")
        return
    shapes = f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}"
    want = "four axes: q (b, t, h, e), k (b, s, g, e), v (b, s, g, c)"
    refuse("attention inputs", shapes, want, "Split the features into heads; heads stand third.")


def autocasting(x: Tensor) -> bool:
    """Whether autocast joins this tensor with others: it leaves float64 alone and knows no meta device."""
    return x.dtype != torch.float64 and not x.is_meta and torch.is_autocast_enabled(x.device.type)


def check_alike(*tensors: Tensor) -> None:
    """Refuse what is no floating tensor, and tensors of several devices or dtypes (unless autocast joins them)."""
    check_tensors("attention", *tensors)
    check_floating("attention", *tensors)
    first = tensors[0]
    if any(x.dtype != first.dtype for x in tensors) and not all(map(autocasting, tensors)):
        check_one_dtype("attention", *tensors)
    if any(x.device != first.device for x in tensors):
        devices = ", ".join(str(x.device) for x in tensors)
        refuse("attention devices", devices, "one device", "Move them with .to(device), or make the cache anew.")


def check_numbers(scale: float | None, dropout: float) -> None:
    if scale is not None:
        check_positive("attention", "scale", scale)
    check_probability("attention", "dropout", dropout)


def refuse(what: str, got: object, want: str, remedy: str) -> None:
    raise ShapeError(what, got=got, want=want, remedy=remedy)
