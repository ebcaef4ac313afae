"""Rotary embedding against transformers, torch's ONNX operator and complex numbers; its laws; its refusals."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from handbook_src.errors import ConfigError, ShapeError
from handbook_src.functional.positions.rope import apply_rope, convert_rope_weight, rope_cos_sin, rope_frequencies
from handbook_src.testing import assert_parity, refuses
from handbook_src.testing.checker import unchecked
from handbook_src.testing.oracle import load

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
    for rotary in {e, 2, max(2, e // 4 * 2), max(2, e // 3 * 2)}:  # partial rotation too
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


# ---------------------------------------------------------------- the published implementations
@pytest.mark.outside("rope")
@pytest.mark.parametrize("interleaved", [False, True])
def test_apply_rope_is_transformers(interleaved):
    cos, sin = tables(7, 8)

    def theirs(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        if interleaved:
            return load("transformers.models.gptj.modeling_gptj").apply_rotary_pos_emb(x, sin[None], cos[None])
        llama = load("transformers.models.llama.modeling_llama")
        cos, sin = (torch.cat((y, y), -1)[None] for y in (cos, sin))
        return llama.apply_rotary_pos_emb(x, x, cos, sin, unsqueeze_dim=2)[0]

    assert_parity(lambda x, c, s: apply_rope(x, c, s, interleaved=interleaved), theirs, [draw(2, 7, 3, 8), cos, sin])


@pytest.mark.outside("rope")
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("rotary", [8, 4])
def test_apply_rope_is_torchs_onnx_operator(interleaved, rotary):
    cos, sin = (y.float() for y in tables(5, rotary))
    x = draw(2, 5, 3, 8).float()
    theirs = torch.onnx.ops.rotary_embedding(
        x.transpose(1, 2),
        cos,
        sin,
        torch.arange(5).expand(2, 5),
        interleaved=interleaved,
        rotary_embedding_dim=rotary if rotary < 8 else 0,
    ).transpose(1, 2)
    torch.testing.assert_close(apply_rope(x, cos, sin, interleaved=interleaved), theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.parity("rope")
@pytest.mark.parametrize("base", [10000.0, 500000.0, 1.0])
@pytest.mark.parametrize("dim", [2, 6, 128])
def test_angles_are_the_formula(dim, base):
    frequencies = rope_frequencies(dim, base, dtype=torch.float64)
    cos, sin = rope_cos_sin(torch.tensor([0, 3, 70000]), frequencies)
    for row, p in enumerate((0, 3, 70000)):
        for i in range(dim // 2):
            angle = p * base ** (-2 * i / dim)
            assert cos[row, i].item() == pytest.approx(math.cos(angle), abs=1e-9)
            assert sin[row, i].item() == pytest.approx(math.sin(angle), abs=1e-9)


# ---------------------------------------------------------------- precision, strides, edges
@pytest.mark.registration("rope")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("interleaved", [False, True])
def test_halves_are_rounded_once(dtype, interleaved):
    x = draw(2, 5, 3, 8).to(dtype)
    cos, sin = (y.float() for y in tables(5, 8))
    got = apply_rope(x, cos, sin, interleaved=interleaved)
    assert torch.equal(got, apply_rope(x.float(), cos, sin, interleaved=interleaved).to(dtype))


@pytest.mark.law("rope")
def test_neighbours_far_out_have_different_angles_also_in_half_precision():
    frequencies = rope_frequencies(8).bfloat16()
    cos, _ = rope_cos_sin(torch.tensor([1000, 1001]), frequencies)
    assert cos.dtype == torch.float32
    assert not torch.equal(cos[0], cos[1])
    assert torch.tensor(1000).bfloat16() == torch.tensor(1001).bfloat16()  # what happens otherwise


@pytest.mark.parity("rope")
@pytest.mark.parametrize("interleaved", [False, True])
def test_strides_do_not_matter_and_inputs_are_left_alone(interleaved):
    x = draw(2, 3, 5, 8).transpose(1, 2)  # b t h e, as a view of b h t e
    kept, (cos, sin) = x.clone(), tables(5, 8)
    got = apply_rope(x, cos, sin, interleaved=interleaved)
    torch.testing.assert_close(got, apply_rope(x.contiguous(), cos, sin, interleaved=interleaved))
    assert torch.equal(x, kept)
    (g,) = torch.autograd.grad(apply_rope(y := x.clone().requires_grad_(), cos, sin).sum(), y)
    assert g.shape == x.shape


@pytest.mark.parity("rope")
@pytest.mark.parametrize("shape", [(0, 5, 3, 8), (2, 0, 3, 8), (2, 5, 0, 8)])
def test_empty_inputs_work(shape):
    x = torch.zeros(shape, dtype=torch.float64, requires_grad=True)
    for interleaved in (False, True):
        y = apply_rope(x, *tables(shape[1], 8), interleaved=interleaved)
        assert y.shape == shape
        y.sum().backward()


@pytest.mark.registration("rope")
def test_second_derivatives_exist():
    x, (cos, sin) = draw(1, 2, 1, 4).requires_grad_(), tables(2, 4)
    fn = lambda x, c, s: apply_rope(x, c, s, interleaved=True).square()  # noqa: E731
    assert torch.autograd.gradgradcheck(fn, (x, cos.requires_grad_(), sin.requires_grad_()))


@pytest.mark.registration("rope")
@pytest.mark.parametrize("interleaved", [False, True])
def test_apply_rope_compiles_without_a_break(interleaved):
    x, (cos, sin) = draw(2, 5, 3, 8), tables(5, 8)
    with unchecked():
        compiled = torch.compile(apply_rope, fullgraph=True, backend="aot_eager")
        got = compiled(x, cos, sin, interleaved=interleaved)
    torch.testing.assert_close(got, apply_rope(x, cos, sin, interleaved=interleaved))


# ---------------------------------------------------------------- refusals
@pytest.mark.refusal("rope")
def test_apply_rope_refuses_what_does_not_fit():
    x, (cos, sin) = draw(2, 5, 3, 8), tables(5, 8)
    full = [torch.cat((y, y), -1) for y in (cos, sin)]  # repeated to the width of x, the other convention
    with refuses(ShapeError, "(5, 8)", "don't repeat"):
        apply_rope(x, *full)
    for c, s in ((cos[:4], sin[:4]), (cos, sin[:, :3]), (cos[None].expand(3, -1, -1), sin[None].expand(3, -1, -1))):
        with refuses(ShapeError, tuple(c.shape), tuple(s.shape)):
            apply_rope(x, c, s)
    with refuses(ShapeError, "(4,)"):
        apply_rope(x, cos[0], sin[0])
    with refuses(ShapeError, "3 axes"):
        apply_rope(x[0], cos, sin)
    with refuses(ShapeError, "torch.int64"):
        apply_rope(x.long(), cos, sin)
    with refuses(ShapeError, "torch.int64"):
        apply_rope(x, cos.long(), sin)
    with refuses(ConfigError, "backend", "torch"):
        apply_rope(x, cos, sin, backend="torch")


@pytest.mark.refusal("rope")
@pytest.mark.parametrize("dim", [3, 0, -2, 2.0, True])
def test_odd_or_missing_rotary_dims_are_refused(dim):
    with refuses(ConfigError, "rotary dim", dim):
        rope_frequencies(dim)


@pytest.mark.refusal("rope")
@pytest.mark.parametrize("base", [0.0, -1.0, math.nan, math.inf])
def test_a_base_that_is_not_positive_is_refused(base):
    with refuses(ConfigError, "base", base):
        rope_frequencies(4, base)


@pytest.mark.refusal("rope")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bool])
def test_positions_that_are_not_integers_are_refused(dtype):
    with refuses(ShapeError, dtype):
        rope_cos_sin(torch.arange(3).to(dtype), rope_frequencies(4))
    with refuses(ShapeError, "3 axes"):
        rope_cos_sin(torch.zeros(1, 1, 1, dtype=torch.long), rope_frequencies(4))


@pytest.mark.refusal("rope")
def test_weights_that_cannot_be_permuted_are_refused():
    w = draw(12, 5)
    for heads in (5, 0, -1):
        with refuses(ConfigError, "heads", heads):
            convert_rope_weight(w, heads, to="half")
    for rotary in (3, 6, 0):
        with refuses(ConfigError, "rotary dim", rotary):
            convert_rope_weight(w, 3, to="half", rotary_dim=rotary)
    with refuses(ConfigError, "odd"):
        convert_rope_weight(w, 3, to="odd")  # type: ignore[arg-type]
