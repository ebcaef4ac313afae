"""The interpreter rounds as a GPU does, refuses what it would get wrong, and needs no driver to autotune."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
import torch
import triton
import triton.language as tl

from handbook_src.testing.interpreter import enable, narrow, widen

enable()


@triton.jit
def _narrowed(X, Y, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    tl.store(Y + at, tl.load(X + at).to(tl.bfloat16))


@triton.jit
def _doubled(X, Y, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    tl.store(Y + at, tl.load(X + at) + tl.load(X + at))


@triton.jit
def _product(A, B, C, SIZE: tl.constexpr):
    i, j = tl.arange(0, SIZE)[:, None], tl.arange(0, SIZE)[None, :]
    tl.store(C + i * SIZE + j, tl.dot(tl.load(A + i * SIZE + j), tl.load(B + i * SIZE + j)))


@triton.autotune(configs=[triton.Config({"BLOCK": 8}), triton.Config({"BLOCK": 16})], key=["n"])
@triton.jit
def _tuned(X, n, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    tl.store(X + at, BLOCK, mask=at < n)


def test_narrowing_is_torchs():
    bits = np.random.default_rng(0).integers(0, 2**32, 10_000, dtype=np.uint32)
    edges = np.array([0, 0x80000000, 0x7F800000, 0xFF800000, 0x7F7FFFFF, 0x3F808000, 0x3F818000, 1], dtype=np.uint32)
    values = np.concatenate([bits, edges]).view(np.float32)
    values = values[~np.isnan(values)]
    want = torch.from_numpy(values).bfloat16()
    assert torch.equal(torch.from_numpy(narrow(values).view(np.int16)).view(torch.bfloat16), want)
    assert torch.equal(torch.from_numpy(widen(narrow(values))), want.float())


def test_nan_stays_nan():
    nans = np.array([0x7FFFFFFF, 0xFFFFFFFF, 0x7F800001], dtype=np.uint32).view(np.float32)
    assert np.isnan(widen(narrow(nans))).all()


def test_a_store_rounds_to_nearest():
    x, y = torch.randn(1024), torch.empty(1024, dtype=torch.bfloat16)
    _narrowed[(1,)](x, y, BLOCK=1024)
    assert torch.equal(y, x.bfloat16())


def test_bfloat16_arithmetic_is_refused():
    x = torch.ones(8, dtype=torch.bfloat16)
    with pytest.raises(Exception, match="float32 between load and store"):
        _doubled[(1,)](x, torch.empty_like(x), BLOCK=8)


def test_a_bfloat16_product_adds_in_float32():
    a, b = torch.randn(16, 16).bfloat16(), torch.randn(16, 16).bfloat16()
    c = torch.empty(16, 16)
    _product[(1,)](a, b, c, SIZE=16)
    torch.testing.assert_close(c, a.float() @ b.float(), rtol=1e-5, atol=1e-5)


def test_autotune_takes_the_first_configuration():
    x = torch.zeros(16)
    _tuned[(1,)](x, 16)
    assert x.tolist() == [8.0] * 8 + [0.0] * 8


def test_too_late_is_refused():
    code = (
        "import handbook_src.kernels.norm\n"
        "from handbook_src.testing.interpreter import enable\n"
        "try:\n    enable()\n"
        "except Exception as e:\n    print(type(e).__name__, e)\n"
    )
    environment = {"PATH": "/usr/bin:/bin", "PYTHONSAFEPATH": "1"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True)
    assert done.stdout.startswith("KernelUnavailable interpreter: got handbook_src.kernels.")
