"""The waiting line: tenants take turns, nobody is lost."""

from __future__ import annotations

from dataclasses import dataclass

from hypothesis import given
from hypothesis import strategies as st
from lora_server.scheduler.queue import TenantQueue


@dataclass(eq=False)
class Job:
    """A job with a tenant."""

    tenant: str
    number: int
    ready: bool = True


def test_tenants_take_turns() -> None:
    """A tenant with many jobs does not delay one with few."""
    queue: TenantQueue[Job] = TenantQueue()
    for number in range(3):
        queue.push(Job("big", number))
    queue.push(Job("small", 9))
    served = [queue.pop_next(lambda _: True) for _ in range(4)]
    assert [(job.tenant, job.number) for job in served if job] == [("big", 0), ("small", 9), ("big", 1), ("big", 2)]


def test_a_job_that_is_not_ready_is_passed_over_and_keeps_its_place() -> None:
    """A cold adapter delays only its own request."""
    queue: TenantQueue[Job] = TenantQueue()
    cold, warm = Job("t", 0, ready=False), Job("t", 1)
    queue.push(cold)
    queue.push(warm)
    assert queue.pop_next(lambda job: job.ready) is warm
    cold.ready = True
    assert queue.pop_next(lambda job: job.ready) is cold


@given(st.lists(st.integers(0, 3), max_size=30))
def test_with_k_tenants_everybody_is_served_within_k_turns(tenants: list[int]) -> None:
    """The bound on waiting: a tenant's first job is served after at most one job of each other tenant."""
    queue: TenantQueue[Job] = TenantQueue()
    for number, tenant in enumerate(tenants):
        queue.push(Job(str(tenant), number))
    order = list(queue)
    waiting = set(map(str, tenants))
    first_round = [queue.pop_next(lambda _: True) for _ in range(len(waiting))]
    assert {job.tenant for job in first_round if job} == waiting
    assert order[: len(waiting)] == first_round
