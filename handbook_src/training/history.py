"""The monitor: what each step of a run measured, and what the evaluations found."""

from __future__ import annotations

import csv
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any


@dataclass
class History:
    """One list per quantity, one entry per optimiser step.

    Two runs that did the same work have equal histories except for ``seconds``.
    """

    #: number of the step, from 1.
    step: list[int] = field(default_factory=list)
    #: mean loss over the step's micro-batches, over all processes.
    loss: list[float] = field(default_factory=list)
    #: Euclidean norm of the whole gradient, before clipping.
    grad_norm: list[float] = field(default_factory=list)
    #: learning rate of the first parameter group, as this step used it.
    lr: list[float] = field(default_factory=list)
    #: wall time of the step, without evaluation and checkpoint.
    seconds: list[float] = field(default_factory=list)
    #: one mapping per evaluation: ``step`` and what ``evaluate`` returned.
    evaluations: list[dict[str, float]] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.step)

    def record(self, *, loss: float, grad_norm: float, lr: float, seconds: float) -> None:
        """Append one step."""
        self.step.append(len(self) + 1)
        self.loss.append(loss)
        self.grad_norm.append(grad_norm)
        self.lr.append(lr)
        self.seconds.append(seconds)

    def state_dict(self) -> dict[str, list[Any]]:
        """Return plain lists, for a checkpoint."""
        return {f.name: list(getattr(self, f.name)) for f in fields(self)}

    def load_state_dict(self, state: dict[str, list[Any]]) -> None:
        """Take over what :meth:`state_dict` returned."""
        for f in fields(self):
            setattr(self, f.name, list(state[f.name]))

    def to_csv(self, path: str | Path) -> None:
        """Write one row per step; evaluations fill their own columns where they took place."""
        found = {int(e["step"]): {k: v for k, v in e.items() if k != "step"} for e in self.evaluations}
        extra = sorted({k for row in found.values() for k in row})
        with Path(path).open("w", newline="", encoding="utf8") as file:
            write = csv.writer(file)
            write.writerow(["step", "loss", "grad_norm", "lr", "seconds", *extra])
            for row in zip(self.step, self.loss, self.grad_norm, self.lr, self.seconds, strict=True):
                write.writerow([*row, *(found.get(row[0], {}).get(k, "") for k in extra)])
