"""The most memory that a call holds at once, as the allocator saw it."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from handbook_src.errors import ConfigError


def peak_bytes(call: Callable[[], Any], *, device: torch.device | str = "cpu") -> int:
    r"""Run ``call`` once and return the most bytes it held at a time, beyond what was there before.

    .. math:: \max_\tau \sum_{i \le \tau} \Delta_i

    :math:`\Delta_i` are the allocator's events in order, what is taken positive and what is given back
    negative.  Inputs that exist already don't count; the result and what autograd saves do.  On a GPU it is
    the allocator's own peak.  Memory that a library takes past torch's allocator is not seen.

    Args:
        call: what is measured, without arguments; its result is dropped.
        device: where it runs.

    Raises:
        ConfigError: ``call`` can't be called, or there is no such device.

    Example:
        >>> peak_bytes(lambda: torch.zeros(1000).neg())
        8000
    """
    if not callable(call):
        raise ConfigError("peak_bytes call", got=type(call).__name__, want="a function", remedy="Wrap it in a lambda.")
    try:
        where = torch.device(device)
    except (RuntimeError, TypeError) as e:
        raise ConfigError("peak_bytes device", got=repr(device), want="a device of torch", remedy="Pass 'cpu'.") from e
    if where.type == "cuda":
        torch.cuda.synchronize(where)
        before = torch.cuda.memory_allocated(where)
        torch.cuda.reset_peak_memory_stats(where)
        result = call()
        peak = torch.cuda.max_memory_allocated(where) - before
        del result
        return peak
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # it prints two lines each time otherwise
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as watched:
        result = call()
    del result
    held = peak = 0
    for change in _changes(watched):
        held += change
        peak = max(peak, held)
    return peak


def _changes(watched: profile) -> list[int]:
    """Bytes taken (positive) and given back (negative), in the order of time."""
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        watched.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text())["traceEvents"]
    found = [e for e in events if e.get("name") == "[memory]"]
    return [int(e["args"]["Bytes"]) for e in sorted(found, key=lambda e: e["ts"])]
