"""A softmax in parts equals the softmax over all keys."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from handbook_src.functional.attention.partial_softmax import join, partial_softmax
from handbook_src.testing import assert_parity

DOUBLE = torch.float64


def qkv(
    t: int, s: int | None = None, h: int = 2, g: int = 2, b: int = 2, e: int = 4, c: int = 3
) -> tuple[Tensor, Tensor, Tensor]:
    s = t if s is None else s
    q, k, v = (b, t, h, e), (b, s, g, e), (b, s, g, c)
    return torch.randn(q, dtype=DOUBLE), torch.randn(k, dtype=DOUBLE), torch.randn(v, dtype=DOUBLE)


def masked(q: Tensor, k: Tensor, v: Tensor, seen: Tensor, scale: float | None = None) -> Tensor:
    """Torch's unfused attention under a dense mask, which shares no code with ours."""
    with sdpa_kernel(SDPBackend.MATH):
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v, seen, scale=scale, enable_gqa=True).transpose(1, 2)


@pytest.mark.parity("chunked-attention", "dilated-attention")
@pytest.mark.parametrize("cuts", [[0, 9], [0, 4, 9], [0, 1, 2, 9], [0, 9, 9]], ids=str)
@pytest.mark.parametrize("g", [1, 2, 4])
def test_parts_join_to_the_whole(cuts: list[int], g: int) -> None:
    seen = torch.rand(2, 4, 5, 9) < 0.4
    seen[0, 0, 0] = False

    def ours(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        spans = [slice(a, b) for a, b in itertools.pairwise(cuts)]
        return join([partial_softmax(q, k[:, x], v[:, x], seen[..., x], 0.3) for x in spans])

    assert_parity(ours, lambda q, k, v: masked(q, k, v, seen, 0.3).nan_to_num(0.0), qkv(5, 9, h=4, g=g))


@pytest.mark.law("dilated-attention")
def test_a_key_in_two_parts_counts_twice() -> None:
    q, k, v = qkv(3, 5)
    parts = [partial_softmax(q, k, v, None, 0.5), partial_softmax(q, k[:, :2], v[:, :2], None, 0.5)]
    bias = torch.tensor([2.0, 2, 1, 1, 1], dtype=DOUBLE).log()
    torch.testing.assert_close(join(parts), masked(q, k, v, bias.expand(3, 5), 0.5))


@pytest.mark.law("chunked-attention", "dilated-attention")
def test_large_scores_do_not_overflow() -> None:
    q, k, v = qkv(3, 6)
    parts = [partial_softmax(q, k[:, x] * 1e4, v[:, x], None, 1.0) for x in (slice(0, 2), slice(2, 6))]
    torch.testing.assert_close(join(parts), masked(q, k * 1e4, v, torch.ones(3, 6).bool(), 1.0))
    assert math.isfinite(join(parts).sum().item())


@pytest.mark.registration("chunked-attention")
def test_halves_are_summed_in_float32() -> None:
    q, k, v = (x.half() for x in qkv(3, 6))
    part = partial_softmax(q, k, v, None, 1.0)
    assert part.numerator.dtype == part.denominator.dtype == torch.float32
