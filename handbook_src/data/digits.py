"""Handwritten digits that scikit-learn carries: 1797 images of 8 x 8 pixels, no download."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from handbook_src.errors import ConfigError, DataError


@dataclass(frozen=True)
class Digits:
    """A training and a test part; pixels standardised by the training part's mean and deviation.

    Example:
        >>> data = digits()  # doctest: +SKIP
        >>> data.train_x.shape, data.test_y.shape  # doctest: +SKIP
        (torch.Size([1348, 64]), torch.Size([449]))
    """

    train_x: Float[Tensor, "n ..."]
    train_y: Int[Tensor, " n"]
    test_x: Float[Tensor, "m ..."]
    test_y: Int[Tensor, " m"]
    classes: int = 10


def digits(test_fraction: float = 0.25, *, images: bool = False, seed: int = 0, device: str = "cpu") -> Digits:
    """Return scikit-learn's digits, shuffled by ``seed``, split and standardised.

    One mean and one deviation serve all pixels: a border pixel that is 0 in nearly
    every image has almost no deviation of its own, and dividing by it makes outliers.

    Args:
        test_fraction: share of the samples held out.
        images: give ``n 1 8 8`` images instead of ``n 64`` vectors.
        seed: of the shuffle; the same seed gives the same split everywhere.
        device: where the tensors go.

    Raises:
        ConfigError: ``test_fraction`` leaves one part empty.
        DataError: scikit-learn is not installed.

    Source:
        Alpaydin & Kaynak 1998, UCI "Optical Recognition of Handwritten Digits", test set.
    """
    if not 0.0 < test_fraction < 1.0:
        raise ConfigError(
            "digits test_fraction",
            got=test_fraction,
            want="a share between 0 and 1",
            remedy="0.25 holds out 449 images.",
        )
    raw = _sklearn_datasets().load_digits()
    x = torch.as_tensor(raw.data, dtype=torch.float32)
    y = torch.as_tensor(raw.target, dtype=torch.long)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))
    held_out = round(test_fraction * len(x))
    train, test = order[held_out:], order[:held_out]
    std, mean = torch.std_mean(x[train])
    x = (x - mean) / std
    if images:
        x = x.view(-1, 1, 8, 8)
    x, y, train, test = x.to(device), y.to(device), train.to(device), test.to(device)
    return Digits(x[train], y[train], x[test], y[test])


def _sklearn_datasets() -> Any:
    try:
        return importlib.import_module("sklearn.datasets")
    except ImportError as e:
        raise DataError(
            "the digits data set",
            got=f"no scikit-learn ({e})",
            want="scikit-learn, which carries the images",
            remedy="pip install scikit-learn, or pip install 'handbook-src[book]'.",
        ) from e
