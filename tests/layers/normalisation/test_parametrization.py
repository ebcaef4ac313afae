"""Weight norm and spectral norm on layers: torch's numbers, keys and manners."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations as theirs
from torch.nn.utils.parametrize import remove_parametrizations

from handbook_src.errors import ConfigError
from handbook_src.functional.normalisation.parametrization import as_matrix, norm_except
from handbook_src.layers.convolution import conv_transpose
from handbook_src.layers.normalisation import parametrization as ours
from handbook_src.testing import assert_parity, refuses

LAYERS = {
    "linear": (lambda: nn.Linear(5, 3), (2, 5)),
    "one by one": (lambda: nn.Linear(1, 1), (2, 1)),
    "conv 1x1": (lambda: nn.Conv2d(4, 3, 1), (2, 4, 5, 5)),
    "conv 3x2": (lambda: nn.Conv2d(4, 3, (3, 2)), (2, 4, 5, 5)),
    "transposed": (lambda: nn.ConvTranspose1d(4, 3, 2), (2, 4, 5)),
}
EACH = pytest.mark.parametrize(("build", "shape"), LAYERS.values(), ids=LAYERS.keys())


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def twins(build, wrap_ours, wrap_theirs) -> tuple[nn.Module, nn.Module]:
    """The same layer wrapped by us and by torch, holding the same state."""
    layer = build().double()
    mine, oracle = wrap_ours(copy.deepcopy(layer)), wrap_theirs(copy.deepcopy(layer))
    mine.load_state_dict(oracle.state_dict())
    return mine, oracle


def same(mine: nn.Module, oracle: nn.Module, x: Tensor) -> None:
    pairs = list(zip(mine.parameters(), oracle.parameters(), strict=True))
    assert_parity(mine, oracle, [x], parameters=pairs)


def step(module: nn.Module, x: Tensor) -> None:
    module.zero_grad()
    module(x).square().sum().backward()
    with torch.no_grad():
        for p in module.parameters():
            p -= 0.01 * p.grad


# ---------------------------------------------------------------- parity
@pytest.mark.parity("weight-norm")
@EACH
@pytest.mark.parametrize("dim", [0, 1, None])
def test_weight_norm_is_torchs_through_training(build, shape, dim):
    mine, oracle = twins(build, lambda m: ours.weight_norm(m, dim=dim), lambda m: theirs.weight_norm(m, dim=dim))
    for i in range(3):
        same(mine, oracle, draw(*shape, seed=i))
        step(mine, draw(*shape, seed=i))
        step(oracle, draw(*shape, seed=i))
    torch.testing.assert_close(mine.weight, oracle.weight)


@pytest.mark.parity("spectral-norm")
@EACH
@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("dim", [None, 0, 1, -1])
def test_spectral_norm_is_torchs_through_training(build, shape, steps, dim):
    mine, oracle = twins(
        build,
        lambda m: ours.spectral_norm(m, n_power_iterations=steps, dim=dim),
        lambda m: theirs.spectral_norm(m, n_power_iterations=steps, dim=dim),
    )
    for i in range(3):
        same(mine, oracle, draw(*shape, seed=i))
        step(mine, draw(*shape, seed=i))
        step(oracle, draw(*shape, seed=i))
    mine.eval(), oracle.eval()
    same(mine, oracle, draw(*shape))
    for a, b in zip(mine.buffers(), oracle.buffers(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


@pytest.mark.parity("spectral-norm")
@pytest.mark.parametrize("axes", [1, 2, 3])
def test_our_transposed_convolutions_have_their_outputs_on_axis_one(axes):
    name = f"ConvTranspose{axes}d"
    mine = ours.spectral_norm(getattr(conv_transpose, name)(4, 3, 2).double())
    oracle = theirs.spectral_norm(getattr(nn, name)(4, 3, 2).double())
    mine.load_state_dict(oracle.state_dict())
    oracle.load_state_dict(mine.state_dict())
    x = draw(2, 4, *[3] * axes)
    for _ in range(3):
        same(mine, oracle, x)
        step(mine, x)
        step(oracle, x)
    same(mine.eval(), oracle.eval(), x)
    for key, value in oracle.state_dict().items():
        torch.testing.assert_close(mine.state_dict()[key], value, rtol=1e-9, atol=1e-11)


@pytest.mark.parity("spectral-norm", "weight-norm")
def test_any_parameter_by_name_and_vectors():
    for wrap in (ours.spectral_norm, ours.weight_norm):
        layer = wrap(nn.RNNCell(4, 5).double(), "weight_hh")
        assert "weight_hh" in layer.parametrizations
        layer(draw(2, 4))
    vector = ours.spectral_norm(nn.LayerNorm(4).double())
    torch.testing.assert_close(vector.weight, torch.full((4,), 0.5, dtype=torch.float64))


# ---------------------------------------------------------------- laws
@pytest.mark.law("weight-norm", "spectral-norm")
@EACH
def test_wrapping_by_weight_norm_changes_no_weight(build, shape):
    layer = build().double()
    before = layer.weight.detach().clone()
    for dim in (0, 1, -1, None):
        wrapped = ours.weight_norm(copy.deepcopy(layer), dim=dim)
        torch.testing.assert_close(wrapped.weight, before)
        back = remove_parametrizations(wrapped, "weight")
        torch.testing.assert_close(back.weight, before)


@pytest.mark.law("weight-norm")
@pytest.mark.parametrize("dim", [0, 1, -1, -2, None])
def test_the_norm_of_the_weight_is_g(dim):
    layer = ours.weight_norm(nn.Linear(5, 3).double(), dim=dim)
    step(layer, draw(2, 5))
    torch.testing.assert_close(norm_except(layer.weight, dim), layer.parametrizations.weight.original0.abs())


@pytest.mark.law("weight-norm")
def test_minus_one_is_the_last_axis():
    assert ours.weight_norm(nn.Linear(5, 3), dim=-1).parametrizations.weight.original0.shape == (1, 5)
    assert ours.weight_norm(nn.Linear(5, 3), dim=None).parametrizations.weight.original0.shape == ()


@pytest.mark.law("spectral-norm")
@EACH
def test_the_largest_singular_value_goes_to_one(build, shape):
    layer = ours.spectral_norm(build().double())
    for _ in range(300):
        weight = layer.weight
    top = torch.linalg.matrix_norm(as_matrix(weight, layer.parametrizations.weight[0].dim), 2)
    torch.testing.assert_close(top, torch.ones_like(top), rtol=1e-8, atol=0)


@pytest.mark.law("spectral-norm")
def test_evaluation_does_not_iterate():
    layer = ours.spectral_norm(nn.Linear(50, 50).double()).eval()
    before = copy.deepcopy(layer.state_dict())
    layer(draw(2, 50))
    assert all(torch.equal(v, before[k]) for k, v in layer.state_dict().items())
    layer.train()(draw(2, 50))
    assert not torch.equal(layer.parametrizations.weight[0]._u, before["parametrizations.weight.0._u"])


@pytest.mark.law("spectral-norm")
def test_the_layer_is_one_lipschitz():
    layer = ours.spectral_norm(nn.Linear(20, 10, bias=False).double(), n_power_iterations=50)
    a, b = draw(100, 20), draw(100, 20, seed=1)
    assert ((layer(a) - layer(b)).norm(dim=1) <= (a - b).norm(dim=1) * (1 + 1e-6)).all()


@pytest.mark.law("spectral-norm")
def test_two_forward_passes_before_one_backward():
    layer = ours.spectral_norm(nn.Linear(5, 1).double())
    (layer(draw(2, 5)).mean() - layer(draw(2, 5, seed=1)).mean()).backward()  # D(real) - D(fake)
    assert layer.parametrizations.weight.original.grad.isfinite().all()


# ---------------------------------------------------------------- outside, registration
@pytest.mark.outside("weight-norm", "spectral-norm")
@pytest.mark.registration("weight-norm", "spectral-norm")
@pytest.mark.parametrize("name", ["weight_norm", "spectral_norm"])
def test_checkpoints_go_both_ways(name):
    mine, oracle = getattr(ours, name)(nn.Conv2d(4, 3, 3)), getattr(theirs, name)(nn.Conv2d(4, 3, 3))
    assert list(mine.state_dict()) == list(oracle.state_dict())
    oracle.load_state_dict(mine.state_dict())
    again = getattr(ours, name)(nn.Conv2d(4, 3, 3))
    again.load_state_dict(oracle.state_dict())
    x = torch.randn(2, 4, 5, 5)
    torch.testing.assert_close(again.eval()(x), oracle.eval()(x))


@pytest.mark.registration("weight-norm", "spectral-norm")
@pytest.mark.parametrize("wrap", [ours.weight_norm, ours.spectral_norm])
def test_copies_compiles_and_keeps_bfloat16(wrap, unchecked):
    layer = wrap(nn.Linear(5, 3))
    x = torch.randn(2, 5)
    torch._dynamo.reset()
    compiled = torch.compile(copy.deepcopy(layer).eval(), backend="aot_eager")
    torch.testing.assert_close(compiled(x), layer.eval()(x))
    half = layer.bfloat16()
    assert half(x.bfloat16()).dtype == torch.bfloat16
    assert ("n_power" in repr(layer)) or ("dim=0" in repr(layer))


# ---------------------------------------------------------------- refusals
@pytest.mark.refusal("weight-norm", "spectral-norm")
@pytest.mark.parametrize("wrap", [ours.weight_norm, ours.spectral_norm])
def test_refuses_names_and_axes(wrap):
    with refuses(ConfigError, "'gewicht'", ["weight", "bias"]):
        wrap(nn.Linear(5, 3), "gewicht")
    with refuses(ConfigError, "'weight'", "Sequential"):
        wrap(nn.Sequential(nn.Linear(5, 3)))
    for dim in (2, -3):
        with refuses(ConfigError, "dim", dim):
            wrap(nn.Linear(5, 3), dim=dim)


@pytest.mark.refusal("spectral-norm")
def test_spectral_norm_refuses_settings():
    for steps in (0, -1):
        with refuses(ConfigError, "n_power_iterations", steps):
            ours.spectral_norm(nn.Linear(5, 3), n_power_iterations=steps)
    with refuses(ConfigError, "eps", 0.0):
        ours.spectral_norm(nn.Linear(5, 3), eps=0.0)
    layer = nn.Linear(5, 3)
    nn.init.zeros_(layer.weight)
    with refuses(ConfigError, "zeros", "NaN"):
        ours.spectral_norm(layer)


@pytest.mark.refusal("weight-norm")
def test_weight_norm_refuses_a_unit_without_direction():
    layer = nn.Linear(5, 3)
    layer.weight.data[1] = 0
    with refuses(ConfigError, "entries [1] of dim 0", "NaN"):
        ours.weight_norm(layer)
    nn.init.zeros_(layer.weight)
    with refuses(ConfigError, "the whole weight"):
        ours.weight_norm(layer, dim=None)


@pytest.mark.refusal("weight-norm")
@pytest.mark.parametrize(("first", "under"), [("weight_norm", "WeightNorm"), ("spectral_norm", "SpectralNorm")])
def test_weight_norm_refuses_to_come_second(first, under):
    layer = getattr(ours, first)(nn.Linear(5, 3))
    with refuses(ConfigError, "already", under, "remove_parametrizations"):
        ours.weight_norm(layer)
    assert ours.spectral_norm(layer)(torch.ones(2, 5)).shape == (2, 3)  # which may: it maps one weight to one
