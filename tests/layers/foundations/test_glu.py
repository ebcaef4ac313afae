"""The gated feed-forward layer is LLaMA's and T5's, with their weights."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch

from handbook_src.errors import ConfigError, ShapeError
from handbook_src.functional.foundations.glu import GATES, gated
from handbook_src.layers.foundations.glu import GatedFeedForward
from handbook_src.testing import assert_batch_independent, assert_parity, oracle, refuses

BACKENDS = ["auto", "reference", "torch"]


def draw(*shape):
    return torch.randn(shape, dtype=torch.float64)


# ---------------------------------------------------------------- outside
@pytest.mark.outside("glu")
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(
    ("activation", "theirs"), [("silu", "silu"), ("gelu", "gelu"), ("gelu_tanh", "gelu_pytorch_tanh"), ("relu", "relu")]
)
def test_it_is_llamas(activation, theirs, bias, backend):
    """Same keys, so the checkpoint loads as it is."""
    llama = oracle.load("transformers.models.llama.modeling_llama")
    config = llama.LlamaConfig(
        hidden_size=6, intermediate_size=11, hidden_act=theirs, mlp_bias=bias, num_attention_heads=1
    )
    mlp = llama.LlamaMLP(config).double()
    ours = GatedFeedForward(6, 11, activation, bias=bias, backend=backend).double()
    ours.load_state_dict(mlp.state_dict())
    pairs = list(zip(ours.parameters(), mlp.parameters(), strict=True))
    for shape in [(2, 5, 6), (1, 6), (6,), (2, 0, 6)]:
        assert_parity(ours, mlp, [draw(*shape)], parameters=pairs)


@pytest.mark.outside("glu")
@pytest.mark.parametrize("backend", BACKENDS)
def test_it_is_t5s(backend):
    t5 = oracle.load("transformers.models.t5.modeling_t5")
    config = t5.T5Config(d_model=6, d_ff=11, feed_forward_proj="gated-gelu", dropout_rate=0.0)
    theirs = t5.T5DenseGatedActDense(config).double()
    ours = GatedFeedForward(6, 11, "gelu_tanh", backend=backend).double()
    names = {"wi_0": "gate_proj", "wi_1": "up_proj", "wo": "down_proj"}
    ours.load_state_dict({f"{names[k.partition('.')[0]]}.weight": v for k, v in theirs.state_dict().items()})
    pairs = list(zip(ours.parameters(), theirs.parameters(), strict=True))
    assert_parity(ours, theirs, [draw(2, 5, 6)], parameters=pairs)


# ---------------------------------------------------------------- parity
@pytest.mark.parity("glu")
@pytest.mark.parametrize("activation", GATES)
@pytest.mark.parametrize(("dim", "hidden"), [(1, 1), (4, 3), (5, 8)])
def test_it_is_the_formula(activation, dim, hidden):
    layer = GatedFeedForward(dim, hidden, activation, bias=True).double()

    def formula(x, *w):
        product = gated(x @ w[0].T + w[1], x @ w[2].T + w[3], activation, backend="reference")
        return product @ w[4].T + w[5]

    def ours(x, *w):
        names = [name for name, _ in layer.named_parameters()]
        return torch.func.functional_call(layer, dict(zip(names, w, strict=True)), (x,))

    assert_parity(ours, formula, [draw(3, dim), *(draw(*p.shape) for p in layer.parameters())])


# ---------------------------------------------------------------- laws
@pytest.mark.law("glu")
def test_samples_and_positions_stay_apart():
    layer = GatedFeedForward(4, 6).double()
    assert_batch_independent(layer, draw(3, 2, 4))
    x = draw(2, 5, 4)
    torch.testing.assert_close(layer(x)[:, 2], layer(x[:, 2]))


@pytest.mark.law("glu")
@pytest.mark.parametrize("activation", ["relu", "gelu", "gelu_tanh", "silu"])
def test_without_a_signal_there_is_no_output(activation):
    """Zero in, zero out, and the gradient vanishes too: both factors are zero."""
    layer = GatedFeedForward(4, 6, activation).double()
    x = torch.zeros(3, 4, dtype=torch.float64, requires_grad=True)
    y = layer(x)
    assert torch.equal(y, torch.zeros_like(y))
    assert torch.equal(torch.autograd.grad(y.sum(), x)[0], torch.zeros_like(x))


@pytest.mark.law("glu")
def test_dropout_falls_on_the_product_and_only_in_training():
    layer = GatedFeedForward(4, 64, dropout=0.5)
    torch.nn.init.zeros_(layer.down_proj.weight)
    layer.down_proj.weight.data[0] = 1.0
    x = torch.ones(1, 4)
    product = gated(layer.gate_proj(x), layer.up_proj(x))
    outputs = torch.stack([layer(x)[0, 0] for _ in range(200)])
    assert outputs.std() > 0.01 * product.norm()
    assert (outputs.mean() - product.sum()).abs() < 5 * product.norm() / 200**0.5
    layer.eval()
    assert torch.equal(layer(x), layer(x))
    torch.testing.assert_close(layer(x)[0, 0], product.sum())


@pytest.mark.law("glu")
def test_reset_parameters_draws_as_linear_does():
    torch.manual_seed(3)
    layer = GatedFeedForward(4, 6)
    torch.manual_seed(3)
    want = [torch.nn.Linear(4, 6, bias=False), torch.nn.Linear(4, 6, bias=False), torch.nn.Linear(6, 4, bias=False)]
    for p, q in zip(layer.parameters(), want, strict=True):
        assert torch.equal(p, q.weight)
    torch.manual_seed(3)
    before = [p.clone() for p in layer.parameters()]
    layer.reset_parameters()
    assert all(torch.equal(a, b) for a, b in zip(before, layer.parameters(), strict=True))


# ---------------------------------------------------------------- registration
@pytest.mark.registration("glu")
def test_state_dict_copy_pickle_and_repr():
    layer = GatedFeedForward(4, 6, "gelu")
    assert list(layer.state_dict()) == ["gate_proj.weight", "up_proj.weight", "down_proj.weight"]
    x = torch.randn(2, 4)
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(twin(x), layer(x))
    assert "4, 6, activation='gelu', dropout=0.0" in repr(layer)
    assert GatedFeedForward(4, 6, device="meta", dtype=torch.float16).up_proj.weight.dtype == torch.float16
    assert GatedFeedForward(4, 6, device="meta")(x.to("meta")).shape == (2, 4)


@pytest.mark.registration("glu")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_and_autocast(dtype):
    layer, x = GatedFeedForward(8, 16), torch.randn(3, 8)
    want = layer(x)
    with torch.autocast("cpu", dtype):
        got = layer(x)
    assert got.dtype == dtype
    torch.testing.assert_close(got.float(), want, rtol=0.05, atol=0.02)
    got = copy.deepcopy(layer).to(dtype)(x.to(dtype))
    torch.testing.assert_close(got.float(), want, rtol=0.05, atol=0.02)


@pytest.mark.registration("glu")
def test_compiles_to_one_graph(unchecked):
    layer, x = GatedFeedForward(4, 6), torch.randn(2, 4)
    torch.testing.assert_close(torch.compile(layer, fullgraph=True, backend="aot_eager")(x), layer(x))


# ---------------------------------------------------------------- refusals
@pytest.mark.refusal("glu")
@pytest.mark.parametrize("wrong", [0, -3, 2.5, True, None])
def test_wrong_sizes_are_refused(wrong):
    with refuses(ConfigError, "dim", wrong):
        GatedFeedForward(wrong, 4)
    with refuses(ConfigError, "hidden_dim", wrong):
        GatedFeedForward(4, wrong)


@pytest.mark.refusal("glu")
def test_wrong_settings_are_refused():
    with refuses(ConfigError, "activation", "swish"):
        GatedFeedForward(4, 6, "swish")
    for wrong in (-0.1, 1.0, float("nan")):
        with refuses(ConfigError, "dropout", wrong):
            GatedFeedForward(4, 6, dropout=wrong)
    with refuses(ConfigError, "cuda", "reference"):
        GatedFeedForward(4, 6, backend="cuda")(torch.randn(2, 4))


@pytest.mark.refusal("glu")
def test_wrong_inputs_are_refused():
    layer = GatedFeedForward(4, 6)
    with refuses(ShapeError, "(2, 5)", "4 features"):
        layer(torch.randn(2, 5))
    with refuses(ShapeError, "()"):
        layer(torch.tensor(1.0))
    with refuses(ShapeError, "torch.int64"):
        layer(torch.ones(2, 4, dtype=torch.long))


@pytest.mark.refusal("glu")
@pytest.mark.parametrize("dtype", [torch.int64, torch.complex64, torch.bool])
def test_refuses_parameters_that_are_not_floating(dtype):
    with refuses(ConfigError, "dtype", dtype):
        GatedFeedForward(4, 8, dtype=dtype)


@pytest.mark.refusal("glu")
def test_refuses_an_input_of_another_dtype():
    with refuses(ShapeError, "torch.float32", "torch.float64"):
        GatedFeedForward(4, 8)(torch.ones(2, 4).double())
