"""Proof tools: parity with an oracle, laws, refusals, toy tasks, and an honest bench.

Timing and toy tasks stand in :mod:`handbook_src.bench.bench` and
:mod:`handbook_src.data.tasks`, reference libraries in :mod:`handbook_src.testing.oracle`.
Used by ``tests/``, by the chapters' proof cells and by the workshop ``kernels/``;
the house itself never imports this room.
"""

from handbook_src.testing.checker import unchecked
from handbook_src.testing.law import (
    assert_batch_independent,
    assert_causal,
    assert_permutation_equivariant,
)
from handbook_src.testing.parity import assert_parity, relative_error
from handbook_src.testing.refusal import refuses

__all__ = [
    "assert_batch_independent",
    "assert_causal",
    "assert_parity",
    "assert_permutation_equivariant",
    "refuses",
    "relative_error",
    "unchecked",
]
