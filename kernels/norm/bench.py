"""The fused norms against every peer in one run: ceilings, then parity, then times, then a CSV.

    python kernels/norm/bench.py                 on a GPU: everything; without one: "not measured"
    python kernels/norm/bench.py --device cpu    what runs without a GPU: reference, torch, torch.compile

Nothing is timed before each backend agrees with float64, outputs and all gradients; a backend that does not is an
error, not a row.  Bytes are the fewest that must move (see handbook_src/kernels/norm.py), so GB/s can be held against
the copy that the run measures first.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from handbook_src.functional.add_norm import dropout_add_layer_norm, dropout_add_rms_norm
from handbook_src.functional.norm import layer_norm, rms_norm
from handbook_src.testing import relative_error
from handbook_src.testing.bench import Row, bench, device_stamp, write_csv

RESULTS = Path(__file__).resolve().parent / "results"
# Relative l2 error against float64 that a backend may have.  Eager torch rounds the dropped x and the sum apart.
ALLOWED = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 1e-3}
Run = Callable[..., tuple[Tensor, ...]]


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


def of_torch(p: Problem, dropout: float) -> Run:
    """Return torch's own operations, in eager mode."""

    def normed(z: Tensor, w: Tensor, b: Tensor | None = None) -> Tensor:
        return F.layer_norm(z, (p.cols,), w, b, 1e-5) if p.layer else F.rms_norm(z, (p.cols,), w, 1e-5)

    def plain(x: Tensor, *affine: Tensor) -> tuple[Tensor, ...]:
        return (normed(x, *affine),)

    def fused(x: Tensor, r: Tensor, *affine: Tensor) -> tuple[Tensor, ...]:
        z = F.dropout(x, dropout) + r
        return normed(z, *affine), z

    return fused if p.fused else plain


def of_reference(p: Problem, dropout: float) -> Run:
    """Return the readable maths."""

    def run(x: Tensor, *rest: Tensor) -> tuple[Tensor, ...]:
        if p.fused:
            op = dropout_add_layer_norm if p.layer else dropout_add_rms_norm
            return op(x, *rest, eps=1e-5, dropout=dropout, training=True, backend="reference")
        if p.layer:
            return (layer_norm(x, (p.cols,), *rest, backend="reference"),)
        return (rms_norm(x, *rest, eps=1e-5, backend="reference"),)

    return run


def of_triton(p: Problem, dropout: float) -> Run:
    """Return the handbook's kernel."""
    from handbook_src.kernels.norm import dropout_add_norm_triton

    def run(x: Tensor, *rest: Tensor) -> tuple[Tensor, ...]:
        r, affine = (rest[0], rest[1:]) if p.fused else (None, rest)
        outs = dropout_add_norm_triton(x, r, *affine, eps=1e-5, dropout=dropout, centre=p.layer)
        return outs if p.fused else outs[:1]

    return run


def of_liger(p: Problem, dropout: float) -> Run | None:
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


def contestants(p: Problem, device: str, dropout: float) -> dict[str, Run]:
    """Return the backends that can run here, torch's own first: it is the baseline."""
    torch.compiler.reset()  # past eight recompilations of one function it would fall back to eager, silently
    found: dict[str, Run | None] = {
        "torch": of_torch(p, dropout),
        "compile": torch.compile(of_torch(p, dropout), dynamic=False),
    }
    if device == "cpu":
        found["reference"] = of_reference(p, dropout)
    else:
        found |= {"triton": of_triton(p, dropout), "liger": of_liger(p, dropout)}
    return {name: run for name, run in found.items() if run is not None}


def assert_right(p: Problem, device: str) -> None:
    """Raise where a backend's outputs or gradients are further from float64 than its dtype explains."""
    p = Problem(p.op, min(p.rows, 256), p.cols, p.dtype)  # no dropout: masks differ between backends
    leaves = p.leaves(device)
    wide = [t.detach().double().requires_grad_() for t in leaves]
    wants = of_reference(p, 0.0)(*wide)
    cotangents = [torch.randn_like(w) for w in wants]
    wants = (*wants, *torch.autograd.grad(wants, wide, cotangents))
    for name, run in contestants(p, device, 0.0).items():
        outs = run(*leaves)
        got = (*outs, *torch.autograd.grad(outs, leaves, [c.to(p.dtype) for c in cotangents]))
        for i, (a, b) in enumerate(zip(got, wants, strict=True)):
            error = relative_error(a, b)
            if not error <= ALLOWED[p.dtype]:
                raise AssertionError(f"parity is red: {name}, {p}, tensor {i}: {error:.1e}; nothing was timed")


def measure(p: Problem, device: str, rounds: int) -> list[Row]:
    """Return the rows of one problem, forward and backward apart."""
    assert_right(p, device)
    leaves, runs = p.leaves(device), contestants(p, device, p.dropout)
    forward = {name: lambda run=run: run(*[t.detach() for t in leaves]) for name, run in runs.items()}
    backward = {}
    for name, run in runs.items():
        outs = run(*leaves)
        cotangents = [torch.randn_like(o) for o in outs]
        backward[name] = lambda outs=outs, c=cotangents: torch.autograd.grad(outs, leaves, c, retain_graph=True)
    rows = []
    for way, candidates in (("forward", forward), ("backward", backward)):
        rows += bench(
            candidates, check=lambda: True, baseline="torch", op=f"{p.op} {way}", shape=(p.rows, p.cols),
            dtype=p.dtype, rounds=rounds, bytes_moved=p.bytes(way), device=device,
        )  # fmt: skip
    return rows


def ceilings(device: str, rounds: int) -> list[Row]:
    """Return what this machine can do at most: a copy in GB/s, and on a GPU an 8192^3 product in bfloat16."""
    count = 2**24 if device == "cpu" else 2**30
    source = torch.randn(count, device=device)
    target = torch.empty_like(source)
    facts = {"check": lambda: True, "rounds": rounds, "device": device}
    rows = bench(
        {"copy": lambda: target.copy_(source)}, op="ceiling", shape=(count,), dtype=source.dtype,
        bytes_moved=2 * source.nbytes, **facts,
    )  # fmt: skip
    if device != "cpu":
        a = torch.randn(8192, 8192, device=device, dtype=torch.bfloat16)
        rows += bench({"matmul": lambda: a @ a}, op="ceiling", shape=(8192,) * 3, dtype=a.dtype, **facts)
        print(f"8192^3 bfloat16: {2 * 8192**3 / rows[-1].ms / 1e9:.0f} TFLOP/s")
    print(f"copy: {rows[0].gb_per_s:.1f} GB/s")
    return rows


def main() -> None:
    """Measure everything that can run, print it, and append it to the CSV."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--csv", type=Path, help="default: results/ and the device's name")
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        print("not measured: no GPU")
        return
    torch.manual_seed(0)
    stamp = device_stamp(options.device)
    print(" | ".join(f"{k} {v}" for k, v in stamp.items()))
    rows = ceilings(options.device, options.rounds)
    ceiling = rows[0].gb_per_s
    for problem in problems(options.device):
        for row in (found := measure(problem, options.device, options.rounds)):
            print(
                f"{row.op:33} {row.shape:12} {row.dtype:9} {row.backend:10} {row.ms:9.4f} ms  "
                f"{row.gb_per_s / ceiling:6.1%} of copy  {row.ratio:5.2f}x torch ({row.verdict})"
            )
        rows += found
    name = "cpu" if options.device == "cpu" else re.sub(r"\W+", "-", stamp["device"].lower())
    write_csv(options.csv or RESULTS / f"{name}.csv", rows)


if __name__ == "__main__":
    main()
