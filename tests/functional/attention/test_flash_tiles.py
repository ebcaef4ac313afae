"""The tile loop is attention, whatever the tiles; and the traffic it counts is the one the theorem states."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from handbook_src.errors import ConfigError, ShapeError
from handbook_src.functional.attention.attention import scaled_dot_product_attention
from handbook_src.functional.attention.flash_tiles import SlowMemory, Tiles, standard_attention, tiled_attention
from handbook_src.testing import assert_parity, refuses


def inputs(t: int, s: int, e: int, *, b: int = 2, h: int = 2, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    return [torch.randn(b, n, h, e, dtype=dtype) for n in (t, s, s)]


@pytest.mark.parity("flash-attention")
@pytest.mark.parametrize("tiles", [Tiles(1, 1), Tiles(3, 5), Tiles(8, 4), Tiles(64, 64)], ids=str)
@pytest.mark.parametrize(("t", "s"), [(1, 1), (1, 9), (7, 7), (8, 16), (5, 12), (13, 13)])
@pytest.mark.parametrize("causal", [False, True])
def test_the_loop_is_attention(tiles: Tiles, t: int, s: int, causal: bool) -> None:
    def ours(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return tiled_attention(q, k, v, causal=causal, scale=0.7, tiles=tiles)

    def dense(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return scaled_dot_product_attention(q, k, v, causal=causal, scale=0.7, backend="reference")

    assert_parity(ours, dense, inputs(t, s, 3))


@pytest.mark.parity("flash-attention")
def test_standard_attention_is_attention() -> None:
    assert_parity(standard_attention, lambda q, k, v: scaled_dot_product_attention(q, k, v), inputs(5, 9, 3))


@pytest.mark.law("flash-attention")
def test_gradients_by_finite_differences() -> None:
    q, k, v = (x.requires_grad_() for x in inputs(4, 6, 2, b=1, h=1))
    assert torch.autograd.gradcheck(lambda *x: tiled_attention(*x, causal=True, tiles=Tiles(2, 3)), (q, k, v))


@pytest.mark.law("flash-attention")
def test_huge_scores_do_not_overflow() -> None:
    q, k, v = inputs(6, 6, 4, dtype=torch.float32)
    out = tiled_attention(1e4 * q, 1e4 * k, v, tiles=Tiles(2, 2))
    torch.testing.assert_close(out, scaled_dot_product_attention(1e4 * q, 1e4 * k, v))


@pytest.mark.law("flash-attention")
def test_the_forward_traffic_is_the_one_counted_by_hand() -> None:
    t, s, e, rows, columns = 12, 20, 4, 4, 5
    memory = SlowMemory()
    tiled_attention(*inputs(t, s, e, b=1, h=1), tiles=Tiles(rows, columns), memory=memory)
    assert memory.reads == t * e + (t // rows) * 2 * s * e  # queries once, keys and values once a tile of queries
    assert memory.writes == t * e + t  # the output, and one number a query
    assert memory.held == rows * e * 2 + columns * e * 2 + rows * columns + rows * 2


@pytest.mark.law("flash-attention")
def test_standard_traffic_is_four_squares() -> None:
    t, s, e = 12, 20, 4
    memory = SlowMemory()
    standard_attention(*inputs(t, s, e, b=1, h=1), memory=memory)
    assert memory.traffic == 4 * t * s + 2 * (t + s) * e


@pytest.mark.law("flash-attention")
def test_what_causal_hides_is_not_fetched() -> None:
    def reads(causal: bool) -> int:
        memory = SlowMemory()
        tiled_attention(*inputs(64, 64, 2, b=1, h=1), causal=causal, tiles=Tiles(4, 4), memory=memory)
        return memory.reads

    assert reads(True) < 0.6 * reads(False)


@pytest.mark.law("flash-attention")
@pytest.mark.parametrize(("axis", "power"), [("length", 2), ("features", 2), ("memory", -1)])
def test_the_traffic_grows_as_the_theorem_says(axis: str, power: int) -> None:
    def traffic(times: int) -> int:
        n = 65536 * (times if axis == "length" else 1)
        e = 8 * (times if axis == "features" else 1)
        fast = 2**14 * (times if axis == "memory" else 1)
        q = torch.empty(1, n, 1, e, device="meta")  # counts without arithmetic
        memory = SlowMemory()
        tiles = Tiles(Tiles.fitting(fast, e).rows, n)  # one step of keys: how they are cut moves no more and no less
        tiled_attention(q, q, q, tiles=tiles, memory=memory)
        return memory.traffic

    # what the theorem leaves out (queries, output, the keys' own room) is less than a tenth of a power here
    assert abs(math.log(traffic(4) / traffic(1), 4) - power) < 0.1


@pytest.mark.parity("flash-attention")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_rounded_once(dtype: torch.dtype) -> None:
    q, k, v = inputs(9, 11, 8, dtype=torch.float32)
    want = scaled_dot_product_attention(*(x.to(dtype).float() for x in (q, k, v))).to(dtype)
    got = tiled_attention(*(x.to(dtype) for x in (q, k, v)), tiles=Tiles(4, 4))
    assert got.dtype == dtype
    torch.testing.assert_close(got, want, rtol=torch.finfo(dtype).eps, atol=1e-3)


@pytest.mark.law("flash-attention")
@pytest.mark.parametrize(("b", "t", "s"), [(0, 3, 3), (2, 0, 3), (2, 3, 0), (2, 0, 0)])
def test_of_nothing_it_makes_nothing(b: int, t: int, s: int) -> None:
    q, k, v = (x.requires_grad_() for x in inputs(t, s, 4, b=b))
    out = tiled_attention(q, k, v)
    assert out.shape == (b, t, 2, 4)
    assert (out == 0).all()
    out.sum().backward()
    assert all((x.grad == 0).all() for x in (q, k, v))


@pytest.mark.law("flash-attention")
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("where", [0, 1, 2])
def test_what_is_not_finite_reaches_only_those_who_see_it(bad: float, where: int, causal: bool) -> None:
    xs = inputs(9, 9, 4, b=2)
    xs[where][0, 5] = bad  # in the middle of a tile
    xs = [x.requires_grad_() for x in xs]
    out = tiled_attention(*xs, causal=causal, tiles=Tiles(4, 4))
    want = scaled_dot_product_attention(*xs, causal=causal, backend="reference")
    torch.testing.assert_close(out, want, equal_nan=True)
    good = want.detach().isfinite()
    got = torch.autograd.grad(out[good].sum(), xs)
    for x, y in zip(got, torch.autograd.grad(want[good].sum(), xs), strict=True):
        assert y.isfinite().all()
        torch.testing.assert_close(x, y)


@pytest.mark.law("flash-attention")
@pytest.mark.parametrize(("features", "memory"), [(1, 7), (8, 500), (64, 2**13), (64, 2**16)])
def test_the_largest_tile_fits_and_the_next_does_not(features: int, memory: int) -> None:
    def needs(rows: int) -> int:
        columns = min(rows, features)
        return 2 * rows * features + 2 * columns * features + rows * columns + 2 * rows

    tile = Tiles.fitting(memory, features)
    assert tile.columns == min(tile.rows, features)
    assert needs(tile.rows) <= memory < needs(tile.rows + 1)


@pytest.mark.refusal("flash-attention")
def test_what_it_refuses() -> None:
    q, k, v = inputs(4, 6, 2)
    with refuses(ShapeError, "4", "6"):
        tiled_attention(k, q, q, causal=True)
    with refuses(ShapeError, "flash_attention"):
        tiled_attention(q, k[:, :, :1], v[:, :, :1])
    with refuses(ConfigError, "-1"):
        tiled_attention(q, k, v, scale=-1.0)
    with refuses(ShapeError):
        tiled_attention(q.long(), k.long(), v.long())
    with refuses(ConfigError, "0"):
        Tiles(0, 4)
    with refuses(ConfigError, "6", "7"):
        Tiles.fitting(6, 1)
    with refuses(ConfigError, "fast memory", 34, "at least 35"):  # 4 e + 3
        Tiles.fitting(34, 8)
    assert Tiles.fitting(35, 8) == Tiles(1, 1)
    with refuses(ConfigError, "2.5"):
        Tiles.fitting(100, 2.5)  # type: ignore[arg-type]
    with refuses(ConfigError, "64"):
        tiled_attention(q, k, v, tiles=64)  # type: ignore[arg-type]
    for call in (tiled_attention, standard_attention):
        with refuses(ConfigError, "'counter'"):
            call(q, k, v, memory="counter")  # type: ignore[arg-type]
    for fewer, wider in ((1, 2), (2, 3)):
        with refuses(ShapeError, "standard_attention", "flash_attention"):
            standard_attention(q, *(torch.randn(2, 6, fewer, n, dtype=q.dtype) for n in (2, wider)))
