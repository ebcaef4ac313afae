"""Latent attention: both forms against keys and values written out head by head."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from handbook_src.errors import ConfigError, ShapeError
from handbook_src.functional.attention.attention import MaskLike
from handbook_src.functional.attention.mask import Mask, causal, left_padding, padding, per_head, window
from handbook_src.functional.attention.mla import latent_attention, latent_attention_flops
from handbook_src.testing import assert_parity, refuses

LENGTHS = torch.tensor([7, 2])
# t, s, h, e, r, c, w
SIZES = [
    (7, 7, 3, 4, 2, 5, 3),
    (1, 7, 2, 3, 4, 9, 6),
    (3, 7, 1, 1, 2, 1, 1),
    (4, 7, 2, 5, 0, 3, 2),
    (20, 20, 2, 3, 2, 4, 5),
]


def inputs(t: int, s: int, h: int, e: int, r: int, c: int, w: int, b: int = 2) -> list[Tensor]:
    return [torch.randn(n, dtype=torch.float64) for n in ((b, t, h, e + r), (b, s, c + r), (h, e, c), (h, w, c))]


def written_out(
    q: Tensor, kv: Tensor, up_key: Tensor, up_value: Tensor, seen: Tensor | None = None, scale: float | None = None
) -> Tensor:
    """Equations 10, 11 and 17 to 18, one sample and one head at a time."""
    (b, t, h, width), c, s = q.shape, up_key.shape[2], kv.shape[1]
    scale = 1 / math.sqrt(width) if scale is None else scale
    seen = torch.ones(t, s, dtype=torch.bool) if seen is None else seen
    seen = seen.expand(b, h, t, s)
    rows = []
    for n in range(b):
        heads = []
        for i in range(h):
            key = torch.cat((kv[n, :, :c] @ up_key[i].T, kv[n, :, c:]), -1)
            value = kv[n, :, :c] @ up_value[i].T
            scores = (q[n, :, i] @ key.T * scale).masked_fill(~seen[n, i], -math.inf)
            heads.append(torch.softmax(scores, -1) @ value)
        rows.append(torch.stack(heads, 1))
    return torch.stack(rows)


@pytest.mark.parity("mla")
@pytest.mark.parametrize("backend", ["auto", "torch", "reference"])
@pytest.mark.parametrize("form", ["auto", "decompressed", "absorbed"])
@pytest.mark.parametrize("sizes", SIZES)
def test_both_forms_are_the_equations(backend: str, form: str, sizes: tuple[int, ...]) -> None:
    parts = inputs(*sizes)
    assert_parity(lambda *x: latent_attention(*x, form=form, backend=backend), written_out, parts)
    scaled = lambda *x: latent_attention(*x, form=form, backend=backend, scale=0.3)  # noqa: E731
    assert_parity(scaled, lambda *x: written_out(*x, scale=0.3), parts)


def rules(t: int, s: int) -> dict[str, tuple[MaskLike | None, bool, Tensor]]:
    rule = causal & window(3)
    bias = torch.zeros(t, s, dtype=torch.float64).masked_fill(~rule.dense(t, s), -math.inf)
    padded = padding(LENGTHS).dense(t, s)
    return {
        "causal": (None, True, causal.dense(t, s)),
        "window": (window(3), True, rule.dense(t, s)),
        "added": (bias, False, rule.dense(t, s)),
        "padding": (padding(LENGTHS), False, padded),
        "padding tensor": (padded, True, padded & causal.dense(t, s)),
        "heads": (per_head(causal, window(2)), False, per_head(causal, window(2)).dense(t, s)),
    }


@pytest.mark.parity("mla")
@pytest.mark.parametrize("backend", ["torch", "reference"])
@pytest.mark.parametrize("form", ["decompressed", "absorbed"])
@pytest.mark.parametrize("kind", list(rules(2, 2)))
def test_masks_are_the_equations_under_a_mask(backend: str, form: str, kind: str) -> None:
    mask, is_causal, seen = rules(7, 7)[kind]
    ours = lambda *x: latent_attention(*x, mask, causal=is_causal, form=form, backend=backend)  # noqa: E731
    assert_parity(ours, lambda *x: written_out(*x, seen=seen), inputs(7, 7, 2, 3, 2, 4, 3))


@pytest.mark.law("mla")
def test_the_forms_are_one_function_and_auto_takes_the_cheaper() -> None:
    parts = inputs(6, 6, 4, 8, 2, 12, 8)
    one, other = (latent_attention(*parts, causal=True, form=form) for form in ("decompressed", "absorbed"))
    torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)
    assert latent_attention_flops(1, 100, 4, e=8, r=2, c=12, w=8) == {
        "decompressed": 2 * 100 * 4 * 12 * 16 + 2 * 100 * 4 * 18,
        "absorbed": 2 * 4 * 12 * 16 + 2 * 100 * 4 * 26,
    }
    for t, s, form in ((1, 500, "absorbed"), (500, 500, "decompressed")):
        assert min(cost := latent_attention_flops(t, s, 4, e=8, r=2, c=12, w=8), key=lambda f: cost[f]) == form
        q, kv, *up = (x.float() for x in inputs(t, s, 4, 8, 2, 12, 8, b=1))
        assert torch.equal(latent_attention(q, kv, *up), latent_attention(q, kv, *up, form=form))


@pytest.mark.law("mla")
@pytest.mark.parametrize("form", ["decompressed", "absorbed"])
@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_hidden_nan_does_not_leak_forward_or_backward(form: str, backend: str) -> None:
    q, kv, *up = (x.requires_grad_() for x in inputs(5, 5, 2, 3, 2, 4, 3))
    with torch.no_grad():
        kv[1, 2:] = math.nan
    for mask in (padding(LENGTHS), padding(LENGTHS).dense(5, 5), ~left_padding(torch.tensor([5, 2]))):
        if isinstance(mask, Mask) and "left" in mask.text:  # sample 0 sees all five, sample 1 the first two
            assert mask.dense(1, 5)[:, 0, 0].tolist() == [[True] * 5, [True] * 2 + [False] * 3]
        out = latent_attention(q, kv, *up, mask, form=form, backend=backend)
        assert out.isfinite().all()
        grads = torch.autograd.grad(out.square().sum(), (q, kv, *up))
        assert all(g.isfinite().all() for g in grads)
    past = latent_attention(q, kv, *up, causal=True, form=form, backend="reference")
    assert past[1, :2].isfinite().all()
    assert past[1, 2:].isnan().all()  # what is seen is not hushed up
    assert all(g.isfinite().all() for g in torch.autograd.grad(past[1, :2].sum(), (q, kv, *up)))


@pytest.mark.law("mla")
@pytest.mark.parametrize("form", ["auto", "absorbed"])
def test_empty_rows_empty_batches_and_precisions(form: str) -> None:
    parts = inputs(5, 5, 2, 3, 2, 4, 3)
    nothing = latent_attention(*parts, left_padding(torch.tensor([5, 1])), form=form)
    assert (nothing[0] == 0).all()
    assert nothing.isfinite().all()
    q, kv, *up = parts
    assert latent_attention(q[:0], kv[:0], *up, form=form).shape == (0, 5, 2, 3)
    assert latent_attention(q[:, :0], kv, *up, form=form).shape == (2, 0, 2, 3)
    turned = q.transpose(0, 1).contiguous().transpose(0, 1)
    torch.testing.assert_close(latent_attention(turned, kv, *up, form=form), latent_attention(q, kv, *up, form=form))
    for dtype in (torch.bfloat16, torch.float16):
        low = latent_attention(*(x.to(dtype) for x in parts), form=form)
        assert low.dtype == dtype
        torch.testing.assert_close(low.double(), latent_attention(*parts, form=form), rtol=0.1, atol=0.1)


@pytest.mark.law("mla")
@pytest.mark.parametrize("form", ["decompressed", "absorbed"])
def test_second_derivatives_and_untouched_inputs(form: str) -> None:
    parts = [x.requires_grad_() for x in inputs(2, 3, 2, 2, 2, 2, 1, b=1)]
    before = [x.detach().clone() for x in parts]
    run = lambda *x: latent_attention(*x, causal=True, form=form, backend="reference")  # noqa: E731
    assert torch.autograd.gradgradcheck(run, parts)
    assert all(torch.equal(a, b) for a, b in zip(parts, before, strict=True))


@pytest.mark.registration("mla")
@pytest.mark.usefixtures("unchecked")
def test_compiles_in_one_graph_and_runs_on_meta() -> None:
    parts = inputs(5, 5, 2, 3, 2, 4, 3)
    for form in ("decompressed", "absorbed"):
        run = lambda *x, form=form: latent_attention(*x, causal=True, form=form)  # noqa: E731
        compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(*parts), run(*parts))
        assert run(*(x.to("meta") for x in parts)).shape == (2, 5, 2, 3)


@pytest.mark.refusal("mla")
def test_refusals() -> None:
    q, kv, key, value = inputs(4, 4, 2, 3, 2, 5, 3)
    for bad in ((q[0], kv, key, value), (q[:1], kv, key, value), (q, kv[..., :-1], key, value), (q, kv, key[:1], value),
                (q, kv, key, value[..., :-1]), (q[..., :2], kv, key, value), (q, kv, key, value[:, :0])):  # fmt: skip
        with refuses(ShapeError, "latent_attention inputs", *(tuple(x.shape) for x in bad)):
            latent_attention(*bad)
    with refuses(ShapeError, "torch.float32 beside torch.float64"):
        latent_attention(q, kv.float(), key, value)
    with refuses(ShapeError, "torch.int64"):
        latent_attention(q.long(), kv, key, value)
    with refuses(ShapeError, "attention mask", (4, 3)):
        latent_attention(q, kv, key, value, torch.ones(4, 3, dtype=torch.bool))
    with refuses(ShapeError, "t=4", "s=2"):
        latent_attention(q, kv[:, :2], key, value, causal=True)
    with refuses(ConfigError, "form", "naive"):
        latent_attention(q, kv, key, value, form="naive")  # type: ignore[arg-type]
    for scale in (0.0, -1.0, math.nan):
        with refuses(ConfigError, "scale", scale):
            latent_attention(q, kv, key, value, scale=scale)
    with refuses(ConfigError, "backend", "triton"):
        latent_attention(q, kv, key, value, backend="triton")
