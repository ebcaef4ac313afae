"""Attention maps of a whole model: read them, or put others in their place."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from einops import rearrange, repeat
from torch import Tensor, nn

from handbook_src.errors import ConfigError, ShapeError
from handbook_src.layers.attention.attention import MultiHeadAttention
from handbook_src.layers.attention.linformer import LinformerAttention

Edit = Callable[[str, Tensor], Tensor]
Where = Callable[[str, MultiHeadAttention], bool]


@contextmanager
def attention_maps(model: nn.Module, where: Where | None = None) -> Iterator[list[Tensor]]:
    r"""Record the weights ``b h t s`` of every attention layer, in the order of the calls.

    .. math:: W^l = \operatorname{softmax}\big(Q^l {K^l}^\top / \sqrt e + M\big)

    The list is what :func:`handbook_src.functional.attention_rollout` takes.  Outputs stay as they
    are to the bit; the weights carry gradients and know no dropout.

    Args:
        model: holds :class:`handbook_src.layers.MultiHeadAttention` layers or is one.
        where: called with a layer's name and the layer: true for those to record, all unless given.

    Raises:
        ConfigError: no such layer, or a forward pass with a key-value cache or a state.

    Source:
        Vaswani et al. 2017, eq. 1, arXiv:1706.03762

    Example:
        >>> layer = MultiHeadAttention(4, 2)
        >>> with attention_maps(layer) as maps:
        ...     y = layer(torch.zeros(1, 3, 4), causal=True)
        >>> maps[0].shape
        torch.Size([1, 2, 3, 3])
    """
    maps: list[Tensor] = []

    def record(name: str, layer: MultiHeadAttention, call: dict[str, Any], output: Tensor) -> None:
        maps.append(layer.weights(**call))

    with _hooked(model, where, record):
        yield maps


@contextmanager
def edited_attention(model: nn.Module, edit: Edit, where: Where | None = None) -> Iterator[None]:
    r"""Let every attention layer average its values with ``edit(name, weights)`` instead.

    .. math:: y = W^O \big[ \operatorname{edit}(W_1)\, V_1; \dots; \operatorname{edit}(W_h)\, V_h \big]

    For permutation tests, adversarial maps, uniform baselines and ablations, in training as well: gradients
    flow through the edit.  Dropout of the weights is left out.

    Args:
        model: holds :class:`handbook_src.layers.MultiHeadAttention` layers or is one.
        edit: from a layer's name and its weights ``b h t s`` to others of the same shape.
        where: called with a layer's name and the layer: true for those to edit, all unless given.

    Raises:
        ConfigError: no such layer, one that weighs mixtures (Linformer), or a forward pass with a cache or a state.
        ShapeError: the edit changed the shape.

    Source:
        Jain & Wallace 2019, section 4.2, arXiv:1902.10186; Wiegreffe & Pinter 2019, section 3, arXiv:1908.04626

    Example:
        >>> layer, x = MultiHeadAttention(4, 2), torch.randn(1, 3, 4)
        >>> with edited_attention(layer, lambda name, w: torch.full_like(w, 1 / 3)):
        ...     y = layer(x)
        >>> torch.allclose(y[:, 0], y[:, 2])
        True
    """

    def replace(name: str, layer: MultiHeadAttention, call: dict[str, Any], output: Tensor) -> Tensor:
        if isinstance(layer, LinformerAttention):
            got, want = f"{name or 'the model'}, whose weights stand for mixtures of keys", "weights b h t s of keys"
            raise ConfigError("edited_attention", got=got, want=want, remedy="Leave the layer out with where=.")
        weights = layer.weights(**call)
        new = edit(name, weights)
        if new.shape != weights.shape:
            raise ShapeError(
                "edited_attention edit",
                got=tuple(new.shape),
                want=str(tuple(weights.shape)),
                remedy="Return weights b h t s, one for each that came in.",
            )
        _, _, v = layer._project(call["x"], call.get("memory"), None)
        v = repeat(v, "b s g e -> b s (g r) e", r=layer.heads // layer.kv_heads)
        mixed = torch.einsum("bhts,bshe->bthe", new.to(v.dtype), v)
        return layer.out_proj(rearrange(mixed, "b t h e -> b t (h e)"))

    with _hooked(model, where, replace):
        yield


@contextmanager
def _hooked(model: nn.Module, where: Where | None, act: Callable[..., Tensor | None]) -> Iterator[None]:
    layers = {
        n: m for n, m in model.named_modules() if isinstance(m, MultiHeadAttention) and (not where or where(n, m))
    }
    if not layers:
        raise ConfigError(
            "attention maps of a model",
            got=f"{type(model).__name__} without a chosen MultiHeadAttention",
            want="at least one",
            remedy="Pass the model that holds them, and a where that accepts one.",
        )
    handles = [m.register_forward_hook(_hook(n, act), with_kwargs=True) for n, m in layers.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _hook(name: str, act: Callable[..., Tensor | None]) -> Callable[..., Tensor | None]:
    def hook(layer: MultiHeadAttention, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> Tensor | None:
        call = dict(inspect.signature(layer.forward).bind(*args, **kwargs).arguments)
        for past in ("cache", "state"):
            if call.pop(past, None) is not None:
                raise ConfigError(
                    "attention maps",
                    got=f"a forward pass with a {past}",
                    want="one over the whole text",
                    remedy=f"Leave the {past} out: without it the pass gives every row of the map.",
                )
        return act(name, layer, call, output)

    return hook
