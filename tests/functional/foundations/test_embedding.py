"""Every option of the lookup against torch's, the gradient of the table included."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from handbook_src.errors import ConfigError, ShapeError
from handbook_src.functional.foundations.embedding import embedding
from handbook_src.testing import assert_parity, refuses

BACKENDS = ["reference", "torch", "auto"]
ROWS = 7
SHAPES = [(), (1,), (9,), (2, 5), (3, 0)]


def table(rows: int = ROWS, dim: int = 3, seed: int = 0) -> Tensor:
    return torch.randn(rows, dim, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def tokens(*shape: int, seed: int = 1, rows: int = ROWS) -> Tensor:
    return torch.randint(rows, shape, generator=torch.Generator().manual_seed(seed))


# ---------------------------------------------------------------- parity
@pytest.mark.parity("embedding")
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("padding_idx", [None, 0, 3, ROWS - 1, -1, -ROWS])
@pytest.mark.parametrize("by_freq", [False, True])
def test_embedding_is_torchs(shape, padding_idx, by_freq, backend):
    options = {"padding_idx": padding_idx, "scale_grad_by_freq": by_freq}
    assert_parity(
        lambda t, w: embedding(t, w, backend=backend, **options),
        lambda t, w: F.embedding(t, w, **options),
        [tokens(*shape), table()],
    )


@pytest.mark.parity("embedding")
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize(("rows", "dim"), [(1, 1), (1, 5), (129, 1), (64, 33)])
def test_sizes_and_token_dtypes(rows, dim, dtype, backend):
    t = tokens(4, 5, rows=rows).to(dtype)
    for w in (table(rows, dim), table(dim, rows).T, table(2 * rows, 2 * dim)[::2, 1::2]):
        assert_parity(lambda t, w: embedding(t, w, backend=backend), F.embedding, [t, w])
        assert_parity(lambda t, w: embedding(t.T, w, backend=backend), lambda t, w: F.embedding(t.T, w), [t, w])


@pytest.mark.parity("embedding")
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("padding_idx", [None, 2])
@pytest.mark.parametrize("shape", SHAPES)
def test_sparse_gradients_are_torchs(shape, padding_idx, backend):
    grads = []
    for look in (lambda t, w: embedding(t, w, padding_idx, sparse=True, backend=backend),
                 lambda t, w: F.embedding(t[None], w, padding_idx, sparse=True)[0]):  # fmt: skip
        w = table().requires_grad_()
        y = look(tokens(*shape), w)
        y.backward(torch.arange(y.numel(), dtype=torch.float64).view(y.shape))
        assert w.grad.layout == torch.sparse_coo
        grads.append(w.grad)
    assert grads[0]._nnz() == grads[1]._nnz()
    torch.testing.assert_close(grads[0].to_dense(), grads[1].to_dense(), rtol=1e-12, atol=1e-12)
    dense = table().requires_grad_()
    y = embedding(tokens(*shape), dense, padding_idx, backend=backend)
    y.backward(torch.arange(y.numel(), dtype=torch.float64).view(y.shape))
    torch.testing.assert_close(grads[0].to_dense(), dense.grad)


@pytest.mark.parity("embedding")
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("norm_type", [1.0, 2.0, 3.5, float("inf")])
@pytest.mark.parametrize("max_norm", [0.5, 1.7, 100.0])
@pytest.mark.parametrize("shape", SHAPES)
def test_max_norm_renormalises_in_place_as_torch(shape, max_norm, norm_type, backend):
    mine, theirs = table().requires_grad_(), table().requires_grad_()
    for step in range(2):  # the second lookup finds rows that are short already
        t = tokens(*shape, seed=step)
        a = embedding(t, mine, 2, max_norm, norm_type, backend=backend)
        b = F.embedding(t, theirs, 2, max_norm, norm_type)
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(mine.data, theirs.data, rtol=1e-12, atol=1e-12)
        a.square().sum().backward()
        b.square().sum().backward()
        torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-12, atol=1e-12)


@pytest.mark.parity("embedding")
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("padding_idx", [None, 1])
def test_twice_differentiable(backend, padding_idx):
    t = torch.tensor([[1, 2, 2], [0, 1, 4]])
    torch.autograd.gradgradcheck(lambda w: embedding(t, w, padding_idx, backend=backend), table().requires_grad_())


# ---------------------------------------------------------------- laws
@pytest.mark.law("embedding")
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", SHAPES)
def test_a_lookup_is_a_one_hot_vector_times_the_table(shape, backend):
    assert_parity(
        lambda t, w: embedding(t, w, backend=backend),
        lambda t, w: F.one_hot(t, ROWS).to(w.dtype) @ w,
        [tokens(*shape), table()],
    )


@pytest.mark.law("embedding")
@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_of_absent_tokens_and_of_padding_have_no_gradient(backend):
    w = table().requires_grad_()
    embedding(torch.tensor([1, 1, 3]), w, 3, backend=backend).sum().backward()
    assert w.grad.sum(1).tolist() == [0, 6, 0, 0, 0, 0, 0]


@pytest.mark.law("embedding")
@pytest.mark.parametrize("backend", BACKENDS)
def test_by_frequency_a_repeated_token_moves_as_far_as_a_single_one(backend):
    w = table().requires_grad_()
    embedding(torch.tensor([1, 1, 1, 3]), w, scale_grad_by_freq=True, backend=backend).sum().backward()
    torch.testing.assert_close(w.grad[1], w.grad[3])


@pytest.mark.law("embedding")
@pytest.mark.parametrize("backend", BACKENDS)
def test_max_norm_shortens_what_is_looked_up_and_nothing_else(backend):
    w = 10 * table()
    before = w.clone()
    y = embedding(torch.tensor([1, 4]), w, max_norm=1.0, backend=backend)
    torch.testing.assert_close(y.norm(dim=1), torch.ones(2, dtype=torch.float64), rtol=1e-6, atol=0)
    assert torch.equal(w[[0, 2, 3, 5, 6]], before[[0, 2, 3, 5, 6]])
    torch.testing.assert_close(F.cosine_similarity(w[1], before[1], dim=0).item(), 1.0)


@pytest.mark.law("embedding")
def test_whole_numbers_are_norms_too(unchecked):
    w = 10 * table()
    torch.testing.assert_close(embedding(tokens(3), w.clone(), None, 1, 2), embedding(tokens(3), w, None, 1.0, 2.0))


# ---------------------------------------------------------------- registration
@pytest.mark.registration("embedding")
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_rows_are_the_tables(dtype, backend):
    w = table().to(dtype).requires_grad_()
    y = embedding(tokens(3, 2), w, 1, backend=backend)
    assert y.dtype == dtype
    assert torch.equal(y, w[tokens(3, 2)])
    y.sum().backward()
    want = torch.bincount(tokens(3, 2).flatten(), minlength=ROWS).float()
    want[1] = 0
    torch.testing.assert_close(w.grad[:, 0].float(), want)
    short = (4 * table()).to(dtype)
    embedding(torch.arange(ROWS), short, max_norm=1.0, backend=backend)
    assert short.float().norm(dim=1).max() < 1 + 2 * torch.finfo(dtype).eps


@pytest.mark.registration("embedding")
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # dynamo itself does
def test_compiles_to_one_graph(backend, unchecked):
    w, t = table(), tokens(4, 2)
    torch._dynamo.reset()
    compiled = torch.compile(lambda t: embedding(t, w, 1, backend=backend), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(t), w[t])


@pytest.mark.registration("embedding")
@pytest.mark.parametrize("backend", BACKENDS)
def test_meta_tensors_have_shapes(backend):
    w = torch.empty(5, 3, device="meta")
    assert embedding(torch.empty(2, 4, dtype=torch.long, device="meta"), w, backend=backend).shape == (2, 4, 3)


# ---------------------------------------------------------------- refusals
@pytest.mark.refusal("embedding")
@pytest.mark.parametrize("backend", BACKENDS)
def test_refuses_tokens(backend):
    w = table()
    for bad, values in [
        (torch.tensor([0, 7]), ("token 7", "from 0 to 6")),
        (torch.tensor([[0, -1]]), ("token -1", "from 0 to 6")),
        (torch.tensor([0.0]), ("torch.float32", ".long()")),
        (torch.tensor([True]), ("torch.bool",)),
        (torch.tensor([1], dtype=torch.uint8), ("torch.uint8",)),
        (torch.tensor([1], dtype=torch.int16), ("torch.int16",)),
    ]:
        with refuses(ShapeError, *values):
            embedding(bad, w, backend=backend)
    for shape in ((7,), (7, 2, 3), ()):
        with refuses(ShapeError, shape, "two axes"):
            embedding(torch.tensor([0]), torch.ones(shape), backend=backend)
    with refuses(ShapeError, "torch.int64"):
        embedding(torch.tensor([0]), torch.ones(3, 2, dtype=torch.long), backend=backend)
    with refuses(ShapeError, "meta", "cpu"):
        embedding(torch.tensor([0]), w.to("meta"), backend=backend)


@pytest.mark.refusal("embedding")
@pytest.mark.parametrize("backend", BACKENDS)
def test_refuses_options(backend):
    t, w = tokens(3), table()
    for padding_idx in (ROWS, -ROWS - 1, 1.0, True, "0"):
        with refuses(ConfigError, "padding_idx", repr(padding_idx)):
            embedding(t, w, padding_idx, backend=backend)
    for bad in (0, 0.0, -1.0, float("nan"), float("inf"), True):
        with refuses(ConfigError, "max_norm", repr(bad)):
            embedding(t, w, max_norm=bad, backend=backend)
    for bad in (0.0, -1.0, float("nan"), True):
        with refuses(ConfigError, "norm_type", repr(bad)):
            embedding(t, w, max_norm=1.0, norm_type=bad, backend=backend)
    with refuses(ConfigError, "sparse=True", "scale_grad_by_freq=True"):
        embedding(t, w, scale_grad_by_freq=True, sparse=True, backend=backend)
    with refuses(ConfigError, "cuda"):
        embedding(t, w, backend="cuda")
