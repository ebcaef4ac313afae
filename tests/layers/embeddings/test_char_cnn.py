"""The character CNN as a layer: sizes of the papers, parts in order, refusals."""

from __future__ import annotations

import copy
import math
import pickle

import pytest
import torch
import torch.nn.functional as F

from handbook_src.errors import ConfigError, ShapeError
from handbook_src.functional.embeddings.char_cnn import word_bytes
from handbook_src.layers.embeddings.char_cnn import ELMO, KIM_SMALL, CharCNNEmbedding, Highway
from handbook_src.testing import assert_parity, refuses

SMALL = ((1, 2), (3, 4))


@pytest.mark.parity("char-cnn-embedding")
@pytest.mark.parametrize("highways", [0, 1, 2])
@pytest.mark.parametrize("dim", [None, 1, 7])
@pytest.mark.parametrize("activation", ["tanh", "relu"])
def test_the_parts_follow_each_other(highways, dim, activation) -> None:
    layer = CharCNNEmbedding(20, dim, SMALL, char_dim=5, highways=highways, activation=activation).double()

    def oracle(chars):
        rows = []
        for word in chars:  # each word alone, unpadded: torch's own operations
            x = layer.char_embedding(word[word != 0]).T[None]
            phi = getattr(torch, activation)
            y = torch.cat([phi(conv(x)).amax(-1) for conv in layer.convolutions], -1)
            for h in layer.highways:
                t = torch.sigmoid(h.gate(y))
                y = t * F.relu(h.transform(y)) + (1 - t) * y
            rows.append(y if layer.projection is None else layer.projection(y))
        return torch.cat(rows)

    chars = torch.tensor([[4, 9, 19, 1, 2, 7], [3, 3, 3, 0, 0, 0]])
    assert_parity(layer, oracle, [chars])
    mine = torch.autograd.grad(layer(chars).pow(2).sum(), list(layer.parameters()))
    theirs = torch.autograd.grad(oracle(chars).pow(2).sum(), list(layer.parameters()))
    torch.testing.assert_close(mine, theirs)


@pytest.mark.law("char-cnn-embedding")
def test_a_word_has_one_vector_however_far_it_is_padded() -> None:
    layer = CharCNNEmbedding(embedding_dim=8, filters=((2, 4), (7, 8))).double()
    alone = layer(word_bytes(["cat"]))
    for length in (5, 12, 50):
        torch.testing.assert_close(layer(word_bytes(["cat", "x"], length))[:1], alone)
    assert layer(word_bytes(["a", "b", "c", "d"], 9).view(2, 2, 9)).shape == (2, 2, 8)
    assert layer(word_bytes([])).shape == (0, 8)
    torch.testing.assert_close(layer(word_bytes(["cat"])[0]), alone[0])


@pytest.mark.law("char-cnn-embedding")
def test_the_papers_sizes() -> None:
    kim = CharCNNEmbedding(60)
    assert (kim.embedding_dim, len(kim.highways), kim.projection) == (525, 1, None)
    assert (sum(n for _, n in KIM_SMALL), sum(n for _, n in ELMO)) == (525, 2048)
    assert [width for width, _ in ELMO] == [1, 2, 3, 4, 5, 6, 7]
    assert (kim.highways[0].gate.bias == -2).all()
    kim.highways[0].gate.bias.data.zero_()
    kim.reset_parameters()
    assert (kim.highways[0].gate.bias == -2).all()
    assert (kim.char_embedding.weight[0] == 0).all()


@pytest.mark.registration("char-cnn-embedding")
def test_it_copies_compiles_and_halves(unchecked) -> None:
    layer, chars = CharCNNEmbedding(filters=SMALL, embedding_dim=3), word_bytes(["one", "seventeen"])
    y = layer(chars)
    other = CharCNNEmbedding(filters=SMALL, embedding_dim=3)
    other.load_state_dict(layer.state_dict())
    for twin in (other, copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(twin(chars), y)
    torch.testing.assert_close(torch.compile(layer, fullgraph=True, backend="eager")(chars), y)
    for dtype in (torch.bfloat16, torch.float16):
        assert (copy.deepcopy(layer).to(dtype)(chars) - y).abs().max() < 0.05


@pytest.mark.refusal("char-cnn-embedding")
@pytest.mark.parametrize("bad", [0, -1, 1.5, True, math.nan])
def test_bad_sizes_are_refused(bad) -> None:
    for name in ("num_chars", "char_dim", "embedding_dim"):
        with refuses(ConfigError, name, repr(bad)):
            CharCNNEmbedding(**{name: bad})
    with refuses(ConfigError, "width", repr(bad)):
        CharCNNEmbedding(filters=[(bad, 3)])
    with refuses(ConfigError, "count", repr(bad)):
        CharCNNEmbedding(filters=[(3, bad)])
    with refuses(ConfigError, "dim", repr(bad)):
        Highway(bad)


@pytest.mark.refusal("char-cnn-embedding")
def test_bad_settings_are_refused() -> None:
    for bad in ([], 3, [3], [(1, 2, 3)]):
        with refuses(ConfigError, "filters", repr(bad)):
            CharCNNEmbedding(filters=bad)
    with refuses(ConfigError, "highways", -1):
        CharCNNEmbedding(highways=-1)
    with refuses(ConfigError, "'gelu'"):
        CharCNNEmbedding(activation="gelu")
    with refuses(ConfigError, "padding_idx", "None"):
        CharCNNEmbedding(padding_idx=None)
    with refuses(ConfigError, "padding_idx", 300):
        CharCNNEmbedding(padding_idx=300)
    with refuses(ShapeError, "token 259", 258):
        CharCNNEmbedding()(torch.tensor([[259]]))
    with refuses(ShapeError, (2, 3), 4):
        Highway(4)(torch.ones(2, 3))
