"""Tokens to vectors in a Transformer: summed with position and segment, or scaled."""

from __future__ import annotations

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor

from handbook_src.check import check_features, check_floating, check_positive, check_rank, check_size
from handbook_src.dispatch import Backend, resolve
from handbook_src.errors import ConfigError, ShapeError
from handbook_src.functional.convolution.conv_input import check_alike
from handbook_src.functional.foundations.embedding import check_range, check_table, check_tokens, embedding
from handbook_src.functional.normalisation.norm import layer_norm

_OP = "token_position_segment_embedding"


def token_position_segment_embedding(
    input_ids: Int[Tensor, "b t"] | None,
    tables: tuple[Float[Tensor, "v d"], Float[Tensor, "positions d"], Float[Tensor, "segments d"]],
    weight: Float[Tensor, " d"] | None = None,
    bias: Float[Tensor, " d"] | None = None,
    *,
    token_type_ids: Int[Tensor, "*#b t"] | None = None,
    position_ids: Int[Tensor, "*#b t"] | None = None,
    inputs_embeds: Float[Tensor, "b t d"] | None = None,
    past_key_values_length: int = 0,
    padding_idx: int | None = None,
    eps: float = 1e-12,
    backend: Backend = "auto",
) -> Float[Tensor, "b t d"]:
    r"""Add three rows, one for what the token is, one for where, one for which text; normalise the sum.

    .. math:: y_t = \operatorname{LN}\bigl(E_{w_t} + P_{p_t} + S_{s_t}\bigr)

    Half-precision tables: the reference adds in float32 and rounds once, at the end.

    Args:
        input_ids: tokens; None where ``inputs_embeds`` brings their vectors.
        tables: token, position and segment table (E, P, S).
        weight: gain of the layer norm.
        bias: shift of the layer norm.
        token_type_ids: segment of each token, ``t``, ``1 t`` or ``b t``; 0 unless given.
        position_ids: position of each token; counted from ``past_key_values_length`` unless given.
        inputs_embeds: vectors that take the place of ``E``'s rows.
        past_key_values_length: how many tokens came before, in a cache.
        padding_idx: the token whose row gets no gradient.
        eps: of the layer norm.
        backend: ``reference`` is the sum written out; ``auto`` is torch's lookup and layer norm.

    Raises:
        ConfigError: both or neither of ``input_ids`` and ``inputs_embeds``; a negative or fractional count.
        ShapeError: more tokens than positions, an id outside its table, tables of different widths,
            ids of another shape or dtype, vectors that are not floating, mixed dtypes.

    Source:
        Devlin et al. 2018, section 3 and figure 2, arXiv:1810.04805 (the figure shows the sum;
        layer norm and dropout after it are in the released code)
    """
    token_table, position_table, segment_table = tables
    for table in tables:
        check_table(table)
        check_features(_OP, table, token_table.shape[1], name="table")
    runs = resolve(_OP, backend, {"torch": None, "reference": None})
    x = _vectors(input_ids, inputs_embeds, token_table, padding_idx, runs)
    check_alike(_OP, x, *tables, weight, bias)
    positions = _positions(x, position_ids, past_key_values_length, position_table)
    segments = torch.zeros_like(positions) if token_type_ids is None else token_type_ids
    _check_ids("token_type_ids", segments, x, segment_table)
    p, s = (
        embedding(ids, table, backend=runs) for ids, table in ((positions, position_table), (segments, segment_table))
    )
    if runs == "reference" and x.dtype.itemsize == 2:
        wide_weight, wide_bias = (None if g is None else g.float() for g in (weight, bias))
        wide = x.float() + s.float() + p.float()
        return layer_norm(wide, x.shape[-1], wide_weight, wide_bias, eps, backend=runs).to(x.dtype)
    return layer_norm(x + s + p, x.shape[-1], weight, bias, eps, backend=backend)


def _vectors(
    input_ids: Tensor | None, inputs_embeds: Tensor | None, table: Tensor, padding_idx: int | None, runs: Backend
) -> Tensor:
    if (input_ids is None) == (inputs_embeds is None):
        raise ConfigError(
            f"{_OP} input",
            got="both input_ids and inputs_embeds" if input_ids is not None else "neither input_ids nor inputs_embeds",
            want="one of the two",
            remedy="Tokens are looked up; vectors take the lookup's place.",
        )
    if inputs_embeds is not None:
        check_floating(f"{_OP} inputs_embeds", inputs_embeds)
        check_rank(_OP, inputs_embeds, (3,), "(batch, tokens, features)")
        check_features(_OP, inputs_embeds, table.shape[1], name="inputs_embeds")
        return inputs_embeds
    assert input_ids is not None
    check_rank(_OP, input_ids, (2,), "(batch, tokens)")
    return embedding(input_ids, table, padding_idx, backend=runs)


def _positions(x: Tensor, position_ids: Tensor | None, past: int, table: Tensor) -> Tensor:
    check_size(_OP, "past_key_values_length", past, least=0)
    if position_ids is not None:
        _check_ids("position_ids", position_ids, x, table)
        return position_ids
    rows = table.shape[0]
    if past + x.shape[1] > rows:
        raise ShapeError(
            f"{_OP} input",
            got=f"{x.shape[1]} tokens after {past}",
            want=f"at most {rows} in all",
            remedy="Cut the text, or learn a longer position table: beyond its rows nothing was learned.",
        )
    return torch.arange(past, past + x.shape[1], device=x.device)


def _check_ids(name: str, ids: Tensor, x: Tensor, table: Tensor) -> None:
    b, t = x.shape[:2]
    if tuple(ids.shape) not in ((t,), (1, t), (b, t)):
        raise ShapeError(
            f"{_OP} {name}", got=tuple(ids.shape), want=f"{(b, t)}, {(1, t)} or {(t,)}", remedy="One id for each token."
        )
    check_tokens(ids, table)
    try:
        check_range(ids, table.shape[0])
    except ShapeError as e:
        raise ShapeError(f"{_OP} {name}", got=e.got, want=e.want.replace("tokens", "ids"), remedy=e.remedy) from None


def scaled_embedding(
    input: Int[Tensor, "*lead"],
    weight: Float[Tensor, "v d"],
    padding_idx: int | None = None,
    scale: float | None = None,
    *,
    backend: Backend = "auto",
) -> Float[Tensor, "*lead d"]:
    r"""Look up a row and multiply it by the root of its length.

    .. math:: y_t = \sqrt{d}\; E_{w_t}

    Half precision: one product, rounded once; the factor itself is not rounded.

    Args:
        input: tokens, of int32 or int64; any axes.
        weight: the table.
        padding_idx: the token whose row gets no gradient.
        scale: another factor than :math:`\sqrt d`.
        backend: ``auto`` is torch's own lookup.

    Raises:
        ConfigError: ``scale`` is not positive, or ``padding_idx`` is no row.
        ShapeError: as :func:`handbook_src.functional.embedding`.

    Source:
        Vaswani et al. 2017, section 3.4, arXiv:1706.03762
    """
    check_table(weight)
    if scale is None:
        scale = math.sqrt(weight.shape[1])
    check_positive("scaled_embedding", "scale", scale)
    return embedding(input, weight, padding_idx, backend=backend) * scale
