"""Verdicts: what an interval decides and what it does not."""

import math

import numpy as np
import pytest
from scipy import stats

from handbook_src.errors import ConfigError
from handbook_src.experiment import Data
from handbook_src.judge import Judgement, combine, decide, judge
from handbook_src.testing.refusal import refuses

RECORDED, QUICK = Data({}, {}, recorded=True), Data({}, {}, recorded=False)
NOISE = [0.0, 0.1, -0.1, 0.05, -0.05, 0.02]


@pytest.mark.parametrize(
    ("rule", "low", "high", "margin", "verdict"),
    [
        ("more", 0.2, 0.4, 0.1, "holds"),
        ("more", 0.05, 0.4, 0.1, "no evidence"),
        ("more", -0.3, 0.05, 0.1, "fails"),
        ("less", -0.4, -0.2, 0.1, "holds"),
        ("less", -0.4, -0.05, 0.1, "no evidence"),
        ("less", -0.05, 0.3, 0.1, "fails"),
        ("equal", -0.05, 0.05, 0.1, "holds"),
        ("equal", -0.05, 0.15, 0.1, "no evidence"),
        ("equal", 0.15, 0.25, 0.1, "fails"),
        ("equal", -0.25, -0.15, 0.1, "fails"),
        ("equal", -9.0, 9.0, 0.1, "no evidence"),
    ],
)
def test_only_an_interval_beyond_the_margin_decides(rule, low, high, margin, verdict):
    assert decide(rule, low, high, margin) == verdict


def test_a_judgement_prints_as_its_effect_and_interval():
    found = Judgement("holds", 0.3125, -0.5, 1.0, 10, "more by 0")
    assert f"{found:.2f}" == "0.31 (-0.50 to 1.00)"
    assert f"{found:+.1f}" == "+0.3 (-0.5 to +1.0)"
    assert f"{found}" == str(found)


def test_pairs_are_compared_pair_by_pair():
    """A difference that every seed shows is found below a spread between the seeds ten times as large."""
    theirs = [1.0, 2.0, 3.0, 4.0, 5.0, 6.0]
    ours = [t + 0.3 + n for t, n in zip(theirs, NOISE, strict=True)]
    found = judge(RECORDED, ours, theirs, rule="more")
    want = stats.ttest_1samp(np.subtract(ours, theirs), 0).confidence_interval(0.95)
    assert (found.verdict, found.seeds) == ("holds", 6)
    assert (found.low, found.high) == pytest.approx((want.low, want.high), rel=1e-12)
    assert judge(RECORDED, ours, theirs, rule="more", paired=False).verdict == "no evidence"


def test_a_ratio_is_a_geometric_mean():
    found = judge(RECORDED, [2.0, 4.0, 2.0], [1.0, 1.0, 1.0], rule="more", margin=0.1, ratio=True)
    assert found.effect == pytest.approx(16 ** (1 / 3))
    assert found.low < found.effect < found.high
    assert found.rule == "more by 0.1 as a ratio"


def test_the_bootstrap_is_scipys_and_repeats():
    ours, theirs = [1.0, 5.0, 2.0, 9.0, 3.0], [0.0, 1.0, 1.5, 2.0, 1.0]
    first = judge(RECORDED, ours, theirs, rule="more", interval="bootstrap")
    assert first == judge(RECORDED, ours, theirs, rule="more", interval="bootstrap")
    assert first.low > 0
    assert judge(RECORDED, ours, theirs, rule="more", interval="bootstrap", paired=False).low < first.effect


def test_samples_without_spread_are_their_own_interval():
    found = judge(RECORDED, [1.0, 1.0], [0.5, 0.5], rule="equal", margin=0.6)
    assert (found.effect, found.low, found.high, found.verdict) == (0.5, 0.5, 0.5, "holds")


def test_quick_data_leave_a_claim_open():
    found = judge(QUICK, [1.0], [0.0], rule="more")
    assert found.verdict == "open"
    assert math.isnan(found.effect)


def test_a_record_needs_two_samples_and_pairs_equal_numbers():
    with refuses(ConfigError, "1 and 1 samples"):
        judge(RECORDED, [1.0], [0.0], rule="more")
    with refuses(ConfigError, "2 and 3 samples"):
        judge(RECORDED, [1.0, 2.0], [0.0, 1.0, 2.0], rule="more")


@pytest.mark.parametrize(
    ("ours", "verdict"),
    [
        ([1.0, -1.0], "depends"),
        ([1.0, 1.0], "holds"),
        ([-1.0, -1.0], "fails"),
        ([1.0, 0.0], "no evidence"),
    ],
)
def test_several_judgements_make_one(ours, verdict):
    parts = [judge(RECORDED, [mean + n for n in NOISE], [0.0] * 6, rule="more") for mean in ours]
    assert combine(*parts).verdict == verdict
    assert combine(*parts, judge(QUICK, [1.0], [0.0], rule="more")).verdict == "open"
