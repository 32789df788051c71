"""What a request has read by sources before it is accepted as a whole."""

from __future__ import annotations

from lora_server.adapters.books import Books
from lora_server.adapters.records import Record, Standing


class Drafts:
    """What one request has read by sources, found by nobody until it is accepted. With the manager's lock held."""

    def __init__(self, books: Books) -> None:
        self._books = books
        self._made: list[Record] = []
        self._closed = False

    def add(self, record: Record) -> None:
        """Takes up a draft; if the request has ended meanwhile, it goes at once."""
        self._made.append(record)
        if self._closed:
            self.close()

    def close(self) -> bool:
        """Forgets what has not been accepted, now and later; returns whether there is any."""
        self._closed = True
        unaccepted = [record for record in self._made if record.standing is Standing.DRAFT]
        for record in unaccepted:
            self._books.drop(record)
        self._made.clear()
        return bool(unaccepted)
