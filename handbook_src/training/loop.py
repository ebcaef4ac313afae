"""One training loop, readable from top to bottom."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau
from tqdm import tqdm

from handbook_src.check import check_positive, check_size
from handbook_src.errors import ConfigError, Diverged
from handbook_src.mode import modes_kept
from handbook_src.training.checkpoint import Run, load, rng_state, save, set_rng_state
from handbook_src.training.distributed import World, join
from handbook_src.training.history import History

Precision = Literal["float32", "bfloat16", "float16"]
Sample = Callable[[torch.Generator], Any]
Loss = Callable[[nn.Module, Any], Tensor]
Evaluate = Callable[[nn.Module], float | Mapping[str, float]]


def train(
    model: nn.Module,
    sample: Sample,
    loss: Loss,
    optimizer: Optimizer,
    *,
    steps: int,
    generator: torch.Generator,
    scheduler: LRScheduler | None = None,
    clip_norm: float | None = None,
    accumulate: int = 1,
    precision: Precision = "float32",
    evaluate: Evaluate | None = None,
    evaluate_every: int | None = None,
    checkpoint: str | Path | None = None,
    checkpoint_every: int | None = None,
    resume: bool = True,
    progress: bool = True,
) -> History:
    """Train ``model`` for ``steps`` optimiser steps and return what was measured.

    A step draws ``accumulate`` micro-batches, averages their gradients, clips,
    and moves the weights once: for a loss that is a mean, the same step as one
    batch of all of them.  Under ``torchrun`` the micro-batches are dealt to the
    processes and the result is the same.  Stopped at any moment, a run that is
    started again with the same arguments continues from its checkpoint and ends,
    on the same machine, with the same bits as one that was never stopped.

    Args:
        model: on its device already; batches are moved there.  A part in evaluation mode within a model
            in training mode stays so: a frozen batch norm does not move.
        sample: draws one micro-batch; all its randomness comes from the generator.
        loss: ``loss(model, batch)``, a scalar; the mean over the micro-batch.
        optimizer: over the parameters of ``model``.
        steps: the number of the last step, resumed steps included.
        generator: the stream that ``sample`` draws from; saved in checkpoints.
        scheduler: stepped once after each optimiser step.
        clip_norm: largest Euclidean norm of the whole gradient.
        accumulate: micro-batches per step, over all processes together.
        precision: ``float32`` runs the model in its own dtype; ``bfloat16`` and
            ``float16`` run the forward pass under autocast, ``float16`` with a loss
            scale that halves on overflow (that step is skipped and has an
            infinite ``grad_norm``).
        evaluate: called in evaluation mode without gradients; its noise does not
            disturb the training's.
        evaluate_every: steps between evaluations; the last step always has one.
        checkpoint: file to write, and to resume from where it exists.
        checkpoint_every: steps between checkpoints; the last step always has one.
        resume: whether an existing checkpoint is continued or replaced.
        progress: show a bar on stderr (``TQDM_DISABLE=1`` hides it).

    Raises:
        ConfigError: an argument that cannot work, or a checkpoint of another set-up.
        DataError: the checkpoint is torn or foreign.
        Diverged: the loss or the gradient is no longer finite; the weights are as
            before that step, and the last checkpoint is kept.

    Example:
        >>> model = nn.Linear(2, 1)
        >>> history = train(
        ...     model,
        ...     sample=lambda generator: torch.randn(4, 2, generator=generator),
        ...     loss=lambda model, batch: model(batch).square().mean(),
        ...     optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
        ...     steps=20,
        ...     generator=torch.Generator().manual_seed(0),
        ...     progress=False,
        ... )
        >>> history.loss[-1] < history.loss[0]
        True
    """
    world = join()
    _refuse(steps, clip_norm, accumulate, precision, scheduler, world)
    _refuse_parameters(model, optimizer, precision)
    _refuse_intervals(evaluate, evaluate_every, checkpoint, checkpoint_every)
    device = next(model.parameters()).device
    scaler = torch.amp.GradScaler(device.type, enabled=precision == "float16")
    history = History()
    settings = {"clip_norm": repr(clip_norm), "accumulate": repr(accumulate), "precision": precision}
    run = Run(model, optimizer, scheduler, scaler, generator, history, settings)
    if checkpoint is not None and resume and world.from_first(Path(checkpoint).exists()):
        load(checkpoint, run, world)
        _refuse_shorter(len(history), steps, checkpoint)
    net = world.wrap(model)
    with modes_kept(model), _bar(len(history), steps, progress and world.writes) as bar:
        if not model.training:
            model.train()  # else a part in evaluation mode is frozen on purpose
        for step in range(len(history) + 1, steps + 1):
            start = time.perf_counter()
            value = _gradients(net, run, sample, loss, accumulate, _autocast(device, precision), world)
            norm = _norm(run, clip_norm)
            _refuse_divergence(step, value, norm, precision, checkpoint)
            lr = float(optimizer.param_groups[0]["lr"])
            _update(run)
            history.record(loss=value, grad_norm=norm, lr=lr, seconds=time.perf_counter() - start)
            bar.set_postfix(loss=f"{value:.4g}", lr=f"{lr:.2g}", refresh=False)
            bar.update()
            if evaluate is not None and _due(step, evaluate_every, steps):
                history.evaluations.append({"step": step, **_evaluation(model, evaluate)})
            if checkpoint is not None and _due(step, checkpoint_every, steps):
                save(checkpoint, run, world)
    return history


def _gradients(
    net: nn.Module,
    run: Run,
    sample: Sample,
    loss: Loss,
    accumulate: int,
    autocast: AbstractContextManager[Any],
    world: World,
) -> float:
    """Leave the mean gradient of the micro-batches in ``.grad``; return the mean loss."""
    device = next(net.parameters()).device
    share = accumulate // world.size
    total = torch.zeros((), device=device, dtype=torch.float64 if device.type != "mps" else torch.float32)
    net.zero_grad(set_to_none=True)
    for i in range(accumulate):
        batch = sample(run.generator)
        if i % world.size != world.rank:
            continue
        with world.quiet(net, last=i // world.size == share - 1):
            with autocast:
                value = _scalar(loss(net, _to(batch, device)))
            run.scaler.scale(value / share).backward()
        total += value.detach() / share
    return float(world.mean(total))


def _norm(run: Run, clip_norm: float | None) -> float:
    """Undo the loss scale, measure the gradient, and shorten it to ``clip_norm``."""
    run.scaler.unscale_(run.optimizer)
    parameters = [p for group in run.optimizer.param_groups for p in group["params"] if p.grad is not None]
    norm = nn.utils.get_total_norm([p.grad for p in parameters])
    if clip_norm is not None:
        nn.utils.clip_grads_with_norm_(parameters, clip_norm, norm)
    if run.scaler.is_enabled() and not bool(norm.isfinite()):
        return math.inf  # an overflow: the scaler skips this step
    return float(norm)


def _update(run: Run) -> None:
    before = run.scaler.get_scale()
    run.scaler.step(run.optimizer)
    run.scaler.update()
    skipped = run.scaler.get_scale() < before
    if run.scheduler is not None and not skipped:
        run.scheduler.step()


def _autocast(device: torch.device, precision: Precision) -> AbstractContextManager[Any]:
    if precision == "float32":
        return nullcontext()
    return torch.autocast(device.type, dtype=getattr(torch, precision))


@torch.no_grad()
def _evaluation(model: nn.Module, evaluate: Evaluate) -> dict[str, float]:
    noise = rng_state()
    with modes_kept(model):
        found = evaluate(model.eval())
    set_rng_state(noise)
    values = {k: float(v) for k, v in found.items()} if isinstance(found, Mapping) else {"value": float(found)}
    if "step" in values:
        raise ConfigError(
            "evaluate", got="a value named 'step'", want="another name", remedy="The step is noted beside."
        )
    return values


def _to(batch: Any, device: torch.device) -> Any:
    if isinstance(batch, Tensor):
        return batch.to(device, non_blocking=True)
    if isinstance(batch, dict):
        return {k: _to(v, device) for k, v in batch.items()}
    if isinstance(batch, list | tuple):
        moved = [_to(v, device) for v in batch]
        return type(batch)(*moved) if hasattr(batch, "_fields") else type(batch)(moved)
    return batch


def _due(step: int, every: int | None, steps: int) -> bool:
    return step == steps or (every is not None and step % every == 0)


def _bar(done: int, steps: int, shown: bool) -> Any:
    hidden = os.environ.get("TQDM_DISABLE", "") not in ("", "0")
    return tqdm(total=steps, initial=done, unit="step", disable=hidden or not shown, mininterval=0.5)


def _refuse(
    steps: int,
    clip_norm: float | None,
    accumulate: int,
    precision: str,
    scheduler: LRScheduler | None,
    world: World,
) -> None:
    check_size("train", "steps", steps)
    if clip_norm is not None:
        check_positive("train", "clip_norm", clip_norm, "Pass None to leave gradients be.")
    check_size("train", "accumulate", accumulate)
    if accumulate % world.size:
        raise ConfigError(
            "accumulate",
            got=accumulate,
            want=f"a positive multiple of the {world.size} process(es) that share a step",
            remedy=f"Pass accumulate={math.ceil(accumulate / world.size) * world.size}.",
        )
    if precision not in ("float32", "bfloat16", "float16"):
        raise ConfigError(
            "precision", got=repr(precision), want="'float32', 'bfloat16' or 'float16'", remedy="Choose one."
        )
    if isinstance(scheduler, ReduceLROnPlateau):
        raise ConfigError(
            "scheduler",
            got="ReduceLROnPlateau",
            want="a schedule that depends on the step alone",
            remedy="Step it inside evaluate, on the value that it watches.",
        )


def _refuse_parameters(model: nn.Module, optimizer: Optimizer, precision: str) -> None:
    own = {id(p): p for p in model.parameters() if p.requires_grad}
    if not any(id(p) in own for group in optimizer.param_groups for p in group["params"]):
        raise ConfigError(
            "optimizer",
            got=f"no parameter of this model, which has {len(own)} to train",
            want="an optimiser over model.parameters()",
            remedy="Make it after the model is made, moved or replaced; without parameters there is nothing to train.",
        )
    if precision == "float16" and any(p.dtype == torch.float16 for p in own.values()):
        raise ConfigError(
            "precision",
            got="'float16' with parameters in float16",
            want="parameters in float32, which the scaled gradients are added to",
            remedy="Leave the model in float32: the forward pass is cast.",
        )


def _refuse_intervals(
    evaluate: Evaluate | None, evaluate_every: int | None, checkpoint: str | Path | None, checkpoint_every: int | None
) -> None:
    for name, thing, every in (
        ("evaluate", evaluate, evaluate_every),
        ("checkpoint", checkpoint, checkpoint_every),
    ):
        if every is not None and thing is None:
            raise ConfigError(f"{name}_every", got=every, want=f"{name} as well", remedy=f"Pass {name}=... or drop it.")
        if every is not None:
            check_size("train", f"{name}_every", every)


def _refuse_shorter(done: int, steps: int, checkpoint: str | Path) -> None:
    if done > steps:
        raise ConfigError(
            "steps",
            got=steps,
            want=f"at least the {done} steps already done in {checkpoint}",
            remedy="Raise steps, or pass resume=False to start afresh.",
        )


def _scalar(value: Any) -> Tensor:
    if not isinstance(value, Tensor):
        got = f"{type(value).__name__} {value!r}"
        raise ConfigError("loss", got=got, want="a scalar tensor", remedy="Return the tensor, without .item().")
    if value.numel() != 1:
        raise ConfigError("loss", got=f"shape {list(value.shape)}", want="a scalar", remedy="Return its mean.")
    return value.reshape(())


def _refuse_divergence(step: int, value: float, norm: float, precision: str, checkpoint: str | Path | None) -> None:
    overflow = precision == "float16" and math.isfinite(value)
    if (math.isfinite(value) and math.isfinite(norm)) or overflow:
        return
    kept = f" The last checkpoint is kept in {checkpoint}." if checkpoint and Path(checkpoint).exists() else ""
    raise Diverged(
        f"step {step}",
        got=f"loss {value}, gradient norm {norm}",
        want="finite numbers",
        remedy=f"Lower the learning rate, warm it up, or pass clip_norm=1.0.{kept}",
    )
