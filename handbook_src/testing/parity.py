"""Parity: the same numbers as an independent oracle, forward and backward."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from handbook_src.errors import ConfigError


def relative_error(actual: Tensor, expected: Tensor) -> float:
    r"""Return :math:`\lVert a - e \rVert_2 / \lVert e \rVert_2` in float64; NaN never passes."""
    a, e = actual.detach().double(), expected.detach().double()
    scale = e.norm().item()
    return (a - e).norm().item() / (scale if scale > 0 else 1.0)


def assert_parity(
    ours: Callable[..., Any],
    oracle: Callable[..., Any],
    inputs: Sequence[Any],
    *,
    parameters: Iterable[tuple[Tensor, Tensor]] = (),
    dtype: torch.dtype = torch.float64,
    rtol: float = 1e-9,
    atol: float = 1e-11,
    seed: int = 0,
) -> None:
    """Assert that two implementations agree: outputs, and the gradient of every input.

    Both sides get their own copies of the inputs, cast to ``dtype``.  Every
    floating input requires grad, and one random cotangent per output is pulled
    back through both sides, so a missing or transposed gradient shows.

    Args:
        ours: the implementation under test; returns a tensor or a tuple of tensors.
        oracle: an independent implementation with the same signature.
        inputs: positional arguments; non-tensors pass through untouched.
        parameters: pairs (ours, oracle) of weights whose gradients must agree as well.
        dtype: the precision both sides run in.
        rtol: relative tolerance, as in :func:`torch.testing.assert_close`.
        atol: absolute tolerance.
        seed: of the cotangents.

    Raises:
        AssertionError: the outputs or a gradient differ; says which, and by how much.
        ConfigError: ``dtype`` can't resolve ``rtol``.
    """
    check_resolution(dtype, rtol)
    pairs = list(parameters)
    for p in (q for pair in pairs for q in pair):
        p.grad = None
    mine, theirs = _copies(inputs, dtype), _copies(inputs, dtype)
    outs, wants = _tensors(ours(*mine)), _tensors(oracle(*theirs))
    if len(outs) != len(wants):
        raise AssertionError(f"ours returned {len(outs)} tensors, the oracle {len(wants)}")
    generator = torch.Generator().manual_seed(seed)
    total, want_total = torch.zeros((), dtype=dtype), torch.zeros((), dtype=dtype)
    for i, (out, want) in enumerate(zip(outs, wants, strict=True)):
        torch.testing.assert_close(out, want, rtol=rtol, atol=atol, msg=labelled(f"output {i}"))
        if out.is_floating_point() and want.requires_grad:
            if not out.requires_grad:
                raise AssertionError(f"output {i}: the oracle is differentiable, ours is not")
            cotangent = torch.randn(out.shape, generator=generator, dtype=dtype).to(out)
            total = total + (out * cotangent).sum()
            want_total = want_total + (want * cotangent).sum()
    if want_total.requires_grad:
        total.backward()
        want_total.backward()
    for i, (a, b) in enumerate(zip(mine, theirs, strict=True)):
        if isinstance(a, Tensor) and a.is_floating_point():
            _same_gradient(f"input {i}", a, b, rtol, atol)
    for i, (a, b) in enumerate(pairs):
        _same_gradient(f"parameter {i}", a, b, rtol, atol)


def labelled(name: str) -> Callable[[str], str]:
    """Return what puts ``name`` before the message of ``torch.testing.assert_close``."""
    return lambda message: f"{name}: {message}"


def check_resolution(dtype: torch.dtype, rtol: float) -> None:
    """Refuse a tolerance below rounding: a batch and a sample may take different BLAS kernels, 3e-8 apart in float32.

    Raises:
        ConfigError: ``rtol`` is smaller than the dtype's machine epsilon.
    """
    eps = torch.finfo(dtype).eps
    if rtol < eps:
        remedy = "Compare in float64, or pass a multiple of eps."
        raise ConfigError("rtol", got=rtol, want=f"at least {eps:.1e} in {dtype}", remedy=remedy)


def _copies(inputs: Sequence[Any], dtype: torch.dtype) -> list[Any]:
    def copy(x: Any) -> Any:
        if isinstance(x, Tensor) and x.is_floating_point():
            return x.detach().to(dtype).clone().requires_grad_()
        return x.clone() if isinstance(x, Tensor) else x

    return [copy(x) for x in inputs]


def _tensors(out: Any) -> list[Tensor]:
    if isinstance(out, Tensor):
        return [out]
    return [o for o in out if isinstance(o, Tensor)]


def _same_gradient(name: str, ours: Tensor, oracle: Tensor, rtol: float, atol: float) -> None:
    if oracle.grad is None:
        if ours.grad is not None and not ours.grad.abs().max() <= atol:  # NaN too
            raise AssertionError(f"gradient of {name}: the oracle has none, ours is not zero")
        return
    got = ours.grad if ours.grad is not None else torch.zeros_like(ours)
    torch.testing.assert_close(got, oracle.grad, rtol=rtol, atol=atol, msg=labelled(f"gradient of {name}"))
