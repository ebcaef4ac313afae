r"""Rotary position embedding: queries and keys turned by an angle that grows with their position.

With ``x`` of shape ``b t h e`` and the first :math:`r \le e` features rotated:

========================  ==================================================================
:func:`rope_frequencies`  one angular speed for each of the :math:`r/2` pairs of features
:func:`rope_cos_sin`      cosine and sine of position times speed, in float32 or better
:func:`apply_rope`        the rotation itself
========================  ==================================================================

Which two features make a pair is a convention.  *Half-split* pairs feature :math:`i` with
:math:`i + r/2` (GPT-NeoX, Llama in transformers), *interleaved* pairs :math:`2i` with
:math:`2i + 1` (the paper, GPT-J, Llama as published).  Weights trained under one give
nonsense under the other; :func:`convert_rope_weight` permutes them.
"""

from __future__ import annotations

from typing import Literal

import torch
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor

from handbook_src.check import check_floating, check_integers, check_positive, check_rank, check_size
from handbook_src.dispatch import Backend, Resolved, needs_for_triton, resolve
from handbook_src.errors import ConfigError, ShapeError
from handbook_src.precision import statistic_dtype


def apply_rope(
    x: Float[Tensor, "b t h e"],
    cos: Float[Tensor, "t half"] | Float[Tensor, "#b t half"],
    sin: Float[Tensor, "t half"] | Float[Tensor, "#b t half"],
    *,
    interleaved: bool = False,
    backend: Backend = "auto",
) -> Float[Tensor, "b t h e"]:
    r"""Rotate pairs of features of each head by the angle of their position.

    .. math::
        \begin{pmatrix} y_i \\ y_{i'} \end{pmatrix} =
        \begin{pmatrix} \cos\phi_{ti} & -\sin\phi_{ti} \\ \sin\phi_{ti} & \cos\phi_{ti} \end{pmatrix}
        \begin{pmatrix} x_i \\ x_{i'} \end{pmatrix}, \qquad
        i' = \begin{cases} i + r/2 & \text{half-split} \\ i + 1 & \text{interleaved} \end{cases}

    ``cos`` and ``sin`` are ``r/2`` wide, one entry a pair; features from ``r`` on pass through.
    The product is formed in the wider dtype of ``x`` and ``cos``, float32 at least, and rounded once.

    Args:
        x: queries or keys.
        cos: cosines, for all samples alike (``t r/2``) or for each sample (``b t r/2``).
        sin: sines, of the same shape.
        interleaved: pairs are neighbours; otherwise they are half of ``r`` apart.
        backend: ``auto`` takes the fastest that can run.

    Raises:
        ShapeError: wrong rank or dtype, ``cos`` and ``sin`` that don't fit each other or ``x``.

    Source:
        Su et al. 2021, eq. 34, arXiv:2104.09864
    """
    _check_rope(x, cos, sin)
    if resolve("apply_rope", backend, _candidates(backend, x, cos, sin)) == "triton":
        from handbook_src.kernels.rope import rope_triton

        return rope_triton(x, cos, sin, interleaved)
    half = cos.shape[-1]
    wide = torch.promote_types(torch.promote_types(x.dtype, cos.dtype), torch.float32)
    cos, sin = cos.to(wide).unsqueeze(-2), sin.to(wide).unsqueeze(-2)  # ... t 1 r/2: the same for each head
    turning = x[..., : 2 * half].to(wide)
    if interleaved and not torch.compiler.is_compiling():  # the compiler fuses no complex numbers
        # torch's complex product is one pass, 5 to 10 times as fast on a CPU as strided halves and a stack
        pairs = torch.view_as_complex(turning.unflatten(-1, (half, 2)).contiguous())
        y = torch.view_as_real(pairs * torch.complex(cos, sin)).flatten(-2)
    else:
        first = turning[..., 0::2] if interleaved else turning[..., :half]
        second = turning[..., 1::2] if interleaved else turning[..., half:]
        turned = (first * cos - second * sin, first * sin + second * cos)
        y = torch.stack(turned, -1).flatten(-2) if interleaved else torch.cat(turned, -1)
    y = y.to(x.dtype)
    return y if 2 * half == x.shape[-1] else torch.cat((y, x[..., 2 * half :]), -1)


def rope_frequencies(
    dim: int,
    base: float = 10000.0,
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.float32,
) -> Float[Tensor, " half"]:
    r"""Return how far each pair of features turns per position, in radians.

    .. math:: \theta_i = \text{base}^{-2i/r}, \qquad i = 0, \dots, r/2 - 1

    Computed in float64 and rounded once.

    Args:
        dim: rotary features :math:`r`, an even number.
        base: the slowest pair turns once in almost :math:`2\pi\,\text{base}` positions.
        device: where the result is made.
        dtype: of the result.

    Raises:
        ConfigError: ``dim`` is odd or not positive, or ``base`` is not positive.

    Source:
        Su et al. 2021, section 3.2.2, arXiv:2104.09864
    """
    check_rotary_dim("rope_frequencies", dim)
    check_positive("rope_frequencies", "base", base)
    exponent = torch.arange(0, dim, 2, device=device, dtype=torch.float64) / dim
    return (float(base) ** -exponent).to(dtype)


def rope_cos_sin(
    positions: Int[Tensor, " t"] | Int[Tensor, "b t"],
    frequencies: Float[Tensor, " half"],
    *,
    dtype: torch.dtype | None = None,
) -> tuple[Float[Tensor, "*lead half"], Float[Tensor, "*lead half"]]:
    r"""Return the cosine and sine of each position's angles.

    .. math:: \phi_{ti} = p_t\, \theta_i

    The angle is formed in float32, or float64 where ``frequencies`` are: bfloat16 has no
    odd numbers above 256, so that neighbouring positions there would share an angle.

    Args:
        positions: integers, for all samples alike (``t``) or for each sample (``b t``).
        frequencies: from :func:`rope_frequencies`.
        dtype: of the result; the angle's unless given.

    Raises:
        ShapeError: positions that are not integers, or have another rank.

    Source:
        Su et al. 2021, eq. 15, arXiv:2104.09864
    """
    check_rank("rope_cos_sin", positions, (1, 2), "(time,) or (batch, time)")
    check_integers(
        "rope_cos_sin", "positions", positions, "Count with torch.arange(t); bfloat16 cannot tell 256 from 257."
    )
    check_floating("rope_cos_sin frequencies", frequencies)
    wide = statistic_dtype(frequencies)
    angle = positions[..., None].to(wide) * frequencies.to(wide)
    dtype = wide if dtype is None else dtype
    return angle.cos().to(dtype), angle.sin().to(dtype)


def convert_rope_weight(
    weight: Float[Tensor, "*shape"],
    heads: int,
    *,
    to: Literal["interleaved", "half"],
    rotary_dim: int | None = None,
) -> Float[Tensor, "*shape"]:
    r"""Permute the rows of a query or key projection from one pairing of features to the other.

    .. math:: (P W x)_{2i} = (W x)_i, \quad (P W x)_{2i+1} = (W x)_{i + r/2} \qquad (\text{to interleaved})

    Scores don't change: queries and keys are permuted alike, and a dot product doesn't care.
    Values and the output projection stay as they are.

    Args:
        weight: the weight ``(h e) d`` or bias ``(h e)`` of the projection.
        heads: how many heads the rows hold.
        to: the convention that is wanted; the weight has the other one.
        rotary_dim: rotated features of a head; all unless given.

    Raises:
        ConfigError: heads that don't divide the rows, an odd ``rotary_dim`` or one above a head's features,
            or an unknown convention.

    Source:
        interleaved pairs: Su et al. 2021, eq. 15 and eq. 34, arXiv:2104.09864; half-split ones: the released code of
        GPT-NeoX, Black et al. 2022, arXiv:2204.06745
    """
    check_size("convert_rope_weight", "heads", heads)
    rows = weight.shape[0] if weight.ndim else 0
    if rows % heads:
        raise ConfigError(
            "convert_rope_weight heads", got=f"{heads} for {rows} rows", want="a divisor", remedy="Key heads for keys."
        )
    rotary_dim = rows // heads if rotary_dim is None else rotary_dim
    check_rotary_dim("convert_rope_weight", rotary_dim, limit=rows // heads)
    if to not in ("interleaved", "half"):
        raise ConfigError(
            "convert_rope_weight to", got=repr(to), want="'interleaved' or 'half'", remedy="Say which one is wanted."
        )
    by_head = rearrange(weight, "(h e) ... -> h e ...", h=heads)
    pattern = "h (p i) ... -> h (i p) ..." if to == "interleaved" else "h (i p) ... -> h (p i) ..."
    turning = rearrange(by_head[:, :rotary_dim], pattern, p=2)
    return rearrange(torch.cat((turning, by_head[:, rotary_dim:]), 1), "h e ... -> (h e) ...")


def check_rotary_dim(op: str, dim: int, *, limit: int | None = None) -> None:
    """Refuse a number of rotary features that is odd, not positive or above ``limit``.

    Raises:
        ConfigError: it is.
    """
    check_size(op, "rotary dim", dim, least=2)
    if dim % 2 or (limit is not None and dim > limit):
        raise ConfigError(
            f"{op} rotary dim",
            got=dim,
            want="an even number" + (f" of at most {limit}" if limit is not None else ""),
            remedy="Features turn in pairs; leave the odd ones out with a smaller rotary dim.",
        )


def _candidates(backend: Backend, x: Tensor, cos: Tensor, sin: Tensor) -> dict[Resolved, str | None]:
    # By bytes the kernel wins on a GPU, 2e against 9e each way.  No GPU has run it yet, neither for time nor for
    # correctness: the readable maths first, the kernel where it is named.
    able: dict[Resolved, str | None] = {"reference": None, "triton": "tensors for a kernel"}
    if backend == "triton":
        able["triton"] = needs_for_triton(x, cos, sin)
        if torch.float64 in (x.dtype, cos.dtype, sin.dtype):
            able["triton"] = "float16, bfloat16 or float32: the kernel computes in float32"
    return able


def _check_rope(x: Tensor, cos: Tensor, sin: Tensor) -> None:
    check_floating("apply_rope", x, cos, sin)
    check_rank("apply_rope", x, (4,), "(batch, time, heads, features)")
    fits = cos.ndim in (2, 3) and cos.shape == sin.shape and cos.shape[-2] == x.shape[1]
    fits = fits and (cos.ndim == 2 or cos.shape[0] in (1, x.shape[0])) and 2 * cos.shape[-1] <= x.shape[-1]
    if not fits:
        raise ShapeError(
            "apply_rope angles",
            got=f"cos {tuple(cos.shape)}, sin {tuple(sin.shape)} for x {tuple(x.shape)}",
            want=f"both ({x.shape[1]}, r/2) or ({x.shape[0]}, {x.shape[1]}, r/2) with r at most {x.shape[-1]}",
            remedy="One entry a pair of features, half as wide as what is rotated: don't repeat them.",
        )
