"""Which adapter lies in which pages of the device stack; a pure data structure.

A page is a fixed number of columns. An adapter of rank R takes ceil(R / page) pages, anywhere. Adapters stay where they
are between batches, so a batch that needs the same ones again writes nothing. The caller writes the contents.

| invariant | |
|---|---|
| a page | belongs to at most one adapter |
| an adapter | has all its pages or none |
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass

from lora_server.types import Digest


@dataclass(frozen=True, slots=True)
class Placement:
    """Where the adapters of a batch lie.

    Attributes:
        pages: By digest, the pages in the order of the adapter's columns.
        new: The digests whose contents must be written.
        num_pages: All pages of the batch are below this one.
    """

    pages: Mapping[Digest, tuple[int, ...]]
    new: tuple[Digest, ...]
    num_pages: int


class PageTable:
    """A fixed number of pages; the least recently used adapters make room. Not thread-safe: the engine thread's own."""

    def __init__(self, page_columns: int, num_pages: int) -> None:
        self.page_columns = page_columns
        self.num_pages = num_pages
        self._pages: OrderedDict[Digest, tuple[int, ...]] = OrderedDict()

    def pages_for(self, rank: int) -> int:
        """How many pages an adapter of this rank takes."""
        return -(-rank // self.page_columns)

    def place(self, ranks: Mapping[Digest, int], limit: int | None = None) -> Placement | None:
        """Gives every adapter its pages, all of them below *limit* (default: all pages).

        Returns None, changing nothing, if they do not fit together.
        """
        limit = self.num_pages if limit is None else limit
        if sum(map(self.pages_for, ranks.values())) > limit:
            return None
        for digest in ranks:
            if digest in self._pages and max(self._pages[digest]) >= limit:
                del self._pages[digest]
        new = tuple(digest for digest in ranks if digest not in self._pages)
        free = self._free_pages(sum(self.pages_for(ranks[digest]) for digest in new), ranks, limit)
        for digest in new:
            count = self.pages_for(ranks[digest])
            self._pages[digest], free = tuple(free[:count]), free[count:]
        for digest in ranks:
            self._pages.move_to_end(digest)
        return Placement({digest: self._pages[digest] for digest in ranks}, new, limit)

    def pages_of(self, digest: Digest) -> tuple[int, ...]:
        """The pages of an adapter, in the order of its columns; none if it is not there."""
        return self._pages.get(digest, ())

    def forget(self, digest: Digest) -> None:
        """Frees an adapter's pages; idempotent."""
        self._pages.pop(digest, None)

    def clear(self) -> None:
        """Frees all pages."""
        self._pages.clear()

    def check_integrity(self) -> None:
        """Recomputes the books; AssertionError if they are wrong."""
        used = [page for pages in self._pages.values() for page in pages]
        assert len(used) == len(set(used))
        assert all(0 <= page < self.num_pages for page in used)
        assert all(self._pages.values())

    def _free_pages(self, count: int, keep: Mapping[Digest, int], limit: int) -> list[int]:
        """Returns *count* free pages below *limit*; drops adapters outside *keep*, the least recently used first."""
        used = {page for pages in self._pages.values() for page in pages}
        free = [page for page in range(limit) if page not in used]
        for digest in [digest for digest in self._pages if digest not in keep]:
            if len(free) >= count:
                break
            if min(self._pages[digest]) < limit:
                free += [page for page in self._pages.pop(digest) if page < limit]
        assert len(free) >= count
        return sorted(free)
