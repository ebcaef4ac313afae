"""Budgets follow the machine, and never shrink."""

from handbook_src.publish import speed


def test_two_measurements_agree():
    assert 1 / 3 < speed.seconds() / speed.seconds() < 3


def test_a_machine_is_compared_with_the_one_of_the_budgets(monkeypatch):
    monkeypatch.setattr(speed, "REFERENCE", 1e-4)
    assert speed.slowness({"OMP_NUM_THREADS": "1"}) > 10
    monkeypatch.setattr(speed, "REFERENCE", 1e4)
    assert speed.slowness({"OMP_NUM_THREADS": "1"}) == 1
