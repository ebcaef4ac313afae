"""Losses of language models."""

from __future__ import annotations

from typing import Literal

from jaxtyping import Float, Int
from torch import Tensor

from handbook_src.errors import ConfigError, ShapeError
from handbook_src.functional.losses.cross_entropy import cross_entropy

Reduction = Literal["mean", "sum", "none"]


def causal_lm_loss(
    logits: Float[Tensor, "b t v"],
    tokens: Int[Tensor, "b t"],
    *,
    ignore_index: int = -100,
    reduction: Reduction = "mean",
) -> Float[Tensor, "*loss"]:
    r"""Score each position's logits against the token that comes next.

    .. math::
        \mathcal L = -\frac{1}{|M|} \sum_{(b, t) \in M}
        \log \operatorname{softmax}(z_{b, t})_{w_{b, t+1}},
        \qquad M = \{(b, t) : t < T,\ w_{b, t+1} \ne \text{ignore}\}

    The shift happens here: pass the model's input as ``tokens``, unshifted.
    The log-softmax is computed in float32 at least, whatever the dtype.
    The mean is over the counted tokens of the whole batch; with none to
    count it is 0, not NaN.

    Args:
        logits: one row of scores a position, from the model.
        tokens: the text the model read; ``ignore_index`` where a token is
            not to be predicted.
        ignore_index: marks padding, or a prompt not to be learned.
        reduction: ``mean`` over counted tokens, ``sum``, or ``none`` for a
            ``b t-1`` tensor.

    Raises:
        ConfigError: the reduction is not one of the three.
        ShapeError: logits and tokens don't match, tokens that are no integers, or nothing to predict.
        DataError: on a CPU, a token outside the vocabulary.

    Shape:
        ``logits``: ``b t v``; ``tokens``: ``b t``; a scalar, or ``b t-1``
        for ``none``.

    Typical values:
        ``log v`` at initialisation (10.8 for GPT-2's 50257); about 3 for a
        trained GPT-2 124M on web text.

    Source:
        Radford et al. 2018, eq. 1 (as a likelihood); Radford et al. 2019,
        eq. 1
    """
    if reduction not in ("mean", "sum", "none"):
        raise ConfigError(
            "causal_lm_loss reduction",
            got=repr(reduction),
            want="'mean', 'sum' or 'none'",
            remedy="Use 'mean' to train.",
        )
    fits = logits.ndim == 3 and logits.shape[:2] == tokens.shape
    if not fits or tokens.shape[1] < 2:
        raise ShapeError(
            "causal_lm_loss logits and tokens",
            got=f"{tuple(logits.shape)} and {tuple(tokens.shape)}",
            want="b t v and b t with t of at least 2",
            remedy="Pass the tokens the model read, unshifted.",
        )
    z, target = logits[:, :-1], tokens[:, 1:]
    if z.element_size() < 4:
        z = z.float()
    loss = cross_entropy(z.flatten(0, 1), target.flatten(), ignore_index, reduction="none")
    if reduction == "none":
        return loss.view(target.shape)
    total = loss.sum()
    if reduction == "sum":
        return total
    return total / (target != ignore_index).sum().clamp_min(1)
