"""The Sparse Transformer's attentions as layers."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable

import pytest
import torch

from handbook_src.errors import ConfigError, ShapeError
from handbook_src.layers.attention import MultiHeadAttention
from handbook_src.layers.chunked_attention import PatternAttention
from handbook_src.layers.kv_cache import AppendCache
from handbook_src.layers.sparse_transformer import FixedAttention, StridedAttention
from handbook_src.testing import assert_causal, assert_parity, refuses

ID = "chunked-attention"
MAKERS: list[Callable[..., PatternAttention]] = [
    lambda *a, **kw: StridedAttention(*a, stride=3, **kw),
    lambda *a, **kw: StridedAttention(*a, stride=3, part="column", **kw),
    lambda *a, **kw: FixedAttention(*a, stride=4, summary=2, **kw),
    lambda *a, **kw: FixedAttention(*a, stride=4, part="local", **kw),
]
EVERY = pytest.mark.parametrize("make", MAKERS)


def twin(layer: MultiHeadAttention) -> MultiHeadAttention:
    """Plain multi-head attention with the same weights."""
    other = MultiHeadAttention(layer.dim, layer.heads).double()
    other.load_state_dict(layer.state_dict())
    return other


@pytest.mark.parity(ID)
@EVERY
@pytest.mark.parametrize("t", [1, 7, 12])
def test_it_is_multi_head_attention_under_the_rule(make: Callable[..., PatternAttention], t: int) -> None:
    layer = make(8, 2).double()
    other, mask = twin(layer), layer.rule.dense(t)
    assert_parity(
        lambda x: (layer(x), layer.weights(x)),
        lambda x: (other(x, mask=mask), other.weights(x, mask=mask)),
        [torch.randn(2, t, 8)],
        parameters=list(zip(layer.parameters(), other.parameters(), strict=True)),
    )


@pytest.mark.law(ID)
@EVERY
@pytest.mark.parametrize("steps", [[1] * 7, [4, 3], [7]])
def test_cached_equals_uncached(make: Callable[..., PatternAttention], steps: list[int]) -> None:
    layer, x = make(8, 2).double(), torch.randn(2, 7, 8).double()
    if not (layer.rule.dense(7) <= torch.ones(7, 7).bool().tril()).all():
        pytest.skip("a layer that sees the future has no cache")
    cache = AppendCache()
    got = torch.cat([layer(part, cache=cache) for part in x.split(steps, 1)], 1)
    torch.testing.assert_close(got, layer(x))
    assert_causal(layer, x)


@pytest.mark.law(ID)
@EVERY
def test_dropout_acts_in_training_only_and_heads_can_be_pruned(make: Callable[..., PatternAttention]) -> None:
    layer, x = make(8, 2, dropout=0.5), torch.randn(2, 9, 8)
    assert not torch.equal(layer(x), layer(x))
    layer.eval()
    torch.testing.assert_close(layer(x), layer(x), rtol=0, atol=0)
    zeroed = copy.deepcopy(layer)
    with torch.no_grad():
        zeroed.out_proj.weight[:, :4] = 0
    layer.prune_heads([0])
    torch.testing.assert_close(layer(x), zeroed(x))


@pytest.mark.registration(ID)
@EVERY
def test_state_pickle_half_precision_and_repr(make: Callable[..., PatternAttention]) -> None:
    layer, other, x = make(8, 2), make(8, 2), torch.randn(2, 9, 8)
    file = io.BytesIO()
    torch.save(layer.state_dict(), file)
    file.seek(0)
    other.load_state_dict(torch.load(file))
    want = layer(x)
    for again in (other, copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        torch.testing.assert_close(again(x), want, rtol=0, atol=0)
    for dtype in (torch.bfloat16, torch.float16):
        low = copy.deepcopy(layer).to(dtype)(x.to(dtype))
        assert low.dtype == dtype
        torch.testing.assert_close(low.float(), want, rtol=0.05, atol=0.05)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert layer(x).dtype == torch.bfloat16
    assert make(8, 2, device="meta")(x.to("meta")).shape == x.shape
    assert make(8, 2, dtype=torch.float64).q_proj.weight.dtype == torch.float64
    for fact in ("stride=", "part="):
        assert fact in repr(layer)
    for b, t in ((0, 5), (2, 0)):
        assert layer(torch.randn(b, t, 8)).shape == (b, t, 8)


@pytest.mark.registration(ID)
@pytest.mark.usefixtures("unchecked")
@EVERY
def test_compiles_without_a_graph_break(make: Callable[..., PatternAttention]) -> None:
    layer, x = make(8, 2), torch.randn(2, 9, 8)
    torch.testing.assert_close(torch.compile(layer, fullgraph=True, backend="aot_eager")(x), layer(x))


@pytest.mark.refusal(ID)
@EVERY
def test_refusals_of_what_all_share(make: Callable[..., PatternAttention]) -> None:
    with refuses(ConfigError, "5 for dim 12", "divisor"):
        make(12, 5)
    with refuses(ConfigError, "dropout", 1.0):
        make(8, 2, dropout=1.0)
    with refuses(ConfigError, "dtype", "torch.int64"):
        make(8, 2, dtype=torch.int64)
    layer = make(8, 2)
    for shape in ((3, 8), (2, 3, 7), (1, 2, 3, 8)):
        with refuses(ShapeError, "features", shape, 8):
            layer(torch.randn(shape))


@pytest.mark.refusal(ID)
def test_refusals() -> None:
    for wrong in (0, -1, True, 2.5, None):
        for make in (StridedAttention, FixedAttention):
            with refuses(ConfigError, "stride", wrong, "at least 1"):
                make(8, 2, stride=wrong)
        with refuses(ConfigError, "summary", wrong):
            FixedAttention(8, 2, stride=4, summary=wrong)
    with refuses(ConfigError, "summary", 5, 4):
        FixedAttention(8, 2, stride=4, summary=5)
    for make, part in ((StridedAttention, "summary"), (FixedAttention, "column")):
        with refuses(ConfigError, "part", repr(part), "both"):
            make(8, 2, stride=4, part=part)
