"""The datastore against faiss and scikit-learn; the model against its equation, with a tiny reader."""

from __future__ import annotations

import sys
from pathlib import Path

import faiss
import pytest
import torch
from safetensors.torch import save_file
from sklearn.neighbors import NearestNeighbors
from torch import Tensor, nn

from handbook_src.errors import ConfigError, DataError, KernelUnavailable, ShapeError
from handbook_src.models.attention.knn_lm import Datastore, KNNLanguageModel, fill
from handbook_src.testing import refuses

ID = "knn-lm"
V, D = 11, 6


class Reader(nn.Module):
    """A context of two tokens; enough to look something up."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.head = nn.Embedding(V, D), nn.Linear(D, V)

    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        x = self.table(tokens)
        x = x + 0.5 * nn.functional.pad(x, (0, 0, 1, 0))[:, :-1]
        return self.head(x), x


def filled(count: int = 200, dim: int = D, index: str | None = None, **options: int) -> Datastore:
    store = Datastore(dim, index=index, **options)
    store.add(torch.randn(count, dim), torch.randint(V, (count,)))
    return store


@pytest.mark.parity(ID)
@pytest.mark.outside(ID)
@pytest.mark.parametrize(("count", "dim", "k"), [(1, 1, 1), (7, 3, 7), (200, 6, 5), (333, 17, 64)])
def test_exact_search_is_faiss_and_scikit_learn(count: int, dim: int, k: int) -> None:
    store, queries = filled(count, dim), torch.randn(9, dim)
    distances, rows = store.nearest(queries, k)
    flat = faiss.IndexFlatL2(dim)
    flat.add(store.keys.numpy())
    theirs, found = flat.search(queries.numpy(), k)
    assert (rows.numpy() == found).all()
    torch.testing.assert_close(distances, torch.from_numpy(theirs), rtol=1e-4, atol=1e-5)
    far, found = NearestNeighbors(n_neighbors=k, algorithm="brute").fit(store.keys.numpy()).kneighbors(queries.numpy())
    assert (rows.numpy() == found).all()
    torch.testing.assert_close(distances, torch.from_numpy(far).square(), rtol=1e-4, atol=1e-5, check_dtype=False)
    literal = (store.keys[None] - queries[:, None]).square().sum(-1).sort(-1)
    torch.testing.assert_close(distances, literal.values[:, :k])


@pytest.mark.parity(ID)
def test_flat_index_is_the_exact_search() -> None:
    exact, queries = filled(500), torch.randn(40, D)
    flat = Datastore(D, index="Flat")
    flat.add(exact.keys, exact.tokens)
    for mine, theirs in zip(exact.search(queries, 9), flat.search(queries, 9), strict=True):
        torch.testing.assert_close(mine, theirs)


@pytest.mark.law(ID)
def test_far_from_the_origin_the_search_is_still_exact() -> None:
    store, queries = Datastore(D), torch.randn(20, D) + 1e4
    store.add(torch.randn(300, D) + 1e4, torch.zeros(300, dtype=torch.long))
    distances, _ = store.nearest(queries, 4)
    literal = (store.keys[None].double() - queries[:, None].double()).square().sum(-1).sort(-1).values[:, :4]
    torch.testing.assert_close(distances.double(), literal, rtol=1e-5, atol=1e-5)


@pytest.mark.law(ID)
@pytest.mark.parametrize("factory", ["HNSW32", "IVF16,Flat"])
def test_approximate_indexes_find_most(factory: str) -> None:
    exact, queries = filled(2000), torch.randn(50, D)
    rough = Datastore(D, index=factory, probes=8)
    rough.add(exact.keys, exact.tokens)
    want, got = exact.nearest(queries, 10)[1], rough.nearest(queries, 10)[1]
    recall = (want[:, :, None] == got[:, None]).any(-1).double().mean()
    assert recall > 0.8, recall
    assert (rough.nearest(queries, 10)[0].diff(dim=-1) >= 0).all()


@pytest.mark.law(ID)
def test_more_probes_find_more() -> None:
    exact, queries, recall = filled(2000), torch.randn(50, D), []
    for probes in (1, 4, 16):
        rough = Datastore(D, index="IVF16,Flat", probes=probes)
        rough.add(exact.keys, exact.tokens)
        hits = exact.nearest(queries, 5)[1][:, :, None] == rough.nearest(queries, 5)[1][:, None]
        recall.append(hits.any(-1).double().mean().item())
    assert recall[0] < recall[1] <= recall[2] == 1.0


@pytest.mark.law(ID)
@pytest.mark.parametrize("index", [None, "Flat"])
def test_more_neighbours_than_pairs(index: str | None) -> None:
    store, queries = filled(3, index=index), torch.randn(4, D)
    distances, tokens = store.search(queries, 8)
    assert distances.shape == tokens.shape == (4, 8)
    assert distances[:, 3:].isinf().all()
    assert (tokens[:, 3:] == -1).all()
    assert (tokens[:, :3] >= 0).all()


@pytest.mark.parity(ID)
def test_fill_pairs_each_context_with_what_follows() -> None:
    reader, text = Reader(), torch.randint(V, (3, 9))
    store = fill(Datastore(D), reader, [text[:2], text[2:]])
    want = [(reader(text)[1][b, t], text[b, t + 1]) for b in range(3) for t in range(8)]
    assert len(store) == 24
    torch.testing.assert_close(store.keys, torch.stack([key for key, _ in want]))
    assert store.tokens.tolist() == [int(w) for _, w in want]


@pytest.mark.parity(ID)
@pytest.mark.parametrize("lam", [0.0, 0.3, 1.0])
def test_the_model_is_the_mixture(lam: float) -> None:
    reader = Reader()
    store = fill(Datastore(D), reader, [torch.randperm(V)[None]])  # no context twice: no ties
    model, tokens = KNNLanguageModel(reader, store, k=5, lam=lam, temperature=2.0), torch.randint(V, (2, 7))
    out, (logits, x) = model(tokens), reader(tokens)
    for b in range(2):
        for t in range(7):
            d = (store.keys - x[b, t]).square().sum(-1)
            near = d.argsort()[:5]
            votes = (-d[near] / 2.0).softmax(0)
            p = torch.zeros(V).index_add(0, store.tokens[near], votes)
            want = lam * p + (1 - lam) * logits[b, t].softmax(0)
            torch.testing.assert_close(out[b, t].exp(), want, rtol=1e-4, atol=1e-6)
    assert "lam=" in repr(model)


@pytest.mark.law(ID)
def test_a_text_in_the_store_is_remembered() -> None:
    """A table that knows nothing, and a text of which each pair of tokens occurs once: lookup is perfect."""
    reader, text = Reader(), torch.arange(V)[None]
    store = fill(Datastore(D), reader, [text])
    model = KNNLanguageModel(reader, store, k=1, lam=1.0)
    assert (model(text)[:, :-1].argmax(-1) == text[:, 1:]).all()
    model.lam = 0.0
    torch.testing.assert_close(model(text), reader(text)[0].log_softmax(-1))


@pytest.mark.registration(ID)
def test_saved_loaded_and_added_to(tmp_path: Path) -> None:
    store, queries = filled(50), torch.randn(3, D)
    path = tmp_path / "stores" / "a.safetensors"
    store.save(path)
    store.save(path)  # over itself
    assert [p.name for p in path.parent.iterdir()] == ["a.safetensors"]
    again = Datastore.load(path, index="Flat")
    for a, b in zip(store.search(queries, 4), again.search(queries, 4), strict=True):
        torch.testing.assert_close(a, b)
    again.add(queries, torch.zeros(3, dtype=torch.long))
    assert len(again) == 53
    assert again.search(queries, 1)[0].max() < 1e-6  # the index knows what came later


@pytest.mark.registration(ID)
def test_other_dtypes_and_no_queries() -> None:
    store = Datastore(D)
    store.add(torch.randn(9, D).double(), torch.zeros(9, dtype=torch.int32))
    assert store.keys.dtype == torch.float32
    assert store.tokens.dtype == torch.int64
    assert store.search(torch.randn(2, D).bfloat16(), 3)[0].shape == (2, 3)
    for index in (None, "Flat"):
        assert filled(index=index).search(torch.randn(0, D), 3)[1].shape == (0, 3)
    store.add(torch.zeros(0, D), torch.zeros(0, dtype=torch.long))
    assert len(store) == 9


@pytest.mark.refusal(ID)
def test_refusals_of_the_store(monkeypatch: pytest.MonkeyPatch) -> None:
    for dim in (0, -1, 2.5, True):
        with refuses(ConfigError, "Datastore dim", dim):
            Datastore(dim)
    with refuses(ConfigError, "probes", 0):
        Datastore(D, probes=0)
    with refuses(ConfigError, "index", "Nonsense"):
        Datastore(D, index="Nonsense")
    with refuses(DataError, "an empty store"):
        Datastore(D).search(torch.randn(1, D), 1)
    store = filled()
    with refuses(ShapeError, "(3, 5)", f"(m, {D})"):
        store.search(torch.randn(3, 5), 2)
    with refuses(ShapeError, "int64"):
        store.search(torch.zeros(3, D, dtype=torch.long), 2)
    for k in (0, -1, 1.5, True):
        with refuses(ConfigError, "Datastore.search k", k):
            store.search(torch.randn(3, D), k)
    wrong = [(3, 5), (3, D), (3,)], [3, 2, 3]
    for shape, count in zip(*wrong, strict=True):
        with refuses(ShapeError, "Datastore.add", shape, (count,)):
            store.add(torch.randn(*shape), torch.zeros(count, dtype=torch.long))
    with refuses(ShapeError, "float32"):
        store.add(torch.randn(3, D), torch.zeros(3))
    with refuses(ShapeError, "NaN"):
        store.add(torch.full((3, D), torch.nan), torch.zeros(3, dtype=torch.long))
    assert len(store) == 200
    with refuses(ConfigError, "3 vectors"):
        filled(3, index="IVF16,Flat").search(torch.randn(1, D), 1)
    monkeypatch.setitem(sys.modules, "faiss", None)
    with refuses(KernelUnavailable, "pip install faiss-cpu"):
        Datastore(D, index="Flat")
    assert filled().search(torch.randn(1, D), 1)[0].shape == (1, 1)


@pytest.mark.refusal(ID)
def test_refusals_of_files(tmp_path: Path) -> None:
    path = tmp_path / "store.safetensors"
    with refuses(DataError, "store.safetensors", "No such file"):
        Datastore.load(path)
    path.write_bytes(b"\x00\x01torn")
    with refuses(DataError, "store.safetensors"):
        Datastore.load(path)
    save_file({"weights": torch.zeros(2)}, path)
    with refuses(DataError, "keys"):
        Datastore.load(path)
    save_file({"keys": torch.zeros(2, 3), "tokens": torch.zeros(3, dtype=torch.long)}, path)
    with refuses(DataError, "(2, 3)", "(3,)"):
        Datastore.load(path)


@pytest.mark.refusal(ID)
def test_refusals_of_the_model() -> None:
    reader = Reader()
    for options in ({"k": 0}, {"lam": 1.5}, {"lam": -0.1}, {"temperature": 0.0}):
        ((name, value),) = options.items()
        with refuses(ConfigError, f"KNNLanguageModel {name}", value):
            KNNLanguageModel(reader, filled(), **options)
    with refuses(ConfigError, "NoneType", "Datastore"):
        KNNLanguageModel(reader, None)
    with refuses(DataError, "an empty store"):
        KNNLanguageModel(reader, Datastore(D))(torch.zeros(1, 3, dtype=torch.long))
    with refuses(ShapeError, "Datastore.add"):
        fill(Datastore(D + 1), reader, [torch.zeros(1, 3, dtype=torch.long)])


@pytest.mark.law(ID)
def test_the_store_keeps_copies() -> None:
    store, keys, tokens = Datastore(3), torch.randn(5, 3), torch.arange(5)
    store.add(keys, tokens)
    kept = keys.clone()
    keys.zero_()
    tokens.zero_()
    torch.testing.assert_close(store.keys, kept)
    assert store.tokens.tolist() == [0, 1, 2, 3, 4]
    assert store.keys.data_ptr() == store.keys.data_ptr()  # joined once, not at each look


@pytest.mark.law(ID)
def test_half_precision_does_not_lose_far_neighbours() -> None:
    class Reader(nn.Module):
        def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
            far = torch.full((*tokens.shape, 2), 600.0, dtype=torch.float16)  # squared: beyond float16
            return torch.zeros(*tokens.shape, 3, dtype=torch.float16), far

    store = Datastore(2)
    store.add(torch.tensor([[0.0, 0.0], [1.0, 1.0]]), torch.tensor([0, 1]))
    model = KNNLanguageModel(Reader(), store, k=2, lam=0.5)
    p = model(torch.zeros(1, 1, dtype=torch.int64)).exp().float()
    torch.testing.assert_close(p[0, 0], torch.tensor([1 / 6, 1 / 6 + 0.5, 1 / 6]), atol=2e-3, rtol=0)


@pytest.mark.refusal(ID)
def test_what_cannot_be_stored(tmp_path: Path) -> None:
    store = Datastore(3)
    with refuses(ConfigError, "list"):
        store.add([[1.0, 2.0, 3.0]], [0])
    with refuses(ShapeError, -100):
        store.add(torch.randn(1, 3), torch.tensor([-100]))
    with refuses(ShapeError, "meta"):
        store.add(torch.randn(1, 3, device="meta"), torch.tensor([0]))
    with refuses(DataError, "a folder"):
        store.save(tmp_path)
    assert len(store) == 0
