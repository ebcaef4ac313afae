"""Linear attention: its three forms against loops over the paper's equations and against fla's."""

from __future__ import annotations

import importlib.util
import math
from pathlib import Path
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from handbook_src.errors import ConfigError, ShapeError
from handbook_src.functional.attention.attention import scaled_dot_product_attention
from handbook_src.functional.attention.linear_attention import (
    LinearState,
    elu_features,
    kernel_attention,
    linear_attention,
    linear_attention_state,
    linear_attention_step,
)
from handbook_src.functional.attention.mask import Mask, causal, full, left_padding, padding, per_head, sinks, window
from handbook_src.testing import assert_batch_independent, assert_causal, assert_parity, refuses

LINEAR = "linear-attention"
FORMS = pytest.mark.parametrize("form", ["parallel", "recurrent", "chunked", "auto"])
BOTH_WAYS = pytest.mark.parametrize("is_causal", [False, True])
LENGTHS = torch.tensor([4, 1])


def qkv(b: int = 2, t: int = 5, s: int = 5, h: int = 4, g: int = 4, e: int = 6, c: int = 3) -> list[Tensor]:
    sizes = ((b, t, h, e), (b, s, g, e), (b, s, g, c))
    return [torch.randn(size, dtype=torch.float64) for size in sizes]


def literally(q: Tensor, k: Tensor, v: Tensor, seen: Tensor | None = None, phi: str = "elu", divide: bool = True):
    """Equation 4 with its sums written out: the weight of each visible key, then the mean."""
    feature = {"elu": lambda x: F.elu(x) + 1, "relu": torch.relu, "square": torch.square}[phi]
    k, v = (x.repeat_interleave(q.shape[2] // k.shape[2], 2) for x in (k, v))
    weights = (feature(q)[:, :, None] * feature(k)[:, None]).sum(-1)  # b t s h
    if seen is not None:
        weights = weights * seen.movedim(1, -1)
    out = (weights[..., None] * v[:, None]).sum(2)
    total = weights.sum(2)[..., None]
    return torch.where(total == 0, 0.0, out / torch.where(total == 0, 1.0, total)) if divide else out


def visible(t: int, s: int, is_causal: bool, mask: Mask | None = None) -> Tensor:
    rule = full if mask is None else mask
    rule = causal & rule if is_causal else rule
    seen = rule.dense(t, s)
    return seen if seen.ndim == 4 else seen[None, None]


@pytest.mark.parity(LINEAR)
@FORMS
@BOTH_WAYS
@pytest.mark.parametrize(
    "sizes",
    [
        {"b": 1, "t": 1, "s": 1, "h": 1, "g": 1, "e": 1, "c": 1},
        {"t": 7, "s": 7},
        {"t": 3, "s": 8, "g": 2, "e": 5, "c": 9},
        {"t": 13, "s": 13, "h": 6, "g": 1, "e": 3, "c": 2},
        {"b": 0},
        {"t": 0},
        {"t": 0, "s": 0},
    ],
    ids=str,
)
def test_every_form_is_the_equation(form: str, is_causal: bool, sizes: dict[str, int]) -> None:
    inputs = qkv(**sizes)
    seen = visible(inputs[0].shape[1], inputs[1].shape[1], is_causal)
    assert_parity(
        lambda q, k, v: linear_attention(q, k, v, causal=is_causal, form=form, chunk=4),
        lambda q, k, v: literally(q, k, v, seen),
        inputs,
    )


@pytest.mark.parity(LINEAR)
@FORMS
@BOTH_WAYS
@pytest.mark.parametrize("feature_map", ["elu", "relu", "square"])
@pytest.mark.parametrize("normalize", [True, False])
def test_every_feature_map(form: str, is_causal: bool, feature_map: str, normalize: bool) -> None:
    chosen = torch.square if feature_map == "square" else feature_map

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return linear_attention(q, k, v, feature_map=chosen, causal=is_causal, form=form, normalize=normalize, chunk=3)

    seen = visible(9, 9, is_causal)
    assert_parity(run, lambda q, k, v: literally(q, k, v, seen, feature_map, normalize), qkv(t=9, s=9, g=2))


@pytest.mark.parity(LINEAR)
@FORMS
@BOTH_WAYS
@pytest.mark.parametrize("mask", [padding(LENGTHS), left_padding(LENGTHS), sinks(2), None], ids=str)
def test_masks_of_keys(form: str, is_causal: bool, mask: Mask | None) -> None:
    seen = visible(5, 5, is_causal, mask)
    masks = [mask] if mask is None else [mask, mask.dense(1, 5)]  # as a rule and as a tensor
    for given in masks:
        assert_parity(
            lambda q, k, v: linear_attention(q, k, v, given, causal=is_causal, form=form, chunk=2),  # noqa: B023
            lambda q, k, v: literally(q, k, v, seen),
            qkv(),
        )


@pytest.mark.parity(LINEAR)
@pytest.mark.parametrize("chunk", [1, 2, 7, 16, 64])
def test_every_chunk_size(chunk: int) -> None:
    assert_parity(
        lambda q, k, v: linear_attention(q, k, v, causal=True, form="chunked", chunk=chunk),
        lambda q, k, v: literally(q, k, v, visible(17, 17, True)),
        qkv(t=17, s=17, h=2, g=1),
    )


def naive() -> ModuleType:
    """The published library's readable file, without its package, which wants a GPU."""
    folder = Path(importlib.util.find_spec("fla").submodule_search_locations[0])  # type: ignore[union-attr,index,arg-type]
    spec = importlib.util.spec_from_file_location("fla_naive_linear", folder / "ops" / "linear_attn" / "naive.py")
    module = importlib.util.module_from_spec(spec)  # type: ignore[arg-type]
    spec.loader.exec_module(module)  # type: ignore[union-attr]
    return module


@pytest.mark.outside(LINEAR)
@pytest.mark.parametrize("normalize", [True, False])
def test_against_flas_chunks(normalize: bool) -> None:
    def theirs(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return naive().naive_chunk_linear_attn(F.elu(q) + 1, F.elu(k) + 1, v, scale=1.0, normalize=normalize)

    assert_parity(
        lambda q, k, v: linear_attention(q, k, v, causal=True, normalize=normalize),
        theirs,
        qkv(t=128, s=128, h=2, g=2),
        atol=1e-9,  # they add 1e-10 to the denominator
    )


@pytest.mark.outside(LINEAR)
@pytest.mark.parametrize("normalize", [True, False])
def test_against_flas_recurrence_and_its_state(normalize: bool) -> None:
    q, k, v = (x.float() for x in qkv(t=9, s=9))
    theirs, state = naive().naive_recurrent_linear_attn(
        F.elu(q) + 1, F.elu(k) + 1, v, scale=1.0, normalize=normalize, output_final_state=True
    )
    ours = linear_attention(q, k, v, causal=True, normalize=normalize, form="recurrent")
    torch.testing.assert_close(ours, theirs)
    summed = linear_attention_state(k, v)
    torch.testing.assert_close(summed.kv, state[0] if normalize else state)
    if normalize:
        torch.testing.assert_close(summed.k, state[1][:, 0])


@pytest.mark.law(LINEAR)
@FORMS
def test_the_future_does_not_leak(form: str) -> None:
    assert_causal(
        lambda x: linear_attention(x, x, x, causal=True, form=form, chunk=4), torch.randn(2, 11, 2, 4).double()
    )


@pytest.mark.law(LINEAR)
@pytest.mark.parametrize("feature_map", ["elu", "relu"])
def test_decoding_step_by_step_is_the_whole(feature_map: str) -> None:
    q, k, v = qkv(t=9, s=9, g=2)
    want = linear_attention(q, k, v, feature_map=feature_map, causal=True)
    state, sizes = linear_attention_state(k[:, :4], v[:, :4], feature_map=feature_map), set()
    for i in range(4, 9):
        before = [x.clone() for x in state]
        y, after = linear_attention_step(state, q[:, i], k[:, i], v[:, i], feature_map=feature_map)
        torch.testing.assert_close(y, want[:, i])
        assert all(torch.equal(a, b) for a, b in zip(state, before, strict=True)), "the old state was changed"
        state = after
        sizes.add(tuple(x.shape for x in state))
    assert len(sizes) == 1, "the state grew"
    y, _ = linear_attention_step(None, q[:, 0], k[:, 0], v[:, 0], feature_map=feature_map)
    torch.testing.assert_close(y, want[:, 0])


@pytest.mark.law(LINEAR)
@FORMS
@BOTH_WAYS
@pytest.mark.parametrize("cut", [0, 1, 5, 8])
def test_a_state_stands_for_the_keys_that_made_it(form: str, is_causal: bool, cut: int) -> None:
    q, k, v = qkv(t=4, s=9, g=2)
    if is_causal:
        cut = min(cut, 5)
    want = linear_attention(q, k, v, causal=is_causal)
    state = linear_attention_state(k[:, :cut], v[:, :cut])
    got = linear_attention(q, k[:, cut:], v[:, cut:], causal=is_causal, form=form, state=state, chunk=2)
    torch.testing.assert_close(got, want)


@pytest.mark.law(LINEAR)
def test_the_state_is_a_sum_so_the_order_of_keys_is_invisible() -> None:
    q, k, v = qkv()
    torch.testing.assert_close(linear_attention(q, k.flip(1), v.flip(1)), linear_attention(q, k, v))
    assert_batch_independent(lambda x: linear_attention(x, x, x, causal=True), qkv()[0])


@pytest.mark.law(LINEAR)
@FORMS
@BOTH_WAYS
def test_outputs_are_means_of_values(form: str, is_causal: bool) -> None:
    q, k, v = qkv(t=9, s=9)
    out = linear_attention(q, k, torch.ones_like(v), causal=is_causal, form=form, chunk=4)
    torch.testing.assert_close(out, torch.ones_like(out))


@pytest.mark.law(LINEAR)
def test_weights_cannot_be_sharper_than_the_features_allow() -> None:
    """No scale makes it a softmax: with q = k = large, elu + 1 weights go as the product, not its exponential."""
    q = torch.eye(4, dtype=torch.float64)[None, :, None] * 30
    v = torch.eye(4, dtype=torch.float64)[None, :, None]
    soft = scaled_dot_product_attention(q, q, v)
    line = linear_attention(q, q, v)
    assert soft[0, 0, 0, 0] > 0.999
    torch.testing.assert_close(line[0, 0, 0, 0].item(), (31**2 + 3) / (31**2 + 3 + 3 * (2 * 31 + 2)))


@pytest.mark.law(LINEAR)
@FORMS
@BOTH_WAYS
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_garbage_in_the_padding_reaches_nothing(form: str, is_causal: bool, bad: float) -> None:
    def run(x: list[Tensor]) -> tuple[Tensor, tuple[Tensor, ...]]:
        leaves = [y.clone().requires_grad_() for y in x]
        out = linear_attention(*leaves, padding(LENGTHS), causal=is_causal, form=form, chunk=2)
        return out, torch.autograd.grad(out.square().sum(), leaves)

    inputs = qkv()
    clean = run(inputs)
    inputs[1][0, 4:], inputs[2][0, 4:], inputs[1][1, 1:], inputs[2][1, 1:] = bad, bad, bad, bad
    dirty = run(inputs)
    torch.testing.assert_close(dirty, clean)
    state = linear_attention_state(*inputs[1:], padding(LENGTHS))
    assert all(x.isfinite().all() for x in state)


@pytest.mark.law(LINEAR)
@FORMS
def test_a_nan_in_the_future_reaches_no_past_query(form: str) -> None:
    q, k, v = qkv(g=2)
    want = linear_attention(q, k, v, causal=True)
    k[:, 3], v[:, 4], q[0, 1] = math.nan, math.inf, math.nan
    leaves = [x.requires_grad_() for x in (q, k, v)]
    out = linear_attention(*leaves, causal=True, form=form, chunk=2)
    past = out[:, :3].clone()
    assert past[0, 1].isnan().all(), "a broken query has no answer"
    torch.testing.assert_close(past[1], want[1, :3])
    torch.testing.assert_close(past[0, [0, 2]], want[0, [0, 2]])
    assert out[:, 3:].isnan().all(), "what a query may see is not hidden from it, broken or not"
    grads = torch.autograd.grad(out[0, [0, 2]].sum() + out[1, :3].sum(), leaves)
    assert all(x.isfinite().all() for x in grads)


@pytest.mark.law(LINEAR)
@FORMS
@BOTH_WAYS
def test_nothing_to_see_and_zero_denominators_give_zeros(form: str, is_causal: bool) -> None:
    q, k, v = qkv()
    out = linear_attention(q, k, v, padding(torch.tensor([0, 5])), causal=is_causal, form=form)
    assert (out[0] == 0).all()
    assert (out[1] != 0).all()
    if not is_causal:
        assert (linear_attention(q, k[:, :0], v[:, :0], form=form) == 0).all()
    leaves = [x.requires_grad_() for x in (-q.abs(), k, v)]  # relu of a negative query is zero
    out = linear_attention(*leaves, feature_map="relu", causal=is_causal, form=form)
    assert (out == 0).all()
    assert all(x.isfinite().all() for x in torch.autograd.grad(out.sum(), leaves))


@pytest.mark.law(LINEAR)
def test_features_below_zero_do_not_cancel() -> None:
    x = torch.tensor([-40.0, -20.0, -1.0, 0.0, 3.0], requires_grad=True)
    want = torch.where(x > 0, x + 1, x.double().exp().float())
    torch.testing.assert_close(elu_features(x), want)
    assert (F.elu(x) + 1)[0] == 0, "the formula as written loses the feature"
    (grad,) = torch.autograd.grad(elu_features(x).sum(), x)
    torch.testing.assert_close(grad, want.detach().clamp_max(1.0))


@pytest.mark.registration(LINEAR)
@FORMS
@BOTH_WAYS
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_halves_are_summed_in_float32(form: str, is_causal: bool, dtype: torch.dtype) -> None:
    q, k, v = (x.to(dtype) for x in qkv(t=70, s=70, h=2, g=1))
    v = v + 1000  # a sum of 70 such values overflows float16
    got = linear_attention(q, k, v, causal=is_causal, form=form)
    assert got.dtype == dtype
    want = linear_attention(*(x.double() for x in (q, k, v)), causal=is_causal).to(dtype)
    assert (got.double() - want.double()).abs().max() <= 1000 * torch.finfo(dtype).eps  # one rounding
    with torch.autocast("cpu", torch.bfloat16):
        exact = linear_attention(q.float(), k.float(), v.float(), causal=is_causal, form=form)
    torch.testing.assert_close(exact, linear_attention(q.float(), k.float(), v.float(), causal=is_causal))
    state = linear_attention_state(k, v)
    assert state.kv.dtype == torch.float32
    y, _ = linear_attention_step(state, q[:, 0], k[:, 0], v[:, 0])
    assert y.dtype == dtype
    assert y.isfinite().all()


@pytest.mark.registration(LINEAR)
@FORMS
@BOTH_WAYS
def test_second_derivatives_and_layouts(form: str, is_causal: bool) -> None:
    leaves = [x.requires_grad_() for x in qkv(b=1, t=3, s=3, h=2, g=1, e=2, c=2)]
    assert torch.autograd.gradgradcheck(lambda *x: linear_attention(*x, causal=is_causal, form=form, chunk=2), leaves)
    q, k, v = qkv(t=6, s=6)
    copies = [x.clone() for x in (q, k, v)]
    want = linear_attention(q, k, v, causal=is_causal, form=form, chunk=4)
    assert all(torch.equal(a, b) for a, b in zip((q, k, v), copies, strict=True)), "an input was changed"
    turned = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v)]
    wide = [torch.stack([x, -x], -1).flatten(-2)[..., ::2] for x in (q, k, v)]
    for views in (turned, wide):
        torch.testing.assert_close(linear_attention(*views, causal=is_causal, form=form, chunk=4), want)
    q, k, v = (x.to("meta") for x in (q, k, v))
    assert linear_attention(q, k, v, causal=is_causal, form=form).shape == want.shape


@pytest.mark.registration(LINEAR)
@pytest.mark.usefixtures("unchecked")
@BOTH_WAYS
def test_compiles_without_a_graph_break(is_causal: bool) -> None:
    q, k, v = qkv()

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return linear_attention(q, k, v, causal=is_causal, chunk=2)

    compiled = torch.compile(attend, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(q, k, v), attend(q, k, v))


@pytest.mark.law(LINEAR)
def test_training_memory_grows_linearly() -> None:
    def saved(n: int, form: str) -> int:
        kept: dict[int, int] = {}

        def pack(x: Tensor) -> Tensor:
            kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
            return x

        leaves = [x.requires_grad_() for x in qkv(b=1, t=n, s=n, h=1, g=1, e=4, c=4)]
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            linear_attention(*leaves, causal=True, form=form, chunk=8).sum().backward()
        return sum(kept.values())

    assert saved(512, "chunked") < 2.2 * saved(256, "chunked")
    assert saved(512, "parallel") > 3.5 * saved(256, "parallel")


@pytest.mark.refusal(LINEAR)
def test_refuses_shapes_and_dtypes_that_do_not_fit() -> None:
    q, k, v = qkv()
    with refuses(ConfigError, "list", "tensors"):
        linear_attention(q.tolist(), k, v)
    with refuses(ShapeError, (5, 4, 6), "four axes"):
        linear_attention(q[0], k, v)
    for bad in (qkv(e=5)[1:], [k, qkv(s=4)[2]], qkv(b=3)[1:]):
        with refuses(ShapeError, tuple(bad[0].shape), tuple(bad[1].shape)):
            linear_attention(q, *bad)
    with refuses(ShapeError, "4 query, 3 key"):
        linear_attention(q, *qkv(g=3)[1:])
    with refuses(ShapeError, "4 query, 0 key"):
        linear_attention(q, *qkv(g=0)[1:])
    with refuses(ShapeError, "at least one feature"):
        linear_attention(*qkv(e=0))
    with refuses(ShapeError, "torch.int64"):
        linear_attention(q.long(), k.long(), v.long())
    with refuses(ShapeError, "torch.float32", "torch.float64"):
        linear_attention(q, k.float(), v)
    with refuses(ShapeError, "meta", "cpu"):
        linear_attention(q, k.to("meta"), v)
    with refuses(ShapeError, "t=5", "s=4"):
        linear_attention(*qkv(s=4), causal=True)
    with refuses(ShapeError, "feature map", (2, 5, 24)):
        linear_attention(q, k, v, feature_map=lambda x: x.flatten(2))


@pytest.mark.refusal(LINEAR)
def test_refuses_masks_that_hide_keys_from_some_queries_only() -> None:
    q, k, v = qkv()
    for rule in (window(2), causal & padding(LENGTHS), per_head(full, full, full, sinks(1))):
        with refuses(ShapeError, rule, "causal=True"):
            linear_attention(q, k, v, rule)
    for shape in ((5, 5), (2, 1, 5, 5), (2, 4, 1, 5)):
        with refuses(ShapeError, shape, "padding(lengths)"):
            linear_attention(q, k, v, torch.ones(shape, dtype=torch.bool))
    for shape in ((1, 4), (3, 1, 1, 5), (5,)):
        with refuses(ShapeError, "attention mask", shape):
            linear_attention(q, k, v, torch.ones(shape, dtype=torch.bool))
    with refuses(ShapeError, "torch.float64", "bool"):
        linear_attention(q, k, v, torch.zeros(1, 5, dtype=torch.float64))
    with refuses(ShapeError, "torch.int64"):
        linear_attention(q, k, v, torch.ones(1, 5, dtype=torch.int64))
    with refuses(ConfigError, "'causal'"):
        linear_attention(q, k, v, "causal")  # type: ignore[arg-type]
    torch.testing.assert_close(linear_attention(q, k, v, causal), linear_attention(q, k, v, causal=True))


@pytest.mark.refusal(LINEAR)
@pytest.mark.parametrize("chunk", [0, -1, 2.5, True, math.nan])
def test_refuses_chunks_forms_and_maps(chunk: float) -> None:
    q, k, v = qkv()
    with refuses(ConfigError, "chunk", chunk):
        linear_attention(q, k, v, chunk=chunk)  # type: ignore[arg-type]
    with refuses(ConfigError, "'fast'"):
        linear_attention(q, k, v, form="fast")  # type: ignore[arg-type]
    with refuses(ConfigError, "'softmax'"):
        linear_attention(q, k, v, feature_map="softmax")  # type: ignore[arg-type]


@pytest.mark.refusal(LINEAR)
def test_refuses_a_state_that_does_not_fit() -> None:
    q, k, v = qkv()
    state = linear_attention_state(k, v)
    for bad, value in (
        (linear_attention_state(k[:1], v[:1]), (1, 4, 6, 3)),
        (LinearState(state.kv.float(), state.k.float()), "torch.float32"),
        (LinearState(state.kv.to("meta"), state.k.to("meta")), "meta"),
        (LinearState(state.kv, state.k[..., :2]), (2, 4, 2)),
    ):
        with refuses(ShapeError, "state", value):
            linear_attention(q, k, v, causal=True, state=bad)
        with refuses(ShapeError, "state", value):
            linear_attention_step(bad, q[:, 0], k[:, 0], v[:, 0])
    for cut in (lambda x: x, lambda x: x[0, 0]):
        with refuses(ShapeError, "decoding step", tuple(cut(q).shape)):
            linear_attention_step(state, cut(q), cut(k), cut(v))
    with refuses(ShapeError, "torch.int64"):
        linear_attention_step(state, q[:, 0].long(), k[:, 0].long(), v[:, 0].long())


@pytest.mark.parity(LINEAR)
def test_the_core_takes_features_as_they_are() -> None:
    q, k, v = qkv()
    seen = torch.rand(2, 5) < 0.7
    got = kernel_attention(elu_features(q), elu_features(k), v, seen, causal=True, chunk=2)
    mask = causal.dense(5) & seen[:, None, None]
    torch.testing.assert_close(got, literally(q, k, v, mask))


@pytest.mark.refusal("linear-attention")
def test_states_and_feature_maps_that_are_none() -> None:
    x = torch.randn(1, 3, 1, 4)
    for state in ((torch.zeros(1, 1, 4, 4), torch.zeros(1, 1, 4)), 5):
        with refuses(ConfigError, type(state).__name__, "LinearState"):
            linear_attention(x, x, x, state=state)
        with refuses(ConfigError, type(state).__name__, "LinearState"):
            linear_attention_step(state, x[:, 0], x[:, 0], x[:, 0])
    for phi in (["elu"], None, 3):
        with refuses(ConfigError, repr(phi)):
            linear_attention(x, x, x, feature_map=phi)


@pytest.mark.parity(LINEAR)
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("rule", [padding(torch.tensor([0, 0])), torch.ones(1, 0, dtype=torch.bool)], ids=str)
def test_a_sequence_of_length_zero_may_have_a_mask(rule: Mask | Tensor, is_causal: bool) -> None:
    q, k, v = (x[:, :0] for x in qkv())
    assert linear_attention(q, k, v, rule, causal=is_causal).shape == (*q.shape[:3], v.shape[3])
