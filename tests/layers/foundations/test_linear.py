"""Linear and Bilinear drop in for torch's: same arguments, first values, outputs, gradients and state dict."""

from __future__ import annotations

import copy
import inspect
import pickle

import pytest
import torch
from torch import Tensor, nn

from handbook_src.errors import ConfigError, ShapeError
from handbook_src.layers.foundations import linear as ours
from handbook_src.testing import assert_parity, refuses

BOTH = pytest.mark.parametrize(("name", "sizes"), [("Linear", (5, 3)), ("Bilinear", (5, 4, 3))])
IDS = ("linear", "bilinear")


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def inputs(sizes: tuple[int, ...], *lead: int) -> list[Tensor]:
    return [draw(*lead, d, seed=i) for i, d in enumerate(sizes[:-1])]


def pair(name: str, *args: object, seed: int = 0, **options: object) -> tuple[nn.Module, nn.Module]:
    """Our layer and torch's, drawn from the same generator state."""
    made = []
    for house in (ours, nn):
        torch.manual_seed(seed)
        made.append(getattr(house, name)(*args, **options))
    return made[0], made[1]


# ---------------------------------------------------------------- parity
@pytest.mark.parity(*IDS)
@pytest.mark.parametrize("backend", ["auto", "reference", "torch"])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("lead", [(), (1,), (4,), (2, 3), (0,)])
@BOTH
def test_outputs_and_gradients_are_torchs(name, sizes, lead, bias, backend):
    mine, theirs = pair(name, *sizes, bias=bias, dtype=torch.float64)
    mine.backend = backend
    assert_parity(
        mine, theirs, inputs(sizes, *lead), parameters=list(zip(mine.parameters(), theirs.parameters(), strict=True))
    )


@pytest.mark.parity(*IDS)
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(("name", "sizes"), [("Linear", (7, 3)), ("Linear", (1, 1)), ("Bilinear", (7, 2, 3))])
def test_first_values_are_torchs_bit_for_bit(name, sizes, seed):
    mine, theirs = pair(name, *sizes, seed=seed)
    torch.testing.assert_close(mine.state_dict(), theirs.state_dict(), rtol=1e-6, atol=0)
    torch.manual_seed(seed)
    again = mine.state_dict()["weight"].clone()
    mine.reset_parameters()
    assert torch.equal(mine.weight, again)


# ---------------------------------------------------------------- laws
@pytest.mark.law("linear")
def test_variance_of_the_output_is_a_third_of_the_inputs_plus_the_biass():
    torch.manual_seed(0)
    layer = ours.Linear(400, 2000, bias=False)  # Var(W) = 1 / (3 d)
    y = layer(torch.randn(100, 400))
    assert y.var().item() == pytest.approx(1 / 3, rel=0.05)


@pytest.mark.law("bilinear")
def test_swapping_the_inputs_transposes_the_matrices():
    layer, other = ours.Bilinear(5, 4, 3).double(), ours.Bilinear(4, 5, 3).double()
    other.weight.data, other.bias.data = layer.weight.transpose(1, 2), layer.bias
    x, z = inputs((5, 4, 3), 6)
    torch.testing.assert_close(layer(x, z), other(z, x))


# ---------------------------------------------------------------- registration
@pytest.mark.registration(*IDS)
@BOTH
def test_state_dicts_arguments_and_repr_are_torchs(name, sizes):
    mine, theirs = getattr(ours, name)(*sizes), getattr(nn, name)(*sizes)
    theirs.load_state_dict(mine.state_dict())
    mine.load_state_dict(getattr(nn, name)(*sizes).state_dict())
    a, b = (inspect.signature(getattr(house, name)).parameters for house in (ours, nn))
    assert [p for p in a if a[p].kind is not a[p].KEYWORD_ONLY] == list(b)
    assert {p: a[p].default for p in b} == {p: b[p].default for p in b}
    assert repr(mine) == repr(theirs)
    bare = getattr(ours, name)(*sizes, bias=False)
    assert list(bare.state_dict()) == ["weight"]
    assert bare.bias is None


@pytest.mark.registration(*IDS)
@BOTH
def test_copies_pickles_moves_and_compiles(name, sizes, unchecked):
    layer, x = getattr(ours, name)(*sizes), [t.float() for t in inputs(sizes, 2)]
    y = layer(*x)
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        torch.testing.assert_close(other(*x), y)
    torch._dynamo.reset()
    torch.testing.assert_close(torch.compile(layer, fullgraph=True, backend="aot_eager")(*x), y)
    for dtype in (torch.bfloat16, torch.float16):
        half = copy.deepcopy(layer).to(dtype)(*[t.to(dtype) for t in x])
        assert half.dtype == dtype
        torch.testing.assert_close(half.float(), y, rtol=0.03, atol=0.03)
    meta = getattr(ours, name)(*sizes, device="meta", dtype=torch.bfloat16)
    assert {(p.device.type, p.dtype) for p in meta.parameters()} == {("meta", torch.bfloat16)}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert layer(*x).dtype == getattr(nn, name)(*sizes)(*x).dtype or name == "Bilinear"


# ---------------------------------------------------------------- refusals
@pytest.mark.refusal(*IDS)
@BOTH
@pytest.mark.parametrize("size", [0, -1, 2.5, 4.0, True, float("nan"), "3", None])
def test_refuses_sizes(name, sizes, size):
    for i in range(len(sizes)):
        with refuses(ConfigError, name, repr(size)):
            getattr(ours, name)(*sizes[:i], size, *sizes[i + 1 :])


@pytest.mark.refusal("linear")
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_linear_refuses_inputs(backend):
    layer = ours.Linear(5, 3, backend=backend)
    for x, values in [
        (torch.ones(2, 4), (4, 5)),
        (torch.ones(()), ("()",)),
        (torch.ones(2, 5, dtype=torch.int64), ("torch.int64",)),
        (torch.ones(2, 5, dtype=torch.bool), ("torch.bool",)),
        (torch.ones(2, 5, dtype=torch.float64), ("torch.float64", "torch.float32")),
        (torch.ones(2, 5, device="meta"), ("meta",)),
    ]:
        with refuses(ShapeError, *values):
            layer(x)
    with refuses(ConfigError, "cublas"):
        ours.Linear(5, 3, backend="cublas")(torch.ones(2, 5))


@pytest.mark.refusal("bilinear")
def test_bilinear_refuses_inputs():
    layer = ours.Bilinear(5, 4, 3)
    for x, z, values in [
        (torch.ones(2, 4), torch.ones(2, 4), ("input1", 4, 5)),
        (torch.ones(2, 5), torch.ones(2, 5), ("input2", 5, 4)),
        (torch.ones(2, 5), torch.ones(3, 4), ("(2, 5)", "(3, 4)")),
        (torch.ones(2, 5).long(), torch.ones(2, 4), ("torch.int64",)),
    ]:
        with refuses(ShapeError, *values):
            layer(x, z)


@pytest.mark.refusal("linear")
@pytest.mark.parametrize("dtype", [torch.int64, torch.complex64, torch.bool])
def test_refuses_parameters_that_are_not_floating(dtype):
    with refuses(ConfigError, "dtype", dtype):
        ours.Linear(2, 3, dtype=dtype)
