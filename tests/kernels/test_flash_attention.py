"""Flash attention's kernels, in the interpreter: small tiles, so that every kind of tile occurs, both ways."""

from __future__ import annotations

import math

import pytest
import torch

from handbook_src.errors import KernelUnavailable, ShapeError
from handbook_src.functional.attention.flash_attention import flash_attention, flash_attention_varlen
from handbook_src.kernels import flash_attention as forward
from handbook_src.kernels import flash_attention_backward as backward
from handbook_src.kernels import flash_attention_tile as tiles
from handbook_src.kernels.flash_attention import flash_attention_triton
from handbook_src.testing import refuses, relative_error

# Relative l2 error against float64, outputs and gradients: weights are rounded to the dtype before each product.
ALLOWED = {torch.float32: 2e-6, torch.bfloat16: 6e-3, torch.float16: 1e-3}
DTYPES = list(ALLOWED)
EVERY = {"causal": True, "window": 20, "soft_cap": 2.0, "alibi": True, "sinks": True}
OPTIONS = [
    {}, {"causal": True}, {"causal": True, "window": 9}, {"window": 20}, {"alibi": True}, {"soft_cap": 2.0},
    {"sinks": True}, {"scale": 0.5, "causal": True}, EVERY,
]  # fmt: skip


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Tiles of 16 by 16: a few dozen positions hold inner tiles, border tiles and ragged ones."""
    set_tiles(monkeypatch, 16, 16)


def set_tiles(monkeypatch, queries, keys):
    for module in (forward, backward):
        monkeypatch.setattr(module, "plan", lambda *_: tiles.Tile(queries, keys, 4, 1))


def drawn(t, s, *, b=1, h=2, g=1, e=16, c=16, dtype=torch.float32):
    return [torch.randn(shape).to(dtype) for shape in ((b, t, h, e), (b, s, g, e), (b, s, g, c))]


def resolved(options, h=2):
    made = {"alibi": torch.tensor([0.5, 0.06])[:h], "sinks": torch.randn(h)}
    return {k: made.get(k, v) for k, v in options.items()}


def agree(leaves, options, packed=None):
    """Compare output, log-sum-exp and every gradient with the formula in float64."""
    sinks = options.get("sinks")
    leaves = [x.detach().requires_grad_() for x in leaves]
    wide = [x.detach().double().requires_grad_() for x in leaves]
    extra = {"window": None, **{k: v for k, v in options.items() if k != "sinks"}}
    if sinks is not None:
        leaves.append(sinks.detach().requires_grad_())
        wide.append(sinks.detach().double().requires_grad_())
    function = flash_attention if packed is None else flash_attention_varlen
    edges = () if packed is None else packed
    results = []
    for x, backend in ((leaves, "triton"), (wide, "reference")):
        learned = {"sinks": x[3]} if sinks is not None else {}
        results.append(function(*x[:3], *edges, **extra, **learned, return_lse=True, backend=backend))
    (out, lse), (want, want_lse) = results
    assert out.dtype == leaves[0].dtype
    seeing = want_lse.isfinite()  # who sees no key has -inf
    assert torch.equal(lse == -math.inf, ~seeing)
    down = [torch.randn(want.shape).double(), torch.randn(want_lse.shape).double() * seeing]
    got = torch.autograd.grad((out, lse), leaves, [down[0].to(out.dtype), down[1].float()])
    wants = torch.autograd.grad((want, want_lse), wide, down)
    names = ("out", "lse", "dq", "dk", "dv", "dsinks")
    pairs = (out, want), (lse[seeing], want_lse[seeing]), *zip(got, wants, strict=True)
    for name, (a, b) in zip(names, pairs, strict=False):
        if b.abs().max() < 1e-12:  # one key: the weight is 1 whatever the score
            assert a.abs().max() < 1e-6, name
        else:
            error = relative_error(a, b)
            cancels = 3 if name == "dsinks" else 1  # a sum over all queries, of either sign
            assert error <= cancels * ALLOWED[leaves[0].dtype], f"{name}: relative error {error:.1e}"


@pytest.mark.parity("flash-attention")
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_every_option(options, guards):
    agree(drawn(20, 37), resolved(options))


@pytest.mark.parity("flash-attention")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("options", [{"causal": True}, EVERY], ids=str)
def test_half_precision(options, dtype, guards):
    options = resolved(options)
    if "sinks" in options:
        options["sinks"] = options["sinks"].to(dtype)  # as a model of that dtype holds them
    agree(drawn(20, 37, dtype=dtype), options)


@pytest.mark.parity("flash-attention")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("options", [{"causal": True}, {**EVERY, "causal": False}], ids=str)
def test_the_tiles_that_are_launched(options, dtype, monkeypatch, guards):
    monkeypatch.undo()
    agree(drawn(130, 140, dtype=dtype), resolved(options))


@pytest.mark.parity("flash-attention")
@pytest.mark.parametrize(("t", "s"), [(1, 2), (1, 33), (15, 16), (16, 17), (17, 32)])
def test_ragged_lengths(t, s, guards):
    agree(drawn(t, s, h=1), {"causal": True})
    agree(drawn(t, s, h=1), {"window": 3})


@pytest.mark.parity("flash-attention")
def test_one_query_and_one_key(guards):
    """The weight is 1, so the score has no gradient; what rounding leaves of it is small beside its two terms."""
    q, k, v = (x.requires_grad_() for x in drawn(1, 1, h=1))
    out, lse = flash_attention(q, k, v, causal=True, return_lse=True, backend="triton")
    torch.testing.assert_close((out, lse), (v, (q * k).sum(-1) / 4), rtol=1e-6, atol=1e-6)
    dq, dk, dv = torch.autograd.grad(out.square().sum() + lse.sum(), (q, k, v))
    torch.testing.assert_close((dq, dk, dv), (k / 4, q / 4, 2 * v), rtol=1e-4, atol=1e-5)


@pytest.mark.parity("flash-attention")
def test_more_queries_than_keys(guards):
    agree(drawn(33, 5, h=1), {})


@pytest.mark.parity("flash-attention")
@pytest.mark.parametrize(("e", "c"), [(1, 1), (5, 20), (17, 16), (256, 3), (130, 255)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_any_width_of_a_head(e, c, dtype, guards):
    agree(drawn(3, 17, h=1, e=e, c=c, dtype=dtype), {"causal": True})


@pytest.mark.parity("flash-attention")
@pytest.mark.parametrize(("h", "g"), [(2, 2), (4, 2), (3, 1)])
def test_shared_key_heads_and_several_samples(h, g, guards):
    agree(drawn(2, 5, b=2, h=h, g=g), {"causal": True, "sinks": torch.randn(h)})


@pytest.mark.parity("flash-attention")
@pytest.mark.parametrize(("edges", "dtype"), [(torch.int32, torch.float32), (torch.int64, torch.bfloat16)], ids=str)
def test_packed_sequences(edges, dtype, guards):
    """Lengths of one, none and more than a tile; the queries are the last positions of each."""
    q, k, v = (x[0] for x in drawn(23, 40, dtype=dtype))
    cu_q, cu_k = torch.tensor([0, 1, 1, 4, 23], dtype=edges), torch.tensor([0, 2, 3, 6, 40], dtype=edges)
    agree((q, k, v), resolved({"causal": True, "window": 9, "sinks": True}), (cu_q, cu_k))
    agree((q, k, v), resolved({**EVERY, "causal": False}), (cu_q, cu_k))


@pytest.mark.parity("flash-attention")
def test_packed_sequences_without_keys_or_queries_or_both(guards):
    q, k, v = (x[0] for x in drawn(8, 9, h=1))
    cu_q, cu_k = torch.tensor([0, 0, 3, 3, 3, 8]), torch.tensor([0, 2, 2, 2, 5, 9])
    for options in ({}, {"soft_cap": 2.0, "sinks": True}):
        agree((q, k, v), resolved(options, h=1), (cu_q, cu_k))


@pytest.mark.law("flash-attention")
def test_nan_stays_in_its_own_sequence():
    q, k, v = (x[0] for x in drawn(20, 20))
    cu, x = torch.tensor([0, 7, 12, 20]), [y.clone() for y in (q, k, v)]
    for y in x:
        y[7:12] = math.nan
    leaves = [y.requires_grad_() for y in x]
    out = flash_attention_varlen(*leaves, cu, causal=True, backend="triton")
    others = torch.tensor([*range(7), *range(12, 20)])
    want = [y[others].clone().requires_grad_() for y in (q, k, v)]
    alone = flash_attention_varlen(*want, torch.tensor([0, 7, 15]), causal=True, backend="reference")
    torch.testing.assert_close(out[others], alone, rtol=1e-5, atol=1e-6)
    assert out[7:12].isnan().all()
    got = torch.autograd.grad(out.square().sum(), leaves)
    wants = torch.autograd.grad(alone.square().sum(), want)
    torch.testing.assert_close([g[others] for g in got], list(wants), rtol=1e-4, atol=1e-5)


@pytest.mark.law("flash-attention")
@pytest.mark.parametrize("options", [{"causal": True}, EVERY], ids=str)
def test_the_tiles_do_not_matter(options, monkeypatch):
    x, extra = drawn(20, 37), resolved(options)
    results = []
    for queries, keys in ((32, 16), (16, 64)):
        set_tiles(monkeypatch, queries, keys)
        leaves = [y.clone().requires_grad_() for y in x]
        out = flash_attention(*leaves, **extra, backend="triton")
        results.append([out, *torch.autograd.grad(out.square().sum(), leaves)])
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-5)


@pytest.mark.law("flash-attention")
def test_the_plan():
    """What spilled on a family of GPUs has a tile of its own there."""
    half, full = torch.bfloat16, torch.float32
    assert tiles.plan("dkv", 128, half, "hopper") == (32, 64, 8, 2)
    assert tiles.plan("dkv", 128, half, "blackwell") == (32, 64, 8, 1)
    assert tiles.plan("dq", 64, full, "hopper") == (64, 32, 4, 1)
    assert tiles.plan("dq", 16, full, "ampere") == tiles.plan("dq", 64, full, "blackwell") == (32, 32, 8, 1)
    assert tiles.plan("forward", 128, half, "hopper").stages == 3
    assert tiles.plan("forward", 129, half, "amd") == (64, 32, 4, 1)


@pytest.mark.law("flash-attention")
def test_samples_do_not_meet_and_the_bits_are_the_same_again():
    x = drawn(17, 17, b=3, h=1)
    out = flash_attention(*x, causal=True, backend="triton")
    order = torch.tensor([2, 0, 1])
    moved = flash_attention(*(y[order] for y in x), causal=True, backend="triton", deterministic=True)
    assert torch.equal(moved, out[order])


@pytest.mark.law("flash-attention")
def test_gradients_are_the_same_bits_with_and_without_deterministic():
    x, extra, results = [y.requires_grad_() for y in drawn(20, 37)], resolved(EVERY), []
    for deterministic in (False, True):
        out = flash_attention(*x, **extra, deterministic=deterministic, backend="triton")
        results.append(torch.autograd.grad(out.square().sum(), x))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.law("flash-attention")
@pytest.mark.parametrize(
    ("dtype", "where", "bad"),
    [
        (torch.float32, 1, math.nan), (torch.bfloat16, 1, math.nan), (torch.bfloat16, 2, math.nan),
        (torch.float16, 2, math.inf),
    ],
)  # fmt: skip
@pytest.mark.parametrize("options", [{"causal": True}, {"causal": True, "window": 3}], ids=str)
@pytest.mark.filterwarnings("ignore:invalid value")  # numpy's, of infinity times zero
def test_nan_reaches_only_who_sees_it(options, dtype, where, bad):
    """Key 12 is hidden from the first queries of its own tile, and with a window from the last ones."""
    leaves = drawn(20, 20, h=1, dtype=dtype)
    clean = [x.clone().requires_grad_() for x in leaves]
    leaves[where][0, 12, 0, 1] = bad
    leaves = [x.requires_grad_() for x in leaves]
    out, want = (flash_attention(*x, **options, backend="triton") for x in (leaves, clean))
    position = torch.arange(20)
    seen = (position >= 12) & ((position < 15) if "window" in options else True)
    assert torch.equal((~out[0, :, 0].isfinite()).any(-1), seen)
    assert torch.equal(out[0, ~seen], want[0, ~seen])
    fine = ~seen[:, None, None]
    grads = torch.autograd.grad(out.where(fine, 0.0).sum(), leaves)
    wants = torch.autograd.grad(want.where(fine, 0.0).sum(), clean)
    assert torch.equal(grads[0][0, ~seen], wants[0][0, ~seen])
    others = position != 12
    torch.testing.assert_close([g[0, others] for g in grads[1:]], [g[0, others] for g in wants[1:]])


@pytest.mark.law("flash-attention")
def test_padding_after_the_last_sequence_is_not_looked_at():
    """Positions past the last edge hold NaN; they get zeros and give no gradient."""
    q, k, v = (x[0] for x in drawn(20, 20))
    cu = torch.tensor([0, 3, 11], dtype=torch.int32)
    x = [y.clone().requires_grad_() for y in (q, k, v)]
    dirty = [torch.where(torch.arange(20)[:, None, None] < 11, y, math.nan) for y in x]
    out, lse = flash_attention_triton(*(y[None] for y in dirty), cu_q=cu, cu_k=cu, times=8, keys=8, causal=True)
    assert out[0, 11:].abs().max() == 0
    assert (lse[0, :, 11:] == -math.inf).all()
    torch.testing.assert_close(out[0, :11], flash_attention_varlen(q[:11], k[:11], v[:11], cu, causal=True))
    for grad in torch.autograd.grad(out.square().sum(), x):
        assert grad.isfinite().all()
        assert grad[11:].abs().max() == 0


@pytest.mark.law("flash-attention")
def test_no_keys_no_queries_no_samples():
    q, k, v = (x.requires_grad_() for x in drawn(5, 7))
    out, lse = flash_attention(q, k[:, :0], v[:, :0], return_lse=True, backend="triton")
    assert out.abs().max() == 0
    assert (lse == -math.inf).all()
    assert torch.autograd.grad(out.sum(), q)[0].abs().max() == 0
    for q0, k0, v0 in ((q[:, :0], k, v), (q[:0], k[:0], v[:0])):
        out = flash_attention(q0, k0, v0, causal=True, backend="triton")
        assert out.shape == (*q0.shape[:3], 16)
        assert all(g.abs().sum() == 0 for g in torch.autograd.grad(out.sum(), (q, k, v)))
    sinks = torch.randn(2)
    out, lse = flash_attention(q, k[:, :0], v[:, :0], sinks=sinks, return_lse=True, backend="triton")
    torch.testing.assert_close(lse, sinks.expand(1, 5, 2))


@pytest.mark.law("flash-attention")
def test_a_row_that_sees_no_key_is_zero():
    """Only packed sequences on a GPU get here, where lengths are not looked at."""
    q, k, v = (x.requires_grad_() for x in drawn(20, 5, h=1))
    cu_q, cu_k = torch.tensor([0, 20]), torch.tensor([0, 5])
    out, lse = flash_attention_triton(q, k, v, cu_q=cu_q, cu_k=cu_k, times=20, keys=5, causal=True)
    assert out[0, :15].abs().max() == 0
    assert (lse[0, :, :15] == -math.inf).all()
    torch.testing.assert_close(out[:, 15:], flash_attention(q[:, 15:], k, v, causal=True))
    dq, dk, dv = torch.autograd.grad(out.square().sum(), (q, k, v))
    assert all(g.isfinite().all() for g in (dq, dk, dv))
    assert dq[0, :15].abs().max() == 0


@pytest.mark.law("flash-attention")
def test_large_scores_and_any_layout():
    q, k, v = torch.randn(1, 18, 3, 1, 16).unbind(2)
    agree([10 * q, k, v], {"causal": True})
    wide = torch.randn(1, 1, 18, 32)
    agree([wide.transpose(1, 2)[..., ::2], wide.transpose(1, 2)[..., 16:], v.expand(1, 18, 1, 16)], {"window": 4})
    out = flash_attention(q.requires_grad_(), k, v, backend="triton")
    (got,) = torch.autograd.grad(out.sum(), q)  # an expanded gradient: every stride is 0
    (want,) = torch.autograd.grad(flash_attention(q, k, v, backend="reference").sum(), q)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-6)


@pytest.mark.law("flash-attention")
def test_addresses_past_two_to_the_31():
    """Position 1 starts at element 2^31; only two pages of it are touched."""
    k = torch.empty(2**31 + 16, dtype=torch.float16).as_strided((1, 2, 1, 16), (0, 2**31, 16, 1))
    k.copy_(torch.randn(1, 2, 1, 16))
    want = flash_attention(k.float(), k.float(), k.float(), causal=True)
    got = flash_attention(k, k, k, causal=True, backend="triton")
    torch.testing.assert_close(got.float(), want, rtol=2e-3, atol=2e-3)


# --- registration


@pytest.mark.registration("flash-attention")
def test_opcheck():
    q, k, v = (x.requires_grad_() for x in drawn(3, 5, h=1))
    settings = (3, 5, True, 2, 0.0, 0.25)
    torch.library.opcheck(forward._flash, (q, k, v, None, None, None, torch.zeros(1, requires_grad=True), *settings))
    x = [y.detach() for y in (q, k, v)]
    out, lse = forward._flash(*x, None, None, None, None, *settings)
    down = torch.ones(16).expand(1, 3, 1, 16)
    torch.library.opcheck(backward.flash_backward, (*x, out, lse, down, None, None, None, None, *settings))


@pytest.mark.registration("flash-attention")
def test_compile_sees_one_graph(unchecked):
    def step(q, k, v):
        return flash_attention(q, k, v, causal=True, backend="triton").square().sum()

    x = [y.requires_grad_() for y in drawn(3, 5, h=1)]
    results = []
    for run in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
        total = run(*x)
        results.append([total, *torch.autograd.grad(total, x)])
    torch.testing.assert_close(results[1], results[0])


@pytest.mark.refusal("flash-attention")
def test_what_the_kernel_cannot_do_is_refused(monkeypatch):
    q, k, v = (x.requires_grad_() for x in drawn(2, 3, h=1))
    (g,) = torch.autograd.grad(flash_attention(q, k, v, backend="triton").sum(), q, create_graph=True)
    with refuses(KernelUnavailable, "second derivative", "backend='reference'"):
        g.square().sum().backward()
    with refuses(KernelUnavailable, "slopes", "reference"):
        flash_attention_triton(q, k, v, alibi=torch.ones(1, requires_grad=True))
    with refuses(ShapeError, "torch.float64", "reference"):
        flash_attention_triton(q.double(), k.double(), v.double())
    with refuses(ShapeError, 257, "1 to 256 features"):
        flash_attention_triton(*drawn(2, 3, h=1, e=257))
    with refuses(ShapeError, "meta", "cpu"):
        flash_attention_triton(q, k.to("meta"), v)
    monkeypatch.delenv("TRITON_INTERPRET")
    with refuses(KernelUnavailable, "cpu", "TRITON_INTERPRET"):
        flash_attention_triton(q, k, v)
