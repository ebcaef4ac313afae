"""Longformer's layer against the published model, with its weights copied."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import Tensor, nn

from handbook_src.errors import ConfigError, ShapeError
from handbook_src.functional.attention.attention import scaled_dot_product_attention
from handbook_src.functional.attention.global_local import global_local_rule
from handbook_src.functional.attention.mask import padding
from handbook_src.layers.attention.attention import MultiHeadAttention
from handbook_src.layers.attention.global_local import LongformerAttention
from handbook_src.testing import assert_causal, assert_parity, refuses

LONG = "global-local-attention"
MARKS = torch.zeros(2, 24, dtype=torch.bool)
MARKS[0, [0, 5]], MARKS[1, 0] = True, True


def scattered(layer: LongformerAttention, dtype: torch.dtype = torch.float64) -> LongformerAttention:
    """Global projections unlike the local ones, or a mix-up would not show."""
    with torch.no_grad():
        for p in layer.parameters():
            p.uniform_(-0.5, 0.5)
    return layer.to(dtype).eval()


@pytest.mark.parity(LONG)
@pytest.mark.parametrize("positions", [(0,), (3, 20), (), MARKS], ids=["first", "two", "none", "marks"])
@pytest.mark.parametrize("causal", [False, True])
def test_shared_projections_are_multi_head_attention_under_the_rule(positions: object, causal: bool) -> None:
    ours = scattered(LongformerAttention(8, 2, window=4, separate=False, causal=causal))
    theirs = MultiHeadAttention(8, 2).double()
    theirs.load_state_dict(ours.state_dict())
    rule = global_local_rule(4, positions, causal=causal)  # type: ignore[arg-type]
    pairs = list(zip(ours.parameters(), theirs.parameters(), strict=True))
    assert_parity(
        lambda x: ours(x, positions),
        lambda x: theirs(x, None, rule.dense(24)),
        [torch.randn(2, 24, 8)],
        parameters=pairs,
    )


@pytest.mark.parity(LONG)
def test_at_the_start_both_projections_agree() -> None:
    ours, shared = LongformerAttention(8, 2, window=4), LongformerAttention(8, 2, window=4, separate=False)
    shared.load_state_dict({k: v for k, v in ours.state_dict().items() if "_global" not in k})
    x = torch.randn(2, 24, 8)
    torch.testing.assert_close(ours(x, (0, 7)), shared(x, (0, 7)))


class Published(nn.Module):
    """transformers' LongformerSelfAttention and the output projection that follows it."""

    def __init__(self, ours: LongformerAttention) -> None:
        super().__init__()
        from transformers import LongformerConfig
        from transformers.models.longformer.modeling_longformer import LongformerSelfAttention

        config = LongformerConfig(
            hidden_size=ours.dim, num_attention_heads=ours.heads, attention_window=[2 * (ours.window - 1)],
            attention_probs_dropout_prob=0.0, num_hidden_layers=1,
        )  # fmt: skip
        self.inner, self.out = LongformerSelfAttention(config, 0).eval(), copy.deepcopy(ours.out_proj)
        for name, mine in (("query", "q"), ("key", "k"), ("value", "v")):
            getattr(self.inner, name).load_state_dict(getattr(ours, f"{mine}_proj").state_dict())
            getattr(self.inner, f"{name}_global").load_state_dict(getattr(ours, f"{mine}_global").state_dict())

    def forward(self, x: Tensor, marks: Tensor, real: Tensor) -> Tensor:
        mask = (marks.float() * 10000.0).masked_fill(~real, -10000.0)  # the model's own: > 0 global, < 0 absent
        return self.out(self.inner(x, mask, mask < 0, mask > 0, bool((mask > 0).any()))[0])


@pytest.mark.outside(LONG)
@pytest.mark.parametrize("kind", ["none", "first", "several", "of each sample"])
@pytest.mark.parametrize("lengths", [(24, 24), (24, 13)])
def test_equals_the_published_longformer(kind: str, lengths: tuple[int, int]) -> None:
    ours = scattered(LongformerAttention(12, 3, window=5), torch.float32)
    theirs = Published(ours)
    positions = {"none": (), "first": (0,), "several": (0, 2, 11), "of each sample": MARKS}[kind]
    marks = positions if isinstance(positions, Tensor) else torch.zeros(2, 24, dtype=torch.bool)
    if not isinstance(positions, Tensor):
        marks[:, list(positions)] = True
    real = torch.arange(24) < torch.tensor(lengths)[:, None]
    mask = padding(torch.tensor(lengths)) if min(lengths) < 24 else None
    pairs = [(getattr(ours, f"{a}{c}"), getattr(theirs.inner, f"{b}{d}")) for a, b in
             (("q", "query"), ("k", "key"), ("v", "value")) for c, d in (("_proj", ""), ("_global", "_global"))
             if positions != () and (len(positions) or c == "_proj")]  # fmt: skip
    assert_parity(
        lambda x: ours(x, positions, mask) * real[..., None],
        lambda x: theirs(x, marks, real) * real[..., None],
        [torch.randn(2, 24, 12)],
        parameters=[(a.weight, b.weight) for a, b in pairs],
        dtype=torch.float32,  # the published model's own: in float64 its padding overflows to NaN gradients
        rtol=1e-4,
        atol=1e-5,
    )


@pytest.mark.law(LONG)
def test_causal_means_causal_for_global_positions_too() -> None:
    layer = scattered(LongformerAttention(8, 2, window=3, causal=True))
    assert_causal(lambda x: layer(x, (0, 4)), torch.randn(2, 12, 8).double())
    with pytest.raises(AssertionError, match="changed with the input after it"):
        assert_causal(lambda x: scattered(LongformerAttention(8, 2, window=3))(x), torch.randn(2, 12, 8).double())


@pytest.mark.law(LONG)
def test_a_global_row_reads_everything_with_its_own_projections() -> None:
    layer, x = scattered(LongformerAttention(8, 2, window=2)), torch.randn(2, 24, 8).double()
    q, k, v = layer._project_global(x, (6,))
    row = scaled_dot_product_attention(q, k, v).flatten(2) @ layer.out_proj.weight.T + layer.out_proj.bias
    torch.testing.assert_close(layer(x, (6,))[:, 6:7], row)


@pytest.mark.registration(LONG)
def test_state_pickle_low_precision_and_empty_inputs() -> None:
    layer, x = LongformerAttention(8, 2, window=3), torch.randn(2, 9, 8)
    again = LongformerAttention(8, 2, window=3)
    again.load_state_dict(layer.state_dict())
    for other in (again, copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        torch.testing.assert_close(other(x), layer(x), rtol=0, atol=0)
    low = copy.deepcopy(layer).bfloat16()(x.bfloat16())
    assert low.dtype == torch.bfloat16
    torch.testing.assert_close(low.float(), layer(x), rtol=0.05, atol=0.05)
    for shape, positions in (((0, 5, 8), (0,)), ((2, 0, 8), ()), ((2, 1, 8), (0,)), ((2, 5, 8), range(5))):
        assert layer(torch.randn(shape), positions).shape == shape
    assert "window=3, separate=True" in layer.extra_repr()
    assert LongformerAttention(8, 2, window=3, device="meta").q_global.weight.is_meta


@pytest.mark.refusal(LONG)
def test_refusals() -> None:
    for n in (0, -1, 2.5, True):
        with refuses(ConfigError, "window", n):
            LongformerAttention(8, 2, window=n)  # type: ignore[arg-type]
    with refuses(ConfigError, "torch.int32"):
        LongformerAttention(8, 2, window=2, dtype=torch.int32)
    layer, x = LongformerAttention(8, 2, window=3), torch.randn(2, 9, 8)
    with refuses(ShapeError, "global position", 9):
        layer(x, (9,))
    with refuses(ConfigError, "position", -1):
        layer(x, (-1,))
    with refuses(ShapeError, "features", (2, 9, 7)):
        layer(torch.randn(2, 9, 7))
    with refuses(ConfigError, "mask", "Tensor"):
        layer(x, (0,), torch.ones(9, 9) > 0)  # type: ignore[arg-type]
    with refuses(ConfigError, "weights"):
        layer.weights(x)
    with refuses(ConfigError, "heads to prune", [1]):
        layer.prune_heads([1])
    LongformerAttention(8, 2, window=3, separate=False).prune_heads([1])


@pytest.mark.refusal("global-local-attention")
@pytest.mark.parametrize("positions", [5, None, [[0]], [1.0]])
def test_positions_of_the_wrong_kind_are_refused(positions: object) -> None:
    with refuses(ConfigError, "5" if positions == 5 else "None" if positions is None else str(positions[0])):  # type: ignore[index]
        LongformerAttention(8, 2, window=2)(torch.randn(1, 6, 8), positions)  # type: ignore[arg-type]
