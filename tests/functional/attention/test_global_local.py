"""Longformer's attention against the dense masked formula; the layer's test has the published model."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from handbook_src.errors import ConfigError, HandbookError, ShapeError
from handbook_src.functional.attention.attention import scaled_dot_product_attention
from handbook_src.functional.attention.global_local import global_local_attention, global_local_rule
from handbook_src.functional.attention.mask import padding
from handbook_src.testing import assert_parity, refuses

LONG = "global-local-attention"
MARKS = torch.zeros(2, 33, dtype=torch.bool)
MARKS[0, [3, 31]], MARKS[1, 12] = True, True
POSITIONS = {"none": (), "first": (0,), "several": (7, 0, 32), "marks": MARKS, "no marks": torch.zeros_like(MARKS)}


def qkv(t: int = 33, s: int = 33, g: int = 4, c: int = 5, b: int = 2) -> list[Tensor]:
    return [torch.randn(b, t, 4, 6), torch.randn(b, s, g, 6), torch.randn(b, s, g, c)]


def is_global(positions: object, t: int = 33) -> Tensor:
    if isinstance(positions, Tensor):
        return positions
    return torch.tensor([[i in positions for i in range(t)]] * 2)  # type: ignore[operator]


def seen(positions: object, n: int, causal: bool, rows: bool, t: int = 33) -> Tensor:
    marks, i = is_global(positions, t), torch.arange(t)
    allowed = ((i[:, None] - i).abs() < n) | marks[:, None, None] | (marks[:, None, :, None] if rows else False)
    return allowed & (i <= i[:, None]) if causal else allowed


@pytest.mark.parity(LONG)
@pytest.mark.parametrize("name", POSITIONS)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("n", [1, 4, 50])
def test_shared_projections_equal_the_dense_mask(name: str, causal: bool, n: int) -> None:
    mask = seen(POSITIONS[name], n, causal, True)
    for size, g in ((8, 4), (64, 2)):
        assert_parity(
            lambda q, k, v, size=size: global_local_attention(
                q, k, v, n, POSITIONS[name], causal=causal, block_size=size
            ),
            lambda q, k, v: scaled_dot_product_attention(q, k, v, mask, backend="reference"),
            qkv(g=g),
        )


@pytest.mark.parity(LONG)
@pytest.mark.parametrize("name", POSITIONS)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("backend", ["auto", "torch", "reference"])
@pytest.mark.parametrize("padded", [False, True])
def test_separate_projections_equal_two_dense_attentions(name: str, causal: bool, backend: str, padded: bool) -> None:
    positions, lengths = POSITIONS[name], torch.tensor([33, 14])
    real = (torch.arange(33) < lengths[:, None])[:, None, None] if padded else torch.tensor(True)
    local, glob = seen(positions, 4, causal, False) & real, seen(tuple(range(33)), 40, causal, True) & real

    def ours(q: Tensor, k: Tensor, v: Tensor, *own: Tensor) -> Tensor:
        if not isinstance(positions, Tensor):
            own = (own[0][:, list(positions)], *own[1:])
        return global_local_attention(
            q, k, v, 4, positions, global_qkv=own, causal=causal, mask=padding(lengths) if padded else None,
            scale=0.3, block_size=8, backend=backend,
        )  # fmt: skip

    def oracle(q: Tensor, k: Tensor, v: Tensor, *own: Tensor) -> Tensor:
        one = scaled_dot_product_attention(q, k, v, local, scale=0.3, backend="reference")
        two = scaled_dot_product_attention(*own, glob, scale=0.3, backend="reference")
        return torch.where(is_global(positions)[:, :, None, None], two, one)

    assert_parity(ours, oracle, [*qkv(), *qkv()])


@pytest.mark.law(LONG)
def test_two_layers_connect_all_positions_through_one_global_one() -> None:
    x = torch.randn(1, 65, 1, 4, dtype=torch.float64, requires_grad=True)
    key = 0.1 * x.detach()

    def reach(depth: int, positions: tuple[int, ...]) -> int:
        y = x
        for _ in range(depth):
            y = global_local_attention(key, key, y, 2, positions, block_size=16)
        (grad,) = torch.autograd.grad(y[0, 64].sum(), x)
        return int((grad.abs().sum((0, 2, 3)) > 0).sum())

    assert reach(2, (0,)) == 65
    assert reach(2, ()) == 3
    assert reach(1, (0,)) == 3  # itself, its neighbour, the global position


@pytest.mark.law(LONG)
def test_it_is_a_window_without_global_positions_and_full_when_all_are_global() -> None:
    x = [y.double() for y in qkv()]
    torch.testing.assert_close(global_local_attention(*x, 3, range(33)), scaled_dot_product_attention(*x))
    rule = global_local_rule(3, (5, 5, 2))
    assert rule is global_local_rule(3, [5, 2])
    assert str(rule) == "window(3) | global_tokens(5, 2)"


@pytest.mark.law(LONG)
def test_garbage_in_the_padding_reaches_nothing() -> None:
    lengths = torch.tensor([33, 14])
    q, k, v = (x.double() for x in qkv())
    own = [x.double() for x in qkv()]
    own[0] = own[0][:, [0, 3]]

    def run() -> list[Tensor]:
        leaves = [x.clone().requires_grad_() for x in (q, k, v, *own)]
        out = global_local_attention(
            *leaves[:3], 4, (0, 3), global_qkv=tuple(leaves[3:]), mask=padding(lengths), block_size=8
        )
        return [out, *torch.autograd.grad(out[1, :14].sum() + out[0].sum(), leaves)]

    clean = run()
    for x in (k, v, own[1], own[2]):
        x[1, 14:] = math.nan
    for dirty, want in zip(run(), clean, strict=True):
        torch.testing.assert_close(dirty, want)


@pytest.mark.registration(LONG)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_and_empty_inputs(dtype: torch.dtype) -> None:
    x = qkv(c=6)
    want = global_local_attention(*(y.double() for y in x), 4, (0, 9), backend="reference")
    low = global_local_attention(*(y.to(dtype) for y in x), 4, (0, 9), block_size=8)
    assert low.dtype == dtype
    torch.testing.assert_close(low.double(), want, rtol=0.05, atol=0.05)
    for b, t in ((0, 33), (2, 0)):
        assert global_local_attention(*qkv(t, t, b=b), 4, ()).shape == (b, t, 4, 5)
    last = global_local_attention(x[0][:, -2:], x[1], x[2], 4, (0,), causal=True)
    torch.testing.assert_close(last, global_local_attention(*x, 4, (0,), causal=True)[:, -2:])


@pytest.mark.refusal(LONG)
def test_refusals() -> None:
    q, k, v = qkv()
    for n in (0, -1, True, 2.5, math.nan):
        with refuses(ConfigError, "window", n):
            global_local_attention(q, k, v, n, (0,))  # type: ignore[arg-type]
    for position in (-1, 1.5, True):
        with refuses(ConfigError, "position", position):
            global_local_attention(q, k, v, 3, (position,))  # type: ignore[arg-type]
    with refuses(ConfigError, "global positions", 0):
        global_local_attention(q, k, v, 3, 0)  # type: ignore[arg-type]
    with refuses(ShapeError, "global position", 33, "below 33"):
        global_local_attention(q, k, v, 3, (33,))
    with refuses(ShapeError, "marks", (2, 33), "torch.int64"):
        global_local_attention(q, k, v, 3, MARKS.long())
    with refuses(ShapeError, "(2, 20)"):
        global_local_attention(q, k, v, 3, MARKS[:, :20])
    with refuses(ConfigError, "mask", "Tensor", "padding"):
        global_local_attention(q, k, v, 3, (0,), mask=torch.ones(33, 33) > 0)  # type: ignore[arg-type]
    with refuses(ShapeError, "global_qkv", "(2, 1, 4, e)"):
        global_local_attention(q, k, v, 3, (0,), global_qkv=(q, k, v))
    with refuses(ShapeError, "t=33", "s=5"):
        global_local_attention(q, k[:, :5], v[:, :5], 3, (0,))
    with refuses(ShapeError, "4 query, 3 key"):
        global_local_attention(q, *qkv(g=3)[1:], 3, (0,))
    with refuses(ConfigError, "scale", -2.0):
        global_local_attention(q, k, v, 3, (0,), scale=-2.0)


@pytest.mark.law("global-local-attention")
@pytest.mark.parametrize("marks", [False, True])
def test_a_broken_later_key_does_not_reach_an_earlier_global_query(marks: bool) -> None:
    q, k, v = qkv()
    positions = is_global([1, 7]).expand(2, -1) if marks else [1, 7]
    chosen, local = q if marks else q[:, [1, 7]], (k, v)

    def call(k: Tensor, v: Tensor) -> Tensor:
        return global_local_attention(q, *local, 2, positions, global_qkv=(chosen, k, v), causal=True)

    broken = [x.clone().index_fill_(1, torch.tensor([5]), math.nan) for x in (k, v)]
    for x in broken:
        x.requires_grad_()
    clean, found = call(k, v), call(*broken)
    torch.testing.assert_close(found[:, :7], clean[:, :7])
    assert bool(found[:, 7].isnan().all())
    found[:, 1].sum().backward()
    assert all(bool(x.grad.isfinite().all()) for x in broken if x.grad is not None)


def test_a_batch_may_be_empty() -> None:
    q, k, v = (x[:0] for x in qkv())
    assert global_local_attention(q, k, v, 2, is_global([3])[:0], global_qkv=(q, k, v)).shape[0] == 0


@pytest.mark.refusal("global-local-attention")
def test_marks_and_projections_that_do_not_fit_are_refused() -> None:
    q, k, v = qkv()
    for shape in ((2, 35), (1, 33)):
        with refuses(ShapeError, shape):
            global_local_attention(q, k, v, 2, torch.ones(shape, dtype=torch.bool), global_qkv=(q, k, v))
    for wrong, value in (
        ((q[:, :1], k), "tuple"),
        (5, "int"),
        ((q[:1, :1], k[:1], v[:1]), "(1, 1, 4, 6)"),
        ((q[:, :1, :2], k[:, :, :2], v[:, :, :2]), "(2, 1, 2, 6)"),
        ((q[:, :1], k, v[..., :2]), "(2, 33, 4, 2)"),
        ((q[:, :1].double(), k.double(), v.double()), "float64"),
    ):
        with refuses(HandbookError, value):
            global_local_attention(q, k, v, 2, [0], global_qkv=wrong)  # type: ignore[arg-type]
