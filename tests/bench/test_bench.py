"""The bench: no time without parity, no ratio without its noise."""

from __future__ import annotations

import csv
from dataclasses import fields, replace

import pytest
import torch

from handbook_src.bench.bench import Row, bench, device_stamp, table_rows, write_csv
from handbook_src.errors import ConfigError, DataError
from handbook_src.testing import refuses

X = torch.linspace(-1, 1, 1000)


def test_red_parity_raises_and_times_nothing():
    calls = []

    def wrong():
        calls.append(0)
        return X.exp() * 1.001

    with pytest.raises(AssertionError, match=r"parity is red: output 0 of wrong is 1\.00e-03 from right's"):
        bench({"right": X.exp, "wrong": wrong}, check=1e-5)
    assert len(calls) == 1


def test_a_nan_is_red():
    with pytest.raises(AssertionError, match="parity is red"):
        bench({"right": X.exp, "wrong": lambda: X.exp() * float("nan")}, check=1e9)


def test_another_shape_is_red():
    with pytest.raises(AssertionError, match="parity is red"):
        bench({"right": X.exp, "wrong": lambda: X.exp()[:1]}, check=1e9)


def test_a_check_that_returns_false_or_raises_is_red():
    with pytest.raises(AssertionError, match="parity is red"):
        bench({"one": X.exp}, check=lambda: False)

    def red():
        raise AssertionError("gradient of input 0")

    with pytest.raises(AssertionError, match="gradient of input 0"):
        bench({"one": X.exp}, check=red)


class Clock:
    """A clock that only work moves, so that a busy machine can't fail these tests."""

    def __init__(self) -> None:
        self.now, self.order = 0, []

    def perf_counter_ns(self) -> int:
        return self.now

    def work(self, name, ms, noise=0.0):
        def run():
            self.order.append(name)
            self.now += int(1e6 * (ms + noise * (len(self.order) % 3)))

        return run


@pytest.fixture
def clock(monkeypatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr("handbook_src.bench.bench.time", clock)
    return clock


def test_the_slower_one_is_slower_and_the_noise_is_there(clock):
    rows = bench(
        {"short": clock.work("short", 2, noise=0.2), "long": clock.work("long", 4, noise=0.4)},
        check=lambda: True,
        op="nap",
        shape=(2, 3),
        dtype=torch.float32,
        rounds=9,
        bytes_moved=10**6,
    )
    short, long = rows
    assert (short.backend, long.backend) == ("short", "long")
    assert (short.shape, short.dtype, short.baseline, short.rounds) == ("2x3", "float32", "short", 9)
    assert 2.0 <= short.ms_low < short.ms_high <= 2.4
    assert 4.0 <= long.ms_low < long.ms_high <= 4.8
    assert short.ratio == short.ratio_low == short.ratio_high == 1.0
    assert 2.0 / 4.8 <= long.ratio_low < long.ratio < long.ratio_high <= 2.4 / 4.0
    assert long.verdict == "slower"
    assert short.gb_per_s == pytest.approx(1 / short.ms)


def test_short_work_is_repeated_until_the_clock_can_see_it(clock):
    row = bench({"tiny": clock.work("tiny", 0.01)}, check=lambda: True, rounds=5)[0]
    assert len(clock.order) == 3 + 1 + 5 * 100  # warm-up, calibration, rounds of one millisecond
    assert row.ms == pytest.approx(0.01)


def test_candidates_take_turns(clock):
    bench({"a": clock.work("a", 2), "b": clock.work("b", 2)}, check=lambda: True, rounds=5)
    assert "".join(clock.order[-10:]) == "abbaabbaab"


@pytest.mark.parametrize(
    ("low", "high", "verdict"), [(1.1, 1.3, "faster"), (0.7, 0.9, "slower"), (0.9, 1.2, "no difference")]
)
def test_a_verdict_needs_the_whole_interval_on_one_side(low, high, verdict):
    row = replace(bench({"one": X.exp}, check=1e-6, rounds=5)[0], ratio_low=low, ratio_high=high)
    assert row.verdict == verdict


def test_the_table_shows_the_noise():
    rows = bench({"one": X.exp, "two": X.exp}, check=1e-6, baseline="two", rounds=5)
    one, two = table_rows(rows)
    assert " to " in one["middle half"]
    assert " to " in one["speed against two"]
    assert two["verdict"] == "baseline"


def test_csv_has_one_schema(tmp_path):
    path = tmp_path / "results" / "exp.csv"
    rows = bench({"one": X.exp, "two": X.exp}, check=1e-6, op="exp", rounds=5)
    write_csv(path, rows)
    write_csv(path, rows[:1])
    read = list(csv.DictReader(path.read_text().splitlines()))
    assert len(read) == 3
    assert list(read[0]) == [f.name for f in fields(Row)]
    assert read[0]["op"] == "exp"
    assert float(read[1]["ms"]) == pytest.approx(rows[1].ms, rel=1e-3)
    path.write_text("device,ms\n")
    with refuses(DataError, "device", "ratio"):
        write_csv(path, rows)


def test_the_stamp_says_where_and_when():
    stamp = device_stamp("cpu")
    assert stamp["torch"] == torch.__version__
    assert stamp["device"]
    assert stamp["date"].count("-") == 2


def test_refusals():
    with refuses(ConfigError, "nobody", "['one']"):
        bench({"one": X.exp}, check=1e-6, baseline="nobody")
    with refuses(ConfigError, "baseline", "[]"):
        bench({}, check=1e-6)
    with refuses(ConfigError, "rounds", 4):
        bench({"one": X.exp}, check=1e-6, rounds=4)
    with refuses(ConfigError, "check"):
        bench({"one": lambda: None}, check=1e-6)
