"""The perceptron against a composition of torch's layers, and what the activation is there for."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from handbook_src.errors import ConfigError, ShapeError
from handbook_src.layers.foundations.mlp import MLP
from handbook_src.testing import assert_batch_independent, assert_parity, oracle, refuses

ID = "mlp"
ACTIVATIONS = {
    "class": nn.GELU,
    "module": nn.Tanh(),
    "function": F.silu,
    "lambda": lambda x: x.relu() ** 2,
    "learned": nn.PReLU,
}


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def linears(module: nn.Module, kind: type[nn.Module]) -> list[nn.Module]:
    return [m for m in module.modules() if isinstance(m, kind)]


def composed(mlp: MLP, activation: object) -> nn.Module:
    """The same perceptron from torch.nn's parts, with the weights copied across."""
    parts: list[nn.Module] = []
    for layer in mlp.layers:
        copied = nn.Linear(layer.in_features, layer.out_features, layer.bias is not None, dtype=layer.weight.dtype)
        copied.load_state_dict(layer.state_dict())
        parts.append(copied)

    class Composed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.parts = nn.ModuleList(parts)

        def forward(self, x: Tensor) -> Tensor:
            for part in self.parts[:-1]:
                x = activation(part(x))
            return self.parts[-1](x)

    return Composed()


# ---------------------------------------------------------------- parity
@pytest.mark.parity(ID)
@pytest.mark.parametrize("name", ACTIVATIONS)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("hidden", [1, 7, (7,), (3, 5), [2, 1, 4], ()])
@pytest.mark.parametrize("lead", [(), (1,), (4,), (2, 3), (0,)])
def test_equals_the_composition(lead, hidden, bias, name):
    given = ACTIVATIONS[name]
    mine = MLP(5, hidden, 3, given, bias=bias, dtype=torch.float64)
    plain = nn.PReLU(dtype=torch.float64) if name == "learned" else given() if isinstance(given, type) else given
    theirs = composed(mine, plain)
    pairs = [(p, q) for a, b in zip(mine.layers, linears(theirs, nn.Linear), strict=True)
             for p, q in zip(a.parameters(), b.parameters(), strict=True)]  # fmt: skip
    assert_parity(mine, theirs, [draw(*lead, 5)], parameters=pairs)


@pytest.mark.outside(ID)
@pytest.mark.parametrize("hidden", [[7, 3], [5, 6, 2]])
def test_equals_torchvisions(hidden):
    theirs = oracle.load("torchvision").ops.MLP(4, hidden, activation_layer=nn.ReLU, inplace=None).double()
    mine = MLP(4, hidden[:-1], hidden[-1], nn.ReLU, dtype=torch.float64)
    for a, b in zip(mine.layers, linears(theirs, nn.Linear), strict=True):
        a.load_state_dict(b.state_dict())
    assert_parity(mine, theirs, [draw(2, 4)])


@pytest.mark.outside(ID)
def test_equals_timms_and_gpt2s():
    from timm.layers import Mlp
    from transformers import GPT2Config
    from transformers.models.gpt2.modeling_gpt2 import GPT2MLP

    timm, gpt2 = Mlp(6, 24).double(), GPT2MLP(24, GPT2Config(n_embd=6, resid_pdrop=0.0)).double()
    mine = MLP(6, 24, dtype=torch.float64)
    for a, b in zip(mine.layers, (timm.fc1, timm.fc2), strict=True):
        a.load_state_dict(b.state_dict())
    assert_parity(mine, timm, [draw(2, 3, 6)])
    tanh = MLP(6, 24, activation=nn.GELU(approximate="tanh"), dtype=torch.float64)
    for a, b in zip(tanh.layers, (gpt2.c_fc, gpt2.c_proj), strict=True):
        a.load_state_dict({"weight": b.weight.T, "bias": b.bias})  # Conv1D stores the transpose
    assert_parity(tanh, gpt2, [draw(2, 3, 6)])


# ---------------------------------------------------------------- laws
@pytest.mark.law(ID)
def test_without_an_activation_it_is_one_linear_map():
    mlp = MLP(5, (7, 6), 3, lambda x: x, dtype=torch.float64)
    a, b, c = mlp.layers
    bias = c.weight @ (b.weight @ a.bias + b.bias) + c.bias
    torch.testing.assert_close(mlp(draw(4, 5)), F.linear(draw(4, 5), c.weight @ b.weight @ a.weight, bias))


@pytest.mark.law(ID)
def test_two_relus_make_an_absolute_value_which_no_linear_map_does():
    mlp = MLP(1, 2, 1, nn.ReLU, bias=False, dtype=torch.float64)
    mlp.layers[0].weight.data = torch.tensor([[1.0], [-1.0]]).double()
    mlp.layers[1].weight.data = torch.tensor([[1.0, 1.0]]).double()
    torch.testing.assert_close(mlp(draw(9, 1)), draw(9, 1).abs())


@pytest.mark.law(ID)
def test_the_order_of_the_hidden_units_does_not_matter():
    mlp, order = MLP(5, 7, 3, dtype=torch.float64), torch.randperm(7)
    other = copy.deepcopy(mlp)
    other.layers[0].weight.data, other.layers[0].bias.data = mlp.layers[0].weight[order], mlp.layers[0].bias[order]
    other.layers[1].weight.data = mlp.layers[1].weight[:, order]
    torch.testing.assert_close(other(draw(4, 5)), mlp(draw(4, 5)))


@pytest.mark.law(ID)
def test_a_position_does_not_see_the_others():
    assert_batch_independent(MLP(5, 7, 3, dtype=torch.float64), draw(4, 5))


@pytest.mark.law(ID)
def test_dropout_acts_in_training_on_the_hidden_numbers_alone():
    mlp, sure = MLP(5, 4000, 1, F.relu, dropout=0.5), MLP(5, 4000, 1, F.relu)
    sure.load_state_dict(mlp.state_dict())
    x = draw(3, 5).float()
    assert not torch.allclose(mlp(x), mlp(x))
    torch.testing.assert_close(mlp.eval()(x), sure(x))
    mlp.train()
    torch.testing.assert_close(torch.stack([mlp(x) for _ in range(300)]).mean(0), sure(x), rtol=0, atol=0.02)
    mlp.eval().dropout.train()  # Monte-Carlo dropout: all in evaluation but this
    assert not torch.allclose(mlp(x), mlp(x))
    single = MLP(5, (), 3, dropout=0.9)
    torch.testing.assert_close(single(x), single.layers[0](x))


# ---------------------------------------------------------------- registration
@pytest.mark.registration(ID)
def test_class_gives_each_layer_its_own_and_a_module_is_shared():
    own, shared = MLP(2, (3, 3), 1, nn.PReLU), MLP(2, (3, 3), 1, nn.PReLU())
    assert own.activations[0].weight is not own.activations[1].weight
    assert shared.activations[0].weight is shared.activations[1].weight
    assert len(list(shared.parameters())) == len(list(own.parameters())) - 1
    made = MLP(2, 3, 1, nn.PReLU, device="meta", dtype=torch.bfloat16)
    assert {(p.device.type, p.dtype) for p in made.parameters()} == {("meta", torch.bfloat16)}
    assert MLP(6, 3).layers[-1].out_features == 6


@pytest.mark.registration(ID)
@pytest.mark.parametrize("activation", [nn.GELU, F.gelu, nn.PReLU])
def test_copies_pickles_compiles_and_halves(activation, unchecked):
    mlp, x = MLP(5, (7, 6), 3, activation), draw(4, 5).float()
    fresh = MLP(5, (7, 6), 3, activation)
    fresh.load_state_dict(mlp.state_dict())
    for other in (copy.deepcopy(mlp), pickle.loads(pickle.dumps(mlp)), fresh):
        torch.testing.assert_close(other(x), mlp(x))
    torch._dynamo.reset()
    torch.testing.assert_close(torch.compile(mlp, fullgraph=True, backend="aot_eager")(x), mlp(x))
    for dtype in (torch.bfloat16, torch.float16):
        half = copy.deepcopy(mlp).to(dtype)(x.to(dtype))
        torch.testing.assert_close(half.float(), mlp(x), rtol=0.05, atol=0.03)
    mlp.reset_parameters()
    assert not torch.equal(mlp.layers[0].weight, fresh.layers[0].weight)
    assert "gelu" in repr(mlp).lower() or activation is nn.PReLU


# ---------------------------------------------------------------- refusals
@pytest.mark.refusal(ID)
@pytest.mark.parametrize("size", [0, -1, 2.5, True, float("nan"), "3"])
def test_refuses_sizes(size):
    with refuses(ConfigError, "in_features", repr(size)):
        MLP(size, 3, 2)
    with refuses(ConfigError, "hidden", repr(size)):
        MLP(3, size, 2)
    with refuses(ConfigError, "hidden", repr(size)):
        MLP(3, (4, size), 2)
    with refuses(ConfigError, "out_features", repr(size)):
        MLP(3, 4, size)


@pytest.mark.refusal(ID)
def test_refuses_settings_and_inputs():
    for dropout in (-0.1, 1.0, float("nan")):
        with refuses(ConfigError, "dropout", dropout):
            MLP(3, 4, 2, dropout=dropout)
    for activation in ("relu", None, 3):
        with refuses(ConfigError, "activation", repr(activation)):
            MLP(3, 4, 2, activation)
    for kind in (int, nn.MultiheadAttention):
        with refuses(ConfigError, "activation", kind.__name__):
            MLP(3, 4, 2, kind)
    for dtype in (torch.int64, torch.complex64):
        with refuses(ConfigError, dtype):
            MLP(3, 4, 2, dtype=dtype)
    mlp = MLP(3, 4, 2)
    for x, values in [
        (torch.ones(2, 4), (4, 3)),
        (torch.ones(()), ("()",)),
        (torch.ones(2, 3).long(), ("torch.int64",)),
        (torch.ones(2, 3).double(), ("torch.float64", "torch.float32")),
    ]:
        with refuses(ShapeError, *values):
            mlp(x)
