"""Each shared check lets the right thing pass and names the wrong one."""

from __future__ import annotations

import pytest
import torch

from handbook_src.errors import ConfigError, ShapeError
from handbook_src.functional import check
from handbook_src.testing import refuses


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.complex64])
def test_only_floating_tensors_pass(dtype):
    check.check_floating("op", torch.ones(2), None, torch.ones(2, dtype=torch.bfloat16))
    with refuses(ShapeError, "op", dtype):
        check.check_floating("op", torch.ones(2), torch.ones(2, dtype=dtype))


def test_one_dtype():
    check.check_one_dtype("op", torch.ones(2), torch.ones(3))
    with refuses(ShapeError, "op", "torch.float64", "torch.float32"):
        check.check_one_dtype("op", torch.ones(2), torch.ones(3), torch.ones(2).double())


@pytest.mark.parametrize(("axis", "shape"), [(-1, (2, 4)), (1, (2, 4, 7)), (-3, (4, 5, 6)), (0, (4,))])
def test_features_stand_on_their_axis(axis, shape):
    check.check_features("op", torch.ones(shape), 4, axis=axis)
    with refuses(ShapeError, "op", tuple(shape), 3):
        check.check_features("op", torch.ones(shape), 3, axis=axis)


@pytest.mark.parametrize("axis", [-1, 0, 1, -2])
def test_a_scalar_has_no_features(axis):
    with refuses(ShapeError, "()"):
        check.check_features("op", torch.tensor(1.0), 1, axis=axis)


def test_ranks():
    check.check_rank("op", torch.ones(1, 2, 3), [2, 3], "(channels, length), with or without a batch")
    with refuses(ShapeError, "4 axes", "2 or 3"):
        check.check_rank("op", torch.ones(1, 2, 3, 4), [2, 3], "(channels, length)")


@pytest.mark.parametrize("value", [0, -1, 1.5, True, "2", None])
def test_sizes(value):
    check.check_size("op", "size", 1)
    check.check_size("op", "size", 0, least=0)
    with refuses(ConfigError, "op size", repr(value)):
        check.check_size("op", "size", value)


@pytest.mark.parametrize("value", [0, -0.5, float("nan"), float("inf"), True, None])
def test_positive_numbers(value):
    check.check_positive("op", "scale", 0.5)
    with refuses(ConfigError, "op scale", repr(value)):
        check.check_positive("op", "scale", value)


@pytest.mark.parametrize("value", [-0.1, 1.0, 1.1, float("nan"), "0.5", None, True, False])
def test_probabilities(value):
    check.check_probability("op", "p", 0.0)
    check.check_probability("op", "p", 1.0, below_one=False)
    with refuses(ConfigError, "op p", repr(value)):
        check.check_probability("op", "p", value)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), True, None, "1"])
def test_finite_numbers(value):
    check.check_finite("op", "slope", -1)
    check.check_finite("op", "slope", 0.5)
    with refuses(ConfigError, "op slope", repr(value)):
        check.check_finite("op", "slope", value)


def test_one_integer_serves_all_axes():
    assert check.as_tuple("op", "stride", 2, 3) == (2, 2, 2)
    assert check.as_tuple("op", "stride", (1, 2), 2) == (1, 2)
    assert check.as_tuple("op", "stride", [2], 2) == (2, 2)
    assert check.as_tuple("op", "padding", 0, 2, least=0) == (0, 0)


@pytest.mark.parametrize("value", [(1, 2, 3), (), 0, (1, 0), 1.5, "2", (True, 1), None])
def test_other_counts_are_refused(value):
    with refuses(ConfigError, "op stride"):
        check.as_tuple("op", "stride", value, 2)


def test_one_device_and_dtypes_that_are_none() -> None:
    x = torch.zeros(1)
    check.check_one_device("op", x, x)
    with refuses(ShapeError, "meta", "cpu"):
        check.check_one_device("op", x, x.to("meta"))
    for dtype in ("float32", 5):
        with refuses(ConfigError, dtype):
            check.check_parameter_dtype("op", dtype)
