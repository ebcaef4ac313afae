"""Walk through a traced network, layer by layer; what :mod:`handbook_src.metrics.receptive_field` stands on.

What is not known here by name is refused: a layer that is guessed wrong gives a wrong answer in silence.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

from torch import Tensor, fx, nn
from torch.nn.utils import parametrize

from handbook_src.errors import ConfigError, ShapeError

V = TypeVar("V")

_LAYERS = """
Identity Sequential Dropout Dropout1d Dropout2d Dropout3d AlphaDropout BatchNorm1d BatchNorm2d BatchNorm3d SyncBatchNorm
FrozenBatchNorm2d ReLU ReLU6 LeakyReLU PReLU RReLU ELU CELU SELU GELU SiLU Mish Sigmoid LogSigmoid Tanh Softplus
Softsign Hardtanh Hardswish Hardsigmoid Hardshrink Threshold
"""
#: Layers that leave every position where it is, by name: torch's and this package's alike.
POINTWISE = frozenset(_LAYERS.split())
#: Layers of torch and of this package whose outputs read a window, or stamp one: what else has a kernel is refused.
CONVOLUTIONS = {"Conv1d", "Conv2d", "Conv3d", "Conv4d", "DepthwiseSeparableConv2d"}
TRANSPOSED = {"ConvTranspose1d", "ConvTranspose2d", "ConvTranspose3d"}
POOLS = {"StochasticPool2d"} | {f"{kind}Pool{n}d" for kind in ("Max", "Avg") for n in (1, 2, 3)}
#: Layers that reduce each plane to one number, in some setting.
WHOLE = {"GlobalPool"} | {f"Adaptive{kind}Pool{n}d" for kind in ("Avg", "Max") for n in (1, 2, 3)}
POINTWISE_CALLS = {"relu", "relu_", "relu6", "leaky_relu", "gelu", "silu", "sigmoid", "tanh", "dropout", "clone"}
JOINS = {"cat", "concat"}
IN_PLACE = {"iadd", "add_", "imul", "mul_"}
MEETINGS = {"add", "sub", "mul"} | IN_PLACE | JOINS
_HOMES = ("torch.", "handbook_src.")


class _Leaves(fx.Tracer):
    """Stops at the layers known here and at modules without parts; goes into everything else."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return next(m.children(), None) is None or parametrize.is_parametrized(m)


def kind_of(layer: nn.Module) -> str:
    """Return the name of the layer's class."""
    return _class(layer).__name__


def _class(layer: nn.Module) -> type:
    return type(layer).__bases__[0] if parametrize.is_parametrized(layer) else type(layer)


def _trace(module: nn.Module) -> tuple[nn.Module, fx.Graph]:
    """Return the network and its graph; a bare layer is wrapped, so that it stays one step."""
    if not isinstance(module, nn.Module):
        got = type(module).__name__
        raise ConfigError("receptive_field module", got=got, want="an nn.Module", remedy="Wrap it in a module.")
    layer = hasattr(module, "kernel_size") or _class(module).__module__.startswith(_HOMES)
    if layer and _Leaves().is_leaf_module(module, ""):
        root = nn.Sequential()
        root.add_module(kind_of(module), module)
        module = root
    try:
        return module, _Leaves().trace(module)
    except (AttributeError, RuntimeError, TypeError, ValueError) as error:
        raise ConfigError(
            "receptive_field module",
            got=f"{type(error).__name__} while tracing: {error}",
            want="a forward that torch.fx can trace, without branches that depend on values",
            remedy="Give the part without them, for instance as nn.Sequential of its layers.",
        ) from error


def walk(
    module: nn.Module, start: V, through: Callable[[str, nn.Module, V], V], meet: Callable[[str, list[V]], V]
) -> Iterator[tuple[str, V]]:
    """Carry a value through the network: ``through`` each layer, ``meet`` where branches meet."""
    root, graph = _trace(module)
    values: dict[fx.Node, V] = {}
    for node in graph.nodes:
        if node.op == "placeholder" and node.users:
            if values:
                raise unknown(f"a second input, {node.name!r}")
            values[node] = start
        elif node.op == "output":
            yield "output", values[_single(node.args[0], values)]
        elif node.op in ("call_module", "call_function", "call_method"):
            before = [values[n] for n in _inputs(node) if n in values]
            name = _call(root, node, values)
            if node.op == "call_module":
                values[node] = through(name, root.get_submodule(name), before[0])
            elif name in POINTWISE_CALLS:
                values[node] = before[0]
            else:
                _check_join(node, name, start)
                values[node] = meet(name, before) if len(before) > 1 else before[0]
            if values[node] is not before[0]:
                yield (name if node.op == "call_module" else node.name), values[node]


def _inputs(node: fx.Node) -> list[fx.Node]:
    """Return the nodes that ``node`` reads; one that it reads twice, twice."""
    found: list[fx.Node] = []
    fx.map_arg((node.args, node.kwargs), found.append)
    return found


def _call(root: nn.Module, node: fx.Node, values: dict[fx.Node, Any]) -> str:
    """Return the name of what ``node`` calls; refuse what is not understood."""
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    if node.op == "call_module":
        if len(node.args) + len(node.kwargs) != 1 or _inputs(node)[0] not in values:
            raise unknown(f"{name!r} called with more than one argument")
        return name
    if name not in POINTWISE_CALLS | MEETINGS:
        raise unknown(f"the call {name}")
    fixed = [n for n in _inputs(node) if n not in values]
    if len(fixed) == len(_inputs(node)) or not all(_broadcasts(root, n, values) for n in fixed):
        raise unknown(f"the call {name} on a parameter or buffer that has spatial axes or comes from a call")
    first = node.args[0] if node.args else None
    if name in IN_PLACE and isinstance(first, fx.Node) and any(user > node for user in first.users):
        raise unknown(f"{name} in place on a value that is read again")
    return name


def _broadcasts(root: nn.Module, node: fx.Node, values: dict[fx.Node, Any]) -> bool:
    """Whether ``node`` is a parameter or buffer without spatial extent, as a scale for each channel."""
    if node.op != "get_attr":
        return False
    path, _, name = str(node.target).rpartition(".")
    tensor = getattr(root.get_submodule(path), name)
    axes = _axes(next(iter(values.values())))
    return isinstance(tensor, Tensor) and all(n == 1 for n in tensor.shape[-axes:])


def _axes(value: Any) -> int:
    return value.ndim - 2 if isinstance(value, Tensor) else len(value)


def _check_join(node: fx.Node, name: str, start: Any) -> None:
    """Refuse to join anything but channels."""
    if name not in JOINS:
        return
    if any(n.op == "get_attr" for n in _inputs(node)):
        raise unknown(f"{name} of a parameter or buffer")
    dim = node.kwargs.get("dim", node.kwargs.get("axis", node.args[1] if len(node.args) > 1 else 0))
    if dim not in (1, -_axes(start) - 1):
        raise unknown(f"{name} along axis {dim}, not the channels' axis 1")


def _single(output: Any, values: dict[fx.Node, Any]) -> fx.Node:
    if not isinstance(output, fx.Node):
        raise ConfigError(
            "receptive_field output", got=f"{type(output).__name__}", want="one tensor", remedy="Return one of them."
        )
    if output not in values:
        raise unknown(f"an output, {output.name}, that does not come from the input")
    return output


def known(name: str, layer: Any, axes: int) -> str:
    """Return the layer's kind; refuse it if its reach is not known here."""
    kind = kind_of(layer)
    ours = _class(layer).__module__.startswith(_HOMES)
    if kind not in POINTWISE and not (ours and kind in {"Upsample"} | WHOLE | POOLS | CONVOLUTIONS | TRANSPOSED):
        raise unknown(f"{kind} at {name!r}")
    if getattr(layer, "return_indices", False):
        raise unknown(f"{kind} at {name!r} with return_indices")
    if kind == "GlobalPool" and not layer.keepdim:
        raise unknown(f"GlobalPool at {name!r} without keepdim")
    if kind.startswith("Adaptive"):
        size = layer.output_size
        if set(size if isinstance(size, Sequence) else [size]) != {1}:
            raise unknown(f"{kind} at {name!r} with output_size {size}")
    digit = re.search(r"(\d)d$", kind)
    if digit and not kind.startswith(("Dropout", "FrozenBatchNorm")) and int(digit[1]) != axes:
        raise ShapeError(
            f"receptive_field at {name!r}",
            got=f"{axes} spatial axes",
            want=f"{digit[1]} for {kind}",
            remedy="Give input_shape as (channels, *spatial), without the batch.",
        )
    return kind


def unknown(what: str) -> ConfigError:
    return ConfigError(
        "receptive_field",
        got=what,
        want="convolutions, pooling, upsampling, batch norm, activations, sums and concatenations of channels",
        remedy="Measure the part before it.",
    )
