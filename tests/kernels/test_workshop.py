"""The workshop's scripts: no bench times what is wrong, and the records are those of today's kernels."""

from __future__ import annotations

import csv
import dataclasses
import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from handbook_src.bench import workshop
from handbook_src.bench.workshop import Workshop

WORKSHOP = Path(__file__).resolve().parents[2] / "kernels"
KERNELS = ("norm", "glu", "cross_entropy", "rope")
CPU = ("torch", "compile")  # who competes in attention's bench there
REPORTS = (*KERNELS, "flash_attention")  # attention's bench has its own peers and its own loop


def script(path: str) -> ModuleType:
    """Import a script of the workshop by its path: the folder is no package."""
    name = "workshop_" + path.removesuffix(".py").replace("/", "_")
    spec = importlib.util.spec_from_file_location(name, WORKSHOP / path)
    sys.modules[name] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def problems(kernel: str) -> list:
    """One problem of each operation of a bench, at test size."""
    bench, dtypes = script(f"{kernel}/bench.py"), [torch.float32, torch.bfloat16, torch.float16]
    shapes = {"samples": 1, "times": 3, "heads": 2, "features": 6} if kernel == "rope" else {"rows": 3, "cols": 17}
    first = {p.op: p for p in reversed(bench.problems("cuda"))}
    return [dataclasses.replace(p, **shapes, dtype=dtype) for p in first.values() for dtype in dtypes]


PROBLEMS = [pytest.param(kernel, p, id=f"{p.op}-{p.dtype}") for kernel in KERNELS for p in problems(kernel)]


@pytest.fixture(autouse=True)
def everyone(monkeypatch):
    """Our kernel is among the contestants, also on a CPU, and nothing is compiled."""

    def contestants(self, p, device):
        return {name: self.makers[name](p, device) for name in ("torch", "reference", "triton")}

    monkeypatch.setattr(Workshop, "contestants", contestants)


@pytest.mark.parametrize(("kernel", "problem"), PROBLEMS)
def test_every_backend_computes_the_same(kernel, problem):
    script(f"{kernel}/bench.py").WORKSHOP.assert_right(problem, "cpu")


@pytest.mark.parametrize("kernel", KERNELS)
def test_a_wrong_backend_is_not_timed(kernel, monkeypatch):
    problem, bench = problems(kernel)[0], script(f"{kernel}/bench.py").WORKSHOP
    right = bench.contestants(problem.small(), "cpu")["triton"]

    def wrong(*leaves):
        first, *rest = right(*leaves)
        return (first * 1.001, *rest)

    monkeypatch.setattr(Workshop, "contestants", lambda self, p, device: {"triton": wrong})
    monkeypatch.setattr(workshop, "bench", lambda *a, **k: pytest.fail("was timed"))
    with pytest.raises(AssertionError, match="parity is red: triton"):
        bench.measure(problem, "cpu", 5)


@pytest.mark.parametrize("kernel", KERNELS)
def test_what_is_right_is_timed(kernel, monkeypatch):
    """Both ways, every contestant, torch first: it is the baseline."""
    problem, seen = problems(kernel)[0], []

    def timed(candidates, **facts):
        for run in candidates.values():
            run()
        seen.append((list(candidates), facts["op"], facts["baseline"], facts["bytes_moved"]))
        return []

    monkeypatch.setattr(workshop, "bench", timed)
    script(f"{kernel}/bench.py").WORKSHOP.measure(problem, "cpu", 5)
    names = ["torch", "reference", "triton"]
    assert seen == [(names, f"{problem.op} {way}", "torch", problem.bytes(way)) for way in ("forward", "backward")]


def test_bytes_are_those_of_the_kernels_first_comment():
    counted = {
        "norm": dict.fromkeys(("rms-norm", "layer-norm"), (2, 3))
        | dict.fromkeys(("dropout-add-rms-norm", "dropout-add-layer-norm"), (4, 5)),
        "glu": dict.fromkeys(("silu", "gelu", "gelu_tanh", "relu"), (3, 5)),
        "cross_entropy": dict.fromkeys(("cross-entropy", "smoothed cross-entropy"), (1, 2)),
        "rope": dict.fromkeys(("rope half", "rope interleaved"), (2, 2)),
    }  # fmt: skip
    for kernel in KERNELS:
        for p in problems(kernel):
            each = p.leaves("cpu")[0].nbytes
            assert (p.bytes("forward"), p.bytes("backward")) == tuple(n * each for n in counted[kernel][p.op])


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU to measure on")
@pytest.mark.parametrize("kernel", KERNELS)
def test_without_a_gpu_the_bench_says_so(kernel, monkeypatch, capsys):
    bench = script(f"{kernel}/bench.py")
    monkeypatch.setattr(sys, "argv", ["bench.py"])
    bench.WORKSHOP.main(bench.__doc__)
    assert capsys.readouterr().out == "not measured: no GPU\n"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU to measure on")
def test_without_a_gpu_attentions_bench_says_so(monkeypatch, capsys):
    bench = script("flash_attention/bench.py")
    monkeypatch.setattr(sys, "argv", ["bench.py"])
    bench.main()
    assert capsys.readouterr().out == "not measured: no GPU\n"


@pytest.fixture
def attention(monkeypatch):
    """Attention's bench, and nothing is compiled."""
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    return script("flash_attention/bench.py")


@pytest.fixture
def gpu_peers(attention, monkeypatch):
    """Everyone who competes on a GPU, on a CPU: the kernel is interpreted, cuDNN and FlexAttention do not train."""
    monkeypatch.setattr(attention, "everyone", attention.gpu_contestants)
    return attention


def attention_problems(bench: ModuleType) -> list:
    """One problem of each kind, at test size."""
    first = {p.kind: p for p in bench.problems("cuda")}
    small = {"samples": 1, "times": 20, "heads": 2, "features": 16, "dtype": torch.float32}
    return [dataclasses.replace(p, **small) for p in first.values()]


def test_every_contestant_in_attention_computes_the_same(gpu_peers, monkeypatch, capsys):
    contestants, seen = gpu_peers.contestants, []

    def noted(p, device):
        seen.append((p.kind, *(found := contestants(p, device))))
        return found

    monkeypatch.setattr(gpu_peers, "contestants", noted)
    for p in attention_problems(gpu_peers):
        gpu_peers.assert_right(p, "cpu")
    fused = [(kind, "ours", "sdpa flash", "compile") for kind in ("full", "causal")]
    assert seen == [*fused, ("window", "ours", "compile"), ("alibi", "ours", "compile")]
    said = capsys.readouterr().out
    assert said.count("sdpa cudnn left out") == 2
    assert said.count("flex left out") == 4


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_flexattention_is_set_the_same_problem(attention):
    for p in attention_problems(attention):
        x = [y.detach() for y in p.leaves("cpu")]
        want = attention.flash_attention(*x, **p.options("cpu"), backend="reference")
        torch.testing.assert_close(attention.flex(p, "cpu")(*x), want)


def test_attention_that_is_wrong_or_does_not_run_is_not_timed(gpu_peers, monkeypatch):
    p = attention_problems(gpu_peers)[1]
    right = gpu_peers.everyone(p, "cpu")["compile"]
    monkeypatch.setattr(gpu_peers, "bench", lambda *a, **k: pytest.fail("was timed"))
    monkeypatch.setattr(gpu_peers, "everyone", lambda *_: {"compile": lambda *x: 1.001 * right(*x)})
    with pytest.raises(AssertionError, match="parity is red: compile"):
        next(gpu_peers.measure(p, "cpu", 5))

    def broken(*_):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(gpu_peers, "everyone", lambda *_: {"ours": broken})
    with pytest.raises(RuntimeError, match="out of memory"):
        gpu_peers.contestants(p, "cpu")


def test_attentions_bench_runs_on_a_cpu(attention, monkeypatch, capsys, tmp_path):
    """From its arguments to its CSV; a graph is walked again for each reading of the backward."""
    monkeypatch.setattr(attention, "problems", lambda device: attention_problems(script("flash_attention/bench.py")))
    command = ["bench.py", "--device", "cpu", "--rounds", "5", "--csv", str(tmp_path / "cpu.csv")]
    for only in ("window|alibi|decode", "full"):
        monkeypatch.setattr(sys, "argv", [*command, "--only", only])
        attention.main()
    with (tmp_path / "cpu.csv").open(newline="") as file:
        rows = [r for r in csv.DictReader(file) if r["op"] != "ceiling"]
    want = [(f"attention {k} {w}", b) for k in ("window", "alibi") for w in ("forward", "backward") for b in CPU]
    want += [("decode", "reference"), ("decode", "sdpa")]
    want += [(f"attention full {w}", b) for w in ("forward", "backward") for b in CPU]
    assert [(r["op"], r["backend"]) for r in rows] == want
    assert "TFLOP/s" in capsys.readouterr().out


def test_attentions_targets_are_told(attention, capsys):
    p = next(p for p in attention.problems("cuda") if (p.kind, p.features) == ("causal", 128))
    attention.told("forward", p, {"ours": 1.0, "sdpa cudnn": 0.9, "sdpa flash": 2.0})
    attention.told("backward", p, {"ours": 1.0, "sdpa flash": 1.5})
    attention.told("backward", p, {"sdpa flash": 1.5})
    said = capsys.readouterr().out.splitlines()
    assert [line.split(", ")[-1] for line in said] == ["met", "MISSED", "met"]
    assert "0.90" in said[0]


def test_attentions_work_is_the_pairs_that_are_seen(attention):
    for p in attention_problems(attention):
        p = dataclasses.replace(p, times=512)
        rule = {"causal": attention.causal, "window": attention.causal & attention.window(p.window)}.get(p.kind)
        seen = 512**2 if rule is None else int(rule.dense(512, 512).sum())
        assert p.flops == pytest.approx(4 * p.samples * p.heads * p.features * seen, rel=0.01)


@pytest.mark.parametrize("kernel", REPORTS)
def test_the_compile_report_covers_every_case_and_no_hopper_kernel_spills(kernel):
    check = script("compile_check.py")
    rows = rows_of(WORKSHOP / kernel / "results" / "compile.csv")
    assert list(rows[0]) == check.columns([kernel])
    assert {r["source"] for r in rows} == {check.source_of(kernel)}, "run compile_check.py again: the kernel changed"
    older = set(check.SHARED_LIMIT) if kernel in check.PRODUCTS else {"sm90"}
    for version, targets in {"3.7.1": set(check.SHARED_LIMIT), "3.6.0": older}.items():
        for target in targets:
            of = [r for r in rows if r["triton"] == version and r["target"] == target]
            assert {r["case"] for r in of} == set(check.named_for(target, kernel)), (
                f"run compile_check.py again: {version} {target}"
            )
    assert not [r for r in rows if r["target"] == "sm90" and r["problem"]]
    assert not [r for r in rows if int(r["shared_bytes"]) > check.SHARED_LIMIT[r["target"]]]


def test_products_of_half_precision_are_wgmma_on_hopper():
    """Forward, dq, and dk with dv: none falls back to the warp's own products."""
    check = script("compile_check.py")
    report = rows_of(WORKSHOP / "flash_attention" / "results" / "compile.csv")
    rows = [r for r in report if r["target"] == "sm90" and "fp32" not in r["case"]]
    products = [r for r in rows if r["kernel"] not in check.NO_WGMMA]
    assert {(r["kernel"], r["triton"]) for r in products} == {
        (kernel, triton) for kernel in ("_forward", "_queries", "_keys") for triton in ("3.7.1", "3.6.0")
    }
    assert all(int(r["wgmma"]) for r in products)


def test_the_map_names_every_kernel():
    said = (WORKSHOP / "README.md").read_text(encoding="utf-8")
    for kernel in REPORTS:
        assert f"`{kernel}/worklog.md`" in said
        assert (WORKSHOP / kernel / "worklog.md").is_file()


@pytest.mark.parametrize(
    ("file", "old", "new", "whose"),
    [
        ("glu.py", "BLOCK", "BLOCKS", {"glu"}),
        ("glu.py", "Fused activation and gate", "In other words", set()),
        ("launch.py", "rows.stride(1) == 1", "rows.stride(1) == 2", {"norm", "glu", "cross_entropy"}),
        ("flash_attention_tile.py", "stages", "phases", {"flash_attention"}),
        ("compile_cases.py", "11008", "11009", {"glu"}),
    ],
)
def test_a_report_hangs_on_what_its_kernel_is_made_from(file, old, new, whose, monkeypatch):
    check = script("compile_check.py")
    before = {kernel: check.source_of(kernel) for kernel in REPORTS}
    read = Path.read_text

    def edited(path, *encoding):
        text = read(path, *encoding)
        assert path.name != file or old in text
        return text.replace(old, new) if path.name == file else text

    monkeypatch.setattr(Path, "read_text", edited)
    assert {kernel for kernel in REPORTS if check.source_of(kernel) != before[kernel]} == whose


@pytest.mark.slow
def test_the_compiler_says_again_what_the_reports_say(tmp_path):
    """One case for NVIDIA and AMD, and one with wgmma; in a process of its own, which must not interpret."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"PYTHONSAFEPATH": "1"}
    arguments = ["--kernels", "glu,flash_attention", "--targets", "sm90,gfx942", "--csv", str(tmp_path / "again.csv")]
    cases = ["--cases", "silu bf16,causal bf16 64"]
    done = subprocess.run(
        [sys.executable, str(WORKSHOP / "compile_check.py"), *arguments, *cases],
        capture_output=True, text=True, env=environment, cwd=WORKSHOP.parent,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    again = rows_of(tmp_path / "again.csv")
    said = [r for k in ("glu", "flash_attention") for r in rows_of(WORKSHOP / k / "results" / "compile.csv")]
    facts = {(r["triton"], r["case"], r["target"], r["kernel"]): r for r in said}
    assert len(again) == 10
    for row in again:
        want = facts[row["triton"], row["case"], row["target"], row["kernel"]]
        assert row | {"torch": want["torch"]} == row | want
