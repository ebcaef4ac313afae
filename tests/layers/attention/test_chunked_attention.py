"""What every layer under a fixed pattern keeps: chunked, dilated, strided and fixed attention; and chunked's own."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from functools import partial

import pytest
import torch

from handbook_src.errors import ConfigError, ShapeError
from handbook_src.layers.attention.attention import MultiHeadAttention
from handbook_src.layers.attention.chunked_attention import ChunkedAttention, PatternAttention
from handbook_src.layers.attention.dilated_attention import DilatedAttention
from handbook_src.layers.attention.kv_cache import AppendCache, SinkCache
from handbook_src.layers.attention.sparse_transformer import FixedAttention, StridedAttention
from handbook_src.testing import assert_causal, assert_parity, refuses

ID = "chunked-attention"
#: component, how the layer is made, what its repr says
PATTERNS: dict[str, tuple[str, Callable[..., PatternAttention], tuple[str, ...]]] = {
    "chunked": (ID, partial(ChunkedAttention, chunk=4), ("chunk=4", "causal=False")),
    "chunked, causal": (ID, partial(ChunkedAttention, chunk=3, causal=True), ("chunk=3", "causal=True")),
    "dilated": ("dilated-attention", partial(DilatedAttention, reach=2, dilation=3), ("reach=2", "dilation=3")),
    "dilated, causal": (
        "dilated-attention",
        partial(DilatedAttention, reach=2, dilation=2, causal=True),
        ("dilation=2", "causal=True"),
    ),
    "strided": (ID, partial(StridedAttention, stride=3), ("stride=3", "part='both'")),
    "column": (ID, partial(StridedAttention, stride=3, part="column"), ("part='column'",)),
    "fixed": (ID, partial(FixedAttention, stride=4, summary=2), ("stride=4", "summary=2")),
    "fixed, local": (ID, partial(FixedAttention, stride=4, part="local"), ("part='local'",)),
}


def every(kind: str, *names: str) -> pytest.MarkDecorator:
    """Run a test for every layer under a fixed pattern (or those named), and credit it to the layer's component."""
    return pytest.mark.parametrize(
        "name", [pytest.param(n, marks=getattr(pytest.mark, kind)(PATTERNS[n][0])) for n in names or PATTERNS]
    )


def make(name: str, *args: object, **kwargs: object) -> PatternAttention:
    return PATTERNS[name][1](*(args or (8, 2)), **kwargs)


def twin(layer: MultiHeadAttention) -> MultiHeadAttention:
    """Plain multi-head attention with the same weights."""
    other = MultiHeadAttention(layer.dim, layer.heads).double()
    other.load_state_dict(layer.state_dict())
    return other


@every("parity")
@pytest.mark.parametrize("t", [1, 7, 12])
def test_it_is_multi_head_attention_under_the_rule(name: str, t: int) -> None:
    layer = make(name).double()
    other, mask = twin(layer), layer.rule.dense(t)
    assert_parity(
        lambda x: (layer(x), layer.weights(x)),
        lambda x: (other(x, mask=mask), other.weights(x, mask=mask)),
        [torch.randn(2, t, 8)],
        parameters=list(zip(layer.parameters(), other.parameters(), strict=True)),
    )


@every("law", "chunked, causal", "dilated, causal", "strided", "column", "fixed", "fixed, local")
@pytest.mark.parametrize("steps", [[1] * 7, [4, 3], [7]])
def test_cached_equals_uncached(name: str, steps: list[int]) -> None:
    layer, x = make(name).double(), torch.randn(2, 7, 8).double()
    cache = AppendCache()
    got = torch.cat([layer(part, cache=cache) for part in x.split(steps, 1)], 1)
    torch.testing.assert_close(got, layer(x))
    assert_causal(layer, x)


@every("law")
def test_dropout_acts_in_training_only_and_heads_can_be_pruned(name: str) -> None:
    layer, x = make(name, 8, 2, dropout=0.5), torch.randn(2, 9, 8)
    assert not torch.equal(layer(x), layer(x))
    layer.eval()
    torch.testing.assert_close(layer(x), layer(x), rtol=0, atol=0)
    zeroed = copy.deepcopy(layer)
    with torch.no_grad():
        zeroed.out_proj.weight[:, :4] = 0
    layer.prune_heads([0])
    torch.testing.assert_close(layer(x), zeroed(x))


@every("registration")
def test_state_pickle_half_precision_and_repr(name: str) -> None:
    layer, other, x = make(name), make(name), torch.randn(2, 9, 8)
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
    assert make(name, 8, 2, device="meta")(x.to("meta")).shape == x.shape
    assert make(name, 8, 2, dtype=torch.float64).q_proj.weight.dtype == torch.float64
    for fact in PATTERNS[name][2]:
        assert fact in repr(layer)
    for b, t in ((0, 5), (2, 0)):
        assert layer(torch.randn(b, t, 8)).shape == (b, t, 8)


@every("registration", "chunked", "dilated, causal", "strided", "fixed")  # their options: the functions' tests
@pytest.mark.usefixtures("unchecked")
def test_compiles_without_a_graph_break(name: str) -> None:
    layer, x = make(name), torch.randn(2, 9, 8)
    torch.testing.assert_close(torch.compile(layer, fullgraph=True, backend="aot_eager")(x), layer(x))


@every("refusal")
def test_refusals_of_what_all_share(name: str) -> None:
    with refuses(ConfigError, "5 for dim 12", "divisor"):
        make(name, 12, 5)
    with refuses(ConfigError, "dropout", 1.0):
        make(name, 8, 2, dropout=1.0)
    with refuses(ConfigError, "dtype", "torch.int64"):
        make(name, 8, 2, dtype=torch.int64)
    layer = make(name)
    for shape in ((3, 8), (2, 3, 7), (1, 2, 3, 8)):
        with refuses(ShapeError, "features", shape, 8):
            layer(torch.randn(shape))


@every("refusal")
def test_a_cache_that_forgets_is_refused_before_it_stores(name: str) -> None:
    layer, cache = make(name).eval().requires_grad_(False), SinkCache(0, 4)
    layer(torch.randn(1, 4, 8), cache=cache)
    with refuses(ConfigError, "cache", "4 of 5 tokens", "SlidingWindowAttention"):
        layer(torch.randn(1, 1, 8), cache=cache)
    assert cache.seen == 4


@every("law", "chunked", "chunked, causal", "dilated", "dilated, causal")
def test_padding_is_as_good_as_absent(name: str) -> None:
    layer, x = make(name), torch.randn(2, 9, 8)
    x[1, 5:] = torch.nan
    x.requires_grad_()
    out = layer(x, lengths=torch.tensor([9, 5]))
    torch.testing.assert_close(out[1, :5], layer(x[1:, :5])[0])
    (grad,) = torch.autograd.grad(out[1, :5].sum(), x)
    assert grad[1, :5].isfinite().all()
    with refuses(ShapeError, "lengths", "3 for a batch of 2"):
        layer(x, lengths=torch.tensor([1, 2, 3]))


@pytest.mark.refusal(ID)
def test_refusals() -> None:
    for wrong in (0, -1, True, 2.5, None):
        with refuses(ConfigError, "chunk", wrong, "at least 1"):
            ChunkedAttention(8, 2, chunk=wrong)
