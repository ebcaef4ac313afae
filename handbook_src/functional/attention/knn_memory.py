"""Attention to the nearest keys of a memory, and the gate that mixes it with local attention.

Tensors are ``b t h e``, heads third.  The search itself is exact in torch, or a faiss index.
"""

from __future__ import annotations

import contextlib
import math
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor

from handbook_src.check import (
    check_floating,
    check_one_device,
    check_one_dtype,
    check_positive,
    check_size,
    known_finite,
)
from handbook_src.errors import ConfigError, KernelUnavailable, ShapeError
from handbook_src.functional.attention.attention import masked_softmax
from handbook_src.precision import at_least_float32


def faiss_library(op: str) -> Any:
    """Return the faiss module, imported at the first search that asks for it.

    Raises:
        KernelUnavailable: it is not installed.
    """
    try:
        import faiss
    except ImportError as e:
        raise KernelUnavailable(
            f"{op} faiss", got=str(e), want="the faiss library", remedy="pip install faiss-cpu, or search exactly."
        ) from e
    return faiss


def faiss_index(op: str, factory: str, dim: int, metric: str) -> Any:
    """Build an empty faiss index from its factory string.

    Args:
        op: who asks, for the error message.
        factory: for instance ``Flat``, ``HNSW32`` or ``IVF64,Flat``.
        dim: features of a vector.
        metric: ``l2`` (squared distances) or ``ip`` (inner products).

    Raises:
        ConfigError: faiss does not know the string.
        KernelUnavailable: faiss is not installed.
    """
    faiss = faiss_library(op)
    kind = {"l2": faiss.METRIC_L2, "ip": faiss.METRIC_INNER_PRODUCT}[metric]
    try:
        return faiss.index_factory(dim, factory, kind)
    except (RuntimeError, TypeError) as e:
        known = "a factory string of faiss"
        raise ConfigError(f"{op} index", got=repr(factory), want=known, remedy="Flat, HNSW32, IVF64,Flat.") from e


def nearest_keys(
    q: Float[Tensor, "b t h e"],
    keys: Float[Tensor, "b s h e"],
    k: int,
    *,
    lengths: Int[Tensor, " b"] | None = None,
    index: str | None = None,
) -> Int[Tensor, "b t h k"]:
    r"""Find the ``k`` keys of each query's own sample and head that match it best.

    .. math:: N_k(q) = \operatorname{arg\,top\text{-}k}_{s < n_b}\; q^\top k_s

    Best first.  Where the memory holds fewer than ``k`` keys the rest is -1.  A key that is
    not finite is never found.

    Args:
        q: queries.
        keys: of the memory; only the first ``lengths[b]`` of sample ``b`` count.
        k: how many.
        lengths: keys that each sample's memory holds; all ``s`` unless given.
        index: a faiss factory string, built afresh for each sample and head; exact in torch unless given.

    Raises:
        ShapeError: shapes or dtypes that don't fit, lengths that are not one integer a sample.
        ConfigError: ``k`` below one, or an index that faiss does not know.
        KernelUnavailable: an index is asked for and faiss is not installed.

    Source:
        Wu et al. 2022, section 3.1, arXiv:2203.08913; faiss is Johnson et al. 2017, arXiv:1702.08734
    """
    _check_memory("nearest_keys", q, keys, keys, k)
    return _search(q, keys, k, lengths, index)[0]


def knn_attention(
    q: Float[Tensor, "b t h e"],
    keys: Float[Tensor, "b s h e"],
    values: Float[Tensor, "b s h c"],
    k: int,
    *,
    lengths: Int[Tensor, " b"] | None = None,
    scale: float | None = None,
    index: str | None = None,
) -> Float[Tensor, "b t h c"]:
    r"""Attend to the ``k`` nearest keys of a memory, through which no gradient flows.

    .. math::
        y = \sum_{s \in N_k(q)} \frac{\exp(\gamma\, q^\top k_s)}{\sum_{r \in N_k(q)} \exp(\gamma\, q^\top k_r)}\, v_s

    The choice of neighbours is a constant; gradients reach the queries alone.
    The softmax is taken in float32 at least.  A query whose memory is empty gets zeros.  With
    ``k`` at least ``s`` this is full attention to the memory.

    Args:
        q: queries.
        keys: of the memory, one row a stored token.
        values: of the memory.
        k: neighbours of each query and head.
        lengths: keys that each sample's memory holds; all ``s`` unless given.
        scale: factor :math:`\gamma` on the scores; :math:`1/\sqrt e` unless given.
        index: as for :func:`nearest_keys`.

    Raises:
        ShapeError: shapes or dtypes that don't fit.
        ConfigError: ``k`` below one, a scale that is not positive, an unknown index.
        KernelUnavailable: an index is asked for and faiss is not installed.

    Source:
        Wu et al. 2022, section 3.1, arXiv:2203.08913
    """
    _check_memory("knn_attention", q, keys, values, k)
    scale = _check_scale(scale, q)
    found, best = _search(q, keys, min(k, max(1, keys.shape[1])), lengths, index)
    return _attend(q, keys, values, found, scale, best)


def attend_to_found(
    q: Float[Tensor, "b t h e"],
    keys: Float[Tensor, "b s h e"],
    values: Float[Tensor, "b s h c"],
    found: Int[Tensor, "b t h k"],
    scale: float | None = None,
) -> Float[Tensor, "b t h c"]:
    """Attend to neighbours already found: the second half of :func:`knn_attention`.

    Args:
        q: queries.
        keys: of the memory; no gradient flows into them.
        values: of the memory; no gradient flows into them.
        found: rows of the memory; -1 marks a neighbour that is missing.
        scale: factor on the scores.

    Raises:
        ShapeError: shapes or dtypes that don't fit, or rows that the memory does not have.
        ConfigError: a scale that is not positive.
    """
    _check_memory("attend_to_found", q, keys, values, 1)
    rows = found.numel() and not found.is_meta and int(found.max())
    if (
        found.shape[:-1] != q.shape[:-1]
        or found.dtype not in (torch.int32, torch.int64)
        or rows >= max(1, keys.shape[1])
    ):
        raise ShapeError(
            "attend_to_found found",
            got=f"{tuple(found.shape)} of {found.dtype}, the largest {rows}",
            want=f"{(*q.shape[:-1], 'k')} integers below {keys.shape[1]}",
            remedy="Pass what nearest_keys returns for the same queries and keys.",
        )
    return _attend(q, keys, values, found, _check_scale(scale, q))


def _attend(q: Tensor, keys: Tensor, values: Tensor, found: Tensor, scale: float, best: Tensor | None = None) -> Tensor:
    there, dtype, at = found >= 0, q.dtype, _places(found, keys)
    q, keys, values = at_least_float32(q), keys.detach(), values.detach()
    numbers = keys.numel() and values.numel()
    if numbers and keys.dtype == q.dtype and known_finite(q, keys, values):  # rows are read where they lie
        at, keys, values = at.flatten(0, 2), _table(keys), _table(values)
        if q.requires_grad:  # but a memory may be written over before the gradient is asked for
            at, keys, values = _kept(at, keys, values)
        scores = _Products.apply(q.flatten(0, 2), at, keys, best if best is None else best.flatten(0, 2))
        weights = masked_softmax(scores.view(found.shape) * scale, there).flatten(0, 2)
        return _Mixture.apply(weights, at, values).view(*q.shape[:3], values.shape[-1])
    near_k, near_v = (_rows(x, at, there).to(q.dtype) for x in (keys, values))
    weights = masked_softmax(torch.einsum("bthe,bthke->bthk", q, near_k) * scale, there)
    return torch.einsum("bthk,bthkc->bthc", weights, near_v).to(dtype)


class _Mixture(torch.autograd.Function):
    """Sums of rows by weights, ``n k`` of them, without a copy of the rows; the rows are constants."""

    generate_vmap_rule = True

    @staticmethod
    def forward(weights: Tensor, at: Tensor, rows: Tensor) -> Tensor:
        return F.embedding_bag(at, rows, mode="sum", per_sample_weights=weights.contiguous())

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs[1:3])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return _Products.apply(grads[0], *ctx.saved_tensors, None), None, None


class _Products(torch.autograd.Function):
    """Inner products of vectors with rows: the transpose of the mixture, so each is the other's derivative."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, at: Tensor, rows: Tensor, known: Tensor | None) -> Tensor:
        return (F.embedding(at, rows) @ x[..., None])[..., 0] if known is None else known.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs[1:3])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return _Mixture.apply(grads[0], *ctx.saved_tensors), None, None, None


def memory_gate(
    local: Float[Tensor, "b t h e"],
    retrieved: Float[Tensor, "b t h e"],
    gate_bias: Float[Tensor, " h"],
    present: Bool[Tensor, " b"] | None = None,
) -> Float[Tensor, "b t h e"]:
    r"""Mix local attention with what the memory returned, one gate a head.

    .. math:: V_a = g\, V_m + (1 - g)\, V_c, \qquad g = \sigma(b_g)

    Where a sample's memory is empty the local result passes whole.

    Args:
        local: :math:`V_c`, attention to the local context.
        retrieved: :math:`V_m`, attention to the memory.
        gate_bias: :math:`b_g`.
        present: which samples have a memory; all unless given.

    Raises:
        ShapeError: shapes that don't fit, or ``present`` is not one boolean a sample.

    Source:
        Wu et al. 2022, eqs. 1 and 2, arXiv:2203.08913
    """
    check_floating("memory_gate", local, retrieved, gate_bias)
    if local.ndim != 4 or local.shape != retrieved.shape or gate_bias.shape != local.shape[2:3]:
        raise ShapeError(
            "memory_gate",
            got=f"{tuple(local.shape)}, {tuple(retrieved.shape)} and gate {tuple(gate_bias.shape)}",
            want="two tensors b t h e and one number a head",
            remedy="Split the heads first.",
        )
    gate = torch.sigmoid(gate_bias)[:, None]
    if present is not None:
        if present.shape != local.shape[:1] or present.dtype != torch.bool:
            got, want = f"{tuple(present.shape)} of {present.dtype}", f"({len(local)},) booleans"
            raise ShapeError("memory_gate present", got=got, want=want, remedy="One for each sample: lengths > 0.")
        gate = gate * present.to(gate.dtype)[:, None, None, None]
    return (gate * retrieved + (1 - gate) * local).to(local.dtype)


def normalize_heads(x: Float[Tensor, "b t h e"]) -> Float[Tensor, "b t h e"]:
    r"""Scale each head's vector to length one, so that old and new keys are of one size.

    .. math:: \hat x = \frac{x}{\max(\lVert x \rVert_2,\, 10^{-12})}

    Raises:
        ShapeError: a dtype that is not floating point.

    Source:
        Henry et al. 2020, section 3, arXiv:2010.04245, as used by Wu et al. 2022, section 3.2, arXiv:2203.08913
    """
    check_floating("normalize_heads", x)
    return F.normalize(at_least_float32(x), dim=-1, eps=1e-12).to(x.dtype)


def filled(keys: Float[Tensor, "b s h e"], lengths: Int[Tensor, " b"] | None) -> Bool[Tensor, "b s"]:
    """Which rows of each sample's memory hold a key.

    Raises:
        ShapeError: lengths that are not one integer a sample.
        ConfigError: lengths that are no tensor.
    """
    b, s = keys.shape[:2]
    if lengths is None:
        return torch.ones(b, s, dtype=torch.bool, device=keys.device)
    if not isinstance(lengths, Tensor):
        got = type(lengths).__name__
        raise ConfigError("memory lengths", got=got, want="a tensor", remedy="Wrap them: torch.tensor(lengths).")
    if lengths.shape != (b,) or lengths.is_floating_point() or lengths.dtype == torch.bool:
        raise ShapeError(
            "memory lengths",
            got=f"{tuple(lengths.shape)} of {lengths.dtype}",
            want=f"({b},) of integers",
            remedy="One length for each sample's memory.",
        )
    return torch.arange(s, device=keys.device) < lengths.to(keys.device)[:, None]


@torch.no_grad()
def _search(q: Tensor, keys: Tensor, k: int, lengths: Tensor | None, index: str | None) -> tuple[Tensor, Tensor | None]:
    """The nearest keys, and their products with the queries where the search has computed them."""
    stored, seen = filled(keys, lengths)[:, :, None].expand(keys.shape[:3]), None
    q, keys = (at_least_float32(x.detach()) for x in (q, keys))
    if not known_finite(keys):
        seen = stored & keys.isfinite().all(-1)
        keys = keys.masked_fill(~seen[..., None], 0.0)
    elif index is not None or not stored.all():
        seen = stored
    return _exact(q, keys, seen, k) if seen is None or index is None else (_by_faiss(q, keys, seen, k, index), None)


def _exact(q: Tensor, keys: Tensor, seen: Tensor | None, k: int) -> tuple[Tensor, Tensor]:
    scores = torch.einsum("bthe,bshe->bths", q, keys)
    if seen is not None:
        scores = scores.masked_fill(~rearrange(seen, "b s h -> b 1 h s"), -math.inf)
    best, found = _largest(scores, min(k, keys.shape[1]))
    found = found.masked_fill(best == -math.inf, -1)
    missing = (0, k - found.shape[-1])
    return F.pad(found, missing, value=-1), F.pad(best, missing)


def _largest(x: Tensor, k: int, group: int = 8) -> tuple[Tensor, Tensor]:
    """``topk`` on the last axis: the best ``k`` stand in the ``k`` groups with the largest members."""
    s = x.shape[-1]
    if s < 2 * group * k or x.device.type != "cpu" or torch.compiler.is_compiling():
        best, found = x.topk(k)
        return best, found
    count = -(-s // group)
    x = F.pad(x, (0, count * group - s), value=-math.inf).unflatten(-1, (group, count))
    groups = x.amax(-2).topk(k, sorted=False).indices
    best, at = x.gather(-1, groups[..., None, :].expand(*groups.shape[:-1], group, k)).flatten(-2).topk(k)
    return best, at // k * count + groups.gather(-1, at % k)


def _by_faiss(q: Tensor, keys: Tensor, seen: Tensor, k: int, factory: str) -> Tensor:
    """One index for each sample and head: nobody finds another's keys."""
    found = torch.full((*q.shape[:3], k), -1, dtype=torch.long)
    for b in range(q.shape[0]):
        for h in range(q.shape[2]):
            rows = seen[b, :, h].nonzero()[:, 0]
            if len(rows) == 0 or q.shape[1] == 0:
                continue
            index = faiss_index("nearest_keys", factory, q.shape[-1], "ip")
            stored = keys[b, rows, h].float().cpu().contiguous().numpy()
            train_and_add("nearest_keys", index, stored)
            _, best = index.search(q[b, :, h].float().cpu().contiguous().numpy(), k)
            near = torch.from_numpy(best)
            found[b, :, h] = torch.where(near >= 0, rows.cpu()[near.clamp_min(0)], -1)
    return found.to(q.device)


def train_and_add(op: str, index: Any, vectors: Any) -> None:
    """Fill a faiss index, after training where its kind needs it.

    Raises:
        ConfigError: fewer vectors than the kind needs for its training.
    """
    try:
        if not index.is_trained:
            index.train(vectors)
        index.add(vectors)
    except RuntimeError as e:
        raise ConfigError(
            f"{op} index",
            got=f"{len(vectors)} vectors",
            want="at least one for each cell",
            remedy="Use Flat or HNSW32.",
        ) from e


def visit_cells(op: str, index: Any, probes: int) -> None:
    """Set how many cells a faiss index with cells visits; other kinds have no such setting."""
    with contextlib.suppress(RuntimeError):
        faiss_library(op).ParameterSpace().set_index_parameter(index, "nprobe", probes)


def _places(found: Tensor, keys: Tensor) -> Tensor:
    """Which row of :func:`_table` each neighbour is."""
    b, s, h = keys.shape[:3]
    memory = torch.arange(b * h, device=found.device).view(b, 1, h, 1)
    return (memory // h * s + found.clamp_min(0)) * h + memory % h


def _table(x: Tensor) -> Tensor:
    """The rows of all samples and heads one below the other; a view where they lie so."""
    return x.flatten(0, 2)


def _kept(at: Tensor, *tables: Tensor) -> list[Tensor]:
    """Copies of the tables, or of the rows that were found where those are fewer, and which rows of them."""
    if len(tables[0]) <= at.numel():
        return [at, *(x.clone() for x in tables)]
    return [torch.arange(at.numel()).view(at.shape), *(x[at.flatten()] for x in tables)]


def _rows(x: Tensor, at: Tensor, there: Tensor) -> Tensor:
    """Gather ``b t h k e``; a missing neighbour is zero, whatever the memory holds."""
    if x.shape[1] == 0:
        return x.new_zeros(*at.shape, x.shape[-1])
    return F.embedding(at, _table(x)).masked_fill(~there[..., None], 0.0)


def _check_scale(scale: float | None, q: Tensor) -> float:
    if scale is None:
        return 1 / math.sqrt(q.shape[-1])
    check_positive("knn_attention", "scale", scale)
    return scale


def _check_memory(op: str, q: Tensor, keys: Tensor, values: Tensor, k: int) -> None:
    check_size(op, "k", k)
    check_floating(op, q, keys, values)
    check_one_dtype(op, q, keys, values)
    fits = q.ndim == keys.ndim == values.ndim == 4 and keys.shape[:3] == values.shape[:3]
    if not fits or q.shape[0] != keys.shape[0] or q.shape[2:] != keys.shape[2:] or q.shape[-1] == 0:
        raise ShapeError(
            f"{op} inputs",
            got=f"q {tuple(q.shape)}, keys {tuple(keys.shape)}, values {tuple(values.shape)}",
            want="q b t h e, keys b s h e, values b s h c",
            remedy="Each sample and head has a memory of its own; split the features into heads.",
        )
    check_one_device(op, q, keys, values)
