"""The Sparse Transformer's attentions as layers; what all patterns share is in test_chunked_attention.py."""

from __future__ import annotations

import pytest

from handbook_src.errors import ConfigError
from handbook_src.layers.attention.attention import MultiHeadAttention
from handbook_src.layers.attention.sparse_transformer import FixedAttention, StridedAttention
from handbook_src.testing import refuses

ID = "chunked-attention"


@pytest.mark.law(ID)
@pytest.mark.parametrize("kind", [StridedAttention, FixedAttention])
def test_what_is_not_said_is_multi_head_attentions(kind: type) -> None:
    layer, plain = kind(8, 2, stride=4), MultiHeadAttention(8, 2)
    assert layer.state_dict().keys() == plain.state_dict().keys()
    assert (layer.heads, layer.dropout) == (plain.heads, plain.dropout)


@pytest.mark.refusal(ID)
def test_refusals() -> None:
    for wrong in (0, -1, True, 2.5, None):
        for make in (StridedAttention, FixedAttention):
            with refuses(ConfigError, "stride", wrong, "at least 1"):
                make(8, 2, stride=wrong)
        with refuses(ConfigError, "summary", wrong):
            FixedAttention(8, 2, stride=4, summary=wrong)
    with refuses(ConfigError, "summary", 5, 4):
        FixedAttention(8, 2, stride=4, summary=5)
    for make, part in ((StridedAttention, "summary"), (FixedAttention, "column")):
        with refuses(ConfigError, "part", repr(part), "both"):
            make(8, 2, stride=4, part=part)
