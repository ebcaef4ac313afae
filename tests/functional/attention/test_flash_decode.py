"""Decoding over pages: equal to attention over the same keys in a row, whatever pages they lie in."""

from __future__ import annotations

import pytest
import torch

from handbook_src.errors import ConfigError, KernelUnavailable, ShapeError
from handbook_src.functional.attention.attention import scaled_dot_product_attention
from handbook_src.functional.attention.flash_decode import paged_decode_attention
from handbook_src.layers.attention.paged_kv_cache import PagedCache, PagePool
from handbook_src.testing import assert_parity, refuses


def drawn(b=3, h=4, g=2, e=6, c=5, pages=9, size=4, dtype=torch.float64):
    table = torch.randperm(pages)[: b * 3].view(b, 3)
    return [torch.randn(s).to(dtype) for s in ((b, h, e), (pages, size, g, e), (pages, size, g, c))], table


@pytest.mark.parity("flash-attention")
def test_pages_are_keys_in_a_row():
    (q, k, v), table = drawn()
    lengths = torch.tensor([12, 1, 7])

    def in_a_row(q, k, v):
        rows = [
            scaled_dot_product_attention(
                q[i, None, None], *(x[table[i]].flatten(0, 1)[None, :n] for x in (k, v)), backend="reference"
            )
            for i, n in enumerate(lengths)
        ]
        return torch.cat(rows)[:, 0]

    assert_parity(lambda q, k, v: paged_decode_attention(q, k, v, table, lengths), in_a_row, [q, k, v])


@pytest.mark.law("flash-attention")
def test_it_reads_the_paged_cache():
    cache = PagedCache(PagePool(pages=8, page_size=4))
    k, v = torch.randn(2, 7, 2, 6), torch.randn(2, 7, 2, 6)
    q = torch.randn(2, 4, 6)
    cache.update(k, v)
    got = paged_decode_attention(q, cache.pool.k, cache.pool.v, torch.tensor(cache.table), torch.tensor([7, 7]))
    torch.testing.assert_close(got, scaled_dot_product_attention(q[:, None], k, v)[:, 0])


@pytest.mark.law("flash-attention")
def test_no_keys_and_no_sequences():
    (q, k, v), table = drawn()
    out, lse = paged_decode_attention(q, k, v, table, torch.tensor([0, 1, 2]), window=3, return_lse=True)
    assert out[0].abs().max() == 0
    assert (lse[0] == -torch.inf).all()
    none = torch.zeros(0, dtype=torch.long)
    assert paged_decode_attention(q[:0], k, v, table[:0], none).shape == (0, 4, 5)
    assert paged_decode_attention(q[:0], k, v, table[:0], none, return_lse=True)[1].shape == (0, 4)


@pytest.mark.law("flash-attention")
@pytest.mark.parametrize("option", ["window", "alibi"])
def test_an_empty_sequence_changes_nothing_for_those_behind_it(option):
    (q, k, v), table = drawn()
    given = {"window": 3} if option == "window" else {"alibi": torch.rand(4, dtype=q.dtype)}
    got = paged_decode_attention(q, k, v, table, torch.tensor([0, 11, 7]), **given)
    alone = paged_decode_attention(q[1:], k, v, table[1:], torch.tensor([11, 7]), **given)
    torch.testing.assert_close(got[1:], alone)
    assert not torch.allclose(alone, paged_decode_attention(q[1:], k, v, table[1:], torch.tensor([11, 7])))


@pytest.mark.refusal("flash-attention")
def test_what_does_not_fit_is_refused(monkeypatch):
    (q, k, v), table = drawn()
    lengths = torch.tensor([12, 1, 7])
    with refuses(ShapeError, "13 of sequence 1", "0 to 12"):
        paged_decode_attention(q, k, v, table, torch.tensor([12, 13, 1]))
    with refuses(ShapeError, "-1 of sequence 0"):
        paged_decode_attention(q, k, v, table, torch.tensor([-1, 3, 1]))
    with refuses(ShapeError, "block_table", "0 to 8"):
        paged_decode_attention(q, k, v, table + 9, lengths)
    for length in (12, 1, 7):  # the last page that is read, and the first that is not
        used, few = -(-length // 4), torch.full((3,), length)
        bad = table.clone()
        bad[:, used:] = 9
        want = paged_decode_attention(q, k, v, table, few)
        assert torch.equal(paged_decode_attention(q, k, v, bad, few), want)
        bad[1, used - 1] = -1
        with refuses(ShapeError, "block_table", "-1", "0 to 8"):
            paged_decode_attention(q, k, v, bad, few)
    with refuses(ShapeError, "block_table", "torch.float32"):
        paged_decode_attention(q, k, v, table.float(), lengths)
    with refuses(ShapeError, "lengths", "(2,)"):
        paged_decode_attention(q, k, v, table, lengths[:2])
    with refuses(ShapeError, "heads", "(3, 3, 6)"):
        paged_decode_attention(q[:, :3], k, v, table, lengths)
    with refuses(ShapeError, "(3, 1, 4, 6)"):
        paged_decode_attention(q[:, None], k, v, table, lengths)
    with refuses(ShapeError, "k_pages", "meta"):
        paged_decode_attention(q, k.to("meta"), v, table, lengths)
    with refuses(ShapeError, "torch.int64"):
        paged_decode_attention(q.long(), k.long(), v.long(), table, lengths)
    for name in ("alibi", "sinks"):
        with refuses(ShapeError, name, "(2,)", "(4,)"):
            paged_decode_attention(q, k, v, table, lengths, **{name: torch.ones(2)})
    with refuses(ConfigError, "window", 0):
        paged_decode_attention(q, k, v, table, lengths, window=0)
    with refuses(ConfigError, "soft_cap", -1.0):
        paged_decode_attention(q, k, v, table, lengths, soft_cap=-1.0)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with refuses(KernelUnavailable, "'triton'", "CUDA"):
        paged_decode_attention(*(x.float() for x in (q, k, v)), table, lengths, backend="triton")
