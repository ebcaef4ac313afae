"""Laws: the property that makes a component what it is."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from handbook_src.testing.parity import check_resolution, labelled


def assert_causal(fn: Callable[[Tensor], Tensor], x: Tensor, *, axis: int = 1, seed: int = 0) -> None:
    """Assert that no output depends on a later input, along ``axis``.

    Checked twice: a change of the future leaves the past's outputs equal to the
    last bit, and the gradient of each output with respect to later inputs is zero.
    Change and cotangent are random: a norm over features hides a constant one.
    """
    generator = torch.Generator().manual_seed(seed)
    x = x.detach().clone().requires_grad_()
    y = fn(x)
    steps = x.shape[axis]
    for t in range(steps - 1):
        changed = x.detach().clone()
        future = changed.narrow(axis, t + 1, steps - t - 1)
        future.add_(torch.randn(future.shape, generator=generator, dtype=torch.float64).to(future))
        past, again = y.narrow(axis, 0, t + 1), fn(changed).narrow(axis, 0, t + 1)
        if not torch.equal(past, again):
            raise AssertionError(f"output up to step {t} changed with the input after it")
        cotangent = torch.randn(past.shape, generator=generator, dtype=torch.float64).to(past)
        (grad,) = torch.autograd.grad(past, x, cotangent, retain_graph=True)
        leak = grad.narrow(axis, t + 1, steps - t - 1).abs().max().item()
        if leak != 0.0:
            raise AssertionError(f"output up to step {t} has gradient {leak:.2e} from later inputs")


def assert_batch_independent(
    fn: Callable[[Tensor], Tensor], x: Tensor, *, rtol: float = 1e-9, atol: float = 1e-11
) -> None:
    """Assert that each sample's output is the same alone as in the batch (axis 0)."""
    y = fn(x)
    check_resolution(y.dtype, rtol)
    for i in range(x.shape[0]):
        alone = fn(x[i : i + 1])[0]
        torch.testing.assert_close(alone, y[i], rtol=rtol, atol=atol, msg=labelled(f"sample {i}"))


def assert_permutation_equivariant(
    fn: Callable[[Tensor], Tensor], x: Tensor, *, axis: int = 1, seed: int = 0, rtol: float = 1e-9, atol: float = 1e-11
) -> None:
    """Assert that permuting the input along ``axis`` permutes the output alike."""
    order = torch.randperm(x.shape[axis], generator=torch.Generator().manual_seed(seed))
    want = fn(x).index_select(axis, order)
    check_resolution(want.dtype, rtol)
    torch.testing.assert_close(fn(x.index_select(axis, order)), want, rtol=rtol, atol=atol)
