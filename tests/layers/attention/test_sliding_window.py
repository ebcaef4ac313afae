"""The sliding-window layer against its parent, and its cache, mask, state and refusals."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import Tensor

from handbook_src.errors import ConfigError, ShapeError
from handbook_src.functional.attention.mask import causal, padding, window
from handbook_src.layers.attention.attention import MultiHeadAttention, SelfAttention
from handbook_src.layers.attention.sliding_window import SlidingWindowAttention
from handbook_src.testing import assert_batch_independent, assert_causal, assert_parity, refuses

SWA = "sliding-window-attention"
LENGTHS = torch.tensor([19, 4])


@pytest.mark.parity(SWA)
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("kv_heads", [None, 1])
def test_equals_the_dense_layer(is_causal: bool, bias: bool, kv_heads: int | None) -> None:
    ours = SlidingWindowAttention(8, 2, window=4, causal=is_causal, kv_heads=kv_heads, bias=bias).double()
    theirs = MultiHeadAttention(8, 2, kv_heads=kv_heads, bias=bias).double()
    theirs.load_state_dict(ours.state_dict())
    rule = causal & window(4) if is_causal else window(4)
    pairs = list(zip(ours.parameters(), theirs.parameters(), strict=True))
    for mask in (None, padding(LENGTHS), padding(LENGTHS).dense(19)):
        dense = rule if mask is None else rule.dense(19) & padding(LENGTHS).dense(19)
        assert_parity(
            lambda x, mask=mask: ours(x, mask),
            lambda x, dense=dense: theirs(x, None, dense),
            [torch.randn(2, 19, 8)],
            parameters=pairs,
        )
    x = torch.randn(2, 19, 8).double()
    torch.testing.assert_close(ours.weights(x), theirs.weights(x, None, rule))


@pytest.mark.law(SWA)
def test_a_layer_is_causal_and_cached_equals_uncached() -> None:
    class Rolling:
        """A cache that forgets all but the window."""

        kept: tuple[Tensor, Tensor] | None = None

        def update(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
            if self.kept is not None:
                k, v = torch.cat([self.kept[0], k], 1), torch.cat([self.kept[1], v], 1)
            self.kept = k[:, -4:], v[:, -4:]
            return k, v

    layer, x = SlidingWindowAttention(8, 2, window=5, causal=True).double(), torch.randn(2, 17, 8).double()
    assert_causal(layer, x)
    assert_batch_independent(layer, x)
    whole = layer(x)
    for steps in ([1] * 17, [6, 1, 7, 3]):
        cache = Rolling()
        torch.testing.assert_close(torch.cat([layer(p, cache=cache) for p in x.split(steps, 1)], 1), whole)


@pytest.mark.law(SWA)
def test_dropout_acts_in_training_only_and_pruning_keeps_the_window() -> None:
    layer, x = SlidingWindowAttention(8, 2, window=3, dropout=0.5), torch.randn(2, 9, 8)
    assert not torch.equal(layer(x), layer(x))
    layer.eval()
    torch.testing.assert_close(layer(x), layer(x), rtol=0, atol=0)
    dense = SelfAttention(8, 2, rule=window(3))
    dense.load_state_dict(layer.state_dict())
    layer.prune_heads([1])
    dense.prune_heads([1])
    torch.testing.assert_close(layer(x), dense(x))


@pytest.mark.registration(SWA)
def test_state_pickle_copy_low_precision_and_devices() -> None:
    layer, x = SlidingWindowAttention(8, 2, window=3, causal=True), torch.randn(2, 9, 8)
    other = SlidingWindowAttention(8, 2, window=3, causal=True)
    other.load_state_dict(layer.state_dict())
    for again in (other, copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        torch.testing.assert_close(again(x), layer(x), rtol=0, atol=0)
    low = copy.deepcopy(layer).bfloat16()(x.bfloat16())
    assert low.dtype == torch.bfloat16
    torch.testing.assert_close(low.float(), layer(x), rtol=0.05, atol=0.05)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert layer(x).dtype == torch.bfloat16
    made = SlidingWindowAttention(8, 2, window=3, device="meta", dtype=torch.float64)
    assert made(torch.empty(2, 9, 8, device="meta", dtype=torch.float64)).shape == (2, 9, 8)
    assert layer.extra_repr() == "8, heads=2, head_dim=4, dropout=0.0, window=3, causal=True"
    for shape in ((0, 5, 8), (2, 0, 8), (2, 1, 8)):
        assert layer(torch.randn(shape)).shape == shape


@pytest.mark.registration(SWA)
@pytest.mark.usefixtures("unchecked")
def test_compiles_without_a_graph_break() -> None:
    layer, x = SlidingWindowAttention(8, 2, window=3, causal=True), torch.randn(2, 9, 8)
    torch.testing.assert_close(torch.compile(layer, fullgraph=True, backend="aot_eager")(x), layer(x))


@pytest.mark.refusal(SWA)
def test_refusals() -> None:
    for n in (0, -1, 2.5, True, None):
        with refuses(ConfigError, "window", n):
            SlidingWindowAttention(8, 2, window=n)  # type: ignore[arg-type]
    with refuses(ConfigError, "5 for dim 12"):
        SlidingWindowAttention(12, 5, window=3)
    with refuses(ConfigError, "torch.int64"):
        SlidingWindowAttention(8, 2, window=3, dtype=torch.int64)
    layer = SlidingWindowAttention(8, 2, window=3)
    with refuses(ShapeError, (2, 9, 7)):
        layer(torch.randn(2, 9, 7))
    with refuses(ShapeError, (9, 8)):
        layer(torch.randn(9, 8))
    with refuses(ShapeError, "attention mask", (4, 9)):
        layer(torch.randn(2, 9, 8), torch.ones(4, 9) > 0)
    with refuses(ConfigError, "attention mask", "causal"):
        layer(torch.randn(2, 9, 8), "causal")  # type: ignore[arg-type]
