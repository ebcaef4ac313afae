"""Let a CUDA-built torchvision or torchaudio load on a torch without CUDA.

The package index serves one Linux wheel of each, linked against ``libcudart``,
``libc10_cuda`` and ``libtorch_cuda``.  A torch for processors has none of the
three, the extension does not load, and ``import torchvision`` fails; transformers,
timm, diffusers, peft and torchmetrics fail with it, because they import it where
they find it.  Three libraries that define the missing names and do nothing
satisfy the loader, and the extension's processor kernels then work.
"""

from __future__ import annotations

import ctypes
import hashlib
import importlib.util
import os
import shutil
import subprocess
import tempfile
from collections import defaultdict
from pathlib import Path

import torch

TOOLS = ("gcc", "nm", "readelf")
RUNTIME = ("libcudart", "libc10_cuda", "libtorch_cuda")


def load(package: str) -> bool:
    """Load the stubs that ``package`` needs; return whether its extension can load now."""
    if torch.version.cuda or getattr(torch.version, "hip", None):
        return True
    extensions = [p for p in _extensions(package) if any(name.encode() in p.read_bytes() for name in RUNTIME)]
    if not extensions:
        return True  # a build for processors: nothing is missing
    if not all(shutil.which(tool) for tool in TOOLS):
        return False
    folder = _cache(extensions)
    if not folder.exists():
        _build(extensions, folder)
    for library in sorted(folder.glob("*.so*")):
        # the loader looks the names up by SONAME among what is already loaded
        ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)
    return True


def _extensions(package: str) -> list[Path]:
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        return []
    found = Path(spec.submodule_search_locations[0]).rglob("*.so")
    return sorted(p for p in found if not p.name.startswith("image"))  # it needs libnvjpeg too, and Pillow reads images


def _cache(extensions: list[Path]) -> Path:
    about = [torch.__version__, *(f"{p}:{p.stat().st_size}:{p.stat().st_mtime_ns}" for p in extensions)]
    key = hashlib.sha256("\n".join(about).encode()).hexdigest()[:16]
    user = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(user) / "handbook_src" / f"cuda_stub-{key}"


def _build(extensions: list[Path], folder: Path) -> None:
    """Compile into a folder of our own, then rename: several test workers may do this at once."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(dir=folder.parent))
    try:
        for soname, symbols in _wanted(extensions).items():
            _compile(work, soname, symbols)
        for source in [*work.glob("*.c"), *work.glob("*.map")]:
            source.unlink()
        try:
            work.rename(folder)
        except OSError:
            if not folder.exists():  # another worker may have been first
                raise
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _wanted(extensions: list[Path]) -> dict[str, set[str]]:
    """Which library must define which symbols.

    The runtime's symbols carry their library as a version (``cudaFree@libcudart.so.13``);
    the rest is torch's own C++ and goes into ``libc10_cuda``.
    """
    known = set()
    for name in ("libc10.so", "libtorch_cpu.so", "libtorch_python.so"):
        known |= {s for s, _ in _symbols("--defined-only", Path(torch.__file__).parent / "lib" / name)}
    wanted: dict[str, set[str]] = defaultdict(set)
    for extension in extensions:
        listing = _output("readelf", "--dynamic", "--wide", str(extension))
        for word in listing.replace("[", " ").replace("]", " ").split():
            if word.startswith(RUNTIME):
                wanted[word] |= set()
        for symbol, version in _symbols("--undefined-only", extension):
            if version.startswith(RUNTIME):
                wanted[version].add(symbol)
            elif "cuda" in symbol and symbol not in known:
                wanted["libc10_cuda.so"].add(symbol)
    return wanted


def _symbols(kind: str, library: Path) -> list[tuple[str, str]]:
    lines = _output("nm", "--dynamic", kind, str(library)).splitlines()
    names = [line.split()[-1].partition("@") for line in lines if line.strip()]
    return [(name, version.lstrip("@")) for name, _, version in names]


def _compile(folder: Path, soname: str, symbols: set[str]) -> None:
    source = folder / f"{soname}.c"
    # CUDACachingAllocator::allocator is a variable that the extension reads at load time
    lines = [f"void *{s}[64];" if s.endswith("9allocatorE") else f"void *{s}(void) {{ return 0; }}" for s in symbols]
    source.write_text("\n".join(["int handbook_stub;", *sorted(lines)]) + "\n")
    command = ["gcc", "-shared", "-fPIC", "-w", f"-Wl,-soname,{soname}", str(source), "-o", str(folder / soname)]
    if soname.startswith("libcudart"):
        script = folder / f"{soname}.map"
        script.write_text(f"{soname} {{ global: *; }};\n")
        command.append(f"-Wl,--version-script={script}")
    subprocess.run(command, check=True, capture_output=True)


def _output(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout
