"""Attention layers against nn.MultiheadAttention, and the laws of self, cross, causal and pruned attention."""

from __future__ import annotations

import copy
import io
import math
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from handbook_src.errors import ConfigError, HandbookError, ShapeError
from handbook_src.functional.attention.mask import (
    Mask,
    causal,
    full,
    left_padding,
    padding,
    per_head,
    prefix_lm,
    window,
)
from handbook_src.layers.attention.attention import (
    BidirectionalAttention,
    CausalAttention,
    CrossAttention,
    MultiHeadAttention,
    SelfAttention,
)
from handbook_src.layers.attention.chunked_attention import ChunkedAttention
from handbook_src.layers.attention.differential_attention import DifferentialAttention
from handbook_src.layers.attention.dilated_attention import DilatedAttention
from handbook_src.layers.attention.global_local import LongformerAttention
from handbook_src.layers.attention.grouped_query import GroupedQueryAttention
from handbook_src.layers.attention.kv_cache import AppendCache
from handbook_src.layers.attention.linear_attention import LinearAttention
from handbook_src.layers.attention.linformer import LinformerAttention
from handbook_src.layers.attention.memorizing import MemorizingAttention
from handbook_src.layers.attention.mla import MultiHeadLatentAttention
from handbook_src.layers.attention.perceiver_attention import LatentCrossAttention
from handbook_src.layers.attention.performer import PerformerAttention
from handbook_src.layers.attention.random_attention import BigBirdAttention
from handbook_src.layers.attention.reformer import LSHAttention
from handbook_src.layers.attention.sliding_window import SlidingWindowAttention
from handbook_src.layers.positions.rope import RotaryEmbedding
from handbook_src.testing import (
    assert_batch_independent,
    assert_causal,
    assert_parity,
    assert_permutation_equivariant,
    refuses,
)

MHA, ALL = "multi-head-attention", ("multi-head-attention", "self-attention", "cross-attention")
LENGTHS = torch.tensor([3, 1])


def twins(ours: MultiHeadAttention, bias: bool) -> tuple[nn.MultiheadAttention, list[tuple[Tensor, Tensor]]]:
    """Torch's layer with our weights, and the pairs whose gradients must agree."""
    ours.double()
    other = ours.kv_dim != ours.dim
    theirs = nn.MultiheadAttention(
        ours.dim,
        ours.heads,
        bias=bias,
        kdim=ours.kv_dim if other else None,
        vdim=ours.kv_dim if other else None,
        batch_first=True,
        dtype=torch.float64,
    )
    projections = [ours.q_proj, ours.k_proj, ours.v_proj]
    with torch.no_grad():
        for p in ours.parameters():
            p.uniform_(-0.5, 0.5)
        theirs.out_proj.load_state_dict(ours.out_proj.state_dict())
        if bias:
            theirs.in_proj_bias.copy_(torch.cat([p.bias for p in projections]))
        if other:
            for name, p in zip(("q", "k", "v"), projections, strict=True):
                getattr(theirs, f"{name}_proj_weight").copy_(p.weight)
        else:
            theirs.in_proj_weight.copy_(torch.cat([p.weight for p in projections]))
    pairs = [(ours.out_proj.weight, theirs.out_proj.weight)]
    if other:
        pairs += [(ours.q_proj.weight, theirs.q_proj_weight), (ours.v_proj.weight, theirs.v_proj_weight)]
    return theirs, pairs


@pytest.mark.parity(*ALL)
@pytest.mark.outside(*ALL)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("dim", "heads", "kv_dim"), [(12, 3, None), (12, 4, 5), (1, 1, None), (7, 1, 3)])
@pytest.mark.parametrize("kind", ["plain", "causal", "padding", "window", "added"])
def test_equals_torchs_layer(bias: bool, dim: int, heads: int, kv_dim: int | None, kind: str) -> None:
    ours = MultiHeadAttention(dim, heads, kv_dim=kv_dim, bias=bias)
    theirs, pairs = twins(ours, bias)
    t, s = 4, 4 if kv_dim is None else 6
    added = torch.randn(t, s, dtype=torch.float64)
    mask = {"padding": padding(LENGTHS), "window": window(2), "added": added}.get(kind)
    hidden = {"causal": ~causal.dense(t, s), "window": ~window(2).dense(t, s), "added": added}.get(kind)
    key_hidden = ~padding(LENGTHS).dense(t, s)[:, 0, 0] if kind == "padding" else None

    def run(x: Tensor, memory: Tensor | None = None) -> tuple[Tensor, Tensor]:
        is_causal = kind == "causal"
        return ours(x, memory, mask, is_causal), ours.weights(x, memory, mask, is_causal)

    def oracle(x: Tensor, memory: Tensor | None = None) -> tuple[Tensor, Tensor]:
        y = x if memory is None else memory
        return theirs(x, y, y, key_padding_mask=key_hidden, attn_mask=hidden, average_attn_weights=False)

    inputs = [torch.randn(2, t, dim)] + ([] if kv_dim is None else [torch.randn(2, s, kv_dim)])
    assert_parity(run, oracle, inputs, parameters=pairs)
    if kv_dim is None:
        grads = torch.cat([p.weight.grad for p in (ours.q_proj, ours.k_proj, ours.v_proj)])
        torch.testing.assert_close(grads, theirs.in_proj_weight.grad, rtol=1e-9, atol=1e-11)


@pytest.mark.parity("self-attention", "cross-attention", "bidirectional-attention", "causal-attention")
def test_the_named_layers_are_multi_head_attention() -> None:
    whole = MultiHeadAttention(12, 3).double()
    x, memory = torch.randn(2, 5, 12).double(), torch.randn(2, 4, 12).double()
    cases = [
        (SelfAttention(12, 3), (x,), whole(x)),
        (SelfAttention(12, 3, rule=causal & window(2)), (x,), whole(x, mask=causal & window(2))),
        (SelfAttention(12, 3, rule=causal), (x, padding(LENGTHS)), whole(x, mask=causal & padding(LENGTHS))),
        (BidirectionalAttention(12, 3), (x,), whole(x)),
        (CausalAttention(12, 3), (x,), whole(x, causal=True)),
        (CrossAttention(12, 12, 3), (x, memory), whole(x, memory)),
        (CrossAttention(12, 12, 3), (x, memory, padding(LENGTHS)), whole(x, memory, padding(LENGTHS))),
    ]
    for layer, inputs, want in cases:
        layer.double().load_state_dict(whole.state_dict())
        torch.testing.assert_close(layer(*inputs), want, rtol=0, atol=0)


@pytest.mark.parity(MHA)
def test_the_equation_head_by_head() -> None:
    layer = MultiHeadAttention(6, 2, kv_dim=5, head_dim=4, bias=False).double()
    x, y = torch.randn(3, 6).double(), torch.randn(7, 5).double()
    heads = []
    for i in range(2):
        rows = slice(4 * i, 4 * i + 4)
        q, k, v = x @ layer.q_proj.weight[rows].T, y @ layer.k_proj.weight[rows].T, y @ layer.v_proj.weight[rows].T
        heads.append(torch.softmax(q @ k.T / 4**0.5, -1) @ v)
    torch.testing.assert_close(layer(x[None], y[None])[0], torch.cat(heads, -1) @ layer.out_proj.weight.T)


@pytest.mark.law("self-attention", "bidirectional-attention", MHA)
def test_without_positions_it_is_permutation_equivariant() -> None:
    for layer in (SelfAttention(8, 2), BidirectionalAttention(8, 2), MultiHeadAttention(8, 4)):
        assert_permutation_equivariant(layer.double(), torch.randn(2, 6, 8).double())
        assert_batch_independent(layer, torch.randn(3, 4, 8).double())


@pytest.mark.law("cross-attention")
def test_the_order_of_a_memory_does_not_matter_and_queries_do_not_mix() -> None:
    layer = CrossAttention(8, 5, 2).double()
    x, memory = torch.randn(2, 3, 8).double(), torch.randn(2, 6, 5).double()
    out = layer(x, memory)
    torch.testing.assert_close(layer(x, memory.flip(1)), out)
    torch.testing.assert_close(layer(x[:, 1:2], memory), out[:, 1:2])
    assert layer(x, memory[:, :1]).shape == (2, 3, 8)


@pytest.mark.law("causal-attention", "self-attention")
def test_a_causal_layer_leaks_nothing() -> None:
    x = torch.randn(2, 6, 8).double()
    assert_causal(CausalAttention(8, 2).double(), x)
    assert_causal(SelfAttention(8, 2, rule=causal & window(3)).double(), x)
    with pytest.raises(AssertionError, match="changed with the input after it"):
        assert_causal(SelfAttention(8, 2, rule=prefix_lm(3)).double(), x)
    short = CausalAttention(8, 2).double()
    torch.testing.assert_close(short(x)[:, :4], short(x[:, :4]))


class Growing:
    """The least that a cache must be."""

    def __init__(self) -> None:
        self.k: Tensor | None = None
        self.v: Tensor | None = None

    def update(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        self.k = k if self.k is None else torch.cat([self.k, k], 1)
        self.v = v if self.v is None else torch.cat([self.v, v], 1)
        return self.k, self.v


@pytest.mark.law("causal-attention", MHA)
@pytest.mark.parametrize("steps", [[6], [1] * 6, [3, 2, 1], [1, 5]])
@pytest.mark.parametrize("extra", [None, window(3), left_padding(torch.tensor([0, 2]))], ids=str)
def test_cached_equals_uncached(steps: list[int], extra: Mask | None) -> None:
    layer, x = MultiHeadAttention(8, 2).double(), torch.randn(2, 6, 8).double()
    want = layer(x, mask=extra, causal=True)
    cache = Growing()
    got = torch.cat([layer(part, mask=extra, causal=True, cache=cache) for part in x.split(steps, 1)], 1)
    torch.testing.assert_close(got, want)
    if extra is None:
        named, cache = CausalAttention(8, 2).double(), Growing()
        named.load_state_dict(layer.state_dict())
        torch.testing.assert_close(torch.cat([named(p, cache=cache) for p in x.split(steps, 1)], 1), want)


@pytest.mark.law(MHA)
@pytest.mark.parametrize("gone", [[0], [2], [1, 3], [0, 1, 2]])
@pytest.mark.parametrize("bias", [True, False])
def test_pruned_heads_equal_zeroed_heads(gone: list[int], bias: bool) -> None:
    layer = MultiHeadAttention(8, 4, head_dim=3, kv_dim=5, bias=bias).double()
    x, memory = torch.randn(2, 5, 8).double(), torch.randn(2, 6, 5).double()
    zeroed, pruned = copy.deepcopy(layer), copy.deepcopy(layer)
    with torch.no_grad():
        for head in gone:
            zeroed.out_proj.weight[:, 3 * head : 3 * head + 3] = 0
    pruned.prune_heads(gone)
    kept = [h for h in range(4) if h not in gone]
    assert_parity(pruned, zeroed, [x, memory])
    torch.testing.assert_close(pruned.weights(x, memory), layer.weights(x, memory)[:, kept])
    assert pruned.kept_heads == kept
    assert pruned.q_proj.out_features == pruned.out_proj.in_features == 3 * len(kept)
    assert sum(p.numel() for p in pruned.parameters()) < sum(p.numel() for p in layer.parameters())


@pytest.mark.law(MHA)
def test_pruning_in_two_steps_keeps_the_original_numbers() -> None:
    layer = MultiHeadAttention(8, 4).double()
    once, twice = copy.deepcopy(layer), copy.deepcopy(layer)
    once.prune_heads({0, 2})
    twice.prune_heads([0])
    twice.prune_heads([2])
    assert once.kept_heads == twice.kept_heads == [1, 3]
    x = torch.randn(2, 5, 8).double()
    torch.testing.assert_close(once(x), twice(x), rtol=0, atol=0)
    assert "kept_heads=[1, 3]" in repr(once)


@pytest.mark.law(MHA)
def test_dropout_acts_in_training_only() -> None:
    layer, x = MultiHeadAttention(8, 2, dropout=0.5), torch.randn(2, 5, 8)
    assert not torch.equal(layer(x), layer(x))
    torch.testing.assert_close(layer.eval()(x), layer(x), rtol=0, atol=0)
    torch.testing.assert_close(layer.train().weights(x).sum(-1), torch.ones(2, 2, 5))


@pytest.mark.law(MHA, "self-attention")
def test_rows_that_see_nothing_and_empty_inputs_are_finite() -> None:
    layer = SelfAttention(8, 2, rule=causal)
    x = torch.randn(2, 5, 8, requires_grad=True)
    out = layer(x, left_padding(torch.tensor([5, 2])))
    assert out.isfinite().all()
    torch.testing.assert_close(out[0], layer.out_proj.bias.expand(5, 8))
    out.sum().backward()
    assert x.grad is not None
    assert x.grad.isfinite().all()
    for b, t in ((0, 5), (2, 0), (2, 1)):
        assert layer(torch.randn(b, t, 8)).shape == (b, t, 8)


@pytest.mark.registration(*ALL, "causal-attention", "bidirectional-attention")
@pytest.mark.parametrize(
    "make", [lambda: MultiHeadAttention(8, 4), lambda: CausalAttention(8, 4)], ids=["all", "causal"]
)
def test_state_dict_low_precision_and_layout(make: type[MultiHeadAttention]) -> None:
    layer, other, x = make(), make(), torch.randn(2, 5, 8)
    file = io.BytesIO()
    torch.save(layer.state_dict(), file)
    file.seek(0)
    other.load_state_dict(torch.load(file))
    torch.testing.assert_close(other(x), layer(x), rtol=0, atol=0)
    turned = x.transpose(0, 1).contiguous().transpose(0, 1)
    torch.testing.assert_close(layer(turned), layer(x))
    low = layer.bfloat16()(x.bfloat16())
    assert low.dtype == torch.bfloat16
    torch.testing.assert_close(low.float(), other(x), rtol=0.05, atol=0.05)


@pytest.mark.registration(*ALL, "causal-attention", "bidirectional-attention")
@pytest.mark.usefixtures("unchecked")
def test_compiles_without_a_graph_break() -> None:
    x, memory = torch.randn(2, 5, 8), torch.randn(2, 3, 6)
    for layer, inputs in (
        (CausalAttention(8, 2), (x,)),
        (SelfAttention(8, 2, rule=causal & window(2)), (x,)),
        (CrossAttention(8, 6, 2), (x, memory)),
    ):
        compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(*inputs), layer(*inputs))


@pytest.mark.refusal(*ALL, "causal-attention", "bidirectional-attention")
def test_refusals() -> None:
    with refuses(ConfigError, "5 for dim 12", "divisor"):
        MultiHeadAttention(12, 5)
    for sizes in ({"dim": 0, "heads": 1}, {"dim": 8, "heads": 0}, {"dim": 8, "heads": 2, "kv_dim": 0}):
        with refuses(ConfigError, "got 0", "at least 1"):
            MultiHeadAttention(**sizes)
    with refuses(ConfigError, "head_dim: got -1"):
        MultiHeadAttention(8, 2, head_dim=-1)
    for dropout in (-0.1, 1.0):
        with refuses(ConfigError, "dropout", dropout):
            MultiHeadAttention(8, 2, dropout=dropout)
    layer, x = MultiHeadAttention(8, 2, kv_dim=6), torch.randn(2, 3, 8)
    with refuses(ShapeError, (2, 3, 8), 6, "kv_dim"):
        layer(x)
    with refuses(ShapeError, (2, 3, 7), 8):
        layer(torch.randn(2, 3, 7), torch.randn(2, 3, 6))
    with refuses(ConfigError, "cache with memory"):
        layer(x, torch.randn(2, 3, 6), cache=Growing())
    with refuses(ShapeError, "attention mask", (3, 4)):
        layer(x, torch.randn(2, 5, 6), torch.ones(3, 4, dtype=torch.bool))
    with refuses(ShapeError, "t=3", "s=2"):
        layer(x, torch.randn(2, 2, 6), causal=True)


@pytest.mark.refusal(MHA)
def test_refusals_of_pruning() -> None:
    layer = MultiHeadAttention(8, 4)
    for gone in ([4], [-1], [0, 1, 2, 3]):
        with refuses(ConfigError, "heads to prune", gone[0], "[0, 1, 2, 3]"):
            layer.prune_heads(gone)
    layer.prune_heads([1])
    with refuses(ConfigError, "[1]", "[0, 2, 3]"):
        layer.prune_heads([1])
    for wrong in (5, True, [True], [0.0], "01", None, torch.tensor([1]), [[0]], {"a": 1}):
        with refuses(ConfigError, "heads to prune", "integers"):
            MultiHeadAttention(8, 4).prune_heads(wrong)


def test_full_is_the_default_rule() -> None:
    assert SelfAttention(4).rule is full


@pytest.mark.law("self-attention")
def test_weights_stand_under_the_layers_rule() -> None:
    x = torch.randn(2, 5, 8)
    weights = CausalAttention(8, 2).weights(x)
    assert (weights.triu(1) == 0).all()
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, 2, 5))
    layer = SelfAttention(8, 2, rule=window(2))
    both = layer.weights(x, padding(torch.tensor([5, 3])))
    assert (both[1, :, :, 3:] == 0).all()
    assert (both.triu(2) == 0).all()


@pytest.mark.law("self-attention")
@pytest.mark.parametrize("rule", [causal, full, per_head(causal, window(2))])
def test_a_mask_may_be_a_tensor(rule: Mask) -> None:
    layer, x, lengths = SelfAttention(8, 2, rule=rule), torch.randn(2, 5, 8), torch.tensor([5, 3])
    mask = padding(lengths)
    seen = mask.dense(5)
    bias = torch.zeros(seen.shape).masked_fill(~seen, -torch.inf)
    for tensor in (seen, bias):
        torch.testing.assert_close(layer(x, tensor), layer(x, mask))
        torch.testing.assert_close(layer.weights(x, tensor), layer.weights(x, mask))
    with refuses(ShapeError, "attention mask", (4, 5)):
        layer(x, torch.ones(4, 5, dtype=torch.bool))


@pytest.mark.law("multi-head-attention")
def test_pruning_leaves_frozen_what_is_frozen() -> None:
    layer = MultiHeadAttention(8, 4)
    layer.q_proj.requires_grad_(False)
    layer.out_proj.weight.requires_grad_(False)
    layer.prune_heads([1])
    frozen = {name for name, p in layer.named_parameters() if not p.requires_grad}
    assert frozen == {"q_proj.weight", "q_proj.bias", "out_proj.weight"}


@pytest.mark.refusal("self-attention")
def test_pruning_refuses_a_rule_that_knows_heads() -> None:
    layer = SelfAttention(8, 2, rule=per_head(causal, full))
    before = layer(x := torch.randn(1, 3, 8))
    with refuses(ConfigError, "rule of a layer to prune", "per_head"):
        layer.prune_heads([0])
    torch.testing.assert_close(layer(x), before)


@pytest.mark.registration("self-attention")
@pytest.mark.parametrize("make", [CausalAttention, BidirectionalAttention])
def test_layers_pickle_with_their_rule(make: type[SelfAttention]) -> None:
    layer, x = make(8, 2), torch.randn(2, 3, 8)
    again = pickle.loads(pickle.dumps(layer))
    assert again.rule is copy.deepcopy(layer).rule is layer.rule
    torch.testing.assert_close(again(x), layer(x), rtol=0, atol=0)


@pytest.mark.refusal(*ALL)
@pytest.mark.usefixtures("unchecked")
def test_inputs_without_a_batch_and_masks_that_are_none_are_refused() -> None:
    for layer in (MultiHeadAttention(8, 2), SelfAttention(8, 2)):
        for shape in ((3, 8), (1, 1, 3, 8)):
            with refuses(ShapeError, "features", shape):
                layer(torch.randn(shape))
        with refuses(ConfigError, "attention mask", "causal"):
            layer(torch.randn(1, 3, 8), mask="causal")


@pytest.mark.refusal(MHA)
def test_settings_of_the_wrong_kind_are_refused() -> None:
    good = {"dim": 8, "heads": 2, "kv_heads": 2, "kv_dim": 8, "head_dim": 4}
    for name in good:
        for value in (2.0, True, "a", math.nan, -1):
            with refuses(ConfigError, name, value):
                MultiHeadAttention(**{**good, name: value})  # type: ignore[arg-type]
    for dropout in ("a", None, True, math.nan):
        with refuses(ConfigError, "dropout", dropout):
            MultiHeadAttention(8, 2, dropout=dropout)  # type: ignore[arg-type]
    with refuses(ConfigError, "int64"):
        MultiHeadAttention(8, 2, dtype=torch.int64)


@pytest.mark.refusal(MHA)
def test_inputs_of_the_wrong_kind_are_refused() -> None:
    layer, x = MultiHeadAttention(8, 2), torch.randn(2, 3, 8)
    for wrong, value in ((x.long(), "int64"), (x > 0, "bool"), (x.double(), "float64"), (None, "NoneType")):
        with refuses(HandbookError, value):
            layer(wrong)
        if wrong is not None:
            with refuses(HandbookError, value):
                layer(x, wrong)
    with refuses(ConfigError, "'a'"):
        layer(x, cache="a")
    with torch.autocast("cpu", torch.bfloat16):  # joins dtypes by itself
        assert layer(x.bfloat16()).shape == x.shape


SHIELDED: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "multi-head": (lambda: MultiHeadAttention(8, 2), "mask"),
    "self, causal": (lambda: CausalAttention(8, 2), "mask"),
    "cross": (lambda: CrossAttention(8, 8, 2), "memory"),
    "grouped": (lambda: GroupedQueryAttention(8, 2, kv_heads=1, rope=RotaryEmbedding(4)), "mask"),
    "window": (lambda: SlidingWindowAttention(8, 2, window=3), "mask"),
    "chunked": (lambda: ChunkedAttention(8, 2, chunk=3), "lengths"),
    "dilated": (lambda: DilatedAttention(8, 2, reach=2, dilation=2), "lengths"),
    "longformer": (lambda: LongformerAttention(8, 2, window=3), "mask"),
    "bigbird": (lambda: BigBirdAttention(8, 2, block_size=2), "mask"),
    "linear": (lambda: LinearAttention(8, 2), "mask"),
    "performer": (lambda: PerformerAttention(8, 2, 6), "mask"),
    "linformer": (lambda: LinformerAttention(8, 2, 9, 4), "mask"),
    "hashing": (lambda: LSHAttention(8, 2, chunk=3, seed=0), "mask"),
    "latent reader": (lambda: LatentCrossAttention(8, 8, 2), "memory"),
    "memorizing": (lambda: MemorizingAttention(8, 2), "mask"),
    "differential": (lambda: DifferentialAttention(8, 2), "mask"),
    "latent": (lambda: MultiHeadLatentAttention(8, 2, latent_dim=4, head_dim=4, rope=2), "mask"),
}
TENSORS = (*list(SHIELDED)[:5], "latent reader", "memorizing", "differential", "latent")  # take more than rules


@pytest.mark.law(
    "multi-head-attention", "causal-attention", "cross-attention", "sliding-window-attention", "chunked-attention",
    "dilated-attention", "global-local-attention", "random-attention", "gqa", "linear-attention", "performer",
    "linformer", "reformer", "perceiver-attention", "memorizing-transformer", "differential-attention", "mla",
)  # fmt: skip
@pytest.mark.parametrize(
    ("name", "form"),
    [(name, "rule") for name in SHIELDED] + [(name, form) for name in TENSORS for form in ("tensor", "added")],
)
def test_nan_in_padding_reaches_no_weight(name: str, form: str) -> None:
    make, kind = SHIELDED[name]
    lengths = torch.tensor([9, 5])
    mask: Any = padding(lengths)
    if form != "rule":
        mask = mask.dense(9)
        mask = mask if form == "tensor" else torch.zeros(2, 1, 9, 9).double().masked_fill(~mask, -math.inf)
    layer, kept = make().double(), torch.arange(9) < lengths[:, None]
    x, whole = torch.randn(2, 9, 8).double(), torch.randn(2, 9, 8).double()

    def run(fill: float) -> tuple[Tensor, list[Tensor]]:
        layer.zero_grad()
        y = x.masked_fill(~kept[..., None], fill)
        out = layer(whole, y, mask) if kind == "memory" else layer(y, **{kind: lengths if kind == "lengths" else mask})
        out = out if kind == "memory" else out[kept]
        out.square().sum().backward()
        return out.detach(), [p.grad for p in layer.parameters() if p.grad is not None]

    want, grads = run(0.0)
    for fill in (math.nan, math.inf):
        got, theirs = run(fill)
        torch.testing.assert_close(got, want)
        torch.testing.assert_close(theirs, grads)


@pytest.mark.law("multi-head-attention")
def test_nan_that_is_seen_stays_seen() -> None:
    layer, x = MultiHeadAttention(8, 2), torch.randn(2, 6, 8)
    x[0, 2], x[1, 5] = math.nan, math.nan
    out = layer(x, mask=padding(torch.tensor([6, 4])))
    assert out[0].isnan().all()  # every query sees position 2
    assert out[1, :5].isfinite().all()
    assert out[1, 5].isnan().all()  # a padded query says what it was given


@pytest.mark.law("causal-attention")
@torch.no_grad()
def test_nan_in_left_padding_stays_out_of_a_cache() -> None:
    layer, x, mask = CausalAttention(8, 2), torch.randn(2, 6, 8), left_padding(torch.tensor([0, 2]))
    x[1, :2] = math.nan
    cache = AppendCache()
    got = torch.cat([layer(part, mask, cache=cache) for part in x.split([4, 2], 1)], 1)
    torch.testing.assert_close(got[0], layer(x[:1])[0])
    torch.testing.assert_close(got[1, 2:], layer(x[1:, 2:])[0])
    assert all(kept.isfinite().all() for kept in cache.update(*(torch.zeros(2, 0, 2, 4),) * 2))


@pytest.mark.registration("multi-head-attention")
@pytest.mark.usefixtures("unchecked")
def test_compiled_layers_shield_their_padding_too() -> None:
    layer, x, mask = MultiHeadAttention(8, 2), torch.randn(2, 6, 8), padding(torch.tensor([6, 4])).dense(6)
    x[1, 4:] = math.nan
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, mask=mask), layer(x, mask=mask), equal_nan=True)
    compiled(x, mask=mask)[1, :4].sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in layer.parameters())
