"""Every norm against torch's, in float64, with every option; and what each averages over."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from handbook_src.errors import ConfigError, KernelUnavailable, ShapeError
from handbook_src.functional.normalisation.norm import (
    batch_norm,
    group_norm,
    instance_norm,
    layer_norm,
    rms_norm,
    standardise,
)
from handbook_src.testing import assert_batch_independent, assert_parity, refuses

BACKENDS = ["reference", "torch", "auto"]
EPS = [1e-5, 1e-1]


def draw(*shape: int, seed: int = 0, offset: float = 0.5) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 2 + offset


def affine(size: int | tuple[int, ...], weight: bool, bias: bool) -> tuple[Tensor | None, Tensor | None]:
    shape = (size,) if isinstance(size, int) else size
    return (draw(*shape, seed=1) if weight else None), (draw(*shape, seed=2) if bias else None)


AFFINE = [(True, True), (True, False), (False, False)]


# ---------------------------------------------------------------- parity
@pytest.mark.parity("layer-norm")
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("weight", "bias"), [*AFFINE, (False, True)])
@pytest.mark.parametrize(
    ("shape", "axes"), [((3, 5), 1), ((1, 1), 1), ((2, 3, 7), 1), ((2, 3, 4, 5), 3), ((9,), 1), ((4, 129), 1)]
)
def test_layer_norm_is_torchs(shape, axes, weight, bias, backend):
    normalized = shape[-axes:]
    w, b = affine(normalized, weight, bias)
    for eps in EPS:
        assert_parity(
            lambda x, w, b, e=eps: layer_norm(x, normalized, w, b, e, backend=backend),
            lambda x, w, b, e=eps: F.layer_norm(x, normalized, w, b, e),
            [draw(*shape), w, b],
        )


@pytest.mark.parity("rms-norm")
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("weight", [True, False])
@pytest.mark.parametrize("eps", [1e-6, 1e-1, None])
@pytest.mark.parametrize("shape", [(3, 5), (1, 1), (2, 3, 7), (9,), (4, 129)])
def test_rms_norm_is_torchs(shape, weight, eps, backend):
    w, _ = affine(shape[-1], weight, False)
    assert_parity(
        lambda x, w: rms_norm(x, w, eps, backend=backend),
        lambda x, w: F.rms_norm(x, x.shape[-1:], w, eps),
        [draw(*shape), w],
    )


@pytest.mark.parity("batch-norm")
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("weight", "bias"), AFFINE)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("momentum", [0.1, 1.0, 0.0])
@pytest.mark.parametrize("shape", [(5, 3), (2, 1, 1), (1, 3, 7), (3, 4, 2, 5), (2, 3, 2, 1, 3)])
def test_batch_norm_is_torchs_and_tracks_alike(shape, momentum, training, weight, bias, backend):
    w, b = affine(shape[1], weight, bias)
    ours, theirs = ([draw(shape[1], seed=3), draw(shape[1], seed=4).abs() + 0.1] for _ in range(2))
    assert_parity(
        lambda x, w, b: batch_norm(x, *ours, w, b, training, momentum, 1e-3, backend=backend),
        lambda x, w, b: F.batch_norm(x, *theirs, w, b, training, momentum, 1e-3),
        [draw(*shape), w, b],
    )
    for mine, want in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, want, rtol=1e-12, atol=1e-12)


@pytest.mark.parity("batch-norm")
def test_batch_norm_tracks_nothing_without_buffers():
    assert_parity(
        lambda x: batch_norm(x, None, None, training=True, backend="reference"),
        lambda x: F.batch_norm(x, None, None, training=True),
        [draw(6, 3, 2)],
    )


@pytest.mark.parity("instance-norm")
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("weight", "bias"), AFFINE)
@pytest.mark.parametrize("own", [True, False])
@pytest.mark.parametrize("shape", [(1, 1, 2), (2, 3, 7), (3, 4, 2, 5), (2, 3, 2, 1, 3)])
def test_instance_norm_is_torchs_and_tracks_alike(shape, own, weight, bias, backend):
    w, b = affine(shape[1], weight, bias)
    ours, theirs = ([draw(shape[1], seed=3), draw(shape[1], seed=4).abs() + 0.1] for _ in range(2))
    assert_parity(
        lambda x, w, b: instance_norm(x, *ours, w, b, own, 0.3, 1e-3, backend=backend),
        lambda x, w, b: F.instance_norm(x, *theirs, w, b, own, 0.3, 1e-3),
        [draw(*shape), w, b],
    )
    for mine, want in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, want, rtol=1e-12, atol=1e-12)


@pytest.mark.parity("group-norm")
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("weight", "bias"), AFFINE)
@pytest.mark.parametrize(
    ("shape", "groups"),
    [((2, 6), 1), ((2, 6), 3), ((2, 6), 6), ((1, 6, 5), 2), ((3, 4, 2, 5), 4), ((3, 4, 2, 5), 1), ((2, 9, 2, 1, 3), 3)],
)
def test_group_norm_is_torchs(shape, groups, weight, bias, backend):
    w, b = affine(shape[1], weight, bias)
    for eps in EPS:
        assert_parity(
            lambda x, w, b, e=eps: group_norm(x, groups, w, b, e, backend=backend),
            lambda x, w, b, e=eps: F.group_norm(x, groups, w, b, e),
            [draw(*shape), w, b],
        )


CALLS = {
    "layer-norm": lambda x, **k: layer_norm(x, x.shape[-1:], **k),
    "rms-norm": lambda x, **k: rms_norm(x, **k),
    "batch-norm": lambda x, **k: batch_norm(x, None, None, training=True, **k),
    "instance-norm": lambda x, **k: instance_norm(x, **k),
    "group-norm": lambda x, **k: group_norm(x, 2, **k),
}
ALL = pytest.mark.parametrize("call", CALLS.values(), ids=CALLS.keys())


@pytest.mark.parity("batch-norm", "layer-norm", "instance-norm", "group-norm", "rms-norm")
@ALL
@pytest.mark.parametrize("backend", BACKENDS)
def test_strides_do_not_matter(call, backend):
    dense = draw(3, 4, 5, 6)
    views = [
        dense.permute(0, 1, 3, 2),
        dense.to(memory_format=torch.channels_last),
        dense[:, :, ::2, 1::3],
        dense.flip(0),
    ]
    for view in views:
        torch.testing.assert_close(call(view, backend=backend), call(view.contiguous(), backend=backend))


@pytest.mark.parity("batch-norm", "layer-norm", "instance-norm", "group-norm", "rms-norm")
@ALL
def test_reference_is_twice_differentiable(call):
    torch.autograd.gradgradcheck(lambda x: call(x, backend="reference"), draw(2, 4, 3).requires_grad_())


@pytest.mark.registration("batch-norm", "layer-norm", "instance-norm", "group-norm", "rms-norm")
@ALL
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_the_float32_answer_rounded_once(call, backend, dtype):
    x = draw(3, 4, 50).to(dtype)
    y = call(x, backend=backend)
    assert y.dtype == dtype
    exact = call(x.float(), backend="reference")
    ulp = torch.finfo(dtype).eps
    if backend == "reference":
        torch.testing.assert_close(y.float(), exact, rtol=0.51 * ulp, atol=1e-6)
    else:  # torch's batch norm on CPUs folds mean and deviation into a scale and a shift of dtype x: 1.2 ulp of 1
        torch.testing.assert_close(y.float(), exact, rtol=ulp, atol=2 * ulp)


@pytest.mark.registration("rms-norm", "layer-norm")
@pytest.mark.parametrize("backend", BACKENDS)
def test_float16_mean_square_past_its_range_stays_finite(backend):
    x = torch.full((2, 8), 300.0, dtype=torch.float16)
    x[:, ::2] = -300.0
    assert x.square().isinf().all()  # 90000 > 65504
    for y in (rms_norm(x, backend=backend), layer_norm(x, 8, backend=backend)):
        torch.testing.assert_close(y.abs(), torch.ones_like(y))


@pytest.mark.registration("layer-norm", "rms-norm")
def test_float32_gain_on_bfloat16_activations():
    x, w = draw(3, 8).bfloat16(), draw(8, seed=1).float()
    for y, exact in [
        (rms_norm(x, w), rms_norm(x.double(), w.double())),
        (layer_norm(x, 8, w, w), layer_norm(x.double(), 8, w.double(), w.double())),
        (layer_norm(x, 8, w, w.bfloat16()), layer_norm(x.double(), 8, w.double(), w.bfloat16().double())),
    ]:
        assert y.dtype == torch.bfloat16
        torch.testing.assert_close(y.double(), exact, rtol=2**-7, atol=2**-9)


@pytest.mark.registration("batch-norm", "layer-norm", "instance-norm", "group-norm", "rms-norm")
@ALL
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_compiles_to_one_graph(call, backend, unchecked):
    x = draw(2, 4, 6)
    torch._dynamo.reset()
    compiled = torch.compile(lambda x: call(x, backend=backend), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), call(x))


# ---------------------------------------------------------------- laws
@pytest.mark.law("layer-norm", "instance-norm", "group-norm", "rms-norm")
@pytest.mark.parametrize("name", ["layer-norm", "instance-norm", "group-norm", "rms-norm"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_sample_does_not_see_its_batch(name, backend):
    assert_batch_independent(lambda x: CALLS[name](x, backend=backend), draw(5, 4, 6))


@pytest.mark.law("batch-norm")
def test_batch_norm_does_see_the_batch_in_training_only():
    x, mean, var = draw(5, 4, 6), draw(4, seed=1), draw(4, seed=2).abs()
    with pytest.raises(AssertionError, match="sample 0"):
        assert_batch_independent(CALLS["batch-norm"], x)
    assert_batch_independent(lambda x: batch_norm(x, mean, var), x)


@pytest.mark.law("batch-norm")
def test_batch_norm_in_evaluation_is_one_affine_map():
    mean, var, w, b = draw(4, seed=1), draw(4, seed=2).abs(), draw(4, seed=3), draw(4, seed=4)
    scale = w / (var + 1e-5).sqrt()
    x = draw(5, 4)
    torch.testing.assert_close(batch_norm(x, mean, var, w, b), x * scale + (b - mean * scale), rtol=1e-12, atol=1e-12)


@pytest.mark.law("group-norm", "layer-norm", "instance-norm")
@pytest.mark.parametrize("backend", BACKENDS)
def test_group_norm_spans_layer_norm_to_instance_norm(backend):
    x = draw(3, 6, 4, 5)
    torch.testing.assert_close(group_norm(x, 1, backend=backend), layer_norm(x, (6, 4, 5), backend=backend))
    torch.testing.assert_close(group_norm(x, 6, backend=backend), instance_norm(x, backend=backend))


@pytest.mark.law("group-norm", "layer-norm")
def test_one_group_is_not_layer_norm_once_the_gains_differ():
    # GroupNorm has one gain a channel, LayerNorm over (C, H, W) one a position: equal only when the latter is flat.
    x, per_channel = draw(3, 6, 4, 5), draw(6, seed=1)
    spread = per_channel[:, None, None].expand(6, 4, 5)
    torch.testing.assert_close(group_norm(x, 1, per_channel), layer_norm(x, (6, 4, 5), spread))
    assert per_channel.numel() == 6
    assert spread.numel() == 120


@pytest.mark.law("instance-norm", "batch-norm")
def test_instance_norm_is_batch_norm_of_a_batch_of_one():
    x = draw(1, 3, 4, 5)
    torch.testing.assert_close(instance_norm(x), batch_norm(x, None, None, training=True))


@pytest.mark.law("batch-norm", "layer-norm", "instance-norm", "group-norm", "rms-norm")
@ALL
def test_scaling_the_input_changes_nothing(call):
    # up to eps, which is what keeps it from being exact
    x = draw(4, 6, 5)
    torch.testing.assert_close(call(x * 1e6), call(x * 1e3), rtol=1e-9, atol=1e-9)


@pytest.mark.law("batch-norm", "layer-norm", "instance-norm", "group-norm", "rms-norm")
@ALL
def test_the_gradient_is_orthogonal_to_the_input(call):
    # d/ds norm(s x) = 0, so <x, dL/dx> = 0: what keeps weights in front of a norm from being shrunk by it
    x = (draw(4, 6, 5) * 100).requires_grad_()
    (g,) = torch.autograd.grad((call(x) * draw(4, 6, 5, seed=7)).sum(), x)
    cosine = (g * x).sum() / (g.norm() * x.norm())
    assert abs(cosine.item()) < 1e-8


@pytest.mark.law("layer-norm", "rms-norm")
def test_shift_is_removed_by_layer_norm_and_kept_by_rms_norm():
    x = draw(4, 16)
    torch.testing.assert_close(layer_norm(x + 3.0, 16), layer_norm(x, 16))
    assert not torch.allclose(rms_norm(x + 3.0), rms_norm(x), atol=0.1)


@pytest.mark.law("rms-norm", "layer-norm")
def test_rms_norm_of_a_centred_vector_is_layer_norm():
    x = draw(4, 16)
    x = x - x.mean(-1, keepdim=True)
    torch.testing.assert_close(rms_norm(x, eps=1e-5), layer_norm(x, 16), rtol=1e-12, atol=1e-12)


@pytest.mark.law("rms-norm")
@pytest.mark.parametrize("d", [1, 2, 17, 256])
def test_rms_norm_puts_vectors_on_the_sphere_of_radius_root_d(d):
    lengths = rms_norm(draw(50, d, offset=0.1), eps=1e-12).norm(dim=-1)
    torch.testing.assert_close(lengths, torch.full_like(lengths, math.sqrt(d)), rtol=1e-6, atol=0)


@pytest.mark.law("rms-norm")
def test_eps_stands_inside_the_root():
    x = torch.zeros(1, 4, dtype=torch.float64).index_fill(1, torch.tensor([0]), 1e-3)
    want = 1e-3 / math.sqrt(1e-6 / 4 + 1e-6)
    assert rms_norm(x, eps=1e-6)[0, 0].item() == pytest.approx(want, rel=1e-12)
    assert want != pytest.approx(1e-3 / (1e-3 / 2 + 1e-6), rel=0.1)  # x / (RMS + eps), a common slip


@pytest.mark.law("batch-norm", "layer-norm", "instance-norm", "group-norm", "rms-norm")
@ALL
@pytest.mark.parametrize("backend", BACKENDS)
def test_constant_input_is_finite_and_flat(call, backend):
    x = torch.full((2, 4, 3), 7.0, dtype=torch.float64, requires_grad=True)
    y = call(x, backend=backend)
    y.sum().backward()
    assert torch.isfinite(y).all()
    assert torch.isfinite(x.grad).all()
    assert y.std() < 1e-6


@pytest.mark.law("layer-norm", "group-norm", "instance-norm", "batch-norm")
def test_large_mean_does_not_cancel_the_variance():
    x = torch.randn(64, 256, generator=torch.Generator().manual_seed(0)) + 1e4  # float32 on purpose
    exact = layer_norm(x.double(), 256)
    assert (layer_norm(x, 256, backend="reference").double() - exact).abs().max() < 2e-3
    shortcut = (x - x.mean(-1, keepdim=True)) * torch.rsqrt(
        x.square().mean(-1, keepdim=True) - x.mean(-1, keepdim=True) ** 2 + 1e-5
    )
    assert not (shortcut.double() - exact).abs().max() < 1  # E[x^2] - E[x]^2 at 1e8: eight digits are gone


@pytest.mark.law("layer-norm", "instance-norm", "group-norm", "rms-norm", "batch-norm")
@pytest.mark.parametrize("backend", BACKENDS)
def test_empty_batch_comes_back_empty(backend):
    x = torch.zeros(0, 4, 3, requires_grad=True)
    stats = torch.zeros(4), torch.ones(4)
    for y in (
        layer_norm(x, 3, backend=backend),
        rms_norm(x, backend=backend),
        instance_norm(x, backend=backend),
        group_norm(x, 2, backend=backend),
        batch_norm(x, *stats, backend=backend),
        batch_norm(x, *stats, training=True, backend=backend),
    ):
        assert y.shape == x.shape
        y.sum().backward()
    assert x.grad.shape == x.shape
    assert (stats[0] == 0).all()  # no value, nothing to track
    assert (stats[1] == 1).all()


@pytest.mark.law("group-norm")
def test_one_value_per_group_is_the_bias_for_any_batch():
    b = draw(4)
    for n in (1, 2):  # torch answers the second and refuses the first
        torch.testing.assert_close(group_norm(draw(n, 4), 4, None, b), b.expand(n, 4))


def test_standardise_has_mean_0_and_variance_1():
    y = standardise(draw(4, 5, 6), (0, 2), 1e-12)
    torch.testing.assert_close(y.mean((0, 2)), torch.zeros(5, dtype=torch.float64), rtol=0, atol=1e-12)
    torch.testing.assert_close(y.var((0, 2), correction=0), torch.ones(5, dtype=torch.float64))


# ---------------------------------------------------------------- refusals
@pytest.mark.refusal("batch-norm", "layer-norm", "instance-norm", "group-norm", "rms-norm")
@ALL
def test_refuses_eps_and_dtype(call):
    for eps in (0.0, -1e-5, float("nan"), float("inf"), True, "small"):
        with refuses(ConfigError, "eps", repr(eps)):
            call(draw(2, 4, 3), eps=eps)
    with refuses(ShapeError, "torch.int64"):
        call(torch.ones(2, 4, 3, dtype=torch.int64))
    with refuses(ShapeError, "torch.complex64"):
        call(torch.ones(2, 4, 3, dtype=torch.complex64))


@pytest.mark.refusal("batch-norm", "layer-norm", "instance-norm", "group-norm", "rms-norm")
@ALL
def test_refuses_backends_by_name(call):
    with refuses(ConfigError, "cudnn"):
        call(draw(2, 4, 3), backend="cudnn")


@pytest.mark.refusal("layer-norm", "rms-norm")
def test_triton_says_what_it_lacks(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    for call in (CALLS["layer-norm"], CALLS["rms-norm"]):
        with refuses(KernelUnavailable, "CUDA"):
            call(draw(2, 4).float(), backend="triton")
        with refuses(KernelUnavailable, "float32"):
            call(draw(2, 4), backend="triton")


@pytest.mark.refusal("layer-norm", "rms-norm")
def test_refuses_features_that_do_not_fit():
    with refuses(ShapeError, (2, 5), (4,)):
        layer_norm(draw(2, 5), 4)
    with refuses(ShapeError, (5,), (3, 5)):
        layer_norm(draw(5), (3, 5))
    with refuses(ShapeError, "weight", (4,)):
        layer_norm(draw(2, 5), 5, draw(4))
    with refuses(ShapeError, "bias", (6,)):
        layer_norm(draw(2, 5), 5, None, draw(6))
    with refuses(ShapeError, "weight", (4,), (5,)):
        rms_norm(draw(2, 5), draw(4))
    with refuses(ConfigError, "normalized_shape", ()):
        layer_norm(draw(2, 5), ())
    with refuses(ConfigError, "normalized_shape", (0,)):
        layer_norm(draw(2, 5), 0)
    with refuses(ShapeError, "scalar"):
        rms_norm(draw())


@pytest.mark.refusal("batch-norm", "instance-norm", "group-norm")
def test_refuses_ranks_and_channels():
    with refuses(ShapeError, "batch_norm", (5,)):
        batch_norm(draw(5), None, None, training=True)
    with refuses(ShapeError, "instance_norm", (2, 3), "positions"):
        instance_norm(draw(2, 3))
    with refuses(ShapeError, "group_norm", (5,)):
        group_norm(draw(5), 1)
    with refuses(ShapeError, 3, (4,)):
        batch_norm(draw(2, 3), None, None, draw(4), training=True)
    with refuses(ShapeError, 3, (4,)):
        instance_norm(draw(2, 3, 5), None, None, draw(4))
    with refuses(ShapeError, 6, (4,)):
        group_norm(draw(2, 6), 2, draw(4))


@pytest.mark.refusal("batch-norm")
@pytest.mark.parametrize("backend", BACKENDS)
def test_batch_norm_refuses_a_statistic_of_one_value(backend):
    with refuses(ShapeError, "1 value per channel", (1, 3), "GroupNorm"):
        batch_norm(draw(1, 3), None, None, training=True, backend=backend)
    with refuses(ConfigError, "running_mean"):
        batch_norm(draw(4, 3), None, None, backend=backend)
    with refuses(ConfigError, "running_var"):
        batch_norm(draw(4, 3), draw(3), None, training=True, backend=backend)


@pytest.mark.refusal("instance-norm")
@pytest.mark.parametrize("backend", BACKENDS)
def test_instance_norm_refuses_one_position(backend):
    with refuses(ShapeError, "1 value per channel", (4, 3, 1, 1)):
        instance_norm(draw(4, 3, 1, 1), backend=backend)
    with refuses(ConfigError, "running_mean"):
        instance_norm(draw(4, 3, 2), use_input_stats=False, backend=backend)


@pytest.mark.refusal("group-norm")
def test_group_norm_refuses_groups_that_do_not_divide():
    with refuses(ShapeError, 6, 4, [1, 2, 3, 6]):
        group_norm(draw(2, 6), 4)
    for groups in (0, True, 2.0):
        with refuses(ConfigError, "num_groups", repr(groups)):
            group_norm(draw(2, 6), groups)


@pytest.mark.refusal("batch-norm", "instance-norm", "rms-norm")
def test_shares_and_counts_of_axes_are_numbers():
    stats = torch.zeros(3), torch.ones(3)
    for momentum in (1.5, True, "slow"):
        with refuses(ConfigError, "batch_norm momentum", repr(momentum)):
            batch_norm(draw(2, 3), *stats, training=True, momentum=momentum)
        with refuses(ConfigError, "instance_norm momentum", repr(momentum)):
            instance_norm(draw(2, 3, 4), *stats, momentum=momentum)
    for axes in (0, True, 1.0):
        with refuses(ConfigError, "axes", repr(axes)):
            rms_norm(draw(2, 3), axes=axes)


@pytest.mark.parametrize("backend", BACKENDS)
def test_instance_norm_of_no_samples_leaves_the_running_statistics(backend):
    mean, var = draw(3), draw(3).square()
    before = mean.clone(), var.clone()
    assert instance_norm(draw(0, 3, 4), mean, var, backend=backend).shape == (0, 3, 4)
    torch.testing.assert_close((mean, var), before, rtol=0, atol=0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_batch_norm_of_no_channels_is_empty(backend):
    assert batch_norm(draw(2, 0), None, None, training=True, backend=backend).shape == (2, 0)


@pytest.mark.refusal("batch-norm", "layer-norm", "instance-norm", "group-norm")
def test_refuses_no_eps():
    x = draw(2, 4, 3)
    with refuses(ConfigError, "layer_norm eps", None):
        layer_norm(x, 3, eps=None)
    with refuses(ConfigError, "batch_norm eps", None):
        batch_norm(x, None, None, training=True, eps=None)
    with refuses(ConfigError, "instance_norm eps", None):
        instance_norm(x, eps=None)
    with refuses(ConfigError, "group_norm eps", None):
        group_norm(x, 2, eps=None)
