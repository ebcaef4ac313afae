"""From scores to a token: greedy, temperature, top-k, top-p, each a pure function."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from handbook_src.check import check_positive, check_probability, check_size, known_broken
from handbook_src.errors import DataError


def temperature_logits(logits: Float[Tensor, "*lead v"], temperature: float) -> Float[Tensor, "*lead v"]:
    r"""Divide the scores: below 1 sharpens the distribution, above 1 flattens it.

    .. math:: p_i = \operatorname{softmax}(z / \tau)_i

    Raises:
        ConfigError: the temperature is not a positive number; its limit 0 is :func:`greedy`.

    Source:
        Ackley, Hinton & Sejnowski 1985, eq. 4
    """
    check_positive("temperature_logits", "temperature", temperature, "For 0 use greedy.")
    return logits / temperature


def top_k_logits(logits: Float[Tensor, "*lead v"], k: int) -> Float[Tensor, "*lead v"]:
    r"""Set all but the ``k`` largest scores to minus infinity; ties with the k-th stay.

    .. math:: z'_i = z_i \text{ if } z_i \ge z_{(k)} \text{ else } -\infty

    A ``k`` beyond the vocabulary keeps everything.

    Raises:
        ConfigError: ``k`` is no integer of at least 1.

    Source:
        Fan, Lewis & Dauphin 2018, section 5, arXiv:1805.04833
    """
    check_size("top_k_logits", "k", k)
    kth = logits.topk(min(k, logits.shape[-1]), dim=-1).values[..., -1:]
    return logits.masked_fill(logits < kth, float("-inf"))


def top_p_logits(logits: Float[Tensor, "*lead v"], p: float) -> Float[Tensor, "*lead v"]:
    r"""Keep the smallest set of most likely tokens whose probabilities reach ``p``.

    .. math:: V^{(p)} = \arg\min_{V'} |V'| \quad\text{with}\quad \sum_{i \in V'} \operatorname{softmax}(z)_i \ge p

    The most likely token always stays. Among equals at the border the later index stays.

    Raises:
        ConfigError: ``p`` is not in (0, 1].

    Source:
        Holtzman et al. 2019, eq. 2, arXiv:1904.09751
    """
    check_probability("top_p_logits", "p", p, "For every token leave it out.", below_one=False)
    check_positive("top_p_logits", "p", p, "For the single most likely token use greedy.")
    ascending, order = logits.sort(dim=-1, stable=True)
    if ascending.element_size() < 4:  # a sum in bfloat16 stops growing at 256 equal terms
        ascending = ascending.float()
    dropped = ascending.softmax(-1).cumsum(-1) <= 1.0 - p
    dropped[..., -1] = False
    return logits.masked_fill(dropped.scatter(-1, order, dropped), float("-inf"))


def greedy(logits: Float[Tensor, "*lead v"]) -> Int[Tensor, "*lead"]:
    """Return the most likely token; the lowest index among equals.

    Raises:
        DataError: on a CPU, a row of NaN, infinity or nothing but minus infinity.
    """
    check_scores("greedy", logits)
    return logits.argmax(-1)


def sample(
    logits: Float[Tensor, "*lead v"],
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    generator: torch.Generator | None = None,
) -> Int[Tensor, "*lead"]:
    """Draw a token: temperature first, then top-k, then top-p, then one draw a row.

    Args:
        logits: scores; any leading axes.
        temperature: see :func:`temperature_logits`.
        top_k: see :func:`top_k_logits`; ``None`` leaves it out.
        top_p: see :func:`top_p_logits`; ``None`` leaves it out.
        generator: of the draw; the same generator state gives the same tokens.

    Raises:
        ConfigError: a setting is out of range.
        DataError: on a CPU, a row of NaN, infinity or nothing but minus infinity.

    Source:
        Radford et al. 2019, section 3 (top-k 40); Holtzman et al. 2019, section 3.1, arXiv:1904.09751
    """
    check_scores("sample", logits)
    z = logits.float() if logits.element_size() < 4 else logits
    z = z - z.amax(-1, keepdim=True)  # changes no probability, and a tiny temperature won't overflow
    z = temperature_logits(z, temperature)
    if top_k is not None:
        z = top_k_logits(z, top_k)
    if top_p is not None:
        z = top_p_logits(z, top_p)
    p = z.softmax(-1)
    return torch.multinomial(p.reshape(-1, p.shape[-1]), 1, generator=generator).view(p.shape[:-1])


def check_scores(op: str, logits: Tensor) -> None:
    """Refuse scores that no token can be chosen by, where looking waits for nobody.

    Raises:
        DataError: a row whose largest score is not finite.
    """
    if known_broken(logits.amax(-1)):
        raise DataError(
            f"{op} logits",
            got="a row with NaN or infinity, or of minus infinity alone",
            want="a finite largest score in every row",
            remedy="Look for the first layer whose output is not finite; hide fewer tokens.",
        )
