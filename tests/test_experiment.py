"""Recorded experiments: what a call returns, and what it refuses."""

import json
import random

import numpy as np
import pytest
import torch

from handbook_src import experiment as module
from handbook_src.errors import ConfigError, DataError
from handbook_src.experiment import Experiments, Records, compare, form, plain, stamp
from handbook_src.testing.refusal import refuses

CELLS = (
    "@experiment(quick=dict(seeds=1), full=dict(seeds=3))\ndef race(seeds):\n    return {'loss': list(range(seeds))}",
)


def race_of(entries: dict, *, quick: bool = True, device: str = "cpu", returns=None):
    page = Experiments(Records("norm", entries), quick, device, CELLS)

    @page(quick={"seeds": 1}, full={"seeds": 3})
    def race(seeds):
        return {"loss": list(range(seeds))} if returns is None else returns

    return race


@pytest.fixture
def banners(monkeypatch) -> list[str]:
    shown: list[str] = []
    monkeypatch.setattr(module, "show_banner", shown.append)
    return shown


def test_a_valid_record_is_returned_after_the_quick_run(banners):
    entry = race_of({}).record()
    data = race_of({"race": {"cpu": entry}})()
    assert (data, data.settings, data.recorded) == ({"loss": [0, 1, 2]}, {"seeds": 3}, True)
    assert banners == []


def test_without_a_record_the_quick_data_stand_in_and_say_so(banners):
    data = race_of({})()
    assert (data, data.settings, data.recorded) == ({"loss": [0]}, {"seeds": 1}, False)
    assert banners == ["race"]


def test_a_stale_record_is_not_shown(banners):
    entry = race_of({}).record() | {"source": "another program"}
    assert race_of({"race": {"cpu": entry}})().recorded is False
    assert banners == ["race"]


def test_in_full_a_notebook_runs_its_experiments_anew():
    data = race_of({}, quick=False)()
    assert (data, data.recorded) == ({"loss": [0, 1, 2]}, True)


def test_each_device_has_its_entry():
    entry = race_of({}).record()
    race = race_of({"race": {"cuda": entry}})
    assert race.valid() is None
    assert race.on("cuda") == {"loss": [0, 1, 2]}
    assert race.on("mps") is None


@pytest.mark.parametrize("change", [{"data": {"loss": [0, 1, 9]}}, {"settings": {"seeds": 30}}])
def test_a_record_edited_by_hand_is_an_error_that_names_it(change):
    entry = race_of({}).record() | change
    with refuses(DataError, "norm.record.json: race", "digest"):
        race_of({"race": {"cpu": entry}})()


def test_a_torn_file_is_an_error_that_names_it(tmp_path):
    (tmp_path / "norm.record.json").write_text('{"race": ')
    with refuses(DataError, "norm.record.json"):
        Records.load("norm", tmp_path)


def test_a_quick_run_of_another_form_is_an_error():
    entry = race_of({}).record()
    with refuses(DataError, "words", "number"):
        race_of({"race": {"cpu": entry}}, returns={"loss": ["a"]})()
    with refuses(DataError, "accuracy"):
        race_of({"race": {"cpu": entry}}, returns={"accuracy": [1]})()


def test_a_notebook_that_left_the_repository_carries_its_records(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "_carried", {})
    entry = race_of({}).record()
    module.carry("norm", json.dumps({"race": {"cpu": entry}}))
    assert Records.load("norm", tmp_path).entry("race", "cpu") == entry


def test_a_record_says_where_it_comes_from():
    entry = race_of({}).record()
    assert set(entry) >= {"settings", "seconds", "date", "device", "cores", "threads", "versions", "source", "data"}
    assert stamp(entry | {"date": "2026-12-01", "device": "CPU", "cores": 2, "seconds": 61.4}) == (
        "Recorded 2026-12-01 · CPU, 2 cores · 3 seeds · 61 s"
    )


def test_an_experiment_has_its_own_random_numbers():
    page = Experiments(Records("norm", {}), True, "cpu", CELLS)

    @page(quick={}, full={})
    def draw():
        return {"x": [torch.rand(()).item(), np.random.rand(), random.random()]}

    torch.manual_seed(5)
    want = torch.rand(2)
    torch.manual_seed(5)
    first = torch.rand(())
    assert draw.run({}) == draw.run({})
    assert torch.equal(torch.stack([first, torch.rand(())]), want)


def test_data_are_what_json_keeps():
    data = {"a": (1, 2.00000049), "b": torch.tensor([0.1]), "c": np.float64(1 / 3), "d": None, "e": True, "f": "x"}
    want = {"a": [1, 2.0], "b": [0.1], "c": 0.333333, "d": None, "e": True, "f": "x"}
    assert plain(data, "race") == want
    with refuses(ConfigError, "the key 8"):
        plain({"x": {8: 1}}, "race")
    with refuses(ConfigError, "race", "object"):
        plain({"x": object()}, "race")


def test_lists_may_differ_in_length_and_nothing_fits_anything():
    compare(form({"x": [1], "y": None}), form({"x": [1, 2, 3], "y": [1.0]}), "race")
    compare(form({"x": []}), form({"x": [1, 2]}), "race")


def test_both_settings_name_the_same_things():
    with refuses(ConfigError, "steps"):
        Experiments(Records("norm", {}), True, "cpu", CELLS)(quick={"seeds": 1}, full={"steps": 1})
