"""The fused gate against every peer in one run: ceilings, then parity, then times, then a CSV.

python kernels/glu/bench.py                 on a GPU: everything; without one: "not measured"
python kernels/glu/bench.py --device cpu    what runs without a GPU: reference, torch, torch.compile
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from handbook_src.bench.workshop import Maker, Run, Workshop
from handbook_src.dispatch import Backend
from handbook_src.functional.foundations.glu import gated


@dataclass(frozen=True)
class Problem:
    """One activation at one size; its name is the operation's."""

    op: str
    rows: int
    cols: int
    dtype: torch.dtype

    @property
    def shape(self) -> tuple[int, int]:
        return self.rows, self.cols

    def small(self) -> Problem:
        return replace(self, rows=min(self.rows, 64))

    def bytes(self, way: str) -> int:
        """Return the fewest bytes that must move, each tensor once."""
        return {"forward": 3, "backward": 5}[way] * self.rows * self.cols * self.dtype.itemsize

    def leaves(self, device: str) -> list[Tensor]:
        """Return gate and value."""
        return [torch.randn(self.shape, device=device).to(self.dtype).requires_grad_() for _ in range(2)]


def problems(device: str) -> list[Problem]:
    """Return what is measured: the widths of LLaMA 7B and 70B and a small model's on a GPU, one small size on a CPU."""
    if device == "cpu":
        return [Problem(op, 256, 2816, torch.float32) for op in ("silu", "gelu")]
    widths = (2816, 11008, 28672)
    return [Problem(op, 8192, n, t) for op in ("silu", "gelu", "gelu_tanh", "relu") for n in widths
            for t in (torch.bfloat16, torch.float32) if t == torch.bfloat16 or op == "silu"]  # fmt: skip


def of(backend: Backend) -> Maker:
    """Return the maker of one of the handbook's own backends."""

    def maker(p: Problem, device: str) -> Run:
        return lambda gate, value: (gated(gate, value, p.op, backend=backend),)

    return maker


def of_liger(p: Problem, device: str) -> Run | None:
    """Return Liger-Kernel's operation where it is installed and has this one."""
    try:
        from liger_kernel.ops.geglu import LigerGELUMulFunction
        from liger_kernel.ops.swiglu import LigerSiLUMulFunction
    except ImportError:
        return None
    kernel = {"silu": LigerSiLUMulFunction, "gelu_tanh": LigerGELUMulFunction}.get(p.op)
    # Its backward writes into what was saved, so that it can be called once: clones keep the comparison possible.
    return None if kernel is None else lambda gate, value: (kernel.apply(gate.clone(), value.clone()),)


WORKSHOP = Workshop(
    Path(__file__).resolve().parent / "results",
    problems,
    {"torch": of("torch"), "reference": of("reference"), "triton": of("triton"), "liger": of_liger},
)

if __name__ == "__main__":
    WORKSHOP.main(__doc__)
