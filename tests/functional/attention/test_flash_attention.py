"""Flash attention's public functions without a kernel: every option, packed sequences, what is refused."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
import torch.nn.functional as F

from handbook_src.errors import ConfigError, KernelUnavailable, ShapeError
from handbook_src.functional.attention.flash_attention import BAND, bands, flash_attention, flash_attention_varlen
from handbook_src.functional.attention.mask import causal, full, window
from handbook_src.testing import assert_parity, refuses

OPTIONS = [
    {}, {"causal": True}, {"window": 3}, {"causal": True, "window": 4}, {"soft_cap": 2.0}, {"alibi": True},
    {"sinks": True}, {"scale": 0.7}, {"causal": True, "window": 3, "soft_cap": 1.5, "alibi": True, "sinks": True},
]  # fmt: skip


def drawn(b=2, t=5, s=7, h=4, g=2, e=6, c=6, dtype=torch.float64):
    return [torch.randn(shape).to(dtype) for shape in ((b, t, h, e), (b, s, g, e), (b, s, g, c))]


def resolved(options, h=4, dtype=torch.float64):
    """The options with tensors in place of True."""
    made = {"alibi": torch.rand(h).to(dtype), "sinks": torch.randn(h).to(dtype)}
    return {k: made.get(k, v) for k, v in options.items()}


def by_hand(q, k, v, causal=False, window=None, soft_cap=None, alibi=None, sinks=None, scale=None):
    """Row by row, key by key: no mask, no matrix; returns the output and the log-sum-exp."""
    out, lse = torch.zeros(*q.shape[:3], v.shape[3], dtype=q.dtype), torch.zeros(q.shape[:3], dtype=q.dtype)
    group, offset = q.shape[2] // k.shape[2], k.shape[1] - q.shape[1]
    for b, i, h in itertools.product(*map(range, q.shape[:3])):
        terms, values = [], []
        for j in range(k.shape[1]):
            distance = i + offset - j
            if (causal and distance < 0) or (window is not None and abs(distance) >= window):
                continue
            z = (q[b, i, h] @ k[b, j, h // group]) * (q.shape[3] ** -0.5 if scale is None else scale)
            z = z if soft_cap is None else soft_cap * torch.tanh(z / soft_cap)
            terms.append(z if alibi is None else z - alibi[h] * abs(distance))
            values.append(v[b, j, h // group])
        if not terms and sinks is None:
            lse[b, i, h] = -math.inf
            continue
        both = torch.stack([*terms, sinks[h]] if sinks is not None else terms)
        lse[b, i, h] = both.logsumexp(0)
        if values:
            out[b, i, h] = both.softmax(0)[: len(values)] @ torch.stack(values)
    return out, lse


@pytest.mark.parity("flash-attention")
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_every_option_by_hand(options):
    leaves, extra = drawn(), resolved(options)
    learned = [k for k in ("alibi", "sinks") if k in extra]

    def run(function, **more):
        fixed = {k: v for k, v in extra.items() if k not in learned}
        return lambda q, k, v, *a: function(q, k, v, **fixed, **dict(zip(learned, a, strict=True)), **more)

    inputs = (*leaves, *(extra[k] for k in learned))
    assert_parity(run(flash_attention, return_lse=True, backend="reference"), run(by_hand), inputs)
    assert_parity(run(flash_attention), lambda *a: run(by_hand)(*a)[0], inputs)


@pytest.mark.parity("flash-attention")
@pytest.mark.parametrize(("t", "s", "h", "g", "e", "c"), [(1, 1, 1, 1, 1, 1), (1, 9, 4, 1, 3, 5), (4, 4, 3, 3, 16, 2)])
@pytest.mark.parametrize("backend", ["torch", "reference", "auto"])
def test_sizes(t, s, h, g, e, c, backend):
    for options in ({"causal": True}, {"window": 2}, {}):
        assert_parity(
            lambda q, k, v: flash_attention(q, k, v, backend=backend, **options),  # noqa: B023
            lambda q, k, v: by_hand(q, k, v, **options)[0],  # noqa: B023
            drawn(2, t, s, h, g, e, c),
        )


@pytest.mark.outside("flash-attention")
@pytest.mark.parametrize("causal", [False, True])
def test_is_torchs(causal):
    q, k, v = drawn(t=7)
    assert_parity(
        lambda q, k, v: flash_attention(q, k, v, causal=causal, backend="reference"),
        lambda q, k, v: F.scaled_dot_product_attention(
            *(x.transpose(1, 2) for x in (q, k, v)), is_causal=causal, enable_gqa=True
        ).transpose(1, 2),
        [q, k, v],
    )


@pytest.mark.outside("flash-attention")
def test_sinks_are_those_of_gpt_oss():
    from transformers.models.gpt_oss.modeling_gpt_oss import eager_attention_forward

    q, k, v = drawn(t=7)
    module = torch.nn.Module()
    module.sinks, module.num_key_value_groups = torch.randn(4, dtype=torch.float64), 2
    module.eval()
    mask = torch.full((7, 7), -math.inf, dtype=torch.float64).triu(1)[None, None]
    want, _ = eager_attention_forward(module, *(x.transpose(1, 2) for x in (q, k, v)), mask, 6**-0.5)
    torch.testing.assert_close(flash_attention(q, k, v, causal=True, sinks=module.sinks), want)


@pytest.mark.outside("flash-attention")
def test_the_cap_is_gemma_2s():
    from transformers.models.gemma2.modeling_gemma2 import eager_attention_forward

    q, k, v = drawn(t=7)
    module = torch.nn.Module().eval()
    module.num_key_value_groups, module.head_dim = 2, 6
    mask = torch.full((7, 7), -math.inf, dtype=torch.float64).triu(1)[None, None]
    theirs = [x.transpose(1, 2) for x in (q, k, v)]
    want, _ = eager_attention_forward(module, *theirs, mask, scaling=0.3, softcap=2.0)
    # theirs is float32 in the softmax
    torch.testing.assert_close(
        flash_attention(q, k, v, causal=True, soft_cap=2.0, scale=0.3), want, rtol=1e-5, atol=1e-5
    )


@pytest.mark.law("flash-attention")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_half_precision_is_rounded_once(options, dtype):
    q, k, v = (x.to(dtype) for x in drawn())
    extra = resolved(options, dtype=torch.float32)
    wide = {k: x.double() if isinstance(x, torch.Tensor) else x for k, x in extra.items()}
    want, _ = by_hand(q.double(), k.double(), v.double(), **wide)
    got = flash_attention(q, k, v, **extra, backend="reference")
    assert got.dtype == dtype
    torch.testing.assert_close(got.double(), want, rtol=2**-8 if dtype == torch.bfloat16 else 2**-11, atol=1e-6)
    rough = flash_attention(q, k, v, **extra)
    torch.testing.assert_close(rough.double(), want, rtol=0.03, atol=0.03)


@pytest.mark.law("flash-attention")
def test_two_halves_of_the_keys_merge_by_their_lse():
    q, k, v = drawn()
    whole, total = flash_attention(q, k, v, return_lse=True)
    parts = [flash_attention(q, k[:, i], v[:, i], return_lse=True) for i in (slice(0, 3), slice(3, None))]
    merged = sum(out * (lse - total).exp()[..., None] for out, lse in parts)
    torch.testing.assert_close(merged, whole)


@pytest.mark.law("flash-attention")
@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("options", [{"causal": True}, {"causal": True, "window": 2}, {"window": 2}], ids=str)
def test_nan_reaches_only_who_sees_it(options, bad, backend):
    for where in (1, 2):
        leaves = drawn(dtype=torch.float32)
        clean = [x.clone().requires_grad_() for x in leaves]
        leaves[where][0, 5, 1] = bad
        leaves = [x.requires_grad_() for x in leaves]
        out, want = (flash_attention(*x, **options, backend=backend) for x in (leaves, clean))
        seen = torch.tensor(
            [False, *([False, False, True, True] if "causal" in options else [False, True, True, True])]
        )
        assert torch.equal(out[0, :, 2:].isnan().all(-1).any(-1), seen)
        fine = ~out.isnan().any(-1, keepdim=True)
        torch.testing.assert_close(out[fine.expand_as(out)], want[fine.expand_as(out)])
        grads = torch.autograd.grad(out.where(fine, 0.0).sum(), leaves)
        wants = torch.autograd.grad(want.where(fine, 0.0).sum(), clean)
        torch.testing.assert_close(grads, wants)


@pytest.mark.law("flash-attention")
def test_nothing_to_see_or_to_ask():
    q, k, v = drawn()
    out, lse = flash_attention(q, k[:, :0], v[:, :0], return_lse=True)
    assert out.abs().max() == 0
    assert (lse == -math.inf).all()
    sinks = torch.randn(4, dtype=torch.float64)
    out, lse = flash_attention(q, k[:, :0], v[:, :0], sinks=sinks, return_lse=True)
    assert out.abs().max() == 0
    torch.testing.assert_close(lse, sinks.expand(2, 5, 4))
    for backend in ("torch", "reference"):
        assert flash_attention(q[:, :0], k, v, causal=True, backend=backend).shape == (2, 0, 4, 6)
        assert flash_attention(q[:0], k[:0], v[:0], causal=True, backend=backend).shape == (0, 5, 4, 6)


# --- packed sequences


@pytest.mark.parity("flash-attention")
@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_packed_sequences_are_those_sequences(options, backend):
    q, k, v = (x[0] for x in drawn(1, 8, 12))
    cu_q, cu_k = torch.tensor([0, 3, 3, 4, 8]), torch.tensor([0, 4, 6, 7, 12])
    extra = resolved(options)

    def one_by_one(q, k, v):
        rows = [
            by_hand(q[None, a:b], k[None, c:d], v[None, c:d], **extra)
            for (a, b), (c, d) in zip(itertools.pairwise(cu_q), itertools.pairwise(cu_k), strict=True)
        ]
        return torch.cat([out[0] for out, _ in rows]), torch.cat([lse[0] for _, lse in rows])

    packed = {"backend": backend, **extra}
    assert_parity(lambda *x: flash_attention_varlen(*x, cu_q, cu_k, **packed), lambda *x: one_by_one(*x)[0], [q, k, v])
    got = flash_attention_varlen(q, k, v, cu_q, cu_k, return_lse=True, **packed)
    torch.testing.assert_close(got, one_by_one(q, k, v))


@pytest.mark.law("flash-attention")
def test_packed_nothing():
    q, k, v = (x[0, :0] for x in drawn())
    for cu in (torch.tensor([0]), torch.tensor([0, 0, 0])):
        for lse in (False, True):
            out = flash_attention_varlen(q, k, v, cu, return_lse=lse)
            assert (out[0] if lse else out).shape == (0, 4, 6)
    q, k, v = (x[0] for x in drawn())
    out = flash_attention_varlen(q, k[:0], v[:0], torch.tensor([0, 5]), torch.tensor([0, 0]))
    assert torch.equal(out, torch.zeros_like(out))


# --- refusals


@pytest.mark.refusal("flash-attention")
def test_settings_that_cannot_work():
    x = drawn()
    for wrong in (0, -1, 2.0, True, math.nan):
        with refuses(ConfigError, "window", repr(wrong)):
            flash_attention(*x, window=wrong)
    for name in ("soft_cap", "scale"):
        for value in (0.0, -1.0, math.nan, math.inf, True):
            with refuses(ConfigError, name, repr(value)):
                flash_attention(*x, **{name: value})
    with refuses(ConfigError, "'fast'"):
        flash_attention(*x, backend="fast")


@pytest.mark.refusal("flash-attention")
def test_tensors_that_do_not_fit():
    q, k, v = drawn()
    with refuses(ShapeError, "4 query, 3 key"):
        flash_attention(q, torch.randn(2, 7, 3, 6).double(), torch.randn(2, 7, 3, 6).double())
    for options in ({"causal": True}, {"window": 3}, {"alibi": torch.ones(4)}):
        with refuses(ShapeError, "t=7 queries", "s=5"):
            flash_attention(torch.randn(2, 7, 4, 6), torch.randn(2, 5, 2, 6), torch.randn(2, 5, 2, 6), **options)
    with refuses(ShapeError, "torch.int64"):
        flash_attention(*(x.long() for x in (q, k, v)))
    with refuses(ShapeError, "torch.float32", "torch.float64"):
        flash_attention(q, k.float(), v)
    with refuses(ShapeError, "meta", "cpu"):
        flash_attention(q, k, v.to("meta"))
    for name in ("alibi", "sinks"):
        for wrong in (torch.ones(2), torch.ones(4, 1), torch.ones(4, dtype=torch.long)):
            with refuses(ShapeError, name, tuple(wrong.shape), "(4,)"):
                flash_attention(q, k, v, **{name: wrong})
    with refuses(ShapeError, "(2, 5, 4)"):
        flash_attention(q[..., 0], k, v)


@pytest.mark.refusal("flash-attention")
def test_backends_that_cannot_run(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    x = drawn(dtype=torch.float32)
    with refuses(KernelUnavailable, "'triton'", "CUDA"):
        flash_attention(*x, backend="triton")
    with refuses(KernelUnavailable, "'triton'", "float16, bfloat16 or float32"):
        flash_attention(*drawn(), backend="triton")
    with refuses(KernelUnavailable, "'triton'", "256"):
        flash_attention(*drawn(e=257, c=257, dtype=torch.float32), backend="triton")
    with refuses(KernelUnavailable, "'triton'", "gradient"):
        flash_attention(*x, alibi=torch.ones(4, requires_grad=True), backend="triton")
    for options in ({"soft_cap": 1.0}, {"sinks": torch.ones(4)}, {"return_lse": True}):
        with refuses(KernelUnavailable, "'torch'", "soft_cap"):
            flash_attention(*x, **options, backend="torch")
    with refuses(KernelUnavailable, "'torch'", "float32 beside alibi"):
        flash_attention(*(y.bfloat16() for y in x), alibi=torch.ones(4), backend="torch")


@pytest.mark.refusal("flash-attention")
def test_edges_that_do_not_fit():
    q, k, v = (x[0] for x in drawn(s=5))
    for wrong in ([0, 3, 4], [1, 5], [0, 4, 3, 5], [0, 6]):
        with refuses(ShapeError, "cu_seqlens_q", wrong, "from 0 to 5"):
            flash_attention_varlen(q, k, v, torch.tensor(wrong))
    with refuses(ShapeError, "cu_seqlens_k", "[0, 4]"):
        flash_attention_varlen(q, k, v, torch.tensor([0, 5]), torch.tensor([0, 4]))
    with refuses(ShapeError, "cu_seqlens_k", "3 edges", "2"):
        flash_attention_varlen(q, k, v, torch.tensor([0, 5]), torch.tensor([0, 4, 5]))
    for wrong in (torch.tensor([0.0, 5.0]), torch.tensor([[0, 5]]), torch.zeros(0, dtype=torch.long)):
        with refuses(ShapeError, "cu_seqlens_q", tuple(wrong.shape)):
            flash_attention_varlen(q, k, v, wrong)
    with refuses(ShapeError, "meta"):
        flash_attention_varlen(q, k, v, torch.tensor([0, 5], device="meta"))
    with refuses(ShapeError, "4 queries for 3 keys in sequence 1"):
        flash_attention_varlen(q, k, v, torch.tensor([0, 1, 5]), torch.tensor([0, 2, 5]), causal=True)
    with refuses(ShapeError, "(1, 5, 4, 6)", "three axes"):
        flash_attention_varlen(q[None], k[None], v[None], torch.tensor([0, 5]))
    with refuses(ConfigError, "window", 0):
        flash_attention_varlen(q, k, v, torch.tensor([0, 5]), window=0)


@pytest.mark.registration("flash-attention")
@pytest.mark.parametrize("options", [{"causal": True}, {"causal": True, "soft_cap": 3.0, "sinks": True}], ids=str)
def test_compiles_as_one_graph(options, unchecked):
    x, extra = [y.requires_grad_() for y in drawn(dtype=torch.float32)], resolved(options, dtype=torch.float32)

    def step(q, k, v):
        return flash_attention(q, k, v, **extra).square().sum()

    results = []
    for run in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
        total = run(*x)
        results.append([total, *torch.autograd.grad(total, x)])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.law("flash-attention")
def test_inputs_stay_and_strides_do_not_matter():
    packed = torch.randn(2, 5, 3, 4, 6)
    before = packed.clone()
    q, k, v = packed.unbind(2)
    for options in OPTIONS:
        extra = resolved(options, dtype=torch.float32)
        got = flash_attention(q, k, v, **extra)
        torch.testing.assert_close(got, flash_attention(q.contiguous(), k.contiguous(), v.contiguous(), **extra))
        torch.testing.assert_close(got, flash_attention(q, k, v, **extra, deterministic=True))
    assert torch.equal(packed, before)


@pytest.mark.law("flash-attention")
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("reach", [None, 1, 50, 200])
@pytest.mark.parametrize("past", [0, 70])
def test_bands_of_a_processor_hold_the_keys_that_are_seen_and_few_others(
    is_causal: bool, reach: int | None, past: int
) -> None:
    t, s = 2 * BAND + 9, 2 * BAND + 9 + past
    rule = (causal if is_causal else full) & (full if reach is None else window(reach))
    seen = rule.dense(t, s)
    found = bands(t, s, is_causal, reach, torch.device("cpu"))
    assert [rows.start for rows, _ in found] == [0, BAND, 2 * BAND]
    assert found[-1][0].stop == t
    for rows, cols in found:
        keys = seen[rows].any(0).nonzero().flatten()
        assert (cols.start, cols.stop) == (int(keys.min()), int(keys.max()) + 1)
