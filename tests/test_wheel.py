"""The wheel, built and installed as a stranger would, works outside the repository."""

import os
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow
REPOSITORY = Path(__file__).resolve().parents[1]
SCRIPT = """
import torch
import handbook_src
from handbook_src.layers.normalisation.norm import RMSNorm

norm = RMSNorm(8)
x = torch.randn(2, 3, 8, requires_grad=True)
norm(x).square().sum().backward()
assert x.grad.shape == x.shape
print(handbook_src.__file__)
"""


def call(*line, cwd, **settings):
    """Run outside the repository: no folder of it is on the path."""
    env = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")}
    run = subprocess.run(list(map(str, line)), cwd=cwd, env=env | settings, capture_output=True, text=True)
    return run.returncode, run.stdout, run.stderr


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    code, out, err = call(
        sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", folder, REPOSITORY, cwd=folder
    )
    assert code == 0, out + err
    return next(folder.glob("*.whl"))


@pytest.fixture(scope="module")
def stranger(wheel, tmp_path_factory):
    """An environment with the wheel; torch and the rest are lent by this one, the package is not."""
    folder = tmp_path_factory.mktemp("stranger")
    venv = folder / "venv"
    assert call(sys.executable, "-m", "venv", "--without-pip", venv, cwd=folder)[0] == 0
    python = venv / "bin" / "python"
    code, out, err = call(
        sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", "--no-index", wheel, cwd=folder
    )
    assert code == 0, out + err
    here = sysconfig.get_paths()["purelib"]
    inside = venv / "lib" / f"python{sys.version_info[0]}.{sys.version_info[1]}" / "site-packages"
    (inside / "lent.pth").write_text(here + "\n", "utf8")  # its own .pth files are not followed
    return python, folder


def test_the_wheel_holds_the_package_and_its_tables_only(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0] for name in names} == {"handbook_src", "handbook_src-0.1.0.dist-info"}
    assert "handbook_src/catalogue/components.tsv" in names
    assert "handbook_src/catalogue/claims.tsv" in names
    assert [name for name in names if "__pycache__" in name] == []
    assert any(name.endswith("licenses/LICENSE") for name in names)
    for data in (REPOSITORY / "handbook_src").rglob("*"):
        if data.is_file() and data.suffix in {".tsv", ".json", ".css", ".js", ".html"}:
            assert data.relative_to(REPOSITORY).as_posix() in names


def test_the_wheel_asks_for_the_light_dependencies_only(wheel):
    archive = zipfile.ZipFile(wheel)
    (name,) = [n for n in archive.namelist() if n.endswith(".dist-info/METADATA")]
    lines = archive.read(name).decode().splitlines()
    needs = [line.split()[1] for line in lines if line.startswith("Requires-Dist:") and "extra ==" not in line]
    light = {"torch", "numpy", "einops", "jaxtyping", "safetensors", "tqdm", "lazy-loader"}
    assert {n.partition(">")[0] for n in needs} == light
    assert "License-Expression: Apache-2.0" in lines
    extras = {line.split()[1] for line in lines if line.startswith("Provides-Extra:")}
    assert extras >= {"kernels", "book", "test", "reference"}


def test_a_layer_works_from_the_wheel(stranger):
    python, folder = stranger
    script = folder / "ten_lines.py"
    script.write_text(SCRIPT, "utf8")
    code, out, err = call(python, script, cwd=folder)
    assert code == 0, err
    assert err == ""
    assert Path(out.strip()).is_relative_to(folder)


def test_the_catalogue_works_from_the_wheel(stranger):
    python, folder = stranger
    code, out, err = call(python, "-m", "handbook_src.catalogue", "show", "rms-norm", cwd=folder)
    assert code == 0, err
    assert "RMSNorm" in out


def test_the_commands_say_that_they_need_the_repository(stranger):
    python, folder = stranger
    code, _, err = call(python, "-m", "handbook_src", "book", cwd=folder)
    assert code == 1
    assert "clone the repository" in err
    assert "Traceback" not in err
