"""Compile, for GPUs that this machine does not have, exactly what a public op launches; report what the compiler made.

    python kernels/compile_check.py                      table of every case, exit status 1 on a problem
    python kernels/compile_check.py --csv FILE           the same as CSV
    python kernels/compile_check.py --triton FOLDER      with the Triton installed in FOLDER (pip install --target)
    python kernels/compile_check.py --kernels norm --targets sm90 --cases "rms bf16 4096,layer fp16 4096"

The op runs on CPU tensors; a launch is caught before it starts and compiled instead, so grids, constexprs, argument
types and the divisibility that 16-byte loads rest on are those of the real call, not a copy of them kept here.  The
Triton wheel carries ptxas, nvdisasm and LLVM for AMD: no CUDA, no ROCm, no driver.
"""

from __future__ import annotations

import argparse
import csv
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

# sys.path[0] is this folder when run as a script; the handbook is imported as installed, or from the checkout.
HERE = Path(__file__).resolve().parent
SHARED_LIMIT = {"sm80": 163 << 10, "sm90": 227 << 10, "sm100": 227 << 10, "gfx942": 64 << 10}
# Ampere and Hopper compile every case; the others one of each kind, which saves two of four minutes.  Products of tiles
# take seconds each: all of them only on Hopper.
EVERYWHERE = {
    "norm": (
        "rms bf16 4096", "layer bf16 65536", "dropout add layer bf16 4096", "add layer bf16 stream fp32 8192",
        "dropout add layer bf16 1 x 1", "dropout add layer bf16 1 x 65536",
    ),
    "glu": ("silu bf16", "gelu bf16", "silu bf16 1 x 1"),
    "cross_entropy": ("bf16 131072", "smoothed bf16 131072", "fp32 10"),
    "rope": ("half bf16 128", "interleaved bf16 128", "half fp32 1 x 2"),
    "flash_attention": (
        "causal bf16 64", "everything bf16 128", "causal bf16 256", "causal fp32 64", "decode bf16 128",
    ),
}  # fmt: skip
COLUMNS = [
    "case", "target", "kernel", "warps", "registers", "spilled_bytes", "shared_bytes",
    "loads", "loads_16_bytes", "stores", "stores_16_bytes", "instructions", "triton", "torch", "problem",
]  # fmt: skip


#: Kernels whose work is products of tiles: on Hopper these must be wgmma.
PRODUCTS = ("flash_attention",)
#: Kernels of those files that have no 64 rows for it: decoding has a group of heads.
NO_WGMMA = ("_split", "_merge")
#: The family of tiles that a launcher chooses on each target.
FAMILY = {"sm80": "ampere", "sm90": "hopper", "sm100": "hopper", "gfx942": "amd"}


#: What fla-org/flash-linear-attention #640 found miscompiled, in Triton's GPU dialect.
TRANSPOSED = re.compile(r"tt\.trans .*: tensor<[^>]*#mma[^>]*> -> tensor")


class Case(NamedTuple):
    """One call of a public op, forward and backward."""

    name: str
    call: Callable[[], None]


def targets() -> dict[str, Any]:
    """Return the GPUs compiled for: Ampere, Hopper, Blackwell and AMD's CDNA3."""
    from triton.backends.compiler import GPUTarget

    return {
        "sm80": GPUTarget("cuda", 80, 32),
        "sm90": GPUTarget("cuda", 90, 32),
        "sm100": GPUTarget("cuda", 100, 32),
        "gfx942": GPUTarget("hip", "gfx942", 64),
    }


def norm_cases() -> list[Case]:
    """Return the cases of the norm kernels: each flag, dtype and path of the launcher."""
    import torch

    from handbook_src.kernels import norm

    def case(
        name: str, rows: int, cols: int, *, x: torch.dtype = torch.bfloat16, centre: bool = False,
        affine: bool = True, fused: bool = False, dropout: float = 0.0, stream: torch.dtype | None = None,
    ) -> Case:  # fmt: skip
        def call() -> None:
            a = torch.zeros(rows, cols, dtype=x, requires_grad=True)
            r = torch.zeros(rows, cols, dtype=stream or x, requires_grad=True) if fused else None
            w = torch.ones(cols, dtype=stream or x, requires_grad=True) if affine else None
            b = torch.zeros(cols, dtype=stream or x, requires_grad=True) if affine and centre else None
            y, z = norm.dropout_add_norm_triton(a, r, w, b, dropout=dropout, centre=centre)
            (y.sum() + z.sum() if fused else y.sum()).backward()

        return Case(name, call)

    fp16, fp32 = torch.float16, torch.float32
    layer, drop = {"centre": True}, {"centre": True, "fused": True, "dropout": 0.1}
    return [
        *(case(f"rms bf16 {n}", 8, n) for n in (64, 256, 1024, 4096, 8192, 16384, 32768, 65536)),
        *(case(f"layer bf16 {n}", 8, n, **layer) for n in (1024, 4096, 8192, 32768, 65536)),
        *(case(f"layer fp32 {n}", 8, n, **layer, x=fp32) for n in (4096, 8192, 32768)),
        case("layer fp16 4096", 8, 4096, **layer, x=fp16),
        case("layer bf16 4096 no affine", 8, 4096, **layer, affine=False),
        case("rms bf16 4095", 8, 4095),
        *(case(f"add rms bf16 {n}", 8, n, fused=True) for n in (4096, 8192, 32768)),
        case("add layer fp32 32768", 8, 32768, **layer, fused=True, x=fp32),
        *(case(f"add layer bf16 stream fp32 {n}", 8, n, **layer, fused=True, stream=fp32) for n in (4096, 8192, 32768)),
        *(case(f"dropout add layer bf16 {n}", 8, n, **drop) for n in (1024, 4096, 8192, 16384, 32768, 65536)),
        *(case(f"dropout add layer fp32 {n}", 8, n, **drop, x=fp32) for n in (4096, 8192, 16384)),
        *(case(f"dropout add layer bf16 stream fp32 {n}", 8, n, **drop, stream=fp32) for n in (4096, 8192, 16384)),
        case("dropout add rms bf16 4096", 8, 4096, fused=True, dropout=0.1),
        # sizes of 1 are compiled in as constants, another road through every helper
        case("dropout add layer bf16 1 x 1", 1, 1, **drop),
        case("dropout add layer bf16 1 x 65536", 1, 65536, **drop),
    ]


def glu_cases() -> list[Case]:
    """Return the cases of the gate: each activation and dtype, contiguous and the halves of one projection."""
    import torch

    from handbook_src.kernels import glu

    def case(name: str, activation: str, rows: int, cols: int, x: torch.dtype, packed: bool = False) -> Case:
        def call() -> None:
            both = torch.zeros(rows, 2 * cols, dtype=x)
            halves = (both[:, :cols], both[:, cols:]) if packed else (both[:, :cols].clone(), both[:, cols:].clone())
            glu.glu_triton(*(t.requires_grad_() for t in halves), activation).sum().backward()

        return Case(name, call)

    bf16, fp16, fp32 = torch.bfloat16, torch.float16, torch.float32
    return [
        *(case(f"{a} bf16", a, 64, 11008, bf16) for a in glu.ACTIVATIONS),
        case("silu fp16", "silu", 64, 11008, fp16),
        *(case(f"{a} fp32", a, 64, 11008, fp32) for a in ("silu", "gelu")),
        case("silu bf16 packed 11008", "silu", 64, 11008, bf16, packed=True),
        case("silu bf16 packed 64", "silu", 64, 64, bf16, packed=True),
        case("silu bf16 packed 33", "silu", 64, 33, bf16, packed=True),
        case("silu bf16 1 x 1", "silu", 1, 1, bf16),
    ]


def cross_entropy_cases() -> list[Case]:
    """Return the cases of cross-entropy: vocabularies from digits to 262144, each option and dtype."""
    import torch

    from handbook_src.kernels.cross_entropy import cross_entropy_triton

    def case(name: str, rows: int, cols: int, x: torch.dtype, **options: float) -> Case:
        def call() -> None:
            logits = torch.zeros(rows, cols, dtype=x, requires_grad=True)
            cross_entropy_triton(logits, torch.zeros(rows, dtype=torch.long), **options)[0].sum().backward()

        return Case(name, call)

    bf16, fp16, fp32 = torch.bfloat16, torch.float16, torch.float32
    return [
        *(case(f"bf16 {v}", 64, v, bf16) for v in (10, 1000, 4096, 32000, 50257, 131072, 262144)),
        *(case(f"fp32 {v}", 64, v, fp32) for v in (10, 50257, 131072)),
        case("fp16 32000", 64, 32000, fp16),
        *(
            case(f"smoothed {k} 131072", 64, 131072, x, label_smoothing=0.1)
            for k, x in (("bf16", bf16), ("fp32", fp32))
        ),
        case("z-loss bf16 131072", 64, 131072, bf16, z_loss=1e-4, label_smoothing=0.1),
        case("bf16 1 x 1", 1, 1, bf16),
    ]


def rope_cases() -> list[Case]:
    """Return the cases of the rotary embedding: both pairings, each dtype, partial rotation, odd widths."""
    import torch

    from handbook_src.kernels.rope import rope_triton

    def case(name: str, interleaved: bool, x: torch.dtype, e: int, rotary: int, heads: int = 32, t: int = 8) -> Case:
        def call() -> None:
            a = torch.zeros(1, t, heads, e, dtype=x, requires_grad=True)
            cos, sin = torch.zeros(2, t, rotary // 2)
            rope_triton(a, cos, sin, interleaved).sum().backward()

        return Case(name, call)

    bf16, fp16, fp32 = torch.bfloat16, torch.float16, torch.float32
    return [
        *(
            case(f"{k} bf16 {e}", i, bf16, e, e)
            for k, i in (("half", False), ("interleaved", True))
            for e in (64, 128, 256)
        ),
        *(case(f"{k} fp32 128", i, fp32, 128, 128) for k, i in (("half", False), ("interleaved", True))),
        case("half fp16 128", False, fp16, 128, 128),
        case("half bf16 80 of 80", False, bf16, 80, 80),
        case("half bf16 32 of 128", False, bf16, 128, 32),
        case("interleaved bf16 64 of 192", True, bf16, 192, 64),
        case("half bf16 128 one head", False, bf16, 128, 128, heads=1),
        case("half fp32 1 x 2", False, fp32, 2, 2, heads=1, t=1),
    ]


def flash_attention_cases() -> list[Case]:
    """Return the cases of flash attention: widths of a head, dtypes, each option alone and all together."""
    import torch

    from handbook_src.kernels.flash_attention import flash_attention_triton

    def case(
        name: str, e: int, x: torch.dtype = torch.bfloat16, c: int | None = None, group: int = 1,
        options: tuple[str, ...] = (), t: int = 512,
    ) -> Case:  # fmt: skip
        def call() -> None:
            wide = {"q": (4, e), "k": (4 // group, e), "v": (4 // group, c or e)}
            q, k, v = (torch.zeros(1, t, *size, dtype=x, requires_grad=True) for size in wide.values())
            kwargs: dict[str, Any] = {"causal": True} if "causal" in options else {}
            kwargs |= {"window": 100} if "window" in options else {}
            kwargs |= {"soft_cap": 30.0} if "cap" in options else {}
            kwargs |= {"alibi": torch.ones(4)} if "alibi" in options else {}
            kwargs |= {"sinks": torch.zeros(4, requires_grad=True)} if "sinks" in options else {}
            if "packed" in options:
                edges = torch.tensor([0, t // 2, t], dtype=torch.int32)
                kwargs |= {"cu_q": edges, "cu_k": edges}
            flash_attention_triton(q, k, v, **kwargs)[0].sum().backward()

        return Case(name, call)

    fp16, fp32 = torch.float16, torch.float32
    every = ("causal", "window", "cap", "alibi", "sinks", "packed")
    return [
        *(case(f"causal bf16 {e}", e, options=("causal",)) for e in (64, 128, 256)),
        case("full bf16 128", 128),
        *(case(f"everything bf16 {e}", e, group=2, options=every) for e in (64, 128, 256)),
        *(case(f"causal fp32 {e}", e, fp32, options=("causal",)) for e in (64, 128)),
        case("causal cap bf16 128", 128, options=("causal", "cap")),
        case("causal fp16 128", 128, fp16, options=("causal",)),
        case("causal bf16 80", 80, options=("causal",)),
        case("causal bf16 192 to 128", 192, c=128, options=("causal",)),
        case("causal bf16 1 x 1", 1, options=("causal",), t=1),
        *decode_cases(),
    ]


def decode_cases() -> list[Case]:
    """Return the cases of decoding over pages: widths, a group of heads, every option."""
    import torch

    from handbook_src.kernels.flash_decode import paged_decode_triton

    def case(name: str, e: int, x: torch.dtype = torch.bfloat16, options: bool = False) -> Case:
        def call() -> None:
            q, pages = torch.zeros(4, 8, e, dtype=x), torch.zeros(32, 16, 2, e, dtype=x)
            table, lengths = torch.zeros(4, 64, dtype=torch.int32), torch.ones(4, dtype=torch.int32)
            extra = {"alibi": torch.ones(8), "sinks": torch.zeros(8), "window": 100, "soft_cap": 30.0}
            paged_decode_triton(q, pages, pages, table, lengths, **(extra if options else {}))

        return Case(name, call)

    return [
        *(case(f"decode bf16 {e}", e) for e in (64, 128, 256)),
        case("decode everything bf16 128", 128, options=True),
    ]


#: The cases of each kernel, by the stem of its file.
CASES = {
    "norm": norm_cases, "glu": glu_cases, "cross_entropy": cross_entropy_cases, "rope": rope_cases,
    "flash_attention": flash_attention_cases,
}  # fmt: skip


def fake_driver(target: Any) -> Any:
    """Return what Triton asks of a GPU driver, answered for ``target`` without one."""
    import torch

    arch = target.arch
    # Triton keeps compiled kernels per device number: one number per target.
    number = 1000 + (arch if isinstance(arch, int) else sum(map(ord, arch)))
    properties = {"max_shared_mem": 232448, "multiprocessor_count": 132, "warpSize": target.warp_size}
    return SimpleNamespace(
        get_current_target=lambda: target,
        get_current_device=lambda: number,
        get_current_stream=lambda device=None: 0,
        set_current_device=lambda device: None,
        get_active_torch_device=lambda: torch.device("cpu"),
        utils=SimpleNamespace(get_device_properties=lambda device: properties),
    )


@contextmanager
def captured(target: Any) -> Iterator[list[tuple[str, Any]]]:
    """Compile instead of launching; yield the list that fills with (kernel name, compiled kernel).

    The driver stays replaced: where there is no GPU there is none to put back, so this wants a process of its own.
    """
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction, KernelInterface

    from handbook_src.kernels import launch, norm

    found: list[tuple[str, Any]] = []

    def instead(self: Any, grid: Any) -> Callable[..., None]:
        if not isinstance(self, JITFunction):
            raise TypeError(f"{self}: autotuned kernels are not captured; add the loop over their configurations")

        def launch(*args: Any, **kwargs: Any) -> None:
            found.append((self.__name__, self.warmup(*args, grid=grid, **kwargs)))

        return launch

    name = next(n for n, t in targets().items() if t == target)
    kept = KernelInterface.__getitem__, launch.needs_for_triton, norm.LANES, launch.family
    KernelInterface.__getitem__ = instead
    launch.needs_for_triton, norm.LANES = (lambda *tensors: None), target.warp_size
    launch.family = lambda x: FAMILY[name]
    driver.set_active(fake_driver(target))
    try:
        yield found
    finally:
        KernelInterface.__getitem__, launch.needs_for_triton, norm.LANES, launch.family = kept


def report(compiled: Any, target: str) -> dict[str, Any]:
    """Return what the compiler made: registers, spills, memory, wide loads; and what is wrong with it."""
    row: dict[str, Any] = {"warps": compiled.metadata.num_warps, "shared_bytes": compiled.metadata.shared}
    row |= _amd(compiled.asm["amdgcn"]) if target.startswith("gfx") else _nvidia(compiled)
    problems = []
    if row["spilled_bytes"]:
        problems.append(f"spills {row['spilled_bytes']} bytes")
    if row["shared_bytes"] > SHARED_LIMIT[target]:
        problems.append(f"shared memory {row['shared_bytes']} > {SHARED_LIMIT[target]}")
    if target == "sm90" and TRANSPOSED.search(compiled.asm["ttgir"]):
        problems.append("a product's result is transposed: miscompiled on Hopper by triton 3.4 to 3.7.0")
    return row | {"problem": "; ".join(problems)}


def _nvidia(compiled: Any) -> dict[str, Any]:
    import triton

    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder, "kernel.cubin")
        cubin.write_bytes(compiled.asm["cubin"])
        usage = _output(tools / "cuobjdump", "-res-usage", cubin)
        sass = _output(tools / "nvdisasm", "-c", cubin)
    # A spill is local memory: loads LDL, stores STL, four bytes a lane and instruction unless they say otherwise.
    local = re.findall(r"\bSTL(?:\.(\d+))?", sass)
    return {
        "registers": int(re.search(r"REG:(\d+)", usage)[1]),
        "spilled_bytes": sum(int(bits or 32) // 8 for bits in local),
        "loads": len(re.findall(r"\b(?:LDG|LDGSTS)\.", sass)),
        "loads_16_bytes": len(re.findall(r"\b(?:LDG|LDGSTS)\.E[\w.]*\.128", sass)),
        "stores": len(re.findall(r"\bSTG\.", sass)),
        "stores_16_bytes": len(re.findall(r"\bSTG\.E[\w.]*\.128", sass)),
        "instructions": len(re.findall(r"^\s+/\*[0-9a-f]{4,}\*/", sass, re.M)),
        "wgmma": len(re.findall(r"\bHGMMA\.", sass)),
    }


def _amd(assembly: str) -> dict[str, Any]:
    def count(pattern: str) -> int:
        return len(re.findall(pattern, assembly))

    def value(key: str) -> int:
        return int(re.search(rf"\.{key}:\s+(\d+)", assembly)[1])

    return {
        "registers": value("vgpr_count"),
        "spilled_bytes": 4 * value("vgpr_spill_count"),
        "loads": count(r"\b(?:global|buffer)_load_"),
        "loads_16_bytes": count(r"\b(?:global|buffer)_load_dwordx4"),
        "stores": count(r"\b(?:global|buffer)_store_"),
        "stores_16_bytes": count(r"\b(?:global|buffer)_store_dwordx4"),
        "instructions": count(r"(?m)^\t[vs]_"),
        "wgmma": 0,
    }


def _output(*command: Any) -> str:
    return subprocess.run([str(c) for c in command], capture_output=True, text=True, check=True).stdout


def columns(kernels: list[str]) -> list[str]:
    """Return the columns of the report; of kernels of products also how many wgmma instructions there are."""
    return [*COLUMNS, "wgmma"] if set(kernels) & set(PRODUCTS) else COLUMNS


def named_for(target: str, kernel: str) -> list[str]:
    """Return the cases of ``kernel`` that a ``target`` has to pass."""
    everything = ("sm90",) if kernel in PRODUCTS else ("sm80", "sm90")
    return [case.name for case in CASES[kernel]()] if target in everything else list(EVERYWHERE[kernel])


def check(kernels: list[str], wanted: list[str], match: list[str]) -> Iterator[dict[str, Any]]:
    """Compile the cases in ``match`` (else each target's own) for the ``wanted`` targets; yield one row a launch."""
    import torch
    import triton

    for name, kernel in ((name, kernel) for name in wanted for kernel in kernels):
        for case in CASES[kernel]():
            if case.name not in (match or named_for(name, kernel)):
                continue
            with captured(targets()[name]) as launches:
                case.call()
            for launched, compiled in launches:
                facts = report(compiled, name)
                halves = name == "sm90" and kernel in PRODUCTS and "fp32" not in case.name
                if halves and launched not in NO_WGMMA and not facts["wgmma"]:
                    facts["problem"] = "; ".join(filter(None, (facts["problem"], "no wgmma")))
                yield {"case": case.name, "target": name, "kernel": launched, **facts} | {
                    "triton": triton.__version__, "torch": torch.__version__.split("+")[0],
                }  # fmt: skip


def main() -> int:
    """Print the table; return 1 where a kernel spills on sm90 or does not fit."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kernels", default=",".join(CASES), help="only these, separated by commas")
    parser.add_argument("--targets", default="sm80,sm90,sm100,gfx942")
    parser.add_argument("--cases", help="only these cases, by name, separated by commas")
    parser.add_argument("--csv", type=Path, help="write the table here as well")
    parser.add_argument("--triton", type=Path, help="folder of another Triton")
    options = parser.parse_args()
    os.environ.pop("TRITON_INTERPRET", None)  # read when a kernel is defined: must be unset by then
    if options.triton:
        sys.path.insert(0, str(options.triton.resolve()))
    wanted = options.cases.split(",") if options.cases else []
    rows = []
    print(f"{'case':42} {'target':7} {'kernel':15} warps  regs spill shared  ld128/ld  st128/st instr")
    for r in check(options.kernels.split(","), options.targets.split(","), wanted):
        rows.append(r)
        print(
            f"{r['case']:42} {r['target']:7} {r['kernel']:15} {r['warps']:5} {r['registers']:5} {r['spilled_bytes']:5} "
            f"{r['shared_bytes']:6} {r['loads_16_bytes']:5}/{r['loads']:<4} {r['stores_16_bytes']:4}/{r['stores']:<4} "
            f"{r['instructions']:5} {r['problem']}",
            flush=True,
        )
    if options.csv:
        with options.csv.open("w", newline="") as file:
            fields = columns(options.kernels.split(","))
            writer = csv.DictWriter(file, fields, extrasaction="ignore", lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)
    failed = [r for r in rows if r["problem"] and (r["target"] == "sm90" or "shared" in r["problem"])]
    print(f"{len(rows)} kernels compiled by triton {rows[0]['triton']}, {len(failed)} refused")
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
