"""GPT-2: a decoder-only transformer, with the published sizes as data beside it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import NamedTuple, final

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from handbook_src.check import check_positive, check_probability, check_rank, check_size
from handbook_src.errors import ConfigError, DataError, ShapeError
from handbook_src.functional.attention.mask import Mask
from handbook_src.layers.attention.attention import MultiHeadAttention
from handbook_src.layers.attention.kv_cache import AppendCache, KVCache
from handbook_src.layers.foundations.embedding import Embedding
from handbook_src.layers.normalisation.norm import LayerNorm
from handbook_src.models.transformers.folder import check_depth, fill, read_folder, write_folder
from handbook_src.models.transformers.gpt2_folder import config_to_hf, settings_from_hf, weights_from_hf, weights_to_hf


class Dropout(NamedTuple):
    """The three places where GPT-2 drops out."""

    embedding: float = 0.1
    attention: float = 0.1
    residual: float = 0.1


@dataclass(frozen=True)
class GPT2Config:
    """What decides a GPT-2's structure; the defaults are the published 124M.

    ``hidden_dim`` is four times ``dim`` unless given. One number for ``dropout`` serves
    all three places. ``init_std`` 0.02 suits ``dim`` 768 and up; at ``dim`` 64 training
    starts faster near 0.06 (measured in the chapter).
    """

    vocab_size: int = 50257
    context: int = 1024
    dim: int = 768
    heads: int = 12
    depth: int = 12
    hidden_dim: int = 0
    dropout: Dropout | tuple[float, ...] | float = field(default_factory=Dropout)
    eps: float = 1e-5
    init_std: float = 0.02

    def __post_init__(self) -> None:
        for name in ("vocab_size", "context", "dim", "heads", "depth"):
            check_size("GPT2Config", name, getattr(self, name))
        check_size("GPT2Config", "hidden_dim", self.hidden_dim, least=0)
        check_positive("GPT2Config", "eps", self.eps, "GPT-2 used 1e-5.")
        check_positive("GPT2Config", "init_std", self.init_std, "GPT-2 used 0.02.")
        if self.dim % self.heads:
            raise ConfigError(
                "GPT2Config dim", got=self.dim, want=f"a multiple of heads={self.heads}", remedy="64 a head is usual."
            )
        shares = self.dropout if isinstance(self.dropout, Sequence) else [self.dropout] * 3
        if len(shares) != 3:
            raise ConfigError(
                "GPT2Config dropout", got=shares, want="one number or three", remedy="Embedding, attention, residual."
            )
        for share in shares:
            check_probability("GPT2Config", "dropout", share)
        object.__setattr__(self, "dropout", Dropout(*map(float, shares)))
        if self.hidden_dim == 0:
            object.__setattr__(self, "hidden_dim", 4 * self.dim)


#: Radford et al. 2019, table 2; heads from the released code (64 features a head).
PUBLISHED: Mapping[str, Mapping[str, int]] = {
    "gpt2": {"dim": 768, "heads": 12, "depth": 12},
    "gpt2-medium": {"dim": 1024, "heads": 16, "depth": 24},
    "gpt2-large": {"dim": 1280, "heads": 20, "depth": 36},
    "gpt2-xl": {"dim": 1600, "heads": 25, "depth": 48},
}


def published(name: str) -> GPT2Config:
    """Return the configuration of a published size: ``gpt2``, ``-medium``, ``-large`` or ``-xl``.

    Raises:
        ConfigError: no such size.
    """
    if name not in PUBLISHED:
        raise ConfigError("GPT-2 size", got=repr(name), want=f"one of {list(PUBLISHED)}", remedy="Or build GPT2Config.")
    return GPT2Config(**PUBLISHED[name])


class CausalLMOutput(NamedTuple):
    """What a causal language model returns."""

    logits: Float[Tensor, "b t v"]


@final
class MLP(nn.Module):
    """Widen, bend, narrow: the position-wise half of a block."""

    def __init__(self, dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.up = nn.Linear(dim, hidden_dim)
        self.down = nn.Linear(hidden_dim, dim)

    def forward(self, x: Float[Tensor, "b t d"]) -> Float[Tensor, "b t d"]:
        return self.down(F.gelu(self.up(x), approximate="tanh"))


@final
class Block(nn.Module):
    """``x += attention(norm(x))``, then ``x += mlp(norm(x))``."""

    def __init__(self, config: GPT2Config, dropout: Dropout) -> None:
        super().__init__()
        self.norm_1 = LayerNorm(config.dim, eps=config.eps)
        self.attention = MultiHeadAttention(
            config.dim,
            config.heads,
            dropout=dropout.attention,
        )
        self.norm_2 = LayerNorm(config.dim, eps=config.eps)
        self.mlp = MLP(config.dim, config.hidden_dim)
        self.drop = nn.Dropout(dropout.residual)

    def forward(
        self,
        x: Float[Tensor, "b t d"],
        mask: Mask | Tensor | None = None,
        cache: KVCache | None = None,
    ) -> Float[Tensor, "b t d"]:
        a = self.attention(self.norm_1(x), mask=mask, causal=True, cache=cache)
        x = x + self.drop(a)
        return x + self.drop(self.mlp(self.norm_2(x)))


@final
class GPT2(nn.Module):
    r"""Predict the next token from all before it, with a stack of pre-norm blocks.

    .. math::
        x^0_t &= E_{w_t} + P_t \\
        u^l &= x^{l-1} + \operatorname{Attention}_{\text{causal}}(\operatorname{LN}(x^{l-1})) \\
        x^l &= u^l + W_2 \operatorname{gelu}(W_1 \operatorname{LN}(u^l)) \\
        z_t &= E \operatorname{LN}(x^L_t)

    The output matrix is the token embedding (tied). Weights start at
    :math:`\mathcal N(0, 0.02^2)`, positions at 0.01, the two matrices of a block that write
    to the residual stream at :math:`0.02 / \sqrt{2 L}`, biases at 0. The GELU is the tanh
    approximation.

    Args:
        config: sizes and dropout.

    Shape:
        ``input_ids``: ``b t`` integers; ``.logits``: ``b t v``.

    Typical values:
        64 features a head, ``hidden_dim`` 4 ``dim``, dropout 0.1 (0 for one epoch), AdamW at 6e-4 for 124M.

    Source:
        Radford et al. 2019, section 2.3; embedding and head are Radford et al. 2018, eq. 2; tanh GELU
        Hendrycks & Gimpel 2016, section 2, arXiv:1606.08415; larger sizes and their learning
        rates Brown et al. 2020, table 2.1, arXiv:2005.14165
    """

    def __init__(self, config: GPT2Config) -> None:
        super().__init__()
        self.config = config
        dropout = config.dropout if isinstance(config.dropout, Dropout) else Dropout()
        self.token_embedding = Embedding(config.vocab_size, config.dim)
        self.position_embedding = Embedding(config.context, config.dim)
        self.drop = nn.Dropout(dropout.embedding)
        self.blocks = nn.ModuleList(Block(config, dropout) for _ in range(config.depth))
        self.norm = LayerNorm(config.dim, eps=config.eps)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw as the released code did, and scale as the paper says."""
        shrink = {"position_embedding.weight": 0.5}  # 0.01 there
        for name, p in self.named_parameters():
            if name.endswith(("attention.out_proj.weight", "mlp.down.weight")):
                shrink[name] = 1 / math.sqrt(2 * self.config.depth)
            if p.ndim == 2:
                std = self.config.init_std * shrink.get(name, 1.0)
                nn.init.normal_(p, std=std)
            elif name.endswith("bias"):
                nn.init.zeros_(p)

    def forward(
        self,
        input_ids: Int[Tensor, "b t"],
        *,
        attention_mask: Int[Tensor, "b s"] | Bool[Tensor, "b s"] | None = None,
        position_ids: Int[Tensor, "b t"] | None = None,
        mask: Mask | None = None,
        cache: Sequence[KVCache] | None = None,
    ) -> CausalLMOutput:
        """Return the logits of the next token at every position.

        Args:
            input_ids: the tokens; with a cache, those that it has not seen.
            attention_mask: 1 (or true) for tokens, 0 for padding; with a
                cache, of the past too.
            position_ids: 0, 1, ... after what the cache has seen, unless
                given.
            mask: a further rule, joined to the causal one.
            cache: one a layer, from :meth:`new_cache`.

        Raises:
            ShapeError: beyond the context, tokens outside the vocabulary or no integers, or a mask of
                another length.
            ConfigError: not one cache a layer, or no tensor.
        """
        check_rank("GPT2 input_ids", input_ids, (2,), "(batch, tokens)")
        seen = self._seen(cache)
        if position_ids is None:
            position_ids = self._positions(seen, input_ids)
        allowed = self._allowed(attention_mask, mask, input_ids, seen)
        x = self.token_embedding(input_ids)
        x = self.drop(x + self.position_embedding(position_ids))
        for i, block in enumerate(self.blocks):
            x = block(x, allowed, None if cache is None else cache[i])
        logits = F.linear(self.norm(x), self.token_embedding.weight)
        return CausalLMOutput(logits)

    def new_cache(self, kind: Callable[[], KVCache] = AppendCache) -> list[KVCache]:
        """Return an empty cache for each layer, for instance ``model.new_cache(lambda: StaticCache(256))``."""
        return [kind() for _ in self.blocks]

    def _seen(self, cache: Sequence[KVCache] | None) -> int:
        if cache is None:
            return 0
        if not isinstance(cache, Sequence) or len(cache) != len(self.blocks):
            got = f"{len(cache)} caches" if isinstance(cache, Sequence) else type(cache).__name__
            raise ConfigError("GPT2 cache", got=got, want=f"{len(self.blocks)}, one a layer", remedy="new_cache().")
        return cache[0].seen

    def _positions(self, seen: int, input_ids: Tensor) -> Tensor:
        end = seen + input_ids.shape[1]
        if end > self.config.context:
            raise ShapeError(
                "GPT2 input_ids",
                got=f"{input_ids.shape[1]} tokens after {seen}",
                want=f"at most {self.config.context} in all",
                remedy="Keep the latest tokens only: GPT-2 learned no position beyond its context.",
            )
        return torch.arange(seen, end, device=input_ids.device)[None]

    @staticmethod
    def _allowed(
        attention_mask: Tensor | None, mask: Mask | None, input_ids: Tensor, seen: int
    ) -> Mask | Tensor | None:
        if attention_mask is None:
            return mask
        b, t = input_ids.shape
        if attention_mask.shape != (b, seen + t):
            raise ShapeError(
                "GPT2 attention_mask",
                got=tuple(attention_mask.shape),
                want=f"{(b, seen + t)}, the past included",
                remedy="Append a column of ones for each new token.",
            )
        allowed = attention_mask[:, None, None, :].bool()
        return allowed if mask is None else allowed & mask.dense(t, seen + t, device=input_ids.device)

    @classmethod
    def from_pretrained(
        cls, folder: str | Path, *, device: str | torch.device = "cpu", dtype: torch.dtype | None = None
    ) -> GPT2:
        """Load a folder in Hugging Face's format; the model comes in evaluation mode.

        Args:
            folder: holds ``config.json`` and ``model.safetensors``, or shards with their index.
            device: where the weights go.
            dtype: of the weights; as stored unless given.

        Raises:
            DataError: a file is missing or torn, keys or shapes don't match, or the
                configuration asks for something that GPT-2 did not have.
            ConfigError: ``dtype`` is no floating-point dtype.
        """
        raw, weights = read_folder(folder)
        settings = settings_from_hf(raw, str(folder))
        try:
            config = GPT2Config(**settings)
        except (ConfigError, TypeError) as e:
            raise DataError(
                f"{folder}/config.json", got=str(e), want="the sizes of a GPT-2", remedy="Copy the file again."
            ) from e
        ours = weights_from_hf(weights, str(folder))
        check_depth(ours, config.depth, str(folder))
        with torch.device("meta"):
            model = cls(config)
        return fill(model, ours, str(folder), device, dtype).eval()

    def save_pretrained(self, folder: str | Path) -> None:
        """Write a folder that transformers' ``GPT2LMHeadModel.from_pretrained`` reads."""
        write_folder(folder, config_to_hf(asdict(self.config)), weights_to_hf(self.state_dict()))
