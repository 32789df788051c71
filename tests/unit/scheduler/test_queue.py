"""The waiting line: tenants and requests take turns by work, image by image, and nobody is lost."""

from __future__ import annotations

from dataclasses import dataclass

from hypothesis import given
from hypothesis import strategies as st
from lora_server.scheduler.queue import FairQueue


@dataclass(eq=False)
class Job:
    """A job with a tenant, and images of one work."""

    tenant: str
    name: str
    images: int = 1
    work: float = 1.0
    ready: bool = True


def begin(queue: FairQueue[Job]) -> Job | None:
    """Lets the next image begin; takes its job out with the last one."""
    job = queue.next(lambda each: each.ready)
    if job is not None:
        queue.begin(job, job.work)
        job.images -= 1
        if not job.images:
            queue.remove(job)
    return job


def queue_of(*jobs: Job) -> FairQueue[Job]:
    queue: FairQueue[Job] = FairQueue()
    for job in jobs:
        queue.push(job)
    return queue


def served(queue: FairQueue[Job], count: int) -> str:
    return "".join(job.name for _ in range(count) if (job := begin(queue)))


def test_tenants_take_turns() -> None:
    """A tenant with many jobs does not delay one with few."""
    queue = queue_of(*(Job("big", name) for name in "abc"), Job("small", "z"))
    assert served(queue, 4) == "azbc"


def test_turns_are_of_work() -> None:
    """One image of ten times the work is a turn of ten small ones."""
    queue = queue_of(Job("big", "B", images=2, work=10), Job("small", "s", images=12, work=1))
    assert served(queue, 14) == "B" + 10 * "s" + "B" + 2 * "s"


def test_images_of_a_tenants_requests_take_turns() -> None:
    """A request of many images lets a later one of the same tenant in after its first."""
    queue = queue_of(Job("t", "a", images=16, work=500))
    assert served(queue, 2) == "aa"
    queue.push(Job("t", "b", work=4))
    assert served(queue, 2) == "ba"


def test_a_job_that_is_not_ready_is_passed_over_and_keeps_its_place() -> None:
    """A cold adapter delays only its own request."""
    cold, warm = Job("t", "c", ready=False), Job("t", "w")
    queue = queue_of(cold, warm)
    assert begin(queue) is warm
    cold.ready = True
    assert begin(queue) is cold


def test_new_requests_without_end_do_not_hold_up_an_old_one() -> None:
    """The second image of a large request has its turn while small requests of its tenant keep coming."""
    queue = queue_of(Job("t", "L", images=2, work=8))
    assert served(queue, 1) == "L"
    order = ""
    while not order.endswith("L"):
        queue.push(Job("t", "s"))
        order += served(queue, 1)
    assert 4 <= len(order) < 30


def test_a_tenant_that_comes_back_has_not_lost_its_debts() -> None:
    """Who has had much, leaves and comes again, is behind the other until that has had as much."""
    queue = queue_of(Job("big", "B", work=5), Job("other", "o", images=9))
    assert served(queue, 1) == "B"
    queue.push(Job("big", "B", work=5))
    assert served(queue, 7) == "ooooooB"


@given(st.lists(st.tuples(st.sampled_from("abcd"), st.integers(1, 4), st.integers(1, 20)), max_size=20))
def test_nobody_is_lost_and_tenants_get_equal_work(wanted: list[tuple[str, int, int]]) -> None:
    """While two tenants wait, what they have begun differs by at most one image of each; all images are begun once."""
    jobs = [Job(tenant, str(number), images, work) for number, (tenant, images, work) in enumerate(wanted)]
    most = max((job.work for job in jobs), default=0)
    queue, done = queue_of(*jobs), dict.fromkeys("abcd", 0.0)
    total = sum(job.images for job in jobs)
    for _ in range(total):
        assert set(queue) == {job for job in jobs if job.images}
        waiting = {job.tenant for job in queue}
        job = begin(queue)
        assert job is not None
        done[job.tenant] += job.work
        backlogged = [done[tenant] for tenant in waiting]
        assert done[job.tenant] - min(backlogged) <= 2 * most
    assert begin(queue) is None
    assert len(queue) == 0
