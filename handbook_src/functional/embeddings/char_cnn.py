"""Words from their characters: convolve, keep each filter's maximum, carry on through highways."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from handbook_src.check import check_features, check_floating, check_rank
from handbook_src.dispatch import Backend, resolve
from handbook_src.errors import ConfigError, DataError, ShapeError
from handbook_src.functional.convolution.conv_input import check_alike
from handbook_src.functional.foundations.embedding import check_range, check_settings, check_table, check_tokens
from handbook_src.precision import statistic_dtype

_OP = "char_cnn"
#: Ids of :func:`word_bytes`: 0 pads, 1 to 256 are the bytes, then the two ends of a word.
PADDING, BEGIN, END, NUM_CHARS = 0, 257, 258, 259
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"tanh": torch.tanh, "relu": torch.relu}


def word_bytes(words: Iterable[str], length: int | None = None) -> Int[Tensor, "words characters"]:
    """Return the UTF-8 bytes of each word between a begin and an end mark, padded with zeros.

    Args:
        words: any strings.
        length: characters of the result, marks included, at least 3; longer words lose their last bytes.
            The longest word's unless given.

    Raises:
        DataError: something that is no string, or one that UTF-8 cannot hold.
        ConfigError: no room for the marks.
    """
    if length is not None and (isinstance(length, bool) or not isinstance(length, int) or length < 3):
        raise ConfigError(
            "word_bytes length", got=repr(length), want="at least 3", remedy="ELMo gives a word 50 characters."
        )
    words = list(words) if isinstance(words, Iterable) and not isinstance(words, str) else words
    if not isinstance(words, list) or not all(isinstance(word, str) for word in words):
        raise DataError(
            "word_bytes words", got=repr(words)[:60], want="a list of strings", remedy="Wrap one word: [w]."
        )
    try:
        rows = [[BEGIN, *(b + 1 for b in word.encode()[: length and length - 2]), END] for word in words]
    except UnicodeEncodeError as e:
        raise DataError(
            "word_bytes words", got=repr(e.object), want="text that UTF-8 can hold", remedy="Drop half surrogate pairs."
        ) from e
    width = max(map(len, rows), default=2) if length is None else length
    return torch.tensor([row + [PADDING] * (width - len(row)) for row in rows], dtype=torch.long).reshape(
        len(rows), width
    )


def char_cnn(
    chars: Int[Tensor, "*lead characters"],
    table: Float[Tensor, "v d"],
    weights: Sequence[Float[Tensor, "_ d _"]],
    biases: Sequence[Float[Tensor, " _"]],
    *,
    padding_idx: int = 0,
    activation: str = "tanh",
    backend: Backend = "auto",
) -> Float[Tensor, "*lead f"]:
    r"""Slide filters of several widths over a word's characters and keep the largest answer of each.

    .. math::
        f_k[i] = \phi\bigl(\langle H_k,\; C_{i:i+w_k-1} \rangle + b_k\bigr), \qquad
        y_k = \max_{1 \le i \le \max(1,\, l - w_k + 1)} f_k[i]

    Only windows inside the word count; a word shorter than a filter gives one window, filled up
    with zeros. So padding never enters: the padding row is read as zero, and a vector does not depend on
    how far its word was padded. The maximum is taken before :math:`\phi`, which increases.
    A word of nothing but padding is one window of zeros. Half precision: the reference adds in float32 and rounds once.

    Args:
        chars: characters of each word; padding stands at the end.
        table: one row a character.
        weights: a convolution's weight for each width, ``filters d width``.
        biases: one for each weight.
        padding_idx: the character that is none; a negative one counts from the table's end.
        activation: ``tanh`` (Kim) or ``relu`` (ELMo).
        backend: ``reference`` writes the windows out, ``torch`` is ``conv1d``.

    Raises:
        ConfigError: an unknown activation, no filters, ``padding_idx`` is no row.
        ShapeError: characters outside the table or not of an integer dtype, none at all, filters of another depth,
            none or without width, mixed dtypes.

    Source:
        Kim et al. 2015, section 2.2, arXiv:1508.06615; ELMo's sizes Peters et al. 2018, section 3.4, arXiv:1802.05365
    """
    _check(chars, table, weights, biases, activation)
    padding = check_settings(_OP, table.shape[0], padding_idx, None, 2.0, False, False)
    if padding is None:
        raise ConfigError(f"{_OP} padding_idx", got=None, want="a character", remedy="0 in word_bytes.")
    runs = resolve(_OP, backend, {"torch": None, "reference": None})
    words = chars.reshape(-1, chars.shape[-1])
    real = words != padding
    places = torch.arange(1, words.shape[1] + 1, device=words.device)
    lengths = (real * places).amax(1)
    x = F.embedding(words, table).masked_fill(~real[..., None], 0.0)  # a product would keep a NaN
    found = []
    for weight, bias in zip(weights, biases, strict=True):
        width = weight.shape[2]
        padded = F.pad(x, (0, 0, 0, max(0, width - x.shape[1])))
        answers = _convolve(padded, weight, bias, runs)
        starts = torch.arange(answers.shape[1], device=words.device)
        inside = starts <= (lengths - width).clamp_min(0)[:, None]
        found.append(answers.masked_fill(~inside[..., None], -torch.inf).amax(1))
    return (
        ACTIVATIONS[activation](torch.cat(found, 1)).to(table.dtype).reshape(*chars.shape[:-1], sum(map(len, weights)))
    )


def _convolve(x: Tensor, weight: Tensor, bias: Tensor, runs: Backend) -> Tensor:
    """Answers of every filter at every window, ``words windows filters``."""
    if runs == "torch":
        return F.conv1d(x.transpose(1, 2), weight, bias).transpose(1, 2)
    wide = statistic_dtype(x)
    windows = x.to(wide).unfold(1, weight.shape[2], 1)  # words windows d width
    return windows.flatten(2) @ weight.to(wide).flatten(1).T + bias.to(wide)


def highway(
    x: Float[Tensor, "*lead f"],
    weight: Float[Tensor, "f f"],
    bias: Float[Tensor, " f"],
    gate_weight: Float[Tensor, "f f"],
    gate_bias: Float[Tensor, " f"],
) -> Float[Tensor, "*lead f"]:
    r"""Mix a layer's answer with its input, by a gate that the input sets.

    .. math:: z = t \odot \mathrm{relu}(W_H y + b_H) + (1 - t) \odot y, \qquad t = \sigma(W_T y + b_T)

    Args:
        x: the input :math:`y`.
        weight: :math:`W_H`.
        bias: :math:`b_H`.
        gate_weight: :math:`W_T`.
        gate_bias: :math:`b_T`; negative at the start, so that the input passes.

    Raises:
        ShapeError: another number of features, not floating, weights that are not square or mixed dtypes.

    Source:
        Kim et al. 2015, eq. 8, arXiv:1508.06615, after Srivastava et al. 2015, arXiv:1505.00387
    """
    parameters = {"weight": weight, "bias": bias, "gate_weight": gate_weight, "gate_bias": gate_bias}
    check_floating("highway", x, *parameters.values())
    check_rank("highway weight", weight, (2,), "(features, features)")
    check_features("highway", x, weight.shape[1])
    check_alike("highway", x, *parameters.values())
    for name, p in parameters.items():
        want = (x.shape[-1],) * (2 if name.endswith("weight") else 1)
        if tuple(p.shape) != want:
            raise ShapeError(
                f"highway {name}", got=tuple(p.shape), want=f"{want}", remedy="It answers in the input's features."
            )
    gate = torch.sigmoid(F.linear(x, gate_weight, gate_bias))
    return gate * torch.relu(F.linear(x, weight, bias)) + (1 - gate) * x


def _check(chars: Tensor, table: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor], activation: str) -> None:
    check_table(table)
    check_tokens(chars, table)
    if chars.ndim < 1 or chars.shape[-1] == 0:
        raise ShapeError(
            f"{_OP} input",
            got=tuple(chars.shape),
            want="at least one character a word",
            remedy="Pad empty words with the padding character.",
        )
    check_range(chars, table.shape[0])
    if not isinstance(activation, str) or activation not in ACTIVATIONS:
        raise ConfigError(f"{_OP} activation", got=repr(activation), want=f"one of {list(ACTIVATIONS)}", remedy="tanh.")
    check_floating(_OP, *weights, *biases)
    if not weights or len(weights) != len(biases):
        raise ConfigError(
            f"{_OP} filters",
            got=f"{len(weights)} weights, {len(biases)} biases",
            want="at least one of each, in pairs",
            remedy="One weight and one bias for each width.",
        )
    for weight, bias in zip(weights, biases, strict=True):
        check_rank(f"{_OP} weight", weight, (3,), "(filters, character features, width)")
        check_features(_OP, weight, table.shape[1], name="weight", axis=1)
        check_alike(_OP, table, weight, bias)
        if 0 in weight.shape:
            want = "at least one filter of at least one character"
            raise ShapeError(f"{_OP} weight", got=tuple(weight.shape), want=want, remedy="Leave this width out.")
        if tuple(bias.shape) != (weight.shape[0],):
            raise ShapeError(
                f"{_OP} bias", got=tuple(bias.shape), want=f"{(weight.shape[0],)}", remedy="One entry a filter."
            )
