"""How good a ranking is when the right answers are known."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from handbook_src.check import check_size
from handbook_src.errors import ConfigError, ShapeError


def recall_at_k(relevant: Bool[Tensor, "q r"], k: int) -> float:
    r"""Return the share of queries that have a right answer among the first ``k``.

    .. math:: \operatorname{R}@k = \frac1q \sum_i \Big[\max_{j \le k} r_{ij} = 1\Big]

    Also called hit rate or success at ``k``; with one right answer a query it is recall.

    Args:
        relevant: for each query, whether its answer at each rank is right, best rank first.
        k: how many answers are looked at; beyond the ranks given, all of them.

    Raises:
        ShapeError: not two axes of booleans.
        ConfigError: ``k`` below one, or no query.

    Source:
        Karpukhin et al. 2020, section 5 (top-k retrieval accuracy), arXiv:2004.04906
    """
    check_size("recall_at_k", "k", k)
    _check("recall_at_k", relevant)
    return relevant[:, :k].any(-1).double().mean().item()


def reciprocal_ranks(relevant: Bool[Tensor, "q r"]) -> Float[Tensor, " q"]:
    """Return one over the rank of each query's first right answer; 0 where there is none."""
    _check("reciprocal_ranks", relevant)
    first = relevant.int().argmax(-1) if relevant.shape[1] else relevant.sum(-1)
    return relevant.any(-1).double() / (first + 1)


def mean_reciprocal_rank(relevant: Bool[Tensor, "q r"]) -> float:
    r"""Return the mean over the queries of one over the rank of the first right answer.

    .. math:: \operatorname{MRR} = \frac1q \sum_i \frac{1}{\min \{ j : r_{ij} = 1 \}}

    Args:
        relevant: as for :func:`recall_at_k`; a query without a right answer counts 0.

    Raises:
        ShapeError: not two axes of booleans.
        ConfigError: no query.

    Source:
        Voorhees 1999, The TREC-8 question answering track report
    """
    return reciprocal_ranks(relevant).mean().item()


def _check(op: str, relevant: Tensor) -> None:
    if relevant.ndim != 2 or relevant.dtype != torch.bool:
        got = f"{tuple(relevant.shape)} of {relevant.dtype}"
        raise ShapeError(f"{op} relevant", got=got, want="queries by ranks, booleans", remedy="Compare with == first.")
    if len(relevant) == 0:
        raise ConfigError(op, got="no query", want="at least one", remedy="A mean over nothing is no number.")
