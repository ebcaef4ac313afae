"""What a module costs: parameters, operations, and what it keeps for the backward pass."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.parameter import is_lazy
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from handbook_src.errors import ConfigError


@dataclass(frozen=True)
class Cost:
    """Three prices of one module on one input; see :func:`cost`."""

    #: numbers that are learned or could be: a parameter in two places counts once.
    parameters: int
    #: forward pass of convolutions, matrix products and attention; a multiply-accumulate is 2.
    flops: int
    #: saved between forward and backward, each storage once; parameters and buffers excluded.
    activation_bytes: int


def cost(module: nn.Module, *inputs: Any) -> Cost:
    r"""Count what ``module`` costs on ``inputs``, by running it forward once.

    A convolution from :math:`C` to :math:`C'` channels with a kernel of :math:`K` entries,
    :math:`G` groups and :math:`P` output positions on :math:`B` samples costs

    .. math:: \text{FLOPs} = 2\, B\, P\, C' \frac{C}{G} K , \qquad
        \text{parameters} = C' \frac{C}{G} K \;(+\, C' \text{ for the bias}).

    A multiply-accumulate is two FLOPs, so papers that count "multiply-adds" print half.
    Counted are convolutions, products of matrices and vectors, attention, and torch's bilinear and recurrent
    layers, by :class:`torch.utils.flop_counter.FlopCounterMode` and the formulas it lacks; biases, norms,
    activations, pooling, distances and other elementwise work are not in it.

    Memory is measured, not estimated: the bytes that autograd saves in the module's present mode,
    each storage once. Floating inputs are taken to need a gradient, as inside a network, and
    count where they are saved. Frozen parameters count as parameters, but save less.

    Nothing is changed: input tensors, parameters and buffers are copied, the random streams are put
    back. On the ``meta`` device parameters and FLOPs are the same, without the arithmetic. So are the bytes,
    except where a device has a fused operation that keeps less or more: torch's attention and LSTM.

    Args:
        module: in the mode, dtype and device to be measured.
        inputs: positional arguments of its ``forward``; tensors are copied, the rest is passed through.

    Raises:
        ConfigError: ``module`` is not a module, or a lazy one that has not seen an input.

    Example:
        >>> cost(nn.Conv2d(2, 3, 3, padding=1, bias=False), torch.ones(1, 2, 4, 5))
        Cost(parameters=54, flops=2160, activation_bytes=160)

    Source:
        the counts of torch.utils.flop_counter; multiply-adds as in He et al. 2015, table 1, arXiv:1512.03385
    """
    if not isinstance(module, nn.Module):
        raise ConfigError(
            "cost module", got=type(module).__name__, want="an nn.Module", remedy="Wrap the function in a module."
        )
    if any(is_lazy(t) for t in (*module.parameters(), *module.buffers())):
        raise ConfigError(
            "cost module",
            got=f"{type(module).__name__} with sizes still open",
            want="a module whose parameters have shapes",
            remedy="Run it once on an input.",
        )
    saved: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        if _storage(t) not in state:
            saved[_storage(t)] = t.untyped_storage().nbytes()
        return t.detach()  # shares the storage, so that no later tensor takes its address

    counter = FlopCounterMode(display=False, custom_mapping=_FORMULAS)
    with torch.random.fork_rng(devices=_gpus(module, inputs)), torch.inference_mode(False), torch.enable_grad():
        copies = [_copy(x) for x in inputs]
        own = {name: p.detach().clone().requires_grad_(p.requires_grad) for name, p in module.named_parameters()}
        own |= {name: b.detach().clone() for name, b in module.named_buffers()}
        state = {_storage(t) for t in (*own.values(), *module.parameters())}  # an LSTM holds on to its originals
        with counter, torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            kept = functional_call(module, own, tuple(copies))
    del kept
    parameters = sum(p.numel() for p in module.parameters())
    return Cost(parameters, counter.get_total_flops(), sum(saved.values()))


def _attention(query: Any, key: Any, value: Any, *args: Any, **options: Any) -> int:
    return int(sdpa_flop_count(query, key, value))


def _dot(x: Any, y: Any, *args: Any, **options: Any) -> int:
    return 2 * math.prod(x)


def _mv(matrix: Any, vector: Any, *args: Any, **options: Any) -> int:
    return 2 * math.prod(matrix)


def _addmv(x: Any, matrix: Any, vector: Any, *args: Any, **options: Any) -> int:
    return 2 * math.prod(matrix)


def _addbmm(x: Any, left: Any, right: Any, *args: Any, **options: Any) -> int:
    return 2 * math.prod(left) * right[-1]


def _trilinear(left: Any, weight: Any, right: Any, *args: Any, **options: Any) -> int:
    """Of ``nn.Bilinear``: for each sample and output a row times a matrix, times a column."""
    outputs, rows, columns = weight
    return 2 * left[0] * outputs * columns * (rows + 1)


def _onednn_lstm(x: Any, weight: Any, recurrent: Any, *args: Any, **options: Any) -> int:
    """One layer, one direction: both matrices at every step."""
    return 2 * math.prod(x[:-1]) * (math.prod(weight) + math.prod(recurrent))


def _cudnn_rnn(x: Any, weights: Any, *args: Any, **options: Any) -> int:
    """All layers and directions: every matrix at every step."""
    return 2 * math.prod(x[:-1]) * sum(math.prod(w) for w in weights if len(w) == 2)


_ATEN = torch.ops.aten
#: What torch's own table of counts leaves out.
_FORMULAS = {
    _ATEN._scaled_dot_product_flash_attention_for_cpu: _attention,
    _ATEN.dot: _dot,
    _ATEN.vdot: _dot,
    _ATEN.mv: _mv,
    _ATEN.addmv: _addmv,
    _ATEN.addbmm: _addbmm,
    _ATEN._trilinear: _trilinear,
    _ATEN.mkldnn_rnn_layer: _onednn_lstm,
    _ATEN._cudnn_rnn: _cudnn_rnn,
}


def _storage(t: Tensor) -> int:
    return int(t.untyped_storage()._cdata)  # unlike data_ptr(), distinct for empty and meta tensors


def _copy(x: Any) -> Any:
    """A compact copy that needs a gradient and may be written to, as the output of an earlier layer."""
    if not isinstance(x, Tensor):
        return x
    x = x.detach().clone()
    return x.requires_grad_().clone() if x.is_floating_point() else x


def _gpus(module: nn.Module, inputs: tuple[Any, ...]) -> list[int]:
    """Return the CUDA devices whose random streams the module may draw from."""
    tensors = (*module.parameters(), *(x for x in inputs if isinstance(x, Tensor)))
    return sorted({t.device.index for t in tensors if t.device.type == "cuda"})
