"""Linear attention: weights that are inner products of features, so keys and values sum up into one state.

Any non-negative feature map gives an attention; :func:`kernel_attention` is the one core
that :mod:`handbook_src.functional.attention.performer` shares.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from jaxtyping import Bool, Float
from torch import Tensor

from handbook_src.check import (
    check_floating,
    check_one_device,
    check_one_dtype,
    check_size,
    known_finite,
)
from handbook_src.errors import ConfigError, ShapeError
from handbook_src.functional.attention.attention import check_mask, refuse
from handbook_src.functional.attention.mask import Mask, full
from handbook_src.functional.attention.mask import causal as causal_rule
from handbook_src.precision import at_least_float32

Form = Literal["auto", "parallel", "chunked", "recurrent"]
FORMS = ("auto", "parallel", "chunked", "recurrent")
#: ``elu`` is the paper's elu(x) + 1; a callable maps ``... e`` to ``... f``.
FeatureMap = Literal["elu", "relu"] | Callable[[Tensor], Tensor]


class LinearState(NamedTuple):
    """What linear attention remembers of all keys and values: its size does not grow with them.

    Args:
        kv: the sum of the outer products of key features and values.
        k: the sum of the key features, which normalises.
    """

    kv: Float[Tensor, "b g f c"]
    k: Float[Tensor, "b g f"]


def linear_attention(
    q: Float[Tensor, "b t h e"],
    k: Float[Tensor, "b s g e"],
    v: Float[Tensor, "b s g c"],
    mask: Mask | Bool[Tensor, ...] | None = None,
    *,
    feature_map: FeatureMap = "elu",
    causal: bool = False,
    normalize: bool = True,
    form: Form = "auto",
    chunk: int = 64,
    state: LinearState | None = None,
) -> Float[Tensor, "b t h c"]:
    r"""Average the values, weighted by inner products of features of query and key.

    .. math::
        y_i = \frac{\phi(q_i)^\top \sum_j \phi(k_j)\, v_j^\top}{\phi(q_i)^\top \sum_j \phi(k_j)}, \qquad
        \phi(x) = \operatorname{elu}(x) + 1

    The sums run over all keys, or over :math:`j \le i` if ``causal``.  Both sums are
    computed once for all queries, so the cost grows linearly with the length.  The forms
    of the causal sum are equal: ``parallel`` writes out all ``t s`` weights, ``recurrent``
    carries the sums from step to step, ``chunked`` does the first within chunks and the
    second between them; ``auto`` takes it where there is more than one chunk.  Without
    ``causal`` there is one sum, and only ``parallel`` writes out the weights.

    Below zero :math:`\phi(x) = e^x` is computed as that: ``elu(x) + 1`` cancels to 0 from -17 on.
    A denominator that is 0 gives zeros; there is no epsilon.
    Everything is computed in float32 at least and rounded once, under autocast too.
    A NaN or infinite vector reaches no query that it is hidden from, forward or backward.

    Args:
        q: queries.
        k: keys; fewer heads than ``q`` are shared by groups of consecutive query heads.
        v: values; their features may differ in number from the keys'.
        mask: hides keys from all queries alike: a rule such as ``padding(lengths)``, or a boolean
            tensor (true = may attend) that broadcasts from ``b 1 1 s``.
        feature_map: ``elu``, ``relu``, or a function from ``... e`` to ``... f``.
        causal: queries are the last ``t`` of ``s`` positions and see no later key.
        normalize: whether to divide by the sum of the weights.
        form: how the sum is computed.
        chunk: positions of a chunk.
        state: the sums of keys that came before these, from :func:`linear_attention_state`.

    Raises:
        ShapeError: shapes or dtypes that don't fit, a mask that differs by query or head, more queries than
            keys under ``causal``, a state of another shape, dtype or device.
        ConfigError: an unknown feature map or form, a chunk below 1, a state that is none.

    Source:
        Katharopoulos et al. 2020, eqs. 4 to 12, arXiv:2006.16236; chunks: Hua et al. 2022, section 3.2,
        arXiv:2202.10447
    """
    check_qkv("linear attention", q, k, v)
    seen, causal = key_mask("linear attention", mask, q, k, causal)
    phi, dtype = feature_function(feature_map), v.dtype
    (q, k, v), broken = shielded(q, k, v, seen, causal)
    q, k = phi(q), phi(k)
    if k.shape[:3] != v.shape[:3]:
        refuse("feature map", f"{tuple(k.shape)} for keys", f"{(*v.shape[:3], 'f')}", "Change the last axis alone.")
    out = kernel_attention(q, k, v, seen, causal=causal, normalize=normalize, form=form, chunk=chunk, state=state)
    return (out if broken is None else out.masked_fill(broken, torch.nan)).to(dtype)


def linear_attention_state(
    k: Float[Tensor, "b s g e"],
    v: Float[Tensor, "b s g c"],
    mask: Mask | Bool[Tensor, ...] | None = None,
    *,
    feature_map: FeatureMap = "elu",
) -> LinearState:
    r"""Sum up keys and values: what decoding after a prompt starts from.

    .. math:: S = \sum_j \phi(k_j)\, v_j^\top, \qquad z = \sum_j \phi(k_j)

    The state is float32 at least.  Hidden keys, whatever they hold, add nothing.

    Args:
        k: keys of the prompt.
        v: its values.
        mask: as for :func:`linear_attention`.
        feature_map: as for :func:`linear_attention`.

    Raises:
        ShapeError: as for :func:`linear_attention`.
        ConfigError: an unknown feature map.

    Source:
        Katharopoulos et al. 2020, eqs. 10 and 11, arXiv:2006.16236
    """
    check_qkv("linear attention", k, k, v)
    seen, _ = key_mask("linear attention", mask, k, k, False)
    k, v = (at_least_float32(hidden_to_zero(x, seen)) for x in (k, v))
    return _state(hidden_to_zero(feature_function(feature_map)(k), seen), v)


def linear_attention_step(
    state: LinearState | None,
    q: Float[Tensor, "b h e"],
    k: Float[Tensor, "b g e"],
    v: Float[Tensor, "b g c"],
    *,
    feature_map: FeatureMap = "elu",
    normalize: bool = True,
) -> tuple[Float[Tensor, "b h c"], LinearState]:
    r"""Decode one position: add its key and value to the state, then ask the state.

    .. math::
        S_i = S_{i-1} + \phi(k_i)\, v_i^\top, \qquad z_i = z_{i-1} + \phi(k_i), \qquad
        y_i = \frac{S_i^\top \phi(q_i)}{z_i^\top \phi(q_i)}

    Time and memory do not depend on the position.  The state that came in is not changed.

    Args:
        state: the sums so far; ``None`` at the first position.
        q: the position's queries.
        k: its keys.
        v: its values.
        feature_map: as for :func:`linear_attention`.
        normalize: as for :func:`linear_attention`.

    Raises:
        ShapeError: shapes that don't fit, or a state of another shape, dtype or device.
        ConfigError: an unknown feature map.

    Source:
        Katharopoulos et al. 2020, eqs. 16 to 20, arXiv:2006.16236
    """
    for x in (q, k, v):
        if x.ndim != 3:
            refuse("decoding step", tuple(x.shape), "three axes, (b, h, e)", "Take one position: x[:, i].")
    check_qkv("linear attention", q[:, None], k[:, None], v[:, None])
    phi = feature_function(feature_map)
    return kernel_step(state, phi(at_least_float32(q)), phi(at_least_float32(k)), v, normalize=normalize)


def kernel_attention(
    q: Float[Tensor, "b t h f"],
    k: Float[Tensor, "b s g f"],
    v: Float[Tensor, "b s g c"],
    seen: Bool[Tensor, "b s"] | None = None,
    *,
    weight: Float[Tensor, "b s g"] | None = None,
    causal: bool = False,
    normalize: bool = True,
    form: Form = "auto",
    chunk: int = 64,
    state: LinearState | None = None,
) -> Float[Tensor, "b t h c"]:
    r"""Attend with features that are given: the core of every linear attention.

    .. math:: y_i = \frac{\sum_j (\phi(q_i)^\top \phi(k_j))\, w_j v_j}{\sum_j (\phi(q_i)^\top \phi(k_j))\, w_j}

    The result has the dtype of ``v``.  See :func:`linear_attention`, which maps queries and keys to features first.

    Args:
        q: features of the queries.
        k: features of the keys.
        v: values.
        seen: which keys are there for anyone.
        weight: factors :math:`w_j` that all features of a key share; 1 unless given.
        causal: as for :func:`linear_attention`.
        normalize: as for :func:`linear_attention`.
        form: as for :func:`linear_attention`.
        chunk: as for :func:`linear_attention`.
        state: as for :func:`linear_attention`.

    Raises:
        ShapeError: a state of another shape, dtype or device.
        ConfigError: an unknown form, a chunk below 1.

    Source:
        Katharopoulos et al. 2020, eqs. 4 to 12, arXiv:2006.16236
    """
    if form not in FORMS:
        raise ConfigError("linear attention form", got=repr(form), want=f"one of {list(FORMS)}", remedy="Use 'auto'.")
    check_size("linear attention", "chunk", chunk)
    dtype, heads, (t, s) = v.dtype, q.shape[2], (q.shape[1], k.shape[1])
    k, v = hidden_to_zero(k, seen), hidden_to_zero(v, seen)
    q, k, v = (at_least_float32(x) for x in (q, k, v))
    with exactly(q):
        if state is not None:
            check_state(state, k, v)
        sums = None if state is None else state.kv
        v = v if weight is None else v * weight[..., None]
        if normalize:  # the weights of the keys beside their values: what they sum up to is the denominator
            v = F.pad(v, (0, 1), value=1.0) if weight is None else torch.cat([v, weight[..., None]], -1)
            sums = None if state is None else torch.cat([state.kv, state.k[..., None]], -1)
        if causal and s > t and form != "parallel":  # what came before the first query is one sum
            sums, k, v = _sum(k[:, : s - t], v[:, : s - t], sums), k[:, s - t :], v[:, s - t :]
        q = rearrange(q, "b t (g r) f -> b t g r f", g=k.shape[2])
        if form == "parallel":
            out = _parallel(q, k, v, causal, sums)
        elif form == "recurrent":
            out = _recurrent(q, k, v, causal, sums)
        elif causal:
            out = _chunked(q, k, v, min(chunk, max(t, 1)), sums)
        else:
            out = _read(_sum(k, v, sums), q)
        if normalize:
            out = _divided(out[..., :-1], out[..., -1:])
    return rearrange(out, "b t g r c -> b t (g r) c", g=k.shape[2], r=heads // k.shape[2]).to(dtype)


def kernel_step(
    state: LinearState | None,
    q: Float[Tensor, "b h f"],
    k: Float[Tensor, "b g f"],
    v: Float[Tensor, "b g c"],
    *,
    normalize: bool = True,
) -> tuple[Float[Tensor, "b h c"], LinearState]:
    r"""Decode one position with features that are given: the step of every linear attention.

    .. math::
        S \leftarrow S + \phi(k)\, v^\top, \qquad z \leftarrow z + \phi(k), \qquad y = S^\top \phi(q) / z^\top \phi(q)

    Args:
        state: the sums so far; ``None`` at the first position.
        q: features of the queries.
        k: features of the keys.
        v: values.
        normalize: as for :func:`linear_attention`.

    Raises:
        ShapeError: a state of another shape, dtype or device.

    Source:
        Katharopoulos et al. 2020, eqs. 16 to 20, arXiv:2006.16236
    """
    dtype = v.dtype
    q, k, v = (at_least_float32(x)[:, None] for x in (q, k, v))
    with exactly(q):
        if state is not None:
            check_state(state, k, v)
        state = _state(k, v, state)
        q = rearrange(q, "b t (g r) f -> b t g r f", g=k.shape[2])
        out = _read(state.kv, q)
        if normalize:
            out = _divided(out, _read(state.k[..., None], q))
    return rearrange(out, "b 1 g r c -> b (g r) c").to(dtype), state


def _state(k: Tensor, v: Tensor, before: LinearState | None = None) -> LinearState:
    kv, z = _sum(k, v), k.sum(1)
    return LinearState(kv, z) if before is None else LinearState(before.kv + kv, before.k + z)


def _sum(k: Tensor, v: Tensor, before: Tensor | None = None) -> Tensor:
    """The sum of the outer products of features and values, ``b g f c``."""
    kv = torch.einsum("bsgf,bsgc->bgfc", k, v)
    return kv if before is None else before + kv


def _read(sums: Tensor, q: Tensor) -> Tensor:
    return torch.einsum("btgrf,bgfc->btgrc", q, sums)


def _divided(out: Tensor, total: Tensor) -> Tensor:
    """Divide by the sum of the weights; a query all of whose weights are zero gets zeros."""
    return out / total.masked_fill(total == 0, torch.inf)


def _parallel(q: Tensor, k: Tensor, v: Tensor, causal: bool, sums: Tensor | None) -> Tensor:
    """All weights at once: quadratic, and the definition."""
    weights = torch.einsum("btgrf,bsgf->bgrts", q, k)
    if causal:
        weights = weights.masked_fill(~causal_rule.dense(q.shape[1], k.shape[1], device=q.device), 0.0)
    out = torch.einsum("bgrts,bsgc->btgrc", weights, v)
    return out if sums is None else out + _read(sums, q)


def _recurrent(q: Tensor, k: Tensor, v: Tensor, causal: bool, sums: Tensor | None) -> Tensor:
    """One position after the other, as an RNN whose hidden state is a matrix."""
    outs = []
    for i in range(k.shape[1]):
        sums = _sum(k[:, i : i + 1], v[:, i : i + 1], sums)
        if causal:
            outs.append(_read(sums, q[:, i : i + 1]))
    if causal and outs:
        return torch.cat(outs, 1)
    return _read(_sum(k[:, :0], v[:, :0], sums), q)


def _chunked(q: Tensor, k: Tensor, v: Tensor, chunk: int, sums: Tensor | None) -> Tensor:
    """Weights within a chunk, sums between chunks: linear, and made of matrix products."""
    (b, t, groups, shared, _), width = q.shape, v.shape[-1]
    count = max(-(-t // chunk), 1)
    q, k, v = (F.pad(x, (0, 0) * (x.ndim - 2) + (0, count * chunk - t)) for x in (q, k, v))
    q = rearrange(q, "b (n i) g r f -> (b g n) (i r) f", n=count)
    k, v = (rearrange(x, "b (n j) g f -> (b g n) j f", n=count) for x in (k, v))
    kv = _sums_before(k.mT @ v, (b, groups, count), sums)
    row = torch.arange(chunk * shared, device=q.device)[:, None] // shared
    weights = torch.bmm(q, k.mT).masked_fill(row < torch.arange(chunk, device=q.device), 0.0)
    out = torch.baddbmm(torch.bmm(weights, v), q, kv)
    return rearrange(
        out, "(b g n) (i r) c -> b (n i) g r c", b=b, g=groups, n=count, i=chunk, r=shared, c=width
    )[:, :t]  # fmt: skip


def _sums_before(x: Tensor, shape: tuple[int, int, int], start: Tensor | None) -> Tensor:
    """For each chunk the sum of the chunks before it, and of what came before them."""
    x = x.unflatten(0, shape)
    first = torch.zeros_like(x[:, :, :1]) if start is None else start[:, :, None]
    return torch.cat([first, x[:, :, :-1]], 2).cumsum(2).flatten(0, 2)


def elu_features(x: Tensor) -> Tensor:
    """The map elu(x) + 1: x + 1 above zero, exp(x) below."""
    return F.relu(x) + x.clamp_max(0.0).exp()


def feature_function(feature_map: FeatureMap) -> Callable[[Tensor], Tensor]:
    """Return the function that a feature map's name stands for."""
    if callable(feature_map):
        return feature_map
    named: dict[str, Callable[[Tensor], Tensor]] = {"elu": elu_features, "relu": F.relu}
    if not isinstance(feature_map, str) or feature_map not in named:
        want = f"one of {list(named)}, or a function"
        raise ConfigError("feature map", got=repr(feature_map), want=want, remedy="Use 'elu', the paper's.")
    return named[feature_map]


def exactly(x: Tensor) -> torch.autocast:
    """Switch autocast off, which would take the sums in half precision."""
    return torch.autocast("cpu" if x.device.type == "meta" else x.device.type, enabled=False)


def hidden_to_zero(x: Tensor, seen: Tensor | None) -> Tensor:
    return x if seen is None else x.masked_fill(~seen[:, :, None, None], 0.0)


def shielded(
    q: Tensor, k: Tensor, v: Tensor, seen: Tensor | None, causal: bool
) -> tuple[tuple[Tensor, Tensor, Tensor], Tensor | None]:
    """Zero what is hidden or not finite, in float32 at least; also say which rows, ``b t h 1``, must be NaN, if any."""
    q, k, v = (at_least_float32(x) for x in (q, hidden_to_zero(k, seen), hidden_to_zero(v, seen)))
    if known_finite(q, k, v):
        return (q, k, v), None
    bad_q, bad_k, bad_v = (((x - x).sum(-1) != 0) for x in (q, k, v))  # x - x is 0 or NaN; isfinite().all() takes 10 x
    bad_k = bad_k | bad_v
    first = k.shape[1] - q.shape[1]
    bad_k = bad_k.cumsum(1)[:, first:] > 0 if causal else bad_k.any(1, keepdim=True)
    broken = bad_q | repeat(bad_k, "b t g -> b t (g r)", r=q.shape[2] // k.shape[2])
    q, k, v = (x.nan_to_num(0.0, 0.0, 0.0) for x in (q, k, v))
    return (q, k, v), broken[..., None]


def check_qkv(op: str, q: Tensor, k: Tensor, v: Tensor) -> None:
    """Refuse queries, keys and values that don't fit each other."""
    check_floating(op, q, k, v)
    if not q.ndim == k.ndim == v.ndim == 4 or k.shape[:3] != v.shape[:3] or q.shape[::3] != k.shape[::3]:
        shapes = f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}"
        want = "four axes: q (b, t, h, e), k (b, s, g, e), v (b, s, g, c)"
        refuse(f"{op} inputs", shapes, want, "Split the features into heads; heads stand third.")
    check_one_dtype(op, q, k, v)
    check_one_device(op, q, k, v)
    if q.shape[3] == 0:
        refuse(f"{op} inputs", f"q {tuple(q.shape)}", "at least one feature a head", "Nothing can be compared.")
    if k.shape[2] == 0 or q.shape[2] % k.shape[2]:
        refuse(f"{op} heads", f"{q.shape[2]} query, {k.shape[2]} key", "a multiple", "Share each key head evenly.")


def key_mask(op: str, mask: object, q: Tensor, k: Tensor, causal: bool) -> tuple[Tensor | None, bool]:
    """Return which keys, ``b s``, are there for all queries, and whether the rest is causal.

    Raises:
        ShapeError: the mask is of the wrong shape, is added to the scores, or differs by query or head.
        ConfigError: it is neither rule nor tensor.
    """
    b, t, h, _ = q.shape
    s = k.shape[1]
    if causal or mask is causal_rule:
        check_mask(causal_rule, b, h, t, s)
    if mask is None or mask is full or mask is causal_rule:
        return None, causal or mask is causal_rule
    check_mask(mask, b, h, t, s)  # type: ignore[arg-type]
    remedy = "Only keys can be hidden, from all queries alike: padding(lengths) or (b, 1, 1, s); causal=True for order."
    if isinstance(mask, Mask):
        if mask.positional or mask.heads is not None:
            raise ShapeError(f"{op} mask", got=mask, want="a rule about keys alone", remedy=remedy)
        mask = mask.dense(1, s, offset=0, device=q.device)
    assert isinstance(mask, Tensor)  # check_mask has refused all else
    if mask.dtype != torch.bool:
        raise ShapeError(f"{op} mask", got=mask.dtype, want="bool", remedy="Nothing can be added to these scores.")
    if mask.shape[-2] != 1 or (mask.ndim == 4 and mask.shape[1] != 1):
        raise ShapeError(f"{op} mask", got=tuple(mask.shape), want=f"(1, {s}) or ({b}, 1, 1, {s})", remedy=remedy)
    return mask.flatten(0, -2).expand(b, s), causal


def check_state(state: LinearState, k: Tensor, v: Tensor) -> None:
    """Refuse a state that does not fit keys and values."""
    if not isinstance(state, LinearState):
        remedy = "Make it with linear_attention_state, or start from None."
        raise ConfigError(
            "state of linear attention", got=type(state).__name__, want="a LinearState or None", remedy=remedy
        )
    b, _, g, f = k.shape
    for x, shape in ((state.kv, (b, g, f, v.shape[3])), (state.k, (b, g, f))):
        if tuple(x.shape) != shape or x.dtype != k.dtype or x.device != k.device:
            got, want = f"{tuple(x.shape)} {x.dtype} on {x.device}", f"{shape} {k.dtype} on {k.device}"
            refuse("state of linear attention", got, want, "Make it with linear_attention_state for this batch.")
