"""The waiting list and the chains of futures: nobody is served twice, and nobody's failure is another's."""

from __future__ import annotations

import threading
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor

import pytest
from lora_server.adapters.futures import chain, chain_own, gather, result_now
from lora_server.adapters.waiting import WaitingList
from lora_server.errors import ServerDrainingError


def test_retries_from_many_threads_give_one_result() -> None:
    """An attempt that has succeeded is not made again, whoever retries at the same moment."""
    for _ in range(100):
        waiting, open_now, made = WaitingList(threading.RLock()), threading.Event(), []
        future: Future[int] = Future()

        def attempt(made: list[int] = made, open_now: threading.Event = open_now) -> int | None:
            if open_now.is_set():
                made.append(1)
            return len(made) or None

        waiting.complete_when_possible(attempt, future)
        open_now.set()
        with ThreadPoolExecutor(4) as pool:
            for _ in range(4):
                pool.submit(waiting.retry)
        assert (future.result(5), len(made), len(waiting)) == (1, 1, 0)


def test_a_failing_attempt_fails_its_own_future_only() -> None:
    """An internal error of one who waits does not reach whoever lets something go, and the others get their turn."""
    waiting = WaitingList(threading.RLock())
    broken: Future[int] = Future()
    well: Future[int] = Future()
    states = {"broken": False, "well": False}

    def fails() -> int | None:
        if states["broken"]:
            raise KeyError("digest")
        return None

    waiting.complete_when_possible(fails, broken)
    waiting.complete_when_possible(lambda: 1 if states["well"] else None, well)
    states.update(broken=True, well=True)
    waiting.retry()
    assert isinstance(broken.exception(1), KeyError)
    assert well.result(1) == 1


def test_a_closed_list_fails_those_who_come_late() -> None:
    """After close nobody is put into the list, where nobody would ever try again."""
    waiting = WaitingList(threading.RLock())
    early: Future[int] = Future()
    late: Future[int] = Future()
    waiting.complete_when_possible(lambda: None, early)
    waiting.close()
    waiting.complete_when_possible(lambda: None, late)
    for future in (early, late):
        with pytest.raises(ServerDrainingError):
            future.result(1)


def test_cancelling_the_end_of_a_chain_cancels_what_was_begun_for_it() -> None:
    """The inner future is given up with the outer; a shared first one is not."""
    shared: Future[int] = Future()
    inner: Future[int] = Future()
    outer = chain(shared, lambda _: inner, Future())
    shared.set_result(1)
    outer.cancel()
    assert inner.cancelled()
    untouched: Future[int] = Future()
    chain(untouched, lambda value: value, Future()).cancel()
    assert not untouched.cancelled()


def test_a_result_that_comes_after_the_cancellation_is_undone() -> None:
    """What was made for somebody who has left goes to undo, and is not lost."""
    first: Future[int] = Future()
    undone: list[int] = []
    outer = chain(first, lambda value: value + 1, Future(), undo=undone.append)
    outer.cancel()
    first.set_result(1)
    assert undone == [2]


def test_cancelling_a_gathering_cancels_its_parts() -> None:
    """All parts are given up, and the gathering ends as cancelled."""
    parts: list[Future[int]] = [Future(), Future()]
    end = chain_own(gather(parts), len)
    end.cancel()
    assert all(part.cancelled() for part in parts)
    with pytest.raises(CancelledError):
        end.result(0)


def test_a_result_that_comes_while_it_is_given_up_is_not_lost() -> None:
    """Between the look and the cancellation a lease may come; it is returned, so that it can be given back."""

    class Late(Future[int]):
        def done(self) -> bool:
            was_done = super().done()
            if not was_done:
                self.set_result(7)
            return was_done

    assert result_now(Late()) == 7
    waiting: Future[int] = Future()
    assert result_now(waiting) is None
    assert waiting.cancelled()
