"""The workshop's scripts: the bench times nothing that is wrong, and its records are those of today's kernels."""

from __future__ import annotations

import csv
import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

WORKSHOP = Path(__file__).resolve().parents[2] / "kernels"


def script(path: str) -> ModuleType:
    """Import a script of the workshop by its path: the folder is no package."""
    name = "workshop_" + Path(path).stem
    spec = importlib.util.spec_from_file_location(name, WORKSHOP / path)
    sys.modules[name] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def bench(monkeypatch):
    """The bench, with our kernel among the contestants and nothing to compile."""
    bench = script("norm/bench.py")
    makers = {"torch": bench.of_torch, "reference": bench.of_reference, "triton": bench.of_triton}
    monkeypatch.setattr(bench, "contestants", lambda p, device, dropout: {n: m(p, dropout) for n, m in makers.items()})
    return bench


OPS = ["rms-norm", "layer-norm", "dropout-add-rms-norm", "dropout-add-layer-norm"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("op", OPS)
def test_every_backend_computes_the_same(bench, op, dtype):
    bench.assert_right(bench.Problem(op, 3, 17, dtype), "cpu")


@pytest.mark.parametrize("op", OPS)
def test_a_wrong_backend_is_not_timed(bench, op, monkeypatch):
    problem = bench.Problem(op, 3, 17, torch.float32)
    right = bench.contestants(problem, "cpu", 0.0)["triton"]

    def wrong(*leaves):
        first, *rest = right(*leaves)
        return (first * 1.001, *rest)

    monkeypatch.setattr(bench, "contestants", lambda p, device, dropout: {"triton": wrong})
    monkeypatch.setattr(bench, "bench", lambda *a, **k: pytest.fail("was timed"))
    with pytest.raises(AssertionError, match="parity is red: triton"):
        bench.measure(problem, "cpu", 5)


def test_bytes_are_those_of_the_kernels_first_comment(bench):
    half = torch.bfloat16
    for op, dropout, forward, backward in [
        ("rms-norm", 0.0, 2, 3),
        ("layer-norm", 0.0, 2, 3),
        ("dropout-add-rms-norm", 0.0, 4, 4),
        ("dropout-add-layer-norm", 0.1, 4, 5),
    ]:
        p = bench.Problem(op, 10, 100, half, dropout)
        assert (p.bytes("forward"), p.bytes("backward")) == (forward * 2000, backward * 2000)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU to measure on")
def test_without_a_gpu_the_bench_says_so(bench, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["bench.py"])
    bench.main()
    assert capsys.readouterr().out == "not measured: no GPU\n"


def test_the_compile_report_covers_every_case_and_no_hopper_kernel_spills():
    check = script("compile_check.py")
    with (WORKSHOP / "norm" / "results" / "compile.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == check.COLUMNS
    for version, targets in {"3.7.1": set(check.SHARED_LIMIT), "3.6.0": {"sm90"}}.items():
        for target in targets:
            of = [r for r in rows if r["triton"] == version and r["target"] == target]
            assert {r["case"] for r in of} == set(check.named_for(target)), (
                f"run compile_check.py again: {version} {target}"
            )
    assert not [r for r in rows if r["target"] == "sm90" and r["problem"]]
