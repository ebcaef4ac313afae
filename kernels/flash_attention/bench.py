"""Flash attention's kernels against every peer in one run: ceilings, then parity, then times, then a CSV.

    python kernels/flash_attention/bench.py                 on a GPU: everything; without one: "not measured"
    python kernels/flash_attention/bench.py --device cpu    what runs without a GPU
    python kernels/flash_attention/bench.py --only "causal .* 128|decode"    a part: rows are appended to the same CSV

Peers: torch's SDPA forced to flash (FlashAttention-2) and to cuDNN, FlexAttention, torch.compile of the formula.
"""

from __future__ import annotations

import argparse
import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch._functorch.config
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from handbook_src.bench.bench import Row, bench, device_stamp, write_csv
from handbook_src.bench.workshop import ALLOWED, ceilings
from handbook_src.functional.attention.flash_attention import flash_attention
from handbook_src.functional.attention.flash_decode import paged_decode_attention
from handbook_src.functional.attention.mask import causal, window
from handbook_src.testing.parity import relative_error

RESULTS = Path(__file__).resolve().parent / "results"
SDPA = {"sdpa flash": SDPBackend.FLASH_ATTENTION, "sdpa cudnn": SDPBackend.CUDNN_ATTENTION}
#: What the ratio to a peer should reach: (forward or backward, width, kind) -> [(peers, least)].
TARGETS = {
    ("forward", 64, "causal"): [(("sdpa cudnn",), 1.0)],
    ("forward", 128, "causal"): [(("sdpa cudnn", "sdpa flash"), 0.85), (("sdpa cudnn", "sdpa flash"), 1.0)],
    **{("forward", e, kind): [(("flex",), 1.3)] for e in (64, 128, 256) for kind in ("window", "alibi")},
    ("backward", 128, "causal"): [(("sdpa flash",), 1.2), (("sdpa cudnn",), 0.95)],
}
Run = Callable[..., Tensor]


@dataclass(frozen=True)
class Problem:
    """One attention at one size."""

    kind: str
    samples: int
    times: int
    heads: int
    features: int
    dtype: torch.dtype = torch.bfloat16

    @property
    def name(self) -> str:
        """What ``--only`` is matched against."""
        return f"{self.kind} {self.times} {self.features}"

    @property
    def window(self) -> int:
        """1024 keys, or a quarter where that would be all of them."""
        return min(1024, max(1, self.times // 4))

    @property
    def flops(self) -> float:
        """Multiplications and additions of the forward that must be done: half of them under a causal rule."""
        seen = 0.5 if self.kind == "causal" else 1.0
        if self.kind == "window":  # the first queries see fewer keys
            seen = self.window / self.times * (1 - 0.5 * self.window / self.times)
        return 4 * self.samples * self.heads * self.times**2 * self.features * seen

    def options(self, device: str) -> dict:
        """Return what the handbook's function is told."""
        if self.kind == "window":
            return {"causal": True, "window": self.window}
        if self.kind == "alibi":
            return {"alibi": torch.logspace(-1, -8, self.heads, base=2, device=device)}
        return {"causal": self.kind == "causal"}

    def leaves(self, device: str) -> list[Tensor]:
        """Return q, k and v."""
        size = (self.samples, self.times, self.heads, self.features)
        return [torch.randn(size, device=device, dtype=self.dtype, requires_grad=True) for _ in range(3)]


def problems(device: str) -> list[Problem]:
    """Return what is measured: 16384 positions and 2048 features in all, as published tables have it."""
    if device == "cpu":
        return [Problem(kind, 1, 256, 4, 64, torch.float32) for kind in ("full", "causal", "window", "alibi")]
    sizes = [(16384 // t, t) for t in (1024, 4096, 16384)]
    kinds = ("full", "causal", "window", "alibi")
    return [Problem(kind, b, t, 2048 // e, e) for e in (64, 128, 256) for b, t in sizes for kind in kinds]


def flex(p: Problem, device: str) -> Run:
    """FlexAttention, compiled, with its block mask or its bias."""
    from torch.nn.attention.flex_attention import flex_attention

    rule = {"causal": causal, "window": causal & window(p.window)}.get(p.kind)
    mask = None if rule is None else rule.block_mask(p.times, device=device)
    slopes = p.options(device).get("alibi")

    def bias(score: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return score - slopes[h] * (i - j).abs()

    run = torch.compile(flex_attention, dynamic=False)
    change = bias if p.kind == "alibi" else None
    return lambda *x: run(*(y.transpose(1, 2) for y in x), score_mod=change, block_mask=mask).transpose(1, 2)


def contestants(p: Problem, device: str) -> dict[str, Run]:
    """Return ours and the peers that can compute this problem here; on a CPU torch stands for ours."""
    torch.compiler.reset()
    return {name: run for name, run in everyone(p, device).items() if runs(name, run, p, device)}


def everyone(p: Problem, device: str) -> dict[str, Run]:
    """Return ours and every peer that might compute this problem."""
    if device == "cpu":
        options = p.options(device)
        return {"torch": lambda *x: flash_attention(*x, **options, backend="torch"), "compile": formula(p, device)}
    return gpu_contestants(p, device)


def formula(p: Problem, device: str) -> Run:
    """The readable maths, compiled."""
    options = p.options(device)
    return torch.compile(lambda *x: flash_attention(*x, **options, backend="reference"), dynamic=False)


def gpu_contestants(p: Problem, device: str) -> dict[str, Run]:
    """Return ours, torch's two fused operations, FlexAttention and the compiled formula."""
    options = p.options(device)
    found: dict[str, Run] = {"ours": lambda *x: flash_attention(*x, **options, backend="triton")}
    for name, backend in SDPA.items():
        if p.kind in ("full", "causal"):

            def run(*x: Tensor, backend: SDPBackend = backend) -> Tensor:
                with sdpa_kernel(backend):
                    q, k, v = (y.transpose(1, 2) for y in x)
                    return F.scaled_dot_product_attention(q, k, v, is_causal=p.kind == "causal").transpose(1, 2)

            found[name] = run
    found["flex"] = flex(p, device)
    if p.times <= 4096:  # it writes every score
        found["compile"] = formula(p, device)
    return found


def runs(name: str, run: Run, p: Problem, device: str) -> bool:
    """Whether a peer runs at all; ours has to."""
    try:
        run(*p.leaves(device)).sum().backward()
    except RuntimeError as error:
        if name == "ours":
            raise
        print(f"  {name} left out: {str(error).splitlines()[0][:100]}")
        return False
    return True


def assert_right(p: Problem, device: str) -> None:
    """Raise where outputs or gradients are further from float64 than the dtype explains."""
    p = replace(p, samples=1, times=min(p.times, 1536), heads=2)
    leaves = p.leaves(device)
    wide = [x.detach().double().requires_grad_() for x in leaves]
    want = flash_attention(*wide, **p.options(device), backend="reference")
    down = torch.randn_like(want)
    wants = (want, *torch.autograd.grad(want, wide, down))
    for name, run in contestants(p, device).items():
        out = run(*leaves)
        got = (out, *torch.autograd.grad(out, leaves, down.to(out.dtype)))
        for i, (a, b) in enumerate(zip(got, wants, strict=True)):
            if not (error := relative_error(a, b)) <= ALLOWED[p.dtype]:
                raise AssertionError(f"parity is red: {name}, {p}, tensor {i}: {error:.1e}; nothing was timed")


def measure(p: Problem, device: str, rounds: int) -> Iterator[Row]:
    """Time forward and backward, after parity."""
    assert_right(p, device)
    leaves, found = p.leaves(device), contestants(p, device)
    shape = (p.samples, p.times, p.heads, p.features)
    outs = {name: run(*leaves) for name, run in found.items()}
    down = torch.randn_like(next(iter(outs.values())))
    ways = {
        "forward": {n: lambda r=r: r(*[x.detach() for x in leaves]) for n, r in found.items()},
        "backward": {
            n: lambda o=o: torch.autograd.grad(o, leaves, down, retain_graph=True) for n, o in outs.items()
        },
    }  # fmt: skip
    for way, candidates in ways.items():
        rows = bench(
            candidates, check=lambda: True, op=f"attention {p.kind} {way}", shape=shape, dtype=p.dtype,
            rounds=rounds, device=device,
        )  # fmt: skip
        work = p.flops * (1.0 if way == "forward" else 2.5)
        for row in rows:
            print(f"{row.op:28} {row.shape:18} {row.backend:10} {row.ms:9.4f} ms {work / row.ms / 1e9:7.3g} TFLOP/s")
        told(way, p, {row.backend: row.ms for row in rows})
        yield from rows


def told(way: str, p: Problem, ms: dict[str, float]) -> None:
    """Print each target beside what was measured."""
    for peers, least in TARGETS.get((way, p.features, p.kind), []):
        times = [ms[n] for n in peers if n in ms]
        if "ours" in ms and times:
            ratio = min(times) / ms["ours"]
            print(f"  target {least} x {' or '.join(peers)}: {ratio:.2f}, {'met' if ratio >= least else 'MISSED'}")


def decode(device: str, rounds: int, ceiling: float) -> Iterator[Row]:
    """Time split decoding over pages: 8 key heads of 128 features for 32 query heads."""
    sizes = ((1, 256),) if device == "cpu" else ((1, 16384), (1, 131072), (16, 8192), (64, 4096))
    dtype, page = (torch.float32 if device == "cpu" else torch.bfloat16), 16
    ours, backend = ("reference", "reference") if device == "cpu" else ("ours", "triton")
    for b, length in sizes:
        blocks = math.ceil(length / page)
        k, v = (torch.randn(b * blocks, page, 8, 128, device=device, dtype=dtype) for _ in range(2))
        q = torch.randn(b, 32, 128, device=device, dtype=dtype)
        table = torch.randperm(b * blocks, device=device).view(b, blocks)
        lengths = torch.full((b,), length, device=device)
        row_k, row_v = (x[table].flatten(1, 2).transpose(1, 2) for x in (k, v))
        found = {
            ours: lambda: paged_decode_attention(q, k, v, table, lengths, backend=backend),  # noqa: B023
            "sdpa": lambda: F.scaled_dot_product_attention(q[:, :, None], row_k, row_v, enable_gqa=True)[:, :, 0],  # noqa: B023
        }
        held = k.nbytes + v.nbytes
        rows = bench(
            found, check=ALLOWED[dtype], op="decode", shape=(b, length, 32, 8, 128), dtype=dtype, rounds=rounds,
            bytes_moved=held, device=device,
        )  # fmt: skip
        for row in rows:
            share = row.gb_per_s / ceiling
            target = f"; target 80 %: {'met' if share >= 0.8 else 'MISSED'}" if row.backend == "ours" else ""
            said = target if held >= 64 * 2**20 and device != "cpu" else ""
            print(f"decode {row.shape:22} {row.backend:9} {row.ms:9.4f} ms {share:6.1%} of copy{said}")
        yield from rows


# The backward runs many times on one graph: torch.compile must not give away what the forward saved.
@torch._functorch.config.patch(donated_buffer=False)
def main() -> None:
    """Measure everything that can run here, print it, and append it to the CSV."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--only", default="", help="a pattern: 'kind times features' of the problems, or 'decode'")
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
    for p in problems(options.device):
        if re.search(options.only, p.name):
            rows += measure(p, options.device, options.rounds)
    if re.search(options.only, "decode"):
        rows += decode(options.device, options.rounds, ceiling)
    name = "cpu" if options.device == "cpu" else re.sub(r"\W+", "-", stamp["device"].lower())
    write_csv(options.csv or RESULTS / f"{name}.csv", rows)


if __name__ == "__main__":
    main()
