"""Dilated attention as a layer; what all patterns share is in test_chunked_attention.py."""

from __future__ import annotations

import pytest
import torch

from handbook_src.errors import ConfigError
from handbook_src.layers.attention.dilated_attention import DilatedAttention
from handbook_src.testing import refuses

ID = "dilated-attention"


@pytest.mark.law(ID)
def test_one_dilation_never_leaves_its_stream_and_two_do() -> None:
    x = torch.randn(1, 12, 4, requires_grad=True)
    layers = [DilatedAttention(4, reach=3, dilation=3) for _ in range(4)]
    for mixed in (False, True):
        y = x
        for layer in [*layers, DilatedAttention(4, reach=2, dilation=1)] if mixed else layers:
            y = y + layer(y)
        (grad,) = torch.autograd.grad(y[0, 6].square().sum(), x)
        seen = (grad[0].abs().sum(-1) > 0).nonzero().flatten().tolist()
        assert seen == (list(range(12)) if mixed else [0, 3, 6, 9])


@pytest.mark.refusal(ID)
def test_refusals() -> None:
    for wrong in (0, -1, True, 2.5, None):
        with refuses(ConfigError, "reach", wrong, "at least 1"):
            DilatedAttention(8, 2, reach=wrong, dilation=1)
        with refuses(ConfigError, "dilation", wrong, "at least 1"):
            DilatedAttention(8, 2, reach=2, dilation=wrong)
