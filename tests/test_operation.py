"""An operation: the maths is the reference, and checks and faster ways hang on it."""

import inspect

import pytest
import torch

from handbook_src.errors import ConfigError, KernelUnavailable
from handbook_src.functional import rms_norm
from handbook_src.operation import operation
from handbook_src.testing import unchecked


@pytest.fixture
def scaled():
    """``x / (sum |x| + eps)``, with what ran last in ``ran``."""

    @operation(widens="x")
    def scaled(x, eps=1.0, *, power=1, backend="auto"):
        """Scale."""
        ran.append(("reference", x.dtype))
        return (x / (x.abs().sum() + eps)) ** power

    ran = []

    @scaled.refuses
    def _(eps):
        if eps < 0:
            raise ConfigError("eps", got=eps, want="at least 0", remedy="Raise it.")

    @scaled.torch(needs=lambda x: None if x.ndim == 1 else "one axis")
    def _(x, *rest):
        ran.append(("torch", rest))
        return x

    @scaled.triton(needs=lambda power: None if power == 2 else "a power of two")
    def _(power, x):
        ran.append(("triton", power))
        return x

    scaled.ran = ran
    return scaled


def test_the_first_way_that_lacks_nothing_runs_and_the_maths_is_the_last(scaled):
    line, sheet = torch.ones(3), torch.ones(3, 2)
    for x, power, way in ((line, 2, "torch"), (sheet, 2, "triton"), (sheet, 1, "reference")):
        scaled(x, power=power)
        assert scaled.ran[-1][0] == way


def test_arguments_reach_a_way_by_name_and_the_rest_in_order(scaled):
    scaled(torch.ones(3), power=5)
    assert scaled.ran[-1] == ("torch", (1.0, 5))
    scaled(torch.ones(3, 1), 0.5, power=2)
    assert scaled.ran[-1] == ("triton", 2)


def test_a_named_backend_runs_or_says_what_it_lacks(scaled):
    assert scaled(torch.ones(3), backend="reference").tolist() == [0.25] * 3
    scaled(torch.ones(3), power=2, backend="triton")
    assert scaled.ran[-1][0] == "triton"
    with pytest.raises(KernelUnavailable, match="want one axis"):
        scaled(torch.ones(3, 2), backend="torch")
    with unchecked(), pytest.raises(ConfigError, match="'cuda'"):
        scaled(torch.ones(3), backend="cuda")


def test_a_check_runs_before_anything_is_computed(scaled):
    with pytest.raises(ConfigError, match="at least 0"):
        scaled(torch.ones(3), -1.0)
    assert not scaled.ran


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_the_maths_gets_halves_in_float32_and_is_rounded_once(scaled, dtype):
    inside = dtype if dtype.itemsize > 2 else torch.float32
    y = scaled(torch.full((1, 300), 300.0, dtype=dtype), 0.0)  # their sum overflows float16
    assert scaled.ran[-1] == ("reference", inside)
    assert torch.equal(y, torch.full((1, 300), 1 / 300, dtype=inside).to(dtype))


def test_python_itself_binds_the_arguments(scaled):
    assert str(inspect.signature(scaled)) == "(x, eps=1.0, *, power=1, backend='auto')"
    assert (scaled.__name__, scaled.__doc__, inspect.isfunction(scaled)) == ("scaled", "Scale.", True)
    for wrong in ((), (torch.ones(1), 1.0, 2)):
        with pytest.raises(TypeError, match="scaled"):
            scaled(*wrong)
    with pytest.raises(TypeError, match="epsilon"):
        scaled(torch.ones(1), epsilon=1.0)


def test_torch_reads_through_it():
    x, w = torch.randn(4, 8), torch.randn(8)
    with unchecked():
        whole = torch.compile(lambda x: rms_norm(x, w) * 2, fullgraph=True, backend="eager")
        torch.testing.assert_close(whole(x), rms_norm(x, w) * 2)
        torch.testing.assert_close(torch.vmap(lambda v: rms_norm(v, w))(x), rms_norm(x, w))
