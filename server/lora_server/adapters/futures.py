"""Small help for `concurrent.futures.Future`: chaining and gathering without a thread that waits."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import CancelledError, Future, InvalidStateError
from typing import Any, TypeVar

T = TypeVar("T")
A = TypeVar("A")
B = TypeVar("B")


def complete(future: Future[T], value: T) -> bool:
    """Sets the result; False if the future was cancelled (or done) already."""
    try:
        future.set_result(value)
    except InvalidStateError:
        return False
    return True


def fail(future: Future[Any], error: BaseException) -> None:
    """Sets the error; ignored if the future was cancelled (or done) already."""
    try:
        future.set_exception(error)
    except InvalidStateError:
        return


def chain(first: Future[A], then: Callable[[A], Future[B] | B], into: Future[B]) -> Future[B]:
    """Passes the result of *first* through *then* into *into*; errors go the same way. Returns *into*."""

    def on_done(done: Future[A]) -> None:
        try:
            result = then(done.result())
        except CancelledError:
            into.cancel()
        except BaseException as error:
            fail(into, error)
        else:
            if isinstance(result, Future):
                chain(result, lambda value: value, into)
            else:
                complete(into, result)

    first.add_done_callback(on_done)
    return into


def gather(futures: Sequence[Future[T]]) -> Future[tuple[T, ...]]:
    """Returns a future of all results, in order; the first error of any fails it. Waits for all, on no thread."""
    gathered: Future[tuple[T, ...]] = Future()
    left = len(futures)
    lock = threading.Lock()

    def on_done(_: Future[T]) -> None:
        nonlocal left
        with lock:
            left -= 1
            last = left == 0
        if last:
            try:
                complete(gathered, tuple(future.result() for future in futures))
            except BaseException as error:
                fail(gathered, error)

    for future in futures:
        future.add_done_callback(on_done)
    if not futures:
        complete(gathered, ())
    return gathered
