"""The attentions of recurrent translation models: additive (Bahdanau) and multiplicative (Luong)."""

from __future__ import annotations

import math
from typing import Literal

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float
from torch import Tensor

from handbook_src.check import check_tensors
from handbook_src.errors import ConfigError
from handbook_src.functional.attention.attention import (
    MaskLike,
    broken_rows,
    check_mask,
    check_numbers,
    masked_softmax,
    refuse,
    without_nan,
)
from handbook_src.functional.attention.mask import Mask
from handbook_src.precision import at_least_float32

LuongScore = Literal["dot", "general", "concat"]


def additive_attention(
    query: Float[Tensor, "b t f"],
    key: Float[Tensor, "b s f"],
    value: Float[Tensor, "b s d"],
    vector: Float[Tensor, " f"],
    mask: MaskLike | None = None,
    *,
    dropout: float = 0.0,
) -> tuple[Float[Tensor, "b t d"], Float[Tensor, "b t s"]]:
    r"""Score each key with a small network, as the first attention did (Bahdanau).

    .. math::
        e_{ij} = v_a^\top \tanh(W_a s_{i-1} + U_a h_j), \qquad
        \alpha_{ij} = \operatorname{softmax}_j(e_{ij}), \qquad c_i = \sum_j \alpha_{ij} h_j

    The products come in ready: ``query`` is :math:`W_a s_{i-1}`, ``key`` is :math:`U_a h_j`,
    which is the same for all queries.  The tanh is taken on ``b t s f`` numbers, so
    memory grows with ``f`` where a dot product needs ``b t s``.

    Args:
        query: projected states.
        key: projected annotations.
        value: annotations :math:`h_j`.
        vector: :math:`v_a`.
        mask: a rule, or a tensor that is ``t s`` or broadcasts to ``b t s``.
        dropout: share of the weights that are dropped; pass 0 outside training.

    Returns:
        The context :math:`c` and the weights :math:`\alpha`.

    Raises:
        ShapeError: shapes that don't fit.
        ConfigError: ``dropout`` outside [0, 1).

    Source:
        Bahdanau et al. 2015, eqs. 5 and 6 and appendix A.1.2, arXiv:1409.0473
    """
    check_numbers(None, dropout)
    check_tensors("alignment", vector)
    _check_shapes(query, key, value, vector)
    if not (query.shape[-1] == key.shape[-1] == len(vector)):
        got = f"{query.shape[-1]}, {key.shape[-1]} and {len(vector)} features"
        refuse("additive attention's query, key and vector", got, "equal widths", "Project both to the same width.")
    (query, key, value), bad = without_nan(query, key, value)
    scores = torch.tanh(query[:, :, None] + key[:, None]) @ vector
    return _contexts(scores, value, mask, bad, dropout)


def multiplicative_attention(
    query: Float[Tensor, "b t d1"],
    key: Float[Tensor, "b s d2"],
    value: Float[Tensor, "b s d3"],
    score: LuongScore = "dot",
    weight: Float[Tensor, "rows columns"] | None = None,
    vector: Float[Tensor, " rows"] | None = None,
    mask: MaskLike | None = None,
    *,
    dropout: float = 0.0,
) -> tuple[Float[Tensor, "b t d3"], Float[Tensor, "b t s"]]:
    r"""Score each key by a product with the query (Luong's global attention).

    .. math::
        \operatorname{score}(h_t, \bar h_s) = \begin{cases}
            h_t^\top \bar h_s & \textit{dot} \\
            h_t^\top W_a \bar h_s & \textit{general} \\
            v_a^\top \tanh(W_a [h_t; \bar h_s]) & \textit{concat} \end{cases}

    No scale: the scores grow with the width.  ``concat`` multiplies both halves of
    :math:`W_a` before it adds, which makes it :func:`additive_attention`.

    Args:
        query: target states :math:`h_t`.
        key: source states :math:`\bar h_s`.
        value: what is averaged; the source states in the paper.
        score: ``dot``, ``general`` or ``concat``.
        weight: :math:`W_a`: ``d1 d2`` for general, ``rows d1+d2`` for concat.
        vector: :math:`v_a` for concat.
        mask: a rule, or a tensor that is ``t s`` or broadcasts to ``b t s``.
        dropout: share of the weights that are dropped; pass 0 outside training.

    Returns:
        The context and the weights.

    Raises:
        ConfigError: an unknown score, a weight or vector missing or not used,
            ``dropout`` outside [0, 1).
        ShapeError: shapes that don't fit.

    Source:
        Luong et al. 2015, section 3.1, arXiv:1508.04025
    """
    check_numbers(None, dropout)
    _check_shapes(query, key, value, vector)
    _check_luong(query, key, score, weight, vector)
    if score == "concat" and weight is not None and vector is not None:
        of_query, of_key = weight.split([query.shape[-1], key.shape[-1]], dim=1)
        query, key = (
            at_least_float32(query) @ at_least_float32(of_query).T,
            at_least_float32(key) @ at_least_float32(of_key).T,
        )
        return additive_attention(query, key, value, at_least_float32(vector), mask, dropout=dropout)
    (query, key, value), bad = without_nan(query, key, value)
    query = at_least_float32(query) if weight is None else at_least_float32(query) @ at_least_float32(weight)
    scores = query @ at_least_float32(key).mT
    return _contexts(scores, value, mask, bad, dropout)


def _contexts(
    scores: Tensor, value: Tensor, mask: MaskLike | None, bad: list[Tensor], dropout: float
) -> tuple[Tensor, Tensor]:
    """Weights and contexts of one head: ``b t s`` and ``b t d``."""
    b, t, s = scores.shape
    mask = mask if mask is None or isinstance(mask, Mask) else _with_head(mask)
    check_mask(mask, b, 1, t, s)
    if isinstance(mask, Mask):
        mask = mask.sdpa(t, s, device=scores.device)
    weights = masked_softmax(scores[:, None], mask)[:, 0].to(value.dtype)
    weights = F.dropout(weights, dropout) if dropout else weights
    broken = broken_rows(bad[0][..., None], (bad[1] | bad[2])[..., None], mask)[:, 0]
    return (weights @ value).masked_fill(broken, math.nan), weights.masked_fill(broken, math.nan)


def _check_shapes(query: Tensor, key: Tensor, value: Tensor, vector: Tensor | None) -> None:
    check_tensors("alignment", query, key, value, *(() if vector is None else (vector,)))
    axes = query.ndim == key.ndim == value.ndim == 3 and (vector is None or vector.ndim == 1)
    if axes and query.shape[0] == key.shape[0] and key.shape[:2] == value.shape[:2]:
        return
    got = f"query {tuple(query.shape)}, key {tuple(key.shape)}, value {tuple(value.shape)}"
    got += "" if vector is None else f", vector {tuple(vector.shape)}"
    want = "query (b, t, d1), key (b, s, d2), value (b, s, d3), a vector of one axis"
    refuse("alignment inputs", got, want, "Batches are equal, not broadcast; a single step has t = 1.")


def _with_head(mask: Tensor) -> Tensor:
    return rearrange(mask, "b t s -> b 1 t s") if isinstance(mask, Tensor) and mask.ndim == 3 else mask


def _check_luong(query: Tensor, key: Tensor, score: str, weight: Tensor | None, vector: Tensor | None) -> None:
    wants = {"dot": (False, False), "general": (True, False), "concat": (True, True)}
    if score not in wants:
        raise ConfigError("Luong score", got=repr(score), want=f"one of {list(wants)}", remedy="The paper has these.")
    given = (weight is not None, vector is not None)
    if given != wants[score]:
        want = {"dot": "neither weight nor vector", "general": "weight alone", "concat": "weight and vector"}[score]
        raise ConfigError(f"Luong score {score!r}", got=f"(weight, vector) {given}", want=want, remedy="Pass these.")
    check_tensors("alignment", *(x for x in (weight, vector) if x is not None))
    d1, d2 = query.shape[-1], key.shape[-1]
    if score == "dot" and d1 != d2:
        refuse("Luong's dot score", f"{d1} and {d2} features", "equal widths", "Use score='general'.")
    want_shape = (d1, d2) if score == "general" else (len(vector) if vector is not None else 0, d1 + d2)
    if weight is not None and tuple(weight.shape) != want_shape:
        refuse(f"Luong's weight for {score}", tuple(weight.shape), f"{want_shape}", "See the equation.")
