"""Linear and bilinear maps against torch's, and what makes them linear."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from handbook_src.errors import ConfigError, ShapeError
from handbook_src.functional.foundations import linear as module
from handbook_src.functional.foundations.linear import bilinear, linear
from handbook_src.testing import assert_batch_independent, assert_parity, refuses

BACKENDS = ["reference", "torch", "auto"]
BOTH = ("linear", "bilinear")
LEADS = [(), (1,), (5,), (2, 3), (0,), (2, 0, 3)]


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# ---------------------------------------------------------------- parity
@pytest.mark.parity("linear")
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("lead", LEADS)
@pytest.mark.parametrize(("d", "f"), [(1, 1), (3, 5), (129, 7)])
def test_linear_is_torchs(lead, d, f, bias, backend):
    b = draw(f, seed=2) if bias else None
    assert_parity(lambda x, w, b: linear(x, w, b, backend=backend), F.linear, [draw(*lead, d), draw(f, d, seed=1), b])


@pytest.mark.parity("bilinear")
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("lead", LEADS)
@pytest.mark.parametrize(("d1", "d2", "f"), [(1, 1, 1), (3, 5, 2), (17, 4, 1), (2, 33, 7)])
def test_bilinear_is_torchs(lead, d1, d2, f, bias, backend):
    b = draw(f, seed=3) if bias else None
    assert_parity(
        lambda x, z, w, b: bilinear(x, z, w, b, backend=backend),
        F.bilinear,
        [draw(*lead, d1), draw(*lead, d2, seed=1), draw(f, d1, d2, seed=2), b],
    )


@pytest.mark.parity("bilinear")
def test_large_bilinear_goes_to_torch(monkeypatch):
    taken = []
    monkeypatch.setattr(module, "AT_ONCE", 5 * 2 * 4)
    monkeypatch.setattr(module.F, "bilinear", lambda *a: taken.append(1) or torch.bilinear(*a))
    x, z, w = draw(6, 3), draw(6, 4, seed=1), draw(2, 3, 4, seed=2)
    small, large = bilinear(x[:5], z[:5], w), bilinear(x, z, w)
    assert taken == [1]
    torch.testing.assert_close(small, large[:5])


@pytest.mark.parity(*BOTH)
@pytest.mark.parametrize("backend", BACKENDS)
def test_strides_do_not_matter_and_inputs_stay(backend):
    x, z = draw(6, 8, 5), draw(6, 8, 3, seed=4)
    w, m = draw(7, 5, seed=1), draw(2, 5, 3, seed=2)
    for cut in (
        lambda t: t.transpose(0, 1),
        lambda t: t[::2, 1::3],
        lambda t: t.flip(0),
        lambda t: t[:1].expand(6, 8, -1),
    ):
        before = x.clone()
        torch.testing.assert_close(linear(cut(x), w, backend=backend), linear(cut(x).contiguous(), w))
        torch.testing.assert_close(
            bilinear(cut(x), cut(z), m, backend=backend), bilinear(cut(x).contiguous(), cut(z), m)
        )
        assert torch.equal(x, before)
    wide = draw(5, 7, seed=1)
    torch.testing.assert_close(linear(x, wide.T, backend=backend), x @ wide)


@pytest.mark.parity(*BOTH)
@pytest.mark.parametrize("backend", BACKENDS)
def test_twice_differentiable(backend):
    x, z, w, m, b = (draw(*s, seed=i).requires_grad_() for i, s in enumerate([(2, 3), (2, 2), (4, 3), (4, 3, 2), (4,)]))
    torch.autograd.gradgradcheck(lambda x, w, b: linear(x, w, b, backend=backend), (x, w, b))
    torch.autograd.gradgradcheck(lambda x, z, m, b: bilinear(x, z, m, b, backend=backend), (x, z, m, b))


# ---------------------------------------------------------------- laws
@pytest.mark.law("linear")
@pytest.mark.parametrize("backend", BACKENDS)
def test_sums_and_multiples_pass_through(backend):
    w, x, y = draw(4, 6, seed=1), draw(5, 6), draw(5, 6, seed=2)
    both = linear(2 * x - 3 * y, w, backend=backend)
    torch.testing.assert_close(both, 2 * linear(x, w, backend=backend) - 3 * linear(y, w, backend=backend))
    b = draw(4, seed=3)  # with a bias the map is affine: straight lines stay straight, the origin moves
    middle = linear(0.3 * x + 0.7 * y, w, b, backend=backend)
    torch.testing.assert_close(middle, 0.3 * linear(x, w, b) + 0.7 * linear(y, w, b))
    torch.testing.assert_close(linear(0 * x, w, b, backend=backend), b.expand(5, 4))


@pytest.mark.law("linear")
def test_two_linear_layers_are_one():
    w1, b1, w2, b2 = draw(5, 3), draw(5, seed=1), draw(2, 5, seed=2), draw(2, seed=3)
    x = draw(7, 3, seed=4)
    torch.testing.assert_close(linear(linear(x, w1, b1), w2, b2), linear(x, w2 @ w1, w2 @ b1 + b2))


@pytest.mark.law("linear")
def test_the_gradients_are_products():
    x, w, b = draw(7, 3).requires_grad_(), draw(4, 3, seed=1).requires_grad_(), draw(4, seed=2).requires_grad_()
    g = draw(7, 4, seed=3)
    dx, dw, db = torch.autograd.grad(linear(x, w, b), (x, w, b), g)
    torch.testing.assert_close((dx, dw, db), (g @ w, g.T @ x, g.sum(0)))


@pytest.mark.law("bilinear")
@pytest.mark.parametrize("backend", BACKENDS)
def test_linear_in_each_input_alone(backend):
    m, x, y, z = draw(3, 4, 2), draw(5, 4, seed=1), draw(5, 4, seed=2), draw(5, 2, seed=3)

    def f(x: Tensor, z: Tensor) -> Tensor:
        return bilinear(x, z, m, backend=backend)

    torch.testing.assert_close(f(2 * x - 3 * y, z), 2 * f(x, z) - 3 * f(y, z))
    torch.testing.assert_close(f(2 * x, 2 * z), 4 * f(x, z))  # so it is not linear in the pair
    for k in range(3):
        torch.testing.assert_close(f(x, z)[:, k], torch.stack([a @ m[k] @ c for a, c in zip(x, z, strict=True)]))


@pytest.mark.law("bilinear")
def test_a_constant_input_makes_it_linear():
    m, x = draw(3, 4, 1), draw(5, 4, seed=1)
    torch.testing.assert_close(bilinear(x, torch.ones(5, 1, dtype=torch.float64), m), linear(x, m[..., 0]))


@pytest.mark.law(*BOTH)
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_sample_does_not_see_its_batch(backend):
    w, m = draw(4, 3), draw(4, 3, 3)
    assert_batch_independent(lambda x: linear(x, w, backend=backend), draw(5, 3))
    assert_batch_independent(lambda x: bilinear(x, x, m, backend=backend), draw(5, 3))


# ---------------------------------------------------------------- registration
@pytest.mark.registration(*BOTH)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_the_float32_answer_rounded_once(dtype):
    x, w, b, m = (draw(*s, seed=i).to(dtype) for i, s in enumerate([(3, 300), (5, 300), (5,), (5, 300, 300)]))
    for run in (lambda f, k: linear(f(x), f(w), f(b), **k), lambda f, k: bilinear(f(x), f(x), f(m), f(b), **k)):
        y, exact = run(lambda t: t, {"backend": "reference"}), run(lambda t: t.float(), {})
        assert y.dtype == dtype
        torch.testing.assert_close(y.float(), exact, rtol=0.51 * torch.finfo(dtype).eps, atol=1e-5)
        assert run(lambda t: t, {}).dtype == dtype


@pytest.mark.registration(*BOTH)
@pytest.mark.parametrize("backend", BACKENDS)
def test_compiles_to_one_graph(backend, unchecked):
    x, w, m = draw(2, 4), draw(3, 4, seed=1), draw(3, 4, 4, seed=2)
    torch._dynamo.reset()
    both = torch.compile(
        lambda x: (linear(x, w, backend=backend), bilinear(x, x, m, backend=backend)),
        fullgraph=True,
        backend="aot_eager",
    )
    torch.testing.assert_close(both(x), (linear(x, w), bilinear(x, x, m)))


@pytest.mark.registration(*BOTH)
def test_autocast_casts_as_torchs():
    x, w, m = draw(2, 4).float(), draw(3, 4, seed=1).float(), draw(3, 4, 4, seed=2).float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert linear(x, w).dtype == F.linear(x, w).dtype == torch.bfloat16
        torch.testing.assert_close(linear(x, w), F.linear(x, w))
        assert linear(x.bfloat16(), w).dtype == torch.bfloat16  # a layer before it has already cast
        torch.testing.assert_close(bilinear(x, x, m).float(), F.bilinear(x, x, m).float(), rtol=0.05, atol=0.05)


@pytest.mark.registration(*BOTH)
def test_meta_tensors_have_shapes():
    x, w, m = (torch.empty(s, device="meta") for s in ((2, 4), (3, 4), (3, 4, 4)))
    for backend in BACKENDS:
        assert linear(x, w, backend=backend).shape == bilinear(x, x, m, backend=backend).shape == (2, 3)


# ---------------------------------------------------------------- refusals
@pytest.mark.refusal("linear")
def test_linear_refuses_what_does_not_fit():
    x, w = draw(2, 5), draw(3, 5, seed=1)
    for bad, values in [
        ((draw(2, 4), w), (4, 5)),
        ((draw(), w), ("()", 5)),
        ((x, draw(5)), ("(5,)", "two axes")),
        ((x, draw(1, 3, 5)), ("(1, 3, 5)", "two axes")),
        ((x, w, draw(1)), ("bias", "(1,)", "(3,)")),
        ((x, w, draw()), ("bias", "()")),
        ((x, w, draw(5)), ("bias", "(5,)", "(3,)")),
        ((torch.ones(2, 5, dtype=torch.int64), w), ("torch.int64",)),
        ((x, torch.ones(3, 5, dtype=torch.bool)), ("torch.bool",)),
        ((x.to(torch.complex128), w), ("torch.complex128",)),
        ((x.float(), w), ("torch.float64", "torch.float32")),
        ((x, w.to("meta")), ("meta", "cpu")),
    ]:
        for backend in BACKENDS:
            with refuses(ShapeError, "linear", *values):
                linear(*bad, backend=backend)
    with refuses(ConfigError, "cublas"):
        linear(x, w, backend="cublas")
    with refuses(ConfigError, "triton"):
        linear(x, w, backend="triton")


@pytest.mark.refusal("bilinear")
def test_bilinear_refuses_what_does_not_fit():
    x, z, m = draw(2, 5), draw(2, 4), draw(3, 5, 4)
    for bad, values in [
        ((z, z, m), ("input1", 4, 5)),
        ((x, x, m), ("input2", 5, 4)),
        ((x, z[:1], m), ("(2, 5)", "(1, 4)", "leading")),
        ((x, z[0], m), ("(2, 5)", "(4,)")),
        ((x, z, m[0]), ("(5, 4)", "three axes")),
        ((x, z, m, draw(1)), ("bias", "(1,)", "(3,)")),
        ((x, z.long(), m), ("torch.int64",)),
        ((x, z.float(), m), ("input2", "torch.float32", "torch.float64")),
        ((x, z, m.to("meta")), ("weight", "meta")),
    ]:
        for backend in BACKENDS:
            with refuses(ShapeError, "bilinear", *values):
                bilinear(*bad, backend=backend)
    with refuses(ConfigError, "cublas"):
        bilinear(x, z, m, backend="cublas")
