"""The rotary embedding's kernel against every peer in one run: ceilings, then parity, then times, then a CSV.

    python kernels/rope/bench.py                 on a GPU: everything; without one: "not measured"
    python kernels/rope/bench.py --device cpu    what runs without a GPU: reference, torch, torch.compile

``torch`` here is the readable maths in eager mode: torch has no rotary operation of its own.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from handbook_src.bench.workshop import Maker, Run, Workshop
from handbook_src.dispatch import Backend
from handbook_src.functional.positions.rope import apply_rope, rope_cos_sin, rope_frequencies


@dataclass(frozen=True)
class Problem:
    """Queries or keys of one size, under one pairing."""

    op: str
    samples: int
    times: int
    heads: int
    features: int
    dtype: torch.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        return self.samples, self.times, self.heads, self.features

    def small(self) -> Problem:
        return replace(self, samples=1, times=min(self.times, 16))

    def bytes(self, way: str) -> int:
        """Return the fewest bytes that must move, the same both ways; the tables are left out."""
        return 2 * self.samples * self.times * self.heads * self.features * self.dtype.itemsize

    def leaves(self, device: str) -> list[Tensor]:
        """Return the queries."""
        return [torch.randn(self.shape, device=device).to(self.dtype).requires_grad_()]


def problems(device: str) -> list[Problem]:
    """Return what is measured: LLaMA's heads, many and one, both pairings on a GPU; one small size on a CPU."""
    if device == "cpu":
        return [Problem("rope half", 1, 256, 8, 64, torch.float32)]
    sizes = [(op, heads, t) for op in ("rope half", "rope interleaved") for heads in (32, 1)
             for t in (torch.bfloat16, torch.float32)]  # fmt: skip
    return [Problem(op, 4, 4096, heads, 128, t) for op, heads, t in sizes]


def of(backend: Backend) -> Maker:
    """Return the maker of one of the handbook's own backends."""

    def maker(p: Problem, device: str) -> Run:
        cos, sin = rope_cos_sin(torch.arange(p.times, device=device), rope_frequencies(p.features, device=device))
        interleaved = p.op.endswith("interleaved")
        return lambda x: (apply_rope(x, cos, sin, interleaved=interleaved, backend=backend),)

    return maker


WORKSHOP = Workshop(
    Path(__file__).resolve().parent / "results",
    problems,
    {"torch": of("reference"), "reference": of("reference"), "triton": of("triton")},
)

if __name__ == "__main__":
    WORKSHOP.main(__doc__)
