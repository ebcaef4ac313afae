"""Eight-bit rounding against a loop over the representable numbers."""

from __future__ import annotations

import pytest
import torch

from handbook_src.errors import ConfigError, ShapeError
from handbook_src.functional.compression.quantize import QUANTIZED, quantize
from handbook_src.testing import refuses


@pytest.mark.parity("kv-cache")
@pytest.mark.parametrize("dtype", list(QUANTIZED))
@pytest.mark.parametrize("shape", [(1,), (3, 7), (2, 3, 5)])
def test_rounds_to_the_nearest_number_there_is(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    x = torch.randn(shape)
    q, scale = quantize(x, dtype)
    assert (q.dtype, scale.dtype, scale.shape) == (dtype, torch.float32, (*shape[:-1], 1))
    every = torch.arange(256, dtype=torch.uint8).view(dtype).float()
    every = every[every.isfinite() & (every.abs() <= QUANTIZED[dtype])]
    nearest = (x[..., None] / scale[..., None] - every).abs().amin(-1)
    torch.testing.assert_close((x / scale - q.float()).abs(), nearest, rtol=0, atol=1e-4)


@pytest.mark.law("kv-cache")
def test_the_largest_is_exact_zero_stays_and_nan_shows() -> None:
    for dtype in QUANTIZED:
        x = torch.tensor([[1.0, -3.0, 0.5], [0.0, 0.0, 0.0], [1.0, float("nan"), 0.0]])
        q, scale = quantize(x, dtype)
        back = q.float() * scale
        torch.testing.assert_close(back[0, 1], torch.tensor(-3.0))
        assert torch.equal(back[1], torch.zeros(3))
        assert back[2].isnan().any()


@pytest.mark.refusal("kv-cache")
def test_refuses_other_types() -> None:
    with refuses(ConfigError, "torch.float16"):
        quantize(torch.ones(3), torch.float16)
    for wrong in (torch.ones(()), torch.ones(3, 0)):
        with refuses(ShapeError, tuple(wrong.shape)):
            quantize(wrong)
    with refuses(ShapeError, "torch.int64"):
        quantize(torch.ones(3).long())


@pytest.mark.law("kv-cache")
@pytest.mark.parametrize("dtype", list(QUANTIZED))
@pytest.mark.parametrize("size", [1e-45, 1e-40, 1e-37])
def test_subnormal_vectors_keep_the_bound(dtype: torch.dtype, size: float) -> None:
    x = torch.tensor([[size, -size / 3, 0.0]])
    q, scale = quantize(x, dtype)
    assert ((x - scale * q.float()).abs() <= torch.maximum(scale / 2, x.abs() / 16)).all()
