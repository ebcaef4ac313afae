"""One readable loop: progress bar, monitor, checkpoint and resume, ready for ``torchrun``."""

from handbook_src.training.distributed import local_device
from handbook_src.training.history import History
from handbook_src.training.loop import train

__all__ = ["History", "local_device", "train"]
