"""The same loop on one process or on many: ``torchrun --nproc-per-node 2 script.py``.

A step is a fixed number of micro-batches.  Every process draws all of them from
the same generator and keeps each ``size``-th, so the numbers that a run sees
don't depend on how many processes share the work.
"""

from __future__ import annotations

import atexit
import os
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel


@dataclass(frozen=True)
class World:
    """The processes that work on one run."""

    rank: int = 0
    size: int = 1

    @property
    def writes(self) -> bool:
        """Whether this process writes checkpoints and shows progress."""
        return self.rank == 0

    def wrap(self, model: nn.Module) -> nn.Module:
        """Return ``model`` so that its backward pass averages gradients over the processes."""
        return model if self.size == 1 else DistributedDataParallel(model)

    def quiet(self, net: nn.Module, last: bool) -> AbstractContextManager[Any]:
        """Hold gradients back until the last micro-batch: one exchange per step, not one per backward."""
        if last or not isinstance(net, DistributedDataParallel):
            return nullcontext()
        return net.no_sync()

    def mean(self, value: Tensor) -> Tensor:
        """Average over the processes; a NaN in one is a NaN in all, so all of them stop."""
        if self.size > 1:
            dist.all_reduce(value)
            value /= self.size
        return value

    def gather(self, thing: Any) -> list[Any]:
        """Collect one object per process, in the order of ranks."""
        if self.size == 1:
            return [thing]
        things: list[Any] = [None] * self.size
        dist.all_gather_object(things, thing)
        return things

    def from_first(self, thing: Any) -> Any:
        """Return rank 0's object on every process."""
        box = [thing]
        if self.size > 1:
            dist.broadcast_object_list(box, src=0)
        return box[0]


def join() -> World:
    """Join the processes that ``torchrun`` started; alone, be the only one.

    The process group is made once and left open until the interpreter ends.  Each
    process gets its own stream of dropout noise: the global seed plus its rank.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or "RANK" not in os.environ:
        return World()
    if not dist.is_initialized():
        if (device := local_device()).type == "cuda":
            torch.cuda.set_device(device)  # or every process would gather its objects on GPU 0
        dist.init_process_group()
        atexit.register(_leave)
        torch.manual_seed(torch.initial_seed() + dist.get_rank())
    return World(dist.get_rank(), dist.get_world_size())


def _leave() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def local_device() -> torch.device:
    """Return the device this process should use: its own GPU where there is one, else the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    return torch.device("cpu")
