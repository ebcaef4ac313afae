"""LSH attention against loops over the paper's sets, against two published codes, and its limit: full attention."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from handbook_src.errors import ConfigError, ShapeError
from handbook_src.functional.attention.attention import scaled_dot_product_attention
from handbook_src.functional.attention.lsh_attention import (
    lsh_attention,
    lsh_buckets,
    lsh_factors,
    lsh_meetings,
    lsh_rotations,
    shared_qk_attention,
)
from handbook_src.functional.attention.mask import Mask, causal, documents, full, padding, per_head, sinks, window
from handbook_src.testing import assert_causal, assert_parity, assert_permutation_equivariant, refuses

LSH = "reformer"
BOTH = pytest.mark.parametrize("backend", ["torch", "reference", "auto"])
DOUBLE = torch.float64


def inputs(b: int = 2, t: int = 13, h: int = 2, e: int = 4, c: int = 3, dtype: torch.dtype = DOUBLE) -> list[Tensor]:
    return [torch.randn(b, t, h, e, dtype=dtype), torch.randn(b, t, h, c, dtype=dtype)]


def tables(rounds: int = 2, h: int = 2, e: int = 4, buckets: int | Sequence[int] = 4, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return lsh_rotations(rounds, h, e, buckets, generator=generator, dtype=DOUBLE)


def by_hand(
    qk: Tensor, v: Tensor, rotations: list[Tensor], rule: Mask = full, chunk: int = 64, look_back: int = 1,
    across: bool = False, once: bool = True, scale: float | None = None,
) -> Tensor:  # fmt: skip
    """Section 2 and appendix A, set by set."""
    b, t, h, e = qk.shape
    scale = 1 / math.sqrt(e) if scale is None else scale
    seen = rule.dense(t)
    rows = []
    for n in range(b):
        for i_head in range(h):
            x = qk[n, :, i_head]
            keys = x / x.norm(dim=-1, keepdim=True)
            met = torch.zeros(t, t)
            for r in range(rotations[0].shape[0]):
                buckets = []
                for i in range(t):
                    code, base = 0, 1
                    for table in rotations:
                        y = x[i] @ table[r, i_head]
                        code, base = code + base * int(torch.cat([y, -y]).argmax()), base * 2 * len(y)
                    buckets.append(code)
                order = sorted(range(t), key=lambda i: (buckets[i], i))
                place = {i: s for s, i in enumerate(order)}
                for i in range(t):
                    for j in range(t):
                        near = 0 <= place[i] // chunk - place[j] // chunk <= look_back
                        met[i, j] += near and (across or buckets[i] == buckets[j])
            for i in range(t):
                allowed = seen if seen.ndim == 2 else seen[n % len(seen), i_head % seen.shape[1]]
                keep = [j for j in range(t) if met[i, j] and allowed[i, j] and j != i]
                if not keep:
                    rows.append(v[n, i, i_head] if met[i, i] and allowed[i, i] else torch.zeros_like(v[n, i, i_head]))
                    continue
                often = torch.tensor([1.0 if once else met[i, j] for j in keep], dtype=qk.dtype)
                weights = (torch.stack([x[i] @ keys[j] * scale for j in keep]).exp() * often)[:, None]
                rows.append((weights * v[n, keep, i_head]).sum(0) / weights.sum())
    return torch.stack(rows).view(b, h, t, -1).transpose(1, 2)


CASES: dict[str, dict[str, Any]] = {
    "as the paper": {"chunk": 4},
    "causal": {"chunk": 4, "causal": True},
    "across buckets": {"chunk": 3, "across_buckets": True},
    "counted twice": {"chunk": 4, "count_once": False},
    "counted twice across": {"chunk": 4, "count_once": False, "across_buckets": True, "causal": True},
    "no look back": {"chunk": 5, "look_back": 0},
    "far back": {"chunk": 2, "look_back": 3},
    "farther back than there is": {"chunk": 6, "look_back": 9, "across_buckets": True},
    "one chunk": {"chunk": 64},
    "chunks of one": {"chunk": 1},
    "scale": {"chunk": 4, "scale": 2.0},
    "rule": {"chunk": 4, "mask": window(5) | sinks(1)},
    "padding": {"chunk": 4, "mask": padding(torch.tensor([13, 6])), "causal": True},
    "per head": {"chunk": 4, "mask": per_head(causal, window(3))},
    "documents": {"chunk": 4, "mask": documents(torch.arange(26).view(2, 13) // 4)},
}


def oracle_options(case: dict[str, Any]) -> dict[str, Any]:
    rule = case.get("mask", full)
    names = {"across_buckets": "across", "count_once": "once"}
    options = {names.get(k, k): v for k, v in case.items() if k not in ("causal", "mask")}
    return {**options, "rule": rule & causal if case.get("causal") else rule}


@pytest.mark.parity(LSH)
@BOTH
@pytest.mark.parametrize("name", CASES)
def test_every_option_against_the_sets_of_the_paper(name: str, backend: str) -> None:
    rotations = tables(3)
    assert_parity(
        lambda qk, v: lsh_attention(qk, v, rotations, backend=backend, **CASES[name]),
        lambda qk, v: by_hand(qk, v, rotations, **oracle_options(CASES[name])),
        inputs(),
    )


@pytest.mark.parity(LSH)
@BOTH
@pytest.mark.parametrize(
    ("b", "t", "h", "e", "c", "rounds", "buckets"),
    [(1, 1, 1, 1, 1, 1, 2), (2, 7, 3, 5, 2, 1, 6), (1, 8, 2, 4, 4, 5, 2), (1, 9, 1, 3, 1, 2, [2, 4]),
     (1, 6, 2, 2, 3, 2, [2, 2, 2])],
)  # fmt: skip
def test_sizes(b: int, t: int, h: int, e: int, c: int, rounds: int, buckets: int | list[int], backend: str) -> None:
    rotations = tables(rounds, h, e, buckets)
    assert_parity(
        lambda qk, v: lsh_attention(qk, v, rotations, chunk=4, backend=backend),
        lambda qk, v: by_hand(qk, v, rotations, chunk=4),
        inputs(b, t, h, e, c),
    )


@pytest.mark.parity(LSH)
def test_full_shared_attention_is_attention_with_normalised_keys() -> None:
    not_self = Mask("not self", lambda b, h, t, s: t != s)
    assert_parity(
        lambda x, v: shared_qk_attention(x, v),
        lambda x, v: scaled_dot_product_attention(x, x / x.norm(dim=-1, keepdim=True), v, not_self),
        inputs(),
    )
    qk, v = inputs()
    out = shared_qk_attention(qk, v, causal=True)
    torch.testing.assert_close(out[:, 0], v[:, 0])  # nothing else to see
    assert_parity(
        lambda x, v: shared_qk_attention(x, v, window(4), scale=0.7, causal=True)[:, 1:],
        lambda x, v: scaled_dot_product_attention(
            x, x / x.norm(dim=-1, keepdim=True), v, not_self & window(4) & causal, scale=0.7
        )[:, 1:],
        inputs(),
    )


@pytest.mark.parity(LSH)
def test_buckets_are_the_argmax_of_both_sides() -> None:
    x = torch.randn(2, 9, 3, 4).double()
    rotations = tables(5, 3, 4, [6, 2])
    got = lsh_buckets(x, rotations)
    codes = []
    for table in rotations:
        y = torch.einsum("bthe,rhen->bhrtn", x, table)
        codes.append(torch.cat([y, -y], -1).argmax(-1))
    assert torch.equal(got, codes[0] + 6 * codes[1])
    shared = tables(5, 1, 4)
    assert torch.equal(lsh_buckets(x, shared), lsh_buckets(x, [shared[0].expand(-1, 3, -1, -1)]))
    assert torch.equal(lsh_buckets(x, shared[0]), lsh_buckets(x, shared)), "a table need not be in a list"


@pytest.mark.outside(LSH)
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("rounds", [2, 4])
def test_equals_reformer_pytorch(is_causal: bool, rounds: int) -> None:
    module = pytest.importorskip("reformer_pytorch.reformer_pytorch")
    theirs = module.LSHAttention(
        bucket_size=4, n_hashes=rounds, causal=is_causal, attend_across_buckets=False, allow_duplicate_attention=False
    )

    def run(qk: Tensor, v: Tensor) -> Tensor:
        torch.manual_seed(5)
        merge = lambda x: x.transpose(1, 2).flatten(0, 1)  # noqa: E731
        return theirs(merge(qk), merge(v))[0].unflatten(0, (2, 2)).transpose(1, 2)

    torch.manual_seed(5)  # what their hash_vectors draws, (1, e, rounds, buckets / 2)
    drawn = torch.randn(1, 4, rounds, 3, dtype=DOUBLE).permute(2, 0, 1, 3)
    # their log(N + 1e-9) differs from log N in the ninth digit
    assert_parity(
        lambda qk, v: lsh_attention(qk, v, drawn, chunk=4, causal=is_causal), run, inputs(t=24, c=4), rtol=1e-6,
        atol=1e-7,
    )  # fmt: skip


@pytest.mark.outside(LSH)
@pytest.mark.parametrize("decoder", [False, True])
@pytest.mark.parametrize("buckets", [4, [2, 4]])
def test_equals_transformers(decoder: bool, buckets: int | list[int]) -> None:
    from transformers import ReformerConfig
    from transformers.models.reformer.modeling_reformer import LSHSelfAttention

    config = ReformerConfig(
        attention_head_size=4, num_attention_heads=2, hidden_size=8, num_buckets=buckets, num_hashes=3, hash_seed=7,
        lsh_attn_chunk_length=4, lsh_num_chunks_before=0, lsh_attention_probs_dropout_prob=0.0, is_decoder=decoder,
    )  # fmt: skip
    theirs = LSHSelfAttention(config, layer_idx=0).double()
    x = torch.randn(2, 16, 8).double()
    torch.manual_seed(7)
    factors = [buckets] if isinstance(buckets, int) else buckets
    drawn = torch.randn(2, 4, 3, sum(factors) // 2, dtype=DOUBLE).permute(2, 0, 1, 3)
    rotations = list(drawn.split([n // 2 for n in factors], -1))

    def run(x: Tensor) -> Tensor:
        qk, v = ((x @ w.weight.T).unflatten(-1, (2, 4)) for w in (theirs.query_key, theirs.value))
        # their keys have length 1 after scaling, and no round is corrected for double counting
        options: dict[str, Any] = {"chunk": 4, "look_back": 0, "across_buckets": True, "count_once": False}
        return lsh_attention(qk, v, rotations, scale=1.0, causal=decoder, **options).flatten(2)

    # their norm adds 1e-6 to the mean square, ours nothing
    assert_parity(run, lambda x: theirs(x).hidden_states, [x], rtol=1e-4, atol=1e-5)


@pytest.mark.law(LSH)
@BOTH
@pytest.mark.parametrize("is_causal", [False, True])
def test_enough_hashes_are_full_attention(backend: str, is_causal: bool) -> None:
    qk, v = inputs(t=12)
    qk = qk + 1.5  # opposite vectors never meet; half a turn apart, they would take thousands of rounds
    want = shared_qk_attention(qk, v, causal=is_causal)
    rotations = tables(80, buckets=2)
    # a chunk looks back only: what stands later is reached by a causal query's rule alone
    for options in ({"chunk": 12}, {"chunk": 4, "look_back": 2}) if is_causal else ({"chunk": 12},):
        got = lsh_attention(qk, v, rotations, causal=is_causal, backend=backend, **options)
        torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-12)
    got = lsh_attention(qk, v, rotations, chunk=12, causal=is_causal, backend=backend, count_once=False)
    assert (got - want).abs().max() > 1e-3, "without the count a near key weighs more than its score says"
    one = lsh_attention(qk, v, tables(1), chunk=99, across_buckets=True, causal=is_causal, backend=backend)
    torch.testing.assert_close(one, want, rtol=1e-11, atol=1e-12)


@pytest.mark.law(LSH)
def test_the_error_falls_with_the_rounds() -> None:
    qk, v = inputs(1, 64, 2, 8, 8)
    want = shared_qk_attention(qk, v)
    errors = []
    for rounds in (1, 4, 16, 64):
        got = [lsh_attention(qk, v, tables(rounds, 2, 8, 8, seed=s), chunk=16) for s in range(4)]
        errors.append(sum((x - want).norm().item() for x in got))
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.35 * errors[0]


@pytest.mark.law(LSH)
def test_a_pair_that_meets_often_counts_once() -> None:
    qk, v = inputs()
    table = tables(1)[0]
    once = lsh_attention(qk, v, [table], chunk=4)
    torch.testing.assert_close(lsh_attention(qk, v, [table.expand(5, -1, -1, -1)], chunk=4), once)
    fine = lsh_rotations(2, 2, 4, [2] * 31, dtype=DOUBLE)  # more buckets than 32 bits can number with their chunks
    alone = lsh_attention(qk, v, fine, chunk=1)
    torch.testing.assert_close(alone, lsh_attention(qk, v, fine, chunk=1, backend="reference"))
    many = table.expand(300, -1, -1, -1)  # more than a byte can count
    torch.testing.assert_close(lsh_attention(qk[:1, :6], v[:1, :6], [many], chunk=4),
                               lsh_attention(qk[:1, :6], v[:1, :6], [table], chunk=4))  # fmt: skip


@pytest.mark.law(LSH)
def test_meetings_are_the_support_of_the_attention() -> None:
    qk, _ = inputs(1, 13, 1)
    rotations = tables(2, 1)
    for options in ({"chunk": 4}, {"chunk": 3, "look_back": 0}, {"chunk": 3, "across_buckets": True}):
        met = lsh_meetings(lsh_buckets(qk, rotations), **options)[0, 0]
        eye = torch.eye(13, dtype=DOUBLE)[None, :, None]
        weights = lsh_attention(qk, eye, rotations, **options)[0, :, 0]
        others = (met > 0) & ~torch.eye(13, dtype=torch.bool)
        lonely = ~others.any(-1)
        assert torch.equal(weights > 0, others | torch.diag(lonely))
        torch.testing.assert_close(weights.sum(-1), torch.ones(13, dtype=DOUBLE))
        assert met.diagonal().eq(2).all(), "a position meets itself in every round"


@pytest.mark.law(LSH)
def test_the_hash_knows_angles_only() -> None:
    x = torch.randn(1, 400, 1, 8).double()
    (table,) = tables(50, 1, 8, 4)
    b = lsh_buckets(x, table)
    assert torch.equal(lsh_buckets(x * 7.5, table), b)
    assert torch.equal(lsh_buckets(-x, table), (b + 2) % 4), "the opposite vector falls into the opposite bucket"
    near = lsh_buckets(x + 0.1 * torch.randn_like(x), table)
    far = lsh_buckets(torch.randn_like(x), table)
    assert (near == b).double().mean() > 0.85
    assert abs((far == b).double().mean() - 0.25) < 0.03


@pytest.mark.law(LSH)
def test_no_gradient_and_no_value_of_the_future_reaches_the_past() -> None:
    rotations = tables(2)
    qk, v = (x.requires_grad_() for x in inputs(1))
    out = lsh_attention(qk, v, rotations, chunk=4, causal=True)
    for t in range(12):
        for grad in torch.autograd.grad(out[:, : t + 1].square().sum(), (qk, v), retain_graph=True):
            assert grad[:, t + 1 :].eq(0).all()
    # buckets in one chunk: nothing that moves with the future is left
    assert_causal(lambda x: lsh_attention(x, x, tables(2), chunk=64, causal=True, backend="reference"), inputs(t=9)[0])


@pytest.mark.law(LSH)
def test_a_causal_mask_does_not_fix_the_chunk_borders() -> None:
    """The future is sorted with the past, so it decides who sits in whose chunk: a known property of the method."""
    x = inputs(1, 32)[0]
    with pytest.raises(AssertionError, match="changed with the input after it"):
        assert_causal(lambda x: lsh_attention(x, x, tables(2), chunk=4, causal=True), x)


@pytest.mark.law(LSH)
def test_without_chunks_order_is_invisible() -> None:
    rotations = tables(2)
    assert_permutation_equivariant(lambda x: lsh_attention(x, x, rotations, chunk=64), inputs(t=9)[0])


@pytest.mark.law(LSH)
@BOTH
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_garbage_in_the_padding_reaches_nothing(backend: str, bad: float) -> None:
    rule, rotations = padding(torch.tensor([13, 6])), tables(2)
    qk, v = inputs()
    qk[1, 6:], v[1, 6:] = 0.0, 0.0
    clean = [x.clone().requires_grad_() for x in (qk, v)]
    qk[1, 6:], v[1, 6:] = bad, bad
    dirty = [x.clone().requires_grad_() for x in (qk, v)]
    real = rule.dense(13)[:, 0, 0][..., None, None]
    outs = [
        lsh_attention(*x, rotations, rule, chunk=4, backend=backend).masked_fill(~real, 0.0) for x in (clean, dirty)
    ]
    torch.testing.assert_close(outs[0], outs[1])
    wants = torch.autograd.grad(outs[0].square().sum(), clean)
    for got, want in zip(torch.autograd.grad(outs[1].square().sum(), dirty), wants, strict=True):
        assert got.isfinite().all()
        torch.testing.assert_close(got, want)


@pytest.mark.law(LSH)
@BOTH
def test_a_visible_nan_is_not_hushed_up(backend: str) -> None:
    qk, v = inputs(1, 6)
    v[0, 2, 0] = math.nan
    out = lsh_attention(qk, v, tables(1), chunk=64, across_buckets=True, backend=backend)
    assert out[0, [0, 1, 3, 4, 5], 0].isnan().all()
    assert out[0, :, 1].isfinite().all()


@pytest.mark.law(LSH)
@BOTH
def test_positions_that_see_nothing_are_zero(backend: str) -> None:
    qk, v = (x.requires_grad_() for x in inputs())
    rule = Mask("nothing for query 3", lambda b, h, t, s: (t != 3) & (s >= 0))
    out = lsh_attention(qk, v, tables(3), rule, chunk=4, backend=backend)
    assert out[:, 3].eq(0).all()
    for grad in torch.autograd.grad(out.sum(), (qk, v)):
        assert grad.isfinite().all()


@pytest.mark.law(LSH)
@BOTH
def test_vectors_of_length_zero_are_finite(backend: str) -> None:
    qk, v = inputs(1, 9)
    qk[:, 2:5] = 0
    qk.requires_grad_()
    out = lsh_attention(qk, v, tables(2), chunk=4, backend=backend)
    assert out.isfinite().all()
    assert torch.autograd.grad(out.sum(), qk)[0].abs().max() < 1e3


@pytest.mark.law(LSH)
@BOTH
def test_empty_batches_and_sequences(backend: str) -> None:
    for b, t in ((0, 5), (2, 0), (0, 0)):
        qk, v = (x.requires_grad_() for x in inputs(b, t))
        out = lsh_attention(qk, v, tables(2), chunk=4, causal=True, backend=backend)
        assert out.shape == v.shape
        out.sum().backward()
    assert shared_qk_attention(*inputs(2, 0)).shape == (2, 0, 2, 3)


@pytest.mark.law(LSH)
def test_inputs_stay_as_they_are() -> None:
    qk, v = inputs()
    before = qk.clone(), v.clone()
    lsh_attention(qk, v, tables(3), chunk=4)
    assert torch.equal(qk, before[0])
    assert torch.equal(v, before[1])


@pytest.mark.registration(LSH)
@BOTH
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_stays_close_to_float64(backend: str, dtype: torch.dtype) -> None:
    qk, v = inputs(dtype=dtype)
    rotations = tables(2)
    got = lsh_attention(qk, v, rotations, chunk=4, causal=True, backend=backend)
    assert got.dtype == dtype
    want = lsh_attention(qk.double(), v.double(), rotations, chunk=4, causal=True)
    torch.testing.assert_close(got.double(), want, rtol=2e-2, atol=1e-2)
    large = lsh_attention(qk * 200, v, rotations, chunk=4, backend=backend)
    assert large.isfinite().all()


@pytest.mark.registration(LSH)
def test_any_memory_layout_and_device() -> None:
    qk, v = inputs()
    rotations = tables(2)
    want = lsh_attention(qk, v, rotations, chunk=4)
    turned = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (qk, v)]
    wide = [torch.stack([x, -x], -1).flatten(-2)[..., ::2] for x in (qk, v)]
    for views in (turned, wide):
        assert not views[0].is_contiguous()
        torch.testing.assert_close(lsh_attention(*views, rotations, chunk=4), want, rtol=0, atol=0)
    assert lsh_attention(qk.to("meta"), v.to("meta"), [r.to("meta") for r in rotations], chunk=4).shape == want.shape
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = lsh_attention(qk.float(), v.float(), rotations, chunk=4)
    assert cast.dtype == torch.float32
    torch.testing.assert_close(cast.double(), want, rtol=5e-2, atol=5e-2)


@pytest.mark.registration(LSH)
@BOTH
def test_second_derivatives(backend: str) -> None:
    qk, v = (x.requires_grad_() for x in inputs(1, 5, 1, 3, 2))
    rotations = tables(2, 1, 3, 2)
    assert torch.autograd.gradgradcheck(
        lambda qk, v: lsh_attention(qk, v, rotations, chunk=2, causal=True, backend=backend), (qk, v)
    )


@pytest.mark.registration(LSH)
@pytest.mark.usefixtures("unchecked")
@BOTH
def test_compiles_without_a_graph_break(backend: str) -> None:
    qk, v = inputs()
    rotations, rule = tables(2), window(6)

    def attend(qk: Tensor, v: Tensor) -> Tensor:
        return lsh_attention(qk, v, rotations, rule, chunk=4, causal=True, backend=backend)

    compiled = torch.compile(attend, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(qk, v), attend(qk, v))


@pytest.mark.refusal(LSH)
def test_refusals_of_inputs() -> None:
    qk, v = inputs()
    rotations = tables(2)
    for bad in ((qk[0], v), (qk, v[0]), (qk[:, :5], v), (qk[:, :, :1], v), (qk[:1], v), (qk[..., :0], v)):
        with refuses(ShapeError, "lsh_attention inputs", tuple(bad[0].shape), tuple(bad[1].shape)):
            lsh_attention(*bad, rotations)
    with refuses(ShapeError, "dtype", "torch.int64"):
        lsh_attention(qk.long(), v.long(), rotations)
    with refuses(ShapeError, "torch.float32", "torch.float64"):
        lsh_attention(qk, v.float(), rotations)
    with refuses(ShapeError, "attention mask", (3, 1, 13, 13)):
        lsh_attention(qk, v, rotations, padding(torch.tensor([1, 2, 3])))
    with refuses(ConfigError, "lsh_attention mask", "Tensor (13, 13)", "Mask("):
        lsh_attention(qk, v, rotations, causal.dense(13))
    with refuses(ConfigError, "lsh_attention mask", "'causal'"):
        lsh_attention(qk, v, rotations, "causal")
    with refuses(ConfigError, "backend", "'triton'"):
        lsh_attention(qk, v, rotations, backend="triton")


@pytest.mark.refusal(LSH)
@pytest.mark.parametrize("bad", [0, -1, 1.5, True, math.nan, "4"])
def test_refusals_of_sizes(bad: Any) -> None:
    qk, v = inputs()
    rotations = tables(2)
    with refuses(ConfigError, "chunk", repr(bad)):
        lsh_attention(qk, v, rotations, chunk=bad)
    if bad != 0:
        with refuses(ConfigError, "look_back", repr(bad)):
            lsh_attention(qk, v, rotations, look_back=bad)
    for name in ("rounds", "heads", "head_dim"):
        with refuses(ConfigError, name, repr(bad)):
            lsh_rotations(**{"rounds": 1, "heads": 1, "head_dim": 1, "buckets": 2, name: bad})
    for buckets in (bad, [4, bad]):
        with refuses(ConfigError, "buckets"):
            lsh_rotations(1, 1, 1, buckets)
    with refuses(ConfigError, "chunk", repr(bad)):
        lsh_factors(8, bad)
    if bad != 0:
        with refuses(ConfigError, "lsh_factors t", repr(bad)):
            lsh_factors(bad, 8)


@pytest.mark.refusal(LSH)
def test_refusals_of_scales_rounds_and_tables() -> None:
    qk, v = inputs()
    for scale in (0, -1.0, math.nan):
        with refuses(ConfigError, "scale", scale):
            lsh_attention(qk, v, tables(2), scale=scale)
    for buckets in (3, [2, 5], []):
        with refuses(ConfigError, "lsh_rotations buckets", buckets):
            lsh_rotations(1, 1, 1, buckets)
    table = tables(2)[0]
    wrong = [table[:, :, :3], table[0], table.expand(2, 2, 4, 2)[:, [0, 1, 1]], table[..., :0], table.long()]
    for bad in wrong:
        with refuses(ShapeError, "lsh_buckets rotations", tuple(bad.shape)):
            lsh_attention(qk, v, bad)
    with refuses(ShapeError, "rounds alike"):
        lsh_attention(qk, v, [table, table[:1]])
    with refuses(ConfigError, "lsh_buckets buckets", 2**40):
        lsh_attention(qk, v, tables(1, buckets=[2] * 40))
    with refuses(ShapeError, "0 tables"):
        lsh_attention(qk, v, [])
    with refuses(ShapeError, "lsh_buckets inputs", (13, 2, 4)):
        lsh_buckets(qk[0], table)


@pytest.mark.law(LSH)
def test_two_buckets_for_each_chunk() -> None:
    assert [lsh_factors(t, 64) for t in (0, 1, 64, 65, 2048, 4096, 2**20)] == [
        [2], [2], [2], [4], [64], [8, 16], [128, 256]
    ]  # fmt: skip


@pytest.mark.refusal("reformer")
def test_directions_and_buckets_that_are_none() -> None:
    qk = torch.randn(1, 6, 2, 4)
    for bad, said in ((None, "got None"), (3, "got 3"), ([None], "[None]")):
        with refuses(ConfigError, said, "lsh_rotations"):
            lsh_attention(qk, qk, bad)
    with refuses(ShapeError, "()"):
        lsh_attention(qk, qk, torch.tensor(1.0))
    with refuses(ShapeError, "meta", "cpu"):
        lsh_attention(qk, qk, torch.randn(1, 2, 4, 2, device="meta"))
    with refuses(ShapeError, "meta", "cpu"):
        lsh_attention(qk, qk.to("meta"), torch.randn(1, 2, 4, 2))
    with refuses(ConfigError, "torch.int64"):
        lsh_rotations(1, 2, 4, 4, dtype=torch.int64)
    buckets = torch.zeros(1, 2, 1, 6, dtype=torch.int64)
    with refuses(ConfigError, "chunk", 0):
        lsh_meetings(buckets, chunk=0)
    with refuses(ConfigError, "look_back", -1):
        lsh_meetings(buckets, look_back=-1)
    with refuses(ShapeError, "torch.float32"):
        lsh_meetings(buckets.float())
