"""The Reformer: attention by hashing, and reversible layers around it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, final

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from handbook_src.check import check_features, check_probability, check_rank, check_size
from handbook_src.errors import ConfigError
from handbook_src.functional.attention.lsh_attention import Rotations, lsh_attention, lsh_factors, lsh_rotations
from handbook_src.functional.attention.mask import Mask
from handbook_src.layers.attention.attention import shield_padding, with_broken
from handbook_src.layers.attention.reversible import ReversibleBlock, ReversibleStack
from handbook_src.layers.foundations.linear import Linear
from handbook_src.layers.foundations.mlp import MLP
from handbook_src.layers.normalisation.norm import LayerNorm


@final
class LSHAttention(nn.Module):
    r"""Self-attention in which a position sees only what hashes into its bucket.

    .. math:: Y = \operatorname{LSH}(X W^{QK},\; X W^V)\, W^O

    See :func:`handbook_src.functional.lsh_attention`.  Queries and keys share one projection.
    New hashes are drawn at each call, so two calls differ; with a ``seed`` they are the same.

    Args:
        dim: features of ``x`` and of the output.
        heads: number of heads, a divisor of ``dim``.
        chunk: positions in a chunk.
        rounds: hashes at each call.
        buckets: their number, or factors of it; two for each chunk unless given.
        causal: hide later positions.
        seed: of the hashes; ``None`` draws new ones from torch's generator each time.
        device: of the parameters.
        dtype: of the parameters.

    Shape:
        ``b t dim`` to ``b t dim``, any ``t``.

    Typical values:
        ``chunk=64``; ``rounds`` 1 to 16 in the paper, of which 8 come close to full attention; more at evaluation
        than in training where time allows.

    Raises:
        ConfigError: sizes that are not positive integers, heads that don't divide, an odd number of buckets.
        ShapeError: an input of another rank or width.

    Source:
        Kitaev et al. 2020, section 2, arXiv:2001.04451
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        *,
        chunk: int = 64,
        rounds: int = 4,
        buckets: int | Sequence[int] | None = None,
        causal: bool = False,
        seed: int | None = None,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        for name, size in (("dim", dim), ("heads", heads), ("chunk", chunk), ("rounds", rounds)):
            check_size("LSHAttention", name, size)
        if dim % heads:
            got = f"{heads} for dim {dim}"
            raise ConfigError("LSHAttention heads", got=got, want="a divisor of dim", remedy="Share dim evenly.")
        if buckets is not None:
            lsh_rotations(1, 1, 1, buckets)  # refuses odd ones now, not at the first call
        if seed is not None:
            check_size("LSHAttention", "seed", seed, least=0)
        self.dim, self.heads, self.chunk, self.rounds = dim, heads, chunk, rounds
        self.buckets, self.causal, self.seed = buckets, causal, seed
        self.qk_proj = Linear(dim, dim, False, device, dtype)
        self.v_proj = Linear(dim, dim, False, device, dtype)
        self.out_proj = Linear(dim, dim, False, device, dtype)

    def reset_parameters(self) -> None:
        """Draw the three projections anew."""
        for proj in (self.qk_proj, self.v_proj, self.out_proj):
            proj.reset_parameters()

    def forward(
        self, x: Float[Tensor, "b t d"], mask: Mask | None = None, rotations: Rotations | None = None
    ) -> Float[Tensor, "b t d"]:
        """Attend under a rule, with the given directions instead of the layer's own where given."""
        check_rank("LSHAttention", x, (3,), "(b, t, dim)")
        check_features("LSHAttention", x, self.dim)
        x, _, broken = shield_padding(x, mask, x.shape[1], self.heads, by_key=True)
        qk, v = (rearrange(proj(x), "b t (h e) -> b t h e", h=self.heads) for proj in (self.qk_proj, self.v_proj))
        rotations = self.rotations(x.shape[1], x.device) if rotations is None else rotations
        out = lsh_attention(qk, v, rotations, mask, chunk=self.chunk, causal=self.causal)
        return with_broken(self.out_proj(rearrange(out, "b t h e -> b t (h e)")), broken)

    def rotations(self, t: int, device: torch.device | str | None = None) -> list[Tensor]:
        """Draw the directions for ``t`` positions: new ones, or the seed's."""
        buckets = lsh_factors(t, self.chunk) if self.buckets is None else self.buckets
        sizes = (self.rounds, self.heads, self.dim // self.heads, buckets)
        if self.seed is None:
            return lsh_rotations(*sizes, device=device)
        drawn = lsh_rotations(*sizes, generator=torch.Generator().manual_seed(self.seed), device="cpu")
        return [r.to(device) for r in drawn]

    def extra_repr(self) -> str:
        buckets = "" if self.buckets is None else f", buckets={self.buckets}"
        seed = "" if self.seed is None else f", seed={self.seed}"
        sizes = f"{self.dim}, heads={self.heads}, chunk={self.chunk}, rounds={self.rounds}"
        return f"{sizes}{buckets}, causal={self.causal}{seed}"


@final
class Reformer(nn.Module):
    r"""A Transformer stack for long sequences: LSH attention inside reversible blocks.

    .. math::
        Y_1 = X_1 + \operatorname{LSH}(\operatorname{norm}(X_2)), \qquad
        Y_2 = X_2 + \operatorname{MLP}(\operatorname{norm}(Y_1))

    Both streams start as the input; the output is their mean behind a norm.  The attention is
    :func:`handbook_src.functional.lsh_attention`, the stack
    :func:`handbook_src.functional.reversible`: time grows with ``t`` times the chunk instead of ``t``
    squared, and the activations kept for the backward pass don't grow with ``depth``.

    Args:
        dim: features.
        depth: blocks.
        heads: of each attention.
        chunk: positions in a chunk.
        rounds: hashes at each call.
        causal: hide later positions.
        dropout: in the feed-forward networks.
        device: of the parameters.
        dtype: of the parameters.

    Shape:
        ``b t dim`` to ``b t dim``, any ``t``.

    Typical values:
        ``dim=1024``, ``heads=8``, ``depth=3`` in the paper's comparisons and up to 20 otherwise.

    Raises:
        ConfigError: sizes that are not positive integers, heads that don't divide, ``dropout`` outside [0, 1).
        ShapeError: an input of another rank or width.

    Source:
        Kitaev et al. 2020, sections 2 and 3, arXiv:2001.04451
    """

    def __init__(
        self,
        dim: int,
        depth: int,
        heads: int,
        *,
        chunk: int = 64,
        rounds: int = 4,
        causal: bool = False,
        dropout: float = 0.0,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_size("Reformer", "depth", depth)
        check_probability("Reformer", "dropout", dropout)
        blocks = []
        for _ in range(depth):
            attention = LSHAttention(dim, heads, chunk=chunk, rounds=rounds, causal=causal, device=device, dtype=dtype)
            f = _Normed(LayerNorm(dim, device=device, dtype=dtype), attention)
            mlp = MLP(dim, 4 * dim, dropout=dropout, device=device, dtype=dtype)
            blocks.append(ReversibleBlock(f, _Normed(LayerNorm(dim, device=device, dtype=dtype), mlp)))
        self.dim = dim
        self.stack = ReversibleStack(blocks)
        self.norm = LayerNorm(dim, device=device, dtype=dtype)

    def reset_parameters(self) -> None:
        """Draw all weights anew."""
        for part in self.modules():
            if isinstance(part, LSHAttention | MLP | LayerNorm):
                part.reset_parameters()

    def forward(self, x: Float[Tensor, "b t d"], mask: Mask | None = None) -> Float[Tensor, "b t d"]:
        """Run the stack; ``mask`` is a rule for every attention."""
        check_rank("Reformer", x, (3,), "(b, t, dim)")
        check_features("Reformer", x, self.dim)
        y1, y2 = self.stack(x, x, mask)
        out: Tensor = self.norm((y1 + y2) / 2)
        return out


class _Normed(nn.Module):
    """A norm before a branch."""

    def __init__(self, norm: nn.Module, layer: nn.Module) -> None:
        super().__init__()
        self.norm, self.layer = norm, layer

    def forward(self, x: Tensor, *args: Any) -> Tensor:
        out: Tensor = self.layer(self.norm(x), *args)
        return out
