"""An operation: the maths, and beside it what it refuses and what runs faster."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any, NamedTuple, ParamSpec, Protocol, TypeVar, cast, runtime_checkable

import torch
from torch import Tensor

from handbook_src.dispatch import resolve

P = ParamSpec("P")
R = TypeVar("R", covariant=True)
Needs = Callable[..., str | None]
HALVES = (torch.float16, torch.bfloat16)


@runtime_checkable
class Operation(Protocol[P, R]):
    """A function of the maths, with what hangs on it."""

    __name__: str
    #: the function itself, without checks and ways: for maths that builds on it
    maths: Callable[..., Any]

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R: ...

    def refuses(self, check: Callable[..., None]) -> Callable[..., None]:
        """Add a check that runs before anything is computed."""

    def torch(self, *, needs: Needs | None = None) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
        """Add torch's own operation; ``needs`` says what it lacks for these arguments, None for nothing."""

    def triton(self, *, needs: Needs | None = None) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
        """Add the handbook's kernel; ``needs`` as above."""


def operation(*, widens: str = "", needs: Needs | None = None) -> Callable[[Callable[P, R]], Operation[P, R]]:
    """Make an operation of a function that is nothing but the maths.

    Checks and faster ways hang on it, as with ``functools.singledispatch``, and name the
    arguments that they read::

        @operation(widens="x")
        def rms_norm(x, weight=None, eps=1e-6, *, backend="auto"):
            y = x / torch.sqrt(x.square().mean(-1, keepdim=True) + eps)
            return y if weight is None else y * weight

        @rms_norm.refuses
        def _(x, eps): ...

        @rms_norm.torch(needs=one_dtype)
        def _(x, weight, eps): return F.rms_norm(x, x.shape[-1:], weight, eps)

    A call runs the checks, then the first way that lacks nothing, in the order in which they
    were added, and the maths where there is none. ``backend`` names one instead; the maths is
    ``reference``.

    Args:
        widens: names of arguments that reach the maths in float32 where they are halves; the
            answer is then rounded once, to the dtype of the first of them.
        needs: says what the maths lacks for these arguments, None for nothing.
    """

    def decorate(maths: Callable[P, R]) -> Operation[P, R]:
        inside = _Operation(maths, widens.split(), needs)
        call: Any = _with_the_signature_of(maths, inside.run)
        call.refuses, call.torch, call.triton = inside.refuses, inside.torch, inside.triton
        call.maths = maths
        return cast(Operation[P, R], call)

    return decorate


class _Way(NamedTuple):
    function: Callable[..., Any]
    takes: list[int]
    needs: Needs | None
    reads: list[int]

    def lacks(self, given: tuple[Any, ...]) -> str | None:
        return None if self.needs is None else self.needs(*[given[i] for i in self.reads])


class _Operation:
    """What stands behind the function that users call; arguments come as a tuple, in the order of the signature."""

    def __init__(self, maths: Callable[..., Any], widens: list[str], needs: Needs | None) -> None:
        parameters = inspect.signature(maths).parameters
        self.maths = maths
        self.names = [name for name in parameters if name != "backend"]
        self.positional = sum(p.kind is not p.KEYWORD_ONLY for p in parameters.values())
        self.widens = self.places(widens)
        self.checks: list[tuple[Callable[..., None], list[int]]] = []
        self.ways: dict[str, _Way] = {}
        self.itself = _Way(self.reference, [], needs, self.read_by(needs) if needs else [])

    def run(self, given: tuple[Any, ...], backend: str) -> Any:
        for check, reads in self.checks:
            check(*[given[i] for i in reads])
        way = self.chosen(given, backend)
        return self.reference(given) if way is None else way.function(*[given[i] for i in way.takes])

    def chosen(self, given: tuple[Any, ...], backend: str) -> _Way | None:
        if backend == "auto":
            for way in self.ways.values():
                if way.lacks(given) is None:
                    return way
        lacks: dict[Any, str | None] = {name: way.lacks(given) for name, way in self.ways.items()}
        lacks["reference"] = self.itself.lacks(given)
        return self.ways.get(resolve(self.maths.__name__, cast(Any, backend), lacks))

    def reference(self, given: tuple[Any, ...]) -> Any:
        halves = [i for i in self.widens if isinstance(given[i], Tensor) and given[i].dtype in HALVES]
        wide = tuple(g.float() if i in halves else g for i, g in enumerate(given)) if halves else given
        by_name = dict(zip(self.names[self.positional :], wide[self.positional :], strict=True))
        y = self.maths(*wide[: self.positional], **by_name)
        return y.to(given[self.widens[0]].dtype) if self.widens else y

    def places(self, names: list[str]) -> list[int]:
        return [self.names.index(name) for name in names]

    def read_by(self, function: Callable[..., Any]) -> list[int]:
        """Which arguments a function names; ``*rest`` stands for all that follow."""
        parameters = inspect.signature(function).parameters.values()
        found = self.places([p.name for p in parameters if p.kind is not p.VAR_POSITIONAL])
        rest = any(p.kind is p.VAR_POSITIONAL for p in parameters)
        return found + (list(range(len(found), len(self.names))) if rest else [])

    def refuses(self, check: Callable[..., None]) -> Callable[..., None]:
        self.checks.append((check, self.read_by(check)))
        return check

    def torch(self, *, needs: Needs | None = None) -> Any:
        return functools.partial(self.add, "torch", needs)

    def triton(self, *, needs: Needs | None = None) -> Any:
        return functools.partial(self.add, "triton", needs)

    def add(self, name: str, needs: Needs | None, way: Callable[..., Any]) -> Callable[..., Any]:
        self.ways[name] = _Way(way, self.read_by(way), needs, self.read_by(needs) if needs else [])
        return way


def _with_the_signature_of(maths: Callable[..., Any], run: Callable[[tuple[Any, ...], str], Any]) -> Callable[..., Any]:
    """A function with the arguments of ``maths``, so that Python itself binds them: ten times faster than inspect."""
    parameters = list(inspect.signature(maths).parameters.values())
    words = [p.name if p.default is p.empty else f"{p.name}=defaults[{p.name!r}]" for p in parameters]
    words.insert(sum(p.kind is not p.KEYWORD_ONLY for p in parameters), "*")
    given = "".join(f"{p.name}, " for p in parameters if p.name != "backend")
    space: dict[str, Any] = {"run": run, "defaults": {p.name: p.default for p in parameters}}
    exec(f"def {maths.__name__}({', '.join(words)}): return run(({given}), backend)", space)
    return functools.wraps(maths)(space[maths.__name__])
