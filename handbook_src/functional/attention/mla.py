"""Multi-head latent attention as a function: keys and values of all heads live in one short vector a token.

What a token leaves behind is ``kv``: a latent of ``c`` features from which every head makes its key
and its value, and ``r`` features of one rotary key that all heads share.

==================  ============================================  ==================================
form                what meets                                    cheaper
==================  ============================================  ==================================
``decompressed``    ``h`` keys of ``e + r``, values of ``w``      many queries: training, prompts
``absorbed``        ``h`` queries, **one** key of ``c + r``       few queries, long cache: decoding
==================  ============================================  ==================================
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from handbook_src.check import check_size
from handbook_src.dispatch import Backend, resolve
from handbook_src.errors import ConfigError, ShapeError
from handbook_src.functional.attention.attention import (
    MaskLike,
    broken_rows,
    check_alike,
    check_mask,
    check_numbers,
    scaled_dot_product_attention,
    without_nan,
)
from handbook_src.functional.attention.mask import Mask
from handbook_src.functional.attention.mask import causal as causal_rule

Form = Literal["auto", "decompressed", "absorbed"]


def latent_attention(
    q: Float[Tensor, "b t h e_plus_r"],
    kv: Float[Tensor, "b s c_plus_r"],
    up_key: Float[Tensor, "h e c"],
    up_value: Float[Tensor, "h w c"],
    mask: MaskLike | None = None,
    *,
    causal: bool = False,
    scale: float | None = None,
    form: Form = "auto",
    backend: Backend = "auto",
) -> Float[Tensor, "b t h w"]:
    r"""Attend to keys and values that are stored as one latent vector a token.

    With :math:`q = [q^C; q^R]` and ``kv`` :math:`= [c; k^R]`, for each head :math:`i`:

    .. math::
        k_{s,i} = [W^{UK}_i c_s;\; k^R_s], \qquad v_{s,i} = W^{UV}_i c_s, \qquad
        o_{t,i} = \sum_s \operatorname{softmax}_s\!\Big(\frac{q_{t,i}^\top k_{s,i}}{\sqrt{e + r}}\Big)\, v_{s,i}

    The absorbed form moves both matrices to the query's side and computes the same:

    .. math::
        q_{t,i}^\top k_{s,i} = \big[(W^{UK}_i)^\top q^C_{t,i};\; q^R_{t,i}\big]^\top [c_s;\; k^R_s], \qquad
        o_{t,i} = W^{UV}_i \sum_s a_{t,s,i}\, c_s

    ``auto`` takes the form with fewer multiplications, :func:`latent_attention_flops`.
    Queries and the shared key are turned by their positions before they come here.
    The absorbed form rounds the latent query: in half precision the two differ by that much.
    A NaN behind a padding rule, or a mask tensor that hides it from every query, reaches neither the
    output nor a gradient; the reference shields every hidden one.

    Args:
        q: queries, ``e`` features without and then ``r`` with positions.
        kv: latents and the shared rotary key of each token, what a cache keeps.
        up_key: from the latent to the keys.
        up_value: from the latent to the values.
        mask: as for :func:`handbook_src.functional.scaled_dot_product_attention`.
        causal: queries are the last ``t`` of ``s`` positions and see no later key.
        scale: factor on the scores; :math:`1/\sqrt{e + r}` unless given.
        form: which of the two computes.
        backend: of the attention in the middle.

    Raises:
        ShapeError: shapes or dtypes that don't fit, a mask of the wrong shape, more queries than keys under
            a causal rule.
        ConfigError: ``scale`` not positive, an unknown ``form``.

    Source:
        DeepSeek-AI 2024, eqs. 9 to 19 and, for the absorbed form, the end of section 2.1.2, arXiv:2405.04434
    """
    _check(q, kv, up_key, up_value)
    check_numbers(scale, 0.0)
    chosen = resolve("latent_attention", backend, {"torch": None, "reference": None})
    (b, t, h, width), s = q.shape, kv.shape[1]
    check_mask(mask, b, h, t, s)
    if causal:
        check_mask(causal_rule, b, h, t, s)
    scale = 1 / math.sqrt(width) if scale is None else scale
    absorbed = _absorbed(form, t, s, up_key, up_value, width)
    if chosen == "reference":
        (q, kv), (bad_q, bad_kv) = without_nan(q, kv)
    else:
        kv = _blank(kv, mask, t)
    attend = _attend_absorbed if absorbed else _attend_decompressed
    out = attend(q, kv, up_key, up_value, mask, causal, scale, chosen)
    if chosen == "torch":
        return out
    seen = _both(mask, causal, t, s, q.device)
    return out.masked_fill(broken_rows(bad_q, bad_kv[..., None], seen).transpose(1, 2), math.nan)


def latent_attention_flops(t: int, s: int, heads: int, *, e: int, r: int, c: int, w: int) -> dict[str, int]:
    r"""Return the multiply-adds of both forms of :func:`latent_attention` for one sample, times two.

    .. math::
        \text{decompressed} = 2 s h c (e + w) + 2 t s h (e + r + w), \qquad
        \text{absorbed} = 2 t h c (e + w) + 2 t s h (2c + r)

    Args:
        t: queries.
        s: keys.
        heads: query heads, :math:`h`.
        e: features of a head without positions.
        r: features of a head with positions.
        c: features of the latent.
        w: features of a value.

    Raises:
        ConfigError: a number that is no integer or negative.

    Source:
        counted from DeepSeek-AI 2024, eqs. 9 to 19, arXiv:2405.04434
    """
    for name, n in (("t", t), ("s", s), ("heads", heads), ("e", e), ("r", r), ("c", c), ("w", w)):
        if not isinstance(n, torch.SymInt):  # as under a compiler
            check_size("latent_attention_flops", name, n, least=0)
    return {
        "decompressed": 2 * s * heads * c * (e + w) + 2 * t * s * heads * (e + r + w),
        "absorbed": 2 * t * heads * c * (e + w) + 2 * t * s * heads * (2 * c + r),
    }


def _attend_decompressed(
    q: Tensor, kv: Tensor, up_key: Tensor, up_value: Tensor, mask: MaskLike | None, causal: bool, scale: float,
    backend: Backend,
) -> Tensor:  # fmt: skip
    """Make every head's key and value."""
    latent, turned = kv.split((up_key.shape[-1], kv.shape[-1] - up_key.shape[-1]), -1)
    k = torch.einsum("bsc,hec->bshe", latent, up_key)
    k = torch.cat((k, turned[:, :, None].expand(-1, -1, k.shape[2], -1)), -1)
    v = torch.einsum("bsc,hwc->bshw", latent, up_value)
    return scaled_dot_product_attention(q, k, v, mask, causal=causal, scale=scale, backend=backend)


def _attend_absorbed(
    q: Tensor, kv: Tensor, up_key: Tensor, up_value: Tensor, mask: MaskLike | None, causal: bool, scale: float,
    backend: Backend,
) -> Tensor:  # fmt: skip
    """Bring the queries to the latents: multi-query attention with one key of ``c + r`` features."""
    c = up_key.shape[-1]
    plain, turned = q.split((up_key.shape[1], q.shape[-1] - up_key.shape[1]), -1)
    q = torch.cat((torch.einsum("bthe,hec->bthc", plain, up_key), turned), -1)
    key = kv[:, :, None]
    # the key is its own value: nothing is copied, and torch's tiled kernel wants one width; r features are dropped
    out = scaled_dot_product_attention(q, key, key, mask, causal=causal, scale=scale, backend=backend)[..., :c]
    return torch.einsum("bthc,hwc->bthw", out, up_value)


def check_form(form: str) -> None:
    """Refuse what names no form of :func:`latent_attention`."""
    if form not in ("auto", "decompressed", "absorbed"):
        raise ConfigError(
            "latent_attention form", got=repr(form), want="'auto', 'decompressed' or 'absorbed'", remedy="Leave it out."
        )


def _absorbed(form: Form, t: int, s: int, up_key: Tensor, up_value: Tensor, width: int) -> bool:
    check_form(form)
    h, e, c = up_key.shape
    cost = latent_attention_flops(t, s, h, e=e, r=width - e, c=c, w=up_value.shape[1])
    return form == "absorbed" or (form == "auto" and cost["absorbed"] < cost["decompressed"])


def _both(mask: MaskLike | None, causal: bool, t: int, s: int, device: torch.device) -> Tensor | None:
    """Mask and causal rule as one boolean tensor: true = may attend."""
    if isinstance(mask, Mask):
        mask = mask.dense(t, s, device=device)
    elif mask is not None and mask.is_floating_point():
        mask = ~mask.isneginf()
    if not causal:
        return mask
    past = causal_rule.dense(t, s, device=device)
    return past if mask is None else mask & past


def _blank(kv: Tensor, mask: MaskLike | None, t: int) -> Tensor:
    """Zero what no query of any head may see, before a weight is multiplied with it: 0 * NaN is NaN."""
    if mask is None or (isinstance(mask, Mask) and mask.batch is None):
        return kv  # rules that know no samples hold no padding
    seen = _both(mask, False, t, kv.shape[1], kv.device)
    assert seen is not None
    seen = seen.any(-2)
    if seen.ndim == 3:
        seen = seen.any(1)
    return kv.masked_fill(~seen[..., None].expand(*seen.shape, 1), 0.0)


def _check(q: Tensor, kv: Tensor, up_key: Tensor, up_value: Tensor) -> None:
    check_alike(q, kv, up_key, up_value)
    fits = (q.ndim, kv.ndim, up_key.ndim, up_value.ndim) == (4, 3, 3, 3)
    if fits:
        (b, _, h, width), (heads, e, c) = q.shape, up_key.shape
        fits = b == kv.shape[0] and h == heads == up_value.shape[0] and c == up_value.shape[2]
        fits = fits and min(h, e, c, up_value.shape[1]) > 0 and width >= e and kv.shape[2] - c == width - e
    if not fits:
        shapes = ", ".join(
            f"{name} {tuple(x.shape)}" for name, x in (("q", q), ("kv", kv), ("up_key", up_key), ("up_value", up_value))
        )
        raise ShapeError(
            "latent_attention inputs",
            got=shapes,
            want="q (b, t, h, e + r), kv (b, s, c + r), up_key (h, e, c), up_value (h, w, c)",
            remedy="The rotary features r stand last in q and in kv.",
        )
