r"""Reversible residual blocks: the inputs are recomputed from the outputs, so nothing in between is kept.

``y1 = x1 + F(x2)``, ``y2 = x2 + G(y1)``; backwards, ``x2 = y2 - G(y1)``, ``x1 = y1 - F(x2)``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable

from handbook_src.check import check_floating, check_one_device
from handbook_src.errors import ConfigError, ShapeError

# a branch: a tensor to a tensor of the same shape
Branch = Callable[[Tensor], Tensor]
# the two branches F and G of a block, and the weights that they use
Block = tuple[Branch, Branch, Sequence[Tensor]]
# states of the random numbers before and after a branch
Noise = tuple[list[Tensor], list[Tensor]]


def reversible(
    x1: Float[Tensor, "*shape"], x2: Float[Tensor, "*shape"], blocks: Sequence[Block], *, recompute: bool = True
) -> tuple[Float[Tensor, "*shape"], Float[Tensor, "*shape"]]:
    r"""Run a stack of reversible residual blocks whose memory does not grow with their number.

    .. math:: y_1 = x_1 + F(x_2), \qquad y_2 = x_2 + G(y_1)

    Only the outputs of the last block are kept.  The backward pass undoes one block after the other,

    .. math:: x_2 = y_2 - G(y_1), \qquad x_1 = y_1 - F(x_2)

    and runs each branch once more to differentiate it, with the same random numbers and under the same autocast.
    Rounding makes the recomputed inputs differ in the last bits, more so the deeper the stack.
    Each gradient can be taken once: for second derivatives keep the activations (``recompute=False``).
    Under ``torch.compile`` the plain stack is traced; the compiler decides what to keep.

    Args:
        x1: first stream.
        x2: second stream.
        blocks: ``(F, G, weights)`` of each block, first to last; ``weights`` names every tensor that ``F`` and ``G``
            use and that wants a gradient.
        recompute: ``False`` keeps all activations, as an ordinary stack does.

    Raises:
        ShapeError: streams of two shapes, a branch that changes the shape, streams that are not floating point.
        ConfigError: blocks that are no triples, a branch that changes its input in place; in the backward pass, a
            branch uses a tensor that wants a gradient and that is not named, or draws other random numbers than
            before, as dropout does after ``eval()``.

    Source:
        Gomez et al. 2017, eq. 4 and algorithm 1, arXiv:1707.04585; Kitaev et al. 2020, section 3, arXiv:2001.04451
    """
    check_floating("reversible", x1, x2)
    if x1.shape != x2.shape or x1.dtype != x2.dtype:
        got = f"{tuple(x1.shape)} {x1.dtype} and {tuple(x2.shape)} {x2.dtype}"
        raise ShapeError("reversible streams", got=got, want="two alike", remedy="Split an even axis with chunk(2).")
    check_one_device("reversible", x1, x2)
    blocks = [_distinct(block) for block in blocks]
    if not recompute or torch.compiler.is_compiling() or not torch.is_grad_enabled():
        for f, g, _ in blocks:
            x1, x2 = forward(x1, x2, f, g)
        return x1, x2
    weights = [w for *_, used in blocks for w in used]
    y1, y2 = _Reversible.apply(x1, x2, blocks, *weights)
    return y1, y2


def _distinct(block: Block) -> Block:
    """The block with each weight named once: one that both branches use would get its gradient twice."""
    if not isinstance(block, tuple | list) or len(block) != 3:
        raise ConfigError("reversible block", got=repr(block), want="(F, G, weights)", remedy="Name the weights: [].")
    f, g, weights = block
    return f, g, list({id(w): w for w in weights}.values())


def forward(x1: Tensor, x2: Tensor, f: Branch, g: Branch) -> tuple[Tensor, Tensor]:
    """One block: ``y1 = x1 + F(x2)``, ``y2 = x2 + G(y1)``."""
    y1 = x1 + _same("F", f(x2), x1)
    return y1, x2 + _same("G", g(y1), x2)


def inverse(y1: Tensor, y2: Tensor, f: Branch, g: Branch) -> tuple[Tensor, Tensor]:
    """Undo one block: ``x2 = y2 - G(y1)``, ``x1 = y1 - F(x2)``."""
    x2 = y2 - _same("G", g(y1), y2)
    return y1 - _same("F", f(x2), y1), x2


class _Reversible(torch.autograd.Function):
    """The whole stack as one node: a node a block would keep each block's outputs."""

    @staticmethod
    def forward(ctx: Any, x1: Tensor, x2: Tensor, blocks: Sequence[Block], *weights: Tensor) -> tuple[Tensor, Tensor]:
        ctx.blocks, ctx.autocast, ctx.noise = blocks, _autocast_state(x1), []
        y1, y2 = x1, x2
        for f, g, _ in blocks:
            made, noise = _remembered(f, y2)
            y1 = y1 + _same("F", made, y1)
            ctx.noise.append(noise)
            made, noise = _remembered(g, y1)
            y2 = y2 + _same("G", made, y2)
            ctx.noise.append(noise)
        # an empty stack returns its inputs, which autograd wants as new tensors
        y1, y2 = (y.view_as(y) for y in (y1, y2)) if not blocks else (y1, y2)
        ctx.save_for_backward(y1, y2)
        ctx.versions = [w._version for w in weights]
        return y1, y2

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy1: Tensor, dy2: Tensor) -> tuple[Tensor | None, ...]:
        y1, y2 = ctx.saved_tensors
        if ctx.versions != [w._version for *_, used in ctx.blocks for w in used]:
            got, want = "weights changed since the forward pass", "the same weights in both passes"
            raise ConfigError("reversible", got=got, want=want, remedy="Call backward() before the optimiser's step.")
        found: list[list[Tensor | None]] = []
        for i in reversed(range(len(ctx.blocks))):
            f, g, used = ctx.blocks[i]
            f_noise, g_noise = ctx.noise[2 * i : 2 * i + 2]
            made, d_in, g_grads = _again(g, y1, dy2, used, g_noise, ctx.autocast)
            y2, dy1 = y2 - made, dy1 + d_in
            made, d_in, f_grads = _again(f, y2, dy1, used, f_noise, ctx.autocast)
            y1, dy2 = y1 - made, dy2 + d_in
            found.append([b if a is None else a if b is None else a + b for a, b in zip(f_grads, g_grads, strict=True)])
        return dy1, dy2, None, *(grad for grads in reversed(found) for grad in grads)


def _again(
    branch: Branch, x: Tensor, cotangent: Tensor, used: Sequence[Tensor], noise: Any, autocast: dict[str, Any]
) -> tuple[Tensor, Tensor, list[Tensor | None]]:
    """Run a branch once more; return its output, and the gradients of its input and of its weights."""
    x = x.detach().requires_grad_()
    with torch.enable_grad(), torch.autocast(**autocast), _Replayed(noise, x.device):
        made = branch(x)
    wanted = [w for w in used if w.requires_grad]
    if not made.requires_grad:
        return made.detach(), torch.zeros_like(x), [None] * len(used)
    _refuse_strangers(made, [x, *wanted])
    first, *rest = torch.autograd.grad(made, [x, *wanted], cotangent.to(made.dtype), allow_unused=True)
    grads = iter(rest)
    of_weights = [next(grads) if w.requires_grad else None for w in used]
    return made.detach(), torch.zeros_like(x) if first is None else first, of_weights


def _refuse_strangers(made: Tensor, known: Sequence[Tensor]) -> None:
    """A weight that nobody named would get no gradient, without a word."""
    names, seen, queue = {id(x) for x in known}, set(), [made.grad_fn]
    while queue:
        node = queue.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        leaf = getattr(node, "variable", None)
        if isinstance(leaf, Tensor) and id(leaf) not in names:
            raise ConfigError(
                "reversible weights",
                got=f"a branch uses a tensor {tuple(leaf.shape)} that wants a gradient and is not named",
                want="every such tensor among the block's weights",
                remedy="Pass it in the block's weights, or detach it.",
            )
        queue += [parent for parent, _ in node.next_functions]


def _remembered(branch: Branch, x: Tensor) -> tuple[Tensor, Noise | None]:
    """Run a branch; return its output, and the states of the random numbers around it where it drew some."""
    before, version = _noise(x.device), x._version
    made = branch(x)
    if x._version != version:
        got, want = "a branch that changes its input in place", "branches that leave it as it is"
        raise ConfigError("reversible branch", got=got, want=want, remedy="Take inplace=False: it is needed again.")
    after = _noise(x.device)
    return made, None if _alike(before, after) else (before, after)


def _alike(before: list[Tensor], after: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def _noise(device: torch.device) -> list[Tensor]:
    states = [torch.get_rng_state()]
    return [*states, torch.cuda.get_rng_state(device)] if device.type == "cuda" else states


class _Replayed:
    """Put back the random state of the forward pass, and afterwards the present one."""

    def __init__(self, noise: Noise | None, device: torch.device) -> None:
        self.noise, self.device = noise, device

    def __enter__(self) -> None:
        self.now = _noise(self.device)
        if self.noise is not None:
            self._set(self.noise[0])

    def __exit__(self, kind: object, *_: object) -> None:
        end, wanted = _noise(self.device), self.now if self.noise is None else self.noise[1]
        self._set(self.now)
        if kind is None and not _alike(end, wanted):
            raise ConfigError(
                "reversible branch",
                got="other random numbers drawn in the backward pass",
                want="as many as in the forward pass",
                remedy="Call backward() before train() or eval() switches dropout.",
            )

    def _set(self, states: Iterable[Tensor]) -> None:
        cpu, *cuda = states
        torch.set_rng_state(cpu)
        for state in cuda:
            torch.cuda.set_rng_state(state, self.device)


def _autocast_state(x: Tensor) -> dict[str, Any]:
    kind = x.device.type if torch.amp.is_autocast_available(x.device.type) else "cpu"
    return {
        "device_type": kind,
        "enabled": torch.is_autocast_enabled(kind),
        "dtype": torch.get_autocast_dtype(kind),
        "cache_enabled": False,  # a cached cast would hang in the graph of another branch
    }


def _same(name: str, made: Tensor, x: Tensor) -> Tensor:
    if made.shape != x.shape:
        raise ShapeError(
            f"reversible branch {name}",
            got=f"{tuple(made.shape)} from an input of {tuple(x.shape)}",
            want="the input's shape",
            remedy="What is subtracted must be what was added: project the branch back.",
        )
    return made
