"""Decoding's kernels, in the interpreter: splits that hold tiles, parts of tiles and nothing."""

from __future__ import annotations

import pytest
import torch

from handbook_src.errors import KernelUnavailable, ShapeError
from handbook_src.functional.attention.flash_decode import paged_decode_attention
from handbook_src.kernels import flash_decode as kernels
from handbook_src.testing import refuses, relative_error

ALLOWED = {torch.float32: 1e-6, torch.bfloat16: 6e-3, torch.float16: 1e-3}
EVERY = {"window": 20, "soft_cap": 2.0, "alibi": True, "sinks": True}


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Tiles of 16 keys, and three splits even of a short sequence."""
    monkeypatch.setattr(kernels, "BLOCK", 16)
    monkeypatch.setattr(kernels, "splits_for", lambda *_: 3)


def drawn(lengths, h=4, g=2, e=16, c=16, size=5, dtype=torch.float32):
    """Pages that no sequence uses, and slots past a sequence's end, hold NaN."""
    blocks = max(1, -(-max(lengths) // size))
    table = torch.randperm(len(lengths) * blocks + 2)[: len(lengths) * blocks].view(len(lengths), blocks)
    pages = [torch.full((len(lengths) * blocks + 2, size, g, n), torch.nan) for n in (e, c)]
    for b, n in enumerate(lengths):
        for j in range(n):
            for x in pages:
                x[table[b, j // size], j % size] = torch.randn(g, x.shape[-1])
    return torch.randn(len(lengths), h, e).to(dtype), *(x.to(dtype) for x in pages), table, torch.tensor(lengths)


def agree(x, options):
    made = {"alibi": torch.rand(x[0].shape[1]), "sinks": torch.randn(x[0].shape[1])}
    options = {k: made.get(k, v) for k, v in options.items()}
    got = paged_decode_attention(*x, **options, return_lse=True, backend="triton")
    wide = [y.double() for y in x[:3]]
    want = paged_decode_attention(*wide, *x[3:], **options, return_lse=True, backend="reference")
    assert got[0].dtype == x[0].dtype
    assert relative_error(got[0], want[0]) <= ALLOWED[x[0].dtype]
    torch.testing.assert_close(got[1].double(), want[1], rtol=1e-5, atol=1e-5)


@pytest.mark.parity("flash-attention")
@pytest.mark.parametrize("dtype", ALLOWED, ids=str)
@pytest.mark.parametrize("options", [{}, EVERY], ids=str)
def test_every_option(options, dtype, guards):
    agree(drawn([50, 1, 17], dtype=dtype), options)


@pytest.mark.parity("flash-attention")
@pytest.mark.parametrize(("h", "g", "e", "c", "size"), [(1, 1, 3, 20, 1), (6, 2, 16, 16, 16), (17, 1, 16, 16, 7)])
def test_heads_widths_and_pages(h, g, e, c, size, guards):
    agree(drawn([15, 33], h, g, e, c, size), {})


@pytest.mark.parity("flash-attention")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("options", [{}, EVERY], ids=str)
def test_wide_heads_and_a_group_that_is_cut(options, dtype, guards):
    """Of 65 heads a tile holds 32 or 64; the last has one."""
    agree(drawn([17], 65, 1, 4, 3, dtype=dtype), options)
    agree(drawn([17], 2, 1, 256, 130, dtype=dtype), options)


@pytest.mark.law("flash-attention")
def test_a_sequence_without_keys(guards):
    x = drawn([0, 4])
    sinks = torch.randn(4)
    out, lse = paged_decode_attention(*x, return_lse=True, backend="triton")
    assert out[0].abs().max() == 0
    assert (lse[0] == -torch.inf).all()
    _, lse = paged_decode_attention(*x, sinks=sinks, return_lse=True, backend="triton")
    torch.testing.assert_close(lse[0], sinks)


@pytest.mark.law("flash-attention")
def test_the_splits_do_not_matter(monkeypatch):
    x, results = drawn([50, 3], dtype=torch.float32), []
    for splits in (1, 2, 5):
        monkeypatch.setattr(kernels, "splits_for", lambda *_, n=splits: n)
        results.append(paged_decode_attention(*x, backend="triton"))
    torch.testing.assert_close(results[1], results[0])
    torch.testing.assert_close(results[2], results[0])
    narrow = [y.int() for y in x[3:]]  # a table of int32, as servers keep it
    assert torch.equal(paged_decode_attention(*x[:3], *narrow, backend="triton"), results[2])


@pytest.mark.law("flash-attention")
def test_the_plan(monkeypatch):
    monkeypatch.undo()
    assert kernels.splits_for(131072, 8, 132) == 33
    assert kernels.splits_for(100, 1, 132) == 1
    assert kernels.splits_for(10**7, 1, 132) == 128
    assert kernels.plan(4, 128, torch.bfloat16) == (16, 64, 4)
    assert kernels.plan(71, 256, torch.float16) == (64, 32, 4)
    assert kernels.plan(71, 64, torch.float32) == (32, 32, 4)
    assert kernels.plan(1, 256, torch.float32) == (16, 16, 8)


@pytest.mark.registration("flash-attention")
def test_opcheck():
    q, k, v, table, lengths = drawn([3], h=1, g=1)
    k, v = k.nan_to_num(), v.nan_to_num()
    torch.library.opcheck(kernels._decode, (q, k, v, table, lengths, None, torch.zeros(1), 2, 0.0, 0.25))


@pytest.mark.refusal("flash-attention")
def test_what_the_kernel_cannot_do_is_refused(monkeypatch):
    q, k, v, table, lengths = drawn([3])
    with refuses(KernelUnavailable, "gradient", "no_grad"):
        kernels.paged_decode_triton(q.requires_grad_(), k, v, table, lengths)
    with refuses(ShapeError, "torch.float64"):
        kernels.paged_decode_triton(q.double(), k.double(), v.double(), table, lengths)
    monkeypatch.delenv("TRITON_INTERPRET")
    with refuses(KernelUnavailable, "cpu", "TRITON_INTERPRET"):
        kernels.paged_decode_triton(q, k, v, table, lengths)
