"""A key-value cache in pages: many texts of any length in one store, prompts shared."""

from __future__ import annotations

from typing import final

import torch
from jaxtyping import Int
from torch import Tensor

from handbook_src.check import check_size
from handbook_src.errors import ConfigError, ShapeError
from handbook_src.layers.attention.kv_cache import KV, KVCache, held_bytes, room


@final
class PagePool:
    """A fixed store of pages that many caches draw from and give back to.

    Args:
        pages: how many pages there are.
        page_size: tokens a page holds.
    """

    def __init__(self, pages: int, page_size: int = 16) -> None:
        check_size("PagePool", "pages", pages)
        check_size("PagePool", "page_size", page_size)
        self.pages, self.page_size = pages, page_size
        self.users = [0] * pages
        self._free = list(range(pages - 1, -1, -1))
        self.k: Tensor | None = None
        self.v: Tensor | None = None

    @property
    def free(self) -> int:
        """Pages that nobody uses."""
        return len(self._free)

    def take(self, count: int) -> list[int]:
        """Hand out ``count`` pages."""
        check_size("PagePool.take", "count", count, least=0)
        if count > self.free:
            raise ShapeError(
                "PagePool.take",
                got=f"a request for {count} pages of {self.page_size} tokens",
                want=f"at most the {self.free} free ones of {self.pages}",
                remedy="reset() a finished cache, or make a larger pool.",
            )
        taken = [self._free.pop() for _ in range(count)]
        for page in taken:
            self.users[page] = 1
        return taken

    def share(self, pages: list[int]) -> None:
        """Count one more user of each page.

        Raises:
            ConfigError: a page that nobody uses.
        """
        self._check(pages, "PagePool.share")
        for page in pages:
            self.users[page] += 1

    def release(self, pages: list[int]) -> None:
        """Count one user less; a page without users is free again.

        Raises:
            ConfigError: a page that nobody uses.
        """
        self._check(pages, "PagePool.release")
        for page in pages:
            self.users[page] -= 1
            if self.users[page] == 0:
                self._free.append(page)

    def _check(self, pages: list[int], op: str) -> None:
        if not isinstance(pages, list) or not all(type(page) is int and 0 <= page < self.pages for page in pages):
            want = f"a list of numbers below {self.pages}"
            raise ConfigError(op, got=repr(pages), want=want, remedy="Pass what take() returned.")
        idle = [page for page in pages if self.users[page] == 0]
        if idle:
            remedy = "Pass what take() or share() counted, and release it once."
            raise ConfigError(op, got=f"free pages {idle}", want="pages in use", remedy=remedy)

    def page_bytes(self) -> int:
        """Bytes of one page, keys and values."""
        return held_bytes(self.k, self.v) // self.pages

    def allocate(self, k: Tensor, v: Tensor) -> None:
        """Make the store on first use, and refuse keys and values that don't fit it later."""
        if self.k is None or self.v is None:
            self.k, self.v = (room(x, self.pages, self.page_size, *x.shape[2:]) for x in (k, v))
            return
        now = (*k.shape[2:], v.shape[3], k.dtype, k.device)
        was = (*self.k.shape[2:], self.v.shape[3], self.k.dtype, self.k.device)
        if now != was:
            raise ShapeError(
                "PagePool heads, features of k and v, dtype, device",
                got=now,
                want=f"{was}, as in the first update",
                remedy="One pool serves caches of one kind of layer.",
            )


@final
class PagedCache(KVCache):
    """Store tokens in fixed-size pages found through a block table, as an operating system does.

    A text wastes at most ``page_size - 1`` tokens, pages need not lie side by side, and
    :meth:`fork` shares a prompt's pages between continuations until one of them writes.  A cache that is
    dropped gives its pages back, as ``reset()`` does.

    Args:
        pool: where pages come from and go back to.

    Source:
        Kwon et al. 2023, section 4.1-4.3, arXiv:2309.06180
    """

    def __init__(self, pool: PagePool) -> None:
        super().__init__()
        if not isinstance(pool, PagePool):
            raise ConfigError(
                "PagedCache pool", got=repr(pool), want="a PagePool", remedy="PagedCache(PagePool(pages=64))."
            )
        self.pool = pool
        self.table: list[list[int]] = []

    def __del__(self) -> None:
        if hasattr(self, "table"):  # not where the pool was refused
            self._clear()

    @property
    def length(self) -> int:
        return self.seen

    @property
    def bytes(self) -> int:
        return sum(len(row) for row in self.table) * self.pool.page_bytes()

    def fork(self) -> PagedCache:
        """Return a cache with the same past that shares its pages."""
        other = PagedCache(self.pool)
        other.seen, other._like = self.seen, self._like
        other.table = [list(row) for row in self.table]
        for row in other.table:
            self.pool.share(row)
        return other

    def __copy__(self) -> PagedCache:
        return self.fork()  # two caches on one table would give its pages back twice

    def _store(self, k: Tensor, v: Tensor) -> KV:
        self.pool.allocate(k, v)
        assert self.pool.k is not None
        assert self.pool.v is not None
        page_size, end = self.pool.page_size, self.seen + k.shape[1]
        self._grow(k.shape[0], -(-end // page_size))
        # typed and shaped by hand: of no pages torch would make a float vector, which indexes nothing
        table = torch.tensor(self.table, dtype=torch.long, device=k.device).view(len(self.table), -(-end // page_size))
        at = torch.arange(self.seen, end, device=k.device)
        page, slot = table[:, at // page_size], at % page_size
        self.pool.k[page, slot] = k
        self.pool.v[page, slot] = v
        return self._gather(self.pool.k, table, end), self._gather(self.pool.v, table, end)

    @staticmethod
    def _gather(pages: Tensor, table: Int[Tensor, "b n"], end: int) -> Tensor:
        return pages[table].flatten(1, 2)[:, :end]

    def _grow(self, batch: int, pages: int) -> None:
        """Take the pages that are missing, and own the half-full one before writing to it."""
        held = len(self.table[0]) if self.table else 0
        shared = self.seen % self.pool.page_size > 0
        copies = [b for b, row in enumerate(self.table) if shared and self.pool.users[row[-1]] > 1]
        taken = self.pool.take(batch * (pages - held) + len(copies))
        self.table = self.table or [[] for _ in range(batch)]
        assert self.pool.k is not None
        assert self.pool.v is not None
        for b in copies:
            old, new = self.table[b][-1], taken.pop()
            self.pool.k[new], self.pool.v[new] = self.pool.k[old], self.pool.v[old]
            self.pool.release([old])
            self.table[b][-1] = new
        for row in self.table:
            row += [taken.pop() for _ in range(pages - held)]

    def _clear(self) -> None:
        for row in self.table:
            self.pool.release(row)
        self.table = []
