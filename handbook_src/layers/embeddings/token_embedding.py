"""The embeddings at the bottom of BERT and of the original Transformer."""

from __future__ import annotations

import math
from typing import Any, final

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from handbook_src.check import check_features, check_floating, check_positive, check_probability, check_size
from handbook_src.dispatch import Backend
from handbook_src.functional.convolution.conv_input import check_alike
from handbook_src.functional.embeddings import token_embedding as maths
from handbook_src.functional.foundations.embedding import check_settings
from handbook_src.functional.normalisation.norm_input import check_eps
from handbook_src.layers.normalisation.norm import LayerNorm


@final
class TokenPositionSegmentEmbedding(nn.Module):
    r"""BERT's embedding: see :func:`handbook_src.functional.token_position_segment_embedding`.

    Dropout follows the layer norm. The state dict has the keys of transformers' ``BertEmbeddings``, and so has
    ``forward`` its arguments. Tables start at a normal of deviation 0.02, cut at two deviations as in the released
    code; the padding row at zero.

    Args:
        vocab_size: rows of the token table.
        dim: features.
        context: rows of the position table.
        segments: rows of the segment table.
        padding_idx: the token whose row stays zero; None for no such token.
        eps: of the layer norm.
        dropout: share of entries dropped in training.
        device: of the parameters.
        dtype: of the parameters.

    Shape:
        ``input_ids`` ``b t`` integers to ``b t dim``.

    Typical values:
        30522 tokens, 768 features, 512 positions, 2 segments, ``eps`` 1e-12, dropout 0.1 (BERT-base).

    Raises:
        ConfigError: a size that is not positive, ``padding_idx`` outside the table, dropout outside [0, 1).
        ShapeError: more tokens than positions, an id outside its table, ids of another shape or dtype.

    Source:
        Devlin et al. 2018, section 3 and figure 2, arXiv:1810.04805
    """

    def __init__(
        self,
        vocab_size: int,
        dim: int,
        *,
        context: int = 512,
        segments: int = 2,
        padding_idx: int | None = 0,
        eps: float = 1e-12,
        dropout: float = 0.1,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        name = "TokenPositionSegmentEmbedding"
        for size, value in {"vocab_size": vocab_size, "dim": dim, "context": context, "segments": segments}.items():
            check_size(name, size, value)
        check_eps(name, eps)
        check_probability(name, "dropout", dropout)
        padding_idx = check_settings(name, vocab_size, padding_idx, None, 2.0, False, False)
        made = {"device": device, "dtype": dtype}
        self.word_embeddings = nn.Embedding(vocab_size, dim, padding_idx, **made)
        self.position_embeddings = nn.Embedding(context, dim, **made)
        self.token_type_embeddings = nn.Embedding(segments, dim, **made)
        self.LayerNorm = LayerNorm(dim, eps=eps, **made)
        self.dropout = nn.Dropout(dropout)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the tables, zero the padding row, set the gain to one and the bias to zero."""
        for table in (self.word_embeddings, self.position_embeddings, self.token_type_embeddings):
            nn.init.trunc_normal_(table.weight, std=0.02, a=-0.04, b=0.04)
        if self.word_embeddings.padding_idx is not None:
            with torch.no_grad():
                self.word_embeddings.weight[self.word_embeddings.padding_idx].zero_()
        self.LayerNorm.reset_parameters()

    def forward(
        self,
        input_ids: Int[Tensor, "b t"] | None = None,
        token_type_ids: Int[Tensor, "*#b t"] | None = None,
        position_ids: Int[Tensor, "*#b t"] | None = None,
        inputs_embeds: Float[Tensor, "b t d"] | None = None,
        past_key_values_length: int = 0,
    ) -> Float[Tensor, "b t d"]:
        tables = (self.word_embeddings.weight, self.position_embeddings.weight, self.token_type_embeddings.weight)
        y = maths.token_position_segment_embedding(
            input_ids,
            tables,
            self.LayerNorm.weight,
            self.LayerNorm.bias,
            token_type_ids=token_type_ids,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            past_key_values_length=past_key_values_length,
            padding_idx=self.word_embeddings.padding_idx,
            eps=self.LayerNorm.eps,
        )
        return self.dropout(y)


@final
class ScaledEmbedding(nn.Module):
    r"""The original Transformer's lookup: see :func:`handbook_src.functional.scaled_embedding`.

    The rows start at deviation :math:`1/\sqrt d`: looked up they have deviation one, and the same table serves as
    output matrix in :meth:`logits`, where no factor is due.

    Args:
        num_embeddings: rows, one for each token.
        embedding_dim: features.
        padding_idx: the token whose row stays zero and gets no gradient.
        device: of the table.
        dtype: of the table.
        scale: another factor than the root of ``embedding_dim``.
        backend: who runs it.

    Shape:
        ``(...)`` integers to ``(..., embedding_dim)``.

    Typical values:
        ``embedding_dim`` 512 (Vaswani et al. 2017), so a factor of 22.6; T5 and BERT have no factor, Gemma has it.

    Raises:
        ConfigError: a size that is not positive, ``padding_idx`` outside the table, ``scale`` not positive.
        ShapeError: tokens outside the table, or not of int32 or int64.

    Source:
        Vaswani et al. 2017, section 3.4, arXiv:1706.03762; shared with the output after
        Press & Wolf 2016, arXiv:1608.05859
    """

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        padding_idx: int | None = None,
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        scale: float | None = None,
        backend: Backend = "auto",
    ) -> None:
        super().__init__()
        check_size("ScaledEmbedding", "num_embeddings", num_embeddings)
        check_size("ScaledEmbedding", "embedding_dim", embedding_dim)
        self.num_embeddings, self.embedding_dim, self.backend = num_embeddings, embedding_dim, backend
        self.padding_idx = check_settings("ScaledEmbedding", num_embeddings, padding_idx, None, 2.0, False, False)
        self.scale = math.sqrt(embedding_dim) if scale is None else scale
        check_positive("ScaledEmbedding", "scale", self.scale)
        self.weight = nn.Parameter(torch.empty(num_embeddings, embedding_dim, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the rows with deviation one over the root of their length; zero the padding row."""
        nn.init.normal_(self.weight, std=self.embedding_dim**-0.5)
        if self.padding_idx is not None:
            with torch.no_grad():
                self.weight[self.padding_idx].zero_()

    def forward(self, input: Int[Tensor, "*lead"]) -> Float[Tensor, "*lead d"]:
        return maths.scaled_embedding(input, self.weight, self.padding_idx, self.scale, backend=self.backend)

    def logits(self, x: Float[Tensor, "*lead d"]) -> Float[Tensor, "*lead v"]:
        """Score every token by the same table, without the factor.

        Raises:
            ShapeError: ``x`` has another number of features or dtype, or is not floating.
        """
        check_floating("ScaledEmbedding logits", x)
        check_features("ScaledEmbedding logits", x, self.embedding_dim)
        check_alike("ScaledEmbedding logits", x, self.weight)
        return F.linear(x, self.weight)

    def extra_repr(self) -> str:
        padding = "" if self.padding_idx is None else f", padding_idx={self.padding_idx}"
        return f"{self.num_embeddings}, {self.embedding_dim}, scale={self.scale:.4g}{padding}"
