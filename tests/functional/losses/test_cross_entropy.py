"""Cross-entropy of class indices is torch's, for every option; what torch has not is the formula."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from handbook_src.errors import ConfigError, DataError, KernelUnavailable, ShapeError
from handbook_src.functional.losses.cross_entropy import cross_entropy
from handbook_src.testing import assert_parity, refuses

BACKENDS = ["auto", "reference", "torch"]
SHAPES = [(5,), (1,), (4, 7), (1, 1), (0, 7), (2, 5, 3), (2, 5, 3, 2), (2, 5, 0)]


def draw(*shape):
    return torch.randn(shape, dtype=torch.float64) * 3


def classes(shape, ignored=None):
    """Targets for logits of ``shape``; every third is ``ignored``."""
    v, rest = (shape[0], ()) if len(shape) == 1 else (shape[1], (shape[0], *shape[2:]))
    target = torch.randint(v, rest)
    if ignored is not None and target.numel() > 1:
        target.view(-1)[::3] = ignored
    return target


@pytest.mark.parity("softmax")
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_it_is_torchs_for_every_shape(shape, reduction, backend):
    for smoothing in (0.0, 0.1, 1.0):
        options = {"label_smoothing": smoothing, "reduction": reduction}
        x, y = draw(*shape), classes(shape)
        if x.numel() == 0 and reduction == "mean":  # the mean of nothing
            assert F.cross_entropy(x, y, **options).isnan()
            assert cross_entropy(x, y, backend=backend, **options).isnan()
            continue
        assert_parity(
            lambda x, y, o=options: cross_entropy(x, y, backend=backend, **o),
            lambda x, y, o=options: F.cross_entropy(x, y, **o),
            [x, y],
        )


@pytest.mark.parity("softmax")
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("ignored", [-100, -1, 3, 99])
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_ignored_rows(ignored, smoothing, reduction, backend):
    options = {"ignore_index": ignored, "label_smoothing": smoothing, "reduction": reduction}
    assert_parity(
        lambda x, y: cross_entropy(x, y, backend=backend, **options),
        lambda x, y: F.cross_entropy(x, y, **options),
        [draw(6, 5), classes((6, 5), ignored)],
    )


@pytest.mark.parity("softmax")
@pytest.mark.parametrize("backend", BACKENDS)
def test_all_ignored_is_nan_as_torchs_and_none_in_a_sum(backend):
    x, y = draw(3, 5), torch.full((3,), -100)
    assert cross_entropy(x, y, backend=backend).isnan()
    assert cross_entropy(x, y, reduction="sum", backend=backend) == 0
    assert torch.equal(cross_entropy(x, y, reduction="none", backend=backend), torch.zeros(3, dtype=torch.float64))


@pytest.mark.parity("softmax")
@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_z_loss_is_the_formula(reduction, backend):
    y = classes((4, 6), -100)

    def formula(x):
        losses = F.cross_entropy(x, y, reduction="none", label_smoothing=0.1)
        losses = losses + 0.01 * x.exp().sum(1).log() ** 2 * (y != -100)
        return {"none": losses, "sum": losses.sum(), "mean": losses.sum() / (y != -100).sum()}[reduction]

    options = {"label_smoothing": 0.1, "reduction": reduction, "z_loss": 0.01, "backend": backend}
    assert_parity(lambda x: cross_entropy(x, y, **options), formula, [draw(4, 6)])


@pytest.mark.parity("softmax")
def test_second_derivatives():
    x, y = draw(3, 4).requires_grad_(), classes((3, 4))
    for backend in BACKENDS:
        assert torch.autograd.gradgradcheck(lambda x, b=backend: cross_entropy(x, y, -100, 0.1, backend=b), x)


# ---------------------------------------------------------------- laws
@pytest.mark.law("softmax")
@pytest.mark.parametrize("backend", BACKENDS)
def test_the_gradient_is_probability_minus_target(backend):
    x, y = draw(4, 6).requires_grad_(), classes((4, 6))
    (g,) = torch.autograd.grad(cross_entropy(x, y, reduction="sum", backend=backend), x)
    torch.testing.assert_close(g, x.detach().softmax(1) - F.one_hot(y, 6))


@pytest.mark.law("softmax")
@pytest.mark.parametrize("backend", BACKENDS)
def test_large_logits_and_masked_classes(backend):
    x = torch.tensor([[1e4, -1e4, 0.0], [0.0, -torch.inf, 1.0]])
    got = cross_entropy(x, torch.tensor([1, 0]), reduction="none", backend=backend)
    torch.testing.assert_close(got, torch.tensor([2e4, 1.3132617]))


@pytest.mark.law("softmax")
@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("z_loss", [0.0, 0.1])
def test_nobody_looks_at_ignored_rows(backend, z_loss):
    for broken in (torch.nan, torch.inf, -torch.inf):
        x = torch.randn(2, 5, 3)
        x[1, 2] = broken
        x.requires_grad_()
        y = torch.tensor([[2, 0, 1], [-100, -100, -100]])
        cross_entropy(x, y, label_smoothing=0.1, z_loss=z_loss, backend=backend).backward()
        assert x.grad[0].ne(0).all()
        assert x.grad[1].eq(0).all()


@pytest.mark.registration("softmax")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_half_precision(backend, dtype):
    x, y = draw(8, 50).to(dtype), classes((8, 50))
    for reduction in ("none", "mean"):
        got = cross_entropy(x, y, label_smoothing=0.1, reduction=reduction, backend=backend)
        assert got.dtype == dtype
        want = F.cross_entropy(x.double(), y, label_smoothing=0.1, reduction=reduction)
        torch.testing.assert_close(got.double(), want, rtol=2 * torch.finfo(dtype).eps, atol=1e-2)


@pytest.mark.registration("softmax")
@pytest.mark.parametrize("integer", [torch.int32, torch.int16, torch.uint8, torch.uint16], ids=str)
def test_other_integers_and_meta_and_compile(integer, unchecked):
    x, y = draw(4, 6), classes((4, 6))
    assert torch.equal(cross_entropy(x, y.to(integer)), cross_entropy(x, y))
    assert cross_entropy(x.to("meta"), y.to("meta")).shape == ()
    compiled = torch.compile(cross_entropy, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, y), F.cross_entropy(x, y))


@pytest.mark.law("softmax")
@pytest.mark.parametrize("backend", BACKENDS)
def test_inputs_are_left_alone(backend):
    x, y = draw(4, 6), classes((4, 6), -100)
    before = x.clone(), y.clone()
    cross_entropy(x, y, label_smoothing=0.1, backend=backend)
    assert torch.equal(x, before[0])
    assert torch.equal(y, before[1])


# ---------------------------------------------------------------- refusals
@pytest.mark.refusal("softmax")
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("wrong", [-1, 6, 1000, -101])
def test_targets_outside_the_vocabulary_are_refused(wrong, backend):
    y = torch.tensor([0, wrong, 5])
    with refuses(DataError, f"class {wrong}", "0 to 5", -100):
        cross_entropy(draw(3, 6), y, backend=backend)


@pytest.mark.refusal("softmax")
def test_wrong_tensors_are_refused():
    x, y = draw(3, 6), classes((3, 6))
    with refuses(ShapeError, "torch.float64", "integer dtype"):
        cross_entropy(x, x)
    with refuses(ShapeError, "torch.bool"):
        cross_entropy(x, y > 0)
    with refuses(ShapeError, "torch.int64"):
        cross_entropy(x.long(), y)
    with refuses(ShapeError, "(2,)", "(3, 6)", "(3,)"):
        cross_entropy(x, y[:2])
    with refuses(ShapeError, "(2, 5)", "(2, 5, 6)", "(2, 6)", "flatten"):
        cross_entropy(draw(2, 5, 6), torch.zeros(2, 5, dtype=torch.long))
    with refuses(ShapeError, "()"):
        cross_entropy(x.sum(), y[0])
    with refuses(ShapeError, "(3, 0)", "one class"):
        cross_entropy(x[:, :0], y)
    with refuses(ShapeError, "meta", "cpu"):
        cross_entropy(x, y.to("meta"))


@pytest.mark.refusal("softmax")
def test_wrong_settings_are_refused(monkeypatch):
    x, y = draw(3, 6), classes((3, 6))
    for wrong in (-0.1, 1.5, float("nan")):
        with refuses(ConfigError, "label_smoothing", wrong):
            cross_entropy(x, y, label_smoothing=wrong)
    for wrong in (-1.0, float("inf"), float("nan"), True, None, "1"):
        with refuses(ConfigError, "z_loss", wrong):
            cross_entropy(x, y, z_loss=wrong)
    with refuses(ConfigError, "reduction", "average"):
        cross_entropy(x, y, reduction="average")
    for wrong in (0.5, True, None):
        with refuses(ConfigError, "ignore_index", repr(wrong)):
            cross_entropy(x, y, wrong)
    with refuses(ConfigError, "cuda", "reference"):
        cross_entropy(x, y, backend="cuda")
    with refuses(KernelUnavailable, "torch", "z_loss"):
        cross_entropy(x, y, z_loss=0.1, backend="torch")
    with refuses(KernelUnavailable, "float32"):
        cross_entropy(x, y, backend="triton")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with refuses(KernelUnavailable, "triton"):
        cross_entropy(x.float(), y, backend="triton")
