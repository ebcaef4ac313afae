"""The fused norm kernels, in the interpreter: every flag, both paths, forward and backward, in three dtypes."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import triton
import triton.language as tl

from handbook_src.errors import ConfigError, KernelUnavailable, ShapeError
from handbook_src.kernels import norm
from handbook_src.testing import refuses, relative_error
from handbook_src.testing.guard import Guards

IDS = ("layer-norm", "rms-norm")
SEED = torch.tensor([1234567890123])
# Relative l2 error against float64: half a place of the dtype, and for gradients that pass through a rounded stream
# twice that.  Measured 6e-8, 1.9e-3 and 2.5e-4 forward; 1.6e-7, 3.1e-3 and 4.6e-4 backward.
ALLOWED = {torch.float32: 1e-6, torch.bfloat16: 6e-3, torch.float16: 8e-4}
DTYPES = list(ALLOWED)


@pytest.fixture(params=["whole", "long"])
def path(request, monkeypatch):
    """Both paths of the launcher at test size: rows in registers, and rows read in blocks of at most 16 columns."""
    if request.param == "long":
        monkeypatch.setattr(norm, "WHOLE_ROW_FORWARD", 1)
        monkeypatch.setattr(norm, "WHOLE_ROW_BACKWARD", 1)
        plan = norm.plan
        monkeypatch.setattr(norm, "plan", lambda *sizes: plan(*sizes)._replace(rows=1, block=16, whole=False))
    return request.param


def oracle(x, residual, weight, bias, *, eps=1e-5, dropout=0.0, keep=None, centre=True):
    """The definition, in whatever dtype the arguments have."""
    z = x if keep is None else torch.where(keep, x / (1 - dropout if dropout < 1 else 1), 0.0)
    z = z if residual is None else z + residual
    centred = z - z.mean(-1, keepdim=True) if centre else z
    y = centred / (centred.square().mean(-1, keepdim=True) + eps).sqrt()
    y = y if weight is None else y * weight
    return (y if bias is None else y + bias), z


def agree(x, residual=None, weight=None, bias=None, *, dropout=0.0, centre=True, allowed=None):
    """Compare outputs and every gradient of the kernel with the definition in float64; return the gradients."""
    allowed = allowed or ALLOWED[x.dtype]
    leaves = [None if t is None else t.detach().requires_grad_() for t in (x, residual, weight, bias)]
    wide = [None if t is None else t.detach().double().requires_grad_() for t in leaves]
    outs = norm.dropout_add_norm_triton(*leaves, dropout=dropout, centre=centre, seed=SEED)
    keep = norm.dropout_mask_triton(tuple(x.shape), dropout, SEED) if dropout else None
    wants = oracle(*wide, dropout=dropout, centre=centre, keep=keep)
    streams = residual is not None or dropout > 0
    outs, wants = (outs, wants) if streams else (outs[:1], wants[:1])
    cotangents = [torch.randn(o.shape).to(o.dtype) for o in outs]
    got = torch.autograd.grad(outs, [t for t in leaves if t is not None], cotangents)
    want = torch.autograd.grad(wants, [t for t in wide if t is not None], [c.double() for c in cotangents])
    for name, a, b in [
        *zip(("normed", "stream"), outs, wants, strict=False),
        *zip(
            [n for n, t in zip(("dx", "dresidual", "dw", "db"), leaves, strict=True) if t is not None],
            got,
            want,
            strict=True,
        ),
    ]:
        # a row of one feature has variance 0: what is left is eps against the rounding of z - mean
        error = (a.double() - b).norm().item() if b.norm() < 1e-6 else relative_error(a, b)
        assert error <= allowed, f"{name}: relative error {error:.1e}"
    return got


def drawn(rows, cols, dtype=torch.float32, *, residual=None, affine=True):
    x = torch.randn(rows, cols).to(dtype)
    r = torch.randn(rows, cols).to(residual) if residual is not None else None
    w, b = (torch.randn(cols).to(dtype), torch.randn(cols).to(dtype)) if affine else (None, None)
    return x, r, w, b


@pytest.mark.parity(*IDS)
@pytest.mark.parametrize("centre", [True, False], ids=["layer", "rms"])
@pytest.mark.parametrize("cols", [1, 3, 15, 16, 17, 32, 33])
def test_ragged_rows(cols, centre, path, guards):
    agree(*drawn(5, cols, residual=torch.float32), centre=centre)


@pytest.mark.parity(*IDS)
@pytest.mark.parametrize("rows", [1, 2, 127, 129])
def test_ragged_tiles(rows, guards):
    """Several rows a program, 128 of 16 columns: one row, just below and just above a tile."""
    assert norm.plan(16, norm.WHOLE_ROW_FORWARD, norm.LONG_BLOCK_FORWARD).rows == 128
    agree(*drawn(rows, 16))


@pytest.mark.parity(*IDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("centre", [True, False], ids=["layer", "rms"])
@pytest.mark.parametrize("fused", ["norm", "add", "drop", "drop-add"])
def test_every_flag_in_every_dtype(dtype, centre, fused, path, guards):
    x, r, w, b = drawn(4, 17, dtype, residual=dtype if "add" in fused else None)
    agree(x, r, w, b if centre else None, centre=centre, dropout=0.3 if "drop" in fused else 0.0)


@pytest.mark.parity(*IDS)
@pytest.mark.parametrize("weight", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_weight_and_bias_are_optional(weight, bias, path, guards):
    x, _, w, b = drawn(3, 9)
    agree(x, None, w if weight else None, b if bias else None)


@pytest.mark.parity(*IDS)
def test_mixed_precision(path, guards):
    """Half-precision activations, float32 stream and weights: each tensor and its gradient keep their dtype."""
    x, r, _, _ = drawn(3, 17, torch.bfloat16, residual=torch.float32)
    dx, dr, dw, db = agree(x, r, torch.randn(17), torch.randn(17), dropout=0.25)
    assert (dx.dtype, dr.dtype, dw.dtype, db.dtype) == (torch.bfloat16, *(torch.float32,) * 3)
    y, z = norm.dropout_add_norm_triton(x, r)
    assert (y.dtype, z.dtype) == (torch.bfloat16, torch.float32)


@pytest.mark.outside(*IDS)
def test_agrees_with_torch():
    x, w, b = torch.randn(2, 3, 7), torch.randn(7), torch.randn(7)
    torch.testing.assert_close(norm.layer_norm_triton(x, w, b), F.layer_norm(x, (7,), w, b))
    torch.testing.assert_close(norm.rms_norm_triton(x, w), F.rms_norm(x, (7,), w, 1e-6))


@pytest.mark.parity(*IDS)
@pytest.mark.parametrize("cols", [32767, 32768, 32769])
def test_the_real_limit_of_a_row(cols, guards):
    agree(*drawn(2, cols), allowed=2e-6)


@pytest.mark.parity(*IDS)
@pytest.mark.parametrize("cut", ["rows", "columns", "transposed", "expanded"])
def test_rows_that_are_not_contiguous(cut, path, guards):
    base = torch.randn(8, 20)
    x = {"rows": base[::2, :17], "columns": base[:, ::2], "transposed": base.T, "expanded": base[:1].expand(5, 20)}[cut]
    w, b = torch.randn(x.shape[-1], 2)[:, 1], torch.randn(1).expand(x.shape[-1])
    assert not x.is_contiguous()
    agree(x, x.flip(0).as_strided(x.shape, x.contiguous().stride()), w, b)
    y = norm.layer_norm_triton(x.unflatten(0, (1, -1)), w, b)
    torch.testing.assert_close(y[0], F.layer_norm(x, x.shape[-1:], w, b))


@pytest.mark.law(*IDS)
def test_a_gradient_that_is_expanded(guards):
    """``y.sum().backward()`` hands down one value with strides (0, 0)."""
    x = torch.randn(3, 9, requires_grad=True)
    norm.rms_norm_triton(x).sum().backward()
    want = torch.autograd.grad(F.rms_norm(x, (9,), eps=1e-6).sum(), x)[0]
    torch.testing.assert_close(x.grad, want)


@pytest.mark.law(*IDS)
@pytest.mark.parametrize("only", [0, 1], ids=["normed", "stream"])
def test_one_output_is_enough(only):
    """The other output's gradient is missing, not zero: nothing is read for it."""
    x, r, w, b = (t.requires_grad_() for t in drawn(3, 9, residual=torch.float32))
    got = torch.autograd.grad(norm.dropout_add_norm_triton(x, r, w, b)[only].square().sum(), (x, r, w, b))
    want = torch.autograd.grad(oracle(x, r, w, b)[only].square().sum(), (x, r, w, b), materialize_grads=True)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.law(*IDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_norm_sees_the_stream_as_it_is_handed_on(dtype, path):
    x, r, w, b = drawn(3, 33, dtype, residual=dtype)
    y, z = norm.dropout_add_norm_triton(x, r, w, b)
    assert torch.equal(y, norm.layer_norm_triton(z, w, b))
    assert torch.equal(z, x + r)


@pytest.mark.law(*IDS)
def test_a_large_mean_cancels_nothing(path):
    """1e4 squared is 1e8 and the variance is 1: the naive E[x^2] - E[x]^2 in float32 is noise.

    What is left in ours is the mean's own rounding, half of 1e-3.
    """
    x = torch.randn(3, 65, dtype=torch.float64) + 1e4
    x32 = x.float()
    naive = x32.square().mean(-1) - x32.mean(-1).square()
    assert relative_error(naive, x.var(-1, correction=0)) > 0.1
    assert relative_error(norm.layer_norm_triton(x32), oracle(x32.double(), None, None, None)[0]) < 2e-3


@pytest.mark.law(*IDS)
def test_the_backward_is_deterministic_and_shares_rows_as_it_likes(path, monkeypatch):
    rows = 301 if path == "whole" else 13
    leaves = [t for t in drawn(rows, 16, torch.bfloat16) if t is not None]

    def gradients():
        x, w, b = (t.detach().requires_grad_() for t in leaves)
        return torch.autograd.grad(norm.layer_norm_triton(x, w, b).square().sum(), (x, w, b))

    first, again = gradients(), gradients()
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    for share in (1, 2, 1000):
        monkeypatch.setattr(norm, "programs", lambda x, tile, share=share: share)
        for a, b in zip(first, gradients(), strict=True):
            assert relative_error(a, b) < 2e-3


@pytest.mark.law(*IDS)
def test_no_rows(path):
    x = torch.randn(2, 0, 5, requires_grad=True)
    w = torch.randn(5, requires_grad=True)
    y, z = norm.dropout_add_norm_triton(x, x.detach(), w)
    (y.sum() + z.sum()).backward()
    assert (y.shape, z.shape, x.grad.shape) == ((2, 0, 5),) * 3
    assert torch.equal(w.grad, torch.zeros(5))


@pytest.mark.law(*IDS)
def test_addresses_past_two_to_the_31():
    """Row 1 starts at element 2^31; int32 arithmetic would read 4 GiB before the buffer. Only two pages are touched."""
    x = torch.empty(2**31 + 8, dtype=torch.float16).as_strided((2, 8), (2**31, 1))
    x.copy_(torch.randn(2, 8))
    torch.testing.assert_close(
        norm.rms_norm_triton(x), F.rms_norm(x.contiguous(), (8,), eps=1e-6), rtol=1e-3, atol=1e-3
    )


@pytest.mark.law(*IDS)
def test_inputs_are_left_alone(path):
    tensors = drawn(4, 17, residual=torch.float32)
    before = [t.clone() for t in tensors]
    agree(*tensors, dropout=0.5)
    assert all(torch.equal(a, b) for a, b in zip(tensors, before, strict=True))


# --- dropout


def philox(seed, row, quad):
    """Four words by Philox 4x32-10 (Salmon et al. 2011), in Python integers: counter (quad, row, 0, 0), key seed."""
    word, (c0, c1, c2, c3), (k0, k1) = 2**32, (quad, row, 0, 0), (seed % 2**32, seed >> 32)
    for _ in range(10):
        a, b = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1, c2, c3 = b // word ^ c1 ^ k0, b % word, a // word ^ c3 ^ k1, a % word
        k0, k1 = (k0 + 0x9E3779B9) % word, (k1 + 0xBB67AE85) % word
    return c0, c1, c2, c3


@pytest.mark.parity(*IDS)
def test_the_mask_is_philox():
    words = np.array([[philox(SEED.item(), row, quad) for quad in range(5)] for row in range(3)]).reshape(3, 20)
    # 31 bits, the sign folded over, to [0, 1)
    signed = words.astype(np.uint32).view(np.int32)
    uniform = np.where(signed < 0, -signed - 1, signed).astype(np.float32) * np.float32(4.6566127342e-10)
    mask = norm.dropout_mask_triton((3, 19), 0.4, SEED)
    assert torch.equal(mask, torch.from_numpy(uniform[:, :19] >= 0.4))


@pytest.mark.law(*IDS)
@pytest.mark.parametrize("rate", [0.1, 0.5, 0.9])
def test_dropout_keeps_its_share(rate):
    count = 16 * 1024
    kept = norm.dropout_mask_triton((16, 1024), rate, SEED).sum().item()
    assert abs(kept - count * (1 - rate)) < 5 * (count * rate * (1 - rate)) ** 0.5  # 5 deviations of the binomial


@pytest.mark.law(*IDS)
def test_one_mask_forward_and_backward(path):
    x = torch.ones(7, 33, requires_grad=True)
    _, z = norm.dropout_add_norm_triton(x, dropout=0.5, seed=SEED)
    z.sum().backward()
    mask = norm.dropout_mask_triton((7, 33), 0.5, SEED)
    assert torch.equal(z, mask * 2.0)
    assert torch.equal(x.grad, mask * 2.0)


@pytest.mark.law(*IDS)
def test_seeds_rows_and_columns_differ():
    mask = norm.dropout_mask_triton((32, 32), 0.5, SEED)
    other = norm.dropout_mask_triton((32, 32), 0.5, SEED + 1)
    high = norm.dropout_mask_triton((32, 32), 0.5, SEED + 2**32)
    for a in (other, high, mask.roll(1, 0), mask.roll(1, 1), mask.roll(4, 1), mask.T):
        agreeing = (a == mask).float().mean().item()
        assert abs(agreeing - 0.5) < 5 * 0.5 / 32


@pytest.mark.law(*IDS)
def test_dropout_zero_and_one(path):
    x, r = torch.randn(3, 17, requires_grad=True), torch.randn(3, 17)
    y, z = norm.dropout_add_norm_triton(x, r, dropout=0.0, seed=SEED)
    assert torch.equal(z, x + r)
    assert torch.equal(y, norm.layer_norm_triton(x + r))
    y, z = norm.dropout_add_norm_triton(x, r, dropout=1.0, seed=SEED)
    assert torch.equal(z, r)
    (y.square().sum() + z.sum()).backward()
    assert torch.equal(x.grad, torch.zeros(3, 17))


@pytest.mark.law(*IDS)
def test_the_seed_comes_from_torchs_generator():
    x = torch.randn(4, 64)
    torch.manual_seed(3)
    first, second = norm.dropout_add_norm_triton(x, dropout=0.5)[1], norm.dropout_add_norm_triton(x, dropout=0.5)[1]
    torch.manual_seed(3)
    assert torch.equal(first, norm.dropout_add_norm_triton(x, dropout=0.5)[1])
    assert not torch.equal(first, second)


# --- guards


@triton.jit
def _one_too_far(X, Y, cols, BLOCK: tl.constexpr):
    col = tl.arange(0, BLOCK)
    tl.store(Y + col, tl.load(X + col, mask=col < cols), mask=col <= cols)  # <= where < belongs


@triton.jit
def _one_too_few(X, Y, cols, BLOCK: tl.constexpr):
    col = tl.arange(0, BLOCK)
    tl.store(Y + col, tl.load(X + col, mask=col < cols), mask=col < cols - 1)


@pytest.mark.parametrize(
    ("kernel", "said"), [(_one_too_far, "written outside"), (_one_too_few, "not written everywhere")]
)
def test_the_guards_can_catch(kernel, said):
    guards = Guards()
    x = torch.randn(5)
    kernel[(1,)](x, guards.new_empty(x, (5,)), 5, BLOCK=8)
    assert said in guards.broken()[0]


# --- registration


def operators(dtype):
    x, r, w, b = (t.requires_grad_() for t in drawn(3, 9, dtype, residual=torch.float32))
    rstd, none = torch.ones(3), torch.zeros(0)
    yield norm._norm, (x, r, w, b, SEED, 1e-5, 0.5, True)
    yield norm._norm, (x, None, w, None, None, 1e-5, 0.0, False)
    z, dy, w = x.detach(), torch.randn(3, 9).to(dtype), w.detach()
    yield norm._norm_backward, (z, dy, None, w, None, None, none, rstd, 0.0, dtype, True, False)
    yield norm._norm_backward, (z.float(), dy, dy.float(), w, w, SEED, rstd, rstd, 0.5, dtype, True, True)


@pytest.mark.registration(*IDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_opcheck(dtype):
    for operator, arguments in operators(dtype):
        torch.library.opcheck(operator, arguments)


@pytest.mark.registration(*IDS)
def test_compile_sees_one_graph(unchecked):
    leaves = [t.requires_grad_() for t in drawn(3, 9, residual=torch.float32)]

    def step(x, r, w, b):
        y, z = norm.dropout_add_norm_triton(x, r, w, b, dropout=0.5)
        return (y * y).sum() + z.sum()

    results = []
    for run in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
        torch.manual_seed(1)
        total = run(*leaves)
        results.append([total, *torch.autograd.grad(total, leaves)])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.refusal(*IDS)
def test_a_second_derivative_is_refused():
    x = torch.randn(3, 9, requires_grad=True)
    (g,) = torch.autograd.grad(norm.layer_norm_triton(x).square().sum(), x, create_graph=True)
    with refuses(KernelUnavailable, "second derivative", "backend='reference'"):
        g.sum().backward()


@pytest.mark.refusal(*IDS)
def test_what_does_not_fit_is_refused(monkeypatch):
    x = torch.randn(3, 9)
    with refuses(ShapeError, "weight", "(8,)", "(9,)"):
        norm.rms_norm_triton(x, torch.ones(8))
    with refuses(ShapeError, "residual", "(9,)", "(3, 9)"):
        norm.dropout_add_norm_triton(x, torch.ones(9))
    with refuses(ShapeError, "torch.float64", "reference"):
        norm.layer_norm_triton(x.double())
    with refuses(ShapeError, "(3, 0)"):
        norm.layer_norm_triton(x[:, :0])
    with refuses(ConfigError, "eps", -1.0):
        norm.layer_norm_triton(x, eps=-1.0)
    with refuses(ConfigError, "dropout", 1.5):
        norm.dropout_add_norm_triton(x, dropout=1.5)
    monkeypatch.delenv("TRITON_INTERPRET")
    with refuses(KernelUnavailable, "cpu", "TRITON_INTERPRET"):
        norm.layer_norm_triton(x)


# --- what the compiler makes of it


@pytest.mark.registration(*IDS)
@pytest.mark.parametrize("lanes", [32, 64])
def test_every_plan_fits_a_gpu(lanes, monkeypatch):
    monkeypatch.setattr(norm, "LANES", lanes)
    for cols in [*range(1, 70), 4095, 4096, 8191, 8193, 32768, 32769, 10**6]:
        for limit, long in (
            (norm.WHOLE_ROW_FORWARD, norm.LONG_BLOCK_FORWARD),
            (norm.WHOLE_ROW_BACKWARD, norm.LONG_BLOCK_BACKWARD),
        ):
            tile = norm.plan(cols, limit, long)
            assert tile.whole == (cols <= limit)
            assert tile.block >= cols or not tile.whole
            assert tile.warps * lanes <= 1024
            assert tile.rows * tile.block <= 32 * tile.warps * lanes  # elements a thread
