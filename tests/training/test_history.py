"""The monitor: one entry a step, whole through a checkpoint and into a CSV."""

from __future__ import annotations

import csv

from handbook_src.training import History


def test_history_goes_to_csv(tmp_path):
    history = History()
    history.record(loss=1.5, grad_norm=2.0, lr=0.1, seconds=0.25)
    history.record(loss=1.25, grad_norm=1.0, lr=0.1, seconds=0.25)
    history.evaluations.append({"step": 2, "accuracy": 0.5})
    history.to_csv(tmp_path / "run.csv")
    rows = list(csv.DictReader((tmp_path / "run.csv").read_text().splitlines()))
    assert len(rows) == len(history) == 2
    assert rows[0] == {
        "step": "1", "loss": "1.5", "grad_norm": "2.0", "lr": "0.1", "seconds": "0.25", "accuracy": "",
    }  # fmt: skip
    assert rows[1]["accuracy"] == "0.5"


def test_history_survives_its_state():
    history = History()
    history.record(loss=1.0, grad_norm=2.0, lr=0.1, seconds=0.5)
    history.evaluations.append({"step": 1, "value": 3.0})
    twin = History()
    twin.load_state_dict(history.state_dict())
    assert twin == history
    twin.record(loss=0.5, grad_norm=1.0, lr=0.1, seconds=0.5)
    assert len(history) == 1  # lists are copied, not shared
