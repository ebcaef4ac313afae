"""A race is fair: what disagrees is not timed, what is slow is named, ratios point the right way."""

from __future__ import annotations

import math
import time
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from handbook_src.bench.bench import Row, bench
from handbook_src.bench.race import Race, installed, same_weights


def slowly(x: Tensor) -> Tensor:
    time.sleep(0.004)
    return x * 2


def quickly(x: Tensor) -> Tensor:
    return x + x


def test_above_one_means_that_ours_is_faster() -> None:
    race = Race(rounds=5)
    race.run("some", "double", "sleepy", quickly, slowly, torch.ones(3))
    race.run("some", "half", "brisk", slowly, quickly, torch.ones(3))
    assert [h.mode for h in race.heats] == ["forward", "step"] * 2
    assert all(h.ratio > 1 for h in race.heats[:2])
    assert {h.layer for h in race.slow()} == {"half"}
    assert race.mean("forward", ["sleepy"]) > 1 > race.mean("forward", ["brisk"])
    assert math.isnan(race.mean("forward", ["nobody"]))
    assert [row["against"] for row in race.rows("some")] == ["sleepy", "brisk"]
    assert race.rows("other") == []


def test_what_disagrees_is_not_timed() -> None:
    race = Race(rounds=5)
    with pytest.raises(AssertionError):
        race.run("some", "wrong", "right", lambda x: x * 3, quickly, torch.ones(3))
    with pytest.raises(AssertionError):  # same value, another gradient
        race.run("some", "wrong", "right", lambda x: x.detach() + x, quickly, torch.ones(3))
    assert all(h.mode == "forward" for h in race.heats)


@pytest.mark.parametrize("ratio", [1.2, 0.5])
def test_each_pair_is_timed_once_whoever_is_ahead(ratio: float, monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[int] = []

    def timed(*args: Any, rounds: int, **options: Any) -> list[Row]:
        ran.append(rounds)
        found = bench(*args, rounds=rounds, **options)
        return [replace(row, ratio=ratio, ratio_low=ratio, ratio_high=ratio) for row in found]

    monkeypatch.setattr("handbook_src.bench.race.bench", timed)
    race = Race(rounds=5)
    race.run("some", "double", "torch", quickly, lambda x: x * 2, torch.ones(3), step=False)
    assert ran == [5]
    assert [h.ratio for h in race.heats] == [ratio]


def test_the_same_operations_are_equal_and_count_nowhere() -> None:
    race = Race(rounds=5, limit=0.0001)  # everything else would be slow
    race.run("some", "ReLU", "torch", nn.ReLU(), torch.relu, torch.ones(3))
    assert all(h.same for h in race.heats)
    assert race.slow() == []
    assert math.isnan(race.mean("forward"))
    assert all(row["speed, forward"].startswith("equal") for row in race.rows("some"))
    race.run("some", "double", "torch", quickly, lambda x: x * 2, torch.ones(3))
    assert not race.heats[-1].same
    assert race.mean("forward") == race.heats[-2].ratio


def test_a_race_is_put_together_again_from_its_data() -> None:
    race = Race(rounds=5)
    race.run("some", "double", "torch", quickly, lambda x: x * 2, torch.ones(3))
    assert Race.of(race.data(), race.data()).heats == race.heats * 2


def test_integers_have_no_step_and_inputs_are_left_alone() -> None:
    race, x = Race(rounds=5), torch.ones(3, dtype=torch.long)
    race.run("some", "double", "torch", quickly, lambda x: x * 2, x)
    assert [h.mode for h in race.heats] == ["forward"]
    y = torch.ones(3)
    race.run("some", "layer", "torch", nn.ReLU(), torch.relu, y)
    assert not y.requires_grad
    race.run("some", "decoding", "torch", nn.ReLU(), torch.relu, y, step=False)
    assert [h.mode for h in race.heats] == ["forward", "forward", "step", "forward"]


def test_weights_are_given_in_order() -> None:
    a, b = nn.Linear(2, 3), nn.Linear(2, 3)
    same_weights(a, b)
    assert torch.equal(a.weight, b.weight)
    assert torch.equal(a.bias, b.bias)
    with pytest.raises(AssertionError):
        same_weights(a, nn.Linear(3, 2))


def test_a_missing_library_is_nobody() -> None:
    assert installed(lambda: __import__("no_such_library_anywhere")) is None
    assert installed(lambda: 3) == 3
