"""What README and CONTRIBUTING say is so: commands, code, paths and links."""

from __future__ import annotations

import contextlib
import io
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.fx

from handbook_src.catalogue import claims, components
from handbook_src.catalogue.__main__ import run as catalogue
from handbook_src.layers.normalisation.norm import BatchNorm2d, RMSNorm
from handbook_src.layers.pooling.pooling import MaxPool2d
from handbook_src.models.transformers.gpt2 import GPT2, GPT2Config
from handbook_src.publish import command as press

ROOT = Path(__file__).resolve().parents[1]
PAPERS = {name: (ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "CONTRIBUTING.md")}
BOTH = pytest.mark.parametrize("text", PAPERS.values(), ids=PAPERS.keys())
FENCE = re.compile(r"^```(\w+)(?: (\S+))?\n(.*?)^```$", re.MULTILINE | re.DOTALL)
PATH = re.compile(r"`((?:book|handbook_src|kernels|tests|\.ci)/[\w./-]*|[\w.]+\.(?:md|yml|toml|txt|cff|yaml))`")


def blocks(text: str, language: str) -> list[tuple[str, str]]:
    """The file named beside the fence, if one is, and the code."""
    return [(m[2] or "", m[3]) for m in FENCE.finditer(text) if m[1] == language]


def commands(text: str) -> list[list[str]]:
    lines = [line for _, code in blocks(text, "bash") for line in code.splitlines()]
    lines += re.findall(r"^    (python3 .*)$", text, re.MULTILINE)
    lines += [c.strip() for c in re.findall(r"`((?:python3|\.venv/bin/python|make) [^`\n]+)`", text)]
    return [shlex.split(line) for line in lines]


@BOTH
def test_commands_are_understood(text: str) -> None:
    found = commands(text)
    assert len(found) >= 5
    for program, *rest in found:
        if program == "make":
            assert re.search(rf"^[\w ]*\b{rest[0]}\b[\w ]*:", (ROOT / "Makefile").read_text(), re.MULTILINE), rest
        elif rest[:2] == ["-m", "handbook_src"]:
            press.parse(rest[2:])
        elif rest[:2] == ["-m", "handbook_src.catalogue"]:
            with contextlib.redirect_stdout(io.StringIO()):
                assert catalogue(rest[2:]) == 0, rest
        elif rest[:2] == ["-m", "pytest"]:
            assert all((ROOT / p).exists() for p in rest[2:] if not p.startswith("-")), rest
        else:
            assert program == ".venv/bin/pre-commit", program


def test_the_two_commands_are_there() -> None:
    lines = ["\n".join(code.splitlines()) for _, code in blocks(PAPERS["README.md"], "bash")]
    assert {"python3 -m handbook_src book", "python3 -m handbook_src test"} <= set(lines)


#: what the README says that our layers do not go through
REFUSED = """
import warnings
warnings.simplefilter("ignore")
for read in (torch.fx.symbolic_trace, torch.jit.script):
    try:
        read(norm)
    except Exception:
        continue
    raise AssertionError(f"{read} works: say so")
"""


def test_the_layer_of_five_lines_runs_outside_the_repository(tmp_path: Path) -> None:
    [(_, code)] = blocks(PAPERS["README.md"], "python")
    assert len(code.split("\n\n", 1)[0].splitlines()) + len(code.split("\n\n", 1)[1].splitlines()) <= 5
    check = code + "\nassert y.shape == (2, 10, 512)\nassert abs(y.square().mean() - 1) < 1e-3\n" + REFUSED
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", check],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == done.stderr == ""


@BOTH
def test_paths_exist(text: str) -> None:
    found = PATH.findall(text)
    assert len(found) > 8
    missing = [p for p in found if not (ROOT / p).exists() and not (ROOT / f"{p}.md").exists()]
    assert missing == []


@BOTH
def test_links_lead_somewhere(text: str) -> None:
    links = [m for m in re.findall(r"\]\(([^)]+)\)", text) if "://" not in m]
    assert links
    assert [link for link in links if not (ROOT / link.partition("#")[0]).exists()] == []


def test_quoted_code_is_the_real_code() -> None:
    """Each line of a block that names a file stands in that file, in this order."""
    quoted = [(m[2], m[3]) for m in FENCE.finditer(PAPERS["CONTRIBUTING.md"]) if m[2]]
    assert len(quoted) >= 5
    for file, code in quoted:
        rest = (ROOT / file).read_text(encoding="utf-8")
        for line in filter(str.strip, code.splitlines()):
            if line.strip() == "...":
                continue
            _, found, rest = rest.partition(line + "\n")
            assert found, f"{file} has no line {line!r} there"


def test_the_counts_are_those_of_the_tables() -> None:
    readme = PAPERS["README.md"]
    assert f"{len(components())} components" in readme
    assert f"{len(claims())} statements" in readme


def test_the_picture_is_small_enough_to_load() -> None:
    [picture] = re.findall(r"!\[[^\]]{20,}\]\(([^)]+)\)", PAPERS["README.md"])
    data = (ROOT / picture).read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    assert 10_000 < len(data) < 200_000


@pytest.mark.usefixtures("unchecked")
def test_layers_and_models_export_to_a_graph_of_fx() -> None:
    model = GPT2(GPT2Config(vocab_size=11, context=8, dim=8, heads=2, depth=1)).eval()
    x, ids = torch.randn(2, 3, 8, 8), torch.randint(11, (2, 5))
    for module, given in ((model, ids), (BatchNorm2d(3).eval(), x), (MaxPool2d(2), x), (RMSNorm(8), x)):
        exported = torch.export.export(module, (given,))
        assert isinstance(exported.graph_module, torch.fx.GraphModule)
        torch.testing.assert_close(exported.module()(given), module(given))


@pytest.mark.usefixtures("unchecked")
def test_a_network_is_traced_with_our_layers_as_leaves() -> None:
    class Tracer(torch.fx.Tracer):
        def is_leaf_module(self, m: torch.nn.Module, name: str) -> bool:
            return m.__module__.startswith(("torch.nn", "handbook_src.layers"))

    network = torch.nn.Sequential(BatchNorm2d(3).eval(), torch.nn.ReLU(), MaxPool2d(2), RMSNorm(4))
    x = torch.randn(2, 3, 8, 8)
    traced = torch.fx.GraphModule(network, Tracer().trace(network))
    torch.testing.assert_close(traced(x), network(x), rtol=0, atol=0)
    assert [node.op for node in traced.graph.nodes] == ["placeholder", *["call_module"] * 4, "output"]


def test_the_address_of_the_repository_stands_in_one_place() -> None:
    address = re.search(r"url:\s*https://([\w./-]+)", (ROOT / "_config.yml").read_text())
    assert address is not None
    papers = [*PAPERS, "CITATION.cff", "CHANGELOG.md", "pyproject.toml", "environment.yml", "Makefile"]
    assert [p for p in papers if address[1] in (ROOT / p).read_text(encoding="utf-8")] == []


def test_the_licence_is_the_one_of_the_package() -> None:
    text = (ROOT / "LICENSE").read_text()
    assert "Apache License" in text[:120]
    assert 'license = "Apache-2.0"' in (ROOT / "pyproject.toml").read_text()
    assert "license: Apache-2.0" in (ROOT / "CITATION.cff").read_text()


def test_the_versions_agree() -> None:
    import handbook_src

    version = handbook_src.__version__
    assert f'version = "{version}"' in (ROOT / "pyproject.toml").read_text()
    assert f"version: {version}" in (ROOT / "CITATION.cff").read_text()
