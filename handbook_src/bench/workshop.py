"""What every bench of the workshop ``kernels/`` does: ceilings, then parity, then times, then a CSV.

A bench says what its problems are and who competes (:class:`Workshop`).  Nothing is
timed before each backend agrees with float64, outputs and all gradients; a backend
that does not is an error, not a row.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from handbook_src.bench.bench import Row, bench, device_stamp, write_csv
from handbook_src.testing.parity import relative_error

# Relative l2 error against float64 that a backend may have.  Eager torch rounds between its operations.
ALLOWED = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 1e-3}
Run = Callable[..., tuple[Tensor, ...]]


@runtime_checkable
class Problem(Protocol):
    """One operation at one size."""

    @property
    def op(self) -> str:
        """The operation's name."""

    @property
    def dtype(self) -> torch.dtype:
        """Of the activations."""

    @property
    def shape(self) -> tuple[int, ...]:
        """What the CSV calls it."""

    def bytes(self, way: str) -> int:
        """Return the fewest bytes that must move ``forward`` or ``backward``, each tensor once."""

    def leaves(self, device: str) -> list[Tensor]:
        """Return the tensors that are differentiated."""

    def small(self) -> Problem:
        """Return the same problem at a size, and without noise, at which float64 can check it."""


Maker = Callable[[Any, str], Run | None]


@dataclass(frozen=True)
class Workshop:
    """A bench: its problems and the makers of its contestants.

    Args:
        results: the folder of the CSVs.
        problems: what is measured on a device.
        makers: ``torch``, ``reference``, ``triton`` and peers; each returns what runs a problem on a device,
            or ``None`` where it cannot.
    """

    results: Path
    problems: Callable[[str], list[Any]]
    makers: Mapping[str, Maker]

    def contestants(self, p: Problem, device: str) -> dict[str, Run]:
        """Return the backends that can run here, torch's own first: it is the baseline."""
        torch.compiler.reset()  # past eight recompilations of one function it would fall back to eager, silently
        names = ["torch", "reference"] if device == "cpu" else [n for n in self.makers if n != "reference"]
        found = {name: run for name in names if (run := self.makers[name](p, device)) is not None}
        return {"torch": found["torch"], "compile": torch.compile(found["torch"], dynamic=False), **found}

    def assert_right(self, p: Problem, device: str) -> None:
        """Raise where a backend's outputs or gradients are further from float64 than its dtype explains."""
        p = p.small()
        leaves = p.leaves(device)
        wide = [t.detach().double().requires_grad_() for t in leaves]
        reference = self.makers["reference"](p, device)
        assert reference is not None
        wants = reference(*wide)
        cotangents = [torch.randn_like(w) for w in wants]
        wants = (*wants, *torch.autograd.grad(wants, wide, cotangents))
        for name, run in self.contestants(p, device).items():
            outs = run(*leaves)
            down = [c.to(o.dtype) for c, o in zip(cotangents, outs, strict=True)]
            got = (*outs, *torch.autograd.grad(outs, leaves, down))
            for i, (a, b) in enumerate(zip(got, wants, strict=True)):
                error = relative_error(a, b)
                if not error <= ALLOWED[p.dtype]:
                    raise AssertionError(f"parity is red: {name}, {p}, tensor {i}: {error:.1e}; nothing was timed")

    def measure(self, p: Problem, device: str, rounds: int) -> list[Row]:
        """Return the rows of one problem, forward and backward apart."""
        self.assert_right(p, device)
        leaves, runs = p.leaves(device), self.contestants(p, device)
        forward = {name: lambda run=run: run(*[t.detach() for t in leaves]) for name, run in runs.items()}
        backward = {}
        for name, run in runs.items():
            outs = run(*leaves)
            cotangents = [torch.randn_like(o) for o in outs]
            backward[name] = lambda outs=outs, c=cotangents: torch.autograd.grad(outs, leaves, c, retain_graph=True)
        rows = []
        for way, candidates in (("forward", forward), ("backward", backward)):
            rows += bench(
                candidates, check=lambda: True, baseline="torch", op=f"{p.op} {way}", shape=p.shape,
                dtype=p.dtype, rounds=rounds, bytes_moved=p.bytes(way), device=device,
            )  # fmt: skip
        return rows

    def main(self, about: str) -> None:
        """Measure everything that can run, print it, and append it to the CSV."""
        parser = argparse.ArgumentParser(description=about.splitlines()[0])
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
        for problem in self.problems(options.device):
            for row in (found := self.measure(problem, options.device, options.rounds)):
                print(
                    f"{row.op:33} {row.shape:12} {row.dtype:9} {row.backend:10} {row.ms:9.4f} ms  "
                    f"{row.gb_per_s / ceiling:6.1%} of copy  {row.ratio:5.2f}x torch ({row.verdict})"
                )
            rows += found
        name = "cpu" if options.device == "cpu" else re.sub(r"\W+", "-", stamp["device"].lower())
        write_csv(options.csv or self.results / f"{name}.csv", rows)


def ceilings(device: str, rounds: int) -> list[Row]:
    """Return what this machine can do at most: a copy in GB/s, and on a GPU an 8192^3 product in bfloat16."""
    count = 2**24 if device == "cpu" else 2**30
    source = torch.randn(count, device=device)
    target = torch.empty_like(source)
    facts: dict[str, Any] = {"check": lambda: True, "rounds": rounds, "device": device}
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
