"""Write text with a causal language model, one token at a time, with or without a cache."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Int
from torch import Tensor, nn

from handbook_src.check import check_rank, check_size
from handbook_src.errors import ShapeError
from handbook_src.functional.transformers.sampling import greedy
from handbook_src.layers.attention.kv_cache import AppendCache, KVCache
from handbook_src.mode import modes_kept

Pick = Callable[[Tensor], Tensor]


@runtime_checkable
class CausalLM(Protocol):
    """What :func:`generate` asks of a model: a context, parts with a mode, a cache, logits."""

    config: Any

    def __call__(self, input_ids: Tensor, **kwargs: Any) -> Any: ...
    def new_cache(self, kind: Callable[[], KVCache] = ...) -> list[KVCache]: ...
    def modules(self) -> Iterator[nn.Module]: ...
    def eval(self) -> Any: ...


@torch.no_grad()
def generate(
    model: CausalLM,
    prompt: Int[Tensor, "b t"],
    new_tokens: int,
    *,
    pick: Pick = greedy,
    cache: Callable[[], KVCache] | None = AppendCache,
    eos: int | None = None,
    attention_mask: Int[Tensor, "b t"] | Bool[Tensor, "b t"] | None = None,
) -> Int[Tensor, "b s"]:
    r"""Continue each prompt by up to ``new_tokens`` tokens.

    .. math:: w_{t+1} = \operatorname{pick}(z_t), \qquad z_t = \operatorname{model}(w_1, \dots, w_t)

    With a cache a step computes one token's keys and values, without it all of them;
    the tokens are the same. Dropout is off while this runs.

    Args:
        model: a causal language model.
        prompt: what to continue; shorter prompts are padded on the left.
        new_tokens: how many to write at most.
        pick: from logits ``b v`` to tokens ``b``: :func:`handbook_src.functional.greedy`,
            or ``partial(sample, top_p=0.9, generator=g)``.
        cache: makes one layer's cache; ``None`` recomputes everything at each step.
        eos: a row that wrote this token is finished and repeats it; all finished ends early.
        attention_mask: 0 on the left where a prompt is padding.

    Raises:
        ConfigError: ``new_tokens`` or ``eos`` is no count, the prompt no tensor.
        ShapeError: the text would outgrow the model's context, an empty prompt, tokens that are no
            integers or outside the vocabulary, or padding that isn't on the left.

    Source:
        Shazeer 2019, section 2.4 (incremental decoding), arXiv:1911.02150
    """
    _refuse(model, prompt, new_tokens, eos, attention_mask)
    nothing_hidden = attention_mask is None or bool(attention_mask.all())
    text, mask = prompt, None if nothing_hidden else attention_mask
    caches = None if cache is None else model.new_cache(cache)
    finished = torch.zeros(len(prompt), dtype=torch.bool, device=prompt.device)
    with modes_kept(model):
        model.eval()
        for _ in range(new_tokens):
            token = pick(_next_logits(model, text, mask, caches))
            if eos is not None:
                token = token.masked_fill(finished, eos)
                finished = finished | (token == eos)
            text = torch.cat([text, token[:, None]], 1)
            if mask is not None:
                mask = torch.cat([mask, mask.new_ones(len(mask), 1)], 1)
            if eos is not None and bool(finished.all()):
                break
    return text


def _next_logits(model: CausalLM, text: Tensor, mask: Tensor | None, cache: Sequence[KVCache] | None) -> Tensor:
    """The logits after the last token; with a cache only the tokens that it has not seen are computed."""
    seen = 0 if cache is None else cache[0].seen
    inputs: dict[str, Any] = {"cache": cache}
    if mask is not None:
        positions = (mask.long().cumsum(-1) - 1).clamp_min(0)
        inputs |= {"attention_mask": mask, "position_ids": positions[:, seen:]}
    return model(text[:, seen:], **inputs).logits[:, -1]


def _refuse(model: CausalLM, prompt: Tensor, new_tokens: int, eos: int | None, mask: Tensor | None) -> None:
    check_size("generate", "new_tokens", new_tokens)
    if eos is not None:
        check_size("generate", "eos", eos, least=0)
    check_rank("generate", prompt, (2,), "(batch, tokens)")
    if prompt.shape[1] == 0:
        raise ShapeError(
            "generate prompt", got=tuple(prompt.shape), want="b t with a token in it", remedy="Begin with end-of-text."
        )
    if prompt.shape[1] + new_tokens > model.config.context:
        raise ShapeError(
            "generate prompt and new_tokens",
            got=f"{prompt.shape[1]} + {new_tokens} tokens",
            want=f"at most the model's context of {model.config.context}",
            remedy="Keep the prompt's last tokens, or ask for fewer new ones.",
        )
    if mask is not None and (mask.shape != prompt.shape or bool((mask.long().diff(dim=-1) < 0).any())):
        raise ShapeError(
            "generate attention_mask",
            got=f"{tuple(mask.shape)}, padding after a token",
            want=f"{tuple(prompt.shape)}, zeros on the left only",
            remedy="Pad prompts on the left: the next token follows the last column.",
        )
