"""Memorizing attention against a literal reading of the paper, and the laws of its memory."""

from __future__ import annotations

import copy
import io
import math
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from handbook_src.errors import ConfigError, KernelUnavailable, ShapeError
from handbook_src.functional.attention.mask import padding, window
from handbook_src.layers.attention.memorizing import KNNMemory, MemorizingAttention
from handbook_src.testing import assert_batch_independent, assert_causal, assert_parity, refuses

ID = "memorizing-transformer"


def double(dim: int = 12, heads: int = 3, **options: int | bool) -> MemorizingAttention:
    layer = MemorizingAttention(dim, heads, **options).double()
    with torch.no_grad():
        for p in (layer.gate_bias, layer.log_scale, *(p.bias for p in projections(layer) if p.bias is not None)):
            p.add_(torch.randn_like(p) * 0.3)
    return layer


def projections(layer: MemorizingAttention) -> list[torch.nn.Linear]:
    return [layer.q_proj, layer.k_proj, layer.v_proj, layer.out_proj]


def segments(layer: MemorizingAttention, x: Tensor, cuts: list[int], size: int = 100, **options: str) -> Tensor:
    memory = KNNMemory(size, **options)
    return torch.cat([layer(part, memory) for part in x.split(cuts, 1)], 1)


def by_the_paper(layer: MemorizingAttention, x: Tensor, cuts: list[int], size: int, added: Tensor | None) -> Tensor:
    """Token by token and head by head; the memory is a Python list."""
    e = layer.dim // layer.heads
    weights = [(p.weight, 0 if p.bias is None else p.bias) for p in projections(layer)]
    (wq, bq), (wk, bk), (wv, bv), (wo, bo) = weights
    samples = []
    for sample in x:
        stored: list[tuple[Tensor, Tensor]] = []
        rows = []
        for part in sample.split(cuts):
            q, k, v = (part @ w.T + b for w, b in ((wq, bq), (wk, bk), (wv, bv)))
            for t in range(len(part)):
                heads = []
                for h in range(layer.heads):
                    at = slice(h * e, (h + 1) * e)
                    unit = q[t, at] / q[t, at].norm() * layer.log_scale[h].exp()
                    here = [(k[s, at] / k[s, at].norm(), v[s, at]) for s in range(t + 1)]
                    bias = torch.zeros(t + 1) if added is None else added[h, t, : t + 1]
                    local = attended(unit, here, bias)
                    past = [(k_[at] / k_[at].norm(), v_[at]) for k_, v_ in stored]
                    past = sorted(past, key=lambda kv: -float(unit.detach() @ kv[0]))[: layer.k]
                    g = torch.sigmoid(layer.gate_bias[h])
                    heads.append(g * attended(unit, past, None) + (1 - g) * local if past else local)
                rows.append(torch.cat(heads) @ wo.T + bo)
            stored = (stored + [(a.detach(), b.detach()) for a, b in zip(k, v, strict=True)])[-size:]
        samples.append(torch.stack(rows))
    return torch.stack(samples)


def attended(q: Tensor, pairs: list[tuple[Tensor, Tensor]], bias: Tensor | None) -> Tensor:
    scores = torch.stack([q @ k for k, _ in pairs])
    weights = (scores if bias is None else scores + bias).softmax(0)
    return sum(w * v for w, (_, v) in zip(weights, pairs, strict=True))


@pytest.mark.parity(ID)
@pytest.mark.parametrize(("size", "k"), [(100, 3), (5, 2), (4, 50), (1, 1)])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("index", [None, "Flat"])
def test_equals_the_paper_token_by_token(size: int, k: int, bias: bool, index: str | None) -> None:
    layer = double(k=k, bias=bias)
    cuts = [3, 1, 7, 2]  # one segment is longer than the smaller memories
    twin = copy.deepcopy(layer)
    pairs = list(zip(layer.parameters(), twin.parameters(), strict=True))
    assert_parity(
        lambda x: segments(layer, x, cuts, size, index=index),
        lambda x: by_the_paper(twin, x, cuts, size, None),
        [torch.randn(2, 13, 12)],
        parameters=pairs,
    )


@pytest.mark.parity(ID)
def test_a_bias_on_the_local_scores_only() -> None:
    layer, added = double(k=2), torch.randn(3, 4, 4, dtype=torch.float64)
    memory = KNNMemory(100)
    x = torch.randn(2, 8, 12, dtype=torch.float64)
    ours = torch.cat([layer(part, memory, added[None]) for part in x.split(4, 1)], 1)
    torch.testing.assert_close(ours, by_the_paper(layer, x, [4, 4], 100, added))
    hidden = torch.zeros(3, 4, 4, dtype=torch.float64).masked_fill(~window(2).dense(4), -math.inf)
    torch.testing.assert_close(layer(x[:, :4], mask=window(2)), by_the_paper(layer, x[:, :4], [4], 100, hidden))


@pytest.mark.law(ID)
def test_causal_across_segments() -> None:
    layer = double(k=4)
    assert_causal(lambda x: segments(layer, x, [3, 3, 3]), torch.randn(2, 9, 12).double())


@pytest.mark.law(ID)
def test_samples_never_see_each_others_memory() -> None:
    layer = double(k=4)
    assert_batch_independent(lambda x: segments(layer, x, [3, 3, 3]), torch.randn(3, 9, 12).double())


@pytest.mark.law(ID)
def test_no_gradient_reaches_an_earlier_segment() -> None:
    layer, memory = double(), KNNMemory(100)
    first, second = (torch.randn(1, 4, 12, dtype=torch.float64, requires_grad=True) for _ in range(2))
    layer(first, memory)
    layer(second, memory).sum().backward()
    assert first.grad is None
    assert second.grad is not None


@pytest.mark.law(ID)
def test_the_gates_limits_are_local_attention_and_the_memory() -> None:
    layer, x = double(k=100), torch.randn(2, 8, 12).double()
    first, second = x.split(4, 1)
    with torch.no_grad():
        layer.gate_bias.fill_(-800.0)
    torch.testing.assert_close(segments(layer, x, [4, 4])[:, 4:], layer(second))
    with torch.no_grad():
        layer.gate_bias.fill_(800.0)
    q, k, v = (p(y).unflatten(-1, (3, 4)) for p, y in zip(projections(layer), (second, first, first), strict=False))
    q, k = F.normalize(q, dim=-1) * layer.log_scale.exp()[:, None], F.normalize(k, dim=-1)
    full = F.scaled_dot_product_attention(*(y.transpose(1, 2) for y in (q, k, v)), scale=1.0)
    want = layer.out_proj(full.transpose(1, 2).flatten(2))
    torch.testing.assert_close(segments(layer, x, [4, 4])[:, 4:], want)


@pytest.mark.law(ID)
def test_an_empty_memory_changes_nothing_and_is_filled() -> None:
    layer, x, memory = double(), torch.randn(2, 5, 12).double(), KNNMemory(3)
    torch.testing.assert_close(layer(x, memory), layer(x), rtol=0, atol=0)
    assert memory.lengths.tolist() == [3, 3]
    assert memory.bytes == 2 * 2 * 3 * 12 * 8
    memory.clear(torch.tensor([True, False]))
    assert memory.lengths.tolist() == [0, 3]
    after = layer(x, memory)
    torch.testing.assert_close(after[0], layer(x)[0])
    assert not torch.allclose(after[1], layer(x)[1])
    memory.clear()
    torch.testing.assert_close(layer(x, memory), layer(x))
    memory.reset()
    assert memory.bytes == 0
    assert layer(x[:1], memory).shape == (1, 5, 12)


@pytest.mark.law(ID)
@pytest.mark.parametrize("cuts", [[1] * 12, [5, 7], [12]])
def test_the_oldest_make_room(cuts: list[int]) -> None:
    memory, k, v = KNNMemory(5), torch.randn(2, 12, 3, 4), torch.randn(2, 12, 3, 4)
    for a, b in zip(k.split(cuts, 1), v.split(cuts, 1), strict=True):
        memory.add(a, b)
    q = torch.randn(2, 3, 3, 4)
    last = KNNMemory(5)
    last.add(k[:, -5:], v[:, -5:])
    torch.testing.assert_close(memory.attend(q, 3), last.attend(q, 3))


@pytest.mark.law(ID)
def test_scaled_keys_do_not_matter() -> None:
    """Queries and keys have length one: a memory of keys ten times as long is the same memory."""
    layer, x = double(k=3, bias=False), torch.randn(2, 8, 12).double()
    before = segments(layer, x, [4, 4])
    with torch.no_grad():
        layer.k_proj.weight.mul_(10.0)
        layer.q_proj.weight.mul_(0.1)
    torch.testing.assert_close(segments(layer, x, [4, 4]), before)


@pytest.mark.registration(ID)
def test_state_dict_copies_and_low_precision() -> None:
    layer, other, x = MemorizingAttention(8, 2), MemorizingAttention(8, 2), torch.randn(2, 6, 8)
    file = io.BytesIO()
    torch.save(layer.state_dict(), file)
    file.seek(0)
    other.load_state_dict(torch.load(file))
    want = segments(layer, x, [3, 3])
    for twin in (other, copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        torch.testing.assert_close(segments(twin, x, [3, 3]), want, rtol=0, atol=0)
    for dtype in (torch.bfloat16, torch.float16):
        low = segments(copy.deepcopy(layer).to(dtype), x.to(dtype), [3, 3])
        assert low.dtype == dtype
        torch.testing.assert_close(low.float(), want, rtol=0.1, atol=0.1)
    assert "heads=2, k=32" in repr(layer)
    memory = KNNMemory(9)
    layer(x, memory)
    again = pickle.loads(pickle.dumps(memory))
    torch.testing.assert_close(layer(x, copy.deepcopy(memory)), layer(x, again), rtol=0, atol=0)


@pytest.mark.registration(ID)
def test_autocast_meta_device_and_dtype() -> None:
    layer, x = MemorizingAttention(8, 2), torch.randn(2, 6, 8)
    memory = KNNMemory(9)
    with torch.autocast("cpu", torch.bfloat16):
        for _ in range(2):
            out = layer(x, memory)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), segments(layer, torch.cat([x, x], 1), [6, 6])[:, 6:], rtol=0.1, atol=0.1)
    empty = MemorizingAttention(8, 2, device="meta", dtype=torch.float64)
    assert {(p.device.type, p.dtype) for p in empty.parameters()} == {("meta", torch.float64)}
    assert empty.to_empty(device="cpu").reset_parameters() is None


@pytest.mark.registration(ID)
def test_compiles_without_a_graph_break(unchecked: None) -> None:
    layer, x = MemorizingAttention(8, 2), torch.randn(2, 5, 8)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), layer(x))
    added = torch.randn(1, 2, 5, 5)
    torch.testing.assert_close(compiled(x, mask=added), layer(x, mask=added))


@pytest.mark.registration(ID)
def test_gates_and_initial_values() -> None:
    layer = MemorizingAttention(8, 2, scale=20.0)
    assert layer.gates().tolist() == [0.5, 0.5]
    assert not layer.gates().requires_grad
    torch.testing.assert_close(layer.log_scale.exp(), torch.full((2,), 20.0))


@pytest.mark.registration(ID)
@pytest.mark.parametrize("shape", [(0, 3, 8), (2, 0, 8)])
def test_empty_batch_and_segment(shape: tuple[int, ...]) -> None:
    layer, memory = MemorizingAttention(8, 2), KNNMemory(4)
    for _ in range(2):
        assert layer(torch.randn(*shape), memory).shape == shape
    if shape[0]:
        assert layer(torch.randn(2, 3, 8), memory).isfinite().all()


@pytest.mark.refusal(ID)
def test_refusals_of_the_layer() -> None:
    for name in ("dim", "heads", "k"):
        for value in (0, -1, 1.5, True):
            with refuses(ConfigError, f"MemorizingAttention {name}", value):
                MemorizingAttention(**{"dim": 8, "heads": 2, "k": 3, name: value})
    with refuses(ConfigError, "3 for dim 8"):
        MemorizingAttention(8, 3)
    for scale in (0.0, -1.0, math.nan):
        with refuses(ConfigError, "scale", scale):
            MemorizingAttention(8, 2, scale=scale)
    with refuses(ConfigError, "torch.int64"):
        MemorizingAttention(8, 2, dtype=torch.int64)
    layer = MemorizingAttention(8, 2)
    for shape in ((3, 8), (1, 2, 3, 8), (2, 3, 7)):
        with refuses(ShapeError, "MemorizingAttention", shape):
            layer(torch.randn(*shape))
    with refuses(ShapeError, "attention mask", "(4, 4)"):
        layer(torch.randn(2, 3, 8), mask=torch.ones(4, 4, dtype=torch.bool))


@pytest.mark.refusal(ID)
def test_refusals_of_the_memory() -> None:
    for size in (0, -1, 2.0, True):
        with refuses(ConfigError, "KNNMemory size", size):
            KNNMemory(size)
    layer, memory = MemorizingAttention(8, 2), KNNMemory(4)
    layer(torch.randn(2, 3, 8), memory)
    with refuses(ShapeError, "(3, 2, 4", "reset()"):
        layer(torch.randn(3, 3, 8), memory)
    with refuses(ShapeError, "torch.float64", "reset()"):
        copy.deepcopy(layer).double()(torch.randn(2, 3, 8).double(), memory)
    with refuses(ShapeError, "meta", "reset()"):
        memory.add(torch.empty(2, 3, 2, 4, device="meta"), torch.empty(2, 3, 2, 4, device="meta"))
    with refuses(ShapeError, "(2, 3, 2, 4)", "(2, 3, 2, 5)"):
        memory.add(torch.randn(2, 3, 2, 4), torch.randn(2, 3, 2, 5))
    with refuses(ShapeError, "int64"):
        memory.add(torch.zeros(2, 3, 2, 4, dtype=torch.long), torch.zeros(2, 3, 2, 4, dtype=torch.long))
    for which in (torch.tensor([True]), torch.tensor([0, 1]), torch.ones(2, 2, dtype=torch.bool)):
        with refuses(ShapeError, "KNNMemory.clear", tuple(which.shape)):
            memory.clear(which)
    with refuses(ConfigError, "KNNMemory.attend k", 0):
        memory.attend(torch.randn(2, 3, 2, 4), 0)
    assert memory.lengths.tolist() == [3, 3]  # refusals leave it as it was


@pytest.mark.refusal(ID)
def test_a_missing_faiss_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "faiss", None)
    layer, memory, x = MemorizingAttention(8, 2), KNNMemory(4, index="Flat"), torch.randn(2, 3, 8)
    layer(x, memory)
    with refuses(KernelUnavailable, "pip install faiss-cpu"):
        layer(x, memory)


@pytest.mark.law(ID)
def test_a_memory_filled_in_inference_mode_serves_training() -> None:
    layer, plain, x = MemorizingAttention(8, 2, k=2), MemorizingAttention(8, 2, k=2), torch.randn(2, 3, 8)
    plain.load_state_dict(layer.state_dict())
    memory, usual = KNNMemory(4), KNNMemory(4)
    with torch.inference_mode():
        layer(x, memory)
        memory.clear(torch.tensor([True, False]))
    with torch.no_grad():
        plain(x, usual)
        usual.clear(torch.tensor([True, False]))
    for _ in range(2):
        layer(x, memory).sum().backward()
        plain(x, usual).sum().backward()
        for a, b in zip(layer.parameters(), plain.parameters(), strict=True):
            torch.testing.assert_close(a.grad, b.grad)


@pytest.mark.refusal(ID)
def test_an_index_that_is_no_string_and_queries_before_the_first_key() -> None:
    for bad in (5, True):
        with refuses(ConfigError, bad):
            KNNMemory(4, index=bad)
    with refuses(ShapeError, "torch.int64"):
        KNNMemory(4).attend(torch.ones(1, 1, 1, 2, dtype=torch.int64), 2)


@pytest.mark.law("memorizing-transformer")
@pytest.mark.parametrize("size", [20, 4])
@pytest.mark.parametrize("form", ["rule", "boolean", "added"])
def test_padding_is_not_remembered(size: int, form: str) -> None:
    layer, x, counts = MemorizingAttention(8, 2, k=3), torch.randn(2, 6, 8), torch.tensor([6, 3])
    mask = padding(counts)
    if form != "rule":
        mask = mask.dense(6)
        mask = mask if form == "boolean" else torch.zeros(2, 1, 6, 6).masked_fill(~mask, -torch.inf)
    memory, alone = KNNMemory(size), KNNMemory(size)
    layer(x, memory, mask), layer(x[1:, :3], alone)
    assert memory.lengths.tolist() == [min(6, size), 3]
    later = torch.randn(2, 4, 8)
    torch.testing.assert_close(layer(later, memory)[1:], layer(later[1:], alone))
    torch.testing.assert_close(layer(later, memory)[1:], layer(later[1:], alone))  # and what stands where goes on


@pytest.mark.refusal("memorizing-transformer")
def test_what_marks_no_tokens_is_refused() -> None:
    k = torch.randn(2, 3, 2, 4)
    for wrong in (torch.ones(2, 4) > 0, torch.ones(2, 3), torch.ones(3) > 0):
        with refuses(ShapeError, "KNNMemory.add real", tuple(wrong.shape), wrong.dtype):
            KNNMemory(4).add(k, k, wrong)
    memory = KNNMemory(4)
    memory.add(k, k, torch.zeros(2, 3) > 0)
    assert memory.lengths.tolist() == [0, 0]
    memory.add(k[:, :0], k[:, :0], torch.zeros(2, 0) > 0)
