"""Perplexity: how many equally likely tokens the model hesitates between."""

from __future__ import annotations

import math

from jaxtyping import Float, Int
from torch import Tensor

from handbook_src.errors import ConfigError, ShapeError
from handbook_src.functional.losses.cross_entropy import cross_entropy


def perplexity(logits: Float[Tensor, "*lead v"], targets: Int[Tensor, "*lead"], *, ignore_index: int = -100) -> float:
    r"""Return the exponential of the mean negative log-likelihood of ``targets``.

    .. math:: \mathrm{PPL} = \exp\Bigl(-\frac1N \sum_{i=1}^N \log p(w_i \mid w_{<i})\Bigr)

    Every counted token weighs the same, however the text was cut into batches.
    The sum is kept in float64. Nothing is shifted here: ``logits[i]`` predicts ``targets[i]``.

    Args:
        logits: scores; any leading axes.
        targets: the token each row of scores is about.
        ignore_index: targets that don't count, such as padding.

    Raises:
        ShapeError: the leading axes differ, or targets are no integers.
        DataError: on a CPU, a target outside the vocabulary.
        ConfigError: no target counts.

    Shape:
        ``logits``: ``* v``; ``targets``: ``*``; a float out.

    Typical values:
        the vocabulary's size for a model that knows nothing, 1 for certainty; comparable
        only between models with the same tokens.

    Source:
        Jelinek et al. 1977, J. Acoust. Soc. Am. 62(S1); Brown et al. 1992, Computational Linguistics 18(1)
    """
    return Perplexity(ignore_index=ignore_index).update(logits, targets).compute()


class Perplexity:
    r"""Perplexity over many batches: sums nats and tokens, divides once at the end.

    The mean of the batches' perplexities is another, larger number (Jensen), and weighs
    a short batch like a long one; see :func:`perplexity` for the formula.

    Args:
        ignore_index: targets that don't count.
    """

    def __init__(self, *, ignore_index: int = -100) -> None:
        self.ignore_index = ignore_index
        self.reset()

    def reset(self) -> None:
        """Forget every batch."""
        self.nats, self.tokens = 0.0, 0

    def update(
        self,
        logits: Float[Tensor, "*lead v"],
        targets: Int[Tensor, "*lead"],
    ) -> Perplexity:
        """Add a batch; returns itself."""
        if logits.shape[:-1] != targets.shape:
            raise ShapeError(
                "Perplexity.update logits and targets",
                got=f"{tuple(logits.shape)} and {tuple(targets.shape)}",
                want="the targets' axes plus one of vocabulary",
                remedy="Causal models: logits[:, :-1] and tokens[:, 1:].",
            )
        z = logits.detach().reshape(-1, logits.shape[-1])
        z = z.float() if z.element_size() < 4 else z
        nll = cross_entropy(z, targets.reshape(-1), self.ignore_index, reduction="none")
        self.nats += nll.double().sum().item()
        self.tokens += int((targets != self.ignore_index).sum())
        return self

    def merge(self, other: Perplexity) -> Perplexity:
        """Add what another object has seen (another worker's share); returns itself."""
        self.nats += other.nats
        self.tokens += other.tokens
        return self

    def entropy(self, base: float = math.e) -> float:
        """Return the mean negative log-likelihood a token; ``base=2`` gives bits."""
        if self.tokens == 0:
            raise ConfigError(
                "Perplexity",
                got="0 counted tokens",
                want="at least one",
                remedy="Call update() with real targets first.",
            )
        if not (base > 0 and base != 1):
            raise ConfigError(
                "Perplexity.entropy base", got=base, want="positive and not 1", remedy="2 for bits, e for nats."
            )
        return self.nats / self.tokens / math.log(base)

    def compute(self) -> float:
        """Return the perplexity of all that was seen; it does not depend on a base."""
        try:
            return math.exp(self.entropy())
        except OverflowError:  # beyond 709 nats a token
            return math.inf

    def bits_per_byte(self, text_bytes: int) -> float:
        """Return the bits spent a byte of the text: the same scale for every tokenizer."""
        if text_bytes < 1:
            raise ConfigError(
                "Perplexity.bits_per_byte", got=text_bytes, want="at least 1", remedy="Pass len(text.encode())."
            )
        return self.entropy(2.0) * self.tokens / text_bytes
