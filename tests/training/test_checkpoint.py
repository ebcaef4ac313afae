"""Stopped anywhere and started again, a run ends with the same bits; what can't be continued is refused."""

from __future__ import annotations

import os
import random
import runpy
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from handbook_src.errors import ConfigError, DataError, Diverged
from handbook_src.testing import refuses
from handbook_src.training import train
from handbook_src.training.checkpoint import read


class Stop(Exception):
    """The power cut."""


def run(path, *, steps=12, stop=None, seed=3, precision="float32", width=6, lr=0.01, kind=torch.optim.AdamW, **more):
    """A run that uses every kind of noise: the sampler's, dropout's, Python's and NumPy's."""
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed)
    model = nn.Sequential(nn.Linear(3, width), nn.BatchNorm1d(width), nn.ReLU(), nn.Dropout(0.3), nn.Linear(width, 1))
    optimizer = kind(model.parameters(), lr=lr)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr * 10, 40)
    drawn = []

    def sample(generator):
        drawn.append(0)
        if stop is not None and len(drawn) > 2 * stop:
            raise Stop
        x = torch.randn(8, 3, generator=generator) * random.uniform(0.5, 1.5) + np.random.normal()
        return x, x.sum(1, keepdim=True)

    history = train(
        model, sample, lambda m, b: (m(b[0]) - b[1]).square().mean(), optimizer, steps=steps,
        generator=torch.Generator().manual_seed(seed), scheduler=schedule, clip_norm=1.0, accumulate=2,
        precision=precision, evaluate=lambda m: m[0].weight.sum().item(), evaluate_every=3, checkpoint=path,
        checkpoint_every=2 if path else None, progress=False, **more,
    )  # fmt: skip
    return model.state_dict(), history


def assert_same(one, two):
    for name, t in one[0].items():
        assert torch.equal(t, two[0][name]), name
    for name in ("step", "loss", "grad_norm", "lr", "evaluations"):
        assert getattr(one[1], name) == getattr(two[1], name), name


@pytest.mark.parametrize("precision", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("stop", [1, 2, 7])
def test_a_stopped_run_ends_with_the_same_bits(tmp_path, stop, precision):
    whole = run(None, precision=precision)
    with pytest.raises(Stop):
        run(tmp_path / "run.pt", stop=stop, precision=precision)
    assert_same(whole, run(tmp_path / "run.pt", precision=precision))


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.Adam, torch.optim.RMSprop])
def test_other_optimisers_continue_too(tmp_path, kind):
    with pytest.raises(Stop):
        run(tmp_path / "run.pt", stop=5, kind=kind)
    assert_same(run(None, kind=kind), run(tmp_path / "run.pt", kind=kind))


def test_a_finished_run_can_go_further(tmp_path):
    run(tmp_path / "run.pt", steps=6)
    longer = run(tmp_path / "run.pt", steps=12)
    whole = run(None, steps=12)
    for name, t in whole[0].items():
        assert torch.equal(t, longer[0][name]), name
    assert longer[1].loss == whole[1].loss


def test_a_finished_run_returns_at_once(tmp_path):
    first = run(tmp_path / "run.pt")
    assert_same(first, run(tmp_path / "run.pt", stop=0))


def test_resume_false_starts_afresh(tmp_path):
    run(tmp_path / "run.pt", seed=1)
    assert_same(run(None, seed=2), run(tmp_path / "run.pt", seed=2, resume=False))
    assert read(tmp_path / "run.pt")["history"]["loss"] == run(None, seed=2)[1].loss


SCRIPT = """
import sys, time
import torch
from torch import nn
from handbook_src.training import train

torch.manual_seed(0)
torch.set_num_threads(1)
path, pause = sys.argv[1], float(sys.argv[2])
model = nn.Sequential(nn.Linear(4, 16), nn.Dropout(0.5), nn.Linear(16, 1))

def sample(generator):
    time.sleep(pause)
    return torch.randn(8, 4, generator=generator)

history = train(
    model, sample, lambda m, x: (m(x) - x.sum(1, keepdim=True)).square().mean(),
    torch.optim.AdamW(model.parameters()), steps=40, generator=torch.Generator().manual_seed(1),
    checkpoint=path, checkpoint_every=1,
)
print(history.loss[-1].hex(), sum(p.double().sum() for p in model.parameters()).item().hex(), len(history))
"""


def start(script: Path, checkpoint: Path, pause: float) -> subprocess.Popen:
    env = {**os.environ, "TQDM_DISABLE": "1", "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, str(script), str(checkpoint), str(pause)],
        env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


def finish(process: subprocess.Popen) -> str:
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    assert err == ""
    return out


def test_a_killed_process_ends_with_the_same_bits(tmp_path, monkeypatch, capsys):
    script, cut = tmp_path / "script.py", tmp_path / "cut.pt"
    script.write_text(SCRIPT)
    victim = start(script, cut, 0.05)
    deadline = time.monotonic() + 90
    while not cut.exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.2)
    victim.send_signal(signal.SIGKILL)
    victim.communicate()
    assert victim.returncode == -signal.SIGKILL
    done = len(read(cut)["history"]["loss"])
    assert 0 < done < 40
    resumed = start(script, cut, 0)
    monkeypatch.setattr(sys, "argv", [str(script), str(tmp_path / "whole.pt"), "0"])
    runpy.run_path(str(script))  # here, in one go
    assert finish(resumed) == capsys.readouterr().out


@pytest.mark.parametrize("keep", [0, 10, 2000])
def test_a_torn_file_is_refused(tmp_path, keep):
    path = tmp_path / "run.pt"
    run(path, steps=2)
    path.write_bytes(path.read_bytes()[:keep])
    with refuses(DataError, path, "BadZipFile", "Delete"):
        run(path)
    assert path.stat().st_size == keep  # left for the reader to look at


def test_a_flipped_bit_in_a_weight_is_refused(tmp_path):
    path = tmp_path / "run.pt"
    weights, _ = run(path, steps=2)
    raw = bytearray(path.read_bytes())
    at = raw.find(weights["0.weight"].numpy().tobytes())
    raw[at] ^= 1
    path.write_bytes(raw)
    with refuses(DataError, path, "damaged record"):
        run(path)


def test_a_foreign_file_is_refused(tmp_path):
    path = tmp_path / "run.pt"
    torch.save({"model": {}}, path)
    with refuses(DataError, path, "format None"):
        run(path)
    torch.save(Stop(), path)  # a pickled class: weights_only will not build it
    with refuses(DataError, path, "UnpicklingError"):
        run(path)


def test_a_missing_file_is_named(tmp_path):
    with refuses(DataError, tmp_path / "none.pt", "no such file"):
        read(tmp_path / "none.pt")


@pytest.mark.parametrize(
    ("change", "values"),
    [
        ({"width": 7}, ("model.0.weight", "float32 [7, 3]", "float32 [6, 3]")),
        ({"kind": torch.optim.SGD}, ("optimizer", "SGD", "AdamW")),
        ({"lr": 0.02}, ("learning rate of group 0", 0.008, 0.004)),
        ({"precision": "bfloat16"}, ("precision", "bfloat16", "float32")),
        ({"steps": 1}, ("steps", 1, 4)),
    ],
)
def test_a_changed_setting_is_refused(tmp_path, change, values):
    path = tmp_path / "run.pt"
    run(path, steps=4)
    before = path.read_bytes()
    with refuses(ConfigError, *values, "resume=False"):
        run(path, **change)
    assert path.read_bytes() == before


def two_groups(path, *, steps=4, order=(0, 2), lr=0.1, decay=0.0, schedule=None, model=None):
    """Two linear layers of one shape in two groups, under Adam and a schedule."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 3))
    groups = [{"params": model[i].parameters()} for i in order]
    groups[1] |= {"lr": lr, "weight_decay": decay}
    optimizer = torch.optim.AdamW(groups, lr=0.01)
    return train(
        model, lambda g: torch.randn(4, 3, generator=g), lambda m, x: m(x).square().mean(), optimizer, steps=steps,
        generator=torch.Generator().manual_seed(0), scheduler=None if schedule is None else schedule(optimizer),
        checkpoint=path, progress=False,
    )  # fmt: skip


STEP = torch.optim.lr_scheduler.StepLR


@pytest.mark.parametrize(
    ("change", "values"),
    [
        ({"schedule": lambda o: STEP(o, 5)}, ("scheduler step_size", 5, 2)),
        ({"schedule": lambda o: STEP(o, 2, gamma=0.5)}, ("scheduler gamma", 0.5, 0.1)),
        ({"schedule": None}, ("scheduler", "NoneType", "StepLR")),
        ({"lr": 0.2}, ("learning rate of group 1", 0.2, 0.1)),
        ({"decay": 0.3}, ("weight_decay of group 1", 0.3, 0.0)),
        ({"order": (2, 0)}, ("parameter 0 of group 0", "2.weight", "0.weight")),
    ],
)
def test_another_schedule_rate_or_order_is_refused(tmp_path, change, values):
    """All of these went on silently, the last with Adam's moments swapped."""
    settings = {"schedule": lambda o: STEP(o, 2)}
    two_groups(tmp_path / "run.pt", **settings)
    assert len(two_groups(tmp_path / "run.pt", **settings, steps=6)) == 6
    with refuses(ConfigError, *values, "resume=False"):
        two_groups(tmp_path / "run.pt", **(settings | change), steps=8)


def test_another_function_of_the_step_is_refused_by_the_rate_that_it_gives(tmp_path):
    def inverse(delay):
        return lambda o: torch.optim.lr_scheduler.LambdaLR(o, lambda step: 1 / (step + delay))

    two_groups(tmp_path / "run.pt", schedule=inverse(1))
    assert len(two_groups(tmp_path / "run.pt", schedule=inverse(1), steps=6)) == 6
    with refuses(ConfigError, "learning rate of group 0", 0.01 / 8, 0.01 / 7, "resume=False"):
        two_groups(tmp_path / "run.pt", schedule=inverse(2), steps=8)


def test_schedules_of_schedules_are_compared_whole(tmp_path):
    def chain(total):
        kinds = torch.optim.lr_scheduler
        parts = (lambda o: kinds.LinearLR(o, total_iters=2)), (lambda o: kinds.CosineAnnealingLR(o, total))
        return lambda o: kinds.SequentialLR(o, [part(o) for part in parts], milestones=[2])

    two_groups(tmp_path / "run.pt", schedule=chain(9))
    assert len(two_groups(tmp_path / "run.pt", schedule=chain(9), steps=6)) == 6
    with refuses(ConfigError, "scheduler _schedulers", "resume=False"):
        two_groups(tmp_path / "run.pt", schedule=chain(8), steps=8)


def test_a_checkpoint_without_a_part_is_refused(tmp_path):
    run(tmp_path / "run.pt", steps=2)
    state = torch.load(tmp_path / "run.pt", weights_only=True)
    del state["noise"], state["scaler"]
    torch.save(state, tmp_path / "run.pt")
    with refuses(DataError, "no noise, scaler"):
        run(tmp_path / "run.pt", steps=4)


def test_divergence_keeps_the_last_checkpoint(tmp_path):
    path = tmp_path / "run.pt"
    model = nn.Linear(1, 1)
    drawn = []

    def sample(generator):
        drawn.append(0)
        return torch.full((2, 1), float("nan") if len(drawn) == 4 else 1.0)

    with refuses(Diverged, "step 4", path):
        train(
            model, sample, lambda m, x: m(x).square().mean(), torch.optim.SGD(model.parameters(), lr=0.1), steps=9,
            generator=torch.Generator(), checkpoint=path, checkpoint_every=1, progress=False,
        )  # fmt: skip
    assert read(path)["history"]["step"] == [1, 2, 3]


def test_a_failed_write_keeps_the_last_checkpoint(tmp_path, monkeypatch):
    path = tmp_path / "run.pt"
    run(path, steps=2)
    before = path.read_bytes()

    def full(state, file):
        file.write(b"half a checkpoint")
        raise OSError("No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError, match="No space"):
        run(path, steps=4)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["run.pt"]


def resumes(path, make_lr, make_schedule):
    """Assert that a run of 3 + 3 steps ends with the bits of one of 6."""

    def go(path, steps):
        torch.manual_seed(0)
        model = nn.Linear(3, 1)
        optimizer = torch.optim.AdamW(model.parameters(), lr=make_lr())
        history = train(
            model, lambda g: torch.randn(4, 3, generator=g), lambda m, x: m(x).square().mean(), optimizer,
            steps=steps, generator=torch.Generator().manual_seed(0), scheduler=make_schedule(optimizer),
            checkpoint=path, progress=False,
        )  # fmt: skip
        return model.state_dict(), history

    go(path, 3)
    assert_same(go(None, 6), go(path, 6))


@pytest.mark.parametrize(
    "make_schedule",
    [
        lambda o: None,
        lambda o: torch.optim.lr_scheduler.LambdaLR(o, lambda s: np.cos(s / 10)),
        lambda o: torch.optim.lr_scheduler.MultiStepLR(o, np.array([2, 4])),
    ],
)
@pytest.mark.parametrize("lr", [np.float64(1e-2), 1e-2])
def test_numpy_scalars_in_the_state_continue(tmp_path, lr, make_schedule):
    resumes(tmp_path / "run.pt", lambda: lr, make_schedule)


@pytest.mark.parametrize(
    "make_schedule",
    [
        lambda o: None,
        lambda o: torch.optim.lr_scheduler.LambdaLR(o, lambda s: 0.5**s),
        lambda o: torch.optim.lr_scheduler.OneCycleLR(o, 0.1, 10),
    ],
)
def test_a_tensor_learning_rate_continues(tmp_path, make_schedule):
    resumes(tmp_path / "run.pt", lambda: torch.tensor(1e-2), make_schedule)
