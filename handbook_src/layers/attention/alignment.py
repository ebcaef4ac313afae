"""The attentions of recurrent translation models as layers: Bahdanau's and Luong's."""

from __future__ import annotations

from typing import final

import torch
from jaxtyping import Float
from torch import Tensor, nn

from handbook_src.errors import ConfigError
from handbook_src.functional.attention.alignment import LuongScore, additive_attention, multiplicative_attention
from handbook_src.functional.attention.attention import MaskLike


@final
class BahdanauAttention(nn.Module):
    r"""Additive attention: a small network scores how well a state matches an annotation.

    See :func:`handbook_src.functional.additive_attention`.

    Args:
        query_dim: features of the decoder's state.
        key_dim: features of the annotations.
        hidden_dim: width of the scoring network.

    Shape:
        ``query`` is ``b t query_dim``, ``memory`` is ``b s key_dim``; returns the context
        ``b t key_dim`` and the weights ``b t s``.

    Typical values:
        query_dim 1000, key_dim 2000 (both directions), hidden_dim 1000 in the paper.

    Raises:
        ConfigError: a size that is not positive.

    Source:
        Bahdanau et al. 2015, eqs. 5 and 6 and appendix A.1.2, arXiv:1409.0473
    """

    def __init__(self, query_dim: int, key_dim: int, hidden_dim: int) -> None:
        super().__init__()
        _positive(query_dim=query_dim, key_dim=key_dim, hidden_dim=hidden_dim)
        self.query_proj = nn.Linear(query_dim, hidden_dim, bias=False)
        self.key_proj = nn.Linear(key_dim, hidden_dim, bias=False)
        self.vector = nn.Parameter(torch.empty(hidden_dim))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the weights as ``nn.Linear`` does (the paper's tiny ones start as a plain mean)."""
        self.query_proj.reset_parameters()
        self.key_proj.reset_parameters()
        nn.init.normal_(self.vector, std=len(self.vector) ** -0.5)

    def keys(self, memory: Float[Tensor, "b s key_dim"]) -> Float[Tensor, "b s hidden_dim"]:
        """Return :math:`U_a h_j`, which a decoder needs once for all its steps."""
        return self.key_proj(memory)

    def forward(
        self,
        query: Float[Tensor, "b t query_dim"],
        memory: Float[Tensor, "b s key_dim"],
        mask: MaskLike | None = None,
        keys: Float[Tensor, "b s hidden_dim"] | None = None,
    ) -> tuple[Float[Tensor, "b t key_dim"], Float[Tensor, "b t s"]]:
        """Return the contexts and the weights; ``keys`` spares projecting the memory again."""
        keys = self.keys(memory) if keys is None else keys
        return additive_attention(self.query_proj(query), keys, memory, self.vector, mask)


@final
class LuongAttention(nn.Module):
    """Multiplicative attention: a (bilinear) product scores how well a state matches a source state.

    See :func:`handbook_src.functional.multiplicative_attention`.

    Args:
        query_dim: features of the decoder's state.
        key_dim: features of the source states; ``query_dim`` unless given.
        score: ``dot`` (no parameters), ``general`` or ``concat``.
        hidden_dim: width inside ``concat``; ``query_dim`` unless given.

    Shape:
        ``query`` is ``b t query_dim``, ``memory`` is ``b s key_dim``; returns the context
        ``b t key_dim`` and the weights ``b t s``.

    Typical values:
        query_dim = key_dim = 1000 in the paper, where ``dot`` did best over the whole source.

    Raises:
        ConfigError: a size that is not positive, an unknown score, ``dot`` between
            unequal widths.

    Source:
        Luong et al. 2015, section 3.1, arXiv:1508.04025
    """

    def __init__(
        self,
        query_dim: int,
        key_dim: int | None = None,
        *,
        score: LuongScore = "general",
        hidden_dim: int | None = None,
    ) -> None:
        super().__init__()
        key_dim = query_dim if key_dim is None else key_dim
        hidden_dim = query_dim if hidden_dim is None else hidden_dim
        _positive(query_dim=query_dim, key_dim=key_dim, hidden_dim=hidden_dim)
        if score not in ("dot", "general", "concat"):
            raise ConfigError(
                "Luong score", got=repr(score), want="dot, general or concat", remedy="The paper has these three."
            )
        if score == "dot" and query_dim != key_dim:
            raise ConfigError(
                "Luong's dot score",
                got=f"query_dim {query_dim}, key_dim {key_dim}",
                want="equal widths",
                remedy="Use score='general'.",
            )
        self.score = score
        shape = {"dot": None, "general": (query_dim, key_dim), "concat": (hidden_dim, query_dim + key_dim)}[score]
        self.weight = None if shape is None else nn.Parameter(torch.empty(shape))
        self.vector = nn.Parameter(torch.empty(hidden_dim)) if score == "concat" else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the weights: Glorot, and a vector of about unit length."""
        if self.weight is not None:
            nn.init.xavier_uniform_(self.weight)
        if self.vector is not None:
            nn.init.normal_(self.vector, std=len(self.vector) ** -0.5)

    def forward(
        self,
        query: Float[Tensor, "b t query_dim"],
        memory: Float[Tensor, "b s key_dim"],
        mask: MaskLike | None = None,
    ) -> tuple[Float[Tensor, "b t key_dim"], Float[Tensor, "b t s"]]:
        """Return the contexts and the weights."""
        return multiplicative_attention(query, memory, memory, self.score, self.weight, self.vector, mask)

    def extra_repr(self) -> str:
        return f"score={self.score!r}"


def _positive(**sizes: int) -> None:
    if min(sizes.values()) < 1:
        raise ConfigError("attention sizes", got=sizes, want="all at least 1", remedy="Give positive sizes.")
