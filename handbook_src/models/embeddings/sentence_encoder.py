"""A sentence encoder: BERT's blocks, the mean of its tokens, length one."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from handbook_src.check import check_positive, check_probability, check_size
from handbook_src.errors import ConfigError, DataError, ShapeError
from handbook_src.functional.embeddings.sentence import mean_pool, sentence_embedding
from handbook_src.layers.attention.attention import MultiHeadAttention
from handbook_src.layers.embeddings.token_embedding import TokenPositionSegmentEmbedding
from handbook_src.layers.normalisation.norm import LayerNorm
from handbook_src.mode import modes_kept
from handbook_src.models.embeddings.sentence_encoder_folder import read_encoder, read_tokenizer
from handbook_src.models.transformers.folder import check_depth, fill


@dataclass(frozen=True)
class SentenceEncoderConfig:
    """What decides a sentence encoder's structure; the defaults are all-MiniLM-L6-v2."""

    vocab_size: int = 30522
    context: int = 512
    dim: int = 384
    heads: int = 12
    depth: int = 6
    hidden_dim: int = 1536
    segments: int = 2
    eps: float = 1e-12
    dropout: float = 0.1
    max_length: int = 256
    attention_dropout: float = 0.1

    def __post_init__(self) -> None:
        for name in ("vocab_size", "context", "dim", "heads", "depth", "hidden_dim", "segments"):
            check_size("SentenceEncoderConfig", name, getattr(self, name))
        check_size("SentenceEncoderConfig", "max_length", self.max_length, least=2)
        check_positive("SentenceEncoderConfig", "eps", self.eps)
        check_probability("SentenceEncoderConfig", "dropout", self.dropout)
        check_probability("SentenceEncoderConfig", "attention_dropout", self.attention_dropout)
        if self.dim % self.heads:
            want = f"a multiple of heads={self.heads}"
            raise ConfigError("SentenceEncoderConfig dim", got=self.dim, want=want, remedy="32 or 64 a head is usual.")
        if self.max_length > self.context:
            want = f"at most context={self.context}"
            raise ConfigError(
                "SentenceEncoderConfig max_length",
                got=self.max_length,
                want=want,
                remedy="No position beyond is known.",
            )


@final
class Block(nn.Module):
    """``x = norm(x + attention(x))``, then ``x = norm(x + mlp(x))``: post-norm, as BERT has it."""

    def __init__(self, config: SentenceEncoderConfig) -> None:
        super().__init__()
        self.attention = MultiHeadAttention(config.dim, config.heads, dropout=config.attention_dropout)
        self.norm_1 = LayerNorm(config.dim, eps=config.eps)
        self.up = nn.Linear(config.dim, config.hidden_dim)
        self.down = nn.Linear(config.hidden_dim, config.dim)
        self.norm_2 = LayerNorm(config.dim, eps=config.eps)
        self.drop = nn.Dropout(config.dropout)

    def forward(self, x: Float[Tensor, "b t d"], mask: Tensor | None = None) -> Float[Tensor, "b t d"]:
        x = self.norm_1(x + self.drop(self.attention(x, mask=mask)))
        return self.norm_2(x + self.drop(self.down(F.gelu(self.up(x)))))


@final
class SentenceEncoder(nn.Module):
    r"""Texts to vectors whose dot products say how alike the meanings are.

    .. math::
        x^0 &= \operatorname{LN}(E_w + P + S) \\
        u^l &= \operatorname{LN}(x^{l-1} + \operatorname{Attention}(x^{l-1})) \\
        x^l &= \operatorname{LN}(u^l + W_2 \operatorname{gelu}(W_1 u^l)) \\
        y &= \bar x / \lVert \bar x \rVert, \qquad \bar x = \tfrac{1}{\sum_t m_t} \sum_t m_t\, x^L_t

    The last line is :func:`handbook_src.functional.sentence_embedding`.

    Args:
        config: sizes and dropout.
        tokenizer: a ``tokenizers.Tokenizer``; only :meth:`encode` needs it.
        normalize: scale the vectors to length one.

    Shape:
        ``input_ids`` and ``attention_mask`` ``b t`` integers to ``b dim``.

    Typical values:
        384 features, 6 blocks, 12 heads, 256 tokens (all-MiniLM-L6-v2); 768, 12, 12 (BERT-base).

    Raises:
        ConfigError: sizes that cannot work.
        ShapeError: more tokens than positions, a mask of another shape.

    Source:
        Reimers & Gurevych 2019, section 3, arXiv:1908.10084; the blocks are Devlin et al. 2018, arXiv:1810.04805
    """

    def __init__(self, config: SentenceEncoderConfig, tokenizer: Any = None, *, normalize: bool = True) -> None:
        super().__init__()
        self.config, self.tokenizer, self.normalize = config, tokenizer, normalize
        self.embeddings = TokenPositionSegmentEmbedding(
            config.vocab_size, config.dim, context=config.context, segments=config.segments, eps=config.eps,
            dropout=config.dropout,
        )  # fmt: skip
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.depth))

    def hidden(
        self,
        input_ids: Int[Tensor, "b t"],
        attention_mask: Int[Tensor, "b t"] | Bool[Tensor, "b t"] | None = None,
        token_type_ids: Int[Tensor, "b t"] | None = None,
    ) -> Float[Tensor, "b t d"]:
        """Return the last block's vector of every token.

        Raises:
            ShapeError: a mask of another shape than the tokens.
        """
        if attention_mask is not None and attention_mask.shape != input_ids.shape:
            raise ShapeError(
                "SentenceEncoder attention_mask",
                got=tuple(attention_mask.shape),
                want=f"{tuple(input_ids.shape)}, as the tokens",
                remedy="1 for each token, 0 for padding.",
            )
        allowed = None if attention_mask is None else attention_mask[:, None, None, :].bool()
        x = self.embeddings(input_ids, token_type_ids)
        for block in self.blocks:
            x = block(x, allowed)
        return x

    def forward(
        self,
        input_ids: Int[Tensor, "b t"],
        attention_mask: Int[Tensor, "b t"] | Bool[Tensor, "b t"] | None = None,
        token_type_ids: Int[Tensor, "b t"] | None = None,
    ) -> Float[Tensor, "b d"]:
        x = self.hidden(input_ids, attention_mask, token_type_ids)
        return (sentence_embedding if self.normalize else mean_pool)(x, attention_mask)

    @torch.no_grad()
    def encode(self, sentences: str | Sequence[str], batch_size: int = 32) -> Tensor:
        """Return one vector for each sentence, in their order; one string gives one vector.

        Sentences of like length share a batch, so that little is padded. Tokens beyond the
        configuration's ``max_length`` are cut off. Dropout is off, whatever the mode.

        Args:
            sentences: texts; an empty one has the vector of its two marks, zero where the tokeniser adds none.
            batch_size: texts that go through the network together.

        Raises:
            ConfigError: no tokeniser, or a ``batch_size`` that is not positive.
            DataError: something that is no string.
        """
        check_size("SentenceEncoder.encode", "batch_size", batch_size)
        texts = [sentences] if isinstance(sentences, str) else list(sentences)
        rows = self._tokens(texts)
        device = self.embeddings.word_embeddings.weight.device
        order = sorted(range(len(rows)), key=lambda i: -len(rows[i]))
        out = torch.empty(len(rows), self.config.dim, dtype=self.embeddings.word_embeddings.weight.dtype, device=device)
        with modes_kept(self):
            self.eval()
            for start in range(0, len(rows), batch_size):
                chosen = order[start : start + batch_size]
                ids, mask = _pad([rows[i] for i in chosen])
                out[chosen] = self(ids.to(device), None if bool(mask.all()) else mask.to(device))
        return out[0] if isinstance(sentences, str) else out

    def _tokens(self, texts: Sequence[str]) -> list[list[int]]:
        if self.tokenizer is None:
            raise ConfigError(
                "SentenceEncoder tokenizer",
                got=None,
                want="a tokenizers.Tokenizer",
                remedy="Load with from_pretrained.",
            )
        for text in texts:
            if not isinstance(text, str):
                raise DataError(
                    "SentenceEncoder.encode",
                    got=f"{type(text).__name__} {text!r:.40}",
                    want="strings",
                    remedy="str(x).",
                )
        tokenizer = copy.deepcopy(self.tokenizer)  # the caller's keeps its own settings
        tokenizer.no_padding()
        tokenizer.enable_truncation(self.config.max_length)
        return [encoded.ids for encoded in tokenizer.encode_batch(list(texts))]

    @classmethod
    def from_pretrained(cls, folder: str | Path, *, device: str | torch.device = "cpu") -> SentenceEncoder:
        """Load a folder of sentence-transformers (a BERT, mean pooling); it comes in evaluation mode.

        Raises:
            DataError: a file is missing or torn, names or shapes don't match, or the folder asks
                for something that is not computed here.
        """
        settings, weights, normalize = read_encoder(Path(folder))
        try:
            config = SentenceEncoderConfig(**settings)
        except ConfigError as e:
            remedy = "Copy the file again."
            raise DataError(f"{folder}/config.json", got=str(e), want="the sizes of a BERT", remedy=remedy) from e
        check_depth(weights, config.depth, str(folder))
        with torch.device("meta"):
            model = cls(config, normalize=normalize)
        model = fill(model, weights, str(folder), device)
        model.tokenizer = read_tokenizer(Path(folder))
        return model.eval()


def _pad(rows: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """Stack rows of unequal lengths; the mask is false where zeros fill up."""
    width = max(1, *map(len, rows))  # a text without tokens is one of padding alone: its mean is zero
    ids = torch.tensor([[*row, *[0] * (width - len(row))] for row in rows], dtype=torch.long)
    lengths = torch.tensor([len(row) for row in rows])
    return ids, torch.arange(width) < lengths[:, None]
