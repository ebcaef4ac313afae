"""The activation layers drop in for torch's: same arguments, outputs, gradients and state dict."""

from __future__ import annotations

import copy
import inspect
import math
import pickle

import pytest
import torch
from torch import Tensor, nn

from handbook_src.errors import ConfigError, KernelUnavailable, ShapeError
from handbook_src.layers.activations import activation as ours
from handbook_src.testing import assert_parity, refuses

IDS = ("relu", "leaky-relu", "prelu", "elu", "selu", "gelu", "silu", "mish", "sigmoid", "tanh", "hardswish")
#: name and the settings to try
EVERY = {
    "ReLU": [{}],
    "LeakyReLU": [{}, {"negative_slope": 0.2}],
    "PReLU": [{}, {"num_parameters": 4}, {"num_parameters": 4, "init": 0.1}],
    "ELU": [{}, {"alpha": 0.5}],
    "SELU": [{}],
    "AlphaDropout": [{}, {"p": 0.1}],
    "GELU": [{}, {"approximate": "tanh"}],
    "SiLU": [{}],
    "Mish": [{}],
    "Sigmoid": [{}],
    "Tanh": [{}],
    "Hardsigmoid": [{}],
    "Hardswish": [{}],
}
CASES = [(name, options) for name, all_options in EVERY.items() for options in all_options]
CASE = pytest.mark.parametrize(("name", "options"), CASES, ids=[f"{n}-{o}" for n, o in CASES])
NAMES = pytest.mark.parametrize("name", EVERY)
INPLACE = [n for n in EVERY if "inplace" in inspect.signature(getattr(nn, n)).parameters]


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 3


def build(name: str, **options: object) -> nn.Module:
    return getattr(ours, name)(**options).double()


# ---------------------------------------------------------------- parity
@pytest.mark.parity(*IDS)
@CASE
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_is_torchs(name, options, backend):
    mine, theirs = build(name, **options, backend=backend), getattr(nn, name)(**options).double()
    pairs = list(zip(mine.parameters(), theirs.parameters(), strict=True))

    def run(layer: nn.Module):  # AlphaDropout draws: give both the same numbers
        return lambda x: (torch.manual_seed(7), layer(x))[1]

    rough = {"rtol": 1e-7, "atol": 1e-9} if name == "Hardsigmoid" else {}
    assert_parity(run(mine), run(theirs), [draw(3, 4, 5)], parameters=pairs, **rough)
    assert_parity(run(mine.eval()), run(theirs.eval()), [draw(2, 4)], parameters=pairs, **rough)


@pytest.mark.parity("relu", "leaky-relu", "elu", "selu", "silu", "mish", "hardswish")
@pytest.mark.parametrize("name", INPLACE)
def test_inplace_is_torchs(name):
    x = draw(3, 4)
    torch.manual_seed(7)
    want = getattr(nn, name)(inplace=True)(x.clone())
    torch.manual_seed(7)
    y = build(name, inplace=True)(x)
    assert y is x
    torch.testing.assert_close(x, want)


@pytest.mark.parity("silu")
@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("beta", [1.0, 0.4, 3.0])
def test_swish_is_a_stretched_silu(beta, backend):
    def oracle(x: Tensor) -> Tensor:
        return nn.functional.silu(beta * x) / beta

    assert_parity(build("Swish", beta=beta, backend=backend), oracle, [draw(3, 4)])
    learned = build("Swish", beta=beta, learnable=True, backend=backend)
    assert_parity(learned, oracle, [draw(3, 4)], rtol=1e-6, atol=1e-6)  # the parameter was born in float32
    slope = torch.tensor(learned.beta.item(), dtype=torch.float64, requires_grad=True)
    x = draw(3, 4)
    (want,) = torch.autograd.grad((nn.functional.silu(slope * x) / slope).sum(), slope)
    (got,) = torch.autograd.grad(learned(x).sum(), learned.beta)
    torch.testing.assert_close(got, want)


# ---------------------------------------------------------------- laws
@pytest.mark.law("prelu")
def test_prelu_learns_the_slope_that_made_the_data():
    torch.manual_seed(0)
    layer, x = ours.PReLU(3), torch.randn(256, 3)
    slopes = torch.tensor([0.0, 0.5, -0.3])
    want = torch.where(x > 0, x, slopes * x)
    sgd = torch.optim.SGD(layer.parameters(), lr=1.0)
    for _ in range(100):
        sgd.zero_grad()
        (layer(x) - want).square().mean().backward()
        sgd.step()
    torch.testing.assert_close(layer.weight.detach(), slopes, rtol=0, atol=1e-4)
    layer.reset_parameters()
    assert (layer.weight == 0.25).all()


@pytest.mark.law("silu")
def test_swish_learns_the_slope_that_made_the_data():
    torch.manual_seed(0)
    layer, x = ours.Swish(learnable=True), torch.randn(256)
    adam = torch.optim.Adam(layer.parameters(), lr=0.1)
    for _ in range(200):
        adam.zero_grad()
        (layer(x) - x * torch.sigmoid(2.5 * x)).square().mean().backward()
        adam.step()
    assert layer.beta.item() == pytest.approx(2.5, abs=1e-2)
    layer.reset_parameters()
    assert layer.beta.item() == 1.0


@pytest.mark.law("selu")
def test_selu_with_lecun_weights_and_alpha_dropout_stays_normal_through_depth():
    torch.manual_seed(0)
    x, act, drop = torch.randn(512, 256), ours.SELU(), ours.AlphaDropout(0.05)
    for _ in range(30):
        x = drop(act(x @ torch.randn(256, 256) / 16))
    assert abs(x.mean()) < 0.1
    assert 0.8 < x.var() < 1.25


@pytest.mark.law("selu")
def test_alpha_dropout_is_the_identity_in_evaluation():
    x = draw(4, 5)
    assert torch.equal(ours.AlphaDropout(0.5).eval()(x), x)


# ---------------------------------------------------------------- outside
@pytest.mark.outside("gelu", "silu", "mish", "hardswish", "prelu")
def test_is_what_transformers_and_timm_publish():
    from timm.layers import activations as timm
    from transformers.activations import ACT2FN

    x = draw(4, 5)
    for mine, theirs in [
        (ours.GELU("tanh"), ACT2FN["gelu_new"]),
        (ours.GELU("tanh", backend="reference"), ACT2FN["gelu_new"]),
        (ours.GELU(backend="reference"), ACT2FN["gelu_python"]),
        (ours.Swish(1.702), ACT2FN["quick_gelu"]),
        (ours.Mish(backend="reference"), timm.Mish()),
        (ours.Hardswish(backend="reference"), timm.HardSwish()),
        (ours.Swish(), timm.Swish()),
        (ours.PReLU(backend="reference").double(), timm.PReLU().double()),
    ]:
        assert_parity(mine, theirs, [x])


# ---------------------------------------------------------------- registration
@pytest.mark.registration(*IDS)
@NAMES
def test_arguments_are_torchs_in_name_order_and_default(name):
    if name in ("Sigmoid", "Tanh"):
        return  # torch's take anything and ignore it
    mine = inspect.signature(getattr(ours, name)).parameters
    theirs = inspect.signature(getattr(nn, name)).parameters
    positional = [p.name for p in mine.values() if p.kind is p.POSITIONAL_OR_KEYWORD]
    assert positional == list(theirs)
    assert {n: mine[n].default for n in theirs} == {n: p.default for n, p in theirs.items()}


@pytest.mark.registration(*IDS)
@CASE
def test_state_dicts_go_both_ways(name, options):
    mine, theirs = getattr(ours, name)(**options), getattr(nn, name)(**options)
    for p in theirs.parameters():
        p.data.uniform_()
    mine.load_state_dict(theirs.state_dict())
    theirs.load_state_dict(mine.state_dict())
    assert list(mine.state_dict()) == list(theirs.state_dict())


@pytest.mark.registration("silu", "prelu")
def test_learned_slopes_are_saved_and_fixed_ones_are_not():
    assert list(ours.Swish(learnable=True).state_dict()) == ["beta"]
    assert ours.Swish(2.0).state_dict() == {}
    for layer in (
        ours.Swish(learnable=True, device="meta", dtype=torch.bfloat16),
        ours.PReLU(3, 0.1, "meta", torch.half),
    ):
        (p,) = layer.parameters()
        assert p.device.type == "meta"
        assert p.dtype in (torch.bfloat16, torch.half)


@pytest.mark.registration(*IDS)
@NAMES
def test_copies_pickles_prints_and_runs_on_meta(name):
    layer, x = getattr(ours, name)().eval(), draw(3, 4).float()
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        torch.testing.assert_close(other(x), layer(x))
    assert repr(layer).startswith(name)
    assert layer.to("meta")(x.to("meta")).shape == x.shape


@pytest.mark.registration("silu", "leaky-relu", "elu", "prelu", "selu")
def test_repr_names_the_settings():
    assert repr(ours.Swish(2.0, learnable=True)) == "Swish(beta=2.0, learnable=True)"
    assert repr(ours.LeakyReLU(0.2, True)) == "LeakyReLU(negative_slope=0.2, inplace=True)"
    assert repr(ours.ELU(0.5)) == "ELU(alpha=0.5)"
    assert repr(ours.PReLU(4)) == "PReLU(num_parameters=4)"
    assert repr(ours.AlphaDropout(0.1)) == "AlphaDropout(p=0.1, inplace=False)"
    assert repr(ours.ReLU(True)) == "ReLU(inplace=True)"


@pytest.mark.registration(*IDS)
@NAMES
def test_compiles_to_one_graph(name, unchecked):
    layer, x = getattr(ours, name)().eval(), draw(3, 4).float()
    torch._dynamo.reset()
    torch.testing.assert_close(torch.compile(layer, fullgraph=True, backend="aot_eager")(x), layer(x))


@pytest.mark.registration(*IDS)
@NAMES
def test_autocast_and_bfloat16(name):
    layer, x = getattr(ours, name)().eval(), draw(3, 4).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        under = layer(x)
    torch.testing.assert_close(under.float(), layer(x.float()), rtol=2**-7, atol=2**-7)
    assert layer.bfloat16()(x).dtype == torch.bfloat16


# ---------------------------------------------------------------- refusals
@pytest.mark.refusal(*IDS)
@NAMES
def test_refuses_integers_and_backends(name):
    with refuses(ShapeError, "torch.int64"):
        getattr(ours, name)()(torch.ones(3, dtype=torch.int64))
    with refuses(ConfigError, "cudnn"):
        getattr(ours, name)(backend="cudnn")(torch.ones(3))
    if name in INPLACE:
        with refuses(KernelUnavailable, "inplace"):
            getattr(ours, name)(inplace=True, backend="reference")(torch.ones(3))


@pytest.mark.refusal("leaky-relu", "prelu", "elu", "gelu", "silu", "selu")
def test_refuses_bad_settings_at_construction():
    for value in (math.nan, math.inf, True, None):
        with refuses(ConfigError, "LeakyReLU negative_slope", value):
            ours.LeakyReLU(value)
        with refuses(ConfigError, "PReLU init", value):
            ours.PReLU(init=value)
        with refuses(ConfigError, "Swish beta", value):
            ours.Swish(value)
    for value in (0, -1, 1.5, True):
        with refuses(ConfigError, "PReLU num_parameters", value):
            ours.PReLU(value)
    for value in (0.0, -1.0, math.nan):
        with refuses(ConfigError, "ELU alpha", value):
            ours.ELU(value)
    for value in (-0.1, 1.1, math.nan):
        with refuses(ConfigError, "AlphaDropout p", value):
            ours.AlphaDropout(value)
    with refuses(ConfigError, "GELU approximate", "erf"):
        ours.GELU("erf")
    with refuses(ShapeError, "prelu weight", (3,), (2, 5)):
        ours.PReLU(3)(torch.ones(2, 5))
