"""Position codes against closed forms, torch.nn.Embedding, BLOOM, MPT and T5; their laws; their refusals."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from handbook_src.errors import ConfigError, ShapeError
from handbook_src.functional.attention.attention import scaled_dot_product_attention
from handbook_src.functional.positions.position import (
    alibi_bias,
    alibi_slopes,
    learned_positions,
    sinusoidal_positions,
    t5_bucket,
    t5_relative_bias,
)
from handbook_src.testing import assert_parity, refuses
from handbook_src.testing.oracle import load

F64 = torch.float64


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


# ---------------------------------------------------------------- sinusoidal
@pytest.mark.parity("sinusoidal-position")
@pytest.mark.parametrize("dim", [1, 2, 3, 8, 13])
@pytest.mark.parametrize("offset", [0, 7, 5000])
@pytest.mark.parametrize("base", [10000.0, 100.0, 1.0])
def test_sinusoids_are_the_closed_form(dim, offset, base):
    got = sinusoidal_positions(5, dim, offset=offset, base=base, dtype=F64)
    assert got.shape == (5, dim)
    for p in range(5):
        for j in range(dim):
            angle = (p + offset) * base ** (-(j // 2 * 2) / dim)
            want = math.cos(angle) if j % 2 else math.sin(angle)
            assert got[p, j].item() == pytest.approx(want, abs=1e-11)


@pytest.mark.outside("sinusoidal-position")
def test_sinusoids_are_those_of_transformers_in_another_order():
    theirs = load("transformers.models.gptj.modeling_gptj").create_sinusoidal_positions(20, 12)
    mine = sinusoidal_positions(20, 12)  # waves side by side; theirs has all sines first
    torch.testing.assert_close(torch.cat((mine[:, 0::2], mine[:, 1::2]), 1), theirs, rtol=0, atol=2e-6)


@pytest.mark.law("sinusoidal-position")
@pytest.mark.parametrize("k", [1, 5, 300])
def test_a_shift_is_one_rotation_whatever_the_position(k):
    dim = 16
    angle = k * 10000.0 ** (-torch.arange(0, dim, 2, dtype=F64) / dim)
    blocks = [torch.tensor([[a.cos(), a.sin()], [-a.sin(), a.cos()]], dtype=F64) for a in angle]
    rotation = torch.block_diag(*blocks)
    torch.testing.assert_close(rotation @ rotation.T, torch.eye(dim, dtype=F64))
    pe = sinusoidal_positions(1000, dim, dtype=F64)
    torch.testing.assert_close(pe[k:], pe[:-k] @ rotation.T, rtol=0, atol=1e-10)


@pytest.mark.law("sinusoidal-position")
def test_products_of_codes_depend_on_the_distance_and_lengths_do_not_change():
    pe = sinusoidal_positions(50, 8, dtype=F64)
    gram = pe @ pe.T
    torch.testing.assert_close(gram[1:, 1:], gram[:-1, :-1], rtol=0, atol=1e-12)
    torch.testing.assert_close(pe.square().sum(-1), torch.full((50,), 4.0, dtype=F64))
    torch.testing.assert_close(sinusoidal_positions(3, 8, offset=47, dtype=F64), pe[47:], rtol=0, atol=0)


@pytest.mark.law("sinusoidal-position")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_codes_are_rounded_once(dtype):
    exact = sinusoidal_positions(5000, 6, dtype=F64)
    assert torch.equal(sinusoidal_positions(5000, 6, dtype=dtype), exact.to(dtype))


@pytest.mark.refusal("sinusoidal-position")
@pytest.mark.parametrize(
    ("arguments", "value"),
    [
        ({"dim": 0}, 0),
        ({"dim": 2.5}, 2.5),
        ({"dim": True}, True),
        ({"length": -1}, -1),
        ({"offset": -3}, -3),
        ({"base": 0.0}, 0.0),
        ({"base": math.nan}, "nan"),
        ({"base": -2.0}, -2.0),
    ],
)
def test_sinusoids_refuse(arguments, value):
    with refuses(ConfigError, "sinusoidal_positions", value):
        sinusoidal_positions(**{"length": 3, "dim": 4, **arguments})


@pytest.mark.law("sinusoidal-position", "learned-position")
def test_no_positions_are_no_rows():
    assert sinusoidal_positions(0, 6).shape == (0, 6)
    table = draw(4, 6)
    assert learned_positions(table, 0, offset=4).shape == (0, 6)
    torch.testing.assert_close(learned_positions(table, 3), table[:3])  # the first, unless told otherwise


# ---------------------------------------------------------------- learned
@pytest.mark.parity("learned-position")
@pytest.mark.parametrize(("rows", "dim", "t", "offset"), [(1, 1, 1, 0), (9, 5, 9, 0), (9, 5, 4, 3), (16, 7, 1, 15)])
def test_learned_positions_are_an_embedding_of_counted_positions(rows, dim, t, offset):
    assert_parity(
        lambda w: learned_positions(w, t, offset=offset),
        lambda w: nn.functional.embedding(torch.arange(offset, offset + t), w),
        [draw(rows, dim)],
    )


@pytest.mark.refusal("learned-position")
def test_learned_positions_refuse_what_the_table_does_not_have():
    w = draw(8, 4)
    with refuses(ShapeError, "5 positions from 4 on", "at most 8"):
        learned_positions(w, 5, offset=4)
    for length, offset, value in ((-1, 0, -1), (2, -1, -1), (2.0, 0, 2.0)):
        with refuses(ConfigError, value):
            learned_positions(w, length, offset=offset)  # type: ignore[arg-type]
    with refuses(ShapeError, "1 axes"):
        learned_positions(w[0], 2)


# ---------------------------------------------------------------- alibi
HEADS = [1, 2, 3, 5, 8, 12, 20, 112]


@pytest.mark.outside("alibi")
@pytest.mark.parity("alibi")
@pytest.mark.parametrize("heads", HEADS)
def test_alibi_is_blooms_and_mpts(heads):
    bloom = load("transformers.models.bloom.modeling_bloom").build_alibi_tensor
    mpt = load("transformers.models.mpt.modeling_mpt").build_mpt_alibi_tensor
    t = 7
    ours = alibi_bias(alibi_slopes(heads), t, causal=True)[0]
    seen = torch.ones(t, t, dtype=torch.bool).tril()
    for theirs in (bloom(torch.ones(1, t, dtype=torch.long), heads, torch.float32), mpt(heads, t)):
        theirs = theirs.expand(heads, t, t)  # theirs count from a fixed end, ours from the query: softmax can't tell
        want = (theirs - theirs.diagonal(dim1=1, dim2=2)[..., None]).masked_fill(~seen, -math.inf)
        torch.testing.assert_close(ours, want, rtol=1e-5, atol=1e-6)
    scores = draw(1, heads, t, t).float()
    want = (scores + theirs).masked_fill(~seen, -math.inf).softmax(-1)
    torch.testing.assert_close((scores + ours).softmax(-1), want, rtol=1e-5, atol=1e-6)


@pytest.mark.parity("alibi")
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(
    ("t", "s", "offset"), [(1, 1, None), (5, 5, None), (2, 7, None), (3, 4, 1), (4, 3, 0), (2, 3, 9)]
)
def test_alibi_is_the_formula_written_out(t, s, offset, causal):
    start = s - t if offset is None else offset

    def entry(m: Tensor, i: int, j: int) -> Tensor:
        return torch.full_like(m, -math.inf) if causal and j > i else -m * abs(i - j)

    def literal(m: Tensor) -> Tensor:
        rows = [torch.stack([entry(m, i, j) for j in range(s)], -1) for i in range(start, start + t)]
        return torch.stack(rows, -2)[None]

    assert_parity(lambda m: alibi_bias(m, t, s, offset=offset, causal=causal), literal, [alibi_slopes(6, dtype=F64)])


@pytest.mark.law("alibi")
@pytest.mark.parametrize("heads", [1, 2, 8, 64])
def test_slopes_of_a_power_of_two_are_geometric_and_end_at_one_256th(heads):
    m = alibi_slopes(heads, dtype=F64)
    assert m[-1] == 2.0**-8
    torch.testing.assert_close(m[1:] / m[:-1], torch.full((heads - 1,), 2.0 ** (-8 / heads), dtype=F64))


@pytest.mark.law("alibi", "t5-relative-bias")
@pytest.mark.parametrize("kind", ["alibi", "alibi causal", "t5", "t5 one direction"])
def test_biases_do_not_move_with_the_text(kind):
    w = draw(32, 3)
    bias = {
        "alibi": lambda t, s, o=None: alibi_bias(alibi_slopes(3), t, s, offset=o),
        "alibi causal": lambda t, s, o=None: alibi_bias(alibi_slopes(3), t, s, offset=o, causal=True),
        "t5": lambda t, s, o=None: t5_relative_bias(w, t, s, offset=o, max_distance=20),
        "t5 one direction": lambda t, s, o=None: t5_relative_bias(w, t, s, offset=o, bidirectional=False),
    }[kind]
    whole = bias(40, 40)
    assert torch.equal(whole[..., 1:, 1:], whole[..., :-1, :-1])  # translation
    assert torch.equal(bias(3, 40), whole[..., 37:, :])  # cached decoding: the last queries
    assert torch.equal(bias(2, 40, 5), whole[..., 5:7, :])  # or any others
    assert bias(0, 4).shape == (1, 3, 0, 4)
    assert bias(0, 0).shape == (1, 3, 0, 0)


@pytest.mark.law("alibi")
def test_symmetric_alibi_is_symmetric_and_causal_alibi_replaces_the_mask():
    m = alibi_slopes(4, dtype=F64)
    both = alibi_bias(m, 9)
    assert torch.equal(both, both.mT)
    q, k, v = (draw(2, 9, 4, 3, seed=s) for s in range(3))
    torch.testing.assert_close(
        scaled_dot_product_attention(q, k, v, alibi_bias(m, 9, causal=True)),
        scaled_dot_product_attention(q, k, v, both, causal=True),
    )


@pytest.mark.law("alibi")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_alibi_in_half_precision_is_rounded_once(dtype):
    exact = alibi_bias(alibi_slopes(8, dtype=torch.float64), 1, 600)
    assert torch.equal(alibi_bias(alibi_slopes(8, dtype=dtype), 1, 600), exact.to(dtype))


@pytest.mark.refusal("alibi")
def test_alibi_refuses():
    for heads in (0, -2, 1.5, True):
        with refuses(ConfigError, "heads", heads):
            alibi_slopes(heads)
    m = alibi_slopes(2)
    with refuses(ShapeError, "5 queries, 4 keys"):
        alibi_bias(m, 5, 4)
    for t, s, offset, value in ((-1, 3, None, -1), (1, -3, None, -3), (1, 3, -1, -1), (1, 2.5, None, 2.5)):
        with refuses(ConfigError, value):
            alibi_bias(m, t, s, offset=offset)
    with refuses(ShapeError, "2 axes"):
        alibi_bias(m[None], 3)
    with refuses(ShapeError, "torch.int64"):
        alibi_bias(torch.tensor([1, 2]), 3)


# ---------------------------------------------------------------- T5
@pytest.fixture(scope="module")
def t5():
    return load("transformers.models.t5.modeling_t5")


@pytest.mark.outside("t5-relative-bias")
@pytest.mark.parity("t5-relative-bias")
@pytest.mark.parametrize("bidirectional", [True, False])
@pytest.mark.parametrize(("buckets", "distance"), [(32, 128), (8, 20), (320, 800), (6, 9), (4, 2), (32, 1000)])
def test_buckets_are_t5s(t5, buckets, distance, bidirectional):
    if not bidirectional and distance <= buckets // 2:
        buckets = 3  # an odd number will do in one direction
    relative = torch.arange(-2000, 2000)
    ours = t5_bucket(relative, bidirectional=bidirectional, num_buckets=buckets, max_distance=distance)
    theirs = t5.T5Attention._relative_position_bucket(relative, bidirectional, buckets, distance)
    assert torch.equal(ours, theirs)
    assert ours.min() == 0
    assert ours.max() == buckets - 1


def t5_bias(t5, w: Tensor, t: int, s: int, past: int, bidirectional: bool, distance: int):
    config = t5.T5Config(
        d_model=6, d_kv=2, num_heads=w.shape[1], relative_attention_num_buckets=w.shape[0],
        relative_attention_max_distance=distance, is_decoder=not bidirectional,
    )  # fmt: skip
    layer = t5.T5Attention(config, has_relative_attention_bias=True, layer_idx=0).to(F64)
    return torch.func.functional_call(
        _ComputesBias(layer), {"layer.relative_attention_bias.weight": w}, (t, s), {"past_seen_tokens": past}
    )


class _ComputesBias(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, t: int, s: int, past_seen_tokens: int) -> Tensor:
        return self.layer.compute_bias(t, s, past_seen_tokens=past_seen_tokens)


@pytest.mark.outside("t5-relative-bias")
@pytest.mark.parity("t5-relative-bias")
@pytest.mark.parametrize("bidirectional", [True, False])
@pytest.mark.parametrize(("t", "s"), [(1, 1), (6, 6), (50, 50), (1, 9), (3, 41)])
@pytest.mark.parametrize(("buckets", "heads", "distance"), [(32, 3, 128), (8, 1, 20)])
def test_bias_and_its_gradient_are_t5s(t5, t, s, buckets, heads, distance, bidirectional):
    assert_parity(
        lambda w: t5_relative_bias(w, t, s, bidirectional=bidirectional, max_distance=distance),
        lambda w: t5_bias(t5, w, t, s, s - t, bidirectional, distance),
        [draw(buckets, heads)],
    )


@pytest.mark.law("t5-relative-bias")
def test_near_distances_have_a_bucket_each_and_far_ones_share():
    bucket = t5_bucket(-torch.arange(300), bidirectional=False)
    assert bucket[:16].tolist() == list(range(16))
    assert (bucket.diff() >= 0).all()
    assert (bucket[128:] == 31).all()
    assert (t5_bucket(torch.arange(5), bidirectional=False) == 0).all()  # what comes later is not told apart
    both = t5_bucket(torch.arange(-200, 201))
    assert set(both[:200].tolist()).isdisjoint(both[201:].tolist())


@pytest.mark.law("t5-relative-bias")
def test_the_bias_is_linear_in_the_weight_and_twice_differentiable():
    w = draw(8, 2).requires_grad_()
    assert torch.autograd.gradgradcheck(lambda w: t5_relative_bias(w, 4, max_distance=9).square(), (w,))


@pytest.mark.refusal("t5-relative-bias")
@pytest.mark.parametrize(
    ("bidirectional", "buckets", "distance", "value"),
    [
        (True, 2, 128, 2),
        (True, 7, 128, 7),
        (False, 1, 128, 1),
        (False, 0, 128, 0),
        (True, 32, 8, 8),
        (False, 32, 16, 16),
        (False, 32, -5, -5),
        (True, 32, 0, 0),
        (True, 32.0, 128, 32.0),
    ],
)
def test_buckets_that_cannot_be_are_refused(bidirectional, buckets, distance, value):
    with refuses(ConfigError, "t5_bucket", value):
        t5_bucket(torch.arange(3), bidirectional=bidirectional, num_buckets=buckets, max_distance=distance)


@pytest.mark.law("t5-relative-bias")
@pytest.mark.parametrize("dtype", [torch.int8, torch.int16, torch.int32])
@pytest.mark.parametrize("bidirectional", [True, False])
@pytest.mark.parametrize("buckets", [32, 512])
def test_buckets_do_not_depend_on_the_integer(dtype, bidirectional, buckets):
    distance = torch.arange(-128, 128)
    options = {"bidirectional": bidirectional, "num_buckets": buckets, "max_distance": 800}
    assert torch.equal(t5_bucket(distance.to(dtype), **options), t5_bucket(distance, **options))


@pytest.mark.refusal("t5-relative-bias")
def test_biases_that_cannot_be_are_refused():
    w = draw(8, 2)
    with refuses(ShapeError, "torch.float64"):
        t5_bucket(draw(3))  # type: ignore[arg-type]
    with refuses(ShapeError, "5 queries, 4 keys"):
        t5_relative_bias(w, 5, 4)
    with refuses(ConfigError, -1):
        t5_relative_bias(w, -1)
    with refuses(ConfigError, "offset", -2):
        t5_relative_bias(w, 2, 4, offset=-2)
    with refuses(ShapeError, "1 axes"):
        t5_relative_bias(w[0], 2)
