"""Who is let into the queue."""

from __future__ import annotations

import pytest
from lora_server.config import EngineConfig
from lora_server.engine.job import EngineJob, Timings
from lora_server.engine.jobs import JobTable
from lora_server.errors import QueueFullError
from lora_server.scheduler.throughput import Throughput
from lora_server.types import GenerationParameters, GenerationRequest

PIXELS, STEPS = 64 * 64, 10


@pytest.fixture
def table() -> JobTable:
    """A queue of four, two for each tenant, at one second a step."""
    throughput = Throughput()
    throughput.observe(PIXELS, 1.0)
    return JobTable(EngineConfig(max_queued_requests=4, max_queued_per_tenant=2), lambda: 0.0, throughput)


def enter(table: JobTable, name: str, tenant: str) -> EngineJob:
    """Lets a request of ten steps in."""
    request = GenerationRequest(name, GenerationParameters("x", "", 64, 64, STEPS, 4.0, 0, 1), tenant=tenant)
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


def test_the_server_bound_holds_for_all(table: JobTable) -> None:
    """The fifth of all is refused, whoever asks, and is told the mean time of a request."""
    for name in ("a1", "a2", "b1", "b2"):
        enter(table, name, name[0])
    with pytest.raises(QueueFullError) as full:
        enter(table, "c1", "c")
    assert "max_queued_per_tenant" not in full.value.metadata
    assert full.value.retry_after_s == pytest.approx(STEPS)


def test_the_wait_of_a_tenant_counts_the_turns_of_others(table: JobTable) -> None:
    """With three tenants waiting, a place in one's own line is free after three requests."""
    for name in ("a1", "a2", "b1"):
        enter(table, name, name[0])
    with pytest.raises(QueueFullError) as full:
        enter(table, "a3", "a")
    assert full.value.retry_after_s == pytest.approx(2 * STEPS)


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
    assert table.info().estimated_wait_s == pytest.approx(3.0)


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
