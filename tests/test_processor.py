"""The proofs hold on other processors: some of them run again with the matrix libraries held to an older one."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

#: What torch, MKL and oneDNN read at their start: no vectors wider than SSE's, so other kernels and other roundings.
OLDER = {
    "ATEN_CPU_CAPABILITY": "default",
    "MKL_ENABLE_INSTRUCTIONS": "SSE4_2",  # read on Intel's processors alone
    "MKL_CBWR": "COMPATIBLE",  # and this on all
    "ONEDNN_MAX_CPU_ISA": "SSE41",
}

#: Products of matrices, for a batch and for a sample, in one piece and in parts.
FILES = (
    "functional/foundations/test_linear.py",
    "layers/foundations/test_glu.py",
    "layers/foundations/test_mlp.py",
    "layers/attention/test_attention.py",
    "layers/attention/test_grouped_query.py",
)

PROGRAM = """
import sys, torch
assert torch.backends.cpu.get_cpu_capability() == "DEFAULT", torch.backends.cpu.get_cpu_capability()
import pytest
sys.exit(pytest.main(["-q", "-p", "no:cacheprovider", "-m", "law", *sys.argv[1:]]))
"""


@pytest.mark.slow
def test_laws_hold_with_an_older_instruction_set() -> None:
    """No exact comparison, and no tolerance, rests on the kernel that this machine's library happens to choose."""
    files = [str(ROOT / "tests" / name) for name in FILES]
    run = subprocess.run(
        [sys.executable, "-c", PROGRAM, *files], cwd=ROOT, env={**os.environ, **OLDER}, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-1000:]
