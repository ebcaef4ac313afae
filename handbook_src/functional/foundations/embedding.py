"""Looking up rows of a table by token, with torch's options and torch's gradients."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from handbook_src.check import check_floating, check_positive
from handbook_src.dispatch import Backend, resolve
from handbook_src.errors import ConfigError, ShapeError
from handbook_src.precision import statistic_dtype


def embedding(
    input: Int[Tensor, "*lead"],
    weight: Float[Tensor, "v d"],
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
    *,
    backend: Backend = "auto",
) -> Float[Tensor, "*lead d"]:
    r"""Return the row of the table that each token names.

    .. math:: y_t = E_{w_t} = \mathrm{onehot}(w_t)\, E, \qquad
        \frac{\partial L}{\partial E_v} = \sum_{t\,:\,w_t = v} \frac{\partial L}{\partial y_t}

    With ``max_norm`` the looked-up rows that are longer are shortened first, **in place**, by
    :math:`m / (\lVert E_v \rVert_p + 10^{-7})`, as in torch: the table changes in the forward
    pass, also in evaluation, and the gradient does not see it.

    Args:
        input: token numbers, of int32 or int64; any axes.
        weight: the table, one row for each token.
        padding_idx: the token whose row gets no gradient; negative counts from the end.
        max_norm: largest length of a row that is looked up.
        norm_type: the ``p`` of that length.
        scale_grad_by_freq: divide each row's gradient by how often its token stands in ``input``.
        sparse: the gradient of ``weight`` is a sparse tensor of the looked-up rows.
        backend: ``auto`` is torch's own operation.

    Raises:
        ConfigError: ``padding_idx`` is not a row, ``max_norm`` or ``norm_type`` is not positive, or
            ``sparse`` with ``scale_grad_by_freq``, which torch does not compute either.
        ShapeError: ``input`` holds no int32 or int64, or a token outside the table (on GPUs that is found
            by the reference alone: looking would wait for the device).

    Source:
        Bengio et al. 2003, section 2, JMLR 3; Mikolov et al. 2013, section 3.1, arXiv:1301.3781
    """
    check_table(weight)
    rows = weight.shape[0]
    padding_idx = check_settings("embedding", rows, padding_idx, max_norm, norm_type, scale_grad_by_freq, sparse)
    check_tokens(input, weight)
    if sparse and input.ndim == 0:  # torch's backward of one token alone fails with a padding row
        row = embedding(input[None], weight, padding_idx, max_norm, norm_type, False, True, backend=backend)
        return row[0]
    if resolve("embedding", backend, {"torch": None, "reference": None}) == "torch":
        try:
            return F.embedding(input, weight, padding_idx, max_norm, norm_type, scale_grad_by_freq, sparse)
        except IndexError:
            check_range(input, rows)
            raise
    check_range(input, rows)
    if max_norm is not None:
        renormalise_(weight, input, max_norm, norm_type)
    rows_out: Tensor = _Lookup.apply(input, weight, padding_idx, scale_grad_by_freq, sparse)
    return rows_out


def renormalise_(weight: Float[Tensor, "v d"], input: Int[Tensor, "*lead"], max_norm: float, norm_type: float) -> None:
    """Shorten, in place, the rows named in ``input`` that are longer than ``max_norm``."""
    with torch.no_grad():
        tokens = input.unique()
        wide = weight[tokens].to(statistic_dtype(weight))
        length = torch.linalg.vector_norm(wide, norm_type, dim=1, keepdim=True)
        shorter = torch.where(length > max_norm, wide * (max_norm / (length + 1e-7)), wide)
        weight[tokens] = shorter.to(weight.dtype)


class _Lookup(torch.autograd.Function):
    """Rows out; the gradient is the sum over the places where a token stands, written out."""

    @staticmethod
    def forward(input: Tensor, weight: Tensor, padding_idx: int | None, by_freq: bool, sparse: bool) -> Tensor:
        return weight[input]

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        tokens, weight, ctx.padding_idx, ctx.by_freq, ctx.sparse = inputs
        ctx.shape = weight.shape
        ctx.save_for_backward(tokens)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        tokens = ctx.saved_tensors[0].flatten().long()
        g = grads[0].reshape(len(tokens), ctx.shape[1])
        if ctx.padding_idx is not None:
            g = g * (tokens != ctx.padding_idx)[:, None]
        if ctx.by_freq:
            g = g / torch.bincount(tokens, minlength=ctx.shape[0])[tokens][:, None]
        if ctx.sparse:
            kept = slice(None) if ctx.padding_idx is None else tokens != ctx.padding_idx
            table = torch.sparse_coo_tensor(tokens[kept][None], g[kept], ctx.shape, check_invariants=False)
        else:
            table = g.new_zeros(ctx.shape).index_add(0, tokens, g)
        return None, table, None, None, None


def check_settings(
    op: str,
    rows: int,
    padding_idx: int | None,
    max_norm: float | None,
    norm_type: float,
    scale_grad_by_freq: bool,
    sparse: bool,
) -> int | None:
    """Check the options of a table of ``rows`` and return ``padding_idx`` counted from the start.

    Raises:
        ConfigError: one of them cannot work.
    """
    if max_norm is not None:
        check_positive(op, "max_norm", max_norm)
        if norm_type != float("inf"):
            check_positive(op, "norm_type", norm_type)
    if sparse and scale_grad_by_freq:
        raise ConfigError(
            f"{op} sparse",
            got="sparse=True with scale_grad_by_freq=True",
            want="one of the two",
            remedy="Sparse gradients are not scaled by frequency; scale the learning rate instead.",
        )
    if padding_idx is None:
        return None
    if isinstance(padding_idx, bool) or not isinstance(padding_idx, int) or not -rows <= padding_idx < rows:
        raise ConfigError(
            f"{op} padding_idx",
            got=repr(padding_idx),
            want=f"a row from {-rows} to {rows - 1}",
            remedy="Pass None for no padding token.",
        )
    return padding_idx % rows


def check_table(weight: Tensor) -> None:
    """Check that ``weight`` is a floating matrix.

    Raises:
        ShapeError: it is not.
    """
    check_floating("embedding weight", weight)
    if weight.ndim != 2:
        raise ShapeError(
            "embedding weight",
            got=tuple(weight.shape),
            want="two axes, (tokens, features)",
            remedy="One row for each token; reshape the rest away.",
        )


def check_tokens(input: Tensor, weight: Tensor) -> None:
    """Check that ``input`` holds int32 or int64, on the table's device.

    Raises:
        ShapeError: it does not.
    """
    if input.dtype not in (torch.int64, torch.int32):
        raise ShapeError(
            "embedding input dtype",
            got=input.dtype,
            want="torch.int64 or torch.int32, token numbers",
            remedy="Convert with .long(); vectors need a linear layer instead.",
        )
    if input.device != weight.device:
        raise ShapeError(
            "embedding input device",
            got=input.device,
            want=f"{weight.device}, where the table is",
            remedy="Move one of them with .to(device).",
        )


def check_range(input: Tensor, rows: int) -> None:
    """Check that every token names one of ``rows``; nothing is looked at under torch.compile.

    Raises:
        ShapeError: one does not.
    """
    if input.numel() == 0 or input.is_meta or torch.compiler.is_compiling():
        return
    low, high = (int(t) for t in input.aminmax())
    if low < 0 or high >= rows:
        raise ShapeError(
            "embedding input",
            got=f"token {low if low < 0 else high}",
            want=f"tokens from 0 to {rows - 1}",
            remedy=f"Tokenise with the vocabulary that the table was made for; a position has {rows} rows, too.",
        )
