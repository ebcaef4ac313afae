"""Sliding-window attention against the dense mask, FlexAttention and local-attention; its work against its length."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from handbook_src.errors import ConfigError, ShapeError
from handbook_src.functional.attention.attention import scaled_dot_product_attention
from handbook_src.functional.attention.mask import causal, window
from handbook_src.functional.attention.sliding_window import sliding_window_attention, window_rule
from handbook_src.testing import assert_causal, assert_parity, refuses

SWA = "sliding-window-attention"
BOTH = pytest.mark.parametrize("is_causal", [False, True])


def qkv(t: int, s: int | None = None, g: int = 4, e: int = 6, c: int = 6, b: int = 2) -> list[Tensor]:
    s = t if s is None else s
    return [torch.randn(b, t, 4, e), torch.randn(b, s, g, e), torch.randn(b, s, g, c)]


def dense(q: Tensor, k: Tensor, v: Tensor, n: int, is_causal: bool, scale: float | None = None) -> Tensor:
    """The distance read from the positions, one entry at a time."""
    t, s = q.shape[1], k.shape[1]
    seen = [[abs(i + s - t - j) < n and (j <= i + s - t or not is_causal) for j in range(s)] for i in range(t)]
    return scaled_dot_product_attention(q, k, v, torch.tensor(seen).view(t, s), scale=scale, backend="reference")


@pytest.mark.parity(SWA)
@BOTH
@pytest.mark.parametrize(("t", "s", "g"), [(33, 33, 4), (1, 33, 2), (5, 33, 1), (32, 32, 2), (2, 2, 4), (64, 70, 4)])
@pytest.mark.parametrize("n", [1, 2, 5, 16, 33, 100])
def test_equals_the_dense_mask(is_causal: bool, t: int, s: int, g: int, n: int) -> None:
    for size in (1, 7, 16, None):
        assert_parity(
            lambda q, k, v, size=size: sliding_window_attention(q, k, v, n, causal=is_causal, block_size=size),
            lambda q, k, v: dense(q, k, v, n, is_causal),
            qkv(t, s, g),
        )


@pytest.mark.parity(SWA)
@pytest.mark.parametrize("backend", ["auto", "torch", "reference"])
@pytest.mark.parametrize("scale", [None, 1.0, 0.05])
@pytest.mark.parametrize(("e", "c"), [(1, 1), (6, 3), (5, 17)])
def test_backends_scales_and_widths(backend: str, scale: float | None, e: int, c: int) -> None:
    assert_parity(
        lambda q, k, v: sliding_window_attention(q, k, v, 3, causal=True, scale=scale, block_size=4, backend=backend),
        lambda q, k, v: dense(q, k, v, 3, True, scale),
        qkv(9, 13, e=e, c=c),
    )


@pytest.mark.outside(SWA)
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@BOTH
def test_equals_flex_attention(is_causal: bool) -> None:
    from torch.nn.attention.flex_attention import flex_attention

    x = [y.double() for y in qkv(40)]
    rule = causal & window(9) if is_causal else window(9)
    want = flex_attention(*(y.transpose(1, 2) for y in x), block_mask=rule.block_mask(40)).transpose(1, 2)
    torch.testing.assert_close(sliding_window_attention(*x, 9, causal=is_causal, block_size=8), want)


@pytest.mark.outside(SWA)
def test_equals_the_published_local_attention() -> None:
    from local_attention import LocalAttention

    x = [y.double() for y in qkv(48, e=8, c=8)]
    theirs = LocalAttention(
        window_size=8, causal=True, look_backward=1, exact_windowsize=True, use_rotary_pos_emb=False, autopad=True
    )
    # its exact window of 8 looks 8 keys back and sees the query's own: 9 keys
    want = theirs(*(y.transpose(1, 2) for y in x)).transpose(1, 2)
    torch.testing.assert_close(sliding_window_attention(*x, 9, causal=True), want)


@pytest.mark.law(SWA)
@BOTH
@pytest.mark.parametrize(("depth", "n"), [(1, 4), (3, 4), (5, 2), (2, 1)])
def test_a_stack_reaches_depth_times_the_window(is_causal: bool, depth: int, n: int) -> None:
    x = torch.randn(1, 31, 1, 4, dtype=torch.float64, requires_grad=True)
    y, key = x, 0.1 * x.detach()  # fixed and flat weights: grown ones would round to 0 and 1
    for _ in range(depth):
        y = sliding_window_attention(key, key, y, n, causal=is_causal, block_size=4)
    (grad,) = torch.autograd.grad(y[0, 15].sum(), x)
    reached = (grad[0, :, 0].abs().sum(-1) > 0).nonzero().flatten().tolist()
    far = depth * (n - 1)
    assert reached == list(range(15 - far, 16 if is_causal else 16 + far))


@pytest.mark.law(SWA)
def test_it_is_causal_and_shifts_with_its_input() -> None:
    x = torch.randn(2, 21, 2, 4).double()
    assert_causal(lambda x: sliding_window_attention(x, x, x, 5, causal=True, block_size=8), x)
    with pytest.raises(AssertionError, match="changed with the input after it"):
        assert_causal(lambda x: sliding_window_attention(x, x, x, 5), x)
    y = sliding_window_attention(x, x, x, 5, causal=True, block_size=8)
    moved = sliding_window_attention(*(x[:, 3:],) * 3, 5, causal=True, block_size=8)
    torch.testing.assert_close(moved[:, 4:], y[:, 7:])


@pytest.mark.law(SWA)
def test_a_window_over_everything_is_full_attention_and_one_position_is_its_value() -> None:
    q, k, v = (x.double() for x in qkv(17))
    for is_causal in (False, True):
        want = scaled_dot_product_attention(q, k, v, causal=is_causal)
        for n in (17, 18, 10**6):
            torch.testing.assert_close(sliding_window_attention(q, k, v, n, causal=is_causal), want)
        torch.testing.assert_close(sliding_window_attention(q, k, v, 1, causal=is_causal), v)


@pytest.mark.law(SWA)
def test_decoding_step_by_step_equals_the_whole() -> None:
    q, k, v = (x.double() for x in qkv(20))
    whole = sliding_window_attention(q, k, v, 6, causal=True)
    steps = [sliding_window_attention(q[:, i : i + 1], k[:, : i + 1], v[:, : i + 1], 6, causal=True) for i in range(20)]
    torch.testing.assert_close(torch.cat(steps, 1), whole)
    rolling = sliding_window_attention(q[:, -1:], k[:, -6:], v[:, -6:], 6, causal=True)
    torch.testing.assert_close(rolling, whole[:, -1:])  # the last n keys are all that a cache must hold


@pytest.mark.law(SWA)
def test_memory_and_work_grow_with_the_length() -> None:
    """Counted, not timed: what autograd keeps, and the multiplications, of 4 times the length."""
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    def cost(t: int) -> tuple[int, int]:
        q, k, v = (torch.randn(1, t, 2, 8, requires_grad=True) for _ in range(3))
        kept: dict[int, int] = {}

        def note(x: Tensor) -> Tensor:
            kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
            return x

        flops = FlopCounterMode(display=False)
        with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
            sliding_window_attention(q, k, v, 33, causal=True, block_size=32)
        with flops, sdpa_kernel(SDPBackend.MATH), torch.no_grad():  # the counter doesn't know the fused kernel
            sliding_window_attention(q, k, v, 33, causal=True, block_size=32)
        return sum(kept.values()), flops.get_total_flops()

    small, large = cost(512), cost(2048)
    assert large[0] < 4.3 * small[0]
    assert 0 < large[1] <= 4.3 * small[1]
    assert large[0] < 2048 * 2048, "less than one byte for each pair"


@pytest.mark.law(SWA)
@BOTH
@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("n", [3, 50])
def test_what_is_broken_reaches_only_who_may_see_it(is_causal: bool, bad: float, n: int) -> None:
    clean = [x.double() for x in qkv(20, 24, g=2)]
    q, k, v = (x.clone() for x in clean)
    k[0, 9], v[1, 15, 1], q[1, 2, 3] = bad, bad, bad
    q, k, v = (x.requires_grad_() for x in (q, k, v))
    out, want = sliding_window_attention(q, k, v, n, causal=is_causal, block_size=8), dense(q, k, v, n, is_causal)
    torch.testing.assert_close(out, want, equal_nan=True)
    good = ~out.isnan()
    assert good.any()
    grads = torch.autograd.grad(out[good].sum(), (q, k, v))
    wants = torch.autograd.grad(want[good].sum(), (q, k, v))
    for mine, theirs in zip(grads, wants, strict=True):
        assert mine.isfinite().all()
        torch.testing.assert_close(mine, theirs)


@pytest.mark.law(SWA)
def test_empty_inputs() -> None:
    for b, t, s in ((0, 5, 5), (2, 0, 5), (2, 0, 0), (0, 0, 0)):
        assert sliding_window_attention(*qkv(t, s, b=b), 2).shape == (b, t, 4, 6)


@pytest.mark.registration(SWA)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_layout_meta_and_untouched_inputs(dtype: torch.dtype) -> None:
    q, k, v = qkv(21, g=2)
    want = dense(q.double(), k.double(), v.double(), 5, True)
    low = sliding_window_attention(q.to(dtype), k.to(dtype), v.to(dtype), 5, causal=True, block_size=8)
    assert low.dtype == dtype
    torch.testing.assert_close(low.double(), want, rtol=0.05, atol=0.05)
    turned = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v)]
    copies = [x.clone() for x in turned]
    out = sliding_window_attention(*turned, 5, causal=True, block_size=8)
    torch.testing.assert_close(out.double(), want, rtol=1e-4, atol=1e-5)
    assert all(torch.equal(x, y) for x, y in zip(turned, copies, strict=True))
    assert sliding_window_attention(*(x.to("meta") for x in (q, k, v)), 5).shape == q.shape


@pytest.mark.registration(SWA)
def test_dropout_keeps_the_mean_and_the_reference_has_second_derivatives() -> None:
    q, k, v = qkv(200)
    out = sliding_window_attention(q, k, torch.ones_like(v), 40, dropout=0.3)
    assert out.std() > 0.01
    assert abs(out.mean().item() - 1) < 0.02
    small = [x.double().requires_grad_() for x in qkv(4, e=2, c=2, b=1)]
    assert torch.autograd.gradgradcheck(lambda *x: sliding_window_attention(*x, 2, backend="reference"), small)


@pytest.mark.registration(SWA)
@pytest.mark.usefixtures("unchecked")
@BOTH
def test_compiles_without_a_graph_break(is_causal: bool) -> None:
    x = qkv(21)
    compiled = torch.compile(
        lambda q, k, v: sliding_window_attention(q, k, v, 5, causal=is_causal, block_size=8),
        fullgraph=True,
        backend="aot_eager",
    )
    torch.testing.assert_close(compiled(*x), sliding_window_attention(*x, 5, causal=is_causal))


@pytest.mark.refusal(SWA)
def test_refusals() -> None:
    q, k, v = qkv(6)
    for n in (0, -3, True, 2.5, math.nan, None):
        with refuses(ConfigError, "window", n):
            sliding_window_attention(q, k, v, n)  # type: ignore[arg-type]
    for size in (0, -1, False, 1.5):
        with refuses(ConfigError, "block_size", size):
            sliding_window_attention(q, k, v, 2, block_size=size)  # type: ignore[arg-type]
    with refuses(ShapeError, "t=6", "s=5"):
        sliding_window_attention(q, k[:, :5], v[:, :5], 2, causal=True)
    with refuses(ShapeError, "four axes", (6, 4, 6)):
        sliding_window_attention(q[0], k[0], v[0], 2)
    with refuses(ShapeError, "4 query, 3 key"):
        sliding_window_attention(q, *qkv(6, g=3)[1:], 2)
    with refuses(ShapeError, "torch.int64"):
        sliding_window_attention(q.long(), k.long(), v.long(), 2)
    with refuses(ShapeError, "torch.float64"):
        sliding_window_attention(q, k, v.double(), 2)
    with refuses(ConfigError, "scale", 0.0):
        sliding_window_attention(q, k, v, 2, scale=0.0)
    with refuses(ConfigError, "dropout", -0.1):
        sliding_window_attention(q, k, v, 2, dropout=-0.1)
    with refuses(ConfigError, "backend", "triton"):
        sliding_window_attention(q, k, v, 2, backend="triton")


def test_the_rule_is_kept() -> None:
    assert window_rule(5, True) is window_rule(5, True)
    assert str(window_rule(5, True)) == "causal & window(5)"


@pytest.mark.refusal("sliding-window-attention")
@pytest.mark.parametrize("n", [3.0, True, [3], None])
def test_a_rule_that_was_made_before_does_not_let_the_wrong_kind_pass(n: object) -> None:
    window_rule(1), window_rule(3)  # to a dict, 3.0 is 3 and True is 1
    with refuses(ConfigError, str(n)):
        window_rule(n)  # type: ignore[arg-type]
