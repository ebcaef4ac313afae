"""Fused cross-entropy against every peer in one run: ceilings, then parity, then times, then a CSV.

    python kernels/cross_entropy/bench.py                 on a GPU: everything; without one: "not measured"
    python kernels/cross_entropy/bench.py --device cpu    what runs without a GPU: reference, torch, torch.compile

Liger's kernel writes the gradient over the logits in its forward, so it is no peer of a forward that leaves its input
alone; it is not run here.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from handbook_src.bench.workshop import Maker, Run, Workshop
from handbook_src.dispatch import Backend
from handbook_src.functional.losses.cross_entropy import cross_entropy


@dataclass(frozen=True)
class Problem:
    """Rows of logits over one vocabulary."""

    op: str
    rows: int
    cols: int
    dtype: torch.dtype
    smoothing: float = 0.0

    @property
    def shape(self) -> tuple[int, int]:
        return self.rows, self.cols

    def small(self) -> Problem:
        return replace(self, rows=min(self.rows, 16))

    def bytes(self, way: str) -> int:
        """Return the fewest bytes that must move: a row's 16 bytes beside its logits are left out."""
        return {"forward": 1, "backward": 2}[way] * self.rows * self.cols * self.dtype.itemsize

    def leaves(self, device: str) -> list[Tensor]:
        """Return the logits."""
        return [torch.randn(self.shape, device=device).to(self.dtype).requires_grad_()]


def problems(device: str) -> list[Problem]:
    """Return what is measured: vocabularies of GPT-2, LLaMA 2, LLaMA 3 and Gemma on a GPU, one small on a CPU."""
    if device == "cpu":
        return [Problem("cross-entropy", 256, 8192, torch.float32)]
    found = [Problem("cross-entropy", 8192, v, torch.bfloat16) for v in (32000, 50257, 128256, 262144)]
    return [*found, Problem("cross-entropy", 8192, 32000, torch.float32),
            Problem("smoothed cross-entropy", 8192, 128256, torch.bfloat16, 0.1)]  # fmt: skip


def of(backend: Backend) -> Maker:
    """Return the maker of one of the handbook's own backends."""

    def maker(p: Problem, device: str) -> Run:
        target = torch.randint(p.cols, (p.rows,), generator=torch.Generator().manual_seed(0)).to(device)
        return lambda x: (cross_entropy(x, target, label_smoothing=p.smoothing, backend=backend),)

    return maker


WORKSHOP = Workshop(
    Path(__file__).resolve().parent / "results",
    problems,
    {"torch": of("torch"), "reference": of("reference"), "triton": of("triton")},
)

if __name__ == "__main__":
    WORKSHOP.main(__doc__)
