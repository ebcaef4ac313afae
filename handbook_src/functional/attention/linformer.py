"""Linformer's attention: keys and values projected along the sequence to a fixed number."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from handbook_src.check import check_floating, check_one_device, check_tensors
from handbook_src.dispatch import Backend
from handbook_src.errors import ConfigError, ShapeError
from handbook_src.functional.attention.attention import attention_weights, scaled_dot_product_attention
from handbook_src.functional.attention.linear_attention import check_qkv, exactly, hidden_to_zero, key_mask
from handbook_src.functional.attention.mask import Mask
from handbook_src.precision import statistic_dtype


def linformer_attention(
    q: Float[Tensor, "b t h e"],
    k: Float[Tensor, "b s g e"],
    v: Float[Tensor, "b s g c"],
    key_projection: Float[Tensor, "... n length"],
    value_projection: Float[Tensor, "... n length"] | None = None,
    mask: Mask | Bool[Tensor, ...] | None = None,
    *,
    scale: float | None = None,
    dropout: float = 0.0,
    backend: Backend = "auto",
) -> Float[Tensor, "b t h c"]:
    r"""Attend to ``n`` mixtures of the keys and values instead of to all of them.

    .. math::
        \operatorname{head} = \operatorname{softmax}\!\Big(\frac{Q (E K)^\top}{\sqrt e}\Big) F V, \qquad
        E, F \in \mathbb R^{n \times s}

    A sequence shorter than the projections uses their first ``s`` columns, a longer one is refused.
    Hidden keys enter the mixtures as zeros; a sample all of whose keys are hidden gets zeros.
    There is no causal form: every mixture holds keys of all positions, the future's among them.
    Half precision mixes in float32 and rounds once.

    Args:
        q: queries.
        k: keys; fewer heads than ``q`` are shared by groups of consecutive query heads.
        v: values.
        key_projection: :math:`E`, one for all heads (``n length``) or one a key head (``g n length``).
        value_projection: :math:`F`, likewise; :math:`E` unless given.
        mask: hides keys from all queries alike, as for
            :func:`handbook_src.functional.linear_attention`.
        scale: factor on the scores; :math:`1/\sqrt e` unless given.
        dropout: share of the weights that are dropped; pass 0 outside training.
        backend: as for :func:`handbook_src.functional.scaled_dot_product_attention`.

    Raises:
        ShapeError: shapes or dtypes that don't fit, a sequence longer than the projections, a mask that
            differs by query or head.
        ConfigError: a causal mask, ``dropout`` outside [0, 1), ``scale`` not positive.

    Source:
        Wang et al. 2020, eq. 7, arXiv:2006.04768
    """
    check_qkv("Linformer attention", q, k, v)
    seen = _seen(mask, q, k)
    value_projection = key_projection if value_projection is None else value_projection
    mixed_k, mixed_v = mix(k, key_projection, seen), mix(v, value_projection, seen)
    if mixed_k.shape[1] != mixed_v.shape[1]:
        got = f"{mixed_k.shape[1]} mixtures of keys, {mixed_v.shape[1]} of values"
        raise ShapeError("Linformer projections", got=got, want="as many of both", remedy="Give E and F one height.")
    return scaled_dot_product_attention(q, mixed_k, mixed_v, scale=scale, dropout=dropout, backend=backend)


def linformer_weights(
    q: Float[Tensor, "b t h e"],
    k: Float[Tensor, "b s g e"],
    key_projection: Float[Tensor, "... n length"],
    mask: Mask | Bool[Tensor, ...] | None = None,
    *,
    scale: float | None = None,
) -> Float[Tensor, "b h t n"]:
    r"""Return the weights over the ``n`` mixtures, for looking at.

    .. math:: A = \operatorname{softmax}\!\Big(\frac{Q (E K)^\top}{\sqrt e}\Big)

    Args:
        q: queries.
        k: keys.
        key_projection: as for :func:`linformer_attention`.
        mask: as for :func:`linformer_attention`.
        scale: as for :func:`linformer_attention`.

    Raises:
        ShapeError: as for :func:`linformer_attention`.
        ConfigError: as for :func:`linformer_attention`.

    Source:
        Wang et al. 2020, eq. 7, arXiv:2006.04768
    """
    check_qkv("Linformer attention", q, k, k)
    return attention_weights(q, mix(k, key_projection, _seen(mask, q, k)), scale=scale)


def mix(
    x: Float[Tensor, "b s g e"], projection: Float[Tensor, "... n length"], seen: Bool[Tensor, "b s"] | None = None
) -> Float[Tensor, "b n g e"]:
    r"""Project along the sequence.

    .. math:: \bar x_i = \sum_j E_{ij}\, x_j

    Args:
        x: keys or values.
        projection: one for all heads, or one a head.
        seen: positions that are not padding.

    Raises:
        ShapeError: a projection that doesn't fit, or a sequence longer than it.

    Source:
        Wang et al. 2020, section 4, arXiv:2006.04768
    """
    check_tensors("Linformer projection", projection)
    s, heads = x.shape[1:3]
    check_floating("Linformer projection", projection)
    check_one_device("Linformer projection", x, projection)
    if (
        projection.ndim not in (2, 3)
        or (projection.ndim == 3 and projection.shape[0] != heads)
        or 0 in projection.shape
    ):
        want = f"(n, length) or ({heads}, n, length)"
        remedy = "One for all key heads, or one for each of them."
        raise ShapeError("Linformer projection", got=tuple(projection.shape), want=want, remedy=remedy)
    if s > projection.shape[-1]:
        want = f"at most {projection.shape[-1]}, the length that it was made for"
        raise ShapeError("Linformer sequence", got=s, want=want, remedy="Cut it, or make the projection longer.")
    wide = statistic_dtype(x)
    x, projection = hidden_to_zero(x, seen), projection[..., :s]
    axes = "ns" if projection.ndim == 2 else "gns"
    with exactly(x):
        return torch.einsum(f"{axes},bsge->bnge", projection.to(wide), x.to(wide)).to(x.dtype)


def _seen(mask: Mask | Tensor | None, q: Tensor, k: Tensor) -> Tensor | None:
    if isinstance(mask, Mask) and mask.positional:
        raise ConfigError(
            "Linformer attention mask",
            got=mask,
            want="a rule about keys alone, such as padding(lengths)",
            remedy="Mixtures of keys hold the future: for a causal model take linear attention or a window.",
        )
    return key_mask("Linformer attention", mask, q, k, False)[0]
