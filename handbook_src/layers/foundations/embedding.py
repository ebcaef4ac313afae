"""The embedding table with torch's names, arguments, initialisation and state dict."""

from __future__ import annotations

from typing import Any, final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from handbook_src.check import check_parameter_dtype, check_size
from handbook_src.dispatch import Backend
from handbook_src.functional.foundations import embedding as maths


@final
class Embedding(nn.Module):
    r"""Look up one learned vector for each token: see :func:`handbook_src.functional.embedding`.

    ``backend`` is an attribute, ``"auto"`` at first.  A table that exists already goes
    through :meth:`from_pretrained`.

    Args:
        num_embeddings: rows of the table, one for each token.
        embedding_dim: features of a row.
        padding_idx: the token whose row is zero at the start and gets no gradient; negative counts from the end.
        max_norm: rows are shortened to this length, in place, when they are looked up.
        norm_type: the ``p`` of that length.
        scale_grad_by_freq: divide each row's gradient by how often its token stands in the batch.
        sparse: the gradient is sparse; SGD, SparseAdam and Adagrad take it.
        device: of the table.
        dtype: of the table.

    Shape:
        tokens ``(...)`` to ``(..., embedding_dim)``.

    Typical values:
        Standard deviation 0.02 at the start in GPT-2 and BERT, 1 in torch and here; 768 features and 50,257 rows
        in GPT-2.

    Raises:
        ConfigError: a size is not a positive integer, or the options cannot work.
        ShapeError: the tokens are not int32 or int64, or name no row.

    Source:
        Bengio et al. 2003, section 2, JMLR 3; Mikolov et al. 2013, section 3.1, arXiv:1301.3781
    """

    backend: Backend = "auto"

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        padding_idx: int | None = None,
        max_norm: float | None = None,
        norm_type: float = 2.0,
        scale_grad_by_freq: bool = False,
        sparse: bool = False,
        *,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_size("Embedding", "num_embeddings", num_embeddings)
        check_size("Embedding", "embedding_dim", embedding_dim)
        check_parameter_dtype("Embedding", dtype)
        self.num_embeddings, self.embedding_dim = num_embeddings, embedding_dim
        self.padding_idx = maths.check_settings(
            "Embedding", num_embeddings, padding_idx, max_norm, norm_type, scale_grad_by_freq, sparse
        )
        self.max_norm, self.norm_type = max_norm, norm_type
        self.scale_grad_by_freq, self.sparse = scale_grad_by_freq, sparse
        self.weight = nn.Parameter(torch.empty(num_embeddings, embedding_dim, device=device, dtype=dtype))
        self.reset_parameters()

    @classmethod
    def from_pretrained(
        cls,
        embeddings: Tensor,
        freeze: bool = True,
        padding_idx: int | None = None,
        max_norm: float | None = None,
        norm_type: float = 2.0,
        scale_grad_by_freq: bool = False,
        sparse: bool = False,
    ) -> Embedding:
        """Return a layer over the table ``embeddings``, whose memory it shares.

        Args:
            embeddings: the table; a padding row is left as it is.
            freeze: do not train it.
            padding_idx: as in the constructor.
            max_norm: as in the constructor; it shortens rows of a frozen table, too.
            norm_type: as in the constructor.
            scale_grad_by_freq: as in the constructor.
            sparse: as in the constructor.

        Raises:
            ConfigError: the table is empty, or the options cannot work.
            ShapeError: ``embeddings`` is not a floating matrix.
        """
        maths.check_table(embeddings)
        rows, dim = embeddings.shape
        layer = cls(rows, dim, padding_idx, max_norm, norm_type, scale_grad_by_freq, sparse, device="meta")
        layer.weight = nn.Parameter(embeddings.detach(), requires_grad=not freeze)
        return layer

    def reset_parameters(self) -> None:
        """Draw the table from N(0, 1) and set the padding row to zero."""
        nn.init.normal_(self.weight)
        if self.padding_idx is not None:
            with torch.no_grad():
                self.weight[self.padding_idx].fill_(0)

    def forward(self, input: Tensor) -> Tensor:
        options = self.padding_idx, self.max_norm, self.norm_type, self.scale_grad_by_freq, self.sparse
        if self.backend == "auto" and not self.sparse and input.is_meta == self.weight.is_meta:
            # Checked after a refusal only: looking at every token takes longer than looking it up.
            try:
                return F.embedding(input, self.weight, *options)
            except (RuntimeError, IndexError):
                maths.check_tokens(input, self.weight)
                maths.check_range(input, self.num_embeddings)
                raise
        return maths.embedding(input, self.weight, *options, backend=self.backend)

    def extra_repr(self) -> str:
        said = f"{self.num_embeddings}, {self.embedding_dim}"
        defaults = {"padding_idx": None, "max_norm": None, "norm_type": 2.0, "scale_grad_by_freq": False,
                    "sparse": False}  # fmt: skip
        return said + "".join(f", {k}={getattr(self, k)}" for k, v in defaults.items() if getattr(self, k) != v)
