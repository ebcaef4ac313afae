"""BigBird's attention as a layer."""

from __future__ import annotations

from typing import final

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor

from handbook_src.check import check_size
from handbook_src.errors import ConfigError
from handbook_src.functional.attention.mask import Mask
from handbook_src.functional.attention.random_attention import bigbird_layout, bigbird_rule, random_attention
from handbook_src.layers.attention.attention import MultiHeadAttention, with_broken


@final
class BigBirdAttention(MultiHeadAttention):
    r"""Self-attention to the neighbouring blocks, the first and the last, and a few drawn at random.

    .. math:: Y_i = \operatorname{Attention}(Q_i, K_{N(i)}, V_{N(i)}), \qquad N(i) = \{\, j : L_{ij} = 1 \,\}

    The maths is :func:`handbook_src.functional.random_attention`; the draw
    depends on ``seed`` and on the number of blocks alone, in training as in evaluation.  Under ``torch.compile`` the
    blocks are planned outside of the graph, which breaks there.

    Args:
        dim: features of ``x`` and of the output.
        heads: number of heads.
        block_size: positions of a block.
        window: blocks of the window, odd.
        random: blocks drawn for each row of blocks.
        ends: global blocks at each end.
        seed: of the draw; give each layer its own.
        dropout: share of the weights dropped in training.

    Shape:
        ``x`` and the output are ``b t d``, any ``t``.

    Typical values:
        ``block_size`` 64, ``window`` 3, ``random`` 3, ``ends`` 1 (BigBird-base).

    Raises:
        ConfigError: sizes that are negative, zero where they may not be, or fractions; an even ``window``.

    Source:
        Zaheer et al. 2020, section 2 and appendix D, arXiv:2007.14062
    """

    def __init__(
        self,
        dim: int,
        heads: int = 1,
        *,
        block_size: int = 64,
        window: int = 3,
        random: int = 3,
        ends: int = 1,
        seed: int = 0,
        dropout: float = 0.0,
        dtype: torch.dtype | None = None,
    ) -> None:
        check_size("BigBirdAttention", "block_size", block_size)
        bigbird_layout(0, window=window, random=random, ends=ends, seed=seed)  # refuses what cannot work
        super().__init__(dim, heads, dropout=dropout, dtype=dtype)
        self.block_size, self.window, self.random, self.ends, self.seed = block_size, window, random, ends, seed

    def rule(self, t: int) -> Mask:
        """Return the layer's mask rule for ``t`` positions."""
        return bigbird_rule(t, self.block_size, self.window, self.random, self.ends, self.seed)

    def forward(  # type: ignore[override]
        self, x: Float[Tensor, "b t d"], mask: Mask | None = None
    ) -> Float[Tensor, "b t d"]:
        """Attend to the granted blocks; ``mask`` is a further rule (padding)."""
        x, _, _, broken = self._shielded(x, None, mask, None, by_key=True)
        q, k, v = self._project(x, None, None)
        out = random_attention(
            q,
            k,
            v,
            block_size=self.block_size,
            window=self.window,
            random=self.random,
            ends=self.ends,
            seed=self.seed,
            mask=mask,
            dropout=self.dropout if self.training else 0.0,
        )
        return with_broken(self.out_proj(rearrange(out, "b t h e -> b t (h e)")), broken)

    def weights(  # type: ignore[override]
        self, x: Float[Tensor, "b t d"], mask: Mask | None = None
    ) -> Float[Tensor, "b h t s"]:
        """Return each head's attention weights, dense, without dropout: for looking at."""
        if mask is not None and not isinstance(mask, Mask):
            raise ConfigError(
                "BigBirdAttention mask", got=type(mask).__name__, want="a Mask", remedy="Use padding(lengths)."
            )
        rule = self.rule(x.shape[1])
        return super().weights(x, mask=rule if mask is None else rule & mask)

    def extra_repr(self) -> str:
        sizes = f"block_size={self.block_size}, window={self.window}, random={self.random}, ends={self.ends}"
        return f"{super().extra_repr()}, {sizes}, seed={self.seed}"
