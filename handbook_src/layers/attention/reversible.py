"""Reversible residual blocks as layers: any two modules, and memory that does not grow with depth."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, final

from torch import Tensor, nn

from handbook_src.errors import ConfigError
from handbook_src.functional.attention.reversible import Branch, forward, inverse, reversible


@final
class ReversibleBlock(nn.Module):
    r"""Two residual branches on two streams, so that the inputs can be had back from the outputs.

    .. math:: y_1 = x_1 + F(x_2), \qquad y_2 = x_2 + G(y_1)

    See :func:`handbook_src.functional.reversible`.  Alone it is an ordinary module that keeps its
    activations; a :class:`ReversibleStack` forgets them.

    Args:
        f: the first branch, for instance attention behind a norm; returns the shape it is given.
        g: the second branch, for instance a feed-forward network behind a norm.

    Shape:
        two tensors of one shape to two of the same.

    Typical values:
        attention and feed-forward (Reformer); two residual functions of a ResNet (RevNet).

    Raises:
        ConfigError: a branch that is not a module.
        ShapeError: streams of two shapes, or a branch that changes the shape.

    Source:
        Gomez et al. 2017, eq. 4, arXiv:1707.04585
    """

    def __init__(self, f: nn.Module, g: nn.Module) -> None:
        super().__init__()
        for name, branch in (("f", f), ("g", g)):
            if not isinstance(branch, nn.Module):
                remedy = "Wrap a function in a module, so that its weights are known."
                raise ConfigError(f"ReversibleBlock {name}", got=repr(branch), want="a module", remedy=remedy)
        self.f, self.g = f, g

    def forward(self, x1: Tensor, x2: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
        """Run the block; further arguments (a mask) go to ``f``."""
        return forward(x1, x2, _with(self.f, args), self.g)

    def inverse(self, y1: Tensor, y2: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
        """Return the inputs that gave these outputs, up to rounding, if the branches draw no random numbers."""
        return inverse(y1, y2, _with(self.f, args), self.g)


@final
class ReversibleStack(nn.Module):
    r"""Reversible blocks, one after the other, of which only the last output is kept for the backward pass.

    .. math:: (x_1, x_2) \mapsto (B_L \circ \dots \circ B_1)(x_1, x_2)

    See :func:`handbook_src.functional.reversible`: gradients are those of the plain stack, up to rounding.
    Each branch runs twice, in the same mode (call ``backward()`` before ``eval()``), so a norm that keeps running
    statistics updates them twice a step.

    Args:
        blocks: of :class:`ReversibleBlock`.
        recompute: ``False`` keeps all activations, for comparison.

    Shape:
        two tensors of one shape to two of the same.

    Typical values:
        3 to 20 blocks (Reformer); dozens of residual pairs (RevNet).

    Raises:
        ConfigError: something else than blocks.
        ShapeError: streams of two shapes, or a branch that changes the shape.

    Source:
        Gomez et al. 2017, algorithm 1, arXiv:1707.04585; Kitaev et al. 2020, section 3, arXiv:2001.04451
    """

    def __init__(self, blocks: Iterable[ReversibleBlock], *, recompute: bool = True) -> None:
        super().__init__()
        self.blocks = nn.ModuleList()
        for block in blocks:
            if not isinstance(block, ReversibleBlock):
                remedy = "Pass ReversibleBlock(f, g) for each."
                raise ConfigError("ReversibleStack blocks", got=type(block).__name__, want="blocks", remedy=remedy)
            self.blocks.append(block)
        self.recompute = recompute

    def forward(self, x1: Tensor, x2: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
        """Run all blocks; further arguments (a mask) go to each ``f`` and get no gradient."""
        parts = [(_with(b.f, args), b.g, list(b.parameters())) for b in self._all()]
        return reversible(x1, x2, parts, recompute=self.recompute)

    def inverse(self, y1: Tensor, y2: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
        """Return the inputs that gave these outputs, up to rounding, if the branches draw no random numbers."""
        for block in reversed(self._all()):
            y1, y2 = block.inverse(y1, y2, *args)
        return y1, y2

    def _all(self) -> list[ReversibleBlock]:
        return [b for b in self.blocks if isinstance(b, ReversibleBlock)]

    def extra_repr(self) -> str:
        return "" if self.recompute else "recompute=False"


def _with(branch: Callable[..., Tensor], args: tuple[Any, ...]) -> Branch:
    return partial(_call, branch, args) if args else branch


def _call(branch: Callable[..., Tensor], args: tuple[Any, ...], x: Tensor) -> Tensor:
    return branch(x, *args)
