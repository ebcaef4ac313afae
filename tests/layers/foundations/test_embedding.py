"""Embedding drops in for torch's: same options, first values, outputs, gradients, table and state dict."""

from __future__ import annotations

import copy
import inspect
import pickle

import pytest
import torch
from torch import nn

from handbook_src.errors import ConfigError, ShapeError
from handbook_src.layers.foundations.embedding import Embedding
from handbook_src.testing import refuses

OPTIONS = [
    {},
    {"padding_idx": 2},
    {"padding_idx": -1},
    {"max_norm": 1.0},
    {"max_norm": 2.0, "norm_type": 1.0, "padding_idx": 0},
    {"max_norm": 0.5, "norm_type": float("inf")},
    {"scale_grad_by_freq": True},
    {"scale_grad_by_freq": True, "padding_idx": 1, "max_norm": 1.0},
    {"sparse": True},
    {"sparse": True, "padding_idx": 1, "max_norm": 1.0},
]
EVERY = pytest.mark.parametrize("options", OPTIONS, ids=str)


def pair(*args: object, **options: object) -> tuple[Embedding, nn.Embedding]:
    """Our layer and torch's, drawn from the same generator state."""
    torch.manual_seed(0)
    mine = Embedding(*args, **options)
    torch.manual_seed(0)
    return mine, nn.Embedding(*args, **options)


# ---------------------------------------------------------------- parity
@pytest.mark.parity("embedding")
@EVERY
@pytest.mark.parametrize("backend", ["auto", "reference", "torch"])
def test_three_steps_are_torchs(options, backend):
    mine, theirs = pair(7, 3, dtype=torch.float64, **options)
    mine.backend = backend
    assert torch.equal(mine.weight, theirs.weight)
    for step in range(3):
        tokens = torch.randint(7, (2, 5), generator=torch.Generator().manual_seed(step))
        for layer in (mine, theirs):
            layer.zero_grad()
            layer(tokens).pow(3).sum().backward()
        torch.testing.assert_close(mine.weight.grad.to_dense(), theirs.weight.grad.to_dense(), rtol=1e-9, atol=1e-12)
        assert mine.weight.grad.layout == theirs.weight.grad.layout
        torch.testing.assert_close(mine.weight, theirs.weight, rtol=1e-9, atol=1e-12)
        for layer in (mine, theirs):
            torch.optim.SGD(layer.parameters(), lr=0.1).step()


@pytest.mark.parity("embedding")
@pytest.mark.parametrize("freeze", [True, False])
@EVERY
def test_from_pretrained_is_torchs(options, freeze):
    given = torch.randn(7, 3)
    mine, theirs = (house.from_pretrained(given.clone(), freeze, **options) for house in (Embedding, nn.Embedding))
    tokens = torch.tensor([[0, 6], [2, 2]])
    torch.testing.assert_close(mine(tokens), theirs(tokens))
    torch.testing.assert_close(mine.state_dict(), theirs.state_dict())
    assert mine.weight.requires_grad == theirs.weight.requires_grad != freeze
    assert (mine.num_embeddings, mine.embedding_dim, mine.padding_idx) == (7, 3, theirs.padding_idx)
    assert type(mine)(2, 2).weight.requires_grad


@pytest.mark.outside("embedding")
def test_gpt2s_table_of_the_published_model():
    from transformers import GPT2Config, GPT2Model

    theirs = GPT2Model(GPT2Config(vocab_size=17, n_positions=8, n_embd=4, n_layer=1, n_head=1)).wte
    mine = Embedding(17, 4)
    mine.load_state_dict(theirs.state_dict())
    tokens = torch.tensor([[3, 16, 0]])
    assert torch.equal(mine(tokens), theirs(tokens))


# ---------------------------------------------------------------- laws
@pytest.mark.law("embedding")
def test_the_padding_row_stays_zero_while_the_others_learn():
    layer = Embedding(5, 3, padding_idx=0)
    optimizer = torch.optim.Adam(layer.parameters(), lr=0.1)
    before = layer.weight.detach().clone()
    for _ in range(5):
        optimizer.zero_grad()
        (layer(torch.tensor([0, 1, 2, 0])) - 1).square().sum().backward()
        optimizer.step()
    assert (layer.weight[0] == 0).all()
    assert not torch.allclose(layer.weight[1], before[1], atol=0.1)
    assert torch.equal(layer.weight[3:], before[3:])  # never seen, never moved


@pytest.mark.law("embedding")
def test_a_pretrained_table_is_shared_not_copied():
    given = torch.randn(4, 2)
    layer = Embedding.from_pretrained(given)
    given[1] = 7
    assert (layer(torch.tensor(1)) == 7).all()


@pytest.mark.law("embedding")
def test_sparse_gradients_leave_other_rows_to_themselves():
    layer = Embedding(1000, 3, sparse=True)
    layer(torch.tensor([5, 9, 5])).sum().backward()
    assert layer.weight.grad.coalesce().indices().tolist() == [[5, 9]]


# ---------------------------------------------------------------- registration
@pytest.mark.registration("embedding")
@EVERY
def test_state_dict_arguments_and_repr(options):
    mine, theirs = pair(7, 3, **options)
    theirs.load_state_dict(mine.state_dict())
    mine.load_state_dict(nn.Embedding(7, 3).state_dict())
    assert repr(mine).split(",")[:2] == repr(theirs).split(",")[:2]
    for name in options:
        assert f"{name}=" in repr(mine)
    a, b = (inspect.signature(house).parameters for house in (Embedding, nn.Embedding))
    positional = [p for p in a if a[p].kind is not a[p].KEYWORD_ONLY]
    assert positional == list(b)[: len(positional)]
    a, b = (inspect.signature(house.from_pretrained).parameters for house in (Embedding, nn.Embedding))
    assert [(p.name, p.default) for p in a.values()] == [(p.name, p.default) for p in b.values()]


@pytest.mark.registration("embedding")
def test_copies_pickles_moves_and_compiles(unchecked):
    layer, tokens = Embedding(7, 3, padding_idx=1), torch.tensor([[0, 1], [6, 6]])
    y = layer(tokens)
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(other(tokens), y)
    torch._dynamo.reset()
    assert torch.equal(torch.compile(layer, fullgraph=True, backend="aot_eager")(tokens), y)
    for dtype in (torch.bfloat16, torch.float16):
        assert torch.equal(copy.deepcopy(layer).to(dtype)(tokens), y.to(dtype))
    meta = Embedding(7, 3, padding_idx=1, device="meta", dtype=torch.bfloat16)
    assert (meta.weight.device.type, meta.weight.dtype) == ("meta", torch.bfloat16)
    assert meta(tokens.to("meta")).shape == (2, 2, 3)


# ---------------------------------------------------------------- refusals
@pytest.mark.refusal("embedding")
@pytest.mark.parametrize("size", [0, -1, 2.5, True, float("nan"), "3", None])
def test_refuses_sizes(size):
    with refuses(ConfigError, "num_embeddings", repr(size)):
        Embedding(size, 3)
    with refuses(ConfigError, "embedding_dim", repr(size)):
        Embedding(3, size)


@pytest.mark.refusal("embedding")
def test_refuses_options():
    for options, values in [
        ({"padding_idx": 5}, ("padding_idx", 5, "-5 to 4")),
        ({"padding_idx": -6}, ("padding_idx", -6)),
        ({"padding_idx": 1.5}, ("padding_idx", 1.5)),
        ({"max_norm": -1.0}, ("max_norm", -1.0)),
        ({"max_norm": float("nan")}, ("max_norm", "nan")),
        ({"max_norm": 1.0, "norm_type": 0}, ("norm_type", 0)),
        ({"sparse": True, "scale_grad_by_freq": True}, ("sparse=True",)),
    ]:
        with refuses(ConfigError, *values):
            Embedding(5, 3, **options)
        with refuses(ConfigError, *values):
            Embedding.from_pretrained(torch.ones(5, 3), **options)
    with refuses(ShapeError, (5,), "two axes"):
        Embedding.from_pretrained(torch.ones(5))
    with refuses(ShapeError, "torch.int64"):
        Embedding.from_pretrained(torch.ones(5, 3, dtype=torch.long))
    with refuses(ConfigError, "num_embeddings", 0):
        Embedding.from_pretrained(torch.ones(0, 3))
    with pytest.raises(TypeError, match="padding_index"):
        Embedding(5, 3, padding_index=0)


@pytest.mark.refusal("embedding")
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_refuses_tokens(backend):
    layer = Embedding(5, 3)
    layer.backend = backend
    for bad, values in [
        (torch.tensor([1, 5]), ("token 5", "from 0 to 4")),
        (torch.tensor([-3]), ("token -3", "from 0 to 4")),
        (torch.tensor([1.0]), ("torch.float32", ".long()")),
        (torch.tensor([True]), ("torch.bool",)),
        (torch.tensor([1], dtype=torch.uint8), ("torch.uint8",)),
    ]:
        with refuses(ShapeError, *values):
            layer(bad)


@pytest.mark.refusal("embedding")
def test_tokens_without_data_find_no_rows():
    for layer, tokens in (
        (Embedding(3, 2), torch.tensor([1], device="meta")),
        (Embedding(3, 2, device="meta"), torch.tensor([1])),
    ):
        with refuses(ShapeError, "meta", "cpu"):
            layer(tokens)


@pytest.mark.refusal("embedding")
@pytest.mark.parametrize("dtype", [torch.int64, torch.complex64, torch.bool])
def test_refuses_parameters_that_are_not_floating(dtype):
    with refuses(ConfigError, "dtype", dtype):
        Embedding(2, 3, dtype=dtype)
