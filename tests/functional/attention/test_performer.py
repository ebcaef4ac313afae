"""Performer's features: their expectation, their variance, and the published attention on the same directions."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
from torch import Tensor

from handbook_src.errors import ConfigError, ShapeError
from handbook_src.functional.attention.attention import scaled_dot_product_attention
from handbook_src.functional.attention.mask import Mask, causal, full, left_padding, padding, sinks, window
from handbook_src.functional.attention.performer import performer_attention, random_features, softmax_features
from handbook_src.testing import assert_causal, assert_parity, oracle, refuses

PERFORMER = "performer"
FORMS = pytest.mark.parametrize("form", ["parallel", "recurrent", "chunked", "auto"])
KINDS = pytest.mark.parametrize("kind", ["positive", "hyperbolic", "trigonometric", "relu"])
BOTH_WAYS = pytest.mark.parametrize("is_causal", [False, True])
LENGTHS = torch.tensor([4, 1])


def qkv(b: int = 2, t: int = 5, s: int = 5, h: int = 4, g: int = 4, e: int = 6, c: int = 3) -> list[Tensor]:
    sizes = ((b, t, h, e), (b, s, g, e), (b, s, g, c))
    return [torch.randn(size, dtype=torch.float64) for size in sizes]


def directions(e: int = 6, m: int = 10) -> Tensor:
    return random_features(e, m, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def features(x: Tensor, w: Tensor, kind: str) -> Tensor:
    """The paper's h(x) / sqrt(m) (f_1, ..., f_l), one direction at a time."""
    m, square = len(w), (x**2).sum(-1)
    columns = []
    for row in w:
        p = (x * row).sum(-1)
        columns += {
            "positive": [torch.exp(p - square / 2)],
            "hyperbolic": [torch.exp(p - square / 2) / 2**0.5, torch.exp(-p - square / 2) / 2**0.5],
            "trigonometric": [torch.exp(square / 2) * torch.sin(p), torch.exp(square / 2) * torch.cos(p)],
            "relu": [torch.relu(p) + 1e-3],
        }[kind]
    return torch.stack(columns, -1) / m**0.5


def literally(q: Tensor, k: Tensor, v: Tensor, w: Tensor, kind: str, seen: Tensor, scale: float) -> Tensor:
    k, v = (x.repeat_interleave(q.shape[2] // k.shape[2], 2) for x in (k, v))
    phi_q, phi_k = features(q * scale**0.5, w, kind), features(k * scale**0.5, w, kind)
    weights = (phi_q[:, :, None] * phi_k[:, None]).sum(-1) * seen.movedim(1, -1)
    return (weights[..., None] * v[:, None]).sum(2) / weights.sum(2)[..., None]


@pytest.mark.parity(PERFORMER)
@KINDS
@FORMS
@BOTH_WAYS
def test_every_kind_and_form_is_the_equation(kind: str, form: str, is_causal: bool) -> None:
    seen = (causal if is_causal else full).dense(5)[None, None]
    assert_parity(
        lambda q, k, v: performer_attention(q, k, v, directions(), kind=kind, causal=is_causal, form=form, chunk=2),
        lambda q, k, v: literally(q, k, v, directions(), kind, seen, 6**-0.5),
        qkv(g=2),
        rtol=1e-8,
    )


@pytest.mark.law(PERFORMER)
@KINDS
def test_large_vectors_stay_finite_under_causal(kind: str) -> None:
    """exp(|k|^2 / 2) of a trigonometric feature is past float32; the last query sees what it sees without causal."""
    q, k, v = (x.float() for x in qkv(t=9, s=9, e=8))
    w = directions(8).float()
    found = performer_attention(7 * q, 7 * k, v, w, kind=kind, causal=True)
    assert found.isfinite().all()
    whole = performer_attention(7 * q, 7 * k, v, w, kind=kind)
    torch.testing.assert_close(found[:, -1], whole[:, -1], rtol=1e-3, atol=1e-3)


@pytest.mark.parity(PERFORMER)
@pytest.mark.parametrize("scale", [None, 1.0, 0.05])
@pytest.mark.parametrize("mask", [None, padding(LENGTHS), left_padding(LENGTHS), sinks(2)], ids=str)
@BOTH_WAYS
def test_scales_and_masks(scale: float | None, mask: Mask | None, is_causal: bool) -> None:
    rule = full if mask is None else mask
    rule = causal & rule if is_causal else rule
    seen = rule.dense(5)
    seen = seen if seen.ndim == 4 else seen[None, None]

    def theirs(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return literally(q, k, v, directions(), "positive", seen, scale or 6**-0.5).nan_to_num()

    inputs = qkv()
    if is_causal and seen.any(-1).logical_not().any():  # a row that sees nothing: 0 / 0 in the formula
        q, k, v = inputs
        torch.testing.assert_close(
            performer_attention(q, k, v, directions(), mask, scale=scale, causal=True), theirs(q, k, v)
        )
        return
    assert_parity(
        lambda q, k, v: performer_attention(q, k, v, directions(), mask, scale=scale, causal=is_causal),
        theirs,
        inputs,
        rtol=1e-8,
    )


@pytest.mark.parity(PERFORMER)
@KINDS
@BOTH_WAYS
def test_an_epsilon_and_its_gradient(kind: str, is_causal: bool) -> None:
    w, leaves = directions(2, 3), [x.requires_grad_() for x in qkv(b=1, t=3, s=3, h=2, g=1, e=2, c=2)]

    def run(*x: Tensor) -> Tensor:
        return performer_attention(*x, w, kind=kind, causal=is_causal, eps=0.1)

    assert torch.autograd.gradcheck(run, leaves), "the shifts don't cancel here, so gradients follow them"
    if kind == "positive" and not is_causal:
        q, k, v = leaves
        phi_q, phi_k = (softmax_features(x * 2**-0.25, w) for x in (q, k))
        phi_q, phi_k = phi_q / phi_q.amax(-1, keepdim=True) + 0.1, phi_k / phi_k.amax((1, 3), keepdim=True) + 0.1
        weights = torch.einsum("bthf,bsgf->bhts", phi_q, phi_k)
        weights = weights / weights.sum(-1, keepdim=True)
        torch.testing.assert_close(run(*leaves), torch.einsum("bhts,bsgc->bthc", weights, v))


@pytest.mark.parity(PERFORMER)
@pytest.mark.parametrize(
    "sizes",
    [
        {"b": 1, "t": 1, "s": 1, "h": 1, "g": 1, "e": 1, "c": 1},
        {"t": 3, "s": 8, "h": 6, "g": 3, "e": 5, "c": 9},
        {"b": 0},
        {"t": 0},
        {"t": 0, "s": 0},
    ],
    ids=str,
)
@pytest.mark.parametrize("m", [1, 7, 32])
@BOTH_WAYS
def test_odd_and_empty_sizes(sizes: dict[str, int], m: int, is_causal: bool) -> None:
    inputs = qkv(**sizes)
    w = directions(inputs[0].shape[-1], m)
    seen = (causal if is_causal else full).dense(inputs[0].shape[1], inputs[1].shape[1])[None, None]
    assert_parity(
        lambda q, k, v: performer_attention(q, k, v, w, causal=is_causal),
        lambda q, k, v: literally(q, k, v, w, "positive", seen, q.shape[-1] ** -0.5),
        inputs,
        rtol=1e-8,
    )


@pytest.mark.parity(PERFORMER)
@KINDS
@pytest.mark.parametrize("shape", [(6,), (3, 6), (2, 1, 3, 6), (0, 6)])
def test_features_are_the_formula(kind: str, shape: tuple[int, ...]) -> None:
    w = directions()
    order = torch.arange(10) if kind in ("positive", "relu") else torch.arange(20).view(10, 2).T.flatten()
    assert_parity(
        lambda x: softmax_features(x, w, kind, eps=1e-3 if kind == "relu" else 0.0),
        lambda x: features(x, w, kind)[..., order],
        [torch.randn(shape)],
    )


@pytest.mark.outside(PERFORMER)
@pytest.mark.parametrize("generalized", [False, True])
@BOTH_WAYS
def test_against_the_published_attention(
    generalized: bool, is_causal: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    theirs = oracle.load("performer_pytorch.performer_pytorch")
    # they add 1e-4 to shifted features and 1e-6 to sums; the shifts differ, so it agrees where both are 0
    monkeypatch.setattr(theirs, "softmax_kernel", partial(theirs.softmax_kernel, eps=0.0))
    layer = theirs.FastAttention(8, 24, causal=is_causal, generalized_attention=generalized)
    capsys.readouterr()
    if is_causal:
        layer.causal_linear_fn = partial(theirs.causal_linear_attention_noncuda, eps=0.0)
    w = layer.projection_matrix.double()

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return layer(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)

    kind = "relu" if generalized else "positive"
    assert_parity(
        lambda q, k, v: performer_attention(q, k, v, w, kind=kind, causal=is_causal), run, qkv(t=9, s=9, e=8), rtol=1e-8
    )


def estimates(kind: str, x: Tensor, y: Tensor, draws: int, m: int, orthogonal: bool = True) -> Tensor:
    """Independent estimates of exp(x y): many draws at once, blocks being independent of each other."""
    assert not orthogonal or m % len(x) == 0
    g = torch.Generator().manual_seed(2)
    w = random_features(len(x), draws * m, orthogonal=orthogonal, generator=g, dtype=torch.float64)
    products = softmax_features(x, w, kind) * softmax_features(y, w, kind)
    return products.view(-1, draws, m).sum((0, 2)) * draws


@pytest.mark.law(PERFORMER)
@pytest.mark.parametrize("kind", ["positive", "hyperbolic", "trigonometric"])
@pytest.mark.parametrize("orthogonal", [True, False])
def test_the_kernel_is_estimated_without_bias(kind: str, orthogonal: bool) -> None:
    g = torch.Generator().manual_seed(3)
    x, y = (torch.randn(4, generator=g, dtype=torch.float64) * 0.5 for _ in range(2))
    found = estimates(kind, x, y, 4000, 8, orthogonal)
    error = found.std() / len(found) ** 0.5
    assert (found.mean() - (x @ y).exp()).abs() < 4 * error
    assert error < 0.03 * (x @ y).exp(), "the test would notice a bias of 12 %"


@pytest.mark.law(PERFORMER)
@pytest.mark.parametrize("kind", ["positive", "hyperbolic", "trigonometric"])
def test_the_variance_is_the_papers(kind: str) -> None:
    g = torch.Generator().manual_seed(4)
    x, y = (torch.randn(3, generator=g, dtype=torch.float64) * 0.4 for _ in range(2))
    kernel, plus, minus, m = (x @ y).exp(), (x + y).square().sum(), (x - y).square().sum(), 4
    positive = kernel**2 * plus.exp() * (1 - (-plus).exp()) / m
    want = {
        "positive": positive,
        "hyperbolic": positive * (1 - (-plus).exp()) / 2,
        "trigonometric": plus.exp() / kernel**2 * (1 - (-minus).exp()) ** 2 / (2 * m),
    }[kind]
    found = estimates(kind, x, y, 40000, m, orthogonal=False).var()
    torch.testing.assert_close(found, want, rtol=0.15, atol=0.0)


@pytest.mark.law(PERFORMER)
def test_orthogonal_directions_vary_less_and_positive_ones_where_scores_are_low() -> None:
    g = torch.Generator().manual_seed(5)
    x = torch.randn(8, generator=g, dtype=torch.float64) * 0.5
    y = torch.randn(8, generator=g, dtype=torch.float64) * 0.5
    spread = {o: estimates("positive", x, y, 2000, 8, o).var() for o in (True, False)}
    assert spread[True] < 0.9 * spread[False]
    low = {kind: estimates(kind, 2 * x, -2 * x, 500, 16).var() for kind in ("positive", "trigonometric")}
    assert low["positive"] < 1e-6 * low["trigonometric"]


@pytest.mark.law(PERFORMER)
@BOTH_WAYS
def test_the_attention_converges_to_softmax_and_is_biased_before(is_causal: bool) -> None:
    q, k, v = (0.7 * x for x in qkv(b=1, t=6, s=6, h=2, g=1, e=4))
    want = scaled_dot_product_attention(q, k, v, causal=is_causal)
    g, runs = torch.Generator().manual_seed(6), {}
    for m, draws in ((1, 200), (16, 20), (4096, 5)):
        ws = [random_features(4, m, generator=g, dtype=torch.float64) for _ in range(draws)]
        runs[m] = torch.stack([performer_attention(q, k, v, w, causal=is_causal) for w in ws]) - want
    rms = {m: x.square().mean().sqrt() for m, x in runs.items()}
    assert rms[4096] < 0.15 * rms[16] < 0.15 * rms[1]
    error = runs[1].std(0) / 200**0.5
    assert (runs[1].mean(0).abs() > 5 * error.clamp_min(1e-9)).double().mean() > 0.25, "the ratio's bias shows"


@pytest.mark.law(PERFORMER)
@pytest.mark.parametrize(("e", "m"), [(1, 5), (3, 3), (4, 10), (8, 5)])
def test_directions_are_orthogonal_in_blocks_and_normal_each(e: int, m: int) -> None:
    w = random_features(e, m, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert w.shape == (m, e)
    for i in range(0, m, e):
        gram = w[i : i + e] @ w[i : i + e].T
        torch.testing.assert_close(gram, gram.diagonal().diag(), rtol=0, atol=1e-12)
    blocks = random_features(e, 3000 * e, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    for row in (0, e - 1):  # the last row of a block is the one that a QR without its signs gets wrong
        x = blocks.view(3000, e, e)[:, row]
        assert (x.mean(0).abs() < 5 / 3000**0.5).all()
        torch.testing.assert_close(x.T @ x / 3000, torch.eye(e, dtype=x.dtype), rtol=0, atol=0.15)
    again = random_features(e, m, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert torch.equal(w, again)
    assert random_features(e, m, dtype=torch.bfloat16).dtype == torch.bfloat16


@pytest.mark.law(PERFORMER)
@FORMS
@KINDS
def test_the_future_does_not_leak(form: str, kind: str) -> None:
    assert_causal(
        lambda x: performer_attention(x, x, x, directions(4, 6), kind=kind, causal=True, form=form, chunk=4),
        torch.randn(1, 9, 2, 4).double(),
    )


@pytest.mark.law(PERFORMER)
@BOTH_WAYS
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_garbage_in_the_padding_reaches_nothing(is_causal: bool, bad: float) -> None:
    def run(x: list[Tensor]) -> tuple[Tensor, tuple[Tensor, ...]]:
        leaves = [y.clone().requires_grad_() for y in x]
        out = performer_attention(*leaves, directions(), padding(LENGTHS), causal=is_causal)
        return out, torch.autograd.grad(out.square().sum(), leaves)

    inputs = qkv()
    clean = run(inputs)
    inputs[1][0, 4:], inputs[2][0, 4:], inputs[1][1, 1:], inputs[2][1, 1:] = bad, bad, bad, bad
    torch.testing.assert_close(run(inputs), clean)
    inputs[1][:], inputs[2][:] = bad, bad
    out = performer_attention(*inputs, directions(), padding(torch.tensor([0, 0])), causal=is_causal)
    assert (out == 0).all()


@pytest.mark.law(PERFORMER)
def test_a_hidden_key_does_not_overflow_beside_large_ones() -> None:
    q, k, v = (x.float() for x in qkv(b=1, e=64))
    k = k * 60
    w = random_features(64, 32, generator=torch.Generator().manual_seed(0))
    hidden = [torch.cat([x, torch.zeros_like(x[:, :2])], 1) for x in (k, v)]
    seen = padding(torch.tensor([5]))
    torch.testing.assert_close(performer_attention(q, *hidden, w, seen), performer_attention(q, k, v, w))
    assert performer_attention(q, *hidden, w, seen).isfinite().all()


@pytest.mark.law(PERFORMER)
@pytest.mark.parametrize("size", [1.0, 3.0, 1000.0])
def test_large_vectors_do_not_overflow(size: float) -> None:
    q, k, v = (x.float() for x in qkv(t=9, s=9, e=64, c=4))
    w = random_features(64, 256, generator=torch.Generator().manual_seed(0))
    out = performer_attention(q * size, k * size, v, w)
    assert out.isfinite().all()
    assert size > 3 or (out.abs().sum(-1) > 0).all(), "scores of 9 still find their keys"
    mean = performer_attention(q * size, k * size, v, w, eps=1e-4)
    for found in (out, mean):
        inside = (found <= v.amax(1, keepdim=True) + 1e-4) & (found >= v.amin(1, keepdim=True) - 1e-4)
        assert (inside | (found == 0)).all(), "a mean of the values"
    assert (mean.abs().sum(-1) > 0).all()


@pytest.mark.registration(PERFORMER)
@KINDS
@BOTH_WAYS
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_halves_are_computed_in_float32(kind: str, is_causal: bool, dtype: torch.dtype) -> None:
    q, k, v = (x.to(dtype) for x in qkv(t=9, s=9))
    got = performer_attention(q, k, v, directions().float(), kind=kind, causal=is_causal)
    assert got.dtype == dtype
    want = performer_attention(q.float(), k.float(), v.float(), directions().float(), kind=kind, causal=is_causal)
    torch.testing.assert_close(got, want.to(dtype))
    with torch.autocast("cpu", torch.bfloat16):
        exact = performer_attention(q.float(), k.float(), v.float(), directions().float(), kind=kind, causal=is_causal)
    torch.testing.assert_close(exact, want)


@pytest.mark.registration(PERFORMER)
@BOTH_WAYS
def test_second_derivatives_layouts_and_meta(is_causal: bool) -> None:
    w = directions(2, 4)
    leaves = [x.requires_grad_() for x in qkv(b=1, t=3, s=3, h=2, g=1, e=2, c=2)]
    assert torch.autograd.gradgradcheck(lambda *x: performer_attention(*x, w, causal=is_causal, chunk=2), leaves)
    q, k, v = qkv(t=6, s=6)
    copies = [x.clone() for x in (q, k, v)]
    want = performer_attention(q, k, v, directions(), causal=is_causal)
    assert all(torch.equal(a, b) for a, b in zip((q, k, v), copies, strict=True)), "an input was changed"
    turned = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v)]
    torch.testing.assert_close(performer_attention(*turned, directions(), causal=is_causal), want)
    meta = [x.to("meta") for x in (q, k, v, directions())]
    assert performer_attention(*meta, causal=is_causal).shape == want.shape


@pytest.mark.registration(PERFORMER)
@pytest.mark.usefixtures("unchecked")
@BOTH_WAYS
def test_compiles_without_a_graph_break(is_causal: bool) -> None:
    q, k, v = qkv()
    w = directions()

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return performer_attention(q, k, v, w, causal=is_causal)

    compiled = torch.compile(attend, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(q, k, v), attend(q, k, v))


@pytest.mark.refusal(PERFORMER)
def test_refuses_what_does_not_fit() -> None:
    q, k, v = qkv()
    w = directions()
    with refuses(ShapeError, (5, 4, 6), "four axes"):
        performer_attention(q[0], k, v, w)
    with refuses(ShapeError, "4 query, 3 key"):
        performer_attention(q, *qkv(g=3)[1:], w)
    with refuses(ShapeError, (2, 5, 4, 6), "5 features"):
        performer_attention(q, k, v, directions(5))
    for bad in (w[0], w[:0], w[None]):
        with refuses(ShapeError, "projection", tuple(bad.shape)):
            performer_attention(q, k, v, bad)
    with refuses(ShapeError, "torch.int64"):
        performer_attention(q, k, v, w.long())
    with refuses(ShapeError, "torch.int64"):
        performer_attention(q.long(), k.long(), v.long(), w)
    with refuses(ShapeError, "window(2)"):
        performer_attention(q, k, v, w, window(2))
    with refuses(ShapeError, "t=5", "s=4"):
        performer_attention(*qkv(s=4), w, causal=True)


@pytest.mark.refusal(PERFORMER)
def test_refuses_numbers_that_cannot_work() -> None:
    q, k, v = qkv()
    w = directions()
    for scale in (0.0, -1.0, math.nan):
        with refuses(ConfigError, "scale", scale):
            performer_attention(q, k, v, w, scale=scale)
    for eps in (-1.0, math.nan, math.inf, True):
        with refuses(ConfigError, "eps", eps):
            performer_attention(q, k, v, w, eps=eps)
    for kind in ("softmax", "cos"):
        with refuses(ConfigError, "kind", kind):
            performer_attention(q, k, v, w, kind=kind)  # type: ignore[arg-type]
        with refuses(ConfigError, "kind", kind):
            softmax_features(q, w, kind)  # type: ignore[arg-type]
    for size in (0, -1, 2.5, True):
        with refuses(ConfigError, "random features e", size):
            random_features(size, 4)  # type: ignore[arg-type]
        with refuses(ConfigError, "random features m", size):
            random_features(4, size)  # type: ignore[arg-type]
    with refuses(ConfigError, "torch.int64"):
        random_features(4, 4, dtype=torch.int64)
    with refuses(ConfigError, "'fast'"):
        performer_attention(q, k, v, w, form="fast")  # type: ignore[arg-type]


@pytest.mark.refusal("performer")
def test_shifts_dtypes_and_devices() -> None:
    x, w = torch.randn(1, 3, 1, 4), torch.randn(5, 4)
    for bad in (math.nan, math.inf, True, "a"):
        with refuses(ConfigError, "shift", repr(bad)):
            softmax_features(x, w, shift=bad)
    for dtype in (torch.int64, "float32"):
        with refuses(ConfigError, dtype):
            random_features(4, 5, dtype=dtype)
    with refuses(ShapeError, "meta", "cpu"):
        performer_attention(x, x, x, w.to("meta"))
