"""Rotary position embedding as a layer."""

from __future__ import annotations

from typing import final

import torch
from jaxtyping import Float, Int
from torch import Tensor

from handbook_src.check import check_positive, check_size
from handbook_src.errors import ConfigError, ShapeError
from handbook_src.functional.positions.rope import apply_rope, check_rotary_dim, rope_cos_sin
from handbook_src.functional.positions.rope_scaling import RopeScaling, scaled_rope_frequencies
from handbook_src.layers.positions.position import FixedTable


@final
class RotaryEmbedding(FixedTable):
    r"""Turns queries and keys by the angle of their position.

    .. math:: q_t \to R_{t\theta}\, q_t, \quad k_s \to R_{s\theta}\, k_s, \qquad
        (R_{t\theta} q_t) \cdot (R_{s\theta} k_s) = q_t \cdot R_{(s - t)\theta}\, k_s

    The rotation is :func:`handbook_src.functional.apply_rope`; frequencies under ``scaling`` are
    :func:`handbook_src.functional.scaled_rope_frequencies`.  Angles are formed in float64 and
    their cosines kept in float32 at least, also in a layer cast to bfloat16.  Nothing is trained and the
    state dict is empty, as in transformers.

    Args:
        dim: features of a head that turn; the rest of a wider head passes through.
        base: larger is slower; what the model was trained with.
        interleaved: neighbours make a pair (GPT-J); otherwise features half of ``dim`` apart (Llama, GPT-NeoX).
        scaling: how to stretch positions beyond the trained length. ``dynamic`` reads the largest of given
            ``positions``, which neither a full graph of torch.compile nor the meta device can.
        max_positions: how many rows of cosines and sines are kept; later ones are computed when they come.
        device: where they are.
        dtype: of the kept rows; float32 at least.

    Shape:
        ``q`` is ``b t h e``, ``k`` is ``b t g e``; the outputs have the same shapes.

    Typical values:
        dim 64 or 128, all of a head (Llama) or a quarter (Pythia); base 10000, or 500000 (Llama 3).

    Raises:
        ConfigError: ``dim`` is odd or not positive, a base that is not positive, a negative ``offset``.
        ShapeError: heads with fewer than ``dim`` features, positions that are no integers or don't fit.

    Source:
        Su et al. 2021, section 3.2, arXiv:2104.09864
    """

    cos: Tensor
    sin: Tensor

    def __init__(
        self,
        dim: int,
        *,
        base: float = 10000.0,
        interleaved: bool = False,
        scaling: RopeScaling | None = None,
        max_positions: int = 2048,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_rotary_dim("RotaryEmbedding", dim)
        check_positive("RotaryEmbedding", "base", base)
        check_size("RotaryEmbedding", "max_positions", max_positions, least=0)
        if scaling is not None and not isinstance(scaling, RopeScaling):
            raise ConfigError(
                "RotaryEmbedding scaling",
                got=repr(scaling),
                want="a RopeScaling",
                remedy="For instance RopeScaling('linear', factor=2.0).",
            )
        self.dim, self.base, self.interleaved = dim, base, interleaved
        self.scaling, self.max_positions = scaling, max_positions
        like = torch.empty(0, device=device, dtype=dtype)
        self.register_buffer("cos", like, persistent=False)
        self.register_buffer("sin", like, persistent=False)
        self.reset_buffers(like.device, like.dtype)

    def reset_buffers(self, device: torch.device, dtype: torch.dtype) -> None:
        """Compute the kept cosines and sines."""
        kept = torch.arange(self.max_positions, device=device)
        self.cos, self.sin = self._compute(kept, torch.promote_types(dtype, torch.float32), 0)

    def forward(
        self,
        q: Float[Tensor, "b t h e"],
        k: Float[Tensor, "b t g e"],
        offset: int = 0,
        positions: Int[Tensor, " t"] | Int[Tensor, "b t"] | None = None,
    ) -> tuple[Float[Tensor, "b t h e"], Float[Tensor, "b t g e"]]:
        """Turn both; positions count from ``offset`` unless they are given."""
        if q.ndim != 4 or k.ndim != 4 or q.shape[:2] != k.shape[:2]:
            raise ShapeError(
                "RotaryEmbedding input",
                got=f"q {tuple(q.shape)}, k {tuple(k.shape)}",
                want="q (b, t, h, e) and k (b, t, g, e) of the same batch and time",
                remedy="Turn keys once, when they are made, before they go into a cache.",
            )
        cos, sin = self.cos_sin(q.shape[1], offset, positions)
        return tuple(apply_rope(x, cos, sin, interleaved=self.interleaved) for x in (q, k))  # type: ignore[return-value]

    def cos_sin(
        self, t: int, offset: int = 0, positions: Int[Tensor, " t"] | Int[Tensor, "b t"] | None = None
    ) -> tuple[Float[Tensor, "*lead half"], Float[Tensor, "*lead half"]]:
        """Return what ``apply_rope`` needs, to share it among the layers of a model."""
        check_size("RotaryEmbedding", "t", t, least=0)
        check_size("RotaryEmbedding", "offset", offset, least=0)
        dtype, end = self.cos.dtype, offset + t
        if positions is not None:
            last = int(positions.max()) + 1 if self._dynamic and positions.numel() else 0
            return self._compute(positions, dtype, last)
        trained = self.scaling.original_length if self.scaling is not None else None
        if end <= self.max_positions and not (self._dynamic and end > (trained or 0)):
            return self.cos[offset:end], self.sin[offset:end]
        return self._compute(torch.arange(offset, end, device=self.cos.device), dtype, end)

    @property
    def _dynamic(self) -> bool:
        return self.scaling is not None and self.scaling.kind == "dynamic"

    def _compute(self, positions: Tensor, dtype: torch.dtype, length: int) -> tuple[Tensor, Tensor]:
        frequencies = scaled_rope_frequencies(
            self.dim, self.base, self.scaling, length=length, device=positions.device, dtype=torch.float64
        )
        cos, sin = rope_cos_sin(positions, frequencies, dtype=dtype)
        magnitude = 1.0 if self.scaling is None else self.scaling.magnitude
        return (cos, sin) if magnitude == 1.0 else (cos * magnitude, sin * magnitude)

    def extra_repr(self) -> str:
        scaling = "" if self.scaling is None else f", scaling={self.scaling}"
        return f"{self.dim}, base={self.base}, interleaved={self.interleaved}{scaling}"
