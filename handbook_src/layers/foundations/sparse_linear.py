"""Linear layers with few weights: a mask to train with, CSR and 2:4 to store and run."""

from __future__ import annotations

from typing import Any, final

import torch
from torch import Tensor, nn

from handbook_src.check import check_size
from handbook_src.dispatch import Backend
from handbook_src.errors import ConfigError
from handbook_src.functional.foundations import sparse_linear as maths
from handbook_src.layers.foundations.linear import reset_uniform


@final
class SparseLinear(nn.Module):
    r"""A linear layer through a mask: see :func:`handbook_src.functional.sparse_linear`.

    The mask is a buffer beside the dense ``weight``: fixed, drawn at random, or set from the
    trained weights by :meth:`prune` and :meth:`prune_semi_structured`.  Masked weights keep their
    place in memory and get no gradient; :meth:`to_csr` and :meth:`to_semi_structured` store the others alone.

    Args:
        in_features: features of the input.
        out_features: features of the output.
        bias: add a learned number to each output.
        device: of the parameters.
        dtype: of the parameters.
        mask: True where a weight is kept, ``(out_features, in_features)``.
        sparsity: share of the weights that a random mask removes, from torch's generator; 0 keeps all.
        backend: who runs the product.

    Shape:
        ``(..., in_features)`` to ``(..., out_features)``.

    Typical values:
        ``sparsity`` 0.8 to 0.95 without structure (Hoefler et al. 2021); 0.5 in 2:4.

    Raises:
        ConfigError: a size is not a positive integer, ``sparsity`` is not a share, or ``mask`` and ``sparsity`` both.
        ShapeError: the mask or the input does not fit.

    Source:
        Hoefler et al. 2021, section 2, arXiv:2102.00554; Han, Pool, Tran & Dally 2015, section 3, arXiv:1506.02626
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        mask: Tensor | None = None,
        sparsity: float = 0.0,
        backend: Backend = "auto",
    ) -> None:
        super().__init__()
        check_size("SparseLinear", "in_features", in_features)
        check_size("SparseLinear", "out_features", out_features)
        maths.check_share("SparseLinear", "sparsity", sparsity)
        if mask is not None and sparsity:
            raise ConfigError(
                "SparseLinear mask", got=f"a mask and sparsity={sparsity}", want="one of them", remedy="Drop sparsity."
            )
        self.in_features, self.out_features, self.backend = in_features, out_features, backend
        self.weight = nn.Parameter(torch.empty(out_features, in_features, device=device, dtype=dtype))
        self.register_parameter("bias", None)
        if bias:
            self.bias = nn.Parameter(torch.empty(out_features, device=device, dtype=dtype))
        self.mask: Tensor
        self.register_buffer("mask", torch.ones(self.weight.shape, dtype=torch.bool, device=device))
        self.reset_parameters()
        if mask is not None:
            maths.check_mask("SparseLinear", mask, tuple(self.weight.shape))
            self.mask.copy_(mask)
        elif sparsity:
            self.mask.copy_(maths.magnitude_mask(torch.rand_like(self.weight, dtype=torch.float32), sparsity))

    def reset_parameters(self) -> None:
        """Draw weight and bias as :class:`handbook_src.layers.Linear` does; the mask stays."""
        reset_uniform(self.weight, self.bias, self.in_features)

    @property
    def sparsity(self) -> float:
        """The share of the weights that the mask removes."""
        return 1.0 - self.mask.double().mean().item()

    @property
    def masked_weight(self) -> Tensor:
        """The weight with zeros where the mask removes."""
        return maths.masked("SparseLinear", self.weight, self.mask)

    def prune(self, amount: float) -> None:
        """Remove the smallest weights until ``amount`` of all are gone; what is removed never comes back.

        Raises:
            ConfigError: ``amount`` is not a share from 0 to 1.
        """
        self.mask.copy_(maths.magnitude_mask(self.weight, amount, self.mask))

    def prune_semi_structured(self) -> None:
        """Keep the two largest weights of each four along the input axis.

        Raises:
            ShapeError: ``in_features`` is no multiple of 4.
        """
        self.mask.copy_(maths.semi_structured_mask(self.masked_weight) & self.mask)

    @torch.no_grad()
    def to_csr(self) -> CSRLinear:
        """Return a layer for inference that stores the kept weights in compressed sparse rows."""
        return CSRLinear(self.masked_weight, self.bias)

    @torch.no_grad()
    def to_semi_structured(self) -> SemiStructuredLinear:
        """Return a layer for inference that stores two of each four weights and their places.

        Raises:
            ShapeError: the mask keeps more than two of some four neighbours.
        """
        return SemiStructuredLinear(self.masked_weight, self.bias)

    def forward(self, input: Tensor) -> Tensor:
        return maths.sparse_linear(input, self.weight, self.mask, self.bias, backend=self.backend)

    def extra_repr(self) -> str:
        sizes = f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"
        return sizes if self.mask.is_meta else f"{sizes}, sparsity={self.sparsity:.3g}"


@final
class CSRLinear(nn.Module):
    r"""A fixed linear layer in compressed sparse rows: see :func:`handbook_src.functional.csr_linear`.

    Row pointers, column numbers and values are plain buffers, so that the layer copies and moves
    like any other.  A state dict loads into a layer with as many stored weights.
    ``torch.compile`` traces no sparse tensors: leave the layer out of a
    compiled model by ``torch.compiler.disable(layer)``.

    Args:
        weight: dense, its zeros are left out.
        bias: one number for each output.

    Shape:
        ``(..., in_features)`` to ``(..., out_features)``.

    Raises:
        ShapeError: ``weight``, ``bias`` or the input does not fit.

    Source:
        Hoefler et al. 2021, section 2.2, arXiv:2102.00554
    """

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        super().__init__()
        stored = maths.to_csr(weight)
        self.out_features, self.in_features = stored.shape
        self.rows: Tensor
        self.columns: Tensor
        self.values: Tensor
        self.bias: Tensor | None
        self.register_buffer("rows", stored.crow_indices())
        self.register_buffer("columns", stored.col_indices())
        self.register_buffer("values", stored.values())
        self.register_buffer("bias", None if bias is None else bias.detach().clone())

    def forward(self, input: Tensor) -> Tensor:
        shape = (self.out_features, self.in_features)
        return maths.csr_linear(input, maths.csr(self.rows, self.columns, self.values, shape), self.bias)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, stored={len(self.values)}"


@final
class SemiStructuredLinear(nn.Module):
    r"""A fixed 2:4 layer: see :func:`handbook_src.functional.semi_structured_linear`.

    Args:
        weight: dense, at most two nonzeros in each four neighbours along the input axis.
        bias: one number for each output.

    Shape:
        ``(..., in_features)`` to ``(..., out_features)``.

    Raises:
        ShapeError: ``weight`` is not 2:4, or ``bias`` or the input does not fit.

    Source:
        Mishra et al. 2021, section 3, arXiv:2104.08378
    """

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        super().__init__()
        values, places = maths.pack_semi_structured(weight.detach())
        self.out_features, self.in_features = weight.shape
        self.values: Tensor
        self.places: Tensor
        self.bias: Tensor | None
        self.register_buffer("values", values)
        self.register_buffer("places", places)
        self.register_buffer("bias", None if bias is None else bias.detach().clone())

    def forward(self, input: Tensor) -> Tensor:
        return maths.semi_structured_linear(input, self.values, self.places, self.bias)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}"
