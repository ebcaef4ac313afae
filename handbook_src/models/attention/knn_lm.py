"""A language model that looks up what followed similar contexts: the datastore, and the model with it."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, final

import torch
from jaxtyping import Float, Int
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from handbook_src.check import check_positive, check_probability, check_size
from handbook_src.errors import ConfigError, DataError, ShapeError
from handbook_src.functional.attention.knn_lm import knn_lm_log_probs
from handbook_src.functional.attention.knn_memory import faiss_index, train_and_add, visit_cells

#: Scores held at once by the exact search: 64 MiB in float32.
CHUNK = 2**24

#: Tokens to logits (``b t v``) and the vectors that are looked up (``b t d``).
Reader = Callable[[Tensor], tuple[Tensor, Tensor]]


@final
class Datastore:
    r"""Pairs of a context's vector and the token that followed, searched for the nearest vectors.

    .. math::
        (\mathcal K, \mathcal V) = \{(f(c_i), w_i)\}, \qquad
        \mathcal N(x) = \operatorname{arg\,min\text{-}k}_i \lVert f(x) - f(c_i) \rVert^2

    The exact search is torch's matrix product, a block of queries at a time; distances of what it
    found are computed anew as sums of squares.  With an ``index`` the search is faiss's.  The
    keys are kept in float32 on the CPU.

    Args:
        dim: features of a vector.
        index: a faiss factory string, for instance ``Flat``, ``HNSW32``, ``IVF256,Flat``; exact in torch unless given.
        probes: cells that an ``IVF`` index visits for each query.

    Shape:
        ``add``: ``n d`` and ``n``; ``search``: ``m d`` to ``m k`` squared distances and ``m k`` tokens.

    Typical values:
        one pair for each token of the training text (103 million for WikiText-103); k 1024 there; IVF with
        4096 cells, 32 probed.

    Raises:
        ConfigError: a size that is not positive, or an index that faiss does not know.
        KernelUnavailable: an index is asked for and faiss is not installed.

    Source:
        Khandelwal et al. 2019, eq. 1, arXiv:1911.00172; faiss is Johnson et al. 2017, arXiv:1702.08734
    """

    def __init__(self, dim: int, *, index: str | None = None, probes: int = 8) -> None:
        check_size("Datastore", "dim", dim)
        check_size("Datastore", "probes", probes)
        if index is not None:
            faiss_index("Datastore", index, dim, "l2")
        self.dim, self.index, self.probes = dim, index, probes
        self._keys = [torch.zeros(0, dim)]
        self._tokens = [torch.zeros(0, dtype=torch.int64)]
        self._built: Any = None

    def __len__(self) -> int:
        return sum(map(len, self._tokens))

    @property
    def keys(self) -> Float[Tensor, "n d"]:
        """All vectors, in the order in which they came."""
        self._keys = self._keys if len(self._keys) == 1 else [torch.cat(self._keys)]
        return self._keys[0]

    @property
    def tokens(self) -> Int[Tensor, " n"]:
        """The token that followed each vector."""
        self._tokens = self._tokens if len(self._tokens) == 1 else [torch.cat(self._tokens)]
        return self._tokens[0]

    def add(self, keys: Float[Tensor, "n d"], tokens: Int[Tensor, " n"]) -> None:
        """Append copies of the pairs; an index is built anew at the next search.

        Raises:
            ShapeError: another number of features, not one token a key, a key that is not finite, a negative token.
            ConfigError: no tensors.
        """
        if not isinstance(keys, Tensor) or not isinstance(tokens, Tensor):
            got = f"{type(keys).__name__} and {type(tokens).__name__}"
            raise ConfigError("Datastore.add", got=got, want="two tensors", remedy="Wrap them: torch.tensor(...).")
        if keys.ndim != 2 or keys.shape[1] != self.dim or tokens.shape != keys.shape[:1] or not _integers(tokens):
            raise ShapeError(
                "Datastore.add",
                got=f"keys {tuple(keys.shape)}, tokens {tuple(tokens.shape)} of {tokens.dtype}",
                want=f"keys (n, {self.dim}) and n integers",
                remedy="Flatten batch and time first.",
            )
        if keys.is_meta or tokens.is_meta:
            got, want = "tensors on the meta device", "vectors to store"
            raise ShapeError("Datastore.add", got=got, want=want, remedy="Run the model on a real device.")
        if len(tokens) and int(tokens.min()) < 0:
            remedy = "Leave out padding and ignored labels."
            raise ShapeError("Datastore.add tokens", got=int(tokens.min()), want="at least 0", remedy=remedy)
        keys = keys.detach().to("cpu", torch.float32, copy=True)
        if not bool(keys.isfinite().all()):
            raise ShapeError(
                "Datastore.add keys", got="NaN or infinity", want="finite vectors", remedy="Find where the model left."
            )
        self._keys.append(keys)
        self._tokens.append(tokens.detach().to("cpu", torch.int64, copy=True))
        self._built = None

    def search(self, queries: Float[Tensor, "m d"], k: int) -> tuple[Float[Tensor, "m k"], Int[Tensor, "m k"]]:
        """Return squared distances and tokens of the ``k`` nearest, nearest first.

        Where there are fewer than ``k`` the rest is at infinity and has token -1.

        Raises:
            ShapeError: queries with another number of features.
            DataError: the store is empty.
            ConfigError: ``k`` below one, or too few keys to train an ``IVF`` index.
        """
        distances, rows = self.nearest(queries, k)
        tokens = torch.where(rows >= 0, self.tokens[rows.clamp_min(0)], -1)
        return distances.to(queries.device), tokens.to(queries.device)

    def nearest(self, queries: Float[Tensor, "m d"], k: int) -> tuple[Float[Tensor, "m k"], Int[Tensor, "m k"]]:
        """As :meth:`search`, with the rows of the store in place of the tokens, on the CPU."""
        check_size("Datastore.search", "k", k)
        if queries.ndim != 2 or queries.shape[1] != self.dim or not queries.is_floating_point():
            got = f"{tuple(queries.shape)} of {queries.dtype}"
            raise ShapeError(
                "Datastore.search queries", got=got, want=f"(m, {self.dim}), floating", remedy="Flatten batch and time."
            )
        if len(self) == 0:
            raise DataError(
                "Datastore.search", got="an empty store", want="at least one pair", remedy="Call add first."
            )
        queries = queries.detach().float().cpu().contiguous()
        rows = self._exact(queries, k) if self.index is None else self._by_faiss(queries, k)
        found = self.keys[rows.clamp_min(0)]
        distances = (found - queries[:, None]).square().sum(-1).masked_fill(rows < 0, torch.inf)
        distances, order = distances.sort(dim=-1, stable=True)
        return distances, rows.gather(-1, order)

    def save(self, path: str | Path) -> None:
        """Write keys and tokens as safetensors, whole or not at all.

        Raises:
            DataError: the path is a folder.
        """
        path = Path(path)
        if path.is_dir():
            raise DataError(str(path), got="a folder", want="a file", remedy="Name one: folder / 'store.safetensors'.")
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_name(f".{path.name}.{os.getpid()}.part")
        try:
            save_file({"keys": self.keys.contiguous(), "tokens": self.tokens.contiguous()}, part)
            os.replace(part, path)
        finally:
            with contextlib.suppress(FileNotFoundError):
                part.unlink()

    @classmethod
    def load(cls, path: str | Path, *, index: str | None = None, probes: int = 8) -> Datastore:
        """Read what :meth:`save` wrote; more may be added.

        Raises:
            DataError: the file is missing, torn, or no datastore.
        """
        try:
            parts = load_file(path)
            keys, tokens = parts["keys"], parts["tokens"]
        except (OSError, SafetensorError, KeyError) as e:
            raise DataError(
                str(path), got=f"{type(e).__name__}: {e}", want="a datastore", remedy="Save it again."
            ) from e
        if keys.ndim != 2 or keys.shape[1] == 0 or tokens.shape != keys.shape[:1] or not _integers(tokens):
            got = f"keys {tuple(keys.shape)}, tokens {tuple(tokens.shape)} of {tokens.dtype}"
            raise DataError(str(path), got=got, want="keys n d and n integers", remedy="Save it again.")
        store = cls(keys.shape[1], index=index, probes=probes)
        store.add(keys, tokens)
        return store

    def _exact(self, queries: Tensor, k: int) -> Tensor:
        """Half the squared norm minus the product orders as the distance does; centred, less cancels."""
        keys, centre = self.keys, self.keys.mean(0)
        keys, queries, k_max = keys - centre, queries - centre, min(k, len(keys))
        half = keys.square().sum(-1) / 2
        rows = [
            torch.addmm(half, block, keys.T, alpha=-1).topk(k_max, largest=False).indices
            for block in queries.split(max(1, CHUNK // len(keys)))
        ]
        return nn.functional.pad(torch.cat(rows), (0, k - k_max), value=-1)

    def _by_faiss(self, queries: Tensor, k: int) -> Tensor:
        if self._built is None:
            assert self.index is not None
            built = faiss_index("Datastore", self.index, self.dim, "l2")
            train_and_add("Datastore", built, self.keys.numpy())
            visit_cells("Datastore", built, self.probes)
            self._built = built
        return torch.from_numpy(self._built.search(queries.numpy(), k)[1])


def fill(store: Datastore, reader: Reader, windows: Iterable[Tensor]) -> Datastore:
    """Read windows of text and store every context's vector with the token that followed.

    Args:
        store: where the pairs go.
        reader: tokens to logits and vectors, for instance a model's forward.
        windows: batches of text, ``b t``; each window's first token is context only.

    Raises:
        ShapeError: vectors of another width than the store's.
    """
    with torch.no_grad():
        for tokens in windows:
            vectors = reader(tokens)[1][:, :-1]
            store.add(vectors.flatten(0, 1), tokens[:, 1:].flatten())
    return store


@final
class KNNLanguageModel(nn.Module):
    r"""A trained language model whose next-token distribution is mixed with its neighbours'.

    .. math:: p(y \mid x) = \lambda\, p_{\text{kNN}}(y \mid x) + (1 - \lambda)\, p_{\text{LM}}(y \mid x)

    The maths is :func:`handbook_src.functional.knn_lm_log_probs`.  Nothing is trained: another
    datastore makes another model.

    Args:
        reader: a module that returns logits and the vectors to look up by.
        store: the datastore, filled by :func:`fill` with the same reader.
        k: neighbours.
        lam: the neighbours' share.
        temperature: of the neighbours' softmax.

    Shape:
        tokens ``b t`` to log-probabilities ``b t v``.

    Typical values:
        k 1024 and lam 0.25 on WikiText-103, lam 0.65 to adapt to another domain; temperature 1 there, 10
        and more where vectors are long. Vectors: the input of the last feed-forward layer.

    Raises:
        ConfigError: ``k`` below one, ``lam`` outside [0, 1], a temperature that is not positive.
        DataError: the store is empty, at the first call.

    Source:
        Khandelwal et al. 2019, eqs. 2 and 3, arXiv:1911.00172
    """

    def __init__(
        self, reader: nn.Module, store: Datastore, *, k: int = 16, lam: float = 0.25, temperature: float = 1.0
    ) -> None:
        super().__init__()
        check_size("KNNLanguageModel", "k", k)
        check_probability("KNNLanguageModel", "lam", lam, below_one=False)
        check_positive("KNNLanguageModel", "temperature", temperature)
        if not isinstance(store, Datastore):
            got = type(store).__name__
            raise ConfigError("KNNLanguageModel store", got=got, want="a Datastore", remedy="Fill one with fill().")
        self.reader, self.store, self.k, self.lam, self.temperature = reader, store, k, lam, temperature

    def forward(self, tokens: Int[Tensor, "b t"]) -> Float[Tensor, "b t v"]:
        """Return the log-probabilities of the next token at every position."""
        logits, vectors = self.reader(tokens)
        distances, found = self.store.search(vectors.flatten(0, 1), self.k)
        distances, found = (x.unflatten(0, tuple(tokens.shape)) for x in (distances, found))
        return knn_lm_log_probs(logits, distances, found, self.lam, temperature=self.temperature)

    def extra_repr(self) -> str:
        return f"k={self.k}, lam={self.lam}, temperature={self.temperature}, pairs={len(self.store)}"


def _integers(x: Tensor) -> bool:
    return x.dtype in (torch.int32, torch.int64)
