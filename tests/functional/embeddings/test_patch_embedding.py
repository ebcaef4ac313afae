"""Patches: cut and multiply equals the strided convolution; order, refusals."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from handbook_src.errors import ConfigError, ShapeError
from handbook_src.functional.embeddings.patch_embedding import patch_embedding, patchify
from handbook_src.testing import assert_batch_independent, assert_parity, refuses

SHAPES = [((1, 1, 1, 1), (1, 1), 1), ((2, 3, 8, 12), (4, 3), 5), ((3, 2, 5, 7), (5, 1), 4), ((2, 5, 6, 6), (2, 2), 7)]


def draw(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64)


@pytest.mark.parity("patch-embedding")
@pytest.mark.parametrize("backend", ["auto", "torch", "reference"])
@pytest.mark.parametrize(("shape", "patch", "d"), SHAPES)
@pytest.mark.parametrize("bias", [True, False])
def test_it_is_unfold_and_a_linear_layer(backend, shape, patch, d, bias) -> None:
    given = [draw(*shape), draw(d, shape[1], *patch), *([draw(d)] if bias else [])]
    assert_parity(
        lambda x, w, *b: patch_embedding(x, w, *b, backend=backend),
        lambda x, w, *b: F.linear(F.unfold(x, patch, stride=patch).transpose(1, 2), w.flatten(1), *b),
        given,
    )
    strided = draw(shape[0], *shape[2:], shape[1]).movedim(-1, 1)
    torch.testing.assert_close(
        patch_embedding(strided, *given[1:], backend=backend), patch_embedding(strided.contiguous(), *given[1:])
    )


@pytest.mark.law("patch-embedding")
def test_patches_come_row_by_row_and_each_depends_on_its_pixels_alone() -> None:
    x = torch.arange(24.0).view(1, 1, 4, 6)
    assert patchify(x, (2, 3))[0].tolist()[1] == [3, 4, 5, 9, 10, 11]
    assert patchify(x, (2, 3))[0].tolist()[2] == [12, 13, 14, 18, 19, 20]
    two = torch.stack([x[0, 0], x[0, 0] + 100])[None]
    assert patchify(two, (4, 3))[0, 0].tolist()[12:] == [v + 100 for v in patchify(x, (4, 3))[0, 0].tolist()]
    w = draw(5, 3, 2, 3)
    image = draw(2, 3, 4, 9).requires_grad_()
    for n in range(6):
        (g,) = torch.autograd.grad(patch_embedding(image, w)[:, n].sum(), image)
        r, c = divmod(n, 3)
        inside = torch.zeros(4, 9, dtype=torch.bool)
        inside[2 * r : 2 * r + 2, 3 * c : 3 * c + 3] = True
        assert (g[..., ~inside] == 0).all()
        assert (g[..., inside] != 0).all()
    assert_batch_independent(lambda x: patch_embedding(x, w), image.detach())


@pytest.mark.law("patch-embedding")
def test_moving_the_image_by_a_patch_moves_the_tokens() -> None:
    x, w = draw(1, 2, 6, 8), draw(3, 2, 2, 2)
    grid = patch_embedding(x, w).view(1, 3, 4, 3)
    moved = patch_embedding(x.roll(2, -1), w).view(1, 3, 4, 3)
    torch.testing.assert_close(moved, grid.roll(1, 2))


@pytest.mark.registration("patch-embedding")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_halves_compile_and_second_derivatives(dtype, unchecked) -> None:
    x, w, b = draw(2, 3, 4, 4).to(dtype), draw(5, 3, 2, 2).to(dtype), draw(5).to(dtype)
    got = patch_embedding(x, w, b, backend="reference")
    assert got.dtype == dtype
    exact = patch_embedding(x.double(), w.double(), b.double())
    assert ((got - exact).abs() <= exact.abs() * torch.finfo(dtype).eps + 1e-3).all()
    compiled = torch.compile(patch_embedding, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(x.float(), w.float(), b.float()), exact.float())
    assert torch.autograd.gradgradcheck(
        lambda x, w: patch_embedding(x, w, backend="reference"),
        (draw(1, 1, 2, 2).requires_grad_(), draw(2, 1, 1, 2).requires_grad_()),
    )
    assert patch_embedding(x[:0], w, b).shape == (0, 4, 5)


@pytest.mark.refusal("patch-embedding")
def test_bad_images_and_weights_are_refused() -> None:
    w = draw(5, 3, 4, 4)
    for side in ((9, 8), (8, 9), (3, 4), (0, 8)):
        with refuses(ShapeError, f"{side[0]} x {side[1]}", "4 x 4"):
            patch_embedding(draw(1, 3, *side), w)
    with refuses(ShapeError, (1, 2, 8, 8), 3):
        patch_embedding(draw(1, 2, 8, 8), w)
    with refuses(ShapeError, "3 axes"):
        patch_embedding(draw(3, 8, 8), w)
    with refuses(ShapeError, "weight", "2 axes"):
        patch_embedding(draw(1, 3, 8, 8), draw(5, 48))
    with refuses(ShapeError, "bias", (4,)):
        patch_embedding(draw(1, 3, 8, 8), w, draw(4))
    with refuses(ShapeError, "torch.uint8"):
        patch_embedding(torch.zeros(1, 3, 8, 8, dtype=torch.uint8), w)
    for backend in ("auto", "reference"):
        for wide, bias in ((draw(1, 3, 8, 8).float(), None), (draw(1, 3, 8, 8), draw(5).float())):
            with refuses(ShapeError, torch.float32, torch.float64):
                patch_embedding(wide, w, bias, backend=backend)
        with refuses(ShapeError, torch.float32, torch.float64), torch.autocast("cpu", dtype=torch.bfloat16):
            patch_embedding(draw(1, 3, 8, 8), w.float(), backend=backend)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert patch_embedding(draw(1, 3, 8, 8).float(), w.float(), backend=backend).dtype == torch.bfloat16
        for empty in ((5, 3, 0, 4), (0, 3, 4, 4), (5, 0, 4, 4)):
            with refuses(ShapeError, "weight", empty):
                patch_embedding(draw(1, empty[1], 8, 8), draw(*empty), backend=backend)
    for patch in ((0, 4), (-2, -4), 0, (2, 2, 2), 1.5, None):
        with refuses(ConfigError, "patch"):
            patchify(draw(1, 3, 8, 8), patch)  # type: ignore[arg-type]
    x = draw(1, 3, 8, 8)
    assert torch.equal(patchify(x, 4), patchify(x, (4, 4)))
    with refuses(ConfigError, "triton"):
        patch_embedding(draw(1, 3, 8, 8), w, backend="triton")
