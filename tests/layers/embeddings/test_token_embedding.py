"""BERT's embedding is transformers', the scaled one Bart's and Gemma's; state dicts, starts, refusals."""

from __future__ import annotations

import copy
import math
import pickle

import pytest
import torch

from handbook_src.errors import ConfigError, ShapeError
from handbook_src.layers.embeddings.token_embedding import ScaledEmbedding, TokenPositionSegmentEmbedding
from handbook_src.testing import assert_parity, oracle, refuses

ID = "token-position-segment-embedding"


def berts(**changes):
    transformers = oracle.load("transformers")
    settings = {"vocab_size": 23, "hidden_size": 12, "max_position_embeddings": 9, "type_vocab_size": 3,
                "num_attention_heads": 2, "hidden_dropout_prob": 0.0, "pad_token_id": 1}  # fmt: skip
    module = transformers.models.bert.modeling_bert.BertEmbeddings(transformers.BertConfig(**settings | changes))
    for p in module.parameters():
        p.data = torch.randn_like(p)
    return module.double()


def ours(theirs, **options):
    mine = TokenPositionSegmentEmbedding(23, 12, context=9, segments=3, padding_idx=1, dropout=0.0, **options).double()
    assert list(mine.state_dict()) == list(theirs.state_dict())
    mine.load_state_dict(theirs.state_dict())
    return mine


@pytest.mark.outside(ID)
@pytest.mark.parity(ID)
@pytest.mark.parametrize(("b", "t"), [(1, 1), (3, 7), (2, 9)])
@pytest.mark.parametrize("kind", ["plain", "segments", "positions", "past", "vectors"])
def test_it_is_transformers_bert_embedding(b, t, kind) -> None:
    theirs = berts(layer_norm_eps=1e-5 if kind == "segments" else 1e-12)
    mine = ours(theirs, eps=1e-5 if kind == "segments" else 1e-12)
    ids = torch.randint(23, (b, t))
    ids[:, -1] = 1  # the padding token
    past = 9 - t if kind == "past" else 0
    options = {
        "token_type_ids": torch.randint(3, (b, t)) if kind in ("segments", "vectors") else None,
        "position_ids": torch.randint(9, (b, t)) if kind == "positions" else None,
    }

    def run(module):
        if kind == "vectors":
            return lambda x: module(None, **options, inputs_embeds=x)
        return lambda ids: module(ids, **options, past_key_values_length=past)

    pairs = list(zip(mine.parameters(), theirs.parameters(), strict=True))
    given = torch.randn(b, t, 12) if kind == "vectors" else ids
    assert_parity(run(mine), run(theirs), [given], parameters=pairs, rtol=1e-8, atol=1e-10)


@pytest.mark.law(ID)
def test_the_start_is_berts() -> None:
    layer = TokenPositionSegmentEmbedding(4000, 64, padding_idx=3)
    for table in (layer.word_embeddings, layer.position_embeddings):
        assert table.weight.abs().max() <= 0.04
        assert abs(table.weight.std() - 0.0176) < 0.001  # a normal cut at two deviations keeps 0.88 of its own
    assert (layer.word_embeddings.weight[3] == 0).all()
    layer.reset_parameters()
    assert (layer.word_embeddings.weight[3] == 0).all()
    dropped = TokenPositionSegmentEmbedding(50, 64, dropout=0.5)
    share = (dropped(torch.randint(50, (8, 64))) == 0).float().mean()
    assert 0.45 < share < 0.55
    assert torch.equal(
        dropped.eval()(torch.ones(1, 2, dtype=torch.long))[0, 0], dropped(torch.ones(1, 1, dtype=torch.long))[0, 0]
    )


@pytest.mark.registration(ID)
def test_bert_embedding_copies_compiles_and_halves(unchecked) -> None:
    layer = TokenPositionSegmentEmbedding(23, 12, context=9, dropout=0.0)
    ids = torch.randint(23, (2, 5))
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(other(ids), layer(ids))
    torch.testing.assert_close(torch.compile(layer, fullgraph=True, backend="eager")(ids), layer(ids))
    exact = layer(ids)
    for dtype in (torch.bfloat16, torch.float16):
        half = copy.deepcopy(layer).to(dtype)(ids)
        assert half.dtype == dtype
        assert (half - exact).abs().max() < 0.05
    with torch.autocast("cpu", torch.bfloat16):
        assert (layer(ids) - exact).abs().max() < 0.05
    assert TokenPositionSegmentEmbedding(5, 4, device="meta")(
        torch.zeros(1, 2, dtype=torch.long, device="meta")
    ).is_meta


@pytest.mark.refusal(ID)
@pytest.mark.parametrize("name", ["vocab_size", "dim", "context", "segments"])
@pytest.mark.parametrize("bad", [0, -1, 1.5, True])
def test_bad_sizes_are_refused(name, bad) -> None:
    with refuses(ConfigError, name, repr(bad)):
        TokenPositionSegmentEmbedding(**{"vocab_size": 5, "dim": 4} | {name: bad})


@pytest.mark.refusal(ID)
def test_bad_settings_are_refused() -> None:
    for bad in (-0.1, 1.0, math.nan):
        with refuses(ConfigError, "dropout", bad):
            TokenPositionSegmentEmbedding(5, 4, dropout=bad)
    with refuses(ConfigError, "eps", -1.0):
        TokenPositionSegmentEmbedding(5, 4, eps=-1.0)
    with refuses(ConfigError, "padding_idx", 5):
        TokenPositionSegmentEmbedding(5, 4, padding_idx=5)
    with refuses(ShapeError, "513 tokens", 512):
        TokenPositionSegmentEmbedding(5, 4)(torch.zeros(1, 513, dtype=torch.long))


# ---------------------------------------------------------------- scaled
@pytest.mark.outside("scaled-embedding")
@pytest.mark.parity("scaled-embedding")
@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("whose", ["bart", "gemma3"])
def test_scaled_is_transformers(backend, whose) -> None:
    models = oracle.load("transformers").models
    if whose == "bart":
        kind = models.bart.modeling_bart.BartScaledWordEmbedding
    else:
        kind = models.gemma3.modeling_gemma3.Gemma3TextScaledWordEmbedding
    theirs = kind(11, 9, 2, embed_scale=3.0).double()
    mine = ScaledEmbedding(11, 9, padding_idx=2, dtype=torch.float64, backend=backend)
    mine.load_state_dict(theirs.state_dict())
    assert_parity(mine, theirs, [torch.randint(11, (3, 4))], parameters=[(mine.weight, theirs.weight)])


@pytest.mark.law("scaled-embedding")
def test_one_table_serves_both_ends() -> None:
    layer = ScaledEmbedding(2000, 64, padding_idx=5)
    y = layer(torch.arange(2000))
    assert abs(y.std() - 1) < 0.02
    assert (y[5] == 0).all()
    x = torch.randn(3, 64)
    torch.testing.assert_close(layer.logits(x), x @ layer.weight.T)
    assert abs(layer.logits(torch.randn(200, 64)).std() - 1) < 0.05  # unit vectors in, unit scores out
    layer.logits(layer(torch.tensor([1]))).sum().backward()
    assert (layer.weight.grad[7] != 0).any()  # by the output alone


@pytest.mark.registration("scaled-embedding")
def test_scaled_keeps_state_and_compiles(unchecked) -> None:
    layer, plain = ScaledEmbedding(11, 9), torch.nn.Embedding(11, 9)
    plain.load_state_dict(layer.state_dict())
    layer.load_state_dict(plain.state_dict())
    ids = torch.randint(11, (2, 3))
    torch.testing.assert_close(layer(ids), plain(ids) * 3)
    torch.testing.assert_close(torch.compile(layer, fullgraph=True, backend="eager")(ids), layer(ids))
    assert torch.equal(pickle.loads(pickle.dumps(layer))(ids), copy.deepcopy(layer)(ids))
    assert repr(layer) == "ScaledEmbedding(11, 9, scale=3)"


@pytest.mark.refusal("scaled-embedding")
def test_scaled_refuses() -> None:
    for bad in (0, -1, 1.5, True):
        with refuses(ConfigError, "num_embeddings", repr(bad)):
            ScaledEmbedding(bad, 4)
        with refuses(ConfigError, "embedding_dim", repr(bad)):
            ScaledEmbedding(4, bad)
    for bad in (0.0, -2.0, math.nan):
        with refuses(ConfigError, "scale", bad):
            ScaledEmbedding(4, 4, scale=bad)
    with refuses(ConfigError, "padding_idx", 4):
        ScaledEmbedding(4, 4, padding_idx=4)
    with refuses(ShapeError, (2, 3), 4):
        ScaledEmbedding(4, 4).logits(torch.ones(2, 3))
    with refuses(ShapeError, "torch.int64"):
        ScaledEmbedding(4, 4).logits(torch.ones(2, 4, dtype=torch.long))


@pytest.mark.refusal("scaled-embedding")
def test_logits_of_another_dtype_are_refused() -> None:
    with refuses(ShapeError, "logits", torch.float64, torch.float32):
        ScaledEmbedding(5, 4).logits(torch.ones(2, 4, dtype=torch.float64))
