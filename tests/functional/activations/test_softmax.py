"""Softmax against torch's, in float64, with every option; its limits; and the one-pass form."""

from __future__ import annotations

import math
from functools import reduce

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from handbook_src.errors import ConfigError, ShapeError
from handbook_src.functional.activations.softmax import (
    log_softmax,
    merge_normalisers,
    normaliser,
    online_softmax,
    softmax,
)
from handbook_src.testing import assert_parity, assert_permutation_equivariant, refuses

pytestmark = [pytest.mark.filterwarnings("error")]
BACKENDS = ["reference", "torch", "auto"]
BOTH = pytest.mark.parametrize("backend", BACKENDS)
KINDS = {"softmax": (softmax, F.softmax), "log_softmax": (log_softmax, F.log_softmax)}
KIND = pytest.mark.parametrize("kind", KINDS)
INF = float("inf")


def draw(*shape: int, seed: int = 0, scale: float = 3.0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * scale


# ---------------------------------------------------------------- parity
@pytest.mark.parity("softmax")
@KIND
@BOTH
@pytest.mark.parametrize("temperature", [1.0, 0.1, 7.0])
@pytest.mark.parametrize(
    ("shape", "dim"),
    [((5,), 0), ((1,), -1), ((), 0), ((), -1), ((3, 7), 0), ((2, 3, 129), -1), ((2, 3, 4), -2), ((0, 3), 1)],
)
def test_is_torchs(kind, shape, dim, temperature, backend):
    mine, theirs = KINDS[kind]
    assert_parity(
        lambda x: mine(x, dim, temperature=temperature, backend=backend),
        lambda x: theirs(x / temperature, dim),
        [draw(*shape)],
    )


@pytest.mark.parity("softmax")
@KIND
@BOTH
def test_ties_and_far_scores_are_torchs(kind, backend):
    mine, theirs = KINDS[kind]
    rows = torch.tensor(
        [[0.0, 0, 0], [1, 1, -1], [1e4, 0, -1e4], [-1e300, 0, 1], [800, 799, -800]], dtype=torch.float64
    )
    assert_parity(lambda x: mine(x, -1, backend=backend), lambda x: theirs(x, -1), [rows])


@pytest.mark.parity("softmax")
@KIND
@BOTH
def test_dtype_strides_and_empty_axes(kind, backend):
    mine, theirs = KINDS[kind]
    x = draw(4, 6)
    for view in (x.T, x[::2, 1::3], x.flip(0), x[:1].expand(3, -1)):
        before = view.clone()
        torch.testing.assert_close(mine(view, -1, backend=backend), theirs(view, -1))
        assert torch.equal(view, before)
    wide = mine(x.half(), -1, torch.float64, backend=backend)
    torch.testing.assert_close(wide, theirs(x.half(), -1, dtype=torch.float64))
    for temperature in (1.0, 2.0):
        assert mine(torch.ones(2, 0), -1, temperature=temperature, backend=backend).shape == (2, 0)


@pytest.mark.parity("softmax")
@pytest.mark.parametrize("chunk", [1, 2, 3, 7, 50])
@pytest.mark.parametrize(("shape", "dim"), [((7,), 0), ((), 0), ((3, 7), -1), ((9, 2, 3), 0), ((2, 0), 1), ((0, 3), 1)])
def test_online_softmax_is_torchs(shape, dim, chunk):
    assert_parity(lambda x: online_softmax(x, dim, chunk=chunk), lambda x: F.softmax(x, dim), [draw(*shape)])


@pytest.mark.parity("softmax")
@pytest.mark.parametrize("scores", [[1e4, -1e4, 9999.0], [-INF, -INF, 1.0, 2.0], [1.0, -INF, -INF], [3.0, 3.0, 3.0]])
def test_online_softmax_of_far_and_masked_scores_is_torchs(scores):
    x = torch.tensor(scores, dtype=torch.float64)
    for chunk in (1, 2, 4):
        torch.testing.assert_close(online_softmax(x, 0, chunk=chunk), F.softmax(x, 0), rtol=1e-12, atol=0)
        assert_parity(lambda x, c=chunk: online_softmax(x, 0, chunk=c), lambda x: F.softmax(x, 0), [x])


@pytest.mark.parity("softmax")
def test_reference_is_twice_differentiable():
    x = draw(2, 5).requires_grad_()
    for call in (
        lambda x: softmax(x, -1, backend="reference"),
        lambda x: softmax(x, -1, temperature=0.7),
        lambda x: log_softmax(x, -1, temperature=2.0, backend="reference"),
        lambda x: online_softmax(x, -1, chunk=2),
    ):
        torch.autograd.gradcheck(call, x)
        torch.autograd.gradgradcheck(call, x)


@pytest.mark.parity("softmax")
@KIND
@BOTH
@pytest.mark.parametrize("row", [[-INF, -INF], [math.nan, 0.0], [INF, 0.0], [INF, INF], [0.0, -INF]])
@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_rows_without_an_answer_are_nan_as_torchs(kind, row, temperature, backend):
    mine, theirs = KINDS[kind]
    x = torch.tensor([row, [0.0, 1.0]], dtype=torch.float64)
    y = mine(x, -1, temperature=temperature, backend=backend)
    torch.testing.assert_close(y, theirs(x / temperature, -1), equal_nan=True)
    assert y[0].isnan().all() == (row != [0.0, -INF])
    assert y[1].isfinite().all()
    if kind == "softmax":
        torch.testing.assert_close(online_softmax(x, -1), theirs(x, -1), equal_nan=True)


# ---------------------------------------------------------------- half precision, compile
@pytest.mark.registration("softmax")
@KIND
@BOTH
@pytest.mark.parametrize("temperature", [1.0, 0.1])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_the_float32_answer_rounded_once(kind, temperature, backend, dtype):
    x = draw(20, 50).to(dtype)
    y = KINDS[kind][0](x, -1, temperature=temperature, backend=backend)
    assert y.dtype == dtype
    exact = KINDS[kind][0](x.float(), -1, temperature=temperature, backend="reference")
    # torch's log-softmax on CPUs rounds the maximum's and the sum's share on the way, too
    roundings = 3 if kind == "log_softmax" and temperature == 1 and backend != "reference" else 0.51
    torch.testing.assert_close(y.float(), exact, rtol=roundings * torch.finfo(dtype).eps, atol=1e-6)
    assert online_softmax(x, -1, chunk=7).dtype == dtype


@pytest.mark.registration("softmax")
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_compiles_to_one_graph(backend, unchecked):
    x = draw(2, 6)
    torch._dynamo.reset()

    def call(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return (
            softmax(x, -1, backend=backend),
            log_softmax(x, -1, temperature=2.0, backend=backend),
            online_softmax(x, -1),
        )

    torch.testing.assert_close(torch.compile(call, fullgraph=True, backend="aot_eager")(x), call(x))


# ---------------------------------------------------------------- laws
@pytest.mark.law("softmax")
@BOTH
def test_sums_to_one_ignores_a_shift_and_follows_a_permutation(backend):
    x = draw(4, 9)
    p = softmax(x, -1, backend=backend)
    torch.testing.assert_close(p.sum(-1), torch.ones(4, dtype=torch.float64))
    torch.testing.assert_close(softmax(x + 1e3, -1, backend=backend), p)
    assert_permutation_equivariant(lambda x: softmax(x, -1, backend=backend), x)


@pytest.mark.law("softmax")
@BOTH
def test_temperature_goes_from_the_largest_to_the_mean(backend):
    x = torch.tensor([1.0, 3.0, 2.0, 3.0], dtype=torch.float64)
    for cold in (1e-3, 1e-30, 1e-310):
        torch.testing.assert_close(
            softmax(x, 0, temperature=cold, backend=backend), torch.tensor([0, 0.5, 0, 0.5], dtype=torch.float64)
        )
    torch.testing.assert_close(
        softmax(x, 0, temperature=1e12, backend=backend), torch.full((4,), 0.25, dtype=torch.float64)
    )
    entropies = []
    for t in (0.1, 0.5, 1.0, 2.0, 10.0):
        p = softmax(x, 0, temperature=t, backend=backend)
        entropies.append(-(p * p.log()).sum().item())
    assert entropies == sorted(entropies)


@pytest.mark.law("softmax")
@BOTH
def test_a_small_temperature_does_not_overflow(backend):
    x = torch.tensor([60000.0, 59000.0], dtype=torch.float16)  # 60000 / 0.01 is past float16
    assert softmax(x, 0, temperature=0.01, backend=backend).tolist() == [1, 0]
    far = torch.tensor([3e38, 1e38])  # past float32
    assert softmax(far, 0, temperature=1e-3, backend=backend).tolist() == [1, 0]


@pytest.mark.law("softmax")
@BOTH
def test_log_softmax_keeps_what_the_logarithm_of_softmax_loses(backend):
    x = torch.tensor([0.0, -1000.0])
    assert softmax(x, 0, backend=backend).log()[1] == -INF
    assert log_softmax(x, 0, backend=backend)[1] == -1000
    y = draw(5, 4)
    torch.testing.assert_close(log_softmax(y, -1, backend=backend).exp(), softmax(y, -1, backend=backend))
    torch.testing.assert_close(torch.logsumexp(log_softmax(y, -1, backend=backend), -1), torch.zeros(5).double())


@pytest.mark.law("softmax")
@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_the_jacobian_is_diagonal_less_outer_product(temperature):
    x = draw(5)
    p = softmax(x, 0, temperature=temperature)
    jacobian = torch.autograd.functional.jacobian(lambda x: softmax(x, 0, temperature=temperature), x)
    torch.testing.assert_close(jacobian, (torch.diag(p) - torch.outer(p, p)) / temperature)


@pytest.mark.law("softmax")
def test_normalisers_merge_in_any_order_and_grouping():
    x = draw(3, 12)
    x[0, :4] = -INF  # a chunk without any score
    parts = [normaliser(piece, -1) for piece in x.split(4, -1)]
    a, b, c = parts
    merged = [
        merge_normalisers(merge_normalisers(a, b), c),
        merge_normalisers(a, merge_normalisers(b, c)),
        reduce(merge_normalisers, [c, a, b]),
    ]
    for m, d in merged:
        torch.testing.assert_close(m + d.log(), torch.logsumexp(x, -1, keepdim=True), rtol=1e-13, atol=1e-13)


@pytest.mark.law("softmax")
def test_nothing_but_masked_scores_so_far_is_no_division_by_zero():
    m, d = normaliser(torch.full((2, 3), -INF), -1)
    assert (m == -INF).all()
    assert (d == 0).all()
    y = online_softmax(torch.tensor([-INF, -INF, 0.0, 0.0]), 0, chunk=2)
    assert y.tolist() == [0, 0, 0.5, 0.5]


# ---------------------------------------------------------------- refusals
@pytest.mark.refusal("softmax")
@KIND
def test_refuses_temperatures_axes_and_dtypes(kind):
    call = KINDS[kind][0]
    for temperature in (0.0, -1.0, INF, math.nan, True, None, "1"):
        with refuses(ConfigError, f"{kind} temperature", temperature):
            call(draw(3), 0, temperature=temperature)
    for dim in (2, -3, None, 1.0, True):
        with refuses(ConfigError, f"{kind} dim", dim, (2, 3)):
            call(draw(2, 3), dim)
    for dtype in (torch.int64, torch.complex64, torch.bool):
        with refuses(ShapeError, dtype):
            call(torch.ones(3, dtype=dtype), 0)
    with refuses(ConfigError, "dtype", torch.int32):
        call(draw(3), 0, torch.int32)
    for backend in ("triton", "cudnn"):
        with refuses(ConfigError, backend):
            call(draw(3), 0, backend=backend)


@pytest.mark.refusal("softmax")
def test_online_softmax_refuses_chunks_and_axes():
    for chunk in (0, -1, 1.5, True):
        with refuses(ConfigError, "online_softmax chunk", chunk):
            online_softmax(draw(3), 0, chunk=chunk)
    with refuses(ConfigError, "online_softmax dim", 1):
        online_softmax(draw(3), 1)
    with refuses(ShapeError, "torch.int64"):
        online_softmax(torch.ones(3, dtype=torch.int64), 0)


@pytest.mark.refusal("softmax")
def test_a_temperature_that_is_zero_in_float32_is_refused():
    for call in (softmax, log_softmax):
        with refuses(ConfigError, "temperature", 1e-50):
            call(torch.ones(3), -1, temperature=1e-50)
