"""Two processes under torchrun do the work of one."""

from __future__ import annotations

import os
import runpy
import subprocess
import sys

import pytest
import torch

from handbook_src.errors import ConfigError
from handbook_src.testing import refuses
from handbook_src.training.distributed import World, join, local_device
from handbook_src.training.loop import _refuse

SCRIPT = """
import os, sys
import torch
from torch import nn
from handbook_src.training import train

torch.set_num_threads(1)
path, *turns = sys.argv[1:]

def sample(generator):
    return torch.randn(8, 4, generator=generator, dtype=torch.float64)

for seed, steps in enumerate(map(int, turns)):  # what a later turn starts with is not what it goes on with
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1)).double()
    history = train(
        model, sample, lambda m, x: (m(x) - x.sum(1, keepdim=True)).square().mean(),
        torch.optim.AdamW(model.parameters(), lr=0.01), steps=steps,
        generator=torch.Generator().manual_seed(1 + seed), clip_norm=1.0, accumulate=4, checkpoint=path,
    )
if os.environ.get("RANK", "0") == "1":
    torch.save({"weights": model.state_dict(), "loss": history.loss}, path + ".rank1")
"""


def launch(script, path, *turns):
    """Train in two processes, for as many steps at a time; return the last checkpoint."""
    env = {**os.environ, "OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1"}
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [sys.executable, *torchrun, str(script), str(path), *map(str, turns)]
    done = subprocess.run(command, cwd=script.parent, env=env, text=True, capture_output=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return torch.load(path, weights_only=True)


@pytest.mark.slow
def test_two_processes_equal_one_and_resume(tmp_path, monkeypatch):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    monkeypatch.setattr(sys, "argv", [str(script), str(tmp_path / "one.pt"), "6"])
    runpy.run_path(str(script))  # here, alone
    one = torch.load(tmp_path / "one.pt", weights_only=True)
    two = launch(script, tmp_path / "two.pt", 3, 6)
    other = torch.load(tmp_path / "two.pt.rank1", weights_only=True)
    assert len(two["noise"]) == 2
    assert two["history"]["loss"] == other["loss"]
    assert two["history"]["loss"] == pytest.approx(one["history"]["loss"], rel=1e-12)
    assert two["history"]["grad_norm"] == pytest.approx(one["history"]["grad_norm"], rel=1e-11)
    for name, w in one["model"].items():
        torch.testing.assert_close(two["model"][name], w, rtol=1e-11, atol=1e-13)
        assert torch.equal(two["model"][name], other["weights"][name])


def test_alone_there_is_one_process(monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert join() == World(0, 1)
    assert join().writes
    assert local_device().type in ("cpu", "cuda")


def test_micro_batches_must_deal_out_evenly():
    with refuses(ConfigError, "accumulate", 3, "2 process", "accumulate=4"):
        _refuse(1, None, 3, "float32", None, World(0, 2))
