"""Rotary embedding against transformers, torch's ONNX operator and complex numbers; its laws; its refusals."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from handbook_src.functional.rope import apply_rope, convert_rope_weight, rope_cos_sin, rope_frequencies
from handbook_src.testing import assert_parity

SHAPES = [(2, 5, 3, 8), (1, 1, 1, 2), (3, 7, 2, 6), (2, 9, 4, 14)]


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def tables(t: int, dim: int, b: int | None = None, start: int = 0) -> tuple[Tensor, Tensor]:
    positions = torch.arange(start, start + t)
    positions = positions if b is None else positions + 3 * torch.arange(b)[:, None]
    return rope_cos_sin(positions, rope_frequencies(dim, dtype=torch.float64))


def by_complex_numbers(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """The rotation as a product with exp(i phi): the paper's own derivation."""
    half = cos.shape[-1]
    turn = torch.complex(cos, sin).unsqueeze(-2)
    r, rest = x[..., : 2 * half], x[..., 2 * half :]
    pairs = r.unflatten(-1, (half, 2)) if interleaved else r.unflatten(-1, (2, half)).transpose(-1, -2)
    y = torch.view_as_real(torch.complex(pairs[..., 0], pairs[..., 1]) * turn)
    y = y if interleaved else y.transpose(-1, -2)
    return torch.cat((y.flatten(-2), rest), -1)


@pytest.mark.parity("rope")
@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("per_sample", [False, True])
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_apply_rope_is_a_product_of_complex_numbers(shape, interleaved, per_sample, backend):
    b, t, _, e = shape
    for rotary in {e, 2, max(2, e // 4 * 2)}:  # partial rotation too
        cos, sin = tables(t, rotary, b if per_sample else None)
        assert_parity(
            lambda x, c, s: apply_rope(x, c, s, interleaved=interleaved, backend=backend),
            lambda x, c, s: by_complex_numbers(x, c, s, interleaved),
            [draw(*shape), cos, sin],
        )


@pytest.mark.law("rope")
@pytest.mark.parametrize("interleaved", [False, True])
def test_scores_depend_on_the_distance_only(interleaved):
    q, k = draw(1, 1, 2, 8), draw(1, 1, 2, 8, seed=1)

    def score(i: int, j: int) -> Tensor:
        turned = [apply_rope(x, *tables(1, 8, start=p), interleaved=interleaved) for x, p in ((q, i), (k, j))]
        return (turned[0] * turned[1]).sum(-1)

    for i, j in [(0, 0), (5, 2), (2, 5), (40, 0)]:
        for shift in (1, 17, 1000):
            torch.testing.assert_close(score(i + shift, j + shift), score(i, j), rtol=1e-9, atol=1e-10)
    assert not torch.allclose(score(5, 2), score(2, 5))  # and on its sign
    assert not torch.allclose(score(5, 2), score(5, 3))


@pytest.mark.law("rope")
@pytest.mark.parametrize("interleaved", [False, True])
def test_norms_are_preserved_and_position_zero_is_the_identity(interleaved):
    x = draw(2, 6, 3, 8)
    y = apply_rope(x, *tables(6, 8), interleaved=interleaved)
    torch.testing.assert_close(y.norm(dim=-1), x.norm(dim=-1), rtol=1e-12, atol=0)
    torch.testing.assert_close(y[:, 0], x[:, 0], rtol=0, atol=0)


@pytest.mark.law("rope")
@pytest.mark.parametrize("rotary", [None, 4])
def test_permuted_weights_give_the_other_convention_the_same_scores(rotary):
    heads, e, d = 3, 8, 5
    wq, wk, x = draw(heads * e, d), draw(heads * e, d, seed=1), draw(2, 6, d, seed=2)
    cos, sin = tables(6, rotary or e)

    def scores(wq: Tensor, wk: Tensor, interleaved: bool) -> Tensor:
        q, k = ((x @ w.T).unflatten(-1, (heads, e)) for w in (wq, wk))
        q, k = (apply_rope(y, cos, sin, interleaved=interleaved) for y in (q, k))
        return torch.einsum("bthe,bshe->bhts", q, k)

    half = scores(wq, wk, False)
    other = [convert_rope_weight(w, heads, to="interleaved", rotary_dim=rotary) for w in (wq, wk)]
    torch.testing.assert_close(scores(*other, True), half, rtol=1e-12, atol=1e-12)
    assert not torch.allclose(scores(wq, wk, True), half)
    for w, o in zip((wq, wk), other, strict=True):
        torch.testing.assert_close(convert_rope_weight(o, heads, to="half", rotary_dim=rotary), w, rtol=0, atol=0)
