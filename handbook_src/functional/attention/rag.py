"""Retrieval-augmented generation: answers marginalised over the documents that were retrieved."""

from __future__ import annotations

import math

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from handbook_src.check import check_floating, check_one_device, check_tensors
from handbook_src.errors import ShapeError


def rag_sequence(
    doc_scores: Float[Tensor, "b z"],
    log_probs: Float[Tensor, "b z t"],
    mask: Bool[Tensor, "b t"] | None = None,
) -> Float[Tensor, " b"]:
    r"""Score an answer when one document must account for the whole of it.

    .. math:: \log p(y \mid x) = \log \sum_{z} p(z \mid x) \prod_{i=1}^{t} p(y_i \mid x, z, y_{1:i-1})

    :math:`p(z \mid x)` is the softmax of the scores over the retrieved documents.  Everything
    stays in logarithms, in float32 at least.  Where no document was found the score is ``-inf``.

    Args:
        doc_scores: of the retrieved documents, for instance dot products; ``-inf`` for none.
        log_probs: of the answer's tokens, under each document.
        mask: true for tokens, false for padding; all count unless given.

    Raises:
        ShapeError: shapes or dtypes that don't fit, or no document.

    Source:
        Lewis et al. 2020, section 2.1 (RAG-Sequence), arXiv:2005.11401
    """
    share, tokens = _wide("rag_sequence", doc_scores, log_probs)
    return torch.logsumexp(share + _masked(tokens, mask).sum(-1), -1).to(log_probs.dtype)


def rag_token(
    doc_scores: Float[Tensor, "b z"],
    log_probs: Float[Tensor, "b z t"],
    mask: Bool[Tensor, "b t"] | None = None,
) -> Float[Tensor, " b"]:
    r"""Score an answer when each token may come from another document.

    .. math:: \log p(y \mid x) = \sum_{i=1}^{t} \log \sum_{z} p(z \mid x)\, p(y_i \mid x, z, y_{1:i-1})

    With one document, or an answer of one token, this is :func:`rag_sequence`.

    Args:
        doc_scores: as for :func:`rag_sequence`.
        log_probs: as for :func:`rag_sequence`.
        mask: as for :func:`rag_sequence`.

    Raises:
        ShapeError: shapes or dtypes that don't fit, or no document.

    Source:
        Lewis et al. 2020, section 2.1 (RAG-Token), arXiv:2005.11401
    """
    share, tokens = _wide("rag_token", doc_scores, log_probs)
    tokens = torch.logsumexp(share[..., None] + _masked(tokens, mask), 1)  # masked before: a NaN must not come back
    return _masked(tokens[:, None], mask).sum((1, 2)).to(log_probs.dtype)


def rag_marginal(doc_scores: Float[Tensor, "b z"], log_probs: Float[Tensor, "b z *rest"]) -> Float[Tensor, " b *rest"]:
    r"""Average distributions over the documents: what RAG-Token decodes from.

    .. math:: \log p(y_i \mid x, y_{1:i-1}) = \log \sum_{z} p(z \mid x)\, p(y_i \mid x, z, y_{1:i-1})

    Args:
        doc_scores: as for :func:`rag_sequence`.
        log_probs: under each document; any further axes, such as positions and vocabulary.

    Raises:
        ShapeError: shapes or dtypes that don't fit, or no document.

    Source:
        Lewis et al. 2020, section 2.5 (RAG-Token), arXiv:2005.11401
    """
    share, tokens = _wide("rag_marginal", doc_scores, log_probs)
    share = share.view(*share.shape, *[1] * (tokens.ndim - 2))
    return torch.logsumexp(share + tokens, 1).to(log_probs.dtype)


def _wide(op: str, doc_scores: Tensor, log_probs: Tensor) -> tuple[Tensor, Tensor]:
    """Return the documents' log-probabilities and the tokens', in float32 at least."""
    check_tensors(op, doc_scores, log_probs)
    check_floating(op, doc_scores, log_probs)
    check_one_device(op, doc_scores, log_probs)
    least = 2 if op == "rag_marginal" else 3
    fits = doc_scores.ndim == 2 and log_probs.ndim >= least and log_probs.shape[:2] == doc_scores.shape
    if not fits or doc_scores.shape[1] == 0 or (least == 3 and log_probs.ndim != 3):
        raise ShapeError(
            f"{op} doc_scores and log_probs",
            got=f"{tuple(doc_scores.shape)} and {tuple(log_probs.shape)}",
            want="b z and b z t, at least one document",
            remedy="Score the answer once under each retrieved document.",
        )
    dtype = torch.promote_types(torch.promote_types(doc_scores.dtype, log_probs.dtype), torch.float32)
    scores, none = doc_scores.to(dtype), (doc_scores == -math.inf).all(-1, keepdim=True)
    return scores.masked_fill(none, 0.0).log_softmax(-1).masked_fill(none, -math.inf), log_probs.to(dtype)


def _masked(tokens: Tensor, mask: Tensor | None) -> Tensor:
    if mask is None:
        return tokens
    check_tensors("RAG mask", mask)
    if mask.dtype != torch.bool or mask.shape != (tokens.shape[0], tokens.shape[2]):
        raise ShapeError(
            "rag mask",
            got=f"{tuple(mask.shape)} of {mask.dtype}",
            want=f"{(tokens.shape[0], tokens.shape[2])} booleans",
            remedy="True for each token of the answer.",
        )
    return tokens.masked_fill(~mask[:, None], 0.0)
