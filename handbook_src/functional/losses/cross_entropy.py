r"""Cross-entropy of class indices, as ``torch.nn.functional.cross_entropy`` without its class weights.

Nothing here stores a probability: a row of logits needs its log-sum-exp, the
logit of its class, and (with label smoothing) its mean.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, Integer
from torch import Tensor

from handbook_src.check import check_floating, check_integers, check_probability, known_broken
from handbook_src.dispatch import Backend, Resolved, needs_for_triton, resolve
from handbook_src.errors import ConfigError, DataError, ShapeError
from handbook_src.precision import at_least_float32

Reduction = Literal["none", "mean", "sum"]


def cross_entropy(
    logits: Float[Tensor, "*shape"],
    target: Integer[Tensor, "*rest"],
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    reduction: Reduction = "mean",
    *,
    z_loss: float = 0.0,
    backend: Backend = "auto",
) -> Float[Tensor, "*reduced"]:
    r"""Minus the log-probability of each row's class, averaged over the rows that count.

    .. math::
        \ell = (1 - s)\,(L - x_y) + s\,\bigl(L - \tfrac1v \textstyle\sum_j x_j\bigr) + z L^2, \qquad
        L = m + \log \sum_j e^{x_j - m}, \quad m = \max_j x_j

    Half precision is computed in float32 by the reference and the kernel; torch's operation
    rounds on the way. A row that is ignored may hold NaN or infinity: the reference and the kernel
    give it gradient 0, torch NaN; on a CPU ``auto`` leaves such rows to the reference.
    Not for ``torch.func.vmap``. Rows whose target is ``ignore_index``
    have loss 0 and are left out of the mean; the mean over no rows is NaN.
    On a GPU a target outside the vocabulary is not looked for, which would wait
    for the device: there the ``triton`` backend answers NaN, torch aborts.

    Args:
        logits: ``(v,)``, ``(b, v)`` or ``(b, v, ...)``: classes on axis 1, as torch has them.
        target: class indices, of the shape of ``logits`` without its class axis.
        ignore_index: the target that counts nothing.
        label_smoothing: the share of the mass that all classes divide equally, :math:`s`.
        reduction: ``none``, ``mean`` or ``sum``.
        z_loss: weight of the squared log-sum-exp, :math:`z`; 1e-4 in PaLM.
        backend: ``auto`` takes the fastest that can run.

    Raises:
        ConfigError: another reduction, a smoothing outside [0, 1], a negative ``z_loss``.
        ShapeError: the shapes don't fit, or a dtype is wrong.
        DataError: on a CPU, a target outside the vocabulary.

    Source:
        Szegedy et al. 2015, section 7 (smoothing), arXiv:1512.00567; Milakov & Gimelshein 2018, algorithm 3
        (online log-sum-exp), arXiv:1805.02867; Chowdhery et al. 2022, section 5 (z-loss), arXiv:2204.02311
    """
    _check_settings(ignore_index, label_smoothing, reduction, z_loss)
    _check_tensors(logits, target)
    target = target.long()
    broken = _look(logits, target, ignore_index)
    runs = resolve("cross_entropy", backend, _candidates(backend, logits, target, z_loss))
    if runs == "torch" and not (broken and backend == "auto"):
        return F.cross_entropy(
            logits, target, ignore_index=ignore_index, reduction=reduction, label_smoothing=label_smoothing
        )
    rows = logits.movedim(min(1, logits.ndim - 1), -1)
    if runs == "triton":
        from handbook_src.kernels.cross_entropy import cross_entropy_triton

        losses, _ = cross_entropy_triton(rows, target, ignore_index, label_smoothing, z_loss)
    else:
        losses = _written_out(rows, target, ignore_index, label_smoothing, z_loss)
    return _reduced(losses, target != ignore_index, reduction).to(logits.dtype)


def _written_out(x: Tensor, target: Tensor, ignore_index: int, smoothing: float, z_loss: float) -> Tensor:
    counted = target != ignore_index
    x = at_least_float32(x)
    x = torch.where(counted[..., None], x, 0.0)  # what is ignored may be NaN
    top = x.amax(-1, keepdim=True).detach()
    top = torch.where(top.isinf(), 0.0, top)  # a row of -inf has no probabilities; torch says NaN too
    lse = (x - top).exp().sum(-1).log() + top[..., 0]
    loss = lse - x.gather(-1, torch.where(counted, target, 0)[..., None])[..., 0]
    if smoothing > 0:  # never 0 * -inf, where a class is masked out
        loss = (1 - smoothing) * loss + smoothing * (lse - x.mean(-1))
    if z_loss > 0:
        loss = loss + z_loss * lse.square()
    return torch.where(counted, loss, 0.0)


def _reduced(losses: Tensor, counted: Tensor, reduction: str) -> Tensor:
    if reduction == "none":
        return losses
    return losses.sum() if reduction == "sum" else losses.sum() / counted.sum()


def _check_settings(ignore_index: int, smoothing: float, reduction: str, z_loss: float) -> None:
    op = "cross_entropy"
    if not isinstance(ignore_index, int) or isinstance(ignore_index, bool):
        raise ConfigError(
            f"{op} ignore_index", got=repr(ignore_index), want="an integer", remedy="Pass -100, torch's default."
        )
    check_probability(op, "label_smoothing", smoothing, below_one=False)
    if reduction not in ("none", "mean", "sum"):
        raise ConfigError(
            f"{op} reduction",
            got=repr(reduction),
            want="'none', 'mean' or 'sum'",
            remedy="Pass 'mean', torch's default.",
        )
    if not isinstance(z_loss, int | float) or isinstance(z_loss, bool) or not 0 <= z_loss < float("inf"):
        raise ConfigError(f"{op} z_loss", got=repr(z_loss), want="zero or a positive number", remedy="PaLM's is 1e-4.")


def _check_tensors(logits: Tensor, target: Tensor) -> None:
    op = "cross_entropy"
    check_floating(op, logits)
    check_integers(op, "target", target, "For class probabilities use torch.nn.functional.cross_entropy.")
    want = logits.shape[:1] + logits.shape[2:] if logits.ndim > 1 else logits.shape[:0]
    if logits.ndim == 0 or target.shape != want:
        raise ShapeError(
            f"{op} target",
            got=f"{tuple(target.shape)} for logits of {tuple(logits.shape)}",
            want=f"{tuple(want)}: the logits without their class axis",
            remedy="Classes are axis 1 (axis 0 of one row); flatten (b, t, v) to (b t, v) first.",
        )
    if logits.shape[min(1, logits.ndim - 1)] == 0:
        raise ShapeError(
            f"{op} logits", got=tuple(logits.shape), want="at least one class", remedy="Check the last layer's width."
        )
    if target.device != logits.device:
        raise ShapeError(
            f"{op} target", got=target.device, want=f"{logits.device}, as the logits", remedy="Move it beside them."
        )


def _look(logits: Tensor, target: Tensor, ignore_index: int) -> bool:
    """Refuse targets that are no class; say whether an ignored row holds NaN or infinity."""
    # Only where looking costs nothing: not on a GPU, which would have to be waited for, and not while tracing.
    if target.device.type != "cpu" or torch.compiler.is_compiling():
        return False
    axis = min(1, logits.ndim - 1)
    ignored, classes = target == ignore_index, logits.shape[axis]
    wrong = target[~ignored & ((target < 0) | (target >= classes))]
    if wrong.numel():
        raise DataError(
            "cross_entropy target",
            got=f"class {wrong[0].item()}, {wrong.numel()} such in all",
            want=f"0 to {classes - 1}, or ignore_index {ignore_index}",
            remedy="Check the labels against the number of logits.",
        )
    return bool(ignored.any()) and known_broken(logits.movedim(axis, -1)[ignored])


def _candidates(backend: Backend, logits: Tensor, target: Tensor, z_loss: float) -> dict[Resolved, str | None]:
    # By bytes the kernel wins on a GPU, e + 2e a logit against 2e + 4e.  No GPU has run it yet: torch first.
    able: dict[Resolved, str | None] = {
        "torch": None if z_loss == 0 else "z_loss=0: torch has none",
        "triton": "a reason to prefer it: torch's own can run",
    }
    if logits.dtype == torch.float64:
        able["triton"] = "float16, bfloat16 or float32 logits: the kernel computes in float32"
    elif backend == "triton" or z_loss > 0:
        able["triton"] = needs_for_triton(logits, target)
    able["reference"] = None
    return able
