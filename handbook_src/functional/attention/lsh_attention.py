r"""Attention by hashing: a query looks only at the keys that share its bucket.

Queries and keys are one vector ("shared QK"), so that near vectors land in the same
bucket.  Positions are sorted by bucket and cut into chunks of equal size; a chunk
sees itself and the chunk before it.  Several rounds of hashing make misses rare.
Tensors are ``b t h e``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor

from handbook_src.check import (
    check_floating,
    check_one_device,
    check_one_dtype,
    check_parameter_dtype,
    check_size,
    check_tensors,
)
from handbook_src.dispatch import Backend, resolve
from handbook_src.errors import ConfigError, ShapeError
from handbook_src.functional.attention.attention import check_mask, check_numbers, refuse, without_nan
from handbook_src.functional.attention.mask import Mask, full
from handbook_src.functional.attention.mask import causal as causal_rule
from handbook_src.precision import statistic_dtype

#: one table of directions, or one for each factor of the number of buckets
Rotations = Tensor | Sequence[Tensor]

#: score of a token with itself: below every real score, yet finite, so that it wins where it stands alone
ALONE = -1e30


def lsh_rotations(
    rounds: int,
    heads: int,
    head_dim: int,
    buckets: int | Sequence[int],
    *,
    generator: torch.Generator | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> list[Float[Tensor, "rounds h e half"]]:
    r"""Draw the random directions of :func:`lsh_buckets`.

    .. math:: R_{ij} \sim \mathcal N(0, 1), \qquad R \in \mathbb R^{e \times b/2}

    Several numbers, as in ``(8, 16)``, make a product hash of 128 buckets for the price of
    24; ``[2] * k`` asks on which side of ``k`` random planes a vector lies.

    Args:
        rounds: independent hashes.
        heads: each has its own directions.
        head_dim: features of a head.
        buckets: an even number of buckets, or even factors of it.
        generator: source of the randomness; torch's global one unless given.
        device: of the directions.
        dtype: of the directions.

    Raises:
        ConfigError: a count that is not positive, a number of buckets that is not even, or a dtype that is
            not floating point.

    Source:
        Kitaev et al. 2020, section 2, arXiv:2001.04451; factors as in its published code.
        Andoni et al. 2015, arXiv:1509.02897
    """
    op = "lsh_rotations"
    for name, size in (("rounds", rounds), ("heads", heads), ("head_dim", head_dim)):
        check_size(op, name, size)
    check_parameter_dtype(op, dtype)
    factors: list[int] = list(buckets) if isinstance(buckets, list | tuple) else [buckets]  # type: ignore[list-item]
    for n in factors or [0]:
        if not isinstance(n, int) or isinstance(n, bool) or n < 2 or n % 2:
            remedy = "Each direction makes two buckets: its own side and the opposite one."
            raise ConfigError(f"{op} buckets", got=repr(buckets), want="even, at least 2", remedy=remedy)
    sizes = [(rounds, heads, head_dim, n // 2) for n in factors]
    return [torch.randn(size, generator=generator, device=device, dtype=dtype) for size in sizes]


def lsh_factors(t: int, chunk: int) -> list[int]:
    r"""Choose how many buckets ``t`` positions need: two for each chunk, as a product where they are many.

    .. math:: b = 2 \lceil t / m \rceil

    so that a chunk is twice the mean bucket.  More than 64 buckets become the product of two powers of two, at
    least as many: one table of directions for all would cost :math:`t\,e\,b/2`, which is quadratic in ``t`` again.

    Args:
        t: positions.
        chunk: :math:`m`, positions in a chunk.

    Raises:
        ConfigError: ``t`` negative, ``chunk`` below one, or either no integer.

    Source:
        Kitaev et al. 2020, section 2, arXiv:2001.04451; two factors as in its published code
    """
    check_size("lsh_factors", "t", t, least=0)
    check_size("lsh_factors", "chunk", chunk)
    buckets = 2 * max(1, -(-t // chunk))
    if buckets <= 64:
        return [buckets]
    power = (buckets - 1).bit_length()
    return [2 ** (power // 2), 2 ** (power - power // 2)]


def lsh_buckets(x: Float[Tensor, "b t h e"], rotations: Rotations) -> Int[Tensor, "b h rounds t"]:
    r"""Hash vectors by their angle: nearby directions tend to share a bucket.

    .. math:: h(x) = \operatorname{argmax}\,[xR;\; -xR]

    The length of ``x`` does not matter.  With several factors the bucket is
    :math:`h_1 + b_1 h_2 + b_1 b_2 h_3 \dots`  No gradient passes.

    Args:
        x: vectors.
        rotations: from :func:`lsh_rotations`.

    Raises:
        ShapeError: directions for other heads or features.
        ConfigError: more than ``2**31`` buckets.

    Source:
        Kitaev et al. 2020, section 2, "Locality sensitive hashing", arXiv:2001.04451
    """
    check_tensors("lsh_buckets", x)
    tables = _tables(x, rotations)
    wide = statistic_dtype(x)
    buckets, below = torch.zeros((), dtype=torch.int64, device=x.device), 1
    for table in tables:
        table = table.detach().to(x.device, wide).expand(-1, x.shape[2], -1, -1)
        turned = torch.einsum("bthe,rhen->bhrtn", x.detach().to(wide), table)
        # argmax of [y; -y] without writing it: the largest |y|, and on which side
        top, low = turned.max(-1), turned.min(-1)
        side = torch.where(top.values >= -low.values, top.indices, low.indices + table.shape[-1])
        buckets, below = buckets + below * side, below * 2 * table.shape[-1]
    return buckets


def lsh_attention(
    qk: Float[Tensor, "b t h e"],
    v: Float[Tensor, "b t h c"],
    rotations: Rotations,
    mask: Mask | None = None,
    *,
    chunk: int = 64,
    look_back: int = 1,
    causal: bool = False,
    scale: float | None = None,
    across_buckets: bool = False,
    count_once: bool = True,
    backend: Backend = "auto",
) -> Float[Tensor, "b t h c"]:
    r"""Attend within hash buckets, at a cost that grows with ``t * chunk`` instead of ``t * t``.

    .. math::
        o_i = \sum_{j \in P_i} e^{q_i \cdot k_j - z_i} v_j, \qquad k_j = \frac{q_j}{\lVert q_j \rVert}, \qquad
        P_i = \bigcup_r P_i^{(r)}

    :math:`P_i^{(r)}` holds the positions that round ``r`` hashes into the bucket of ``i`` and sorts into its chunk
    or the one before.  Rounds are computed apart and merged by their normalisers :math:`z^{(r)}`:

    .. math::
        o_i = \sum_r e^{z_i^{(r)} - z_i} o_i^{(r)}, \qquad
        o_i^{(r)} = \sum_{j \in P_i^{(r)}} \frac{1}{N_{ij}} e^{q_i \cdot k_j - z_i^{(r)}} v_j

    :math:`N_{ij}` is the number of rounds in which ``i`` meets ``j``, so a pair that meets twice counts once, and
    the sum over many rounds is full attention.  A position sees itself only where it sees nothing else.
    The softmax is taken in float32 at least; a position that may see nothing gets zeros.  A NaN or infinite
    vector reaches no position that it is hidden from.  Any length goes: the last chunk is filled with hidden seats.

    Args:
        qk: queries, which are also the keys.
        v: values.
        rotations: from :func:`lsh_rotations`; their number of rounds is the number of hashes.
        mask: a rule; it is asked for the pairs that meet, never for all.
        chunk: positions in a chunk; one of at least ``t`` holds the whole sequence.
        look_back: earlier chunks that a chunk sees.
        causal: hide later positions; joined with ``mask`` by *and*.
        scale: factor on the scores; :math:`1/\sqrt e` unless given.
        across_buckets: let everything in reach be seen, whatever its bucket, as the published codes do.
        count_once: divide by :math:`N_{ij}`; without it a pair weighs as often as it meets.
        backend: ``torch`` sorts and chunks, ``reference`` writes the whole matrix; ``auto`` is ``torch``.

    Raises:
        ShapeError: shapes that don't fit, a rule for other samples or heads.
        ConfigError: sizes that are not positive integers, a mask that is not a rule.

    Source:
        Kitaev et al. 2020, section 2 and appendix A, arXiv:2001.04451
    """
    scale = _check(qk, v, mask, chunk, look_back, scale)
    chosen = resolve("lsh_attention", backend, {"torch": None, "reference": None})
    rules = _rules(mask, causal)
    (clean, v), (bad_q, bad_v) = without_nan(qk, v)
    buckets = lsh_buckets(clean, rotations)
    if qk.shape[1] == 0:
        return v.clone()
    bad = (bad_q, bad_q | bad_v)
    if chosen == "reference":
        meets = lsh_meetings(buckets, chunk=chunk, look_back=look_back, across_buckets=across_buckets)
        return _dense(clean, v, bad, meets, rules, scale, count_once)
    return _chunked(clean, v, bad, buckets, rules, scale, (chunk, look_back, across_buckets, count_once))


def lsh_meetings(
    buckets: Int[Tensor, "b h rounds t"], *, chunk: int = 64, look_back: int = 1, across_buckets: bool = False
) -> Int[Tensor, "b h t t"]:
    r"""Count in how many rounds two positions meet: the :math:`N_{ij}` of :func:`lsh_attention`, written out.

    .. math::
        N_{ij} = \sum_r \big[h^{(r)}_i = h^{(r)}_j\big]\;
        \big[0 \le \lfloor s_i^{(r)} / m \rfloor - \lfloor s_j^{(r)} / m \rfloor \le \textit{look back}\big]

    with :math:`s_i` the place of ``i`` after sorting by bucket, then position.  Where it is zero, nothing is computed.

    Args:
        buckets: from :func:`lsh_buckets`.
        chunk: :math:`m`, positions in a chunk.
        look_back: earlier chunks that a chunk sees.
        across_buckets: leave the first bracket out.

    Raises:
        ShapeError: buckets that are not integers of four axes.
        ConfigError: ``chunk`` below one, ``look_back`` negative.

    Source:
        Kitaev et al. 2020, section 2 and appendix A, arXiv:2001.04451
    """
    check_size("lsh_meetings", "chunk", chunk)
    check_size("lsh_meetings", "look_back", look_back, least=0)
    check_tensors("lsh_meetings", buckets)
    if buckets.ndim != 4 or buckets.is_floating_point() or buckets.dtype == torch.bool:
        refuse(
            "lsh_meetings buckets",
            f"{tuple(buckets.shape)} {buckets.dtype}",
            "integers, (b, h, rounds, t)",
            "Call lsh_buckets.",
        )
    place = buckets.argsort(dim=-1, stable=True).argsort(-1)
    behind = (place // chunk)[..., :, None] - (place // chunk)[..., None, :]
    meets = (behind >= 0) & (behind <= look_back)
    if not across_buckets:
        meets = meets & (buckets[..., :, None] == buckets[..., None, :])
    return meets.sum(2)


def shared_qk_attention(
    qk: Float[Tensor, "b t h e"],
    v: Float[Tensor, "b t h c"],
    mask: Mask | None = None,
    *,
    causal: bool = False,
    scale: float | None = None,
) -> Float[Tensor, "b t h c"]:
    r"""Full attention with shared queries and keys: what :func:`lsh_attention` approximates.

    .. math::
        o_i = \sum_{j \ne i} \operatorname{softmax}_j\!\Big(\frac{q_i \cdot q_j}{\lVert q_j \rVert \sqrt e}\Big) v_j,
        \qquad o_i = v_i \text{ where no } j \ne i \text{ may be seen}

    Args:
        qk: queries, which are also the keys.
        v: values.
        mask: a rule.
        causal: hide later positions; joined with ``mask`` by *and*.
        scale: factor on the scores; :math:`1/\sqrt e` unless given.

    Raises:
        ShapeError: shapes that don't fit, a rule for other samples or heads.
        ConfigError: a scale that is not positive, a mask that is not a rule.

    Source:
        Kitaev et al. 2020, section 2, arXiv:2001.04451
    """
    scale = _check(qk, v, mask, 1, 0, scale)
    (clean, v), (bad_q, bad_v) = without_nan(qk, v)
    if qk.shape[1] == 0:
        return v.clone()
    everywhere = torch.ones((), dtype=torch.int64, device=qk.device)
    return _dense(clean, v, (bad_q, bad_q | bad_v), everywhere, _rules(mask, causal), scale, True)


def _dense(
    qk: Tensor, v: Tensor, bad: tuple[Tensor, Tensor], meets: Tensor, rules: list[Mask], scale: float, once: bool
) -> Tensor:
    """One softmax over all pairs that meet; the matrix is written out."""
    b, t, h, _ = qk.shape
    wide = statistic_dtype(qk)
    scores = torch.einsum("bthe,bshe->bhts", qk.to(wide), _unit(qk.to(wide))) * scale
    allowed = (meets > 0).expand(b, h, t, t)
    for rule in rules:
        allowed = allowed & rule.dense(t, device=qk.device)
    scores = scores.masked_fill(torch.eye(t, dtype=torch.bool, device=qk.device), ALONE)
    if not once:
        scores = scores + meets.clamp(min=1).to(wide).log()
    weights, _, total = _weigh(scores, allowed)
    out = torch.einsum("bhts,bshc->bthc", weights / _nonzero(total), v.to(wide)).to(v.dtype)
    broken = rearrange(bad[0], "b t h -> b h t") | (allowed & rearrange(bad[1], "b t h -> b h 1 t")).any(-1)
    return out.masked_fill(rearrange(broken, "b h t -> b t h 1"), math.nan)


def _chunked(
    qk: Tensor,
    v: Tensor,
    bad: tuple[Tensor, Tensor],
    buckets: Tensor,
    rules: list[Mask],
    scale: float,
    form: tuple[int, int, bool, bool],
) -> Tensor:
    """Sort by bucket, attend in chunks, unsort, merge the rounds."""
    (b, t, h, _), (_, back, across, once) = qk.shape, form
    chunk = min(form[0], t)
    chunks, back = -(-t // chunk), min(back, -(-t // chunk) - 1)
    order = F.pad(
        buckets.argsort(dim=-1, stable=True), (0, chunks * chunk - t), value=t - 1
    )  # seats beyond t are hidden
    undo = torch.empty_like(buckets).scatter_(3, order[..., :t], torch.arange(t, device=qk.device).expand_as(buckets))
    seats = order.unflatten(3, (chunks, chunk))
    sample, head = (torch.arange(n, device=qk.device).view(s) for n, s in ((b, (-1, 1, 1, 1, 1)), (h, (-1, 1, 1, 1))))
    lines = (sample * t + seats) * h + head  # rows of the input, which stays b t h e

    wide = statistic_dtype(qk)
    q, keys, values = (_pick(x, lines) for x in (qk.to(wide), _unit(qk.to(wide)), v.to(wide)))
    keys, values, bad_key = _behind(keys, back), _behind(values, back), _behind(_pick(bad[1][..., None], lines), back)
    at, seen = seats[..., None], _behind(seats[..., None], back).mT
    allowed = _real(t, chunks, chunk, back, qk.device)
    if not across:
        own = buckets.gather(3, order).unflatten(3, (chunks, chunk))[..., None]
        allowed = allowed & (own == _behind(own, back).mT)
    for rule in rules:
        allowed = allowed & rule.allows(sample[..., None], head[..., None], at, seen)
    scores = ((q * scale) @ keys.mT).masked_fill_(at == seen, ALONE)
    if once and buckets.shape[2] > 1:
        scores -= _times_met(buckets, undo, seats, back, across).to(wide).log()
    weights, top, total = _weigh(scores, allowed)
    broken = (allowed & bad_key.mT).expand(scores.shape).any(-1, keepdim=True)

    place = undo + torch.arange(undo[..., 0].numel(), device=qk.device).view(*undo.shape[:3], 1) * (chunks * chunk)
    out, top, total, broken = (_pick(x, place) for x in (weights @ values, top, total, broken))
    share = torch.exp(top - top.amax(2, keepdim=True))  # rounds merge by their normalisers
    out = (out * share).sum(2) / _nonzero((total * share).sum(2))
    broken = broken.any(2) | rearrange(bad[0], "b t h -> b h t 1")
    return rearrange(out.to(v.dtype).masked_fill(broken, math.nan), "b h t c -> b t h c")


def _times_met(buckets: Tensor, undo: Tensor, seats: Tensor, back: int, across: bool) -> Tensor:
    """In how many rounds the pairs of each chunk meet; at least 1."""
    chunks, chunk = seats.shape[3:]
    # one number says bucket and chunk: a difference of 0 .. back means a meeting
    code = undo // chunk if across else undo // chunk + buckets * (chunks + back + 1)
    rounds = buckets.shape[2]
    count = torch.zeros((), dtype=torch.uint8 if rounds < 256 else torch.int32, device=seats.device)
    for r in range(rounds):
        of_round = code[:, :, r : r + 1].expand(-1, -1, rounds, -1)
        q = of_round.gather(3, seats.flatten(3)).view(seats.shape)[..., None]
        k = _behind(q, back).mT
        count = count + sum((q == k + i).to(count.dtype) for i in range(back + 1))
    return count.clamp(min=1)


def _behind(x: Tensor, back: int) -> Tensor:
    """The earlier chunks before each chunk: ``... chunks chunk e`` to ``... chunks (back + 1) chunk e``."""
    chunks = x.shape[-3]
    padded = F.pad(x, (0, 0, 0, 0, back, 0))
    return torch.cat([padded.narrow(-3, i, chunks) for i in range(back + 1)], -2)


def _real(t: int, chunks: int, chunk: int, back: int, device: torch.device) -> Tensor:
    """Which keys of a chunk's view are positions, and not padding before or after: ``chunks 1 keys``."""
    first = (torch.arange(chunks, device=device) - back) * chunk
    key = first[:, None, None] + torch.arange((back + 1) * chunk, device=device)
    return (key >= 0) & (key < t)


def _pick(x: Tensor, lines: Tensor) -> Tensor:
    """Rows of ``x``, all axes but the last counted as one."""
    rows = x.reshape(-1, x.shape[-1])
    return rows.index_select(0, lines.flatten()).view(*lines.shape, x.shape[-1])


def _weigh(scores: Tensor, allowed: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return exp(score - top), the top, and the sum: a softmax before its division; ``scores`` is overwritten."""
    scores = scores.masked_fill_(~allowed, -math.inf)
    top = scores.detach().amax(-1, keepdim=True).clamp(min=2 * ALONE)  # finite where nothing is allowed
    weights = (scores - top).exp_()
    return weights, top, weights.sum(-1, keepdim=True)


def _unit(x: Tensor) -> Tensor:
    length = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return x / _nonzero(length)


def _nonzero(x: Tensor) -> Tensor:
    return x.masked_fill(x == 0, 1.0)


def _rules(mask: Mask | None, causal: bool) -> list[Mask]:
    """All must allow a pair; they are not joined into one rule, which torch.compile cannot trace."""
    return ([] if mask is None or mask is full else [mask]) + ([causal_rule] if causal else [])


def _check(qk: Tensor, v: Tensor, mask: Mask | None, chunk: int, look_back: int, scale: float | None) -> float:
    op = "lsh_attention"
    check_tensors(op, qk, v)
    if qk.ndim != 4 or v.ndim != 4 or qk.shape[:3] != v.shape[:3] or 0 in (*qk.shape[2:], v.shape[3]):
        shapes = f"qk {tuple(qk.shape)}, v {tuple(v.shape)}"
        refuse(f"{op} inputs", shapes, "qk (b, t, h, e), v (b, t, h, c)", "Split the features into heads, third.")
    check_floating(op, qk, v)
    check_one_dtype(op, qk, v)
    check_one_device(op, qk, v)
    check_size(op, "chunk", chunk)
    check_size(op, "look_back", look_back, least=0)
    if mask is not None and not isinstance(mask, Mask):
        got = f"{type(mask).__name__} {tuple(mask.shape)}" if isinstance(mask, Tensor) else repr(mask)
        remedy = "A t s tensor costs what hashing saves; wrap one: Mask('mine', lambda b, h, t, s: tensor[t, s])."
        raise ConfigError(f"{op} mask", got=got, want="a rule", remedy=remedy)
    b, t, h, e = qk.shape
    check_mask(mask, b, h, t, t)
    check_numbers(scale, 0.0)
    return 1 / math.sqrt(e) if scale is None else scale


def _tables(x: Tensor, rotations: Rotations) -> list[Tensor]:
    tables = [rotations] if isinstance(rotations, Tensor) else rotations
    if not isinstance(tables, list | tuple) or not all(isinstance(table, Tensor) for table in tables):
        remedy = "Call lsh_rotations(rounds, heads, head_dim, buckets)."
        raise ConfigError(
            "lsh_buckets rotations", got=repr(rotations), want="a tensor or a list of them", remedy=remedy
        )
    if x.ndim != 4 or not tables:
        got = f"x {tuple(x.shape)}, {len(tables)} tables"
        refuse("lsh_buckets inputs", got, "x (b, t, h, e) and at least one table", "Call lsh_rotations.")
    check_one_device("lsh_buckets", x, *tables)
    want = (tables[0].shape[:1].numel(), x.shape[2], x.shape[3])
    for table in tables:
        fits = table.ndim == 4 and table.shape[1] in (1, want[1]) and table.shape[::2] == want[::2]
        if not fits or 0 in table.shape or not table.is_floating_point():
            raise ShapeError(
                "lsh_buckets rotations",
                got=f"{tuple(table.shape)} {table.dtype} for x {tuple(x.shape)}",
                want=f"floating, (rounds, {want[1]} or 1, {want[2]}, buckets / 2), rounds alike",
                remedy="Call lsh_rotations(rounds, heads, head_dim, buckets).",
            )
    buckets = 1
    for table in tables:
        buckets *= 2 * table.shape[-1]
    if buckets > 2**31:
        remedy = "More buckets than positions only part neighbours; use fewer factors."
        raise ConfigError("lsh_buckets buckets", got=buckets, want="at most 2**31", remedy=remedy)
    return list(tables)
