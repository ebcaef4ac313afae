"""The wheel: builds without network, installs, and works outside the repository."""

from __future__ import annotations

import os
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

SCRIPT = """\
import torch
import handbook_src
from handbook_src.layers.norm import RMSNorm

layer = RMSNorm(8)
x = torch.randn(2, 3, 8, requires_grad=True)
y = layer(x)
y.square().sum().backward()
assert torch.allclose(y.square().mean(-1), torch.ones(2, 3), atol=1e-3)
print(handbook_src.__file__)
"""


def run(*command: object, cwd: Path = ROOT) -> str:
    env = {**os.environ, "PYTHONSAFEPATH": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([str(c) for c in command], cwd=cwd, env=env, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", out)
    (found,) = out.glob("*.whl")
    return found


def test_the_wheel_holds_the_data_and_no_tests(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    tops = {name.partition("/")[0] for name in names}
    assert {t for t in tops if not t.endswith(".dist-info")} == {"handbook_src"}
    for data in (ROOT / "handbook_src").rglob("*"):
        if data.is_file() and data.suffix in {".tsv", ".json", ".css", ".bib", ".html"}:
            assert data.relative_to(ROOT).as_posix() in names
    assert "handbook_src/catalogue/components.tsv" in names
    assert "handbook_src/catalogue/claims.tsv" in names
    assert any(name.endswith("licenses/LICENSE") for name in names)
    assert not [name for name in names if "__pycache__" in name or "test_" in name]


def test_the_metadata_asks_for_the_light_dependencies_only(wheel):
    archive = zipfile.ZipFile(wheel)
    (name,) = [n for n in archive.namelist() if n.endswith(".dist-info/METADATA")]
    lines = archive.read(name).decode().splitlines()
    needs = [line.split()[1] for line in lines if line.startswith("Requires-Dist:") and "extra ==" not in line]
    assert {n.partition(">")[0] for n in needs} == {
        "torch", "numpy", "einops", "jaxtyping", "safetensors", "tqdm",
    }  # fmt: skip
    assert "License-Expression: Apache-2.0" in lines
    extras = {line.split()[1] for line in lines if line.startswith("Provides-Extra:")}
    assert extras >= {"kernels", "book", "test", "reference"}


def test_a_layer_works_outside_the_repository(wheel, tmp_path):
    """In an environment of its own, which borrows the dependencies but not the editable install."""
    home = tmp_path / "env"
    venv.create(home, with_pip=False, symlinks=True)
    python = home / "bin" / "python"
    site = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip())
    run(sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", site, wheel)
    # a plain path, not addsitedir: the .pth of the editable install is then not read
    dependencies = run(sys.executable, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip()
    (site / "borrowed.pth").write_text(dependencies + "\n")
    script = tmp_path / "ten_lines.py"
    script.write_text(SCRIPT)
    where = run(python, script, cwd=tmp_path).strip()
    assert Path(where).is_relative_to(home)
    cards = run(python, "-m", "handbook_src.catalogue", "--json", cwd=tmp_path)
    assert '"rms-norm"' in cards
