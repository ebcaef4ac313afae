"""Linformer's attention: mixtures of keys and values, against the equation, the package and full attention."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from handbook_src.errors import ConfigError, ShapeError
from handbook_src.functional.attention.attention import scaled_dot_product_attention
from handbook_src.functional.attention.linformer import linformer_attention, linformer_weights, mix
from handbook_src.functional.attention.mask import causal, full, left_padding, padding, window
from handbook_src.testing import assert_causal, assert_parity, oracle, refuses

LINFORMER = "linformer"
BOTH = pytest.mark.parametrize("backend", ["reference", "torch", "auto"])
LENGTHS = torch.tensor([4, 1])


def qkv(b: int = 2, t: int = 5, s: int = 5, h: int = 4, g: int = 4, e: int = 6, c: int = 3) -> list[Tensor]:
    sizes = ((b, t, h, e), (b, s, g, e), (b, s, g, c))
    return [torch.randn(size, dtype=torch.float64) for size in sizes]


def literally(q: Tensor, k: Tensor, v: Tensor, ke: Tensor, vf: Tensor, scale: float | None = None) -> Tensor:
    """Equation 7, head by head and sample by sample."""
    r, s, out = q.shape[2] // k.shape[2], k.shape[1], []
    for i in range(q.shape[2]):
        e, f = ((x if x.ndim == 2 else x[i // r])[:, :s] for x in (ke, vf))
        keys, values = (torch.stack([p @ y for y in x[:, :, i // r]]) for p, x in ((e, k), (f, v)))
        scores = q[:, :, i] @ keys.mT * (q.shape[-1] ** -0.5 if scale is None else scale)
        out.append((scores.exp() / scores.exp().sum(-1, keepdim=True)) @ values)
    return torch.stack(out, 2)


@pytest.mark.parity(LINFORMER)
@BOTH
@pytest.mark.parametrize("heads", [None, 2])
@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("scale", [None, 0.5])
@pytest.mark.parametrize(("t", "s", "n", "length"), [(5, 5, 3, 5), (4, 7, 2, 11), (1, 1, 1, 1), (3, 9, 12, 9)])
def test_the_equation(
    backend: str, heads: int | None, shared: bool, scale: float | None, t: int, s: int, n: int, length: int
) -> None:
    shape = (n, length) if heads is None else (heads, n, length)
    e, f = torch.randn(shape), torch.randn(shape)

    def ours(q: Tensor, k: Tensor, v: Tensor, e: Tensor, f: Tensor) -> Tensor:
        return linformer_attention(q, k, v, e, None if shared else f, scale=scale, backend=backend)

    assert_parity(
        ours,
        lambda q, k, v, e, f: literally(q, k, v, e, e if shared else f, scale),
        [*qkv(t=t, s=s, g=2), e, f],
    )


@pytest.mark.parity(LINFORMER)
def test_weights_are_the_equations() -> None:
    q, k, _ = qkv(g=2)
    e = torch.randn(3, 5, dtype=torch.float64)
    want = literally(
        q, k, torch.eye(5, dtype=torch.float64)[None, :, None].expand(2, 5, 2, 5), e, torch.eye(3, 5).double()
    )
    torch.testing.assert_close(linformer_weights(q, k, e).movedim(1, 2), want[..., :3])


@pytest.mark.law(LINFORMER)
@BOTH
def test_identities_make_it_full_attention(backend: str) -> None:
    eye = torch.eye(7, dtype=torch.float64)
    assert_parity(
        lambda q, k, v: linformer_attention(q, k, v, eye, eye, backend=backend),
        lambda q, k, v: scaled_dot_product_attention(q, k, v, backend="reference"),
        qkv(t=3, s=7, g=2),
    )


@pytest.mark.law(LINFORMER)
def test_scores_have_no_more_rank_than_mixtures() -> None:
    q, k, v = qkv(b=1, t=16, s=16, h=1, g=1, e=8, c=16)
    e = torch.randn(3, 16, dtype=torch.float64)
    as_matrix = linformer_attention(q, k, torch.eye(16, dtype=torch.float64)[None, :, None], e)[0, :, 0]
    assert torch.linalg.matrix_rank(as_matrix) == 3
    full_rank = scaled_dot_product_attention(q, k, torch.eye(16, dtype=torch.float64)[None, :, None])[0, :, 0]
    assert torch.linalg.matrix_rank(full_rank) == 16
    assert v.shape[-1] == 16


@pytest.mark.law(LINFORMER)
def test_it_leaks_the_future_which_is_why_causal_is_refused() -> None:
    e = torch.randn(3, 5, dtype=torch.float64)
    with pytest.raises(AssertionError, match="changed with the input after it"):
        assert_causal(lambda x: linformer_attention(x, x, x, e), torch.randn(1, 5, 1, 4).double())


@pytest.mark.law(LINFORMER)
@BOTH
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_padding_is_as_good_as_absent(backend: str, bad: float) -> None:
    e, f = torch.randn(2, 3, 8, dtype=torch.float64)

    def run(x: list[Tensor], mask: object = None) -> tuple[Tensor, tuple[Tensor, ...]]:
        leaves = [y.clone().requires_grad_() for y in x]
        out = linformer_attention(*leaves, e, f, mask, backend=backend)
        return out, torch.autograd.grad(out.square().sum(), leaves)

    q, k, v = qkv()
    alone, _ = run([q[1:], k[1:, :1], v[1:, :1]])
    k[0, 4:], v[0, 4:], k[1, 1:], v[1, 1:] = bad, bad, bad, bad
    for mask in (padding(LENGTHS), padding(LENGTHS).dense(1, 5)):
        out, grads = run([q, k, v], mask)
        torch.testing.assert_close(out[1:], alone)
        assert all(x.isfinite().all() for x in grads)
    assert (linformer_attention(q, k, v, e, f, padding(torch.tensor([0, 0]))) == 0).all()
    assert (linformer_attention(q, k[:, :0], v[:, :0], e, f) == 0).all()
    assert linformer_attention(q[:0], k[:0], v[:0], e, f).shape == (0, 5, 4, 3)
    assert linformer_attention(q[:, :0], k, v, e, f).shape == (2, 0, 4, 3)


@pytest.mark.law(LINFORMER)
def test_a_nan_that_is_seen_is_not_hidden() -> None:
    q, k, v = qkv()
    v[0, 3] = math.nan
    out = linformer_attention(q, k, v, torch.randn(3, 5, dtype=torch.float64))
    assert out[0].isnan().all()
    assert out[1].isfinite().all()


@pytest.mark.outside(LINFORMER)
@pytest.mark.parametrize("share", [True, False])
@pytest.mark.parametrize("n", [8, 5])
def test_against_the_package(share: bool, n: int) -> None:
    theirs = oracle.load("linformer").LinformerSelfAttention(12, 8, k=3, heads=2, share_kv=share).double()
    theirs.to_out = torch.nn.Identity()
    names = ["to_q", "to_k", "to_k" if share else "to_v"]

    def ours(x: Tensor) -> Tensor:
        q, k, v = (getattr(theirs, name)(x).unflatten(-1, (2, 6)) for name in names)
        f = None if share else theirs.proj_v.T
        return linformer_attention(q, k, v, theirs.proj_k.T, f).flatten(2)

    assert_parity(ours, theirs, [torch.randn(2, n, 12)])


@pytest.mark.registration(LINFORMER)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_halves_are_mixed_in_float32(dtype: torch.dtype) -> None:
    x = (1000 + torch.randn(1, 90, 1, 2)).to(dtype)
    e = torch.ones(1, 90, dtype=dtype)
    e[:, 45:] = -1  # a sum of 45 such values overflows float16 on its way
    got = mix(x, e)
    want = mix(x.double(), e.double())
    assert got.dtype == dtype
    torch.testing.assert_close(got, want.to(dtype))
    out = linformer_attention(*(y.to(dtype) for y in qkv()), torch.randn(3, 5).to(dtype))
    assert out.dtype == dtype


@pytest.mark.registration(LINFORMER)
def test_second_derivatives_layouts_and_meta() -> None:
    e = torch.randn(2, 3, dtype=torch.float64)
    leaves = [x.requires_grad_() for x in qkv(b=1, t=3, s=3, h=2, g=1, e=2, c=2)]
    assert torch.autograd.gradgradcheck(lambda *x: linformer_attention(*x, e, backend="reference"), leaves)
    q, k, v = qkv(t=6, s=6)
    e = torch.randn(3, 6, dtype=torch.float64)
    copies = [x.clone() for x in (q, k, v)]
    want = linformer_attention(q, k, v, e)
    assert all(torch.equal(a, b) for a, b in zip((q, k, v), copies, strict=True)), "an input was changed"
    turned = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v)]
    torch.testing.assert_close(linformer_attention(*turned, e.T.contiguous().T), want)
    assert linformer_attention(*(x.to("meta") for x in (q, k, v, e))).shape == want.shape


@pytest.mark.registration(LINFORMER)
@pytest.mark.usefixtures("unchecked")
def test_compiles_without_a_graph_break() -> None:
    q, k, v = qkv()
    e = torch.randn(3, 5, dtype=torch.float64)
    compiled = torch.compile(lambda *x: linformer_attention(*x, e), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(q, k, v), linformer_attention(q, k, v, e))


@pytest.mark.refusal(LINFORMER)
def test_refuses_what_does_not_fit() -> None:
    q, k, v = qkv()
    e = torch.randn(3, 5, dtype=torch.float64)
    with refuses(ShapeError, "sequence: got 5", "at most 4"):
        linformer_attention(q, k, v, e[:, :4])
    for bad in (e[0], e[:0], e[None].expand(3, -1, -1), e[None, None]):
        with refuses(ShapeError, "projection", tuple(bad.shape)):
            linformer_attention(q, k, v, bad)
    with refuses(ShapeError, "3 mixtures of keys, 2 of values"):
        linformer_attention(q, k, v, e, e[:2])
    with refuses(ShapeError, "torch.int64"):
        linformer_attention(q, k, v, e.long())
    with refuses(ShapeError, "torch.int64"):
        linformer_attention(q.long(), k.long(), v.long(), e)
    with refuses(ShapeError, "4 query, 3 key"):
        linformer_attention(q, *qkv(g=3)[1:], e)
    with refuses(ShapeError, "four axes"):
        linformer_weights(q[0], k[0], e)


@pytest.mark.refusal(LINFORMER)
def test_refuses_causal_and_other_masks_and_numbers() -> None:
    q, k, v = qkv()
    e = torch.randn(3, 5, dtype=torch.float64)
    for rule in (causal, causal & padding(LENGTHS), window(2)):
        with refuses(ConfigError, rule, "the future"):
            linformer_attention(q, k, v, e, mask=rule)
        with refuses(ConfigError, rule, "the future"):
            linformer_weights(q, k, e, rule)
    for shape in ((5, 5), (2, 4, 1, 5)):
        with refuses(ShapeError, shape):
            linformer_attention(q, k, v, e, mask=torch.ones(shape, dtype=torch.bool))
    torch.testing.assert_close(linformer_attention(q, k, v, e, mask=full), linformer_attention(q, k, v, e))
    linformer_attention(q, k, v, e, mask=left_padding(LENGTHS))
    for scale in (0.0, -1.0, math.nan):
        with refuses(ConfigError, "scale", scale):
            linformer_attention(q, k, v, e, scale=scale)
    with refuses(ConfigError, "dropout", 1.0):
        linformer_attention(q, k, v, e, dropout=1.0)
    with refuses(ConfigError, "'triton'"):
        linformer_attention(q, k, v, e, backend="triton")


@pytest.mark.refusal("linformer")
def test_projections_on_another_device() -> None:
    x = torch.randn(1, 3, 1, 4)
    with refuses(ShapeError, "meta", "cpu"):
        linformer_attention(x, x, x, torch.randn(2, 3, device="meta"))
