"""What a launcher checks and prepares, apart from any kernel."""

from __future__ import annotations

import pytest
import torch

from handbook_src.errors import ShapeError
from handbook_src.kernels.launch import as_rows, check_tensors, multiprocessors, packed
from handbook_src.testing import refuses


@pytest.mark.parametrize("shape", [(5,), (3, 5), (2, 3, 5), (2, 0, 5), (3, 1)])
def test_rows_are_a_view_where_one_exists(shape):
    x = torch.randn(shape)
    rows = as_rows(x)
    assert rows.shape == (x.numel() // shape[-1], shape[-1])
    assert rows.data_ptr() == x.data_ptr()


def test_rows_with_a_stride_are_not_copied():
    x = torch.randn(6, 8)
    assert as_rows(x[::2, :5]).stride() == (16, 1)
    assert as_rows(x[:1].expand(4, 8)).stride() == (0, 1)


def test_a_last_axis_with_gaps_is_copied():
    x = torch.randn(6, 8)
    for gappy in (x.T, x[:, ::2], x[:, :1].expand(6, 8)):
        assert as_rows(gappy).stride(1) == 1
        assert torch.equal(as_rows(gappy), gappy)


def test_packed():
    w = torch.randn(4, 2)[:, 0]
    assert packed(None) is None
    assert packed(w).stride() == (1,)
    assert torch.equal(packed(w), w)


def test_several_programs_under_the_interpreter():
    assert multiprocessors(torch.zeros(1)) == 3


def test_tensors_that_do_not_fit_are_refused():
    x, dtypes = torch.zeros(2, 3), (torch.float32,)
    check_tensors("op", x, dtypes, like_x={"r": x, "none": None}, per_feature={"w": x[0]})
    with refuses(ShapeError, "x", "()"):
        check_tensors("op", x.sum(), dtypes, like_x={}, per_feature={})
    with refuses(ShapeError, "r", "(3,)", "(2, 3)"):
        check_tensors("op", x, dtypes, like_x={"r": x[0]}, per_feature={})
    with refuses(ShapeError, "w", "(2, 3)", "(3,)"):
        check_tensors("op", x, dtypes, like_x={}, per_feature={"w": x})
    with refuses(ShapeError, "w", "torch.float16", "torch.float32"):
        check_tensors("op", x, dtypes, like_x={}, per_feature={"w": x[0].half()})
    with refuses(ShapeError, "w", "meta", "cpu"):
        check_tensors("op", x, dtypes, like_x={}, per_feature={"w": x[0].to("meta")})
