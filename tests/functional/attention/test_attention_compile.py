"""Attention under ``torch.compile`` with sizes that are symbols."""

from __future__ import annotations

import pytest
import torch

from handbook_src.functional.attention.attention import scaled_dot_product_attention
from handbook_src.testing import unchecked


@pytest.mark.registration("scaled-dot-product-attention")
def test_one_compilation_serves_every_length():
    with unchecked():
        compiled = torch.compile(scaled_dot_product_attention, fullgraph=True, backend="aot_eager", dynamic=True)
        for t, s, kv_heads in ((5, 5, 4), (7, 7, 4), (7, 7, 2), (5, 9, 4)):
            q, k, v = torch.randn(2, t, 4, 8), torch.randn(2, s, kv_heads, 8), torch.randn(2, s, kv_heads, 8)
            want = scaled_dot_product_attention(q, k, v, causal=True)
            torch.testing.assert_close(compiled(q, k, v, causal=True), want)
    torch.compiler.reset()
