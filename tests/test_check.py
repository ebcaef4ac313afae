"""Each shared check lets the right thing pass and names the wrong one."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from handbook_src import check
from handbook_src.errors import ConfigError, HandbookError, ShapeError
from handbook_src.functional.attention.alignment import additive_attention, multiplicative_attention
from handbook_src.functional.attention.attention import scaled_dot_product_attention
from handbook_src.functional.attention.axial_attention import shift
from handbook_src.functional.attention.differential_attention import differential_lambda
from handbook_src.functional.attention.flash_attention import flash_attention, flash_attention_varlen
from handbook_src.functional.attention.flash_decode import paged_decode_attention
from handbook_src.functional.attention.grouped_query import mean_pool_heads
from handbook_src.functional.attention.knn_lm import knn_probabilities
from handbook_src.functional.attention.lsh_attention import lsh_attention, lsh_buckets, lsh_rotations
from handbook_src.functional.attention.mla import latent_attention_flops
from handbook_src.functional.attention.rag import rag_token
from handbook_src.functional.attention.rollout import attention_rollout
from handbook_src.functional.compression.quantize import quantize
from handbook_src.layers.attention.kv_cache import AppendCache
from handbook_src.layers.attention.memorizing import KNNMemory, MemorizingAttention
from handbook_src.layers.attention.mla import LatentCache
from handbook_src.layers.attention.paged_kv_cache import PagePool
from handbook_src.testing import refuses


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.complex64])
def test_only_floating_tensors_pass(dtype):
    check.check_floating("op", torch.ones(2), None, torch.ones(2, dtype=torch.bfloat16))
    with refuses(ShapeError, "op", dtype):
        check.check_floating("op", torch.ones(2), torch.ones(2, dtype=dtype))


def test_one_dtype():
    check.check_one_dtype("op", torch.ones(2), torch.ones(3))
    with refuses(ShapeError, "op", "torch.float64", "torch.float32"):
        check.check_one_dtype("op", torch.ones(2), torch.ones(3), torch.ones(2).double())


@pytest.mark.parametrize(("axis", "shape"), [(-1, (2, 4)), (1, (2, 4, 7)), (-3, (4, 5, 6)), (0, (4,))])
def test_features_stand_on_their_axis(axis, shape):
    check.check_features("op", torch.ones(shape), 4, axis=axis)
    with refuses(ShapeError, "op", tuple(shape), 3):
        check.check_features("op", torch.ones(shape), 3, axis=axis)


@pytest.mark.parametrize("axis", [-1, 0, 1, -2])
def test_a_scalar_has_no_features(axis):
    with refuses(ShapeError, "()"):
        check.check_features("op", torch.tensor(1.0), 1, axis=axis)


def test_ranks():
    check.check_rank("op", torch.ones(1, 2, 3), [2, 3], "(channels, length), with or without a batch")
    with refuses(ShapeError, "4 axes", "2 or 3"):
        check.check_rank("op", torch.ones(1, 2, 3, 4), [2, 3], "(channels, length)")


@pytest.mark.parametrize("value", [0, -1, 1.5, True, "2", None])
def test_sizes(value):
    check.check_size("op", "size", 1)
    check.check_size("op", "size", 0, least=0)
    with refuses(ConfigError, "op size", repr(value)):
        check.check_size("op", "size", value)


@pytest.mark.parametrize("value", [0, -0.5, float("nan"), float("inf"), True, None])
def test_positive_numbers(value):
    check.check_positive("op", "scale", 0.5)
    with refuses(ConfigError, "op scale", repr(value)):
        check.check_positive("op", "scale", value)


@pytest.mark.parametrize("value", [-0.1, 1.0, 1.1, float("nan"), "0.5", None, True, False])
def test_probabilities(value):
    check.check_probability("op", "p", 0.0)
    check.check_probability("op", "p", 1.0, below_one=False)
    with refuses(ConfigError, "op p", repr(value)):
        check.check_probability("op", "p", value)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), True, None, "1"])
def test_finite_numbers(value):
    check.check_finite("op", "slope", -1)
    check.check_finite("op", "slope", 0.5)
    with refuses(ConfigError, "op slope", repr(value)):
        check.check_finite("op", "slope", value)


def test_one_integer_serves_all_axes():
    assert check.as_tuple("op", "stride", 2, 3) == (2, 2, 2)
    assert check.as_tuple("op", "stride", (1, 2), 2) == (1, 2)
    assert check.as_tuple("op", "stride", [2], 2) == (2, 2)
    assert check.as_tuple("op", "padding", 0, 2, least=0) == (0, 0)


@pytest.mark.parametrize("value", [(1, 2, 3), (), 0, (1, 0), 1.5, "2", (True, 1), None])
def test_other_counts_are_refused(value):
    with refuses(ConfigError, "op stride"):
        check.as_tuple("op", "stride", value, 2)


def test_one_device_and_dtypes_that_are_none() -> None:
    x = torch.zeros(1)
    check.check_one_device("op", x, x)
    with refuses(ShapeError, "meta", "cpu"):
        check.check_one_device("op", x, x.to("meta"))
    for dtype in ("float32", 5):
        with refuses(ConfigError, dtype):
            check.check_parameter_dtype("op", dtype)


@pytest.mark.parametrize("wrong", [None, 3, 2.5, "x", [1.0], ()])
def test_what_is_no_tensor_is_named(wrong):
    check.check_tensors("op", torch.ones(2), torch.ones(0))
    for call in (
        lambda: check.check_tensors("op", torch.ones(2), wrong),
        lambda: check.check_one_dtype("op", torch.ones(2), wrong),
        lambda: check.check_one_device("op", wrong),
        lambda: check.check_features("op", wrong, 4),
        lambda: check.check_rank("op", wrong, (3,), "axes"),
    ):
        with refuses(ConfigError, "op", type(wrong).__name__, "tensors"):
            call()
    if wrong is not None:
        with refuses(ConfigError, "op", type(wrong).__name__):
            check.check_floating("op", wrong)


X, QKV = torch.randn(2, 6, 8), torch.randn(2, 6, 2, 4)
NO_TENSORS: dict[str, Callable[[object], object]] = {
    "sdpa": lambda x: scaled_dot_product_attention(QKV, x, QKV),
    "flash": lambda x: flash_attention(QKV, QKV, QKV, alibi=x),
    "varlen": lambda x: flash_attention_varlen(QKV[0], x, QKV[0], torch.tensor([0, 6])),
    "edges": lambda x: flash_attention_varlen(QKV[0], QKV[0], QKV[0], x),
    "decode": lambda x: paged_decode_attention(QKV[:, 0], QKV, QKV, torch.zeros(2, 1, dtype=torch.int32), x),
    "additive": lambda x: additive_attention(X, X, X, x),
    "multiplicative": lambda x: multiplicative_attention(X, x, X),
    "its mask": lambda x: multiplicative_attention(X, X, X, mask=x),
    "buckets": lambda x: lsh_buckets(x, lsh_rotations(2, 2, 4, 4)),
    "lsh": lambda x: lsh_attention(QKV, x, lsh_rotations(2, 2, 4, 4)),
    "lambda": lambda x: differential_lambda(X[0, 0], x, X[0, 0], X[0, 0], 0.5),
    "its start": lambda x: differential_lambda(X[0, 0], X[0, 0], X[0, 0], X[0, 0], x),
    "pooled heads": lambda x: mean_pool_heads(x, 4, 2),
    "quantize": lambda x: quantize(x),
    "neighbours": lambda x: knn_probabilities(X[0], x, 9),
    "rag": lambda x: rag_token(X[:, :3, 0], X[:, :3, :4], x),
    "shift": lambda x: shift(x, 0),
    "rollout": lambda x: attention_rollout(x),
    "flops": lambda x: latent_attention_flops(x, 2, 2, e=1, r=1, c=1, w=1),
    "cache": lambda x: AppendCache().update(QKV, x),
    "paged": lambda x: PagePool(4).take(x),
    "memory": lambda x: KNNMemory(4).add(QKV, x),
    "its layer": lambda x: MemorizingAttention(8, 2)(x),
    "layer's memory": lambda x: MemorizingAttention(8, 2)(X, x),
    "latents": lambda x: LatentCache().update(x),
}


@pytest.mark.parametrize("call", NO_TENSORS)
@pytest.mark.parametrize("wrong", [-1, True, 2.5, "x", lambda: 0, None])
def test_attention_says_what_is_no_tensor(call: str, wrong: object) -> None:
    optional = call in ("flash", "its mask", "rag", "layer's memory")  # may be None
    number = call in ("its start", "flops", "paged")
    if (optional and wrong is None) or (number and wrong in (2.5, -1) and call == "its start"):
        return
    with refuses(HandbookError, "got"):
        NO_TENSORS[call](wrong)
