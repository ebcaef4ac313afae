"""Summed and scaled embeddings: formula, gradients, laws, refusals."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from handbook_src.errors import ConfigError, ShapeError
from handbook_src.functional.embeddings.token_embedding import scaled_embedding, token_position_segment_embedding
from handbook_src.testing import assert_parity, refuses

ID = "token-position-segment-embedding"
BACKENDS = ["auto", "torch", "reference"]


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def tables(d: int = 5) -> tuple[Tensor, Tensor, Tensor]:
    return draw(11, d), draw(9, d, seed=1), draw(3, d, seed=2)


def written_out(ids, e, p, s, w, b, segments=None, positions=None, past=0, eps=1e-12):
    """One token at a time."""
    rows = []
    for i in range(ids.shape[0]):
        for t in range(ids.shape[1]):
            at = past + t if positions is None else int(positions.expand(ids.shape)[i, t])
            seg = 0 if segments is None else int(segments.expand(ids.shape)[i, t])
            x = e[int(ids[i, t])] + p[at] + s[seg]
            x = (x - x.sum() / len(x)) / (((x - x.sum() / len(x)) ** 2).sum() / len(x) + eps).sqrt()
            rows.append(x * w + b)
    return torch.stack(rows).view(*ids.shape, -1)


@pytest.mark.parity(ID)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("b", "t", "d"), [(1, 1, 2), (3, 7, 5), (2, 9, 8)])
@pytest.mark.parametrize("kind", ["plain", "segments", "row of segments", "positions", "past"])
def test_the_sum_of_three_rows_normalised(backend, b, t, d, kind) -> None:
    ids = torch.randint(11, (b, t))
    segments = {"segments": torch.randint(3, (b, t)), "row of segments": torch.randint(3, (t,))}.get(kind)
    positions = torch.randint(9, (1, t), dtype=torch.int32) if kind == "positions" else None
    past = 9 - t if kind == "past" else 0
    options = {"token_type_ids": segments, "position_ids": positions, "past_key_values_length": past}
    assert_parity(
        lambda ids, e, p, s, w, b: token_position_segment_embedding(ids, (e, p, s), w, b, **options, backend=backend),
        lambda *a: written_out(*a, segments, positions, past),
        [ids, *tables(d), draw(d, seed=3), draw(d, seed=4)],
        rtol=1e-8,
        atol=1e-9,
    )


@pytest.mark.parity(ID)
@pytest.mark.parametrize("backend", BACKENDS)
def test_vectors_take_the_lookups_place_and_padding_gets_no_gradient(backend) -> None:
    e, p, s = tables()
    e.requires_grad_()
    ids = torch.tensor([[3, 0, 4, 0]])
    y = token_position_segment_embedding(ids, (e, p, s), padding_idx=0, eps=1e-3, backend=backend)
    torch.testing.assert_close(
        token_position_segment_embedding(None, (e, p, s), inputs_embeds=e[ids], eps=1e-3, backend=backend), y
    )
    y.pow(3).sum().backward()
    assert (e.grad[0] == 0).all()
    assert (e.grad[3] != 0).any()
    assert (e.grad[1] == 0).all()


@pytest.mark.law(ID)
@pytest.mark.parametrize("backend", BACKENDS)
def test_only_the_sum_counts(backend) -> None:
    """What one table gains and another loses changes nothing; a token alone is as in the batch."""
    (e, p, s), ids = tables(), torch.randint(11, (3, 6))
    y = token_position_segment_embedding(ids, (e, p, s), backend=backend)
    moved = token_position_segment_embedding(ids, (e + 2, p - 0.5, s - 1.5), backend=backend)
    torch.testing.assert_close(moved, y)
    torch.testing.assert_close(y[:, 2:], token_position_segment_embedding(
        ids[:, 2:], (e, p, s), past_key_values_length=2, backend=backend))  # fmt: skip
    torch.testing.assert_close(y.square().mean(-1), torch.ones(3, 6, dtype=torch.float64))


@pytest.mark.registration(ID)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_halves_compile_and_emptiness(dtype, unchecked) -> None:
    half = tuple(t.to(dtype) for t in tables(8))
    ids = torch.randint(11, (2, 5), dtype=torch.int32)
    exact = token_position_segment_embedding(ids, tuple(t.double() for t in half), backend="reference")
    got = token_position_segment_embedding(ids, half, backend="reference")
    assert got.dtype == dtype
    assert torch.equal(got, exact.to(dtype)) or (got.double() - exact).abs().max() < 2 ** (
        -9 if dtype == torch.float16 else -6
    )
    compiled = torch.compile(
        lambda i, e, p, s: token_position_segment_embedding(i, (e, p, s)), fullgraph=True, backend="eager"
    )
    torch.testing.assert_close(compiled(ids, *tables()), token_position_segment_embedding(ids, tables()))
    for shape in ((0, 4), (2, 0)):
        assert token_position_segment_embedding(torch.zeros(shape, dtype=torch.long), tables()).shape == (*shape, 5)
    e, p, s = (t[:4].requires_grad_() for t in tables(3))
    assert torch.autograd.gradgradcheck(
        lambda e, p, s: token_position_segment_embedding(torch.tensor([[1, 2]]), (e, p, s), eps=1e-2), (e, p, s[:3])
    )


@pytest.mark.refusal(ID)
def test_bad_ids_and_tables_are_refused() -> None:
    ids, three = torch.zeros(2, 4, dtype=torch.long), tables()
    call = token_position_segment_embedding
    with refuses(ShapeError, "10 tokens after 0", 9):
        call(torch.zeros(2, 10, dtype=torch.long), three)
    with refuses(ShapeError, "4 tokens after 6", 9):
        call(ids, three, past_key_values_length=6)
    with refuses(ShapeError, "token 11", 10):
        call(ids + 11, three)
    with refuses(ShapeError, "position_ids", "-1", 8):
        call(ids, three, position_ids=ids - 1)
    with refuses(ShapeError, "token_type_ids", 3, 2):
        call(ids, three, token_type_ids=ids + 3)
    with refuses(ShapeError, "token_type_ids", (2, 3)):
        call(ids, three, token_type_ids=ids[:, :3])
    with refuses(ShapeError, "position_ids", (4, 1)):
        call(ids, three, position_ids=torch.zeros(4, 1, dtype=torch.long))
    for bad in (ids.float(), ids.bool(), ids.to(torch.int8)):
        with refuses(ShapeError, bad.dtype):
            call(bad, three)
        with refuses(ShapeError, bad.dtype):
            call(ids, three, token_type_ids=bad)
    with refuses(ShapeError, "1 axes"):
        call(ids[0], three)
    with refuses(ShapeError, (9, 4), 5):
        call(ids, (three[0], three[1][:, :4], three[2]))
    with refuses(ShapeError, (2, 4, 6), 5):
        call(None, three, inputs_embeds=draw(2, 4, 6))
    for backend in BACKENDS:
        with refuses(ShapeError, torch.bfloat16, torch.float32):
            call(None, tuple(t.bfloat16() for t in three), inputs_embeds=draw(2, 4, 5).float(), backend=backend)
        with refuses(ShapeError, "inputs_embeds", torch.int64):
            call(None, three, inputs_embeds=torch.ones(2, 4, 5, dtype=torch.long), backend=backend)


@pytest.mark.refusal(ID)
def test_bad_choices_are_refused() -> None:
    ids, three = torch.zeros(2, 4, dtype=torch.long), tables()
    call = token_position_segment_embedding
    with refuses(ConfigError, "both"):
        call(ids, three, inputs_embeds=draw(2, 4, 5))
    with refuses(ConfigError, "neither"):
        call(None, three)
    for past in (-1, 1.5, True):
        with refuses(ConfigError, "past_key_values_length", past):
            call(ids, three, past_key_values_length=past)
    with refuses(ConfigError, "padding_idx", 11):
        call(ids, three, padding_idx=11)
    with refuses(ConfigError, "eps", 0.0):
        call(ids, three, eps=0.0)
    with refuses(ConfigError, "triton"):
        call(ids, three, backend="triton")


# ---------------------------------------------------------------- scaled
@pytest.mark.parity("scaled-embedding")
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("padding_idx", [None, 0, -1])
@pytest.mark.parametrize("scale", [None, 1.0, 0.3])
@pytest.mark.parametrize("shape", [(), (1,), (3, 5), (0,), (2, 1, 7)])
def test_scaled_is_the_lookup_times_root_d(backend, padding_idx, scale, shape) -> None:
    assert_parity(
        lambda i, w: scaled_embedding(i, w, padding_idx, scale, backend=backend),
        lambda i, w: F.embedding(i, w, padding_idx) * (scale or math.sqrt(7)),
        [torch.randint(11, shape), draw(11, 7)],
    )


@pytest.mark.law("scaled-embedding")
@pytest.mark.parametrize("d", [1, 16, 513])
def test_a_table_of_deviation_one_over_root_d_gives_vectors_of_deviation_one(d) -> None:
    table = draw(4000, d) / math.sqrt(d)
    y = scaled_embedding(torch.arange(4000), table)
    assert abs(y.square().mean().item() - 1) < 0.1
    torch.testing.assert_close(scaled_embedding(torch.arange(9), 3 * table), 3 * y[:9])


@pytest.mark.registration("scaled-embedding")
def test_the_factor_is_not_rounded_to_bfloat16() -> None:
    table = torch.ones(2, 3072, dtype=torch.bfloat16) * 1.5
    got = scaled_embedding(torch.tensor([1]), table)
    assert (got == torch.tensor(1.5 * math.sqrt(3072)).bfloat16()).all()


@pytest.mark.refusal("scaled-embedding")
def test_scaled_refuses() -> None:
    for scale in (0.0, -1.0, math.nan, math.inf, True):
        with refuses(ConfigError, "scale", repr(scale)):
            scaled_embedding(torch.tensor([1]), draw(3, 2), scale=scale)
    with refuses(ShapeError, "token 3", 2):
        scaled_embedding(torch.tensor([3]), draw(3, 2))
    with refuses(ShapeError, "torch.float32"):
        scaled_embedding(torch.ones(2), draw(3, 2))
    with refuses(ShapeError, (3,)):
        scaled_embedding(torch.tensor([1]), draw(3))
