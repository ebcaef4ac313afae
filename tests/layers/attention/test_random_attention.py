"""BigBird's layer against the published model, with its weights and its drawn blocks copied."""

from __future__ import annotations

import copy
import pickle

import numpy as np
import pytest
import torch
from einops import rearrange
from torch import Tensor

from handbook_src.errors import ConfigError, ShapeError
from handbook_src.functional.attention.mask import causal, padding
from handbook_src.functional.attention.random_attention import bigbird_layout, random_attention
from handbook_src.layers.attention.attention import MultiHeadAttention
from handbook_src.layers.attention.random_attention import BigBirdAttention
from handbook_src.testing import assert_batch_independent, assert_causal, assert_parity, refuses

BIGBIRD = "random-attention"
BLOCK, BLOCKS = 4, 12


@pytest.mark.parity(BIGBIRD)
@pytest.mark.parametrize("t", [1, 13, 48])
@pytest.mark.parametrize("padded", [False, True])
def test_equals_the_dense_layer(t: int, padded: bool) -> None:
    ours = BigBirdAttention(8, 2, block_size=BLOCK, random=2, seed=3).double()
    theirs = MultiHeadAttention(8, 2).double()
    theirs.load_state_dict(ours.state_dict())
    rule = padding(torch.tensor([t, 1])) if padded else None
    mask = (
        bigbird_layout(-(-t // BLOCK), random=2, seed=3).repeat_interleave(BLOCK, 0).repeat_interleave(BLOCK, 1)[:t, :t]
    )
    mask = mask & rule.dense(t) if rule is not None else mask
    assert_parity(
        lambda x: (ours(x, rule), ours.weights(x, rule)),
        lambda x: (theirs(x, None, mask), theirs.weights(x, None, mask)),
        [torch.randn(2, t, 8)],
        parameters=list(zip(ours.parameters(), theirs.parameters(), strict=True)),
    )


def published(ours: BigBirdAttention, training: bool):
    """transformers' BigBirdBlockSparseAttention with our weights, and the blocks that it draws, ``h n r``."""
    from transformers import BigBirdConfig
    from transformers.models.big_bird.modeling_big_bird import BigBirdBlockSparseAttention

    config = BigBirdConfig(
        hidden_size=ours.dim, num_attention_heads=ours.heads, block_size=BLOCK, num_random_blocks=ours.random,
        max_position_embeddings=BLOCK * BLOCKS, attention_probs_dropout_prob=0.0, use_bias=True,
    )  # fmt: skip
    theirs = BigBirdBlockSparseAttention(config, seed=5).double().train(training)
    for name, mine in (("query", "q_proj"), ("key", "k_proj"), ("value", "v_proj")):
        getattr(theirs, name).load_state_dict(getattr(ours, mine).state_dict())
    np.random.seed(5)
    length, picks = theirs._get_rand_attn_plan(BLOCK * BLOCKS, BLOCK, ours.random)
    drawn = theirs._bigbird_block_rand_mask_with_head(
        BLOCK * BLOCKS, BLOCK * BLOCKS, BLOCK, BLOCK, ours.heads, length, picks
    )
    ones = torch.ones(2, 1, BLOCK * BLOCKS, 1).double()
    blocked = torch.ones(2, BLOCKS, BLOCK).double()
    band = torch.ones(2, 1, BLOCKS - 4, BLOCK, 3 * BLOCK).double()
    return lambda x: theirs(x, band, ones, ones.transpose(2, 3), blocked, blocked)[0], drawn


@pytest.mark.outside(BIGBIRD)
def test_equals_the_published_bigbird_given_its_blocks() -> None:
    ours = BigBirdAttention(12, 3, block_size=BLOCK, random=2).double()
    theirs, drawn = published(ours, training=True)
    layout = torch.stack([bigbird_layout(BLOCKS, random=0) for _ in range(3)])
    for head, rows in enumerate(drawn):
        for i, row in enumerate(rows):
            assert not layout[head, i + 1, row.tolist()].any(), "what is drawn is not seen otherwise"
            layout[head, i + 1, row.tolist()] = True

    def attend(x: Tensor) -> Tensor:
        out = random_attention(*ours._project(x, None, None), block_size=BLOCK, layout=layout)
        return rearrange(out, "b t h e -> b t (h e)")

    assert_parity(attend, theirs, [torch.randn(2, BLOCK * BLOCKS, 12)])


@pytest.mark.outside(BIGBIRD)
def test_in_evaluation_the_published_one_draws_nothing_and_counts_block_zero_again() -> None:
    """Its drawn blocks are then all block 0, whose keys weigh 1 + r times: a layout can't say that, and need not."""
    ours = BigBirdAttention(12, 3, block_size=BLOCK, random=2).double()
    theirs, drawn = published(ours, training=False)
    assert not np.any(drawn)
    x = torch.randn(2, BLOCK * BLOCKS, 12).double()
    q, k, v = ours._project(x, None, None)
    allowed = bigbird_layout(BLOCKS, random=0).repeat_interleave(BLOCK, 0).repeat_interleave(BLOCK, 1)
    scores = torch.einsum("bthe,bshe->bhts", q, k) / 2.0
    scores[:, :, BLOCK:-BLOCK, :BLOCK] += np.log(3.0)
    weights = scores.masked_fill(~allowed, -torch.inf).softmax(-1)
    torch.testing.assert_close(theirs(x), torch.einsum("bhts,bshe->bthe", weights, v).flatten(2))


@pytest.mark.law(BIGBIRD)
def test_samples_don_t_mix_the_draw_does_not_change_and_a_causal_rule_joins() -> None:
    layer, x = BigBirdAttention(8, 2, block_size=BLOCK).double(), torch.randn(2, 30, 8).double()
    assert_batch_independent(layer, x)
    torch.testing.assert_close(layer(x), layer.eval()(x), rtol=0, atol=0)
    assert_causal(lambda x: layer(x, causal), x)


@pytest.mark.registration(BIGBIRD)
def test_state_pickle_low_precision_and_empty_inputs() -> None:
    layer, x = BigBirdAttention(8, 2, block_size=BLOCK, seed=4), torch.randn(2, 30, 8)
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        torch.testing.assert_close(other(x), layer(x), rtol=0, atol=0)
    low = copy.deepcopy(layer).bfloat16()(x.bfloat16())
    assert low.dtype == torch.bfloat16
    torch.testing.assert_close(low.float(), layer(x), rtol=0.05, atol=0.05)
    for shape in ((0, 5, 8), (2, 0, 8), (2, 1, 8)):
        assert layer(torch.randn(shape)).shape == shape
    assert "block_size=4, window=3, random=3, ends=1, seed=4" in layer.extra_repr()
    assert BigBirdAttention(8, 2, dtype=torch.float64).q_proj.weight.dtype == torch.float64


@pytest.mark.refusal(BIGBIRD)
def test_refusals() -> None:
    for name, bad in (("block_size", 0), ("window", 2), ("random", -1), ("ends", 0.5), ("seed", -1), ("window", True)):
        with refuses(ConfigError, name, bad):
            BigBirdAttention(8, 2, **{name: bad})  # type: ignore[arg-type]
    layer = BigBirdAttention(8, 2)
    with refuses(ShapeError, "features", (2, 9, 7)):
        layer(torch.randn(2, 9, 7))
    for call in (layer, layer.weights):
        with refuses(ConfigError, "mask", "Tensor"):
            call(torch.randn(2, 9, 8), torch.ones(9, 9) > 0)
    with refuses(ConfigError, "torch.int64"):
        BigBirdAttention(8, 2, dtype=torch.int64)
