"""Timing that means something: parity first, rounds interleaved, noise on show.

Candidates take turns, so a machine that slows down slows all of them.  A ratio is
formed within a round and its geometric mean taken over the rounds; the 95 % interval
beside it says whether the difference is larger than the noise.
"""

from __future__ import annotations

import csv
import math
import platform
import shutil
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from handbook_src.errors import ConfigError, DataError
from handbook_src.judge import confidence
from handbook_src.testing.parity import relative_error

Candidate = Callable[[], Any]
SHORTEST_MS = 1.0  # one reading lasts at least this long; the clock resolves 0.1 us
FLUSH_BYTES = 256 * 2**20  # more than the 50 MB second-level cache of an H100


@dataclass(frozen=True)
class Row:
    """One line of ``kernels/*/results/*.csv``; the fields are its columns."""

    device: str
    driver: str
    torch: str
    triton: str
    date: str
    op: str
    shape: str
    dtype: str
    backend: str
    #: median over the rounds, and the quartiles.
    ms: float
    ms_low: float
    ms_high: float
    #: time of the baseline divided by this one's, above 1 is faster: geometric mean, 95 % interval.
    ratio: float
    ratio_low: float
    ratio_high: float
    baseline: str
    rounds: int
    #: bytes that must move, divided by the median time; 0 where nobody counted them.
    gb_per_s: float

    @property
    def verdict(self) -> str:
        """``faster`` or ``slower`` than the baseline by the whole interval, else ``no difference``."""
        if self.ratio_low > 1:
            return "faster"
        return "slower" if self.ratio_high < 1 else "no difference"


def bench(
    candidates: Mapping[str, Candidate],
    *,
    check: Callable[[], Any] | float,
    baseline: str | None = None,
    op: str = "",
    shape: str | Sequence[int] = "",
    dtype: str | torch.dtype = "",
    rounds: int = 15,
    bytes_moved: int | None = None,
    device: str | torch.device = "cpu",
) -> list[Row]:
    """Check that the candidates agree, then time them against each other.

    Args:
        candidates: by backend's name; called without arguments.
        check: what must hold before anything is timed: a callable that raises or
            returns False where parity is red, or the largest relative error
            between the baseline's output and each other's.
        baseline: the candidate that ratios refer to; the first if not given.
        op: the operation's name, for the CSV.
        shape: for the CSV.
        dtype: for the CSV.
        rounds: readings per candidate, taken in turns.
        bytes_moved: bytes that the operation must read and write, for GB/s.
        device: where the candidates run; on a GPU time is taken by events, and
            the second-level cache is overwritten before each reading.

    Raises:
        AssertionError: parity is red; nothing has been timed.
        ConfigError: no candidates, an unknown baseline, or too few rounds for quartiles.
    """
    names = list(candidates)
    first = baseline if baseline is not None else next(iter(names), "")
    if first not in candidates:
        raise ConfigError("baseline", got=repr(first), want=f"one of {names}", remedy="Name a candidate.")
    if rounds < 5:
        raise ConfigError("rounds", got=rounds, want="at least 5", remedy="Quartiles of fewer say nothing.")
    _assert_green(candidates, first, check)
    where = torch.device(device)
    took = take_turns(candidates, rounds, where)
    facts: dict[str, Any] = {
        **device_stamp(where),
        "op": op,
        "shape": shape if isinstance(shape, str) else "x".join(map(str, shape)),
        "dtype": str(dtype).removeprefix("torch."),
        "baseline": first,
        "rounds": rounds,
    }
    return [Row(**facts, backend=name, **_statistics(took[name], took[first], bytes_moved or 0)) for name in names]


def _statistics(mine: Sequence[float], base: Sequence[float], bytes_moved: int) -> dict[str, Any]:
    low, ms, high = _quartiles(mine)
    theirs, ours = ([math.log(t) for t in side] for side in (base, mine))
    ratio, ratio_low, ratio_high = map(math.exp, confidence(theirs, ours, paired=True, interval="t"))
    return {
        "ms": ms,
        "ms_low": low,
        "ms_high": high,
        "ratio": ratio,
        "ratio_low": ratio_low,
        "ratio_high": ratio_high,
        "gb_per_s": bytes_moved / ms / 1e6,
    }


def table_rows(rows: Sequence[Row]) -> list[dict[str, str]]:
    """Return the rows of a chapter's table; show it in a cell tagged ``nbval-ignore-output``."""
    return [
        {
            "backend": r.backend,
            "time, ms": f"{r.ms:.3g}",
            "middle half": f"{r.ms_low:.3g} to {r.ms_high:.3g}",
            f"speed against {r.baseline}": f"{r.ratio:.2f} ({r.ratio_low:.2f} to {r.ratio_high:.2f})",
            "verdict": "baseline" if r.backend == r.baseline else r.verdict,
        }
        for r in rows
    ]


def write_csv(path: str | Path, rows: Sequence[Row]) -> None:
    """Append ``rows`` to a results file, with its head if the file is new.

    Raises:
        DataError: the file has other columns.
    """
    path, columns = Path(path), [f.name for f in fields(Row)]
    path.parent.mkdir(parents=True, exist_ok=True)
    new = not path.exists() or path.stat().st_size == 0
    if not new:
        with path.open(newline="", encoding="utf8") as file:
            found = next(csv.reader(file))
        if found != columns:
            raise DataError(
                f"columns of {path}", got=found, want=str(columns), remedy="Start a new file for the new schema."
            )
    with path.open("a", newline="", encoding="utf8") as file:
        write = csv.DictWriter(file, columns, lineterminator="\n")
        if new:
            write.writeheader()
        write.writerows(_rounded(r) for r in rows)


def device_stamp(device: str | torch.device = "cpu") -> dict[str, str]:
    """Return what a time is worth nothing without: device, driver, torch, triton, date."""
    on_gpu = torch.device(device).type == "cuda"
    return {
        "device": torch.cuda.get_device_name(device) if on_gpu else _processor(),
        "driver": _driver() if on_gpu else "-",
        "torch": torch.__version__,
        "triton": _version("triton"),
        "date": datetime.now(UTC).date().isoformat(),
    }


def _assert_green(candidates: Mapping[str, Candidate], baseline: str, check: Callable[[], Any] | float) -> None:
    if callable(check):
        if check() is False:
            raise AssertionError("parity is red: the check returned False; nothing was timed")
        return
    want = candidates[baseline]()
    for name, run in candidates.items():
        for i, (a, b) in enumerate(zip(_tensors(run()), _tensors(want), strict=True)):
            error = relative_error(a, b) if a.shape == b.shape else float("nan")
            if not error <= check:
                raise AssertionError(
                    f"parity is red: output {i} of {name} is {error:.2e} from {baseline}'s, "
                    f"allowed {check:.2e}; nothing was timed"
                )


def _tensors(out: Any) -> list[torch.Tensor]:
    found = [out] if isinstance(out, torch.Tensor) else [o for o in out or () if isinstance(o, torch.Tensor)]
    if not found:
        raise ConfigError(
            "check",
            got="a tolerance for candidates that return no tensor",
            want="outputs to compare",
            remedy="Return the outputs, or pass a callable as check.",
        )
    return found


def take_turns(
    candidates: Mapping[str, Candidate], rounds: int, device: torch.device | str = "cpu"
) -> dict[str, list[float]]:
    """Return the readings in ms, one per round; each round starts with another candidate."""
    device = torch.device(device)
    read = _read_gpu if device.type == "cuda" else _read_cpu
    repeats = {}
    for name, run in candidates.items():
        for _ in range(3):  # warm up: compilers, caches, the allocator
            run()
        repeats[name] = min(1000, max(1, round(SHORTEST_MS / max(read(run, 1, device), 1e-6))))
    took: dict[str, list[float]] = {name: [] for name in candidates}
    names = list(candidates)
    for r in range(rounds):
        for name in names[r % len(names) :] + names[: r % len(names)]:
            took[name].append(read(candidates[name], repeats[name], device))
    return took


def _read_cpu(run: Candidate, repeats: int, device: torch.device) -> float:
    start = time.perf_counter_ns()
    for _ in range(repeats):
        run()
    return (time.perf_counter_ns() - start) / repeats / 1e6


def _read_gpu(run: Candidate, repeats: int, device: torch.device) -> float:
    junk = torch.empty(FLUSH_BYTES, dtype=torch.int8, device=device)
    marks = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(repeats)]
    for start, end in marks:
        junk.zero_()
        start.record()
        run()
        end.record()
    torch.cuda.synchronize(device)
    return statistics.median(start.elapsed_time(end) for start, end in marks)


def _quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, middle, high


def _rounded(row: Row) -> dict[str, Any]:
    return {k: f"{v:.4g}" if isinstance(v, float) else v for k, v in asdict(row).items()}


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _driver() -> str:
    if shutil.which("nvidia-smi") is None:
        return "-"
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    lines = subprocess.run(command, capture_output=True, text=True).stdout.splitlines()
    return lines[0].strip() if lines else "-"


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "-"
