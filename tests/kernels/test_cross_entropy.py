"""Fused cross-entropy, in the interpreter: one block and many, forward and backward, in three dtypes."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from handbook_src.errors import KernelUnavailable, ShapeError
from handbook_src.functional.losses.cross_entropy import cross_entropy
from handbook_src.kernels import cross_entropy as kernels
from handbook_src.kernels.cross_entropy import cross_entropy_triton
from handbook_src.testing import refuses, relative_error

# Relative l2 error against float64 of the gradient: half a place of the dtype. The loss itself is float32 inside.
ALLOWED = {torch.float32: 1e-6, torch.bfloat16: 4e-3, torch.float16: 6e-4}
DTYPES = list(ALLOWED)


@pytest.fixture(params=["whole", "blocks"])
def path(request, monkeypatch):
    """A row in one block of columns, and in blocks of 16."""
    if request.param == "blocks":
        monkeypatch.setattr(kernels, "BLOCK", 16)
        monkeypatch.setattr(kernels, "TILE", 16)
    return request.param


def drawn(rows, cols, dtype=torch.float32, ignored=None):
    target = torch.randint(cols, (rows,))
    if ignored is not None:
        target[1::3] = ignored
    return (3 * torch.randn(rows, cols)).to(dtype), target


def agree(x, target, **options):
    """Compare losses and gradient with torch's in float64, for a gradient that differs from row to row."""
    x = x.detach().requires_grad_()
    wide = x.detach().double().requires_grad_()
    loss, _ = cross_entropy_triton(x, target, **options)
    z_loss = options.pop("z_loss", 0.0)
    want = F.cross_entropy(wide, target, reduction="none", **options)
    if z_loss:
        want = want + z_loss * wide.logsumexp(-1).square() * (target != options.get("ignore_index", -100))
    down = torch.randn(len(target))
    assert relative_error(loss, want) < 1e-6
    (got,) = torch.autograd.grad(loss, x, down)
    (grad,) = torch.autograd.grad(want, wide, down.double())
    assert got.dtype == x.dtype
    assert relative_error(got, grad) <= ALLOWED[x.dtype]


@pytest.mark.parity("softmax")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "options",
    [{}, {"label_smoothing": 0.1}, {"ignore_index": 2}, {"z_loss": 1e-2}, {"label_smoothing": 1.0, "z_loss": 0.1}],
    ids=str,
)
def test_every_option(options, dtype, path, guards):
    agree(*drawn(5, 37, dtype, options.get("ignore_index")), **options)


@pytest.mark.parity("softmax")
@pytest.mark.parametrize("cols", [1, 2, 15, 16, 17, 33])
def test_ragged_vocabularies(cols, path, guards):
    x, target = drawn(3, cols)
    if cols == 1:  # the loss is exactly zero, and so is its gradient
        x.requires_grad_()
        loss, _ = cross_entropy_triton(x, target)
        loss.sum().backward()
        assert loss.abs().max() == 0
        assert x.grad.abs().max() == 0
    else:
        agree(x, target, label_smoothing=0.1)


@pytest.mark.parity("softmax")
@pytest.mark.parametrize("rows", [1, 127, 128, 129])
def test_ragged_tiles(rows, guards):
    agree(*drawn(rows, 10, ignored=-100))


@pytest.mark.law("softmax")
def test_online_softmax_is_the_two_pass_one_in_any_order(path):
    """The running maximum may rise at every block, or never: the log-sum-exp is the same."""
    x = torch.linspace(-80, 80, 65)[None] * torch.tensor([[1.0], [-1.0], [0.0], [1e3]])
    _, lse = cross_entropy_triton(x, torch.zeros(4, dtype=torch.long))
    torch.testing.assert_close(lse.double(), x.double().logsumexp(-1), rtol=1e-6, atol=0.0)


@pytest.mark.law("softmax")
@pytest.mark.parametrize("shift", [-1e4, 3e4])
def test_a_shift_changes_nothing(shift, path):
    x, target = drawn(3, 40)
    x = x.round(decimals=1)
    got = cross_entropy_triton(x + shift, target)[0]
    torch.testing.assert_close(got, cross_entropy_triton(x, target)[0], rtol=0, atol=1e-2)


@pytest.mark.law("softmax")
def test_masked_classes_weigh_nothing(path):
    """A logit of -inf, or of the least float32, in the first block and beyond; a row of nothing else."""
    for least in (-torch.inf, torch.finfo(torch.float32).min):
        x, target = drawn(3, 40)
        target[:] = 39
        x[0, :20], x[1, 20:39], x[2, :39] = least, least, least
        agree(x, target)
    x = torch.full((1, 40), torch.finfo(torch.float32).min)
    torch.testing.assert_close(cross_entropy_triton(x, torch.zeros(1, dtype=torch.long))[1], x[:, 0])


@pytest.mark.law("softmax")
def test_ignored_rows_are_not_looked_at(path, guards):
    x, target = drawn(4, 20)
    target[1:3] = -100
    x[1:3] = torch.nan
    x.requires_grad_()
    loss, lse = cross_entropy_triton(x, target, label_smoothing=0.1, z_loss=0.1)
    loss.sum().backward()
    for t in (loss, lse, x.grad):
        assert t.isfinite().all()
        assert torch.equal(t[1:3], torch.zeros_like(t[1:3]))


@pytest.mark.law("softmax")
@pytest.mark.parametrize("wrong", [-1, 20, 2**40, -(2**40)])
def test_a_target_outside_reads_nothing_and_says_nan(wrong, path):
    x, target = drawn(3, 20)
    target[1] = wrong
    x.requires_grad_()
    loss, _ = cross_entropy_triton(x, target)
    loss.sum().backward()
    assert loss.isnan().tolist() == [False, True, False]
    assert x.grad.isnan().all(-1).tolist() == [False, True, False]


@pytest.mark.law("softmax")
def test_nan_comes_through(path):
    x, target = drawn(2, 40)
    x[0, 30] = torch.nan
    x.requires_grad_()
    loss, _ = cross_entropy_triton(x, target)
    loss.sum().backward()
    assert loss.isnan().tolist() == [True, False]
    assert x.grad.isnan().any(-1).tolist() == [True, False]


@pytest.mark.law("softmax")
def test_layouts_and_reductions(guards):
    """Strided rows are read in place; a class axis in the middle is moved; one gradient is expanded to all rows."""
    wide, target = torch.randn(6, 40), torch.randint(9, (6,))
    agree(wide[:, 5:14], target)
    agree(wide[:, :18:2], target)
    x, target = torch.randn(2, 7, 3), torch.randint(7, (2, 3))
    target[0, 1] = -100
    for reduction in ("none", "mean", "sum"):
        a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
        got = cross_entropy(a, target, reduction=reduction, backend="triton")
        want = F.cross_entropy(b, target, reduction=reduction)
        torch.testing.assert_close(got, want)
        (got * got).sum().backward()
        (want * want).sum().backward()
        torch.testing.assert_close(a.grad, b.grad)


@pytest.mark.law("softmax")
def test_no_rows_and_all_rows_ignored():
    x = torch.randn(0, 5, requires_grad=True)
    none = torch.zeros(0, dtype=torch.long)
    assert cross_entropy(x, none, backend="triton").isnan()
    cross_entropy(x, none, reduction="sum", backend="triton").backward()
    assert x.grad.shape == (0, 5)
    assert cross_entropy(torch.randn(2, 5), torch.full((2,), -100), backend="triton").isnan()


@pytest.mark.law("softmax")
def test_addresses_past_two_to_the_31():
    """Row 1 starts at element 2^31; only two pages are touched."""
    x = torch.empty(2**31 + 8, dtype=torch.float16).as_strided((2, 8), (2**31, 1))
    x.copy_(torch.randn(2, 8))
    target = torch.tensor([3, 5])
    want = F.cross_entropy(x.float(), target, reduction="none")
    torch.testing.assert_close(cross_entropy_triton(x, target)[0], want)


@pytest.mark.law("softmax")
def test_inputs_are_left_alone():
    x, target = drawn(4, 17)
    before = x.clone(), target.clone()
    agree(x, target)
    assert torch.equal(x, before[0])
    assert torch.equal(target, before[1])


@pytest.mark.law("softmax")
def test_every_plan_fits_a_gpu():
    for rows in (1, 3, 10**6):
        for cols in (1, 10, 2047, 4096, 4097, 131072):
            for widest in (kernels.BLOCK, kernels.TILE):
                high, block, warps = kernels.plan(rows, cols, widest)
                assert high * block <= 32 * 32 * warps  # elements a thread
                assert block >= cols or high == 1
                assert warps in (1, 2, 4, 8)


# --- registration


@pytest.mark.registration("softmax")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_opcheck(dtype):
    x, target = drawn(3, 9, dtype)
    torch.library.opcheck(kernels._cross_entropy, (x.requires_grad_(), target, -100, 0.1, 0.0))
    one = torch.ones(3)
    torch.library.opcheck(kernels._cross_entropy_backward, (x.detach(), target, one, one, -100, 0.0, 0.1))


@pytest.mark.registration("softmax")
def test_compile_sees_one_graph(unchecked):
    def step(x, target):
        return cross_entropy(x, target, label_smoothing=0.1, backend="triton")

    x, target = drawn(3, 9)
    x.requires_grad_()
    results = []
    for run in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
        total = run(x, target)
        results.append([total, *torch.autograd.grad(total, x)])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.refusal("softmax")
def test_a_second_derivative_is_refused():
    x, target = drawn(3, 9)
    x.requires_grad_()
    (g,) = torch.autograd.grad(cross_entropy_triton(x, target)[0].sum(), x, create_graph=True)
    with refuses(KernelUnavailable, "second derivative", "backend='reference'"):
        g.square().sum().backward()


@pytest.mark.refusal("softmax")
def test_what_does_not_fit_is_refused(monkeypatch):
    x, target = drawn(3, 9)
    with refuses(ShapeError, "(2,)", "(3,)"):
        cross_entropy_triton(x, target[:2])
    with refuses(ShapeError, "torch.int32", "torch.int64"):
        cross_entropy_triton(x, target.int())
    with refuses(ShapeError, "torch.float64", "reference"):
        cross_entropy_triton(x.double(), target)
    with refuses(ShapeError, "(3, 0)"):
        cross_entropy_triton(x[:, :0], target)
    monkeypatch.delenv("TRITON_INTERPRET")
    with refuses(KernelUnavailable, "cpu", "TRITON_INTERPRET"):
        cross_entropy_triton(x, target)
