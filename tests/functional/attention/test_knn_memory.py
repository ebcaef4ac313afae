"""Attention to a memory's nearest keys against a literal search, faiss, and full attention."""

from __future__ import annotations

import math
import sys

import faiss
import pytest
import torch
from torch import Tensor

from handbook_src.errors import ConfigError, KernelUnavailable, ShapeError
from handbook_src.functional.attention.attention import scaled_dot_product_attention
from handbook_src.functional.attention.knn_memory import (
    attend_to_found,
    faiss_index,
    knn_attention,
    memory_gate,
    nearest_keys,
    normalize_heads,
)
from handbook_src.testing import assert_parity, refuses
from handbook_src.testing.checker import unchecked as without_checker

ID = "memorizing-transformer"
SIZES = [(1, 1, 1, 1, 1, 1), (2, 3, 7, 2, 5, 4), (3, 5, 16, 1, 3, 3), (1, 2, 9, 3, 4, 7)]  # b t s h e c


def draw(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def memory(b: int, t: int, s: int, h: int, e: int, c: int) -> tuple[Tensor, Tensor, Tensor]:
    return draw(b, t, h, e), draw(b, s, h, e), draw(b, s, h, c)


def literally(
    q: Tensor, keys: Tensor, values: Tensor, k: int, lengths: list[int] | None = None, scale: float | None = None
) -> Tensor:
    """Sort all stored keys by score, keep the first k, take their softmax: one query at a time."""
    keys, values = keys.detach(), values.detach()
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    out = []
    for b in range(q.shape[0]):
        n = keys.shape[1] if lengths is None else lengths[b]
        for t in range(q.shape[1]):
            for h in range(q.shape[2]):
                scores = [(q[b, t, h] * keys[b, s, h]).sum() for s in range(n)]
                best = sorted(range(n), key=lambda s: -scores[s].item())[:k]
                weights = [(scores[s] * scale).exp() for s in best]
                found = [w / sum(weights) * values[b, s, h] for w, s in zip(weights, best, strict=True)]
                out.append(sum(found) if found else 0 * values[b, :1, h].sum(0) + 0 * q[b, t, h].sum())
    return torch.stack(out).view(*q.shape[:3], -1)


@pytest.mark.parity(ID)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("k", [1, 3, 100])
@pytest.mark.parametrize("scale", [None, 2.5])
@pytest.mark.parametrize("index", [None, "Flat"])
def test_equals_the_literal_search(size: tuple[int, ...], k: int, scale: float | None, index: str | None) -> None:
    assert_parity(
        lambda *x: knn_attention(*x, k, scale=scale, index=index),
        lambda *x: literally(*x, k, scale=scale),
        memory(*size),
    )


@pytest.mark.parity(ID)
@pytest.mark.parametrize("index", [None, "Flat"])
def test_memories_of_unequal_length_and_empty_ones(index: str | None) -> None:
    lengths = [4, 0, 7]
    q, keys, values = memory(3, 2, 7, 2, 3, 4)
    assert_parity(
        lambda *x: knn_attention(*x, 5, lengths=torch.tensor(lengths), index=index),
        lambda *x: literally(*x, 5, lengths),
        [q, keys, values],
    )
    out = knn_attention(q, keys, values, 5, lengths=torch.tensor(lengths), index=index)
    assert out[1].abs().max() == 0


@pytest.mark.parity(ID)
@pytest.mark.parametrize("s", [48, 83, 200])
@pytest.mark.parametrize("lengths", [None, [40, 2]])
def test_long_memories_are_searched_by_groups(s: int, lengths: list[int] | None) -> None:
    q, keys, values = memory(2, 3, s, 2, 4, 5)
    among = None if lengths is None else torch.tensor(lengths)
    assert_parity(
        lambda *x: knn_attention(*x, 3, lengths=among), lambda *x: literally(*x, 3, lengths), [q, keys, values]
    )
    scores = torch.einsum("bthe,bshe->bths", q, keys)
    if lengths is None:
        assert torch.equal(nearest_keys(q, keys, 3), scores.topk(3).indices), "best first"
    else:
        found = nearest_keys(q, keys, 3, lengths=among)
        assert torch.equal(found[1, ..., :2], scores[1, ..., :2].topk(2).indices)
        assert (found[1, ..., 2] == -1).all()


@pytest.mark.law(ID)
def test_a_nan_elsewhere_changes_the_way_and_not_the_answer() -> None:
    inputs = memory(2, 3, 20, 2, 5, 4)
    broken = [torch.cat([x, torch.full_like(x[:, :1], math.nan)], 1) for x in inputs[1:]]
    assert_parity(
        lambda q: knn_attention(q, *broken, 3), lambda q: knn_attention(q, *inputs[1:], 3), [inputs[0].requires_grad_()]
    )
    one_by_one = torch.func.vmap(lambda q: knn_attention(q[None], *(x[:1] for x in inputs[1:]), 3)[0])
    torch.testing.assert_close(one_by_one(inputs[0])[0], knn_attention(*inputs, 3)[0])
    slope = torch.func.grad(lambda q: knn_attention(q, *inputs[1:], 3).sum())(inputs[0].detach())
    torch.testing.assert_close(slope, torch.autograd.grad(knn_attention(*inputs, 3).sum(), inputs[0])[0])


@pytest.mark.parity(ID)
def test_strided_inputs_and_inputs_left_alone() -> None:
    q, keys, values = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in memory(2, 3, 7, 2, 5, 4))
    before = [x.clone() for x in (q, keys, values)]
    torch.testing.assert_close(knn_attention(q, keys, values, 3), literally(q, keys, values, 3))
    for x, old in zip((q, keys, values), before, strict=True):
        assert torch.equal(x, old)


@pytest.mark.law(ID)
@pytest.mark.parametrize("k", [9, 64])
def test_all_neighbours_are_full_attention(k: int) -> None:
    assert_parity(
        lambda q, keys, values: knn_attention(q, keys, values, k),
        lambda q, keys, values: scaled_dot_product_attention(q, keys.detach(), values.detach(), backend="reference"),
        memory(2, 4, 9, 3, 5, 6),
    )


@pytest.mark.law(ID)
def test_no_gradient_reaches_the_memory() -> None:
    q, keys, values = (x.requires_grad_() for x in memory(2, 3, 7, 2, 5, 4))
    knn_attention(q, keys, values, 3).sum().backward()
    assert keys.grad is None
    assert values.grad is None
    assert q.grad is not None
    assert q.grad.abs().max() > 0
    assert torch.autograd.gradgradcheck(lambda x: knn_attention(x, keys, values, 3), [q])


@pytest.mark.law(ID)
@pytest.mark.parametrize("index", [None, "Flat"])
def test_samples_and_heads_keep_to_their_own_memory(index: str | None) -> None:
    q, keys, values = memory(2, 3, 7, 2, 5, 4)
    before = knn_attention(q, keys, values, 3, index=index)
    keys[1], values[1] = 9.0, -9.0
    torch.testing.assert_close(knn_attention(q, keys, values, 3, index=index)[0], before[0], rtol=0, atol=0)
    keys, values = keys.clone(), values.clone()
    keys[0, :, 1] = 5.0
    torch.testing.assert_close(knn_attention(q, keys, values, 3, index=index)[0, :, 0], before[0, :, 0], rtol=0, atol=0)


@pytest.mark.law(ID)
def test_the_order_of_the_memory_does_not_matter() -> None:
    q, keys, values = memory(2, 3, 7, 2, 5, 4)
    order = torch.randperm(7)
    out = knn_attention(q, keys[:, order], values[:, order], 3)
    torch.testing.assert_close(out, knn_attention(q, keys, values, 3))


@pytest.mark.law(ID)
@pytest.mark.parametrize("index", [None, "Flat"])
def test_nothing_leaks_from_rows_that_hold_no_key_or_a_broken_one(index: str | None) -> None:
    q, keys, values = memory(2, 3, 7, 2, 5, 4)
    want = knn_attention(q[:, :, :], keys[:, :4], values[:, :4], 3)
    keys[:, 4:], values[:, 4:] = math.nan, math.inf
    q.requires_grad_()
    out = knn_attention(q, keys, values, 3, lengths=torch.tensor([4, 4]), index=index)
    torch.testing.assert_close(out, want)
    out.sum().backward()
    assert q.grad is not None
    assert q.grad.isfinite().all()
    found = nearest_keys(q, keys, 7, index=index)  # the broken rows count as stored, and are not found
    assert found.max() == 3
    assert (found == -1).sum(-1).eq(3).all()
    torch.testing.assert_close(knn_attention(q, keys, values, 3, index=index), want)


@pytest.mark.law(ID)
def test_found_is_best_first_and_padded() -> None:
    q, keys, _ = memory(2, 3, 4, 2, 5, 1)
    found = nearest_keys(q, keys, 6)
    scores = torch.einsum("bthe,bshe->bths", q, keys).gather(-1, found[..., :4])
    assert (scores.diff(dim=-1) <= 0).all()
    assert (found[..., 4:] == -1).all()


@pytest.mark.outside(ID)
@pytest.mark.parametrize("factory", ["Flat", "HNSW32", "IVF1,Flat"])
def test_faiss_finds_what_torch_finds(factory: str) -> None:
    q, keys, _ = (x.float() for x in memory(2, 5, 50, 2, 8, 1))
    exact, approximate = nearest_keys(q, keys, 4), nearest_keys(q, keys, 4, index=factory)
    share = (exact == approximate).double().mean()
    assert share == 1 if factory != "HNSW32" else share > 0.95
    index = faiss.IndexFlatIP(8)
    index.add(keys[1, :, 0].contiguous().numpy())
    theirs = index.search(q[1, :, 0].contiguous().numpy(), 4)[1]
    assert (exact[1, :, 0].numpy() == theirs).all()


@pytest.mark.parity(ID)
def test_gate_is_the_equation() -> None:
    local, retrieved, bias = draw(2, 3, 4, 5), draw(2, 3, 4, 5), draw(4)

    def by_hand(c: Tensor, m: Tensor, b: Tensor) -> Tensor:
        g = [1 / (1 + (-b[i]).exp()) for i in range(4)]
        return torch.stack([g[i] * m[:, :, i] + (1 - g[i]) * c[:, :, i] for i in range(4)], 2)

    assert_parity(memory_gate, by_hand, [local, retrieved, bias])
    present = torch.tensor([True, False])
    out = memory_gate(local, retrieved, bias, present)
    torch.testing.assert_close(out[0], by_hand(local, retrieved, bias)[0])
    assert torch.equal(out[1], local[1])


@pytest.mark.law(ID)
def test_the_gates_limits() -> None:
    local, retrieved = draw(2, 3, 1, 5), draw(2, 3, 1, 5)
    for bias, want in ((-800.0, local), (800.0, retrieved)):
        torch.testing.assert_close(memory_gate(local, retrieved, torch.tensor([bias]).double()), want)


@pytest.mark.parity(ID)
def test_unit_heads() -> None:
    def by_hand(x: Tensor) -> Tensor:
        return x / x.square().sum(-1, keepdim=True).sqrt()

    assert_parity(normalize_heads, by_hand, [draw(2, 3, 2, 5)])
    assert torch.equal(normalize_heads(torch.zeros(1, 1, 1, 3)), torch.zeros(1, 1, 1, 3))
    small = torch.full((1, 1, 1, 64), 300.0, dtype=torch.float16)  # its squares overflow half precision
    torch.testing.assert_close(normalize_heads(small).float().norm(), torch.tensor(1.0), rtol=1e-3, atol=0)


@pytest.mark.registration(ID)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_rounds_once(dtype: torch.dtype) -> None:
    q, keys, values = (x.to(dtype) for x in memory(2, 3, 7, 2, 5, 4))
    low = knn_attention(q, keys, values, 3)
    assert low.dtype == dtype
    torch.testing.assert_close(low, knn_attention(q.float(), keys.float(), values.float(), 3).to(dtype))


@pytest.mark.registration(ID)
def test_compiles_without_a_graph_break(unchecked: None) -> None:
    q, keys, values = memory(2, 3, 7, 2, 5, 4)
    run = torch.compile(lambda *x: knn_attention(*x, 3), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(run(q, keys, values), knn_attention(q, keys, values, 3))


@pytest.mark.registration(ID)
@pytest.mark.parametrize("size", [(0, 3, 7, 2, 5, 4), (2, 0, 7, 2, 5, 4), (2, 3, 0, 2, 5, 4)])
@pytest.mark.parametrize("index", [None, "Flat"])
def test_empty_batch_sequence_and_memory(size: tuple[int, ...], index: str | None) -> None:
    q, keys, values = memory(*size)
    out = knn_attention(q.requires_grad_(), keys, values, 3, index=index)
    assert out.shape == (*size[:2], 2, 4)
    assert not out.any()
    out.sum().backward()
    assert q.grad is not None
    assert not q.grad.any()


@pytest.mark.registration(ID)
def test_meta_tensors_have_the_right_shape() -> None:
    q, keys, values = (x.to("meta") for x in memory(2, 3, 7, 2, 5, 4))
    assert knn_attention(q, keys, values, 3).shape == (2, 3, 2, 4)


@pytest.mark.refusal(ID)
def test_refusals_of_sizes_and_numbers() -> None:
    q, keys, values = memory(2, 3, 7, 2, 5, 4)
    for k in (0, -1, 1.5, True, math.nan):
        with refuses(ConfigError, "knn_attention k", k):
            knn_attention(q, keys, values, k)
    for scale in (0.0, -1.0, math.nan, math.inf, True):
        with refuses(ConfigError, "scale", scale):
            knn_attention(q, keys, values, 3, scale=scale)
    for factory in ("Nonsense", "", 3):
        with refuses(ConfigError, "index", factory):
            knn_attention(q, keys, values, 3, index=factory)
    with refuses(ConfigError, "7 vectors", "each cell"):
        knn_attention(q, keys, values, 3, index="IVF64,Flat")


@pytest.mark.parity(ID)
def test_values_without_features_give_outputs_without() -> None:
    q, keys, values = memory(2, 3, 7, 2, 5, 4)
    assert knn_attention(q, keys, values[..., :0], 3).shape == (*q.shape[:3], 0)


@pytest.mark.refusal(ID)
def test_refusals_of_tensors() -> None:
    q, keys, values = memory(2, 3, 7, 2, 5, 4)
    wrong = [
        (q[0], keys, values), (q, keys[:1], values[:1]), (q, keys[..., :4], values), (q, keys, values[:, :6]),
        (q[:, :, :1], keys, values), (q[..., :0], keys[..., :0], values),
    ]  # fmt: skip
    for inputs in wrong:
        with refuses(ShapeError, tuple(inputs[0].shape), tuple(inputs[1].shape)):
            knn_attention(*inputs, 3)
    with refuses(ShapeError, "int64"):
        knn_attention(q.long(), keys, values, 3)
    with refuses(ShapeError, "float32"):
        knn_attention(q.float(), keys, values, 3)
    with refuses(ShapeError, "meta"):
        knn_attention(q, keys.to("meta"), values.to("meta"), 3)
    for lengths in (torch.tensor([1, 2, 3]), torch.tensor([1.0, 2.0]), torch.tensor([True, False])):
        with refuses(ShapeError, "memory lengths", tuple(lengths.shape)):
            knn_attention(q, keys, values, 3, lengths=lengths)
    with refuses(ShapeError, "memory_gate", "(3,)"):
        memory_gate(values, values, torch.zeros(3).double())
    with refuses(ShapeError, "memory_gate", "(2, 3, 2, 5)"):
        memory_gate(q, values, torch.zeros(2).double())
    with refuses(ShapeError, "attend_to_found"), without_checker():
        attend_to_found(q, keys, values[:1], torch.zeros(2, 3, 2, 1, dtype=torch.long))


@pytest.mark.refusal(ID)
def test_a_missing_faiss_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "faiss", None)
    q, keys, values = memory(2, 3, 7, 2, 5, 4)
    with refuses(KernelUnavailable, "pip install faiss-cpu"):
        knn_attention(q, keys, values, 3, index="Flat")
    with refuses(KernelUnavailable, "pip install faiss-cpu"):
        faiss_index("here", "Flat", 3, "l2")
    assert knn_attention(q, keys, values, 3).shape == (2, 3, 2, 4)


@pytest.mark.refusal(ID)
def test_what_was_found_must_fit() -> None:
    q, keys = torch.randn(2, 5, 4, 3), torch.randn(2, 7, 4, 3)
    with refuses(ShapeError, "(2, 5, 3, 2)", "(2, 5, 4, 'k')"):
        attend_to_found(q, keys, keys, torch.zeros(2, 5, 3, 2, dtype=torch.int64))
    with refuses(ShapeError, "torch.float32"):
        attend_to_found(q, keys, keys, torch.zeros(2, 5, 4, 2))
    with refuses(ShapeError, "the largest 7", "below 7"):
        attend_to_found(q, keys, keys, torch.full((2, 5, 4, 2), 7))
    with refuses(ConfigError, "list"):
        knn_attention(q, keys, keys, 3, lengths=[1, 2])
    with refuses(ShapeError, "meta", "cpu"):
        knn_attention(q, keys.to("meta"), keys, 3)
    with refuses(ShapeError, "(3,)", "(2,) booleans"):
        memory_gate(q, q, torch.zeros(4), torch.ones(3, dtype=torch.bool))
    with refuses(ShapeError, "torch.float32"):
        memory_gate(q, q, torch.zeros(4), torch.ones(2))
    with refuses(ShapeError, "torch.int64"):
        normalize_heads(torch.ones(1, 1, 1, 3, dtype=torch.int64))


@pytest.mark.law(ID)
def test_far_more_neighbours_than_keys_cost_no_more_than_all() -> None:
    q, keys = torch.randn(2, 5, 4, 3), torch.randn(2, 7, 4, 3)
    torch.testing.assert_close(knn_attention(q, keys, keys, 10**9), knn_attention(q, keys, keys, 7))
