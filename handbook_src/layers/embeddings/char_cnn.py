"""Word vectors made from characters, with highway layers and a projection."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, final

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from handbook_src.check import check_features, check_size
from handbook_src.errors import ConfigError
from handbook_src.functional.embeddings import char_cnn as maths
from handbook_src.functional.foundations.embedding import check_settings

#: (width, filters): Kim et al. 2015, table 2, small, and ELMo's released configuration.
KIM_SMALL = tuple((width, 25 * width) for width in range(1, 7))
ELMO = ((1, 32), (2, 32), (3, 64), (4, 128), (5, 256), (6, 512), (7, 1024))


@final
class Highway(nn.Module):
    r"""A layer that can let its input pass: see :func:`handbook_src.functional.highway`.

    Args:
        dim: features in and out.
        device: of the parameters.
        dtype: of the parameters.

    Shape:
        ``(..., dim)`` to the same.

    Typical values:
        Gate bias -2 at the start, where :math:`t \approx 0.12`; one layer (Kim, small) or two.

    Raises:
        ConfigError: ``dim`` is not positive.
        ShapeError: another number of features.

    Source:
        Srivastava et al. 2015, eq. 3, arXiv:1505.00387
    """

    def __init__(self, dim: int, device: Any = None, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        check_size("Highway", "dim", dim)
        self.transform = nn.Linear(dim, dim, device=device, dtype=dtype)
        self.gate = nn.Linear(dim, dim, device=device, dtype=dtype)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw as torch's linear layers do; the gate starts nearly shut."""
        self.transform.reset_parameters()
        self.gate.reset_parameters()
        nn.init.constant_(self.gate.bias, -2.0)

    def forward(self, x: Float[Tensor, "*lead d"]) -> Float[Tensor, "*lead d"]:
        check_features("Highway", x, self.gate.in_features)
        return maths.highway(x, self.transform.weight, self.transform.bias, self.gate.weight, self.gate.bias)


@final
class CharCNNEmbedding(nn.Module):
    r"""Spell a word, get its vector: see :func:`handbook_src.functional.char_cnn`.

    .. math:: y = W_P\, \operatorname{highway}^n\bigl(\operatorname{charcnn}(c_1 \dots c_l)\bigr) + b_P

    Args:
        num_chars: rows of the character table; 259 for :func:`handbook_src.functional.word_bytes`.
        embedding_dim: features of a word after the projection; None leaves the projection out, as Kim does.
        filters: (width, count) pairs.
        char_dim: features of a character.
        highways: how many highway layers.
        activation: of the filters, ``tanh`` or ``relu``.
        padding_idx: the character that is none.
        device: of the parameters.
        dtype: of the parameters.

    Shape:
        ``(..., characters)`` integers to ``(..., embedding_dim)``.

    Typical values:
        Kim, small: 15 features a character, ``KIM_SMALL``, one highway, tanh, no projection; ELMo: 16, ``ELMO``,
        two highways, relu, projected to 512, 50 characters a word.

    Raises:
        ConfigError: a size that is not positive, no filters, an unknown activation.
        ShapeError: characters outside the table, or no integers.

    Source:
        Kim et al. 2015, section 2.2 and 2.3, arXiv:1508.06615; Peters et al. 2018, section 3.4, arXiv:1802.05365
    """

    def __init__(
        self,
        num_chars: int = maths.NUM_CHARS,
        embedding_dim: int | None = None,
        filters: Sequence[tuple[int, int]] = KIM_SMALL,
        *,
        char_dim: int = 15,
        highways: int = 1,
        activation: str = "tanh",
        padding_idx: int = 0,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        name, made = "CharCNNEmbedding", {"device": device, "dtype": dtype}
        check_size(name, "num_chars", num_chars)
        check_size(name, "char_dim", char_dim)
        check_size(name, "highways", highways, least=0)
        pairs = _checked_filters(filters)
        if activation not in maths.ACTIVATIONS:
            want = f"one of {list(maths.ACTIVATIONS)}"
            raise ConfigError(f"{name} activation", got=repr(activation), want=want, remedy="Kim tanh, ELMo relu.")
        padding = check_settings(name, num_chars, padding_idx, None, 2.0, False, False)
        if padding is None:
            raise ConfigError(f"{name} padding_idx", got=None, want="a character", remedy="0 in word_bytes.")
        self.filters, self.activation, self.padding_idx = pairs, activation, padding
        self.char_embedding = nn.Embedding(num_chars, char_dim, padding, **made)
        self.convolutions = nn.ModuleList(nn.Conv1d(char_dim, count, width, **made) for width, count in pairs)
        total = sum(count for _, count in pairs)
        self.highways = nn.ModuleList(Highway(total, **made) for _ in range(highways))
        if embedding_dim is not None:
            check_size(name, "embedding_dim", embedding_dim)
        self.embedding_dim = total if embedding_dim is None else embedding_dim
        self.projection = None if embedding_dim is None else nn.Linear(total, embedding_dim, **made)

    def reset_parameters(self) -> None:
        """Draw every part as torch does; the gates of the highways start nearly shut."""
        for part in (self.char_embedding, *self.convolutions, *self.highways, self.projection):
            if part is not None:
                part.reset_parameters()

    def forward(self, chars: Int[Tensor, "*lead characters"]) -> Float[Tensor, "*lead d"]:
        y = maths.char_cnn(
            chars,
            self.char_embedding.weight,
            [conv.get_parameter("weight") for conv in self.convolutions],
            [conv.get_parameter("bias") for conv in self.convolutions],
            padding_idx=self.padding_idx,
            activation=self.activation,
        )
        for layer in self.highways:
            y = layer(y)
        return y if self.projection is None else self.projection(y)

    def extra_repr(self) -> str:
        return f"filters={self.filters}, activation={self.activation!r}"


def _checked_filters(filters: Sequence[tuple[int, int]]) -> tuple[tuple[int, int], ...]:
    try:
        pairs = tuple((width, count) for width, count in filters)
    except (TypeError, ValueError):
        pairs = ()
    if not pairs:
        raise ConfigError(
            "CharCNNEmbedding filters",
            got=repr(filters),
            want="pairs (width, count), at least one",
            remedy="KIM_SMALL or ELMO.",
        )
    for width, count in pairs:
        check_size("CharCNNEmbedding", "filter width", width)
        check_size("CharCNNEmbedding", "filter count", count)
    return pairs
