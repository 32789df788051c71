"""Who is let into the queue, and what is held for whom."""

from __future__ import annotations

import pytest
from lora_server.config import EngineConfig
from lora_server.engine.holdings import Holdings
from lora_server.engine.job import EngineJob, Timings
from lora_server.engine.jobs import JobTable
from lora_server.errors import QueueFullError, UnreadImagesError, WaitTooLongError
from lora_server.scheduler.shares import Shares
from lora_server.scheduler.throughput import Throughput
from lora_server.types import GenerationParameters, GenerationRequest

PIXELS, STEPS = 64 * 64, 10
ONE_SECOND_A_STEP = Throughput()
ONE_SECOND_A_STEP.observe(PIXELS, 1.0)


def table_of(**config: object) -> JobTable:
    """A table at one second a step, at the time 0."""
    return JobTable(EngineConfig.model_validate({"max_batch_images": 1, **config}), lambda: 0.0, ONE_SECOND_A_STEP)


@pytest.fixture
def table() -> JobTable:
    """A queue of four, two for each tenant."""
    return table_of(max_queued_requests=4, max_queued_per_tenant=2)


def enter(
    table: JobTable, name: str, tenant: str, steps: int = STEPS, images: int = 1, deadline_s: float | None = None
) -> EngineJob:
    """Lets a request in."""
    parameters = GenerationParameters("x", "", 64, 64, steps, 4.0, 0, images)
    request = GenerationRequest(name, parameters, tenant=tenant, deadline_s=deadline_s)
    job, _ = table.enter(request, lambda: EngineJob(request, Timings(0.0), lambda _: None))
    return job


def test_a_tenant_cannot_fill_the_queue(table: JobTable) -> None:
    """Its third request is refused by name of its own bound; another tenant's first is not."""
    enter(table, "a1", "a")
    enter(table, "a2", "a")
    with pytest.raises(QueueFullError) as full:
        enter(table, "a3", "a")
    assert full.value.metadata["max_queued_per_tenant"] == "2"
    enter(table, "b1", "b")
    assert table.info().waiting_tenants == 2


def test_with_the_settings_as_they_come_a_share_is_kept_for_others() -> None:
    """A tenant gets three quarters of the queue; where all callers are one tenant, it gets all."""
    for share, most in ((None, 48), (1.0, 64)):
        table = table_of(max_expected_wait_s=1e9, **({"tenant_share": share} if share else {}))
        for number in range(most):
            enter(table, str(number), "evil")
        with pytest.raises(QueueFullError):
            enter(table, "more", "evil")
        assert table.info().max_queued_per_tenant == most


def test_the_server_bound_holds_for_all(table: JobTable) -> None:
    """Who waits gets no more when all places are taken, and is told the mean time of a request; who does not, does."""
    for name in ("a1", "a2", "b1", "c1"):
        enter(table, name, name[0])
    with pytest.raises(QueueFullError) as full:
        enter(table, "c2", "c")
    assert "max_queued_per_tenant" not in full.value.metadata
    assert full.value.retry_after_s == pytest.approx(1.1 * STEPS, rel=0.1)
    enter(table, "d1", "d")
    with pytest.raises(QueueFullError):
        enter(table, "d2", "d")


def test_the_wait_of_a_tenant_counts_the_turns_of_others(table: JobTable) -> None:
    """With two tenants waiting, a place in one's own line is free after two requests; the next caller's after four."""
    for name in ("a1", "a2", "b1"):
        enter(table, name, name[0])
    waits = []
    for name in ("a3", "a4"):
        with pytest.raises(QueueFullError) as full:
            enter(table, name, "a")
        waits.append(full.value.retry_after_s)
    assert waits == [pytest.approx(1.1 * 2 * STEPS, rel=0.1), pytest.approx(3 * STEPS * 1.5, rel=0.35)]


def test_who_starts_or_leaves_makes_room(table: JobTable) -> None:
    """Both count, and each once."""
    first, second = enter(table, "a1", "a"), enter(table, "a2", "a")
    table.started(first)
    table.started(first)
    enter(table, "a3", "a")
    assert table.leave(second, keep=False)
    assert not table.leave(second, keep=False)
    enter(table, "a4", "a")
    assert (table.info().queued_requests, table.failed_requests) == (2, 1)


def test_done_work_shortens_the_estimate(table: JobTable) -> None:
    """What has been stepped is not waited for."""
    job = enter(table, "a1", "a")
    assert table.info().estimated_wait_s == pytest.approx(10.0)
    job.completed_steps = 7
    table.progressed([job])
    assert table.info().estimated_wait_s == pytest.approx(3.0)


def test_a_request_that_would_wait_too_long_is_refused_at_once() -> None:
    """It is told the wait, the most there may be, and to come back when the rest has been worked off."""
    table = table_of(max_expected_wait_s=45)
    for number in range(5):
        job = enter(table, str(number), "t")
        assert job.expected_s == pytest.approx(10 * (number + 1))
    with pytest.raises(WaitTooLongError) as full:
        enter(table, "more", "t")
    assert full.value.reason == "QUEUE_FULL"
    assert full.value.metadata == {"expected_wait_s": "50.000", "max_wait_s": "45.000"}
    assert 10 <= full.value.retry_after_s <= 12
    assert enter(table, "short", "t", steps=1).expected_s == pytest.approx(
        6
    )  # fair turns: a step of each of the others
    assert enter(table, "other", "u").expected_s == pytest.approx(20)  # and as much of the other tenant


def test_a_huge_request_is_not_what_a_small_one_waits_for() -> None:
    """However much is left of it; another huge one is refused."""
    table = table_of()
    enter(table, "huge", "t", steps=500, images=16)
    assert enter(table, "small", "t", steps=4).expected_s == pytest.approx(8)
    assert enter(table, "other", "u", steps=4).expected_s == pytest.approx(8)
    with pytest.raises(WaitTooLongError):
        enter(table, "huge too", "t", steps=500, images=16)


def test_a_deadline_that_the_queue_lets_pass_is_refused_at_once() -> None:
    """The wait and its own work must be over before; alone, a request is tried, for a rate is an estimate."""
    table = table_of()
    enter(table, "first", "t", deadline_s=5)
    with pytest.raises(WaitTooLongError) as full:
        enter(table, "late", "t", deadline_s=19)
    assert full.value.metadata["max_wait_s"] == "9.000"
    enter(table, "in time", "t", deadline_s=21)


def test_a_promise_holds_though_others_share_the_steps() -> None:
    """The first of eight that come together is done with the eighth: they share a batch. Nobody is refused for that."""
    table = table_of(max_batch_images=8, max_expected_wait_s=75)
    assert [enter(table, str(number), "t").expected_s for number in range(8)] == [pytest.approx(80)] * 8
    assert enter(table, "many", "u", images=8, steps=1).expected_s == pytest.approx(16)


def test_before_the_first_step_nobody_is_refused_for_a_wait() -> None:
    """And nothing is promised."""
    table = JobTable(EngineConfig(max_expected_wait_s=1e-9), lambda: 0.0)
    assert [enter(table, name, "t", deadline_s=1e-9).expected_s for name in "ab"] == [None, None]


def test_a_tenants_ids_and_places_are_its_own(table: JobTable) -> None:
    """Two tenants use one request id: two jobs, a place each, given back one by one."""
    mine, theirs = enter(table, "same", "a"), enter(table, "same", "b")
    assert mine is not theirs
    assert enter(table, "same", "a") is mine
    assert table.info().waiting_tenants == 2
    table.started(mine)
    assert (table.info().waiting_tenants, table.info().queued_requests) == (1, 1)
    assert table.leave(theirs, keep=False)
    assert not table.leave(theirs, keep=False)
    assert (table.info().waiting_tenants, table.info().queued_requests) == (0, 0)


def test_who_leaves_too_much_unread_gets_nothing_new() -> None:
    """By its own bound, and with its numbers; others go on, and so does it when it has read."""
    holdings = Holdings(Shares.by(1000, 0.5))
    table = JobTable(EngineConfig(), lambda: 0.0, ONE_SECOND_A_STEP, holdings)
    job = enter(table, "1", "slow")
    holdings.change(job, 500)
    with pytest.raises(UnreadImagesError) as full:
        enter(table, "2", "slow")
    assert full.value.reason == "QUEUE_FULL"
    assert full.value.metadata == {"unread_bytes": "500", "max_unread_bytes": "500"}
    enter(table, "2", "other")
    assert table.info().unread_bytes == 500
    holdings.change(job, -500)
    enter(table, "2", "slow")
