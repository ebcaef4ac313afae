"""The digits: their size, their split, their scale, and what is refused."""

from __future__ import annotations

import sys

import pytest
import torch

from handbook_src.data.digits import digits
from handbook_src.errors import ConfigError, DataError
from handbook_src.testing import refuses


def test_split_covers_every_image_once() -> None:
    data = digits()
    assert data.train_x.shape == (1348, 64)
    assert data.test_x.shape == (449, 64)
    both = torch.cat([data.train_x, data.test_x])
    from sklearn.datasets import load_digits

    raw = torch.as_tensor(load_digits().data)
    assert len(both.unique(dim=0)) == len(raw.unique(dim=0))
    assert torch.bincount(torch.cat([data.train_y, data.test_y])).sum() == 1797


def test_labels_follow_their_images() -> None:
    from sklearn.datasets import load_digits

    raw = load_digits()
    label = {bytes(row.astype("uint8")): y for row, y in zip(raw.data, raw.target, strict=True)}
    data = digits(seed=3)
    scaled = data.test_x * 1.0
    lo, hi = data.train_x.min(), data.train_x.max()  # pixels 0 and 16
    pixels = ((scaled - lo) / (hi - lo) * 16).round()
    for row, y in zip(pixels, data.test_y, strict=True):
        assert label[bytes(row.to(torch.uint8).numpy())] == y


def test_standardised_by_the_training_part() -> None:
    data = digits()
    assert abs(data.train_x.mean()) < 1e-5
    assert abs(data.train_x.std() - 1) < 1e-5
    assert abs(data.test_x.mean()) > 1e-5  # the test part has no say in the scale


def test_same_seed_same_split_other_seed_other_split() -> None:
    a, b, c = digits(seed=1), digits(seed=1), digits(seed=2)
    assert torch.equal(a.test_x, b.test_x)
    assert not torch.equal(a.test_y, c.test_y)


def test_images_are_the_vectors_folded() -> None:
    flat, image = digits(), digits(images=True)
    assert image.train_x.shape == (1348, 1, 8, 8)
    assert torch.equal(image.train_x.flatten(1), flat.train_x)


@pytest.mark.parametrize("fraction", [0.0, 1.0, -0.5])
def test_refuses_an_empty_part(fraction: float) -> None:
    with refuses(ConfigError, "test_fraction", fraction):
        digits(fraction)


def test_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with refuses(DataError, "scikit-learn", "pip install"):
        digits()
