"""Many layers against what people would use instead, in one run: the tables of the pages on CPU time."""

from __future__ import annotations

import statistics
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from handbook_src.bench.bench import bench

Call = Callable[..., Any]


@dataclass(frozen=True)
class Heat:
    """One comparison: a layer, its rival, and whether gradients were asked for."""

    family: str
    layer: str
    rival: str
    mode: str
    #: both run the same operations of torch on the same sizes: whatever their times say is noise.
    same: bool
    #: our median time, the geometric mean of the ratios, and its 95 % interval.
    ms: float
    ratio: float
    low: float
    high: float


@dataclass
class Race:
    """Comparisons made one after another; both of a pair take turns, and agree before anything is timed.

    ``forward`` is a call without gradients; ``step`` is a call and the gradient of every floating input and
    parameter.  A ratio above one means that ours is faster.

    Args:
        rounds: readings of each.
        limit: what a layer may cost beside its rival.
    """

    rounds: int = 9
    limit: float = 1.05
    heats: list[Heat] = field(default_factory=list)

    def run(
        self,
        family: str,
        layer: str,
        rival: str,
        ours: Call,
        theirs: Call,
        *inputs: Tensor,
        check: float = 1e-4,
        modules: tuple[Any, Any] | None = None,
        step: bool = True,
    ) -> None:
        """Time ``ours`` against ``theirs`` on the same inputs.

        Args:
            family: which table it stands in.
            layer: what is timed.
            rival: whose it is.
            ours: called with the inputs.
            theirs: the same.
            inputs: copied; floating ones are differentiated in a step.
            check: the largest relative error between the two outputs, and between their first gradients.
            modules: where the parameters are, if ``ours`` and ``theirs`` are not modules themselves.
            step: time a step as well, where both have something to differentiate.

        Raises:
            AssertionError: the two don't agree.
        """
        xs = [x.detach().clone().requires_grad_() if x.is_floating_point() else x for x in inputs]
        wanted = [[x for x in (*xs, *_parameters(m)) if x.requires_grad] for m in modules or (ours, theirs)]
        modes = {"forward": (_forward(theirs, xs), _forward(ours, xs))}
        if step and all(wanted):
            modes["step"] = (_step(theirs, xs, wanted[1]), _step(ours, xs, wanted[0]))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for mode, (a, b) in modes.items():
                row = bench({rival: a, "handbook": b}, check=check, rounds=self.rounds)[1]
                same = operations(a) == operations(b)
                found = row.ms, row.ratio, row.ratio_low, row.ratio_high
                self.heats.append(Heat(family, layer, rival, mode, same, *found))

    def data(self) -> dict[str, Any]:
        """Return what a record keeps."""
        return {"heats": [asdict(h) for h in self.heats]}

    @classmethod
    def of(cls, *found: Mapping[str, Any], limit: float = 1.05) -> Race:
        """Return one race of what several left behind as ``data``."""
        return cls(limit=limit, heats=[Heat(**h) for data in found for h in data["heats"]])

    def rows(self, family: str) -> list[dict[str, Any]]:
        """Return the rows of a family's table, a pair a row."""
        names = dict.fromkeys((h.layer, h.rival) for h in self.heats if h.family == family)
        found = []
        for layer, rival in names:
            of = {h.mode: h for h in self.heats if (h.family, h.layer, h.rival) == (family, layer, rival)}
            row: dict[str, Any] = {"layer": layer, "against": rival, "forward (ms)": of["forward"].ms}
            for mode in ("forward", "step"):
                row[f"speed, {mode}"] = spoken(of[mode]) if mode in of else ""
            found.append(row)
        return found

    def slow(self, heats: Iterable[Heat] | None = None) -> list[Heat]:
        """Return the heats that are slower than the limit, by the upper end of their interval."""
        return [h for h in (self.heats if heats is None else heats) if not h.same and h.high < 1 / self.limit]

    def mean(self, mode: str, rivals: Iterable[str] | None = None) -> float:
        """Return the geometric mean of one mode, where operations differ; against all rivals or some."""
        wanted = None if rivals is None else set(rivals)
        ratios = [
            h.ratio for h in self.heats if h.mode == mode and not h.same and (wanted is None or h.rival in wanted)
        ]
        return statistics.geometric_mean(ratios) if ratios else float("nan")


def spoken(heat: Heat) -> str:
    """Return a ratio and its interval as a table says them."""
    ratio = f"{heat.ratio:.2f} ({heat.low:.2f} to {heat.high:.2f})"
    return f"equal; {ratio}" if heat.same else ratio


class _Watch(TorchDispatchMode):
    """Notes each operation of torch with the sizes it works on; views cost nothing and are left out."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Any] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not func.is_view:
            sizes = [tuple(x.shape) if isinstance(x, Tensor) else type(x).__name__ for x in args]
            self.seen.append((str(func), sizes))
        return func(*args, **(kwargs or {}))


def operations(call: Callable[[], Any]) -> list[Any]:
    """Return the operations that a call ends in, in their order."""
    with _Watch() as watch:
        call()
    return watch.seen


def same_weights(ours: nn.Module, theirs: nn.Module) -> None:
    """Give ``theirs`` our weights, in their order.

    Raises:
        AssertionError: the two don't have the same shapes in the same order.
    """
    mine = [t for t in ours.state_dict().values() if t.numel()]
    other = [t for t in theirs.state_dict().values() if t.numel()]
    assert [t.shape for t in mine] == [t.shape for t in other], type(ours).__name__
    with torch.no_grad():
        for a, b in zip(mine, other, strict=True):
            b.copy_(a)


def installed(build: Callable[[], Any]) -> Any:
    """Return what ``build`` makes, or ``None`` where the library it imports is not installed."""
    try:
        return build()
    except ImportError:
        return None


def _first(y: Any) -> Tensor:
    """The tensor in what a layer returns."""
    while not isinstance(y, Tensor):
        y = y[0]
    return y


def _parameters(module: Any) -> Iterable[Tensor]:
    return module.parameters() if isinstance(module, nn.Module) else ()


def _forward(call: Call, xs: list[Tensor]) -> Callable[[], Tensor]:
    def run() -> Tensor:
        with torch.no_grad():
            return _first(call(*xs))

    return run


def _step(call: Call, xs: list[Tensor], wanted: list[Tensor]) -> Callable[[], Tensor]:
    def run() -> Tensor:
        y = _first(call(*xs))
        found = torch.autograd.grad(y, wanted, torch.ones_like(y), allow_unused=True)
        return next(g for g in found if g is not None)

    return run
