"""The patch embedding layer is transformers' and timm's."""

from __future__ import annotations

import copy
import math
import pickle

import pytest
import torch

from handbook_src.errors import ConfigError, ShapeError
from handbook_src.layers.embeddings.patch_embedding import PatchEmbedding
from handbook_src.testing import assert_parity, oracle, refuses

SIZES = [((8, 8), (2, 2), 3), ((6, 10), (3, 5), 1), ((7, 7), (7, 7), 4)]


def same(mine, theirs, x) -> None:
    pairs = list(zip(mine.parameters(), theirs.parameters(), strict=True))
    assert_parity(mine, theirs, [x], parameters=pairs)


@pytest.mark.outside("patch-embedding")
@pytest.mark.parity("patch-embedding")
@pytest.mark.parametrize(("image", "patch", "channels"), SIZES)
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_it_is_transformers_vit(image, patch, channels, backend) -> None:
    vit = oracle.load("transformers").models.vit
    config = vit.configuration_vit.ViTConfig(image_size=image, patch_size=patch, num_channels=channels, hidden_size=6)
    theirs = vit.modeling_vit.ViTPatchEmbeddings(config).double()
    mine = PatchEmbedding(image, patch, channels, 6, dtype=torch.float64, backend=backend)
    mine.load_state_dict({k.replace("projection", "proj"): v for k, v in theirs.state_dict().items()})
    assert mine.num_patches == theirs.num_patches
    same(mine, theirs, torch.randn(2, channels, *image))


@pytest.mark.outside("patch-embedding")
@pytest.mark.parametrize(("image", "patch", "channels"), SIZES)
@pytest.mark.parametrize("bias", [True, False])
def test_it_is_timms(image, patch, channels, bias) -> None:
    timm = oracle.load("timm.layers")
    theirs = timm.PatchEmbed(image, patch, channels, 6, bias=bias).double()
    mine = PatchEmbedding(image, patch, channels, 6, bias=bias, dtype=torch.float64)
    mine.load_state_dict(theirs.state_dict())
    same(mine, theirs, torch.randn(2, channels, *image))


@pytest.mark.law("patch-embedding")
def test_an_open_size_takes_what_the_patch_divides() -> None:
    layer = PatchEmbedding(None, 4, 1, 5)
    assert layer.num_patches is None
    assert layer(torch.randn(2, 1, 8, 12)).shape == (2, 6, 5)
    fixed = PatchEmbedding((8, 12), (4, 4), 1, 5)
    fixed.load_state_dict(layer.state_dict())
    x = torch.randn(2, 1, 8, 12)
    assert torch.equal(fixed(x), layer(x))


@pytest.mark.registration("patch-embedding")
def test_it_copies_compiles_and_resets(unchecked) -> None:
    layer, x = PatchEmbedding(8, 4, 1, 5), torch.randn(2, 1, 8, 8)
    assert torch.equal(pickle.loads(pickle.dumps(layer))(x), copy.deepcopy(layer)(x))
    torch.testing.assert_close(torch.compile(layer, fullgraph=True, backend="eager")(x), layer(x))
    before = layer.proj.weight.clone()
    layer.reset_parameters()
    assert not torch.equal(before, layer.proj.weight)
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(x).dtype == torch.bfloat16


@pytest.mark.refusal("patch-embedding")
@pytest.mark.parametrize("bad", [0, -2, 1.5, True, math.nan])
def test_bad_sizes_are_refused(bad) -> None:
    for name in ("image_size", "patch_size", "in_channels", "dim"):
        with refuses(ConfigError, name, repr(bad)):
            PatchEmbedding(**{"image_size": 8, "patch_size": 4} | {name: bad})


@pytest.mark.refusal("patch-embedding")
def test_bad_images_are_refused() -> None:
    with refuses(ShapeError, "9 x 8", "4 x 4"):
        PatchEmbedding((9, 8), 4)
    layer = PatchEmbedding((8, 8), 4, 3, 5)
    with refuses(ShapeError, (8, 12), (8, 8)):
        layer(torch.ones(1, 3, 8, 12))
    with refuses(ShapeError, (1, 1, 8, 8), 3):
        layer(torch.ones(1, 1, 8, 8))
    with refuses(ShapeError, "3 axes"):
        layer(torch.ones(3, 8, 8))
    with refuses(ShapeError, "torch.int64"):
        layer(torch.ones(1, 3, 8, 8, dtype=torch.long))
    with refuses(ConfigError, "patch_size", (1, 2, 3)):
        PatchEmbedding(8, (1, 2, 3))
