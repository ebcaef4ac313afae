"""The two equations of the nearest-neighbour language model: what neighbours vote for, and the mixture."""

from __future__ import annotations

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor

from handbook_src.check import (
    check_floating,
    check_one_device,
    check_positive,
    check_probability,
    check_size,
    check_tensors,
)
from handbook_src.errors import ShapeError
from handbook_src.precision import statistic_dtype


def knn_probabilities(
    distances: Float[Tensor, "*lead k"],
    tokens: Int[Tensor, "*lead k"],
    vocab_size: int,
    *,
    temperature: float = 1.0,
) -> Float[Tensor, "*lead v"]:
    r"""Let each neighbour vote for the token that followed it, the nearer the louder.

    .. math::
        p_{\text{kNN}}(y \mid x) \propto \sum_{(k_i, v_i) \in \mathcal N}
        [y = v_i]\, \exp\!\Big(\!-\frac{d(k_i, f(x))}{T}\Big)

    Computed in float32 at least, by a softmax over the neighbours, so that only differences of
    distances matter and nothing overflows.  A neighbour with token -1, or at infinity, is missing and has no vote;
    a row without neighbours is all zero, every other row sums to one.

    Args:
        distances: to the neighbours, squared Euclidean in the paper.
        tokens: what followed each neighbour; -1 where there is none.
        vocab_size: tokens in the vocabulary, ``v``.
        temperature: :math:`T`; 1 in the paper.

    Raises:
        ShapeError: shapes or dtypes that don't fit, or a token outside the vocabulary.
        ConfigError: a vocabulary or temperature that is not positive.

    Source:
        Khandelwal et al. 2019, eq. 2, arXiv:1911.00172
    """
    check_size("knn_probabilities", "vocab_size", vocab_size)
    check_positive("knn_probabilities", "temperature", temperature)
    _check_neighbours(distances, tokens, vocab_size)
    wide = statistic_dtype(distances)
    missing = (tokens < 0) | (distances == math.inf)
    empty = missing.all(-1, keepdim=True)
    scores = (-distances.to(wide) / temperature).masked_fill(missing, -math.inf).masked_fill(empty, 0.0)
    votes = scores.softmax(-1).masked_fill(missing, 0.0) if distances.shape[-1] else scores
    p = votes.new_zeros(*distances.shape[:-1], vocab_size)
    return p.scatter_add(-1, tokens.clamp_min(0).long(), votes).to(distances.dtype)


def knn_lm_log_probs(
    logits: Float[Tensor, "*lead v"],
    distances: Float[Tensor, "*lead k"],
    tokens: Int[Tensor, "*lead k"],
    lam: float = 0.25,
    *,
    temperature: float = 1.0,
) -> Float[Tensor, "*lead v"]:
    r"""Mix the model's distribution with the neighbours', and return the logarithm.

    .. math:: p(y \mid x) = \lambda\, p_{\text{kNN}}(y \mid x) + (1 - \lambda)\, p_{\text{LM}}(y \mid x)

    Computed from log-probabilities in float32 at least, so that an improbable token keeps a
    finite score.  Where there is no neighbour at all the model's own distribution is returned.

    Args:
        logits: of the language model.
        distances: as for :func:`knn_probabilities`.
        tokens: as for :func:`knn_probabilities`.
        lam: :math:`\lambda`, the neighbours' share.
        temperature: as for :func:`knn_probabilities`.

    Raises:
        ShapeError: shapes or dtypes that don't fit.
        ConfigError: ``lam`` outside [0, 1], or a temperature that is not positive.

    Source:
        Khandelwal et al. 2019, eq. 3, arXiv:1911.00172
    """
    check_probability("knn_lm", "lam", lam, below_one=False)
    check_tensors("knn_lm", logits, distances, tokens)
    check_floating("knn_lm", logits)
    if logits.shape[:-1] != distances.shape[:-1] or logits.ndim == 0:
        raise ShapeError(
            "knn_lm logits and distances",
            got=f"{tuple(logits.shape)} and {tuple(distances.shape)}",
            want="the same leading axes",
            remedy="One row of neighbours for each row of logits.",
        )
    wide = statistic_dtype(logits)
    p_knn = knn_probabilities(distances.to(wide), tokens, logits.shape[-1], temperature=temperature)
    check_one_device("knn_lm", logits, distances)
    log_lm = logits.to(wide).log_softmax(-1)
    if lam == 0:
        return log_lm.to(logits.dtype)
    share = log_lm + (math.log1p(-lam) if lam < 1 else -math.inf)
    voted = p_knn > 0
    log_knn = p_knn.masked_fill(~voted, 1.0).log() + math.log(lam)
    mixed = torch.where(voted, torch.logaddexp(share, log_knn), share)
    alone = ((tokens < 0) | (distances == math.inf)).all(-1, keepdim=True)
    return torch.where(alone, log_lm, mixed).to(logits.dtype)


def _check_neighbours(distances: Tensor, tokens: Tensor, vocab_size: int) -> None:
    check_tensors("knn_probabilities", distances, tokens)
    check_floating("knn_probabilities", distances)
    check_one_device("knn_probabilities", distances, tokens)
    integers = tokens.dtype in (torch.int32, torch.int64)
    if distances.ndim == 0 or distances.shape != tokens.shape or not integers:
        raise ShapeError(
            "knn_probabilities distances and tokens",
            got=f"{tuple(distances.shape)}, and {tuple(tokens.shape)} of {tokens.dtype}",
            want="one shape, neighbours last, int32 or int64 tokens",
            remedy="Pass what Datastore.search returns.",
        )
    if tokens.numel() and not tokens.is_meta and int(tokens.max()) >= vocab_size:
        raise ShapeError(
            "knn_probabilities tokens",
            got=int(tokens.max()),
            want=f"below vocab_size={vocab_size}",
            remedy="The datastore was filled with another tokeniser.",
        )
