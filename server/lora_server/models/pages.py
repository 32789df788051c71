"""Writes adapters into the pages of the device stack: contents of tensors change, nothing else does."""

from __future__ import annotations

from collections.abc import Sequence

from lora_server.models.linear_store import LinearStore
from lora_server.models.weights import AdapterWeights


def write_pages(
    store: LinearStore, component: str, weights: AdapterWeights, pages: Sequence[int], page_columns: int
) -> None:
    """Puts the factors of one version into *pages*; a few asynchronous copies for each shape of linear.

    Linears that the version does not change, and columns beyond its rank, become zero.
    """
    changed = {delta.group: delta for delta in weights.groups.get(component, ())}
    for g in range(len(store.groups)):
        delta = changed.get(g)
        for k, page in enumerate(pages):
            first = page * page_columns
            a, b = store.page_a(g, first, first + page_columns), store.page_b(g, first, first + page_columns)
            a.zero_()
            b.zero_()
            if delta is None:
                continue
            part = slice(k * page_columns, (k + 1) * page_columns)
            rank = delta.a[:, part].shape[1]
            members = delta.members
            if members[-1] - members[0] + 1 == len(members):
                run = slice(members[0], members[-1] + 1)
                a[run, :rank] = delta.a[:, part]
                b[run, :, :rank] = delta.b[:, :, part]
            else:
                index = store.index(members)
                a[:, :rank].index_copy_(0, index, delta.a[:, part])
                b[:, :, :rank].index_copy_(0, index, delta.b[:, :, part])


def clear_pages(store: LinearStore, pages: Sequence[int], page_columns: int) -> None:
    """Makes *pages* zero in every linear."""
    for page in pages:
        first = page * page_columns
        for g in range(len(store.groups)):
            store.page_a(g, first, first + page_columns).zero_()
            store.page_b(g, first, first + page_columns).zero_()
