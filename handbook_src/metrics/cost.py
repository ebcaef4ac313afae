"""What a module costs: parameters, operations, and what it keeps for the backward pass."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
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
    Operations are counted by :class:`torch.utils.flop_counter.FlopCounterMode`: biases,
    norms, activations, pooling and other elementwise work are not in it.

    Memory is measured, not estimated: the bytes that autograd saves in the module's present mode,
    each storage once. Floating inputs are taken to need a gradient, as inside a network, and
    count where they are saved. Frozen parameters count as parameters, but save less.

    Nothing is changed: inputs and buffers are copied, the random streams are put back. On
    the ``meta`` device the same numbers come without the arithmetic.

    Args:
        module: in the mode, dtype and device to be measured.
        inputs: positional arguments of its ``forward``; tensors are copied, the rest is passed through.

    Raises:
        ConfigError: ``module`` is not a module.

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
    buffers = {name: b.detach().clone() for name, b in module.named_buffers()}
    state = {_storage(t) for t in (*module.parameters(), *buffers.values())}
    saved: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        if _storage(t) not in state:
            saved[_storage(t)] = t.untyped_storage().nbytes()
        return t.detach()  # shares the storage, so that no later tensor takes its address

    counter = FlopCounterMode(display=False, custom_mapping={_CPU_ATTENTION: _attention_flops})
    with torch.random.fork_rng(devices=_gpus(module, inputs)), torch.inference_mode(False), torch.enable_grad():
        copies = [_copy(x) for x in inputs]
        with counter, torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            kept = functional_call(module, buffers, tuple(copies))
    del kept
    parameters = sum(p.numel() for p in module.parameters())
    return Cost(parameters, counter.get_total_flops(), sum(saved.values()))


#: Fused attention on the CPU, which torch's own table of counts leaves out.
_CPU_ATTENTION = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu


def _attention_flops(query: Any, key: Any, value: Any, *args: Any, **options: Any) -> int:
    return int(sdpa_flop_count(query, key, value))


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
