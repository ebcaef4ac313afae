"""Softmax layers with torch's names and arguments, and a temperature."""

from __future__ import annotations

from typing import final

from torch import Tensor, nn

from handbook_src.check import check_positive
from handbook_src.dispatch import Backend
from handbook_src.errors import ConfigError
from handbook_src.functional.activations import softmax as maths


class _OverAnAxis(nn.Module):
    """What the two share: an axis, a temperature, a backend."""

    def __init__(self, dim: int, *, temperature: float = 1.0, backend: Backend = "auto") -> None:
        super().__init__()
        if not isinstance(dim, int) or isinstance(dim, bool):
            raise ConfigError(
                f"{type(self).__name__} dim",
                got=repr(dim),
                want="an axis",
                remedy="Pass dim=-1; torch's guess for None is 0 for three axes, 1 for two.",
            )
        check_positive(type(self).__name__, "temperature", temperature)
        self.dim, self.temperature, self.backend = dim, temperature, backend

    def extra_repr(self) -> str:
        return f"dim={self.dim}" + ("" if self.temperature == 1 else f", temperature={self.temperature}")


@final
class Softmax(_OverAnAxis):
    r"""Scores to weights that sum to one: see :func:`handbook_src.functional.softmax`.

    Args:
        dim: the axis that sums to one; torch's deprecated ``None`` is refused.
        temperature: what the scores are divided by.
        backend: who runs it.

    Shape:
        Any, with an axis ``dim``, to the same.

    Typical values:
        ``temperature`` 1; 0.7 to 1 for sampling text, up to 20 for distillation (Hinton et al. 2015).

    Raises:
        ConfigError: ``dim`` is no axis, or ``temperature`` is not positive and finite.
        ShapeError: the input is not floating.

    Source:
        Bridle 1990, NeurIPS 2; Milakov & Gimelshein 2018, algorithms 2 and 3, arXiv:1805.02867
    """

    def forward(self, x: Tensor) -> Tensor:
        return maths.softmax(x, self.dim, temperature=self.temperature, backend=self.backend)


@final
class LogSoftmax(_OverAnAxis):
    r"""The logarithm of softmax: see :func:`handbook_src.functional.log_softmax`.

    Args:
        dim: the axis along which the exponentials sum to one.
        temperature: what the scores are divided by.
        backend: who runs it.

    Shape:
        Any, with an axis ``dim``, to the same.

    Raises:
        ConfigError: ``dim`` is no axis, or ``temperature`` is not positive and finite.
        ShapeError: the input is not floating.

    Source:
        Milakov & Gimelshein 2018, algorithm 2, arXiv:1805.02867
    """

    def forward(self, x: Tensor) -> Tensor:
        return maths.log_softmax(x, self.dim, temperature=self.temperature, backend=self.backend)
