"""Longformer's attention as a layer."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import final

import torch
from einops import rearrange
from jaxtyping import Bool, Float
from torch import Tensor, nn

from handbook_src.check import check_size
from handbook_src.errors import ConfigError, ShapeError
from handbook_src.functional.attention.global_local import global_local_attention, position_numbers
from handbook_src.functional.attention.mask import Mask
from handbook_src.layers.attention.attention import MultiHeadAttention, with_broken


@final
class LongformerAttention(MultiHeadAttention):
    r"""Self-attention within a window, with a few global positions that have projections of their own.

    .. math::
        y_t = \begin{cases}
            \operatorname{Attention}\big(x_t W^Q,\; X_{N(t) \cup G} W^K,\; X_{N(t) \cup G} W^V\big) & t \notin G \\
            \operatorname{Attention}\big(x_t W^{Q_g},\; X W^{K_g},\; X W^{V_g}\big) & t \in G
        \end{cases}

    The maths is :func:`handbook_src.functional.global_local_attention`.  Under ``torch.compile`` the
    blocks are planned outside of the graph, which breaks there.

    Args:
        dim: features of ``x`` and of the output.
        heads: number of heads.
        window: the distance ``n`` from which on a key is hidden; Longformer's ``attention_window`` is ``2 (n - 1)``.
        separate: whether global positions have projections of their own, which start as copies of the others.
        causal: whether later keys are hidden, from global positions as well.
        dropout: share of the weights dropped in training.
        bias: whether the projections have one.
        device: of the parameters.
        dtype: of the parameters.

    Shape:
        ``x`` and the output are ``b t d``; global positions are numbers, or marks ``b t``.

    Typical values:
        ``window`` 257 (512 both sides), position 0 global to classify, all positions of the
        question to answer it (Longformer-base).

    Raises:
        ConfigError: ``window`` is not an integer of at least 1; sizes as for
            :class:`handbook_src.layers.MultiHeadAttention`.

    Source:
        Beltagy et al. 2020, section 3.1, arXiv:2004.05150
    """

    def __init__(
        self,
        dim: int,
        heads: int = 1,
        *,
        window: int,
        separate: bool = True,
        causal: bool = False,
        dropout: float = 0.0,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        check_size("LongformerAttention", "window", window)
        super().__init__(dim, heads, dropout=dropout, bias=bias, device=device, dtype=dtype)
        self.window, self.separate, self.causal = int(window), bool(separate), bool(causal)
        if separate:
            self.q_global, self.k_global, self.v_global = (
                nn.Linear(dim, heads * self.head_dim, bias=bias, device=device, dtype=dtype) for _ in range(3)
            )
            self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the weights (Glorot, uniform), zero the biases, copy both to the global projections."""
        super().reset_parameters()
        if "q_global" in self._modules:
            self.q_global.load_state_dict(self.q_proj.state_dict())
            self.k_global.load_state_dict(self.k_proj.state_dict())
            self.v_global.load_state_dict(self.v_proj.state_dict())

    def forward(  # type: ignore[override]
        self,
        x: Float[Tensor, "b t d"],
        positions: Sequence[int] | Bool[Tensor, "b t"] = (0,),
        mask: Mask | None = None,
    ) -> Float[Tensor, "b t d"]:
        """Attend within the window, to the global ``positions`` and from them; ``mask`` is a further rule (padding)."""
        x, _, _, broken = self._shielded(x, None, mask, None, by_key=True)
        q, k, v = self._project(x, None, None)
        out = global_local_attention(
            q,
            k,
            v,
            self.window,
            positions,
            global_qkv=self._project_global(x, positions) if self.separate else None,
            causal=self.causal,
            mask=mask,
            dropout=self.dropout if self.training else 0.0,
        )
        return with_broken(self.out_proj(rearrange(out, "b t h e -> b t (h e)")), broken)

    def _project_global(self, x: Tensor, positions: Sequence[int] | Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries of the global positions, keys and values of all."""
        rows = x
        if not isinstance(positions, Tensor):
            chosen = list(position_numbers(positions))
            if max(chosen, default=-1) >= x.shape[1]:
                raise ShapeError(
                    "global position", got=max(chosen), want=f"below {x.shape[1]}", remedy="Name positions that exist."
                )
            rows = x[:, chosen]
        q, k, v = (
            rearrange(proj(y), "b t (h e) -> b t h e", e=self.head_dim)
            for proj, y in ((self.q_global, rows), (self.k_global, x), (self.v_global, x))
        )
        return q, k, v

    def weights(self, *args: object, **kwargs: object) -> Tensor:
        """Refuse: two softmaxes over different keys are no one matrix."""
        raise ConfigError(
            "LongformerAttention weights",
            got="a call",
            want="attention_weights for each part",
            remedy="Call handbook_src.functional.attention.attention.attention_weights with the parts' projections.",
        )

    def prune_heads(self, heads: Iterable[int]) -> None:
        """Remove heads as ``MultiHeadAttention.prune_heads`` does; refused with separate projections."""
        if self.separate:
            raise ConfigError(
                "heads to prune",
                got=repr(heads),
                want="a layer with separate=False",
                remedy="The global projections would keep theirs.",
            )
        super().prune_heads(heads)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, window={self.window}, separate={self.separate}, causal={self.causal}"
