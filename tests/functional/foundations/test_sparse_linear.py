"""The masked, the CSR and the 2:4 form against the dense product, and the masks against torch's pruning."""

from __future__ import annotations

import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from handbook_src.errors import ConfigError, ShapeError
from handbook_src.functional.foundations.sparse_linear import (
    csr_linear,
    magnitude_mask,
    masked,
    pack_semi_structured,
    semi_structured_linear,
    semi_structured_mask,
    sparse_linear,
    to_csr,
    unpack_semi_structured,
)
from handbook_src.testing import assert_parity, refuses

ID = "sparse-linear"
BACKENDS = ["reference", "torch", "auto"]
LEADS = [(), (1,), (5,), (2, 3), (0,)]


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def flags(*shape: int, keep: float = 0.4, seed: int = 5) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < keep


# ---------------------------------------------------------------- parity
@pytest.mark.parity(ID)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("lead", LEADS)
@pytest.mark.parametrize(("d", "f", "keep"), [(1, 1, 1.0), (5, 3, 0.4), (33, 7, 0.1), (4, 2, 0.0)])
def test_masked_is_torchs_linear_on_the_masked_weight(lead, d, f, keep, bias, backend):
    mask = flags(f, d, keep=keep)
    assert_parity(
        lambda x, w, b: sparse_linear(x, w, mask, b, backend=backend),
        lambda x, w, b: F.linear(x, w * mask, b),
        [draw(*lead, d), draw(f, d, seed=1), draw(f, seed=2) if bias else None],
    )


@pytest.mark.parity(ID)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("lead", LEADS)
@pytest.mark.parametrize(("d", "f", "keep"), [(1, 1, 1.0), (5, 3, 0.4), (33, 7, 0.1), (4, 2, 0.0)])
def test_csr_is_the_dense_product(lead, d, f, keep, bias):
    w = draw(f, d, seed=1) * flags(f, d, keep=keep)
    assert_parity(
        lambda x, b: csr_linear(x, to_csr(w), b),
        lambda x, b: F.linear(x, w, b),
        [draw(*lead, d), draw(f, seed=2) if bias else None],
    )
    torch.testing.assert_close(to_csr(w).to_dense(), w)
    assert to_csr(w).col_indices().dtype == torch.int32
    assert to_csr(w)._nnz() == int((w != 0).sum())


@pytest.mark.parity(ID)
@pytest.mark.parametrize("lead", LEADS)
@pytest.mark.parametrize(("d", "f"), [(4, 1), (12, 5), (64, 3)])
def test_two_of_four_is_the_dense_product(lead, d, f):
    w = masked("", draw(f, d, seed=1), semi_structured_mask(draw(f, d, seed=1)))
    values, places = pack_semi_structured(w)
    assert values.shape == (f, d // 2)
    assert places.shape == (f, -(-d // 8))
    assert_parity(
        lambda x, v, b: semi_structured_linear(x, v, places, b),
        lambda x, v, b: F.linear(x, torch.zeros_like(w).masked_scatter(w != 0, v), b),
        [draw(*lead, d), values, draw(f, seed=2)],
    )


@pytest.mark.parity(ID)
def test_strides_do_not_matter():
    x, w = draw(6, 8, 12), draw(12, 5, seed=1).T
    mask = flags(12, 5).T
    for cut in (lambda t: t.transpose(0, 1), lambda t: t[::2, 1::3], lambda t: t[:1].expand(6, 8, 12)):
        want = F.linear(cut(x), w * mask)
        torch.testing.assert_close(sparse_linear(cut(x), w, mask), want)
        torch.testing.assert_close(csr_linear(cut(x), to_csr(w * mask)), want)
        two = w * semi_structured_mask(w)
        torch.testing.assert_close(semi_structured_linear(cut(x), *pack_semi_structured(two)), F.linear(cut(x), two))


@pytest.mark.parity(ID)
@pytest.mark.parametrize("backend", BACKENDS)
def test_twice_differentiable(backend):
    mask, x, w, b = flags(4, 3), draw(2, 3).requires_grad_(), draw(4, 3).requires_grad_(), draw(4).requires_grad_()
    torch.autograd.gradgradcheck(lambda x, w, b: sparse_linear(x, w, mask, b, backend=backend), (x, w, b))


# ---------------------------------------------------------------- outside
@pytest.mark.outside(ID)
@pytest.mark.parametrize("amount", [0.0, 0.1, 0.5, 0.9, 0.999, 1.0])
def test_magnitude_mask_is_torchs_pruning(amount):
    from torch.nn.utils import prune

    layer = torch.nn.Linear(13, 7)
    want = (
        prune.L1Unstructured(amount).compute_mask(layer.weight, torch.ones(7, 13)) if amount < 1 else torch.zeros(7, 13)
    )
    assert torch.equal(magnitude_mask(layer.weight, amount), want.bool())


@pytest.mark.outside(ID)
def test_two_of_four_is_the_compressed_form_of_torchs_cutlass_layout():
    conversions = pytest.importorskip("torch.sparse._semi_structured_conversions")
    w = draw(32, 64).half()
    w = w * semi_structured_mask(w)
    values, _ = conversions.sparse_semi_structured_from_dense_cutlass(w)
    assert torch.equal(pack_semi_structured(w)[0], values)


# ---------------------------------------------------------------- laws
@pytest.mark.law(ID)
@pytest.mark.parametrize("backend", BACKENDS)
def test_masked_weights_have_no_gradient_and_no_say(backend):
    x, mask = draw(5, 6), flags(4, 6)
    w = draw(4, 6, seed=1)
    poisoned = torch.where(mask, w, torch.tensor([float("nan"), float("inf")] * 3).double()).requires_grad_()
    y = sparse_linear(x, poisoned, mask, backend=backend)
    torch.testing.assert_close(y, F.linear(x, torch.where(mask, w, 0.0)))
    (g,) = torch.autograd.grad(y.square().sum(), poisoned)
    assert (g[~mask] == 0).all()
    assert (g[mask] != 0).all()


@pytest.mark.law(ID)
def test_a_full_mask_is_the_linear_layer_and_an_empty_one_the_bias():
    x, w, b = draw(5, 6), draw(4, 6, seed=1), draw(4, seed=2)
    torch.testing.assert_close(sparse_linear(x, w, torch.ones(4, 6).bool(), b), F.linear(x, w, b))
    torch.testing.assert_close(sparse_linear(x, w, torch.zeros(4, 6).bool(), b), b.expand(5, 4))


@pytest.mark.law(ID)
@pytest.mark.parametrize("amount", [0.0, 0.25, 0.33, 0.5, 0.9, 1.0])
def test_pruning_removes_exactly_so_many_ties_or_not_and_the_smallest(amount):
    for w in (draw(9, 11), torch.ones(9, 11), torch.zeros(9, 11)):
        keep = magnitude_mask(w, amount)
        assert int((~keep).sum()) == round(amount * 99)
        if keep.any() and not keep.all():
            assert w[keep].abs().min() >= w[~keep].abs().max()


@pytest.mark.law(ID)
def test_pruning_in_steps_never_brings_a_weight_back():
    w = draw(9, 11)
    mask = magnitude_mask(w, 0.3)
    for seed, amount in enumerate((0.5, 0.8, 0.95)):
        after = magnitude_mask(draw(9, 11, seed=seed), amount, mask)
        assert not (after & ~mask).any()
        mask = after


@pytest.mark.law(ID)
def test_two_of_four_keeps_the_two_largest_of_each_four():
    w = draw(5, 24)
    keep = semi_structured_mask(w).view(5, 6, 4)
    assert (keep.sum(-1) == 2).all()
    size = w.abs().view(5, 6, 4)
    assert (size.masked_fill(~keep, 9).amin(-1) >= size.masked_fill(keep, 0).amax(-1)).all()
    assert semi_structured_mask(torch.ones(1, 4)).tolist() == [[True, True, False, False]]


@pytest.mark.law(ID)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("d", [4, 8, 20, 128])
def test_packing_loses_nothing(d, dtype):
    w = draw(7, d).to(dtype)
    w = w * semi_structured_mask(w)
    w[:, :4] = 0  # a group of zeros, and below one with a single nonzero
    w[0, 2] = 3
    values, places = pack_semi_structured(w)
    assert torch.equal(unpack_semi_structured(values, places), w)
    assert values.dtype == dtype
    assert places.dtype == torch.uint8


# ---------------------------------------------------------------- registration
@pytest.mark.registration(ID)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype):
    x, w = draw(3, 40).to(dtype), draw(5, 40, seed=1).to(dtype)
    w = w * semi_structured_mask(w)
    exact = F.linear(x.float(), w.float())
    for y in (
        sparse_linear(x, w, w != 0, backend="reference"),
        csr_linear(x, to_csr(w)),
        semi_structured_linear(x, *pack_semi_structured(w)),
    ):
        assert y.dtype == dtype
        torch.testing.assert_close(y.float(), exact, rtol=torch.finfo(dtype).eps, atol=torch.finfo(dtype).eps)


@pytest.mark.registration(ID)
def test_compiles_to_one_graph(unchecked):
    x, w, mask = draw(2, 8), draw(3, 8), flags(3, 8)
    packed = pack_semi_structured(w * semi_structured_mask(w))
    torch._dynamo.reset()
    both = torch.compile(
        lambda x: (sparse_linear(x, w, mask), semi_structured_linear(x, *packed)), fullgraph=True, backend="aot_eager"
    )
    torch.testing.assert_close(both(x), (sparse_linear(x, w, mask), semi_structured_linear(x, *packed)))


@pytest.mark.registration(ID)
def test_torchs_beta_note_stays_here():
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        csr_linear(draw(2, 4), to_csr(draw(3, 4)))
    assert not heard


@pytest.mark.registration(ID)
def test_csr_under_autocast_and_on_meta():
    x, w = draw(2, 4).float(), draw(3, 4).float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = csr_linear(x, to_csr(w))
    torch.testing.assert_close(y, x @ w.T)
    meta = torch.sparse_csr_tensor(
        torch.zeros(4, dtype=torch.int32, device="meta"),
        torch.zeros(0, dtype=torch.int32, device="meta"),
        torch.zeros(0, device="meta"),
        (3, 4),
        check_invariants=False,
    )
    assert csr_linear(x.to("meta"), meta).shape == (2, 3)


# ---------------------------------------------------------------- refusals
@pytest.mark.refusal(ID)
@pytest.mark.parametrize("backend", BACKENDS)
def test_masked_refuses_what_does_not_fit(backend):
    x, w, mask = draw(2, 5), draw(3, 5), flags(3, 5)
    for bad, values in [
        ((x, w, mask.double()), ("mask", "torch.float64")),
        ((x, w, mask.long()), ("mask", "torch.int64")),
        ((x, w, flags(1, 5)), ("mask", "(1, 5)", "(3, 5)")),
        ((x, w, [True]), ("mask", "list")),
        ((x, w, mask.to("meta")), ("mask", "meta")),
        ((draw(2, 4), w, mask), (4, 5)),
        ((x, w, mask, draw(1)), ("bias", "(1,)")),
        ((x.long(), w, mask), ("torch.int64",)),
        ((x.float(), w, mask), ("torch.float64", "torch.float32")),
    ]:
        with refuses(ShapeError, *values):
            sparse_linear(*bad, backend=backend)
    with refuses(ConfigError, "cusparse"):
        sparse_linear(x, w, mask, backend="cusparse")


@pytest.mark.refusal(ID)
def test_masks_refuse():
    for amount in (-0.1, 1.1, float("nan"), True, "0.5", None):
        with refuses(ConfigError, "amount", repr(amount)):
            magnitude_mask(draw(3, 5), amount)
    with refuses(ShapeError, "torch.int64"):
        magnitude_mask(draw(3, 5).long(), 0.5)
    with refuses(ShapeError, "mask", "(5, 3)", "(3, 5)"):
        magnitude_mask(draw(3, 5), 0.5, flags(5, 3))
    for bad in (draw(3, 5), draw(8), draw(2, 4, 4)):
        with refuses(ShapeError, tuple(bad.shape), "multiple of 4"):
            semi_structured_mask(bad)
        with refuses(ShapeError, tuple(bad.shape), "multiple of 4"):
            pack_semi_structured(bad)


@pytest.mark.refusal(ID)
def test_packed_forms_refuse():
    crowded = torch.tensor([[1.0, 2.0, 3.0, 0.0, 1.0, 0.0, 0.0, 0.0]])
    with refuses(ShapeError, "1 groups", "semi_structured_mask"):
        pack_semi_structured(crowded)
    values, places = pack_semi_structured(draw(3, 16) * semi_structured_mask(draw(3, 16)))
    for bad in ((values[:, :-1], places), (values, places[:, :1]), (values, places.long()), (values[:2], places),
                (values[0], places[0])):  # fmt: skip
        with refuses(ShapeError, tuple(bad[0].shape), tuple(bad[1].shape), "pack_semi_structured"):
            unpack_semi_structured(*bad)
    with refuses(ShapeError, "(2, 12)", 16):
        semi_structured_linear(draw(2, 12), values, places)
    w = to_csr(draw(3, 5))
    for args, said in [
        ((draw(2, 5), draw(3, 5)), ("torch.strided", "to_csr")),
        ((draw(2, 4), w), (4, 5)),
        ((draw(2, 5), w, draw(1)), ("bias", "(1,)")),
        ((draw(2, 5).long(), w), ("torch.int64",)),
        ((draw(2, 5).float(), w), ("torch.float64", "torch.float32")),
    ]:
        with refuses(ShapeError, *said):
            csr_linear(*args)
    with refuses(ShapeError, "(5,)"):
        to_csr(draw(5))
    with refuses(ShapeError, "torch.int64"):
        to_csr(draw(3, 5).long())
