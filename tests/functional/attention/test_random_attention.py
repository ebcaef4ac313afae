"""BigBird's layout and attention against the dense masked formula; the layer's test has the published model."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from handbook_src.errors import ConfigError, ShapeError
from handbook_src.functional.attention.attention import scaled_dot_product_attention
from handbook_src.functional.attention.block_plan import _kept as _kept_plans
from handbook_src.functional.attention.mask import causal, padding
from handbook_src.functional.attention.random_attention import _granted, bigbird_layout, bigbird_rule, random_attention
from handbook_src.testing import assert_parity, refuses

BIGBIRD = "random-attention"


def qkv(t: int = 37, g: int = 4, c: int = 5, b: int = 2) -> list[Tensor]:
    return [torch.randn(b, t, 4, 6), torch.randn(b, t, g, 6), torch.randn(b, t, g, c)]


def spread(layout: Tensor, size: int, t: int) -> Tensor:
    """Blocks drawn out to positions."""
    return layout.repeat_interleave(size, -2).repeat_interleave(size, -1)[..., :t, :t]


@pytest.mark.parity(BIGBIRD)
@pytest.mark.parametrize("size", [1, 4, 16, 64])
@pytest.mark.parametrize(
    "options", [{}, {"window": 1, "random": 0}, {"ends": 0, "random": 1, "seed": 3}, {"window": 5, "ends": 2}], ids=str
)
@pytest.mark.parametrize("backend", ["auto", "torch", "reference"])
def test_equals_the_dense_mask(size: int, options: dict[str, int], backend: str) -> None:
    mask = spread(bigbird_layout(-(-37 // size), **options), size, 37)
    assert_parity(
        lambda q, k, v: random_attention(q, k, v, block_size=size, backend=backend, **options),
        lambda q, k, v: scaled_dot_product_attention(q, k, v, mask, backend="reference"),
        qkv(g=2),
    )


@pytest.mark.parity(BIGBIRD)
def test_a_layout_for_each_head_and_a_further_mask() -> None:
    layouts = torch.stack([bigbird_layout(10, seed=s) for s in (0, 1, 0, 2)])
    lengths = torch.tensor([37, 15])
    real = (torch.arange(37) < lengths[:, None])[:, None, None]
    past = torch.ones(37, 37, dtype=torch.bool).tril()
    for layout in (layouts, layouts[1]):
        mask = spread(layout, 4, 37) & real & past
        assert_parity(
            lambda q, k, v, layout=layout: random_attention(
                q, k, v, block_size=4, layout=layout, mask=causal & padding(lengths), scale=0.2
            ),
            lambda q, k, v, mask=mask: scaled_dot_product_attention(q, k, v, mask, scale=0.2, backend="reference"),
            qkv(),
        )


@pytest.mark.law(BIGBIRD)
@pytest.mark.parametrize("ends", [0, 1, 2, 3])
def test_so_many_blocks_at_each_end_see_all_and_are_seen(ends: int) -> None:
    layout = bigbird_layout(12, window=1, random=0, ends=ends)
    all_seeing = layout.all(1)
    assert all_seeing.equal(layout.all(0))
    assert all_seeing.tolist() == [True] * ends + [False] * (12 - 2 * ends) + [True] * ends


@pytest.mark.law(BIGBIRD)
@pytest.mark.parametrize("blocks", [1, 2, 5, 16, 40])
def test_each_row_sees_its_window_the_ends_and_as_many_drawn_blocks_as_asked(blocks: int) -> None:
    i = torch.arange(blocks)
    for random in (0, 1, 3):
        layout = bigbird_layout(blocks, random=random, seed=5)
        fixed = bigbird_layout(blocks, random=0)
        assert (layout | fixed).equal(layout)
        drawn, room = (layout & ~fixed).sum(1), (~fixed).sum(1)
        assert drawn.equal(room.clamp(max=random))
        assert layout[0].all() and layout[-1].all() and layout[:, 0].all() and layout[:, -1].all()  # noqa: PT018
        assert fixed.equal(
            ((i[:, None] - i).abs() <= 1) | (i == 0) | (i == blocks - 1) | fixed[:, :1] & fixed.all(1)[:, None]
        )


@pytest.mark.law(BIGBIRD)
@pytest.mark.parametrize(
    ("s", "size", "blocks"), [(0, 4, 1), (1, 4, 1), (4, 4, 1), (5, 4, 2), (37, 16, 3), (37, 64, 1)]
)
def test_a_rule_has_as_many_blocks_as_hold_positions(s: int, size: int, blocks: int) -> None:
    assert bigbird_rule(s, size).extent == blocks * size


@pytest.mark.law(BIGBIRD)
def test_the_draw_is_the_same_each_time_and_uniform() -> None:
    assert bigbird_layout(30, seed=7).equal(bigbird_layout(30, seed=7))
    assert not bigbird_layout(30, seed=7).equal(bigbird_layout(30, seed=8))
    assert bigbird_rule(100, 8) is bigbird_rule(100, 8)
    state = torch.get_rng_state()
    bigbird_layout(30, seed=7)
    assert torch.get_rng_state().equal(state)
    count = sum((bigbird_layout(12, seed=s) & ~bigbird_layout(12, random=0)).double() for s in range(400))
    row = count[5][count[5] > 0] / 400  # the 7 blocks that row 5 does not see otherwise
    assert len(row) == 7
    assert (row - 3 / 7).abs().max() < 0.1  # four standard deviations


@pytest.mark.law(BIGBIRD)
def test_random_blocks_shorten_the_way_between_blocks() -> None:
    def steps(layout: Tensor) -> int:
        reach, depth = torch.eye(len(layout)), 0
        while not reach.all():
            reach, depth = ((layout.float() @ reach) > 0).float(), depth + 1
        return depth

    window = bigbird_layout(64, random=0, ends=0)
    assert steps(window) == 63
    assert steps(window | bigbird_layout(64, random=3, ends=0)) <= 6
    assert steps(bigbird_layout(64, random=0)) == 2


@pytest.mark.law(BIGBIRD)
def test_all_blocks_granted_is_full_attention() -> None:
    x = [y.double() for y in qkv()]
    torch.testing.assert_close(random_attention(*x, block_size=4, random=10), scaled_dot_product_attention(*x))
    torch.testing.assert_close(random_attention(*x, block_size=64), scaled_dot_product_attention(*x))


@pytest.mark.registration(BIGBIRD)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_and_empty_inputs(dtype: torch.dtype) -> None:
    x = qkv(c=6)
    want = random_attention(*(y.double() for y in x), block_size=4, backend="reference")
    low = random_attention(*(y.to(dtype) for y in x), block_size=4)
    assert low.dtype == dtype
    torch.testing.assert_close(low.double(), want, rtol=0.05, atol=0.05)
    for b, t in ((0, 5), (2, 0)):
        assert random_attention(*qkv(t, b=b)).shape == (b, t, 4, 5)


@pytest.mark.refusal(BIGBIRD)
def test_refusals() -> None:
    q, k, v = qkv()
    for name, bad in (("block_size", 0), ("window", 0), ("random", -1), ("ends", -2), ("seed", -1), ("random", 1.5),
                      ("block_size", True), ("window", math.nan)):  # fmt: skip
        with refuses(ConfigError, name, bad):
            random_attention(q, k, v, **{name: bad})  # type: ignore[arg-type]
    with refuses(ConfigError, "window", 4, "odd"):
        random_attention(q, k, v, window=4)
    with refuses(ShapeError, "block layout", (3,)):
        random_attention(q, k, v, layout=torch.ones(3) > 0)
    with refuses(ShapeError, "block layout", (3, 4)):
        random_attention(q, k, v, layout=torch.ones(3, 4) > 0)
    with refuses(ShapeError, "at most 12"):
        random_attention(q, k, v, block_size=4, layout=torch.ones(3, 3) > 0)
    with refuses(ShapeError, "(1, 3, 37, 37)"):
        random_attention(q, k, v, block_size=16, layout=torch.ones(3, 3, 3) > 0)
    with refuses(ConfigError, "mask", "Tensor", "padding"):
        random_attention(q, k, v, mask=torch.ones(37, 37) > 0)  # type: ignore[arg-type]
    with refuses(ShapeError, "four axes"):
        random_attention(q[0], k[0], v[0])
    with refuses(ShapeError, "torch.int64"):
        random_attention(q.long(), k.long(), v.long())


@pytest.mark.refusal("random-attention")
@pytest.mark.parametrize("name", ["window", "random", "ends", "seed"])
@pytest.mark.parametrize("value", [3.0, True, [3], None])
def test_what_was_drawn_before_does_not_let_the_wrong_kind_pass(name: str, value: object) -> None:
    q, k, v = qkv()
    for n in (1, 3):
        random_attention(q, k, v, block_size=4, **{name: n})  # to a dict, 3.0 is 3 and True is 1
    with refuses(ConfigError, str(value)):
        random_attention(q, k, v, block_size=4, **{name: value})  # type: ignore[arg-type]
    with refuses(ConfigError, "-1"):
        bigbird_rule(-1)


@pytest.mark.registration("random-attention")
def test_a_draw_that_was_made_elsewhere_serves_training() -> None:
    q, k, v = (x.clone().requires_grad_() for x in qkv())
    with torch.inference_mode(), torch.device("meta"):
        random_attention(q, k, v, block_size=6, seed=31)
    random_attention(q, k, v, block_size=6, seed=31).sum().backward()
    assert k.grad is not None
    assert bool(k.grad.isfinite().all())
    random_attention(q, k, v, block_size=6, seed=31, backend="reference").sum().backward()


def test_blocks_may_be_longer_than_the_sequence() -> None:
    q, k, v = qkv()
    found = random_attention(q, k, v, block_size=10**9)
    torch.testing.assert_close(found, scaled_dot_product_attention(q, k, v))


@pytest.mark.law("random-attention")
@pytest.mark.parametrize("heads", [(), (2,)])
def test_a_layout_is_planned_once(heads: tuple[int, ...]) -> None:
    q, layout = torch.randn(1, 8, 2, 4), torch.eye(4).bool().expand(*heads, 4, 4).clone()
    _granted.cache_clear()
    plans = _kept_plans.cache_info().misses
    want = random_attention(q, q, q, layout=layout, block_size=2)
    torch.testing.assert_close(random_attention(q, q, q, layout=layout.clone(), block_size=2), want)
    assert _kept_plans.cache_info().misses == plans + 1
    assert (_granted.cache_info().hits, _granted.cache_info().misses) == (1, 1)
    layout[..., 0, 3] = True  # written over: another layout
    changed = random_attention(q, q, q, layout=layout, block_size=2)
    assert not torch.allclose(changed[:, :2], want[:, :2])
    torch.testing.assert_close(changed[:, 2:], want[:, 2:])
    assert _kept_plans.cache_info().misses == plans + 2
