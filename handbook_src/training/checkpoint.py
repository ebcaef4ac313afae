"""A checkpoint: everything a run needs to go on as if nothing had happened.

One file, written beside its final name and then renamed over it, so a crash
leaves the previous checkpoint whole.  It holds tensors and plain Python values
only and is read with ``weights_only=True``: opening one runs no code from it.
"""

from __future__ import annotations

import os
import random
import zipfile
from copy import copy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler

from handbook_src.errors import ConfigError, DataError
from handbook_src.training.distributed import World
from handbook_src.training.history import History

FORMAT = "handbook training checkpoint 2"
#: What a schedule counts as it goes; the rest of its state are its settings.
COUNTERS = {"last_epoch", "_step_count", "_last_lr", "_get_lr_called_within_step", "_is_initial", "T_cur", "T_i"}
#: What a schedule writes into a group, beside the learning rate.
CYCLED = {"params", "lr", "initial_lr", "betas", "momentum"}


@dataclass
class Run:
    """The parts of a run that change as it goes, and the settings that may not."""

    model: nn.Module
    optimizer: Optimizer
    scheduler: LRScheduler | None
    scaler: torch.amp.GradScaler
    generator: torch.Generator
    history: History
    settings: dict[str, str]
    about: dict[str, str] = field(init=False)

    def __post_init__(self) -> None:
        self.about = self.describe()  # before the first step: schedules write into groups

    def describe(self) -> dict[str, str]:
        """Return what must be the same when the run is resumed, name by name."""
        about = dict(self.settings)
        about["optimizer"] = type(self.optimizer).__name__
        about["scheduler"] = type(self.scheduler).__name__
        about |= {f"optimizer {k}": repr(v) for k, v in self.optimizer.defaults.items()}
        about.pop("optimizer lr", None)  # each group has its own; a schedule writes into a tensor default
        names = {id(p): name for name, p in self.model.named_parameters()}
        for i, group in enumerate(self.optimizer.param_groups):
            about[_rate(i)] = repr(group.get("initial_lr", group["lr"]))
            about |= {f"{k} of group {i}": repr(v) for k, v in group.items() if k not in CYCLED}
            for j, p in enumerate(group["params"]):  # Adam's moments are kept by place
                about[f"parameter {j} of group {i}"] = names.get(id(p), f"outside the model, {list(p.shape)}")
        if self.scheduler is not None:
            about |= {f"scheduler {k}": v for k, v in _settings(self.scheduler.state_dict()).items()}
        for name, t in self.model.state_dict().items():
            if isinstance(t, torch.Tensor):
                about[f"model.{name}"] = f"{str(t.dtype).removeprefix('torch.')} {list(t.shape)}"
        return about


def _rate(group: int) -> str:
    return f"learning rate of group {group}"


def _rates(rates: list[Any]) -> dict[str, str]:
    return {_rate(i): repr(float(r)) for i, r in enumerate(rates)}


def _settings(state: Any) -> dict[str, str]:
    """A schedule's settings: its state without what it counts, in schedules of schedules too."""
    items = state.items() if isinstance(state, dict) else enumerate(state)
    kept = {str(k): v for k, v in items if k not in COUNTERS and not callable(v)}
    return {k: repr(_settings(v) if isinstance(v, dict | list) else v) for k, v in kept.items()}


def save(path: str | Path, run: Run, world: World) -> None:
    """Write ``run`` to ``path`` atomically.  Every process calls this; rank 0 writes."""
    noise = world.gather(rng_state())
    if not world.writes:
        return
    state = {
        "format": FORMAT,
        "about": run.about,
        "model": run.model.state_dict(),
        "optimizer": _plain(run.optimizer.state_dict()),
        "scheduler": _plain(run.scheduler.state_dict()) if run.scheduler is not None else None,
        "scaler": run.scaler.state_dict(),
        "generator": run.generator.get_state(),
        "noise": noise,
        "history": run.history.state_dict(),
    }
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        with part.open("wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def _plain(value: Any) -> Any:
    """Return ``value`` with NumPy scalars as Python numbers: ``weights_only`` reads no NumPy."""
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, dict):
        kept = copy(value)  # of the same kind: MultiStepLR needs its Counter back
        kept.clear()
        kept.update({_plain(k): _plain(v) for k, v in value.items()})
        return kept
    if isinstance(value, list):
        return [_plain(v) for v in value]
    if isinstance(value, tuple):
        return tuple(_plain(v) for v in value)
    return value


def load(path: str | Path, run: Run, world: World) -> None:
    """Continue ``run`` from ``path``: weights, optimiser, schedule, noise and history.

    Raises:
        DataError: the file is torn, or is not a checkpoint of this loop.
        ConfigError: the run has other settings, another model or another optimiser
            than the one that was saved, or another number of processes.
    """
    state = world.from_first(read(path) if world.writes else None)
    saved = state["about"]
    reached = {_rate(i): repr(group["lr"]) for i, group in enumerate(state["optimizer"]["param_groups"])}
    # A run that goes on in the same process brings the rate that it had reached.
    now = {k: saved.get(k, v) if reached.get(k) == v else v for k, v in run.about.items()}
    _refuse_change(path, saved, now)
    if isinstance(run.scheduler, LambdaLR):  # functions are not in the file: ask them for the rate reached
        last, factors = state["scheduler"], run.scheduler.lr_lambdas
        rates = [base * f(last["last_epoch"]) for base, f in zip(last["base_lrs"], factors, strict=True)]
        _refuse_change(path, _rates(last["_last_lr"]), _rates(rates))
    if len(state["noise"]) != world.size:
        raise ConfigError(
            f"processes that resume {path}",
            got=world.size,
            want=str(len(state["noise"])),
            remedy="Start as many processes as wrote it, or pass resume=False.",
        )
    run.model.load_state_dict(state["model"])
    run.optimizer.load_state_dict(state["optimizer"])
    if run.scheduler is not None:
        run.scheduler.load_state_dict(state["scheduler"])
    run.scaler.load_state_dict(state["scaler"])
    run.generator.set_state(state["generator"])
    run.history.load_state_dict(state["history"])
    set_rng_state(state["noise"][world.rank])


#: What a checkpoint holds.
KEYS = {"about", "model", "optimizer", "scheduler", "scaler", "generator", "noise", "history"}


def read(path: str | Path) -> dict[str, Any]:
    """Return the content of a checkpoint, all tensors on the CPU.

    Every byte is checked against the checksums in the file first, because
    ``torch.load`` itself does not notice a flipped bit inside a tensor.

    Raises:
        DataError: the file is missing, torn, or not a checkpoint of this loop.
    """
    remedy = "Delete the file to start afresh, or restore it from a copy."
    want = "a whole checkpoint of handbook_src.training"
    try:
        with zipfile.ZipFile(path) as archive:
            torn = archive.testzip()
        state = None if torn else torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise DataError(f"checkpoint {path}", got="no such file", want=want, remedy="Check the path.") from None
    except Exception as e:  # unpickling a foreign file can raise nearly anything
        raise DataError(
            f"checkpoint {path}", got=f"{type(e).__name__} while reading it", want=want, remedy=remedy
        ) from e
    if torn:
        raise DataError(f"checkpoint {path}", got=f"a damaged record {torn}", want=want, remedy=remedy)
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        mark = state.get("format") if isinstance(state, dict) else type(state).__name__
        raise DataError(f"checkpoint {path}", got=f"format {mark!r}", want=f"format {FORMAT!r}", remedy=remedy)
    if absent := KEYS - set(state):
        raise DataError(f"checkpoint {path}", got=f"no {', '.join(sorted(absent))}", want=want, remedy=remedy)
    return state


def _refuse_change(path: str | Path, saved: dict[str, str], now: dict[str, str]) -> None:
    changed = [k for k in {**saved, **now} if saved.get(k) != now.get(k)]
    if changed:
        name = changed[0]
        more = f" ({len(changed) - 1} more differ)" if len(changed) > 1 else ""
        raise ConfigError(
            f"{name}{more} on resuming {path}",
            got=now.get(name, "nothing"),
            want=f"{saved.get(name, 'nothing')} as saved",
            remedy="Restore the setting, name another checkpoint file, or pass resume=False to start afresh.",
        )


def rng_state() -> dict[str, Any]:
    """Return the state of every global generator: Python, NumPy, torch, CUDA."""
    kind, keys, *rest = np.random.get_state()
    return {
        "python": random.getstate(),
        "numpy": [kind, torch.from_numpy(np.asarray(keys, dtype=np.int64)), *rest],
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def set_rng_state(state: dict[str, Any]) -> None:
    """Put back what :func:`rng_state` returned."""
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    kind, keys, *rest = state["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), *rest))
    torch.set_rng_state(state["torch"])
    if state["cuda"] and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(state["cuda"])
