"""The norm layers drop in for torch's: same arguments, outputs, gradients, buffers and state dict."""

from __future__ import annotations

import copy
import inspect

import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import update_bn

from handbook_src.errors import ConfigError, ShapeError
from handbook_src.layers.normalisation import norm as ours
from handbook_src.testing import assert_parity, refuses

RUNNING = {
    "BatchNorm1d": [(5, 3), (4, 3, 7)],
    "BatchNorm2d": [(2, 3, 4, 5), (1, 3, 2, 1)],
    "BatchNorm3d": [(2, 3, 1, 4, 5)],
    "InstanceNorm1d": [(4, 3, 7), (3, 7)],
    "InstanceNorm2d": [(2, 3, 4, 5), (3, 4, 5)],
    "InstanceNorm3d": [(2, 3, 1, 4, 5), (3, 2, 4, 5)],
}
CASES = [(name, shape) for name, shapes in RUNNING.items() for shape in shapes]
EVERY = {
    "BatchNorm1d": ((6,), (4, 6)),
    "BatchNorm2d": ((6,), (4, 6, 3, 2)),
    "BatchNorm3d": ((6,), (4, 6, 3, 2, 2)),
    "InstanceNorm1d": ((6,), (4, 6, 5)),
    "InstanceNorm2d": ((6,), (4, 6, 3, 2)),
    "InstanceNorm3d": ((6,), (4, 6, 3, 2, 2)),
    "GroupNorm": ((3, 6), (4, 6, 5)),
    "LayerNorm": ((6,), (4, 5, 6)),
    "RMSNorm": ((6,), (4, 5, 6)),
}
IDS = ("batch-norm", "instance-norm", "group-norm", "layer-norm", "rms-norm")


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 2 + 0.5


def pair(name: str, *args: object, backend: str = "auto", **options: object) -> tuple[nn.Module, nn.Module]:
    """Our layer and torch's, in float64, with the same random parameters."""
    mine, theirs = getattr(ours, name)(*args, backend=backend, **options), getattr(nn, name)(*args, **options)
    for i, p in enumerate(theirs.parameters()):
        p.data = torch.randn(p.shape, generator=torch.Generator().manual_seed(i))
    mine.load_state_dict(theirs.state_dict())
    return mine.double(), theirs.double()


def same(mine: nn.Module, theirs: nn.Module, x: Tensor) -> None:
    assert_parity(mine, theirs, [x], parameters=list(zip(mine.parameters(), theirs.parameters(), strict=True)))
    for (name, a), (_, b) in zip(mine.named_buffers(), theirs.named_buffers(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12, msg=lambda m, n=name: f"{n}: {m}")


# ---------------------------------------------------------------- parity
@pytest.mark.parity("batch-norm", "instance-norm")
@pytest.mark.parametrize("name", ["BatchNorm1d", "InstanceNorm1d"])
def test_one_channel_is_enough(name):
    same(*pair(name, 1, affine=True), draw(4, 1, 5))


@pytest.mark.parity("batch-norm", "instance-norm")
@pytest.mark.parametrize(("name", "shape"), CASES)
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("track", [True, False])
@pytest.mark.parametrize("momentum", [0.1, 0.7, None])
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_running_norms_are_torchs_over_steps(name, shape, affine, track, momentum, backend):
    mine, theirs = pair(name, 3, eps=1e-3, momentum=momentum, affine=affine, track_running_stats=track, backend=backend)
    for step in range(3):
        same(mine, theirs, draw(*shape, seed=step))
    mine.eval(), theirs.eval()
    same(mine, theirs, draw(*shape, seed=9))
    mine.train(), theirs.train()
    same(mine, theirs, draw(*shape, seed=10))


@pytest.mark.parity("layer-norm")
@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize(("normalized", "shape"), [(5, (2, 3, 5)), ((3, 5), (2, 3, 5)), ([1], (4, 1)), (7, (7,))])
@pytest.mark.parametrize("options", [{}, {"elementwise_affine": False}, {"bias": False}, {"eps": 0.1}])
def test_layer_norm_is_torchs(normalized, shape, options, backend):
    same(*pair("LayerNorm", normalized, backend=backend, **options), draw(*shape))


@pytest.mark.parity("rms-norm")
@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize(("normalized", "shape"), [(5, (2, 3, 5)), ((3, 5), (2, 3, 5)), ([1], (4, 1)), (7, (7,))])
@pytest.mark.parametrize("options", [{}, {"elementwise_affine": False}, {"eps": 0.1}, {"eps": 1e-6}])
def test_rms_norm_is_torchs(normalized, shape, options, backend):
    same(*pair("RMSNorm", normalized, backend=backend, **options), draw(*shape))


@pytest.mark.parity("group-norm")
@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("groups", [1, 2, 6])
@pytest.mark.parametrize("shape", [(2, 6), (2, 6, 5), (1, 6, 2, 3), (2, 6, 2, 1, 3)])
@pytest.mark.parametrize("options", [{}, {"affine": False}, {"eps": 0.1}])
def test_group_norm_is_torchs(groups, shape, options, backend):
    same(*pair("GroupNorm", groups, 6, backend=backend, **options), draw(*shape))


@pytest.mark.parity("batch-norm", "instance-norm", "group-norm")
@pytest.mark.parametrize("name", ["BatchNorm1d", "InstanceNorm1d", "GroupNorm"])
def test_gain_without_bias(name):
    layer = getattr(ours, name)(*EVERY[name][0], affine=True, bias=False)
    assert [n for n, _ in layer.named_parameters()] == ["weight"]
    layer.weight.data.fill_(2.0)
    plain = getattr(ours, name)(*EVERY[name][0], affine=False)
    x = draw(*EVERY[name][1]).float()
    torch.testing.assert_close(layer(x), plain(x) * 2)


BATCH_NORMS = pytest.mark.parametrize("name", ["BatchNorm1d", "BatchNorm2d", "BatchNorm3d"])


@pytest.mark.parity("batch-norm")
@BATCH_NORMS
def test_torchs_update_bn_recomputes_our_statistics(name):
    mine, theirs = pair(name, *EVERY[name][0], momentum=0.3)
    for norm in (mine, theirs):
        norm(draw(*EVERY[name][1]) + 100)  # to be forgotten
        update_bn([draw(*EVERY[name][1], seed=i) for i in range(4)], nn.Sequential(norm))
    for (key, a), b in zip(mine.state_dict().items(), theirs.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12, msg=lambda m, k=key: f"{k}: {m}")
    assert mine.momentum == 0.3


@pytest.mark.parity("batch-norm")
@BATCH_NORMS
@pytest.mark.parametrize("options", [{}, {"bias": False}, {"affine": False}, {"track_running_stats": False}])
def test_torch_converts_ours_to_sync_batch_norm(name, options):
    mine = getattr(ours, name)(*EVERY[name][0], eps=0.1, momentum=0.3, **options)
    mine(draw(*EVERY[name][1]).float())
    before = mine.state_dict()
    [there] = nn.SyncBatchNorm.convert_sync_batchnorm(nn.Sequential(mine.eval()))
    assert type(there) is nn.SyncBatchNorm
    assert (there.eps, there.momentum, there.training) == (0.1, 0.3, False)
    torch.testing.assert_close(there.state_dict(), before, rtol=0, atol=0)


# ---------------------------------------------------------------- laws
@pytest.mark.law("batch-norm")
def test_cumulative_statistics_are_the_plain_average_of_the_batches():
    layer = ours.BatchNorm1d(3, momentum=None).double()
    batches = [draw(6, 3, seed=i) for i in range(5)]
    for x in batches:
        layer(x)
    torch.testing.assert_close(layer.running_mean, torch.stack([x.mean(0) for x in batches]).mean(0))
    torch.testing.assert_close(layer.running_var, torch.stack([x.var(0) for x in batches]).mean(0))


@pytest.mark.law("batch-norm")
def test_train_and_eval_agree_once_the_statistics_have_settled():
    layer, x = ours.BatchNorm1d(3, momentum=1.0).double(), draw(4000, 3)
    trained = layer(x)
    torch.testing.assert_close(layer.eval()(x), trained, rtol=2e-3, atol=2e-3)


@pytest.mark.law("batch-norm")
def test_frozen_statistics_do_not_move():
    layer = ours.BatchNorm2d(3).eval()
    before = copy.deepcopy(layer.state_dict())
    layer(draw(2, 3, 4, 4).float())
    for key, value in layer.state_dict().items():
        assert torch.equal(value, before[key]), key


@pytest.mark.law("batch-norm")
def test_a_refused_batch_leaves_no_trace():
    layer = ours.BatchNorm1d(3)
    with refuses(ShapeError, "1 value per channel"):
        layer(torch.ones(1, 3))
    assert layer.num_batches_tracked == 0
    assert (layer.running_mean == 0).all()


@pytest.mark.law("batch-norm")
def test_reset_forgets_every_batch():
    layer = ours.BatchNorm1d(3)
    layer(draw(5, 3).float())
    layer.weight.data.fill_(3.0)
    layer.reset_running_stats()
    assert layer.num_batches_tracked == 0
    assert (layer.running_var == 1).all()
    assert (layer.weight == 3).all()
    layer.reset_parameters()
    assert (layer.weight == 1).all()


@pytest.mark.law("instance-norm")
def test_instance_norm_is_the_same_in_training_and_evaluation_unless_it_tracks():
    x = draw(2, 3, 5).float()
    plain, tracking = ours.InstanceNorm1d(3), ours.InstanceNorm1d(3, track_running_stats=True)
    torch.testing.assert_close(plain(x), plain.eval()(x))
    assert not torch.allclose(tracking(x), tracking.eval()(x), atol=0.1)


@pytest.mark.law("group-norm", "layer-norm", "instance-norm")
def test_group_norm_layer_spans_the_other_two():
    x = draw(2, 6, 4, 5).float()
    torch.testing.assert_close(ours.GroupNorm(1, 6)(x), ours.LayerNorm((6, 4, 5))(x))
    torch.testing.assert_close(ours.GroupNorm(6, 6)(x), ours.InstanceNorm2d(6)(x))


# ---------------------------------------------------------------- outside
@pytest.mark.outside("rms-norm")
@pytest.mark.parametrize("published", ["LlamaRMSNorm", "T5LayerNorm"])
def test_rms_norm_is_llamas_and_t5s(published):
    from transformers.models.llama.modeling_llama import LlamaRMSNorm
    from transformers.models.t5.modeling_t5 import T5LayerNorm

    theirs = {"LlamaRMSNorm": LlamaRMSNorm, "T5LayerNorm": T5LayerNorm}[published](48, eps=1e-6)
    mine = ours.RMSNorm(48, eps=1e-6)
    theirs.weight.data = draw(48, seed=1).float()
    mine.load_state_dict(theirs.state_dict())
    pairs = list(zip(mine.parameters(), theirs.parameters(), strict=True))
    assert_parity(mine, theirs, [draw(3, 7, 48)], parameters=pairs, dtype=torch.float32, rtol=1e-5, atol=2e-5)


@pytest.mark.outside("group-norm", "layer-norm")
def test_one_group_is_timms_and_layer_norm_over_channels_is_too():
    from timm.layers import GroupNorm1, LayerNorm2d

    x = draw(2, 6, 4, 5).float()
    torch.testing.assert_close(ours.GroupNorm(1, 6)(x), GroupNorm1(6)(x), rtol=1e-5, atol=1e-5)
    channels_last = ours.LayerNorm(6, eps=1e-6)(x.movedim(1, -1)).movedim(-1, 1)
    torch.testing.assert_close(channels_last, LayerNorm2d(6)(x), rtol=1e-5, atol=1e-5)


# ---------------------------------------------------------------- registration
@pytest.mark.registration(*IDS)
@pytest.mark.parametrize("name", EVERY)
def test_state_dicts_go_both_ways(name):
    args, shape = EVERY[name]
    mine, theirs = getattr(ours, name)(*args), getattr(nn, name)(*args)
    mine(draw(*shape).float())
    theirs.load_state_dict(mine.state_dict())
    assert list(mine.state_dict()) == list(theirs.state_dict())
    again = getattr(ours, name)(*args)
    again.load_state_dict(theirs.state_dict())
    x = draw(*shape, seed=1).float()
    torch.testing.assert_close(again.eval()(x), theirs.eval()(x))


@pytest.mark.registration(*IDS)
@pytest.mark.parametrize("name", EVERY)
def test_arguments_are_torchs_in_name_order_and_default(name):
    mine = inspect.signature(getattr(ours, name)).parameters
    theirs = inspect.signature(getattr(nn, name)).parameters
    positional = [p.name for p in theirs.values() if p.kind is p.POSITIONAL_OR_KEYWORD]
    assert [p.name for p in mine.values() if p.kind is p.POSITIONAL_OR_KEYWORD] == positional
    assert {n: mine[n].default for n in positional} == {n: theirs[n].default for n in positional}


@pytest.mark.registration(*IDS)
@pytest.mark.parametrize("name", EVERY)
def test_device_and_dtype_reach_every_tensor(name):
    layer = getattr(ours, name)(*EVERY[name][0], device="meta", dtype=torch.bfloat16)
    for tensor in (*layer.parameters(), *layer.buffers()):
        assert tensor.device.type == "meta"
        assert tensor.dtype in (torch.bfloat16, torch.int64)


@pytest.mark.registration(*IDS)
@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize("training", [True, False])
def test_compiles_to_one_graph(name, training, unchecked):
    args, shape = EVERY[name]
    layer = getattr(ours, name)(*args).train(training)
    torch._dynamo.reset()
    compiled = torch.compile(copy.deepcopy(layer), fullgraph=True, backend="aot_eager")
    x = draw(*shape).float()
    torch.testing.assert_close(compiled(x), layer(x))


@pytest.mark.registration(*IDS)
@pytest.mark.parametrize("name", EVERY)
def test_bfloat16_layer_stays_near_float32(name):
    args, shape = EVERY[name]
    x = draw(*shape).bfloat16()
    y = getattr(ours, name)(*args).bfloat16()(x)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), getattr(ours, name)(*args)(x.float()), rtol=2**-7, atol=2**-6)


@pytest.mark.registration(*IDS)
@pytest.mark.parametrize("name", EVERY)
def test_repr_names_the_sizes(name):
    assert "6" in repr(getattr(ours, name)(*EVERY[name][0]))


# ---------------------------------------------------------------- refusals
@pytest.mark.refusal(*IDS)
@pytest.mark.parametrize("name", EVERY)
def test_refuses_bad_settings(name):
    build = getattr(ours, name)
    args = EVERY[name][0]
    for eps in (0.0, -1.0, True, float("inf"), "small", *([] if name == "RMSNorm" else [None])):
        with refuses(ConfigError, name, repr(eps)):
            build(*args, eps=eps)
    with refuses(ConfigError, "cuda-graphs"):
        build(*args, backend="cuda-graphs")(draw(*EVERY[name][1]).float())


@pytest.mark.refusal("batch-norm", "instance-norm")
@pytest.mark.parametrize("name", RUNNING)
def test_refuses_momentum_rank_and_channels(name):
    build = getattr(ours, name)
    for momentum in (-0.1, 1.5, True, float("nan"), "slow"):
        with refuses(ConfigError, "momentum", repr(momentum)):
            build(3, momentum=momentum)
    for features in (0, True, 2.5, None):
        with refuses(ConfigError, "num_features", repr(features)):
            build(features)
    with refuses(ShapeError, name, (1, 2, 3, 1, 1, 1)):
        build(3)(torch.ones(1, 2, 3, 1, 1, 1))
    wrong = torch.ones(2, 5, *EVERY[name][1][2:])
    with refuses(ShapeError, name, 5, 3):
        build(3)(wrong)


@pytest.mark.refusal("group-norm")
def test_group_norm_refuses_at_construction_and_call():
    with refuses(ShapeError, 6, 4, [1, 2, 3, 6]):
        ours.GroupNorm(4, 6)
    for groups in (0, True, 2.0, "2"):
        with refuses(ConfigError, "num_groups", repr(groups)):
            ours.GroupNorm(groups, 6)
    for channels in (0, -4, True, 4.0):
        with refuses(ConfigError, "num_channels", repr(channels)):
            ours.GroupNorm(2, channels)
    with refuses(ShapeError, 8, 6):
        ours.GroupNorm(2, 6, affine=False)(torch.ones(2, 8))


@pytest.mark.refusal("layer-norm", "rms-norm")
@pytest.mark.parametrize("name", ["LayerNorm", "RMSNorm"])
def test_refuses_other_features(name):
    with refuses(ShapeError, (2, 7), (6,)):
        getattr(ours, name)(6)(torch.ones(2, 7))
    with refuses(ShapeError, (6,), (2, 6)):
        getattr(ours, name)((2, 6))(torch.ones(6))
    for wrong in ((), 0, (2, 0), True, (2, True), 2.5, "2", None):
        with refuses(ConfigError, "normalized_shape"):
            getattr(ours, name)(wrong)


@pytest.mark.refusal("batch-norm")
@BATCH_NORMS
def test_batch_norm_refuses_a_batch_of_one_value(name):
    shape = (1, 3, *[1] * (ours.__dict__[name].ranks[0] - 2))
    with refuses(ShapeError, "1 value per channel", shape, "GroupNorm"):
        getattr(ours, name)(3)(torch.ones(shape))
    assert getattr(ours, name)(3).eval()(torch.ones(shape)).shape == shape


@pytest.mark.law("batch-norm")
@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("empty", [(0, 3), (0, 3, 4), (2, 3, 0), (0, 3, 4, 2), (0, 3, 4, 2, 2)])
def test_an_empty_batch_moves_nothing_but_the_count_of_batches(empty, backend):
    for mine, theirs in [pair(f"BatchNorm{max(len(empty) - 2, 1)}d", 3, backend=backend)]:
        same(mine, theirs, torch.zeros(empty, dtype=torch.float64))
        assert mine.num_batches_tracked == theirs.num_batches_tracked == 1


@pytest.mark.parity("rms-norm")
@pytest.mark.parametrize("backend", ["auto", "torch"])
@pytest.mark.parametrize("axes", [1, 2])
def test_rms_norm_keeps_the_memory_format_as_torchs_does(axes, backend):
    x = draw(2, 3, 4, 5).to(memory_format=torch.channels_last)
    mine, theirs = pair("RMSNorm", x.shape[-axes:], backend=backend)
    assert mine(x).stride() == theirs(x).stride() == x.stride()


@pytest.mark.parametrize("versioned", [False, True])
@pytest.mark.parametrize("name", RUNNING)
def test_loads_a_state_dict_older_than_the_batch_count(name, versioned):
    options = {"affine": True, "track_running_stats": True}
    theirs, mine = getattr(nn, name)(3, **options), getattr(ours, name)(3, **options)
    for norm in (theirs, mine):
        norm.num_batches_tracked.fill_(7)
        old = getattr(nn, name)(3, **options).state_dict()
        del old["num_batches_tracked"]
        old["running_mean"].fill_(5)
        old._metadata[""]["version"] = 1
        norm.load_state_dict(old if versioned else dict(old))
    torch.testing.assert_close(mine.state_dict(), theirs.state_dict())
    new = theirs.state_dict()
    del new["num_batches_tracked"]
    with pytest.raises(RuntimeError, match="num_batches_tracked"):
        mine.load_state_dict(new)  # version 2 promises the count
