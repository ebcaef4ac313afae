"""Attention functions against torch and against loops over the papers' equations."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from handbook_src.errors import ConfigError, HandbookError, ShapeError
from handbook_src.functional.attention.attention import (
    attention_weights,
    scaled_dot_product_attention,
)
from handbook_src.functional.attention.mask import (
    Mask,
    causal,
    full,
    left_padding,
    padding,
    per_head,
    prefix_lm,
    random,
    sinks,
    window,
)
from handbook_src.testing import assert_causal, assert_parity, assert_permutation_equivariant, refuses

SDPA = "scaled-dot-product-attention"
BOTH = pytest.mark.parametrize("backend", ["reference", "torch", "auto"])
DOUBLE = torch.float64
LENGTHS = torch.tensor([4, 1])


def qkv(
    b: int = 2,
    t: int = 5,
    s: int = 5,
    h: int = 4,
    g: int = 4,
    e: int = 6,
    c: int = 6,
    dtype: torch.dtype = torch.float64,
) -> tuple[Tensor, Tensor, Tensor]:
    return (
        torch.randn(b, t, h, e, dtype=dtype),
        torch.randn(b, s, g, e, dtype=dtype),
        torch.randn(b, s, g, c, dtype=dtype),
    )


def torch_math(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float | None = None) -> Tensor:
    """Torch's unfused path, which shares no code with ours."""
    with sdpa_kernel(SDPBackend.MATH):
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v, mask, scale=scale, enable_gqa=True).transpose(1, 2)


MASKS: dict[str, Callable[[int, int], Mask | Tensor | None]] = {
    "none": lambda t, s: None,
    "full": lambda t, s: full,
    "causal": lambda t, s: causal,
    "window": lambda t, s: causal & (window(2) | sinks(1)),
    "padding": lambda t, s: padding(LENGTHS),
    "padded causal, some rows empty": lambda t, s: causal & left_padding(LENGTHS),
    "prefix": lambda t, s: prefix_lm(LENGTHS),
    "per head": lambda t, s: per_head(full, causal, window(1), sinks(2)),
    "random": lambda t, s: random(0.3, seed=2),
    "boolean t s": lambda t, s: causal.dense(t, s),
    "boolean 1 s": lambda t, s: torch.arange(s)[None] != 1,
    "boolean b 1 1 s": lambda t, s: padding(LENGTHS).dense(t, s)[:, :, :1],
    "added 1 h t s": lambda t, s: torch.randn(1, 4, t, s, dtype=torch.float64),
    "added with -inf": lambda t, s: torch.zeros(t, s, dtype=torch.float64).masked_fill(~causal.dense(t, s), -math.inf),
}


def dense(mask: Mask | Tensor | None, t: int, s: int) -> Tensor | None:
    return mask.dense(t, s) if isinstance(mask, Mask) else mask


@pytest.mark.parity(SDPA, "attention-masks", "causal-attention", "bidirectional-attention", "prefix-lm")
@BOTH
@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize(("t", "s", "g"), [(5, 5, 4), (3, 7, 2), (1, 6, 1), (1, 1, 4)])
def test_every_mask_against_torch(backend: str, name: str, t: int, s: int, g: int) -> None:
    mask = MASKS[name](t, s)
    assert_parity(
        lambda q, k, v: scaled_dot_product_attention(q, k, v, mask, backend=backend),
        lambda q, k, v: torch_math(q, k, v, dense(mask, t, s)),
        qkv(t=t, s=s, g=g),
    )


@pytest.mark.parity(SDPA)
@BOTH
@pytest.mark.parametrize("scale", [None, 1.0, 0.05])
@pytest.mark.parametrize(
    "sizes",
    [
        {"b": 1, "t": 1, "s": 1, "h": 1, "g": 1, "e": 1, "c": 1},
        {"t": 7, "s": 3, "e": 5, "c": 9},
        {"h": 6, "g": 3, "e": 3, "c": 2},
        {"t": 33, "s": 65, "h": 2, "g": 1, "e": 17, "c": 31},
        {"b": 0},
        {"t": 0},
    ],
    ids=str,
)
def test_sizes_and_scales_against_torch(backend: str, scale: float | None, sizes: dict[str, int]) -> None:
    assert_parity(
        lambda q, k, v: scaled_dot_product_attention(q, k, v, scale=scale, backend=backend),
        lambda q, k, v: torch_math(q, k, v, None, scale),
        qkv(**sizes),
    )


@pytest.mark.parity(SDPA)
@BOTH
def test_the_equation_read_aloud(backend: str) -> None:
    q, k, v = qkv(t=3, s=4, g=2, c=5)
    out = scaled_dot_product_attention(q, k, v, backend=backend)
    for b in range(2):
        for h in range(4):
            for t in range(3):
                scores = [torch.dot(q[b, t, h], k[b, s, h // 2]) / math.sqrt(6) for s in range(4)]
                top = max(scores)
                parts = [torch.exp(x - top) for x in scores]
                want = sum(p / sum(parts) * v[b, s, h // 2] for s, p in enumerate(parts))
                torch.testing.assert_close(out[b, t, h], want, rtol=1e-12, atol=1e-12)


@pytest.mark.parity(SDPA, "causal-attention")
@BOTH
def test_the_causal_flag_joins_the_mask(backend: str) -> None:
    q, k, v = qkv(t=3, s=5)
    past = causal.dense(3, 5)
    added = torch.randn(3, 5, dtype=torch.float64)
    cases = [(None, past), (causal, past), (window(2), (causal & window(2)).dense(3, 5)), (past, past)]
    cases += [(padding(LENGTHS), (causal & padding(LENGTHS)).dense(3, 5)), (added, added.masked_fill(~past, -math.inf))]
    for mask, want in cases:
        got = scaled_dot_product_attention(q, k, v, mask, causal=True, backend=backend)
        torch.testing.assert_close(got, torch_math(q, k, v, want))


@pytest.mark.outside("causal-attention")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_causal_is_torchs_is_causal_and_aligns_bottom_right(dtype: torch.dtype) -> None:
    from torch.nn.attention.bias import causal_lower_right

    q, k, v = qkv(dtype=dtype)
    want = F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)), is_causal=True).transpose(1, 2)
    torch.testing.assert_close(scaled_dot_product_attention(q, k, v, causal=True), want, rtol=0, atol=0)
    last = [x.transpose(1, 2) for x in (q[:, -2:], k, v)]
    want = F.scaled_dot_product_attention(*last, attn_mask=causal_lower_right(2, 5)).transpose(1, 2)
    torch.testing.assert_close(scaled_dot_product_attention(q[:, -2:], k, v, causal=True), want)


@pytest.mark.law("causal-attention", SDPA)
@BOTH
def test_the_future_does_not_leak(backend: str) -> None:
    assert_causal(
        lambda x: scaled_dot_product_attention(x, x, x, causal=True, backend=backend), torch.randn(2, 6, 2, 4).double()
    )


@pytest.mark.law("causal-attention")
def test_the_leak_test_catches_a_leak() -> None:
    x = torch.randn(1, 5, 1, 4).double()
    with pytest.raises(AssertionError, match="changed with the input after it"):
        assert_causal(lambda x: scaled_dot_product_attention(x, x, x, window(2)), x)


@pytest.mark.law("bidirectional-attention", SDPA)
@BOTH
def test_without_positions_order_is_invisible(backend: str) -> None:
    assert_permutation_equivariant(
        lambda x: scaled_dot_product_attention(x, x, x, full, backend=backend), torch.randn(2, 7, 2, 4).double()
    )


@pytest.mark.law("bidirectional-attention")
def test_every_output_sees_every_input() -> None:
    x = torch.randn(1, 5, 1, 4, dtype=torch.float64, requires_grad=True)
    out = scaled_dot_product_attention(x, x, x, full)
    for t in range(5):
        (grad,) = torch.autograd.grad(out[0, t].sum(), x, retain_graph=True)
        assert (grad.abs().amax((0, 2, 3)) > 0).all()


@pytest.mark.law("prefix-lm")
def test_a_prefix_lm_reads_its_prefix_both_ways_and_the_rest_causally() -> None:
    x = torch.randn(1, 7, 1, 4, dtype=torch.float64, requires_grad=True)
    out = scaled_dot_product_attention(x, x, x, prefix_lm(3))
    reach = torch.stack(
        [torch.autograd.grad(out[0, t].sum(), x, retain_graph=True)[0][0, :, 0].abs().sum(-1) for t in range(7)]
    )
    torch.testing.assert_close(reach > 0, prefix_lm(3).dense(7))


@pytest.mark.law(SDPA)
@BOTH
@pytest.mark.parametrize("form", ["rule", "boolean", "added"])
@pytest.mark.parametrize("s", [5, 1300])
def test_a_row_that_sees_nothing_is_zero_and_passes_no_gradient(backend: str, form: str, s: int) -> None:
    rule = Mask("no key for query 2 of 4", lambda b, h, t, j: (t != s - 2) & (j >= 0))
    seen = rule.dense(4, s)
    masks = {"rule": rule, "boolean": seen, "added": torch.zeros(4, s).double().masked_fill(~seen, -math.inf)}
    q, k, v = (x.requires_grad_() for x in qkv(t=4, s=s))
    out = scaled_dot_product_attention(q, k, v, masks[form], backend=backend)
    assert (out[:, 2] == 0).all()
    assert out.isfinite().all()
    grads = torch.autograd.grad(out[:, 2].sum(), (q, k, v), retain_graph=True)
    assert all((x == 0).all() for x in grads)
    assert all(x.isfinite().all() for x in torch.autograd.grad(out.sum(), (q, k, v)))


@pytest.mark.law(SDPA)
@BOTH
def test_no_keys_at_all_gives_zeros(backend: str) -> None:
    for mask in (None, padding(LENGTHS)):
        out = scaled_dot_product_attention(*qkv(s=0), mask, backend=backend)
        torch.testing.assert_close(out, torch.zeros(2, 5, 4, 6, dtype=torch.float64))


@pytest.mark.law(SDPA)
@BOTH
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("form", ["rule", "boolean", "added"])
def test_garbage_in_the_padding_reaches_nothing(backend: str, bad: float, form: str) -> None:
    seen = padding(LENGTHS).dense(5)
    masks = {
        "rule": padding(LENGTHS),
        "boolean": seen,
        "added": torch.zeros(2, 1, 5, 5).double().masked_fill(~seen, -math.inf),
    }
    q, k, v = qkv()
    clean = torch.autograd.grad(*_loss(q, k, v, masks[form], backend))
    k[0, 4:], v[0, 4:], k[1, 1:], v[1, 1:] = bad, bad, bad, bad
    dirty = torch.autograd.grad(*_loss(q, k, v, masks[form], backend))
    for a, b in zip(dirty, clean, strict=True):
        torch.testing.assert_close(a, b)
    torch.testing.assert_close(
        scaled_dot_product_attention(q, k, v, masks[form], backend=backend),
        torch_math(q, k.nan_to_num(0, 0, 0), v.nan_to_num(0, 0, 0), seen),
    )


def _loss(q: Tensor, k: Tensor, v: Tensor, mask: Mask | Tensor, backend: str) -> tuple[Tensor, list[Tensor]]:
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    return scaled_dot_product_attention(*leaves, mask, backend=backend).square().sum(), leaves


@pytest.mark.law(SDPA, "causal-attention")
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_a_nan_in_the_future_reaches_no_past_query(backend: str) -> None:
    q, k, v = qkv()
    want = scaled_dot_product_attention(q, k, v, causal=True, backend="reference")
    k[:, 3], v[:, 4] = math.nan, math.nan
    q, k, v = (x.requires_grad_() for x in (q, k, v))
    out = scaled_dot_product_attention(q, k, v, causal=True, backend=backend)
    torch.testing.assert_close(out[:, :3], want[:, :3])
    assert out[:, 3:].isnan().all(), "what a query may see is not hidden from it, broken or not"
    grads = torch.autograd.grad(out[:, :3].sum(), (q, k, v))
    assert all(x.isfinite().all() for x in grads)


@pytest.mark.law(SDPA)
def test_a_broken_query_of_the_padding_sends_nothing_back() -> None:
    q, k, v = qkv()
    q[0, 3:] = math.nan
    leaves = [x.requires_grad_() for x in (q, k, v)]
    out = scaled_dot_product_attention(*leaves, padding(torch.tensor([3, 5])))
    grads = torch.autograd.grad(out[0, :3].sum() + out[1].sum(), leaves)
    assert all(x.isfinite().all() for x in grads)


@pytest.mark.law(SDPA)
def test_weights_are_a_distribution_over_what_is_visible() -> None:
    q, k, v = qkv(g=2)
    rule = causal & left_padding(LENGTHS)
    w = attention_weights(q, k, rule)
    assert (w >= 0).all()
    seen = rule.dense(5).expand(2, 4, 5, 5)
    assert (w[~seen] == 0).all()
    torch.testing.assert_close(w.sum(-1), seen.any(-1).double())
    out = torch.einsum("bhts,bshe->bthe", w, v.repeat_interleave(2, 2))
    torch.testing.assert_close(out, scaled_dot_product_attention(q, k, v, rule))
    torch.testing.assert_close(attention_weights(q, k, causal=True), attention_weights(q, k, causal))
    torch.testing.assert_close(attention_weights(q, k, scale=2.0), attention_weights(2 * q, k, scale=1.0))


@pytest.mark.law(SDPA)
def test_scores_keep_unit_variance_whatever_the_width() -> None:
    for e in (4, 64, 1024):
        q, k = torch.randn(1, 900, 1, e), torch.randn(1, 900, 1, e)
        scores = torch.einsum("bthe,bshe->bhts", q, k)
        assert abs((scores / math.sqrt(e)).std().item() - 1) < 0.05
        assert abs(scores.std().item() / math.sqrt(e) - 1) < 0.05


@pytest.mark.parity(SDPA)
@BOTH
def test_dropout_drops_weights_and_rescales_the_rest(backend: str) -> None:
    q, k, v = qkv(b=1, t=40, s=40, h=2, g=2)
    v = torch.ones_like(v)
    torch.manual_seed(3)
    out = scaled_dot_product_attention(q, k, v, dropout=0.25, backend=backend)
    assert not torch.equal(out, torch.ones_like(out))
    assert abs(out.mean().item() - 1) < 0.05, "the expectation stays"
    torch.manual_seed(3)
    weights = F.dropout(attention_weights(q, k), 0.25)
    torch.testing.assert_close(out, torch.einsum("bhts,bshe->bthe", weights, v))


@pytest.mark.registration(SDPA)
@BOTH
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_stays_close_to_float64(backend: str, dtype: torch.dtype) -> None:
    q, k, v = qkv(t=9, s=9, e=16, c=16, dtype=dtype)
    got = scaled_dot_product_attention(q, k, v, causal & window(4), backend=backend)
    assert got.dtype == dtype
    want = torch_math(q.double(), k.double(), v.double(), (causal & window(4)).dense(9))
    # measured: 0.4 % of the largest value in bfloat16, 0.05 % in float16
    assert (got.double() - want).abs().max() < (2e-2 if dtype == torch.bfloat16 else 2e-3) * want.abs().max()


@pytest.mark.registration(SDPA)
@BOTH
def test_any_memory_layout(backend: str) -> None:
    q, k, v = qkv(t=6, s=6)
    want = scaled_dot_product_attention(q, k, v, causal=True, backend=backend)
    turned = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v)]
    wide = [torch.stack([x, -x], -1).flatten(-2)[..., ::2] for x in (q, k, v)]
    for views in (turned, wide):
        assert not views[0].is_contiguous()
        torch.testing.assert_close(scaled_dot_product_attention(*views, causal=True, backend=backend), want)
    one = k[:, :, :1].expand(-1, -1, 4, -1)
    torch.testing.assert_close(
        scaled_dot_product_attention(q, one, one, backend=backend),
        scaled_dot_product_attention(q, k[:, :, :1], k[:, :, :1], backend=backend),
    )


@pytest.mark.registration(SDPA)
def test_the_reference_has_second_derivatives() -> None:
    q, k, v = (x.requires_grad_() for x in qkv(b=1, t=3, s=3, h=2, g=1, e=2, c=2))
    assert torch.autograd.gradgradcheck(
        lambda *x: scaled_dot_product_attention(*x, causal=True, backend="reference"), (q, k, v)
    )


@pytest.mark.registration(SDPA)
def test_a_learned_bias_gets_its_gradient() -> None:
    q, k, v = qkv()
    bias = torch.randn(4, 5, 5, dtype=torch.float64)[None]
    assert_parity(
        lambda m: scaled_dot_product_attention(q, k, v, m, causal=True),
        lambda m: torch_math(q, k, v, m.masked_fill(~causal.dense(5), -math.inf)),
        [bias],
    )


@pytest.mark.registration(SDPA, "attention-masks")
@pytest.mark.usefixtures("unchecked")
@BOTH
def test_compiles_without_a_graph_break(backend: str) -> None:
    q, k, v = qkv()

    rule = causal & (window(3) | sinks(1))

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return scaled_dot_product_attention(q, k, v, rule, backend=backend)

    compiled = torch.compile(attend, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(q, k, v), attend(q, k, v))


@pytest.mark.refusal(SDPA)
def test_refuses_shapes_that_do_not_fit() -> None:
    q, k, v = qkv()
    with refuses(ShapeError, (5, 4, 6), "four axes"):
        scaled_dot_product_attention(q[0], k, v)
    for bad in (qkv(e=5)[1:], (k, qkv(s=4)[2]), qkv(b=3)[1:]):
        with refuses(ShapeError, tuple(bad[0].shape), tuple(bad[1].shape)):
            scaled_dot_product_attention(q, *bad)
    with refuses(ShapeError, "4 query, 3 key"):
        scaled_dot_product_attention(q, *qkv(g=3)[1:])
    with refuses(ShapeError, "4 query, 0 key"):
        scaled_dot_product_attention(q, *qkv(g=0)[1:])


@pytest.mark.refusal(SDPA, "attention-masks", "causal-attention", "bidirectional-attention")
@BOTH
def test_refuses_masks_that_do_not_fit(backend: str) -> None:
    q, k, v = qkv(t=5, s=4)
    for shape in ((4, 5), (2, 5, 4), (3, 1, 5, 4), (2, 3, 5, 4), (4,), (5, 1)):
        with refuses(ShapeError, "attention mask", shape):
            scaled_dot_product_attention(q, k, v, torch.ones(shape, dtype=torch.bool), backend=backend)
    with refuses(ShapeError, "torch.int64", "true = may attend"):
        scaled_dot_product_attention(q, k, v, torch.ones(5, 4, dtype=torch.int64), backend=backend)  # type: ignore[arg-type]
    with refuses(ShapeError, "one on meta", "cpu"):
        scaled_dot_product_attention(q, k, v, torch.ones(5, 4, dtype=torch.bool, device="meta"), backend=backend)
    with refuses(ShapeError, "t=5", "s=4"):
        scaled_dot_product_attention(q, k, v, causal=True, backend=backend)
    with refuses(ShapeError, "t=5", "s=4"):
        scaled_dot_product_attention(q, k, v, window(3), backend=backend)
    with refuses(ShapeError, "(3, 1, 5, 4)"):
        scaled_dot_product_attention(q, k, v, padding(torch.tensor([1, 2, 3])), backend=backend)
    with refuses(ShapeError, "(1, 3, 5, 4)"):
        scaled_dot_product_attention(q, k, v, per_head(full, full, full), backend=backend)


@pytest.mark.refusal(SDPA)
def test_refuses_numbers_that_cannot_work() -> None:
    q, k, v = qkv()
    for scale in (0.0, -1.0, math.nan):
        with refuses(ConfigError, "scale", scale):
            scaled_dot_product_attention(q, k, v, scale=scale)
        with refuses(ConfigError, "scale", scale):
            attention_weights(q, k, scale=scale)
    for dropout in (-0.1, 1.0, 2.0):
        with refuses(ConfigError, "dropout", dropout):
            scaled_dot_product_attention(q, k, v, dropout=dropout)
    for backend in ("triton", "flash"):
        with refuses(ConfigError, "backend", backend):
            scaled_dot_product_attention(q, k, v, backend=backend)  # type: ignore[arg-type]


@pytest.mark.law(SDPA)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_scores_of_halves_do_not_overflow(dtype: torch.dtype) -> None:
    q, k, v = (
        x.to(dtype) for x in (60 * torch.randn(1, 8, 2, 128), 60 * torch.randn(1, 8, 2, 128), torch.randn(1, 8, 2, 4))
    )
    exact = attention_weights(q.double(), k.double())
    torch.testing.assert_close(attention_weights(q, k).double(), exact, rtol=0.01, atol=0.01)
    out = scaled_dot_product_attention(q, k, v, backend="reference")
    want = scaled_dot_product_attention(q.double(), k.double(), v.double(), backend="reference")
    torch.testing.assert_close(out.double(), want, rtol=0.02, atol=0.02)


@pytest.mark.law(SDPA)
@BOTH
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("number", [torch.finfo(torch.float32).min, -1e9, 1e5])
def test_finite_masks_beyond_the_dtype_stay_finite(backend: str, dtype: torch.dtype, number: float) -> None:
    q, k, v = (x.to(dtype) for x in qkv())
    mask = torch.zeros(5, 5).fill_diagonal_(number)
    mask[0, 1:], mask[4] = -torch.inf, -torch.inf  # one visible key, then none
    out = scaled_dot_product_attention(q, k, v, mask, backend=backend)
    want = scaled_dot_product_attention(q.float(), k.float(), v.float(), mask, backend="reference")
    torch.testing.assert_close(out.float(), want, rtol=0.03, atol=0.03)


@pytest.mark.refusal(SDPA)
@pytest.mark.parametrize("mask", ["causal", [[True]], window])
@pytest.mark.usefixtures("unchecked")
def test_what_is_no_mask_is_refused(mask: object) -> None:
    with refuses(ConfigError, "attention mask", "a Mask or a tensor"):
        scaled_dot_product_attention(*qkv(), mask)  # type: ignore[arg-type]


@pytest.mark.refusal(SDPA)
def test_heads_without_features_are_refused() -> None:
    with refuses(ShapeError, "at least one feature"):
        scaled_dot_product_attention(*qkv(e=0))


@pytest.mark.refusal(SDPA)
@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_inputs_that_are_no_floating_tensors_of_one_kind_are_refused(backend: str) -> None:
    q, k, v = qkv()
    for inputs, value in (
        ((q.long(), k.long(), v.long()), "int64"),
        ((q > 0, k > 0, v > 0), "bool"),
        ((q, k.half(), v), "float16"),
        ((q, k, v.half()), "float16"),
        ((q, k.to("meta"), v), "meta"),
        ((q, None, v), "NoneType"),
    ):
        with refuses(HandbookError, value):
            scaled_dot_product_attention(*inputs, backend=backend)  # type: ignore[arg-type]
    for option, value in (("scale", "x"), ("scale", True), ("scale", math.inf), ("dropout", None), ("dropout", "a")):
        with refuses(ConfigError, str(value)):
            scaled_dot_product_attention(q, k, v, backend=backend, **{option: value})  # type: ignore[arg-type]


def test_autocast_joins_dtypes() -> None:
    q, k, v = (x.float() for x in qkv())
    with torch.autocast("cpu", torch.bfloat16):
        found = scaled_dot_product_attention(q, k.bfloat16(), v.bfloat16())
    assert found.dtype == torch.bfloat16
