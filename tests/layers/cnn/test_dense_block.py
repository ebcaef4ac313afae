"""Dense block and transition are torchvision's, and their formulas."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from handbook_src.errors import ConfigError, ShapeError
from handbook_src.layers.cnn.dense_block import DenseBlock, Transition
from handbook_src.testing import assert_parity, oracle, refuses


@pytest.mark.outside("dense-block")
@pytest.mark.parity("dense-block")
@pytest.mark.parametrize("shape", [(2, 5, 7, 6), (1, 5, 3, 4)])
@pytest.mark.parametrize(("layers", "growth", "bn_size"), [(1, 3, 4), (3, 2, 1), (4, 3, 2)])
@pytest.mark.parametrize("training", [True, False])
def test_it_is_torchvisions(shape, layers, growth, bn_size, training, same_block):
    published = oracle.load("torchvision.models.densenet")
    mine = DenseBlock(5, layers, growth, bn_size=bn_size)
    theirs = published._DenseBlock(layers, 5, bn_size, growth, 0.0)
    assert list(mine.state_dict()) == list(theirs.state_dict())
    same_block(mine, theirs, shape, training=training)


@pytest.mark.outside("dense-block")
@pytest.mark.parametrize("training", [True, False])
def test_dropout_is_torchvisions(training, images):
    published = oracle.load("torchvision.models.densenet")
    mine, theirs = DenseBlock(5, 3, 2, dropout=0.4), published._DenseBlock(3, 5, 4, 2, 0.4)
    mine.load_state_dict(theirs.state_dict())
    x, found = images(4, 5, 6, 6, dtype=torch.float32), []
    for block in (mine, theirs):
        torch.manual_seed(3)
        found.append(block.train(training)(x))
    torch.testing.assert_close(*found)
    share = (found[0][:, 5:7] == 0).float().mean()
    assert abs(share - 0.4) < 0.1 if training else share == 0


@pytest.mark.outside("dense-block")
@pytest.mark.parametrize("shape", [(2, 6, 7, 5), (1, 6, 2, 2)])
@pytest.mark.parametrize("training", [True, False])
def test_transition_is_torchvisions(shape, training, same_block):
    published = oracle.load("torchvision.models.densenet")
    mine, theirs = Transition(6, 3), published._Transition(6, 3)
    assert list(mine.state_dict()) == list(theirs.state_dict())
    same_block(mine, theirs, shape, training=training)


def batch_norm(x, norm):
    mean, var = x.mean((0, 2, 3), keepdim=True), x.var((0, 2, 3), correction=0, keepdim=True)
    return (x - mean) / (var + 1e-5).sqrt() * norm.weight[:, None, None] + norm.bias[:, None, None]


@pytest.mark.parity("dense-block")
@pytest.mark.parametrize("bn_size", [None, 2])
def test_it_is_its_formula(bn_size, images, stir):
    block = stir(DenseBlock(3, 3, 2, bn_size=bn_size, dtype=torch.float64))

    def written_out(x):
        features = [x]
        for layer in block.children():
            y = torch.cat(features, 1)
            norms = [layer.norm1] if bn_size is None else [layer.norm1, layer.norm2]
            convs = [layer.conv1] if bn_size is None else [layer.conv1, layer.conv2]
            for norm, conv in zip(norms, convs, strict=True):
                side = conv.kernel_size[0]
                patches = F.unfold(batch_norm(y, norm).relu(), side, padding=side // 2)
                y = (conv.weight.flatten(1) @ patches).unflatten(2, x.shape[2:])
            features.append(y)
        return torch.cat(features, 1)

    assert_parity(block, written_out, [images(2, 3, 5, 4)])


@pytest.mark.law("dense-block")
@pytest.mark.parametrize("bn_size", [None, 4])
def test_nothing_is_overwritten(bn_size, images):
    """The input stands in the first channels, then what each layer made, and later layers change nothing of it."""
    block = DenseBlock(3, 4, 2, bn_size=bn_size).eval()
    x = images(2, 3, 5, 5, dtype=torch.float32)
    y = block(x)
    assert y.shape[1] == block.out_channels == 3 + 4 * 2
    assert torch.equal(y[:, :3], x)
    block.denselayer3.conv1.weight.data.mul_(-2)
    again = block(x)
    assert torch.equal(again[:, :7], y[:, :7])
    assert not torch.equal(again[:, 7:9], y[:, 7:9])
    assert not torch.equal(again[:, 9:], y[:, 9:])


@pytest.mark.law("dense-block")
def test_its_weights_are_their_closed_form():
    c, layers, k, bn = 6, 5, 3, 4
    bottlenecked = sum((c + i * k) * bn * k + 9 * bn * k * k for i in range(layers))
    plain = sum(9 * (c + i * k) * k for i in range(layers))
    for bn_size, weights in ((bn, bottlenecked), (None, plain)):
        block = DenseBlock(c, layers, k, bn_size=bn_size)
        assert sum(p.numel() for p in block.parameters() if p.ndim == 4) == weights


@pytest.mark.law("dense-block")
def test_he_initialisation():
    torch.manual_seed(0)
    block = DenseBlock(256, 1, 64)
    assert abs(block.denselayer1.conv1.weight.std() * (256 / 2) ** 0.5 - 1) < 0.05
    block.denselayer1.norm1.weight.data.fill_(3.0)
    block.reset_parameters()
    assert (block.denselayer1.norm1.weight == 1).all()
    assert abs(Transition(256, 256).conv.weight.std() * (256 / 2) ** 0.5 - 1) < 0.05


@pytest.mark.refusal("dense-block")
def test_it_refuses():
    for name in ("in_channels", "num_layers", "growth_rate", "bn_size"):
        with refuses(ConfigError, name, 0):
            DenseBlock(**{"in_channels": 4, "num_layers": 2, "growth_rate": 2, "bn_size": 2, name: 0})
    for dropout in (-0.1, 1.0, float("nan")):
        with refuses(ConfigError, "dropout", dropout):
            DenseBlock(4, 2, 2, dropout=dropout)
    with refuses(ShapeError, "Transition", (2, 4, 1, 5)):
        Transition(4, 2)(torch.ones(2, 4, 1, 5))
    with refuses(ShapeError, "Transition", (2, 5, 4, 4)):
        Transition(4, 2)(torch.ones(2, 5, 4, 4))
    with refuses(ConfigError, "out_channels", 0):
        Transition(4, 0)
    with refuses(ConfigError, "norm_layer", "BatchNorm2d"):
        Transition(4, 2, norm_layer=nn.BatchNorm2d(4))
