"""The fused norms against every peer in one run: ceilings, then parity, then times, then a CSV.

    python kernels/norm/bench.py                 on a GPU: everything; without one: "not measured"
    python kernels/norm/bench.py --device cpu    what runs without a GPU: reference, torch, torch.compile

Nothing is timed before each backend agrees with float64, outputs and all gradients; a backend that does not is an
error, not a row.  Bytes are the fewest that must move (see handbook_src/kernels/norm.py), so GB/s can be held against
the copy that the run measures first.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from handbook_src.bench.workshop import Run, Workshop
from handbook_src.functional.normalisation.add_norm import dropout_add_layer_norm, dropout_add_rms_norm
from handbook_src.functional.normalisation.norm import layer_norm, rms_norm


@dataclass(frozen=True)
class Problem:
    """One operation at one size."""

    op: str
    rows: int
    cols: int
    dtype: torch.dtype
    dropout: float = 0.0

    @property
    def fused(self) -> bool:
        return self.op.startswith("dropout-add")

    @property
    def layer(self) -> bool:
        return self.op.endswith("layer-norm")

    @property
    def shape(self) -> tuple[int, int]:
        return self.rows, self.cols

    def small(self) -> Problem:
        return replace(self, rows=min(self.rows, 256), dropout=0.0)  # masks differ between backends

    def bytes(self, way: str) -> int:
        """Return the fewest bytes that must move, each tensor once; statistics and weights are left out."""
        forward = 4 if self.fused else 2
        backward = (5 if self.dropout else 4) if self.fused else 3
        passes = {"forward": forward, "backward": backward}[way]
        return passes * self.rows * self.cols * self.dtype.itemsize

    def leaves(self, device: str) -> list[Tensor]:
        """Return x, the residual where there is one, weight, and LayerNorm's bias."""
        shapes = [(self.rows, self.cols)] * (2 if self.fused else 1) + [(self.cols,)] * (2 if self.layer else 1)
        return [torch.randn(s, device=device).to(self.dtype).requires_grad_() for s in shapes]


def problems(device: str) -> list[Problem]:
    """Return what is measured: the sizes of language models on a GPU, small ones on a CPU."""
    ops = ["rms-norm", "layer-norm", "dropout-add-rms-norm", "dropout-add-layer-norm"]
    widths = (4096,) if device == "cpu" else (1024, 4096, 8192, 16384, 65536)
    sizes = [(1024 if device == "cpu" else min(8192, 2**28 // n), n) for n in widths]
    dtypes = [torch.float32] if device == "cpu" else [torch.bfloat16, torch.float32]
    return [
        Problem(op, rows, cols, dtype, 0.1 if "dropout" in op else 0.0)
        for op in ops
        for rows, cols in sizes
        for dtype in dtypes
        if dtype == torch.bfloat16 or cols <= 4096
    ]


def of_torch(p: Problem, device: str) -> Run:
    """Return torch's own operations, in eager mode."""

    def normed(z: Tensor, w: Tensor, b: Tensor | None = None) -> Tensor:
        return F.layer_norm(z, (p.cols,), w, b, 1e-5) if p.layer else F.rms_norm(z, (p.cols,), w, 1e-5)

    def plain(x: Tensor, *affine: Tensor) -> tuple[Tensor, ...]:
        return (normed(x, *affine),)

    def fused(x: Tensor, r: Tensor, *affine: Tensor) -> tuple[Tensor, ...]:
        z = F.dropout(x, p.dropout) + r
        return normed(z, *affine), z

    return fused if p.fused else plain


def of_reference(p: Problem, device: str) -> Run:
    """Return the readable maths."""

    def run(x: Tensor, *rest: Tensor) -> tuple[Tensor, ...]:
        if p.fused:
            op = dropout_add_layer_norm if p.layer else dropout_add_rms_norm
            return op(x, *rest, eps=1e-5, dropout=p.dropout, training=True, backend="reference")
        if p.layer:
            return (layer_norm(x, (p.cols,), *rest, backend="reference"),)
        return (rms_norm(x, *rest, eps=1e-5, backend="reference"),)

    return run


def of_triton(p: Problem, device: str) -> Run:
    """Return the handbook's kernel."""
    from handbook_src.kernels.norm import dropout_add_norm_triton

    def run(x: Tensor, *rest: Tensor) -> tuple[Tensor, ...]:
        r, affine = (rest[0], rest[1:]) if p.fused else (None, rest)
        outs = dropout_add_norm_triton(x, r, *affine, eps=1e-5, dropout=p.dropout, centre=p.layer)
        return outs if p.fused else outs[:1]

    return run


def of_liger(p: Problem, device: str) -> Run | None:
    """Return Liger-Kernel's operation where it is installed and has this one."""
    try:
        from liger_kernel.ops.layer_norm import LigerLayerNormFunction
        from liger_kernel.ops.rms_norm import LigerRMSNormFunction
    except ImportError:
        return None
    if p.fused:
        return None
    if p.layer:
        return lambda x, w, b: (LigerLayerNormFunction.apply(x, w, b, 1e-5),)
    return lambda x, w: (LigerRMSNormFunction.apply(x, w, 1e-5, 0.0, "llama", False),)


WORKSHOP = Workshop(
    Path(__file__).resolve().parent / "results",
    problems,
    {"torch": of_torch, "reference": of_reference, "triton": of_triton, "liger": of_liger},
)

if __name__ == "__main__":
    WORKSHOP.main(__doc__)
