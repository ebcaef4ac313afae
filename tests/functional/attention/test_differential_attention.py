"""The difference of two maps, written out; lambda and where it starts."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from handbook_src.errors import ConfigError, ShapeError
from handbook_src.functional.attention.attention import attention_weights, scaled_dot_product_attention
from handbook_src.functional.attention.differential_attention import (
    differential_attention,
    differential_lambda,
    differential_lambda_init,
)
from handbook_src.functional.attention.mask import Mask, causal, left_padding, padding, per_head, window
from handbook_src.testing import assert_causal, assert_parity, refuses

ID = "differential-attention"
LENGTHS = torch.tensor([5, 2])
# t, s, h, g, e, c
SIZES = [(5, 5, 2, 2, 3, 6), (1, 5, 4, 2, 4, 8), (3, 5, 3, 1, 1, 2), (4, 5, 1, 1, 5, 3), (18, 18, 2, 1, 3, 6)]


def inputs(t: int, s: int, h: int, g: int, e: int, c: int, b: int = 2) -> list[Tensor]:
    return [torch.randn(n, dtype=torch.float64) for n in ((b, t, 2 * h, e), (b, s, 2 * g, e), (b, s, g, c))]


def written_out(
    q: Tensor, k: Tensor, v: Tensor, lam: Tensor, seen: Tensor | None = None, scale: float | None = None
) -> Tensor:
    """Equation 1, head by head."""
    heads, each = q.shape[2] // 2, q.shape[2] // k.shape[2]
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    hidden = torch.zeros(q.shape[1], k.shape[1], dtype=torch.bool) if seen is None else ~seen
    hidden = hidden.expand(q.shape[0], heads, *hidden.shape[-2:])
    out = []
    for i in range(heads):
        group = i // each
        q1, q2, k1, k2 = q[:, :, 2 * i], q[:, :, 2 * i + 1], k[:, :, 2 * group], k[:, :, 2 * group + 1]
        first, second = (
            (a @ b.mT * scale).masked_fill(hidden[:, i], -math.inf).softmax(-1) for a, b in ((q1, k1), (q2, k2))
        )
        out.append((first - lam * second) @ v[:, :, group])
    return torch.stack(out, 2)


@pytest.mark.parity(ID)
@pytest.mark.parametrize("backend", ["auto", "torch", "reference"])
@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("scale", [None, 0.3])
def test_is_the_difference_of_two_maps(backend: str, sizes: tuple[int, ...], scale: float | None) -> None:
    assert_parity(
        lambda q, k, v, lam: differential_attention(q, k, v, lam, scale=scale, backend=backend),
        lambda q, k, v, lam: written_out(q, k, v, lam, scale=scale),
        [*inputs(*sizes), torch.tensor(0.7)],
    )


@pytest.mark.parity(ID)
@pytest.mark.parametrize("backend", ["torch", "reference"])
@pytest.mark.parametrize(
    ("mask", "is_causal"),
    [(None, True), (window(2), True), (padding(LENGTHS), False), (per_head(causal, window(2)), False)],
    ids=str,
)
def test_masks(backend: str, mask: Mask | None, is_causal: bool) -> None:
    rule = mask if not is_causal else causal if mask is None else causal & mask
    assert rule is not None
    assert_parity(
        lambda q, k, v, lam: differential_attention(q, k, v, lam, mask, causal=is_causal, backend=backend),
        lambda q, k, v, lam: written_out(q, k, v, lam, seen=rule.dense(5, 5)),
        [*inputs(5, 5, 2, 1, 3, 4), torch.tensor(-0.4)],
    )


@pytest.mark.parity(ID)
def test_lambda_is_the_formula() -> None:
    vectors = [torch.randn(6) for _ in range(4)]
    assert_parity(
        lambda a, b, c, d: differential_lambda(a, b, c, d, 0.35),
        lambda a, b, c, d: math.e ** (a @ b) - math.e ** (c @ d) + 0.35,
        vectors,
    )
    half = differential_lambda(*(x.bfloat16() for x in vectors), 0.2)
    assert half.dtype == torch.float32
    for layer in (1, 2, 7, 100):
        assert differential_lambda_init(layer) == 0.8 - 0.6 * math.exp(-0.3 * (layer - 1))


@pytest.mark.law(ID)
@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_equal_maps_cancel_and_lambda_zero_is_plain_attention(backend: str) -> None:
    q, k, v = inputs(5, 5, 2, 2, 3, 6)
    plain = scaled_dot_product_attention(q[:, :, ::2], k[:, :, ::2], v, causal=True)
    torch.testing.assert_close(differential_attention(q, k, v, 0.0, causal=True, backend=backend), plain)
    twin = q[:, :, ::2].repeat_interleave(2, 2), k[:, :, ::2].repeat_interleave(2, 2)
    nothing = differential_attention(*twin, v, 1.0, causal=True, backend=backend)
    torch.testing.assert_close(nothing, torch.zeros_like(nothing), rtol=0, atol=1e-14)
    damped = differential_attention(*twin, v, 0.25, causal=True, backend=backend)
    torch.testing.assert_close(damped, 0.75 * plain)


@pytest.mark.law(ID)
def test_constant_values_come_back_times_one_minus_lambda() -> None:
    q, k, _ = inputs(4, 6, 2, 2, 3, 6)
    out = differential_attention(q, k, torch.ones(2, 6, 2, 5).double(), 0.3)
    torch.testing.assert_close(out, torch.full_like(out, 0.7))
    maps = [attention_weights(q[:, :, i::2], k[:, :, i::2]) for i in (0, 1)]
    assert (maps[0] - 0.9 * maps[1]).min() < 0  # weights may be negative, and no softmax's are


@pytest.mark.law(ID)
def test_is_causal_and_hidden_nan_does_not_leak() -> None:
    q, k, v = inputs(5, 5, 2, 1, 3, 4)
    assert_causal(lambda v: differential_attention(q, k, v, 0.5, causal=True), v)
    lam = torch.tensor(0.5, requires_grad=True)
    k[1, 2:], v[1, 2:] = math.nan, math.inf
    for backend in ("torch", "reference"):
        parts = [x.clone().requires_grad_() for x in (q, k, v)]
        out = differential_attention(*parts, lam, padding(LENGTHS), backend=backend)
        assert out.isfinite().all()
        assert all(g.isfinite().all() for g in torch.autograd.grad(out.square().sum(), (*parts, lam)))
    empty = differential_attention(*inputs(5, 5, 2, 1, 3, 4), 0.5, left_padding(torch.tensor([5, 0])))
    assert (empty[0] == 0).all()


@pytest.mark.law(ID)
def test_empty_strided_half_and_twice_differentiable() -> None:
    q, k, v = inputs(5, 5, 2, 1, 3, 4)
    assert differential_attention(q[:0], k[:0], v[:0], 0.5).shape == (0, 5, 2, 4)
    assert differential_attention(q[:, :0], k, v, 0.5).shape == (2, 0, 2, 4)
    turned = q.transpose(1, 2).contiguous().transpose(1, 2)
    want = differential_attention(q, k, v, 0.5)
    torch.testing.assert_close(differential_attention(turned, k, v, 0.5), want)
    for backend in ("torch", "reference"):
        for dtype in (torch.bfloat16, torch.float16):
            low = differential_attention(*(x.to(dtype) for x in (q, k, v)), 0.5, backend=backend)
            assert low.dtype == dtype
            torch.testing.assert_close(low.double(), want, rtol=0.05, atol=0.05)
    parts = [x.requires_grad_() for x in inputs(2, 2, 1, 1, 2, 2, b=1)]
    assert torch.autograd.gradgradcheck(lambda *x: differential_attention(*x, 0.5, backend="reference"), parts)
    meta = differential_attention(q.to("meta"), k.to("meta"), v.to("meta"), 0.5, causal=True)
    assert meta.shape == want.shape


@pytest.mark.law(ID)
def test_the_reference_rounds_once() -> None:
    q, k, v = (x.bfloat16() for x in inputs(8, 8, 2, 2, 8, 16))
    want = differential_attention(q.double(), k.double(), v.double(), 0.8)
    near = differential_attention(q, k, v, 0.8, backend="reference")
    torch.testing.assert_close(near.double(), want, rtol=2**-8, atol=1e-6)
    assert F.mse_loss(near.double(), want) > 0


@pytest.mark.law(ID)
def test_half_precision_rounds_the_two_means_and_not_the_scores() -> None:
    q, k, v = (x.bfloat16() for x in inputs(16, 16, 2, 2, 8, 16))
    q = 8 * q  # wide scores, which half precision would round by a tenth
    first, second = (
        scaled_dot_product_attention(q[:, :, i::2].double(), k[:, :, i::2].double(), v.double()) for i in (0, 1)
    )
    error = (differential_attention(q, k, v, 0.8).double() - (first - 0.8 * second)).abs()
    assert (error <= 2**-7 * (first.abs() + second.abs()).amax()).all()


@pytest.mark.refusal(ID)
def test_refusals() -> None:
    q, k, v = inputs(4, 4, 2, 2, 3, 6)
    for bad in ((q[0], k, v), (q[:, :, :3], k, v), (q, k[:, :, :2], v), (q, k, v[:, :, :1]), (q[:, :, :0], k, v)):
        with refuses(ShapeError, "differential_attention inputs", *(tuple(x.shape) for x in bad)):
            differential_attention(*bad, 0.5)
    with refuses(ShapeError, "attention inputs"):
        differential_attention(q, k[:, :3], v, 0.5)
    with refuses(ShapeError, "torch.int64"):
        differential_attention(q.long(), k, v, 0.5)
    with refuses(ShapeError, "attention mask", (4, 3)):
        differential_attention(q, k, v, 0.5, torch.ones(4, 3, dtype=torch.bool))
    with refuses(ShapeError, "t=4", "s=2"):
        differential_attention(q, k[:, :2], v[:, :2], 0.5, causal=True)
    for lam in (torch.zeros(2), torch.tensor(1)):
        with refuses(ShapeError, "lam", tuple(lam.shape)):
            differential_attention(q, k, v, lam)
    for number in (math.nan, math.inf, True, "0.5"):
        with refuses(ConfigError, "lam", repr(number)):
            differential_attention(q, k, v, number)  # type: ignore[arg-type]
    for scale in (0.0, -1.0, math.nan):
        with refuses(ConfigError, "scale", scale):
            differential_attention(q, k, v, 0.5, scale=scale)
    for layer in (0, -1, 1.5, True):
        with refuses(ConfigError, "layer", layer):
            differential_lambda_init(layer)  # type: ignore[arg-type]
    vector = torch.zeros(3)
    for vectors in ((vector, vector, vector, torch.zeros(2)), (torch.zeros(2, 2),) * 4):
        with refuses(ShapeError, "vectors", tuple(vectors[3].shape)):
            differential_lambda(*vectors, init=0.2)
