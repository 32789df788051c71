"""Small help for `concurrent.futures.Future`: chaining and gathering without a thread that waits.

Giving up goes one way, results the other: cancelling a future cancels what was begun for it alone, and a result that
comes all the same is undone. A future that was cancelled although nobody gave it up belongs to a pool that was shut
down.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import CancelledError, Future, InvalidStateError
from typing import Any, TypeVar

from lora_server.errors import ServerDrainingError

T = TypeVar("T")
A = TypeVar("A")
B = TypeVar("B")


def when_done(future: Future[T], action: Callable[[Future[T]], object]) -> None:
    """Runs *action* once, as `Future.add_done_callback`, and lets go of it then.

    A future keeps its callbacks for as long as it lives. Futures that know of each other would be cycles, and what has
    been read would lie in memory until the collector of cycles came by.
    """
    held = [action]
    future.add_done_callback(lambda done: held.pop()(done))


def complete(future: Future[T], value: T) -> bool:
    """Sets the result; False if the future was cancelled (or done) already."""
    try:
        future.set_result(value)
    except InvalidStateError:
        return False
    return True


def done(value: T) -> Future[T]:
    """Returns a future that has its result."""
    future: Future[T] = Future()
    complete(future, value)
    return future


def result_now(future: Future[T]) -> T | None:
    """Returns the result if it is there; else gives the future up and returns None, with nothing left behind.

    Raises what the future failed with.
    """
    if not future.done() and future.cancel():  # cancel fails if the result comes between the two
        return None
    return future.result()


def fail(future: Future[Any], error: BaseException) -> None:
    """Sets the error; ignored if the future was cancelled (or done) already."""
    try:
        future.set_exception(error)
    except InvalidStateError:
        return


def chain(
    first: Future[A],
    then: Callable[[A], Future[B] | B],
    into: Future[B],
    undo: Callable[[B], None] = lambda _: None,
) -> Future[B]:
    """Passes the result of *first* through *then* into *into*; errors go the same way. Returns *into*.

    *first* may be shared with others and is never cancelled; a future that *then* returns must be *into*'s alone. What
    comes after *into* was cancelled goes to *undo*.
    """

    def on_done(done: Future[A]) -> None:
        try:
            result = then(done.result())
        except CancelledError:
            fail(into, ServerDrainingError())
        except BaseException as error:
            fail(into, error)
        else:
            if isinstance(result, Future):
                _follow(result, into, undo)
            elif not complete(into, result):
                undo(result)

    when_done(first, on_done)
    return into


def recover(first: Future[T], otherwise: Callable[[BaseException], Future[T]]) -> Future[T]:
    """Passes on the result of *first*, which must be its alone, or what *otherwise* makes of its error (or raises)."""
    into: Future[T] = Future()
    when_cancelled(into, first.cancel)

    def on_done(done: Future[T]) -> None:
        try:
            error = done.exception()
            following = done if error is None else otherwise(error)
        except CancelledError:
            fail(into, ServerDrainingError())
        except BaseException as worse:
            fail(into, worse)
        else:
            _follow(following, into, lambda _: None)

    when_done(first, on_done)
    return into


def chain_own(
    first: Future[A],
    then: Callable[[A], Future[B] | B],
    undo: Callable[[B], None] = lambda _: None,
) -> Future[B]:
    """As `chain`, into a new future, for a *first* that is its alone: cancelling the new one cancels *first*."""
    into: Future[B] = Future()
    when_cancelled(into, first.cancel)
    return chain(first, then, into, undo)


def _follow(inner: Future[B], into: Future[B], undo: Callable[[B], None]) -> None:
    def on_done(done: Future[B]) -> None:
        try:
            value = done.result()
        except CancelledError:
            fail(into, ServerDrainingError())
        except BaseException as error:
            fail(into, error)
        else:
            if not complete(into, value):
                undo(value)

    when_done(inner, on_done)
    when_cancelled(into, inner.cancel)


def when_cancelled(future: Future[Any], action: Callable[[], object]) -> None:
    """Runs *action*, on whatever thread cancels, if *future* is cancelled; at once if it has been."""
    when_done(future, lambda done: action() if done.cancelled() else None)


def gather(futures: Sequence[Future[T]]) -> Future[tuple[T, ...]]:
    """Returns a future of all results, in order; the first error of any fails it. Waits for all, on no thread.

    Cancelling it cancels *futures*, which must be its alone.
    """
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
            except CancelledError:
                fail(gathered, ServerDrainingError())
            except BaseException as error:
                fail(gathered, error)

    for future in futures:
        when_done(future, on_done)
        when_cancelled(gathered, future.cancel)
    if not futures:
        complete(gathered, ())
    return gathered
