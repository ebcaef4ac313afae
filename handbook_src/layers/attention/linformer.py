"""Linformer's attention as a layer: learned mixtures of the keys and values."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal, final

import torch
from einops import rearrange
from jaxtyping import Bool, Float
from torch import Tensor, nn

from handbook_src.check import check_size
from handbook_src.errors import ConfigError
from handbook_src.functional.attention.attention import scaled_dot_product_attention
from handbook_src.functional.attention.linformer import linformer_attention, linformer_weights, mix
from handbook_src.functional.attention.mask import Mask
from handbook_src.layers.attention.attention import MultiHeadAttention, select, with_broken

Sharing = Literal["none", "headwise", "key-value"]
SHARING = ("none", "headwise", "key-value")


@final
class LinformerAttention(MultiHeadAttention):
    r"""Multi-head attention to ``rank`` learned mixtures of keys and values.

    .. math::
        \operatorname{head}_i = \operatorname{softmax}\!\Big(\frac{X W_i^Q (E_i X W_i^K)^\top}{\sqrt e}\Big)
        \cdot F_i X W_i^V

    Each head is :func:`handbook_src.functional.linformer_attention`.  With ``rank`` equal to
    ``length`` and identities for E and F it is full attention.  It has no causal form.

    Args:
        dim: features of ``x`` and of the output.
        heads: number of heads.
        length: longest sequence; a shorter one uses the first columns of E and F.
        rank: number of mixtures, k in the paper.
        share: ``none`` gives each head its E and F, ``headwise`` one E and one F to all heads,
            ``key-value`` one E that serves as F too.  To share between layers, assign one layer's
            ``key_projection`` (and ``value_projection``) to the other.
        kv_dim: features of ``memory``; ``dim`` unless given.
        head_dim: features of a head; ``dim // heads`` unless given.
        dropout: share of the weights dropped in training.
        bias: whether the four projections of features have one.

    Shape:
        ``x`` is ``b t d``, ``memory`` is ``b s kv_dim``, the output is ``b t d``.

    Typical values:
        rank 128 to 256 for 512 to 4096 positions; ``key-value`` or layerwise sharing (paper, figure 3).

    Raises:
        ConfigError: sizes that are not positive, heads that don't divide ``dim``, an unknown
            sharing, dropout outside [0, 1); (forward) ``causal``.

    Source:
        Wang et al. 2020, eq. 7 and section 4, arXiv:2006.04768
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        length: int,
        rank: int,
        *,
        share: Sharing = "headwise",
        kv_dim: int | None = None,
        head_dim: int | None = None,
        dropout: float = 0.0,
        bias: bool = True,
    ) -> None:
        for name, size in (("heads", heads), ("length", length), ("rank", rank)):
            check_size("Linformer attention", name, size)
        if share not in SHARING:
            remedy = "For layerwise sharing assign one layer's parameters to the other."
            raise ConfigError("Linformer sharing", got=repr(share), want=f"one of {list(SHARING)}", remedy=remedy)
        super().__init__(dim, heads, kv_dim=kv_dim, head_dim=head_dim, dropout=dropout, bias=bias)
        self.length, self.rank, self.share = length, rank, share
        shape = (heads, rank, length) if share == "none" else (rank, length)
        self.key_projection = nn.Parameter(torch.empty(shape))
        self.value_projection = None if share == "key-value" else nn.Parameter(torch.empty(shape))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the weights as multi-head attention does, and E and F as a linear layer over positions would."""
        super().reset_parameters()
        for projection in (getattr(self, "key_projection", None), getattr(self, "value_projection", None)):
            if projection is not None:
                nn.init.uniform_(projection, -(self.length**-0.5), self.length**-0.5)

    def forward(  # type: ignore[override]
        self,
        x: Float[Tensor, "b t d"],
        memory: Float[Tensor, "b s kv_dim"] | None = None,
        mask: Mask | Bool[Tensor, ...] | None = None,
        causal: bool = False,
    ) -> Float[Tensor, "b t d"]:
        """Attend from ``x`` to mixtures of ``memory`` (or of ``x`` itself); ``causal`` is refused."""
        _refuse_causal(causal)
        x, memory, _, broken = self._shielded(x, memory, mask, None, by_key=True)
        dropout = self.dropout if self.training else 0.0
        if mask is None and self.share != "none":
            out = scaled_dot_product_attention(*self._mixed(x, memory), dropout=dropout)
        else:
            q, k, v = self._project(x, memory, None)
            out = linformer_attention(q, k, v, self.key_projection, self.value_projection, mask, dropout=dropout)
        return with_broken(self.out_proj(rearrange(out, "b t h e -> b t (h e)")), broken)

    def _mixed(self, x: Tensor, memory: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Mix tokens before they become keys and values, E (X W) = (E X) W: fewer rows meet the weights."""
        source = self._checked(x, memory, None)
        made = [self.q_proj(x)]
        for proj, projection in ((self.k_proj, self.key_projection), (self.v_proj, self.value_projection)):
            projection = self.key_projection if projection is None else projection
            y = proj(mix(source[:, :, None], projection)[:, :, 0])
            if proj.bias is not None:  # a mixture holds the bias as often as it holds a token
                y = y + ((projection[:, : source.shape[1]].sum(1, keepdim=True) - 1) * proj.bias).to(y.dtype)
            made.append(y)
        q, k, v = (rearrange(y, "b t (h e) -> b t h e", e=self.head_dim) for y in made)
        return q, k, v

    def weights(
        self,
        x: Float[Tensor, "b t d"],
        memory: Float[Tensor, "b s kv_dim"] | None = None,
        mask: Mask | Bool[Tensor, ...] | None = None,
        causal: bool = False,
    ) -> Float[Tensor, "b h t n"]:
        """Return each head's weights over the mixtures, without dropout."""
        _refuse_causal(causal)
        q, k, _ = self._project(x, memory, None)
        return linformer_weights(q, k, self.key_projection, mask)

    def prune_heads(self, heads: Iterable[int]) -> None:
        """Remove heads, with their E and F, as ``MultiHeadAttention.prune_heads`` does."""
        before = self.kept_heads
        super().prune_heads(heads)
        if self.share == "none" and self.value_projection is not None:
            left = torch.tensor([before.index(i) for i in self.kept_heads])
            self.key_projection = select(self.key_projection, left, 0)
            self.value_projection = select(self.value_projection, left, 0)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, length={self.length}, rank={self.rank}, share={self.share}"


def _refuse_causal(causal: bool) -> None:
    if causal:
        raise ConfigError(
            "Linformer attention causal",
            got=causal,
            want="False",
            remedy="Mixtures of keys hold the future: for a causal model take LinearAttention or a window.",
        )
