"""Residual blocks are torchvision's, transformers' and timm's, and the formulas of their papers."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from handbook_src.errors import ConfigError
from handbook_src.layers.cnn.residual_block import Bottleneck, ResidualBlock
from handbook_src.testing import assert_parity, oracle, refuses

SHAPES = [(2, 8, 7, 5), (1, 8, 4, 6)]


def torchvisions(kind, inputs, outputs, stride, **options):
    """torchvision's block; there the caller makes the shortcut."""
    resnet = oracle.load("torchvision.models.resnet")
    build = getattr(resnet, kind)
    shortcut = None
    if stride != 1 or inputs != outputs:
        shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))
    return build(inputs, outputs // build.expansion, stride, shortcut, **options)


# ---------------------------------------------------------------- outside
@pytest.mark.outside("residual-block")
@pytest.mark.parity("residual-block")
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("outputs", "stride"), [(8, 1), (8, 2), (12, 1), (12, 2), (4, 3)])
@pytest.mark.parametrize("training", [True, False])
def test_residual_block_is_torchvisions(shape, outputs, stride, training, same_block):
    mine, theirs = ResidualBlock(8, outputs, stride), torchvisions("BasicBlock", 8, outputs, stride)
    assert list(mine.state_dict()) == list(theirs.state_dict())
    same_block(mine, theirs, shape, training=training)


@pytest.mark.outside("bottleneck-block")
@pytest.mark.parity("bottleneck-block")
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("outputs", "stride"), [(8, 1), (8, 2), (16, 1), (16, 2)])
@pytest.mark.parametrize(("width", "groups", "base_width"), [(None, 1, 64), (4, 1, 128), (8, 4, 64), (4, 2, 64)])
@pytest.mark.parametrize("training", [True, False])
def test_bottleneck_is_torchvisions(shape, outputs, stride, width, groups, base_width, training, same_block):
    theirs = torchvisions("Bottleneck", 8, outputs, stride, groups=groups, base_width=base_width)
    width = None if width is None else theirs.conv2.out_channels
    mine = Bottleneck(8, outputs, stride, width=width, groups=groups)
    assert list(mine.state_dict()) == list(theirs.state_dict())
    same_block(mine, theirs, shape, training=training)


@pytest.mark.outside("residual-block", "bottleneck-block")
@pytest.mark.parametrize("kind", ["basic", "bottleneck", "bottleneck of the paper"])
@pytest.mark.parametrize(("outputs", "stride"), [(8, 1), (16, 2)])
@pytest.mark.parametrize("training", [True, False])
def test_they_are_transformers(kind, outputs, stride, training, same_block):
    published = oracle.load("transformers.models.resnet.modeling_resnet")
    if kind == "basic":
        mine, theirs = ResidualBlock(8, outputs, stride), published.ResNetBasicLayer(8, outputs, stride)
    else:
        first = kind != "bottleneck"
        theirs = published.ResNetBottleNeckLayer(8, outputs, stride, downsample_in_bottleneck=first)
        mine = Bottleneck(8, outputs, (stride, 1) if first else stride)
    if not isinstance(theirs.shortcut, nn.Identity):  # theirs comes first, ours last
        shortcut = theirs.shortcut
        del theirs.shortcut
        theirs.shortcut = shortcut
    same_block(mine, theirs, (2, 8, 7, 5), training=training)


@pytest.mark.outside("residual-block")
@pytest.mark.parametrize(("outputs", "stride"), [(8, 1), (16, 1), (16, 2)])
@pytest.mark.parametrize("training", [True, False])
def test_preactivation_is_timms(outputs, stride, training, same_block):
    timm = oracle.load("timm.models.resnetv2")
    act = partial(oracle.load("timm.layers").BatchNormAct2d, eps=1e-5)
    conv = partial(oracle.load("timm.layers").create_conv2d, bias=False)
    theirs = timm.PreActBasic(
        8, outputs, stride=stride, conv_layer=conv, norm_layer=act, proj_layer=timm.DownsampleConv
    )
    mine = ResidualBlock(8, outputs, stride, preactivation=True)
    order = ["conv1", "norm1", "conv2", "norm2", *(["downsample"] if theirs.downsample is not None else [])]
    for name in order:  # registered again, in our order
        theirs._modules[name] = theirs._modules.pop(name)
    same_block(mine, theirs, (2, 8, 7, 5), training=training)


# ---------------------------------------------------------------- parity
def batch_norm(x, gain, bias):
    mean, var = x.mean((0, 2, 3), keepdim=True), x.var((0, 2, 3), correction=0, keepdim=True)
    return (x - mean) / (var + 1e-5).sqrt() * gain[:, None, None] + bias[:, None, None]


def convolved(x, weight, stride=1):
    """A convolution as a sum over shifts of the padded image."""
    side = weight.shape[-1]
    x = F.pad(x, [side // 2] * 4)
    rows, columns = x.shape[2] - side + 1, x.shape[3] - side + 1
    y = 0
    for i in range(side):
        for j in range(side):
            seen = x[:, :, i : i + rows : stride, j : j + columns : stride]
            y = y + torch.einsum("bchw,oc->bohw", seen, weight[:, :, i, j])
    return y


@pytest.mark.parity("residual-block")
@pytest.mark.parametrize("preactivation", [False, True])
@pytest.mark.parametrize("shortcut", ["projection", "pad", "none"])
@pytest.mark.parametrize(("outputs", "stride"), [(3, 1), (3, 2), (5, 1), (5, 2)])
def test_residual_block_is_its_formula(preactivation, shortcut, outputs, stride, images, stir):
    block = stir(ResidualBlock(3, outputs, stride, shortcut=shortcut, preactivation=preactivation, dtype=torch.float64))

    def written_out(x):
        w = dict(block.named_parameters())
        ready = batch_norm(x, w["bn1.weight"], w["bn1.bias"]).relu() if preactivation else x
        y = convolved(ready, w["conv1.weight"], stride)
        gain, bias = (w["bn2.weight"], w["bn2.bias"]) if preactivation else (w["bn1.weight"], w["bn1.bias"])
        y = convolved(batch_norm(y, gain, bias).relu(), w["conv2.weight"])
        if not preactivation:
            y = batch_norm(y, w["bn2.weight"], w["bn2.bias"])
        if "downsample.0.weight" in w:
            s = convolved(ready, w["downsample.0.weight"], stride)
            s = s if preactivation else batch_norm(s, w["downsample.1.weight"], w["downsample.1.bias"])
        else:
            s = torch.cat([x[:, :, ::stride, ::stride], 0 * y[:, 3:]], 1)
        y = y if shortcut == "none" else y + s
        return y if preactivation else y.relu()

    assert_parity(block, written_out, [images(2, 3, 5, 4)])


@pytest.mark.parity("bottleneck-block")
@pytest.mark.parametrize("stride", [1, 2, (2, 1), (1, 2), (2, 2)])
@pytest.mark.parametrize("act_layer", [nn.ReLU, nn.SiLU])
def test_bottleneck_is_its_formula(stride, act_layer, images, stir):
    block = stir(Bottleneck(3, 8, stride, act_layer=act_layer, dtype=torch.float64))
    first, second = stride if isinstance(stride, tuple) else (1, stride)
    act = act_layer()

    def written_out(x):
        w = dict(block.named_parameters())
        y = x
        for i, step in ((1, first), (2, second), (3, 1)):
            y = batch_norm(convolved(y, w[f"conv{i}.weight"], step), w[f"bn{i}.weight"], w[f"bn{i}.bias"])
            y = act(y) if i < 3 else y
        s = convolved(x, w["downsample.0.weight"], first * second)
        return act(y + batch_norm(s, w["downsample.1.weight"], w["downsample.1.bias"]))

    assert_parity(block, written_out, [images(2, 3, 7, 6)])


@pytest.mark.parity("residual-block", "bottleneck-block")
@pytest.mark.parametrize("build", [ResidualBlock, Bottleneck])
def test_without_a_norm_the_convolutions_have_biases(build, images):
    normed, plain = build(4, 8), build(4, 8, norm_layer=nn.Identity)
    assert not [n for n, _ in normed.named_parameters() if n.startswith("conv") and n.endswith("bias")]
    assert {n for n, _ in plain.named_parameters() if n.endswith("bias")} >= {"conv1.bias", "conv2.bias"}
    grouped = build(4, 8, norm_layer=lambda c: nn.GroupNorm(2, c))
    assert isinstance(grouped.bn2, nn.GroupNorm)
    assert plain(images(1, 4, 3, 3, dtype=torch.float32)).shape == (1, 8, 3, 3)


# ---------------------------------------------------------------- laws
@pytest.mark.law("residual-block", "bottleneck-block")
@pytest.mark.parametrize("build", [ResidualBlock, Bottleneck])
def test_a_silent_branch_leaves_the_identity(build, images):
    """The last gain at zero: ReLU of the input, and its gradient passes untouched."""
    block = build(8, 8)
    nn.init.zeros_((block.bn3 if build is Bottleneck else block.bn2).weight)
    x = images(2, 8, 5, 5, dtype=torch.float32).requires_grad_()
    y = block(x)
    torch.testing.assert_close(y, x.relu(), rtol=0, atol=0)
    (g,) = torch.autograd.grad(y.sum(), x)
    torch.testing.assert_close(g, (x > 0).float(), rtol=0, atol=0)


@pytest.mark.law("residual-block")
def test_preactivation_blocks_add_up(images):
    """Through any number of them the output is the input plus what each adds: eq. 4 of He et al. 2016."""
    blocks = nn.Sequential(*[ResidualBlock(4, 4, preactivation=True, dtype=torch.float64) for _ in range(5)]).eval()
    x = images(2, 4, 5, 5)
    total, seen = x, x
    for block in blocks:
        without = block.conv2(block.act(block.bn2(block.conv1(block.act(block.bn1(seen))))))
        total, seen = total + without, block(seen)
    torch.testing.assert_close(blocks(x), total)


@pytest.mark.law("residual-block")
def test_the_padded_shortcut_keeps_every_channel(images):
    block = ResidualBlock(3, 5, 2, shortcut="pad", preactivation=True)
    nn.init.zeros_(block.conv2.weight)
    x = images(1, 3, 7, 5, dtype=torch.float32)
    y = block(x)
    assert torch.equal(y[:, :3], x[:, :, ::2, ::2])
    assert not y[:, 3:].any()
    assert len(list(ResidualBlock(3, 5, 2, shortcut="pad").parameters())) == 6  # none for the shortcut


@pytest.mark.law("bottleneck-block")
@pytest.mark.parametrize(("width", "groups"), [(6, 1), (6, 3), (12, 2)])
@pytest.mark.parametrize(("inputs", "outputs"), [(24, 24), (5, 24)])
def test_a_bottlenecks_weights_are_their_closed_form(width, groups, inputs, outputs):
    block = Bottleneck(inputs, outputs, width=width, groups=groups)
    weights = inputs * width + 9 * width * width // groups + width * outputs
    weights += inputs * outputs if inputs != outputs else 0
    assert sum(p.numel() for p in block.parameters() if p.ndim == 4) == weights


@pytest.mark.law("bottleneck-block")
def test_the_papers_stride_looks_at_a_quarter_of_the_pixels(images):
    """Why v1.5 moved it: at (2, 1) three of four pixels reach neither branch."""
    x = images(1, 4, 6, 6).requires_grad_()
    for stride, share in (((2, 1), 0.25), ((1, 2), 1.0)):
        block = Bottleneck(4, 8, stride, act_layer=nn.Softplus, dtype=torch.float64).eval()
        (g,) = torch.autograd.grad(block(x).square().sum(), x)
        assert (g.abs().sum(1) > 0).double().mean() == share


@pytest.mark.law("residual-block", "bottleneck-block")
@pytest.mark.parametrize("build", [ResidualBlock, Bottleneck])
def test_he_initialisation(build):
    torch.manual_seed(0)
    block = build(256, 256)
    for conv in (m for m in block.modules() if isinstance(m, nn.Conv2d)):
        fan_out = conv.out_channels * conv.kernel_size[0] ** 2
        assert abs(conv.weight.std() * (fan_out / 2) ** 0.5 - 1) < 0.05
    block.bn1.weight.data.fill_(3.0)
    block.reset_parameters()
    assert (block.bn1.weight == 1).all()


# ---------------------------------------------------------------- refusals
@pytest.mark.refusal("residual-block")
def test_residual_block_refuses():
    with refuses(ConfigError, "shortcut", "'identity'", "projection"):
        ResidualBlock(4, 4, shortcut="identity")
    with refuses(ConfigError, "'pad' from 8 to 4"):
        ResidualBlock(8, 4, shortcut="pad")


@pytest.mark.refusal("bottleneck-block")
def test_bottleneck_refuses():
    with refuses(ConfigError, "width", 0):
        Bottleneck(4, 3)
    with refuses(ConfigError, "groups", "3 for 4 channels", [1, 2, 4]):
        Bottleneck(4, 16, groups=3)
    with refuses(ConfigError, "groups", 0):
        Bottleneck(4, 16, groups=0)
    for stride in ((1, 2, 3), (0, 1), (1, 0), (2,), 1.5, True, None, ()):
        with refuses(ConfigError, "Bottleneck stride"):
            Bottleneck(4, 16, stride)
