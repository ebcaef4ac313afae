"""The loop: what a step is, what it records, what it refuses."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from handbook_src.errors import ConfigError, Diverged
from handbook_src.testing import refuses
from handbook_src.training import train


def net(dropout: float = 0.0, dtype: torch.dtype = torch.float64) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Dropout(dropout), nn.Linear(5, 1)).to(dtype)


def sample(size: int, dtype: torch.dtype = torch.float64):
    def draw(generator):
        x = torch.randn(size, 3, generator=generator, dtype=dtype)
        return x, x.sum(1, keepdim=True).sin()

    return draw


def mse(model, batch):
    x, y = batch
    return (model(x) - y).square().mean()


def rng(seed: int = 1) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def sgd(model, lr=0.1):
    return torch.optim.SGD(model.parameters(), lr=lr)


def weights(model) -> torch.Tensor:
    return nn.utils.parameters_to_vector(model.parameters()).detach()


def test_the_loop_is_the_hand_written_one():
    model, hand, generator = net(), net(), rng()
    history = train(model, sample(8), mse, sgd(model), steps=5, generator=rng(), progress=False)
    optimizer, losses, norms = sgd(hand), [], []
    for _ in range(5):
        optimizer.zero_grad()
        value = mse(hand, sample(8)(generator))
        value.backward()
        losses.append(value.item())
        norms.append(torch.cat([p.grad.flatten() for p in hand.parameters()]).norm().item())
        optimizer.step()
    assert torch.equal(weights(model), weights(hand))
    assert history.loss == losses
    assert history.grad_norm == pytest.approx(norms, rel=1e-12)
    assert history.step == [1, 2, 3, 4, 5]
    assert history.lr == [0.1] * 5
    assert all(s > 0 for s in history.seconds)


def test_it_learns():
    model = net(dtype=torch.float32)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    history = train(model, sample(32, torch.float32), mse, optimizer, steps=150, generator=rng(), progress=False)
    assert sum(history.loss[-10:]) < 0.2 * sum(history.loss[:10])


@pytest.mark.parametrize("pieces", [2, 3, 4])
def test_accumulation_is_the_big_batch(pieces):
    small, big = net(), net()

    def joined(generator):
        parts = [sample(4)(generator) for _ in range(pieces)]
        return tuple(torch.cat(p) for p in zip(*parts, strict=True))

    one = train(small, sample(4), mse, sgd(small), steps=6, generator=rng(), accumulate=pieces, progress=False)
    two = train(big, joined, mse, sgd(big), steps=6, generator=rng(), progress=False)
    torch.testing.assert_close(weights(small), weights(big), rtol=1e-13, atol=1e-14)
    assert one.loss == pytest.approx(two.loss, rel=1e-13)
    assert one.grad_norm == pytest.approx(two.grad_norm, rel=1e-12)


def test_clipping_shortens_the_gradient_and_records_its_length():
    model, free = net(), net()
    before = weights(model)
    history = train(model, sample(8), mse, sgd(model, 1.0), steps=1, generator=rng(), clip_norm=0.01, progress=False)
    unclipped = train(free, sample(8), mse, sgd(free, 1.0), steps=1, generator=rng(), progress=False)
    assert history.grad_norm == unclipped.grad_norm
    assert history.grad_norm[0] > 0.1
    moved = (weights(model) - before).norm().item()
    assert moved == pytest.approx(0.01, rel=1e-4)  # torch divides by norm + 1e-6
    whole = weights(free) - before
    torch.testing.assert_close((weights(model) - before) / moved, whole / whole.norm(), rtol=1e-9, atol=1e-12)


def test_clipping_leaves_a_short_gradient_alone():
    model, free = net(), net()
    train(model, sample(8), mse, sgd(model), steps=3, generator=rng(), clip_norm=1e6, progress=False)
    train(free, sample(8), mse, sgd(free), steps=3, generator=rng(), progress=False)
    assert torch.equal(weights(model), weights(free))


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_mixed_precision_runs_low_and_keeps_float32_weights(precision):
    model, exact = net(dtype=torch.float32), net(dtype=torch.float32)
    seen = []

    def watched(model, batch):
        seen.append(model(batch[0]).dtype)
        return mse(model, batch)

    draw = sample(16, torch.float32)
    low = train(model, draw, watched, sgd(model), steps=20, generator=rng(), precision=precision, progress=False)
    full = train(exact, draw, mse, sgd(exact), steps=20, generator=rng(), progress=False)
    assert set(seen) == {getattr(torch, precision)}
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert low.loss != full.loss
    # bfloat16 keeps 8 bits: one rounding is up to 0.4 %
    assert low.loss == pytest.approx(full.loss, rel=0.05, abs=0.01)
    assert low.grad_norm == pytest.approx(full.grad_norm, rel=0.1, abs=0.01)  # the loss scale is undone


def test_float16_overflow_skips_the_step_and_the_schedule():
    model = net(dtype=torch.float32)
    optimizer = sgd(model)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda n: 0.5**n)
    before = weights(model)

    def steep(model, batch):
        return mse(model, batch) * 1e4  # times the first scale of 65536: past float16

    history = train(
        model, sample(4, torch.float32), steep, optimizer, steps=1, generator=rng(), scheduler=schedule,
        precision="float16", progress=False,
    )  # fmt: skip
    assert torch.equal(weights(model), before)
    assert not math.isfinite(history.grad_norm[0])
    assert math.isfinite(history.loss[0])
    assert optimizer.param_groups[0]["lr"] == 0.1


@pytest.mark.parametrize(
    "make",
    [
        lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, 10),
        lambda o: torch.optim.lr_scheduler.OneCycleLR(o, 1.0, 10),
        lambda o: torch.optim.lr_scheduler.LambdaLR(o, lambda n: 1 / (n + 1)),
    ],
)
def test_the_schedule_moves_once_a_step(make):
    model, twin = net(), net()
    optimizer, other = sgd(model), sgd(twin)
    schedule, want = make(other), []
    for _ in range(6):
        want.append(other.param_groups[0]["lr"])
        other.step()
        schedule.step()
    history = train(
        model, sample(4), mse, optimizer, steps=6, generator=rng(), scheduler=make(optimizer), accumulate=2,
        progress=False,
    )  # fmt: skip
    assert history.lr == want


def test_evaluation_sees_evaluation_mode_and_leaves_the_run_alone():
    model, twin = net(dropout=0.5), net(dropout=0.5)
    modes = []

    def evaluate(model):
        modes.append((model.training, torch.is_grad_enabled()))
        return {"noise": torch.rand(()).item(), "size": 3}

    torch.manual_seed(7)
    watched = train(
        model, sample(4), mse, sgd(model), steps=5, generator=rng(), evaluate=evaluate, evaluate_every=2,
        progress=False,
    )  # fmt: skip
    torch.manual_seed(7)
    plain = train(twin, sample(4), mse, sgd(twin), steps=5, generator=rng(), progress=False)
    assert watched.loss == plain.loss
    assert torch.equal(weights(model), weights(twin))
    assert modes == [(False, False)] * 3
    assert [e["step"] for e in watched.evaluations] == [2, 4, 5]
    assert model.training


def test_a_batch_norm_frozen_in_evaluation_mode_does_not_move():
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3).eval(), nn.Linear(3, 1)).double()
    train(
        model, sample(4), mse, sgd(model), steps=3, generator=rng(), evaluate=lambda m: 0.0, evaluate_every=1,
        progress=False,
    )  # fmt: skip
    assert model[1].num_batches_tracked == 0
    assert [part.training for part in (model, *model)] == [True, True, False, True]


def test_a_model_in_evaluation_mode_is_trained_whole_and_given_back_so():
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Linear(3, 1)).double().eval()
    train(model, sample(4), mse, sgd(model), steps=2, generator=rng(), progress=False)
    assert model[1].num_batches_tracked == 2
    assert not any(part.training for part in model.modules())


def test_an_optimiser_of_another_model_is_refused():
    with refuses(ConfigError, "optimizer", "no parameter of this model"):
        train(net(), sample(4), mse, sgd(net()), steps=1, generator=rng(), progress=False)


def test_a_model_with_nothing_to_train_is_refused():
    for model in (nn.ReLU(), net().requires_grad_(False)):
        with refuses(ConfigError, "optimizer", "has 0 to train"):
            train(model, sample(4), mse, sgd(net()), steps=1, generator=rng(), progress=False)
    model = net(dtype=torch.float16)
    with refuses(ConfigError, "precision", "float16", "float32"):
        train(model, sample(4), mse, sgd(model), steps=1, generator=rng(), precision="float16", progress=False)


def test_an_evaluation_may_not_overwrite_the_step():
    model = net()
    with refuses(ConfigError, "'step'"):
        train(
            model, sample(4), mse, sgd(model), steps=1, generator=rng(), evaluate=lambda m: {"step": 7.0},
            progress=False,
        )  # fmt: skip


def test_a_number_is_an_evaluation_too():
    model = net()
    history = train(model, sample(4), mse, sgd(model), steps=1, generator=rng(), evaluate=lambda m: 2, progress=False)
    assert history.evaluations == [{"step": 1, "value": 2.0}]


def test_batches_may_be_nested():
    model = net()

    def nested(generator):
        x, y = sample(4)(generator)
        return {"x": [x], "y": (y, "a label")}

    train(
        model, nested, lambda m, b: mse(m, (b["x"][0], b["y"][0])), sgd(model), steps=1, generator=rng(),
        progress=False,
    )  # fmt: skip


def test_the_bar_is_silent_when_told(capfd, monkeypatch):
    monkeypatch.delenv("TQDM_DISABLE", raising=False)
    model = net()
    train(model, sample(4), mse, sgd(model), steps=2, generator=rng(), progress=False)
    assert capfd.readouterr() == ("", "")
    monkeypatch.setenv("TQDM_DISABLE", "1")
    train(model, sample(4), mse, sgd(model), steps=2, generator=rng())
    assert capfd.readouterr() == ("", "")


def test_the_bar_shows_steps_and_loss(capfd, monkeypatch):
    monkeypatch.delenv("TQDM_DISABLE", raising=False)
    model = net()
    train(model, sample(4), mse, sgd(model), steps=3, generator=rng())
    out, err = capfd.readouterr()
    assert out == ""
    assert "3/3" in err
    assert "loss=" in err


def test_a_loss_that_is_not_finite_names_step_and_remedy():
    model = net()
    before = []

    def poisoned(model, batch):
        before.append(weights(model))
        return mse(model, batch) * (math.nan if len(before) == 3 else 1.0)

    with refuses(Diverged, "step 3", "nan", "learning rate"):
        train(model, sample(4), poisoned, sgd(model), steps=5, generator=rng(), progress=False)
    assert torch.equal(weights(model), before[-1])


def test_a_gradient_that_is_not_finite_stops_before_the_update():
    model = net()
    before = weights(model)

    def cusp(model, batch):
        return (model(batch[0]) * 0).abs().sqrt().mean()  # 0, with slope inf * 0

    with refuses(Diverged, "step 1", "gradient norm nan"):
        train(model, sample(4), cusp, sgd(model), steps=5, generator=rng(), progress=False)
    assert torch.equal(weights(model), before)


@pytest.mark.parametrize(
    ("change", "values"),
    [
        ({"steps": 0}, ("steps", 0)),
        ({"steps": 2.5}, ("steps", 2.5)),
        ({"accumulate": True}, ("accumulate", True)),
        ({"clip_norm": "one"}, ("clip_norm", "'one'")),
        ({"evaluate": lambda m: 0.0, "evaluate_every": 2.5}, ("evaluate_every", 2.5)),
        ({"clip_norm": -1.0}, ("clip_norm", -1.0)),
        ({"clip_norm": math.nan}, ("clip_norm", "nan")),
        ({"accumulate": 0}, ("accumulate", 0)),
        ({"precision": "float8"}, ("precision", "float8")),
        ({"evaluate_every": 3}, ("evaluate_every", 3)),
        ({"checkpoint_every": 4}, ("checkpoint_every", 4)),
        ({"evaluate": lambda m: 0.0, "evaluate_every": 0}, ("evaluate_every", 0)),
    ],
)
def test_settings_that_cannot_work(change, values):
    model = net()
    with refuses(ConfigError, *values):
        train(model, sample(4), mse, sgd(model), **{"steps": 1, "generator": rng(), "progress": False, **change})


def test_a_loss_that_is_not_a_scalar():
    model = net()
    with refuses(ConfigError, "[4, 1]"):
        train(model, sample(4), lambda m, b: m(b[0]), sgd(model), steps=1, generator=rng(), progress=False)


def test_plateau_schedules_are_refused():
    model = net()
    optimizer = sgd(model)
    schedule = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer)
    with refuses(ConfigError, "ReduceLROnPlateau"):
        train(model, sample(4), mse, optimizer, steps=1, generator=rng(), scheduler=schedule, progress=False)


@pytest.mark.parametrize("shape", [(1,), (1, 1)])
def test_a_loss_of_one_element_is_a_scalar(shape):
    model, twin = net(), net()
    one = train(
        model, sample(4), lambda m, b: mse(m, b).reshape(shape), sgd(model), steps=2, generator=rng(), progress=False
    )
    two = train(twin, sample(4), mse, sgd(twin), steps=2, generator=rng(), progress=False)
    assert one.loss == two.loss
    assert torch.equal(weights(model), weights(twin))


def test_a_loss_that_is_not_a_tensor():
    model = net()
    with refuses(ConfigError, "float 0.25", ".item()"):
        train(model, sample(4), lambda m, b: 0.25, sgd(model), steps=1, generator=rng(), progress=False)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("part", ["sample", "evaluate"])
def test_the_mode_is_kept_when_something_raises(part, training):
    def broken(_):
        raise RuntimeError("broken")

    model = net().train(training)
    parts = {"sample": sample(4), "evaluate": None, part: broken}
    with pytest.raises(RuntimeError, match="broken"):
        train(model, loss=mse, optimizer=sgd(model), steps=1, generator=rng(), progress=False, **parts)
    assert model.training is training
