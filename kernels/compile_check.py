"""Compile, for GPUs that this machine does not have, exactly what a public op launches; report what the compiler made.

    python kernels/compile_check.py                      table of every case, exit status 1 on a problem
    python kernels/compile_check.py --csv FILE           the same as CSV
    python kernels/compile_check.py --triton FOLDER      with the Triton installed in FOLDER (pip install --target)
    python kernels/compile_check.py --kernels norm --targets sm90 --cases "rms bf16 4096,layer fp16 4096"

A report is a record: each row carries the hash of the code that it was made from, and holds while that is the same.

The op runs on CPU tensors; a launch is caught before it starts and compiled instead, so grids, constexprs, argument
types and the divisibility that 16-byte loads rest on are those of the real call, not a copy of them kept here.  The
Triton wheel carries ptxas, nvdisasm and LLVM for AMD: no CUDA, no ROCm, no driver.
"""

from __future__ import annotations

import argparse
import csv
import importlib.util
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

# sys.path[0] is this folder when run as a script; the handbook is imported as installed, or from the checkout.
HERE = Path(__file__).resolve().parent
SHARED_LIMIT = {"sm80": 163 << 10, "sm90": 227 << 10, "sm100": 227 << 10, "gfx942": 64 << 10}
COLUMNS = [
    "case", "target", "kernel", "warps", "registers", "spilled_bytes", "shared_bytes",
    "loads", "loads_16_bytes", "stores", "stores_16_bytes", "instructions", "triton", "torch", "source", "problem",
]  # fmt: skip


#: What flash attention has files for, besides its own.
FLASH = ("attention_backward", "attention_tile", "decode")
#: Kernels whose work is products of tiles: on Hopper these must be wgmma.
PRODUCTS = ("flash_attention",)
#: Kernels of those files that have no 64 rows for it: decoding has a group of heads.
NO_WGMMA = ("_split", "_merge")
#: The family of tiles that a launcher chooses on each target.
FAMILY = {"sm80": "ampere", "sm90": "hopper", "sm100": "blackwell", "gfx942": "amd"}


#: What fla-org/flash-linear-attention #640 found miscompiled, in Triton's GPU dialect.
TRANSPOSED = re.compile(r"tt\.trans .*: tensor<[^>]*#mma[^>]*> -> tensor")


def _neighbour(stem: str) -> Any:
    """Import a file of this folder, which is no package, wherever this one was started from."""
    spec = importlib.util.spec_from_file_location(stem, HERE / f"{stem}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[stem] = module
    spec.loader.exec_module(module)
    return module


_cases = _neighbour("compile_cases")
CASES, EVERYWHERE = _cases.CASES, _cases.EVERYWHERE


def targets() -> dict[str, Any]:
    """Return the GPUs compiled for: Ampere, Hopper, Blackwell and AMD's CDNA3."""
    from triton.backends.compiler import GPUTarget

    return {
        "sm80": GPUTarget("cuda", 80, 32),
        "sm90": GPUTarget("cuda", 90, 32),
        "sm100": GPUTarget("cuda", 100, 32),
        "gfx942": GPUTarget("hip", "gfx942", 64),
    }


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


def source_of(kernel: str) -> str:
    """Return twelve digits of a hash of the code that decides what is compiled, without docstrings and comments.

    That is the kernel's own files, and what these use of ``launch`` and the cases of ``compile_cases``.
    """
    from handbook_src.program import Program, needed, statements

    folder = Path(importlib.util.find_spec("handbook_src.kernels").submodule_search_locations[0])
    names = [kernel, *(f"flash_{part}" for part in FLASH if kernel == "flash_attention")]
    own, launch, cases = (
        list(statements(path.read_text("utf8") for path in paths))
        for paths in ([folder / f"{name}.py" for name in names], [folder / "launch.py"], [HERE / "compile_cases.py"])
    )
    own = [s for s in own if s.binds]  # not the files' own docstrings
    used = set().union(*(s.uses for s in own))
    return Program((*own, *needed(launch, used), *needed(cases, {CASES[kernel].__name__}))).hash[:12]


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
                    "triton": triton.__version__, "torch": torch.__version__.split("+")[0], "source": source_of(kernel),
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
