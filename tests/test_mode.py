"""Modes: each part keeps its own."""

import pytest
from torch import nn

from handbook_src.mode import modes_kept


def test_each_part_keeps_its_mode_whatever_is_raised():
    model = nn.Sequential(nn.BatchNorm1d(2).eval(), nn.Dropout())
    with pytest.raises(IndexError), modes_kept(model):
        model.eval()[9]
    assert [part.training for part in (model, *model)] == [True, False, True]
