"""What the tests of the convolutional blocks share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from handbook_src.testing import assert_parity


def images(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def stir(module: nn.Module) -> nn.Module:
    """Give every parameter and running statistic a value of its own, so that none can be mistaken for its default."""
    for i, p in enumerate(module.parameters()):
        p.data = images(*p.shape, seed=i).to(p) * (0.5 if p.ndim > 1 else 0.3) + (p.ndim == 1)
    for name, b in module.named_buffers():
        if b.is_floating_point():
            b.copy_(images(*b.shape, seed=len(name)).abs() + 0.5)
    return module


def same_block(mine: nn.Module, theirs: nn.Module, shape: tuple[int, ...], *, training: bool) -> None:
    """Assert equal outputs, gradients and running statistics, with the oracle's weights copied in their order."""
    stir(theirs.double())
    weights, wanted = mine.double().state_dict(), theirs.state_dict()
    assert [v.shape for v in weights.values()] == [v.shape for v in wanted.values()]
    mine.load_state_dict(dict(zip(weights, wanted.values(), strict=True)))
    mine.train(training), theirs.train(training)
    pairs = list(zip(mine.parameters(), theirs.parameters(), strict=True))
    # clones: published blocks write into their input
    assert_parity(mine, lambda x: theirs(x.clone()), [images(*shape)], parameters=pairs)
    for a, b in zip(mine.buffers(), theirs.buffers(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.fixture(name="images")
def give_images() -> Callable[..., Tensor]:
    return images


@pytest.fixture(name="stir")
def give_stir() -> Callable[[nn.Module], nn.Module]:
    return stir


@pytest.fixture(name="same_block")
def give_same_block() -> Callable[..., Any]:
    return same_block
