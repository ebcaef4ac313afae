"""Toy tasks: small problems whose answer is known, to see what a mechanism can do.

Each is a callable of a generator, so it is a ``sample`` for
:func:`handbook_src.training.train`; the same generator state gives the same batch.
Targets are class numbers; positions that are not asked carry ``IGNORE``, which
``torch.nn.functional.cross_entropy`` leaves out by default.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor

from handbook_src.errors import ConfigError

IGNORE = -100

Batch = tuple[Int[Tensor, "b t"], Int[Tensor, "b t"]]


@dataclass(frozen=True)
class Copy:
    """Say again what was said before the separator: needs memory for content and order.

    Tokens ``0 .. symbols - 1`` are the content, ``symbols`` is the separator.  Input:
    content, separator, content without its end; target: ignored, then content.

    Shape:
        inputs and targets ``b (2 length)``, vocabulary ``symbols + 1``.

    Source:
        after Graves, Wayne & Danihelka 2014, section 4.1, arXiv:1410.5401
    """

    symbols: int = 8
    length: int = 8
    batch: int = 32
    #: say it backwards instead.
    reverse: bool = False

    def __post_init__(self) -> None:
        _positive(self, "symbols", "length", "batch")

    @property
    def vocab_size(self) -> int:
        """Content and separator."""
        return self.symbols + 1

    def __call__(self, generator: torch.Generator) -> Batch:
        """Draw a batch."""
        content = torch.randint(self.symbols, (self.batch, self.length), generator=generator)
        answer = content.flip(1) if self.reverse else content
        bar = torch.full((self.batch, 1), self.symbols)
        inputs = torch.cat([content, bar, answer[:, :-1]], dim=1)
        targets = torch.cat([torch.full_like(content, IGNORE), answer], dim=1)
        return inputs, targets


@dataclass(frozen=True)
class AssociativeRecall:
    """Pairs of key and value, then a key again: which value went with it?

    Keys are ``0 .. keys - 1`` and stand once each; values are the ``values`` numbers
    after them.  Only the last position is asked.

    Shape:
        inputs and targets ``b (2 pairs + 1)``, vocabulary ``keys + values``.

    Source:
        after Ba et al. 2016, section 4.1, arXiv:1610.06258
    """

    pairs: int = 4
    keys: int = 16
    values: int = 16
    batch: int = 32

    def __post_init__(self) -> None:
        _positive(self, "pairs", "keys", "values", "batch")
        if self.pairs > self.keys:
            raise ConfigError(
                "AssociativeRecall pairs", got=self.pairs, want=f"at most keys={self.keys}", remedy="Raise keys."
            )

    @property
    def vocab_size(self) -> int:
        """Keys and values."""
        return self.keys + self.values

    def __call__(self, generator: torch.Generator) -> Batch:
        """Draw a batch."""
        keys = torch.rand(self.batch, self.keys, generator=generator).argsort(dim=1)[:, : self.pairs]
        values = torch.randint(self.values, (self.batch, self.pairs), generator=generator) + self.keys
        asked = torch.randint(self.pairs, (self.batch, 1), generator=generator)
        story = torch.stack([keys, values], dim=2).flatten(1)
        inputs = torch.cat([story, keys.gather(1, asked)], dim=1)
        targets = torch.full_like(inputs, IGNORE)
        targets[:, -1:] = values.gather(1, asked)
        return inputs, targets


@dataclass(frozen=True)
class Bits:
    """A function of the bits so far, asked at every position.

    ``parity``: is the number of ones odd?  Every bit matters, so one lost bit
    spoils the answer.  ``majority``: are there more ones than zeros?  A mean
    settles it.

    Shape:
        inputs and targets ``b length``, vocabulary 2.
    """

    kind: str = "parity"
    length: int = 16
    batch: int = 32

    def __post_init__(self) -> None:
        _positive(self, "length", "batch")
        if self.kind not in ("parity", "majority"):
            raise ConfigError("Bits kind", got=repr(self.kind), want="'parity' or 'majority'", remedy="Choose one.")

    @property
    def vocab_size(self) -> int:
        """Zero and one."""
        return 2

    def __call__(self, generator: torch.Generator) -> Batch:
        """Draw a batch."""
        bits = torch.randint(2, (self.batch, self.length), generator=generator)
        ones = bits.cumsum(1)
        if self.kind == "parity":
            return bits, ones % 2
        return bits, (2 * ones > torch.arange(1, self.length + 1)).long()


@dataclass(frozen=True)
class MaskedToken:
    """A sequence that counts up by a fixed stride, with tokens blanked out: fill them in.

    Start and stride are drawn per sequence, counting is modulo ``symbols``; any two
    neighbours that are left settle it, wherever they stand, so a model that sees
    both sides solves it.  ``symbols`` is the blank.  At least one token is blanked.

    Shape:
        inputs and targets ``b length``, vocabulary ``symbols + 1``.

    Source:
        the corruption of Devlin et al. 2019, section 3.1, arXiv:1810.04805, without
        its 10 % random and 10 % kept tokens
    """

    symbols: int = 11
    length: int = 12
    rate: float = 0.15
    batch: int = 32

    def __post_init__(self) -> None:
        _positive(self, "symbols", "length", "batch")
        if not 0 < self.rate < 1:
            raise ConfigError("MaskedToken rate", got=self.rate, want="between 0 and 1", remedy="BERT uses 0.15.")

    @property
    def vocab_size(self) -> int:
        """Symbols and the blank."""
        return self.symbols + 1

    def __call__(self, generator: torch.Generator) -> Batch:
        """Draw a batch."""
        start, stride = torch.randint(self.symbols, (2, self.batch, 1), generator=generator)
        tokens = (start + stride * torch.arange(self.length)) % self.symbols
        draw = torch.rand(tokens.shape, generator=generator)
        blank = (draw < self.rate) | (draw == draw.min(dim=1, keepdim=True).values)
        return tokens.masked_fill(blank, self.symbols), tokens.masked_fill(~blank, IGNORE)


def accuracy(logits: Tensor, targets: Int[Tensor, "b t"]) -> float:
    """Return the share of asked positions whose likeliest class is the target."""
    asked = targets != IGNORE
    return (logits.argmax(-1) == targets)[asked].double().mean().item()


def _positive(task: object, *names: str) -> None:
    for name in names:
        value = getattr(task, name)
        if value < 1:
            raise ConfigError(f"{type(task).__name__} {name}", got=value, want="at least 1", remedy="Raise it.")
