"""What every convolutional block must bear: bad input, other devices and dtypes, compilation, copies."""

from __future__ import annotations

import copy
import pickle
from functools import partial

import pytest
import torch
from torch import nn

from handbook_src.errors import ConfigError, ShapeError
from handbook_src.layers.cnn.conv_block import activation
from handbook_src.layers.cnn.dense_block import DenseBlock, Transition
from handbook_src.layers.cnn.fire_module import FireModule
from handbook_src.layers.cnn.inception_module import InceptionModule
from handbook_src.layers.cnn.inverted_residual import InvertedResidual
from handbook_src.layers.cnn.residual_block import Bottleneck, ResidualBlock
from handbook_src.layers.cnn.se_block import SEBlock
from handbook_src.layers.convolution.conv import Conv2d
from handbook_src.layers.normalisation.norm import BatchNorm2d
from handbook_src.testing import refuses

#: Sizes of one block each, the first always the channels of the input.
BLOCKS = {
    ResidualBlock: (4, 6, 2),
    Bottleneck: (4, 8, 2),
    InvertedResidual: (4, 6, 2, 3),
    DenseBlock: (4, 2, 3),
    Transition: (4, 2),
    SEBlock: (4, 2),
    FireModule: (4, 2, 3, 3),
    InceptionModule: (4, 2, (2, 3), (2, 2), 1),
}
NORMED = [ResidualBlock, Bottleneck, InvertedResidual, DenseBlock, Transition]
IDS = (
    "residual-block", "bottleneck-block", "inverted-residual", "dense-block", "se-block", "fire-module",
    "inception-module",
)  # fmt: skip
every = pytest.mark.parametrize("kind", BLOCKS, ids=lambda kind: kind.__name__)


def build(kind, **options):
    return kind(*BLOCKS[kind], **options)


# ---------------------------------------------------------------- refusals
@pytest.mark.refusal(*IDS)
@every
def test_refuses_what_is_no_batch_of_images(kind):
    name, block = kind.__name__, build(kind)
    with refuses(ShapeError, name, "3 axes", (4, 5, 5), "batch"):
        block(torch.ones(4, 5, 5))
    with refuses(ShapeError, name, (2, 5, 6, 6), "4 features on axis 1"):
        block(torch.ones(2, 5, 6, 6))
    with refuses(ShapeError, name, torch.int64):
        block(torch.ones(2, 4, 6, 6, dtype=torch.long))
    with refuses(ShapeError, name, (2, 4, 0, 6), "pixel"):
        block(torch.ones(2, 4, 0, 6))
    with refuses(ShapeError, name, torch.float64, torch.float32):
        block(torch.ones(2, 4, 6, 6, dtype=torch.float64))


@pytest.mark.refusal(*IDS)
@every
@pytest.mark.parametrize("wrong", [0, -3, 1.5, True, float("nan"), None, "4"])
def test_refuses_sizes_that_are_none(kind, wrong):
    sizes = BLOCKS[kind]
    for i in range(min(3, len(sizes))):
        with refuses(ConfigError, kind.__name__):
            kind(*sizes[:i], wrong, *sizes[i + 1 :])


@pytest.mark.refusal("residual-block", "bottleneck-block", "inverted-residual", "dense-block")
@pytest.mark.parametrize("kind", NORMED)
@pytest.mark.parametrize("wrong", [None, BatchNorm2d(4), nn.ReLU(), 3])
def test_refuses_layers_that_are_built_already(kind, wrong):
    for name in ("norm_layer", "act_layer"):
        with refuses(ConfigError, name):
            build(kind, **{name: wrong})


@pytest.mark.refusal(*IDS)
@every
@pytest.mark.parametrize("training", [True, False])
def test_an_empty_batch_is_an_empty_answer_and_moves_no_statistic(kind, training):
    block = build(kind).train(training)
    before = {name: value.clone() for name, value in block.named_buffers() if "running" in name}
    assert block(torch.ones(0, 4, 6, 6)).shape == (0, *block.eval()(torch.ones(1, 4, 6, 6)).shape[1:])
    assert all(torch.equal(block.get_buffer(name), value) for name, value in before.items())


# ---------------------------------------------------------------- registration
@pytest.mark.registration(*IDS)
@every
@pytest.mark.parametrize("training", [True, False])
def test_compiles_to_one_graph(kind, training, unchecked, images):
    block = build(kind).train(training)
    torch._dynamo.reset()
    compiled = torch.compile(copy.deepcopy(block), fullgraph=True, backend="aot_eager")
    x = images(2, 4, 6, 5, dtype=torch.float32)
    torch.testing.assert_close(compiled(x), block(x))


@pytest.mark.registration(*IDS)
@every
def test_copies_pickles_and_state_dicts(kind, images, stir):
    block, x = stir(build(kind)).eval(), images(2, 4, 6, 5, dtype=torch.float32)
    fresh = build(kind).eval()
    fresh.load_state_dict(block.state_dict())
    for twin in (copy.deepcopy(block), pickle.loads(pickle.dumps(block)), fresh):
        torch.testing.assert_close(twin(x), block(x), rtol=0, atol=0)


@pytest.mark.registration(*IDS)
@every
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_stays_near_float32(kind, dtype, images):
    block, x = build(kind).eval(), images(2, 4, 6, 5).to(dtype)
    y = copy.deepcopy(block).to(dtype)(x)
    assert y.dtype == dtype
    torch.testing.assert_close(y.float(), block(x.float()), rtol=0.05, atol=0.05)


@pytest.mark.registration(*IDS)
@every
def test_autocast(kind, images):
    block, x = build(kind).eval(), images(2, 4, 6, 5, dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = block(x)
        block(x.bfloat16())
    torch.testing.assert_close(y.float(), block(x), rtol=0.05, atol=0.05)


@pytest.mark.registration(*IDS)
@every
def test_device_and_dtype_reach_every_tensor(kind):
    block = build(kind, device="meta", dtype=torch.bfloat16)
    for tensor in (*block.parameters(), *block.buffers()):
        assert tensor.device.type == "meta"
        assert tensor.dtype in (torch.bfloat16, torch.int64)
    y = block.eval()(torch.ones(2, 4, 6, 5, device="meta", dtype=torch.bfloat16))
    assert y.shape == build(kind)(torch.ones(2, 4, 6, 5)).shape


@pytest.mark.registration(*IDS)
@every
def test_the_input_is_left_alone_and_may_lie_anyhow(kind, images):
    block, x = build(kind, dtype=torch.float64).eval(), images(2, 4, 6, 5)
    kept, y = x.clone(), block(x)
    assert torch.equal(x, kept)
    strided = images(2, 4, 12, 10)[:, :, ::2, ::2].copy_(x)
    for other in (x.to(memory_format=torch.channels_last), x.mT.contiguous().mT, strided):
        torch.testing.assert_close(block(other), y)


@pytest.mark.registration(*IDS)
@every
def test_gradients_of_gradients(kind, images):
    """Softplus where the paper has ReLU: finite differences need a smooth function."""
    options = {} if kind is InceptionModule else {"act_layer": nn.Softplus}
    block = build(kind, dtype=torch.float64, **options).eval()
    x = images(1, 4, 3, 2).requires_grad_()
    assert torch.autograd.gradcheck(block, x)
    assert torch.autograd.gradgradcheck(block, x)


@pytest.mark.registration(*IDS)
@every
def test_repr_names_the_parts(kind):
    assert "4" in repr(build(kind))


@pytest.mark.refusal(*IDS)
@every
def test_refuses_another_device(kind):
    with refuses(ShapeError, kind.__name__, "device", "meta", "cpu"):
        build(kind)(torch.ones(2, 4, 6, 6, device="meta"))
    with refuses(ShapeError, kind.__name__, torch.float64, torch.float32):
        build(kind).to("meta")(torch.ones(2, 4, 6, 6, device="meta", dtype=torch.float64))


@pytest.mark.law("residual-block", "bottleneck-block", "dense-block")
@pytest.mark.parametrize("kind", [ResidualBlock, Bottleneck, DenseBlock])
def test_he_draws_our_convolutions_like_torchs(kind):
    weights = []
    for make in (nn.Conv2d, Conv2d):
        block = build(kind, act_layer=partial(make, 4, 4, 1))
        torch.manual_seed(0)
        block.reset_parameters()
        weights.append(block.state_dict())
    torch.testing.assert_close(*weights, rtol=0, atol=0)


@pytest.mark.law("residual-block")
def test_an_activation_works_in_place_where_its_input_is_not_read_again() -> None:
    for asked, allowed in ((True, True), (True, False), (False, True)):
        assert activation(partial(nn.ReLU, inplace=asked), in_place=allowed).inplace == (asked and allowed)


@pytest.mark.law("residual-block", "bottleneck-block", "inverted-residual", "dense-block")
@pytest.mark.parametrize("options", [{}, {"preactivation": True}, {"preactivation": True, "shortcut": "none"}])
@pytest.mark.parametrize("kind", NORMED)
def test_an_activation_in_place_overwrites_nothing_that_is_read_again(kind, options, images):
    if options and kind is not ResidualBlock:
        pytest.skip("pre-activation is an option of ResidualBlock alone")
    sizes = (4, 4) if kind in (ResidualBlock, Bottleneck, InvertedResidual) else BLOCKS[kind]
    block, twin = (
        kind(*sizes, norm_layer=nn.Identity, act_layer=partial(nn.ReLU, inplace=inplace), **options)
        for inplace in (False, True)
    )
    twin.load_state_dict(block.state_dict())
    x = images(2, 4, 6, 5, dtype=torch.float32)
    given = x.clone()
    torch.testing.assert_close(twin(x), block(given))
    assert torch.equal(x, given)
    twin(x.requires_grad_()).sum().backward()  # a leaf cannot be written to
