"""Weight norm and spectral norm as parametrisations of any layer's weight.

They stand on :mod:`torch.nn.utils.parametrize`, so ``layer.weight`` keeps its name,
optimisers see what is trained, and a state dict has torch's keys: a checkpoint made
with torch's own functions loads here, and the other way round.
"""

from __future__ import annotations

from typing import final

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize

from handbook_src.errors import ConfigError
from handbook_src.functional.normalisation import parametrization as maths
from handbook_src.functional.normalisation.norm_input import check_eps

#: Power iterations at the start, so that the first forward pass has a fair estimate.
WARM_START = 15


@final
class WeightNorm(nn.Module):
    r"""Weight as length times direction: see :func:`handbook_src.functional.weight_norm`.

    Registered on a weight it replaces it by ``original0`` (:math:`g`) and ``original1`` (:math:`v`).

    Args:
        dim: the axis with one length an entry; ``None`` for one length in all.

    Shape:
        weight ``(out, ...)`` from ``g`` ``(out, 1, ...)`` and ``v`` ``(out, ...)``.

    Typical values:
        ``dim=0``: one length per output unit or channel (the paper's choice).

    Source:
        Salimans & Kingma 2016, eq. 2, arXiv:1602.07868
    """

    def __init__(self, dim: int | None = 0) -> None:
        super().__init__()
        self.dim = dim

    def forward(self, g: Tensor, v: Tensor) -> Tensor:
        return maths.weight_norm(v, g, self.dim)

    def right_inverse(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Return ``(g, v)`` that give ``weight``; called when it is registered or assigned."""
        length = maths.norm_except(weight, self.dim)
        if (length == 0).any():
            rows = length.flatten().eq(0).nonzero().flatten().tolist()
            zero = "the whole weight" if self.dim is None else f"entries {rows} of dim {self.dim}"
            raise ConfigError(
                "weight_norm weight",
                got=f"norm 0 in {zero}",
                want="a direction: at least one nonzero number in each",
                remedy="Initialise the weight first; 0/0 would make the layer return NaN.",
            )
        return length, weight

    def extra_repr(self) -> str:
        return f"dim={self.dim}"


@final
class SpectralNorm(nn.Module):
    r"""Weight over its largest singular value: see :func:`handbook_src.functional.spectral_norm`.

    In training every use of the weight runs ``n_power_iterations`` steps of the power
    method first; in evaluation the vectors rest. A one-axis weight is divided by its
    length, which needs no iteration.

    Args:
        weight: the weight it will be registered on, for the sizes and a warm start.
        n_power_iterations: steps each time the weight is used in training.
        dim: the axis of the outputs.
        eps: the smallest length divided by.

    Shape:
        weight ``(out, ...)`` to the same; seen as a matrix ``(out, everything else)``.

    Typical values:
        ``n_power_iterations=1``, ``eps=1e-12`` (Miyato et al. 2018, section 2.1).

    Raises:
        ConfigError: ``n_power_iterations`` below 1, ``eps`` not positive, no such ``dim``, or a weight of zeros.

    Source:
        Miyato et al. 2018, eq. 8 and algorithm 1, arXiv:1802.05957
    """

    _u: Tensor
    _v: Tensor

    def __init__(self, weight: Tensor, n_power_iterations: int = 1, dim: int = 0, eps: float = 1e-12) -> None:
        super().__init__()
        check_eps("spectral_norm", eps)
        if n_power_iterations < 1:
            raise ConfigError(
                "spectral_norm n_power_iterations",
                got=n_power_iterations,
                want="at least 1",
                remedy="One step a forward pass is the paper's choice; call .eval() to stop iterating.",
            )
        if not weight.detach().any():
            raise ConfigError(
                "spectral_norm weight",
                got="all zeros",
                want="a largest singular value above 0",
                remedy="Initialise the weight first; 0/0 would make the layer return NaN.",
            )
        self.dim = maths.axis("spectral_norm", dim, weight.ndim)
        self.n_power_iterations, self.eps = n_power_iterations, eps
        if weight.ndim > 1:
            matrix = maths.as_matrix(weight.detach(), self.dim)
            u, v = (F.normalize(torch.randn_like(side), dim=0, eps=eps) for side in (matrix[:, 0], matrix[0]))
            u, v = maths.power_iteration(matrix, u, v, WARM_START, eps)
            self.register_buffer("_u", u)
            self.register_buffer("_v", v)

    def forward(self, weight: Tensor) -> Tensor:
        if weight.ndim == 1:
            return F.normalize(weight, dim=0, eps=self.eps)
        if self.training:
            matrix = maths.as_matrix(weight.detach(), self.dim)
            u, v = maths.power_iteration(matrix, self._u, self._v, self.n_power_iterations, self.eps)
            self._u.copy_(u)
            self._v.copy_(v)
        # Clones: a second forward pass before the backward (D(real) - D(fake)) would change what autograd saved.
        return maths.spectral_norm(weight, self._u.clone(), self._v.clone(), self.dim)

    def right_inverse(self, weight: Tensor) -> Tensor:
        """Return ``weight``: what is assigned is what is trained."""
        return weight

    def extra_repr(self) -> str:
        return f"n_power_iterations={self.n_power_iterations}, dim={self.dim}, eps={self.eps}"


def weight_norm(module: nn.Module, name: str = "weight", dim: int | None = 0) -> nn.Module:
    """Train ``module``'s weight as length and direction: see :class:`WeightNorm`.

    Returns the module, whose ``weight`` is now computed by
    :func:`handbook_src.functional.weight_norm`.
    ``dim=-1`` is the last axis here, as everywhere else; torch's function takes it for
    ``None``, the whole weight. ``torch.nn.utils.parametrize.remove_parametrizations``
    folds the product back into one weight.

    Args:
        module: the layer, changed in place.
        name: which of its parameters.
        dim: the axis with one length an entry; ``None`` for one length in all.

    Raises:
        ConfigError: no such parameter or axis, one that is parametrised already, or a unit whose weights are all zero.

    Source:
        Salimans & Kingma 2016, eq. 2, arXiv:1602.07868
    """
    weight = _parameter("weight_norm", module, name)
    if parametrize.is_parametrized(module, name):  # only the first of a chain may split its weight in two
        chain = module.get_submodule(f"parametrizations.{name}")
        raise ConfigError(
            "weight_norm name",
            got=f"{name!r}, already under {[type(p).__name__ for p in chain.children()]}",
            want="a parameter without parametrisation",
            remedy="Call weight_norm first, or torch.nn.utils.parametrize.remove_parametrizations before it.",
        )
    if dim is not None:
        maths.axis("weight_norm", dim, weight.ndim)
    parametrize.register_parametrization(module, name, WeightNorm(dim), unsafe=True)
    return module


def spectral_norm(
    module: nn.Module,
    name: str = "weight",
    n_power_iterations: int = 1,
    eps: float = 1e-12,
    dim: int | None = None,
) -> nn.Module:
    """Divide ``module``'s weight by its largest singular value: see :class:`SpectralNorm`.

    Returns the module, whose ``weight`` is now computed by
    :func:`handbook_src.functional.spectral_norm`.

    Args:
        module: the layer, changed in place.
        name: which of its parameters.
        n_power_iterations: steps of the power method each time the weight is used in training.
        eps: the smallest length divided by.
        dim: the axis of the outputs; ``None`` is 0, and 1 for transposed convolutions.  Torch's own
            ``spectral_norm`` knows only torch's classes: give it ``dim=1`` for ours.

    Raises:
        ConfigError: no such parameter or axis, no iterations, ``eps`` not positive, or a weight of zeros.

    Source:
        Miyato et al. 2018, eq. 8 and algorithm 1, arXiv:1802.05957
    """
    weight = _parameter("spectral_norm", module, name)
    if dim is None:
        dim = 1 if getattr(module, "transposed", False) else 0  # said by every convolution, torch's and ours
    parametrize.register_parametrization(module, name, SpectralNorm(weight, n_power_iterations, dim, eps))
    return module


def _parameter(op: str, module: nn.Module, name: str) -> Tensor:
    weight = getattr(module, name, None)
    if not isinstance(weight, Tensor):
        raise ConfigError(
            f"{op} name",
            got=repr(name),
            want=f"one of {[n for n, _ in module.named_parameters(recurse=False)]}",
            remedy=f"{type(module).__name__} has no such parameter; containers have none of their own.",
        )
    return weight
