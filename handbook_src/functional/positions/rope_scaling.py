r"""Rotary frequencies for contexts longer than a model was trained on.

With :math:`\theta_i` the trained frequencies, :math:`s` the ``factor`` by which the context grows and
:math:`L` the trained length:

===========  ===========================================================================
``linear``   all pairs turn :math:`s` times slower: position interpolation
``ntk``      a larger base: the fastest pair keeps its speed, the slowest gets :math:`\theta / s`
``dynamic``  ``ntk`` by as much as the present length asks for; keys in a cache keep the turns of
             their own step, so that decoding step by step is another function of a long text
``yarn``     fast pairs as trained, slow ones interpolated, a ramp between; sharper attention
``llama3``   the same idea, ramped in the number of turns within the trained length
===========  ===========================================================================
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from handbook_src.check import check_positive, check_size
from handbook_src.errors import ConfigError
from handbook_src.functional.positions.rope import check_rotary_dim, rope_frequencies

Kind = Literal["linear", "ntk", "dynamic", "yarn", "llama3"]
KINDS = ("linear", "ntk", "dynamic", "yarn", "llama3")


@dataclass(frozen=True)
class RopeScaling:
    r"""How to stretch rotary positions; the fields of transformers' ``rope_parameters``.

    .. math:: \sqrt{1/\tau} = 0.1 \ln s + 1 \qquad (\text{YaRN's factor on cosine and sine})

    Args:
        kind: one of the table above.
        factor: how many times longer the context becomes.
        original_length: the trained length; ``dynamic``, ``yarn`` and ``llama3`` need it.
        slow: pairs with fewer turns than this in the trained length are interpolated
            (YaRN's ``beta_slow``, Llama 3's ``low_freq_factor``).
        fast: pairs with more turns are left as they are; 32 for YaRN (``beta_fast``) and 4 for
            Llama 3 (``high_freq_factor``) unless given.
        attention_factor: factor on cosine and sine; the formula's for ``yarn`` and 1 otherwise unless given.

    Raises:
        ConfigError: an unknown kind, a factor below 1, a missing length, ``fast`` not above ``slow``.

    Source:
        Chen et al. 2023, arXiv:2306.15595; Peng et al. 2023, arXiv:2309.00071
    """

    kind: Kind
    factor: float | int
    original_length: int | None = None
    slow: float | int = 1.0
    fast: float | int | None = None
    attention_factor: float | int | None = None

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ConfigError("RopeScaling kind", got=repr(self.kind), want=f"one of {KINDS}", remedy="See its table.")
        check_positive("RopeScaling", "factor", self.factor)
        if self.factor < 1:
            raise ConfigError(
                "RopeScaling factor", got=self.factor, want="at least 1", remedy="A longer context only: 4 for 4 times."
            )
        if self.original_length is None and self.kind in ("dynamic", "yarn", "llama3"):
            raise ConfigError(
                "RopeScaling original_length", got=None, want="the trained length", remedy=f"{self.kind} needs it."
            )
        if self.original_length is not None:
            check_size("RopeScaling", "original_length", self.original_length)
        if self.attention_factor is not None:
            check_positive("RopeScaling", "attention_factor", self.attention_factor)
        check_positive("RopeScaling", "slow", self.slow)
        if self.fast is None:
            object.__setattr__(self, "fast", 32.0 if self.kind == "yarn" else 4.0)
        if not self.turns > self.slow:
            raise ConfigError(
                "RopeScaling fast", got=self.fast, want=f"more than slow, {self.slow}", remedy="YaRN: 32 and 1."
            )

    @property
    def turns(self) -> float:
        """``fast``, filled in and checked to be a number."""
        assert self.fast is not None
        check_positive("RopeScaling", "fast", self.fast)
        return float(self.fast)

    @property
    def magnitude(self) -> float:
        """The factor on cosine and sine; squared, it is the factor on the scores."""
        if self.attention_factor is not None:
            return float(self.attention_factor)
        return 0.1 * math.log(self.factor) + 1.0 if self.kind == "yarn" else 1.0


def scaled_rope_frequencies(
    dim: int,
    base: float = 10000.0,
    scaling: RopeScaling | None = None,
    *,
    length: int | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.float32,
) -> Float[Tensor, " half"]:
    r"""Return the rotary frequencies under ``scaling``.

    .. math::
        \text{linear: } \theta_i / s \qquad
        \text{ntk: } \text{base} \to \text{base}\; s^{r/(r-2)} \qquad
        \text{dynamic: } s \to \tfrac{s \ell}{L} - (s - 1), \ \ell = \max(\text{length}, L) \\
        \text{yarn, llama3: } (1 - \gamma_i)\, \theta_i / s + \gamma_i\, \theta_i, \qquad \gamma_i \in [0, 1]

    :math:`\gamma` falls from 1 at ``fast`` turns :math:`\theta_i L / 2\pi` within the trained length to 0 at
    ``slow``: linear in the turns for ``llama3`` (and in the YaRN paper), linear in the index :math:`i` between
    whole numbers for ``yarn``, which is what its published code and every released YaRN model do.

    Args:
        dim: rotary features :math:`r`.
        base: as for :func:`handbook_src.functional.rope_frequencies`.
        scaling: which rule; plain frequencies unless given.
        length: the present length, for ``dynamic``.
        device: where the result is made.
        dtype: of the result; computed in float64 and rounded once.

    Raises:
        ConfigError: what :func:`~handbook_src.functional.rope_frequencies` refuses, or fewer than
            four rotary features where the base changes, or a base of 1 under ``yarn``.

    Source:
        Chen et al. 2023, eq. 4, arXiv:2306.15595; Peng et al. 2023, sections 3.1 to 3.3, arXiv:2309.00071
    """
    check_rotary_dim("scaled_rope_frequencies", dim)
    plain = rope_frequencies(dim, base, device=device, dtype=torch.float64)
    if scaling is None:
        return plain.to(dtype)
    s = float(scaling.factor)
    if scaling.kind == "linear":
        return (plain / s).to(dtype)
    if scaling.kind in ("ntk", "dynamic"):
        return rope_frequencies(dim, _ntk_base(dim, base, scaling, length), device=device, dtype=dtype)
    ramp = _yarn_ramp(dim, base, scaling) if scaling.kind == "yarn" else _llama3_ramp(plain, scaling)
    ramp = ramp.to(plain.device)
    return ((1 - ramp) * plain / s + ramp * plain).to(dtype)


def _ntk_base(dim: int, base: float, scaling: RopeScaling, length: int | None) -> float:
    if dim < 4:
        raise ConfigError(
            f"{scaling.kind} rotary dim",
            got=dim,
            want="at least 4",
            remedy="A single pair has no slowest one; take linear.",
        )
    s = float(scaling.factor)
    if scaling.kind == "dynamic":
        assert scaling.original_length is not None  # refused at construction
        if length is not None:
            check_size("dynamic scaling", "length", length, least=0)
        trained = scaling.original_length
        s = s * max(length or 0, trained) / trained - (s - 1)
    return float(base) * s ** (dim / (dim - 2))


def _llama3_ramp(plain: Tensor, scaling: RopeScaling) -> Tensor:
    assert scaling.original_length is not None
    turns = plain * scaling.original_length / (2 * math.pi)
    return ((turns - scaling.slow) / (scaling.turns - scaling.slow)).clamp(0, 1)


def _yarn_ramp(dim: int, base: float, scaling: RopeScaling) -> Tensor:
    """1 up to the pair with ``fast`` turns, 0 from the pair with ``slow`` turns on."""
    if not base > 1:
        raise ConfigError("yarn base", got=base, want="above 1", remedy="At 1 all pairs have the same speed.")

    def pair_with(turns: float) -> float:
        assert scaling.original_length is not None
        return dim * math.log(scaling.original_length / (turns * 2 * math.pi)) / (2 * math.log(base))

    low = max(math.floor(pair_with(scaling.turns)), 0)
    high = max(low, min(math.ceil(pair_with(float(scaling.slow))), dim - 1))
    index = torch.arange(dim // 2, dtype=torch.float64)
    return 1 - ((index - low) / (high - low if high != low else 0.001)).clamp(0, 1)
