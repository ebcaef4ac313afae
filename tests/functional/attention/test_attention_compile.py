"""Attention under ``torch.compile`` with sizes that are symbols, and einops read by dynamo."""

from __future__ import annotations

import pytest
import torch
from einops import rearrange, reduce, repeat

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


def test_dynamo_reads_every_form_of_einops_that_the_house_writes():
    """Elsewhere it need not: what it makes of a pattern is the same for all who use it."""

    def forms(x, n):
        rows = rearrange(x, "b (n l) h e -> (b n) 1 h (l e)", n=n)
        kept = repeat(reduce(rows, "r 1 h f -> r h", "mean"), "r h -> (h two) r", two=2)
        return [rearrange(part, "h (b n) -> b n h", n=n) for part in kept.chunk(2)]

    x = torch.randn(2, 6, 3, 4)
    with unchecked():
        torch.testing.assert_close(torch.compile(forms, fullgraph=True, backend="aot_eager")(x, 3), forms(x, 3))
    torch.compiler.reset()
