"""A verdict from recorded samples, by a rule that was fixed before the run.

The rule is a margin and a side. The effect is a mean difference (or the logarithm of a
ratio) between two sides that share their seeds; around it stands a 95 % interval. A claim
*holds* where the whole interval lies beyond the margin, *fails* where the whole interval
lies short of it, and is *no evidence* otherwise: noise never decides.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from handbook_src.errors import ConfigError

Rule = Literal["more", "less", "equal"]
OPEN = "open"


@dataclass(frozen=True)
class Judgement:
    """A verdict with what decided it; ``open`` where the data are no valid record."""

    verdict: str
    effect: float
    low: float
    high: float
    seeds: int
    rule: str

    def __format__(self, spec: str) -> str:
        """Effect and 95 % interval in a number's format: ``f"{found:.2f}"`` is ``0.31 (0.22 to 0.40)``."""
        return f"{self.effect:{spec}} ({self.low:{spec}} to {self.high:{spec}})" if spec else str(self)

    @property
    def figures(self) -> dict[str, str]:
        """What the ledger shows."""
        return {
            "effect": f"{self.effect:.3g}",
            "95 % interval": f"{self.low:.3g} to {self.high:.3g}",
            "samples": str(self.seeds),
            "rule": self.rule,
        }


def judge(
    data: Any,
    ours: Sequence[float],
    theirs: Sequence[float],
    *,
    rule: Rule,
    margin: float = 0.0,
    ratio: bool = False,
    paired: bool = True,
    interval: Literal["t", "bootstrap"] = "t",
) -> Judgement:
    r"""Compare two sides of an experiment, sample by sample.

    .. math:: \Delta = \tfrac1n \sum_i (a_i - b_i)

    - ``more`` holds where the interval of :math:`\Delta` lies above ``margin``,
    - ``less`` where it lies below ``-margin``,
    - ``equal`` where it lies between ``-margin`` and ``margin`` (two one-sided tests).

    With ``ratio`` it is the geometric mean of :math:`a_i / b_i`, and ``margin`` a share: 0.1 is ten per cent.

    Args:
        data: what the experiment returned; without a valid record the verdict is ``open``.
        ours: one number a seed, of the side that the claim is about.
        theirs: the same of the other side.
        rule: what the claim says of ours.
        margin: how much, in the unit of the effect; fixed before the full run.
        ratio: compare by quotient and not by difference.
        paired: sample i of both sides shares its seed.
        interval: Student's t, or the bootstrap where samples are far from normal.

    Raises:
        ConfigError: fewer than two samples a side in a record, or unequal numbers of paired ones.
    """
    a, b = ([math.log(v) if ratio else float(v) for v in side] for side in (ours, theirs))
    if paired and len(a) != len(b):
        raise ConfigError(
            "judge", got=f"{len(a)} and {len(b)} samples", want="the same seeds on both sides",
            remedy="Pass paired=False where the samples have nothing in common.",
        )  # fmt: skip
    bound = math.log1p(margin) if ratio else margin
    says = f"{rule} by {margin:g}" if rule != "equal" else f"equal within {margin:g}"
    says += " as a ratio" if ratio else ""
    if not data.recorded:
        return Judgement(OPEN, math.nan, math.nan, math.nan, len(a), says)
    if min(len(a), len(b)) < 2:
        raise ConfigError(
            "judge", got=f"{len(a)} and {len(b)} samples", want="at least two a side",
            remedy="Record with more seeds.",
        )  # fmt: skip
    effect, low, high = confidence(a, b, paired, interval)
    verdict = decide(rule, low, high, bound)
    if ratio:
        effect, low, high = math.exp(effect), math.exp(low), math.exp(high)
    return Judgement(verdict, effect, low, high, len(a), says)


def decide(rule: Rule, low: float, high: float, margin: float) -> str:
    """The rule, applied to the interval alone."""
    if rule == "equal":
        holds, fails = -margin < low and high < margin, low > margin or high < -margin
    elif rule == "more":
        holds, fails = low > margin, high < margin
    else:
        holds, fails = high < -margin, low > -margin
    return "holds" if holds else "fails" if fails else "no evidence"


def confidence(a: list[float], b: list[float], paired: bool, interval: str) -> tuple[float, float, float]:
    """Mean difference and its 95 % interval; samples without any spread are their own interval."""
    import numpy as np
    from scipy import stats

    x, y = np.asarray(a), np.asarray(b)
    effect = float(x.mean() - y.mean())
    samples = (x - y,) if paired else (x, y)
    if all(np.ptp(sample) == 0 for sample in samples):
        return effect, effect, effect
    if interval == "t":
        test = stats.ttest_rel(x, y) if paired else stats.ttest_ind(x, y, equal_var=False)
        found = test.confidence_interval(0.95)
    else:
        mean = np.mean if paired else (lambda u, v, axis: u.mean(axis) - v.mean(axis))
        found = stats.bootstrap(
            samples, mean, vectorized=True, axis=-1, rng=np.random.default_rng(0)
        ).confidence_interval
    return effect, float(found.low), float(found.high)


def combine(*parts: Judgement) -> Judgement:
    """One verdict of several: all of one kind is that kind, some holding and some failing *depends*.

    Figures are those of the part that is nearest to its margin's wrong side: the first that does not hold.
    """
    verdicts = {p.verdict for p in parts}
    weakest = next((p for p in parts if p.verdict != "holds"), parts[0])
    if OPEN in verdicts:
        verdict = OPEN
    elif len(verdicts) == 1:
        (verdict,) = verdicts
    else:
        verdict = "depends" if {"holds", "fails"} <= verdicts else "no evidence"
    return Judgement(verdict, weakest.effect, weakest.low, weakest.high, weakest.seeds, weakest.rule)
