"""Dropout, residual add and norm in one call equal the three in a row."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from handbook_src.dispatch import has_triton
from handbook_src.errors import ConfigError, KernelUnavailable, ShapeError
from handbook_src.functional.normalisation.add_norm import dropout_add_layer_norm, dropout_add_rms_norm
from handbook_src.testing import assert_parity, refuses

BACKENDS = ["reference", "torch", "auto"]
FUSED = {
    "layer-norm": lambda x, r, **k: dropout_add_layer_norm(x, r, **k),
    "rms-norm": lambda x, r, **k: dropout_add_rms_norm(x, r, **k),
}
BOTH = pytest.mark.parametrize("fused", FUSED.values(), ids=FUSED.keys())


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parity("layer-norm")
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (2, 3, 129)])
@pytest.mark.parametrize("affine", [True, False])
def test_add_layer_norm_is_the_two_in_a_row(shape, affine, backend):
    w, b = (draw(shape[-1], seed=i) if affine else None for i in (2, 3))
    assert_parity(
        lambda x, r, w, b: dropout_add_layer_norm(x, r, w, b, 1e-3, backend=backend),
        lambda x, r, w, b: (F.layer_norm(x + r, x.shape[-1:], w, b, 1e-3), x + r),
        [draw(*shape), draw(*shape, seed=1), w, b],
    )


@pytest.mark.parity("rms-norm")
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (2, 3, 129)])
@pytest.mark.parametrize("affine", [True, False])
def test_add_rms_norm_is_the_two_in_a_row(shape, affine, backend):
    w = draw(shape[-1], seed=2) if affine else None
    assert_parity(
        lambda x, r, w: dropout_add_rms_norm(x, r, w, 1e-3, backend=backend),
        lambda x, r, w: (F.rms_norm(x + r, x.shape[-1:], w, 1e-3), x + r),
        [draw(*shape), draw(*shape, seed=1), w],
    )


@pytest.mark.law("layer-norm", "rms-norm")
@BOTH
@pytest.mark.parametrize("backend", BACKENDS)
def test_dropout_keeps_the_mean_and_spares_the_stream(fused, backend):
    x, stream = torch.ones(400, 50), torch.full((400, 50), 10.0)
    normed, total = fused(x, stream, dropout=0.25, training=True, backend=backend)
    kept = total - stream
    assert sorted(kept.round(decimals=4).unique().tolist()) == pytest.approx([0.0, 4 / 3], abs=1e-4)
    assert abs((kept > 0).float().mean().item() - 0.75) < 0.02  # six standard deviations of 20,000 draws
    torch.testing.assert_close(normed, fused(kept, stream, backend="reference")[0], rtol=1e-4, atol=1e-4)


@pytest.mark.law("layer-norm", "rms-norm")
@BOTH
def test_the_gradient_of_the_branch_is_zero_where_it_was_dropped(fused):
    x, stream = draw(6, 8).requires_grad_(), draw(6, 8, seed=1)
    normed, total = fused(x, stream, dropout=0.5, training=True)
    (normed * draw(6, 8, seed=2)).sum().backward()
    dropped = total.detach() == stream
    assert 0 < dropped.sum() < dropped.numel()
    assert (x.grad[dropped] == 0).all()
    assert (x.grad[~dropped] != 0).all()


@pytest.mark.law("layer-norm", "rms-norm")
@BOTH
def test_evaluation_drops_nothing(fused):
    x, stream = draw(3, 4), draw(3, 4, seed=1)
    torch.testing.assert_close(fused(x, stream, dropout=0.9)[1], x + stream)


@pytest.mark.registration("layer-norm", "rms-norm")
@BOTH
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_compiles_to_one_graph_and_keeps_bfloat16(fused, backend, unchecked):
    x, stream = draw(3, 4).bfloat16(), draw(3, 4, seed=1).bfloat16()
    torch._dynamo.reset()
    compiled = torch.compile(lambda x, r: fused(x, r, backend=backend), fullgraph=True, backend="aot_eager")
    for got, want in zip(compiled(x, stream), fused(x, stream, backend=backend), strict=True):
        assert got.dtype == torch.bfloat16
        torch.testing.assert_close(got, want)


@pytest.mark.refusal("layer-norm", "rms-norm")
@BOTH
def test_refuses_by_value(fused, monkeypatch):
    x = draw(3, 4)
    for p in (-0.1, 1.0, 1.5, float("nan")):
        with refuses(ConfigError, "dropout", p):
            fused(x, x, dropout=p)
    for eps in (0, None):
        with refuses(ConfigError, "eps", eps):
            fused(x, x, eps=eps)
    with refuses(ShapeError, (4,), (3, 4)):
        fused(x, draw(4))
    with refuses(ShapeError, "weight", (3,)):
        fused(x, x, weight=draw(3))
    with refuses(ShapeError, "int64"):
        fused(x.long(), x.long())
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with refuses(KernelUnavailable, "CUDA"):
        fused(x.float(), x.float(), backend="triton")


INTERPRETED = """
import torch
from handbook_src.functional.normalisation.add_norm import dropout_add_layer_norm, dropout_add_rms_norm
from handbook_src.functional.normalisation.norm import layer_norm, rms_norm

torch.manual_seed(0)
calls = {
    "layer": lambda x, r, w, b, k: layer_norm(x, x.shape[-1:], w, b, 1e-3, backend=k),
    "layer, two axes": lambda x, r, w, b, k: layer_norm(x[:, :1], (1, 37), w[None], b[None], 1e-3, backend=k),
    "rms": lambda x, r, w, b, k: rms_norm(x, w, None, backend=k),
    "add layer": lambda x, r, w, b, k: sum(dropout_add_layer_norm(x, r, w, b, 1e-3, dropout=0.5, backend=k)),
    "add rms": lambda x, r, w, b, k: sum(dropout_add_rms_norm(x, r, w, 1e-3, dropout=0.5, backend=k)),
}
for name, call in calls.items():
    inputs = [torch.randn(2, 3, 37), torch.randn(2, 3, 37), torch.randn(37), torch.randn(37)]
    results = []
    for backend in ("reference", "triton"):
        leaves = [t.clone().requires_grad_() for t in inputs]
        y = call(*leaves, backend)
        (y * torch.arange(y.numel()).view(y.shape).cos()).sum().backward()
        results.append([y, *[t.grad for t in leaves if t.grad is not None]])
    for want, got in zip(*results, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4, msg=lambda m: f"{name}: {m}")
print("equal")
"""


@pytest.mark.registration("layer-norm", "rms-norm")
@pytest.mark.skipif(not has_triton(), reason="Triton is not installed")
def test_the_kernel_behind_each_name_in_the_interpreter():
    """In its own process: the interpreter is chosen before the kernels are imported."""
    run = subprocess.run(
        [sys.executable, "-c", INTERPRETED],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert run.stdout == "equal\n", run.stderr[-2000:]
