"""An encoder whose layers each have their own mask rule: oscillating attention, and its baselines."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, final

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from handbook_src.errors import ConfigError, ShapeError
from handbook_src.functional.attention.mask import Mask, anticausal, causal, full
from handbook_src.layers.attention.attention import SelfAttention
from handbook_src.layers.normalisation.norm import LayerNorm

Direction = Literal["bidirectional", "forward", "backward"]
RULES: dict[Direction, Mask] = {"bidirectional": full, "forward": causal, "backward": anticausal}


def oscillating(depth: int, cycle: Sequence[Direction] = ("bidirectional", "forward", "backward")) -> list[Mask]:
    r"""Give each layer of a stack its direction, going round a cycle.

    .. math::
        M_\ell(t, s) = \begin{cases} 1 & \ell \bmod 3 = 0 \quad \text{(bidirectional)} \\
            [s \le t] & \ell \bmod 3 = 1 \quad \text{(forward)} \\
            [s \ge t] & \ell \bmod 3 = 2 \quad \text{(backward)} \end{cases}

    **Not for generation.** A stack with one bidirectional or backward layer sees the
    future: trained to predict the next token it learns to copy it, and when it
    generates there is nothing to copy.

    Args:
        depth: number of layers.
        cycle: the directions, repeated as often as needed.

    Shape:
        a list of ``depth`` rules.

    Typical values:
        the overview's cycle of three; a multiple of three layers.

    Raises:
        ConfigError: ``depth`` below 1, an empty cycle, an unknown direction.

    Source:
        an overview that the handbook began with, without a paper; the parts are the masks of
        Vaswani et al. 2017, section 3.2.3, arXiv:1706.03762
    """
    if depth < 1:
        raise ConfigError("depth", got=depth, want="at least 1 layer", remedy="Give a positive depth.")
    unknown = [d for d in cycle if d not in RULES]
    if unknown or not cycle:
        raise ConfigError("directions", got=unknown or "none", want=f"some of {list(RULES)}", remedy="Name them.")
    return [RULES[cycle[i % len(cycle)]] for i in range(depth)]


@final
class MaskedEncoder(nn.Module):
    """A pre-norm Transformer encoder, one mask rule a layer: its rules are all that tell variants apart.

    See :func:`oscillating` and :class:`handbook_src.layers.SelfAttention`.

    Args:
        vocab_size: number of tokens, in and out.
        context: longest sequence; positions are learned.
        dim: features of the residual stream.
        heads: heads of each layer.
        rules: one rule a layer, for instance ``oscillating(6)`` or ``[full] * 6``.

    Shape:
        tokens ``b t``; logits ``b t vocab_size``.

    Raises:
        ConfigError: no rules, or sizes that don't fit.
        ShapeError: (forward) a sequence longer than ``context``.

    Source:
        Vaswani et al. 2017, section 3.1, arXiv:1706.03762; pre-norm: Xiong et al. 2020, arXiv:2002.04745
    """

    def __init__(self, vocab_size: int, context: int, dim: int, heads: int, rules: Sequence[Mask]) -> None:
        super().__init__()
        if not rules:
            raise ConfigError("mask rules", got="none", want="one rule a layer", remedy="For instance [full] * 4.")
        self.context = context
        self.tokens, self.positions = nn.Embedding(vocab_size, dim), nn.Embedding(context, dim)
        for table in (self.tokens, self.positions):
            nn.init.normal_(table.weight, std=0.02)
        self.blocks = nn.ModuleList(_Block(dim, heads, rule) for rule in rules)
        self.norm, self.head = LayerNorm(dim), nn.Linear(dim, vocab_size)

    def forward(self, tokens: Int[Tensor, "b t"]) -> Float[Tensor, "b t v"]:
        """Return logits at every position."""
        t = tokens.shape[1]
        if t > self.context:
            raise ShapeError("sequence", got=f"{t} tokens", want=f"at most {self.context}", remedy="Cut it.")
        x = self.tokens(tokens) + self.positions(torch.arange(t, device=tokens.device))
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


@final
class _Block(nn.Module):
    def __init__(self, dim: int, heads: int, rule: Mask) -> None:
        super().__init__()
        self.attention_norm, self.attention = LayerNorm(dim), SelfAttention(dim, heads, rule=rule)
        self.mlp_norm = LayerNorm(dim)
        self.mlp = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))

    def forward(self, x: Float[Tensor, "b t d"]) -> Float[Tensor, "b t d"]:
        x = x + self.attention(self.attention_norm(x))
        return x + self.mlp(self.mlp_norm(x))
