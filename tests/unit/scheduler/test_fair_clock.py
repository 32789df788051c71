"""Fair shares of the steps: who is behind, and a simulation of queue, places, clock and policy together."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Mapping
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from lora_server.scheduler.costs import StepCosts
from lora_server.scheduler.fair_clock import FairClock
from lora_server.scheduler.pages import PageTable
from lora_server.scheduler.places import ActiveWork, Places
from lora_server.scheduler.policy import Rules, choose_batch
from lora_server.scheduler.queue import FairQueue

MAX_IMAGES = 8
MAX_STEPS_BEHIND = 4


@dataclass(eq=False)
class Job:
    """A request: images of one size and number of steps."""

    tenant: str
    images: int
    steps: int
    pixels: int
    begun: int = 0
    first_step: int | None = None
    left: int = 0

    def __post_init__(self) -> None:
        self.left = self.images


@dataclass(eq=False)
class Image:
    """An active image; the policy's candidate."""

    job: Job
    clock: FairClock[Job]
    remaining_steps: int
    composition: Hashable = ()
    rows: int = 2
    takes_slots: bool = True
    ranks: Mapping[str, int] = field(default_factory=dict)

    @property
    def shape(self) -> int:
        return self.job.pixels

    @property
    def latent_pixels(self) -> int:
        return self.job.pixels

    @property
    def behind(self) -> float:
        of_tenant, of_request = self.clock.behind(self.job)
        return (of_tenant / MAX_STEPS_BEHIND + of_request / self.job.steps) / self.job.pixels


class Simulation:
    """The engine's loop over the pure parts; the time is the work that is done."""

    def __init__(self, share: float = 0.75, places: int = 32) -> None:
        self.clock: FairClock[Job] = FairClock()
        self.queue: FairQueue[Job] = FairQueue()
        self.images: list[Image] = []
        self.rules = Rules(MAX_IMAGES, 2 * MAX_IMAGES)
        self.costs = StepCosts()
        self.share, self.places = share, places
        self.work = 0
        self.served: Counter[str] = Counter()

    def push(self, job: Job) -> Job:
        self.queue.push(job)
        return job

    def begin(self) -> None:
        active = [ActiveWork(i.job.tenant, i.job, i.remaining_steps * i.job.pixels) for i in self.images]
        places = Places(self.places, self.share, active)

        def work(job: Job) -> ActiveWork:
            return ActiveWork(job.tenant, job, job.steps * job.pixels)

        while (job := self.queue.next(lambda each: places.has_room(work(each)))) is not None:
            self.queue.begin(job, job.steps * job.pixels)
            places.take(work(job))
            job.begun += 1
            if job.begun == job.images:
                self.queue.remove(job)
            self.images.append(Image(job, self.clock, job.steps))
            self.clock.join(job)

    def step(self) -> None:
        self.begin()
        batch = choose_batch(self.images, self.rules, self.costs, PageTable(16, 8), ())
        if batch is None:
            return
        done: Counter[Job] = Counter()
        for image in batch.members:
            image.remaining_steps -= 1
            image.job.left -= image.remaining_steps == 0
            done[image.job] += image.job.pixels
            if image.job.first_step is None:
                image.job.first_step = self.work
        self.work += done.total()
        for job, work in done.items():
            self.served[job.tenant] += work
        self.clock.serve(done)
        self.images = [image for image in self.images if image.remaining_steps]
        for job in done:
            if not any(image.job is job for image in self.images):
                self.clock.leave(job)


def first_step_bound(small: Job, largest: int, tenants: int, requests: int) -> int:
    """Work until the first step: fair shares of its steps, four and all of an image, and a few batches."""
    own = (MAX_STEPS_BEHIND + small.steps) * small.pixels
    return own * tenants * requests + (tenants + requests + 2) * MAX_IMAGES * largest


HEAVY = st.builds(
    Job,
    tenant=st.just("heavy"),
    images=st.integers(1, 16),
    steps=st.integers(50, 500),
    pixels=st.sampled_from([16, 64, 256]),
)


@settings(max_examples=60, deadline=None)
@given(heavy=st.lists(HEAVY, min_size=1, max_size=20), pixels=st.sampled_from([16, 64, 256]), at=st.integers(0, 60))
def test_a_small_request_of_another_tenant_steps_within_the_bound(heavy: list[Job], pixels: int, at: int) -> None:
    """Whatever one tenant has brought before, another's request begins at once, and steps within the bound."""
    simulation = Simulation()
    for job in heavy:
        simulation.push(job)
    for _ in range(at):
        simulation.step()
    small = simulation.push(Job("other", 1, 4, pixels))
    simulation.begin()
    assert small.begun == 1
    before = simulation.work
    bound = first_step_bound(small, max(job.pixels for job in heavy), 2, 1)
    while small.first_step is None:
        simulation.step()
        assert simulation.work - before <= bound
    while small.left:  # and is done when it has had its share
        simulation.step()
        assert simulation.work - before <= bound + 2 * (4 + 8) * small.pixels + 12 * MAX_IMAGES * 256


@settings(max_examples=60, deadline=None)
@given(heavy=st.lists(HEAVY, min_size=1, max_size=3), pixels=st.sampled_from([16, 64, 256]), at=st.integers(0, 60))
def test_a_small_request_of_the_same_tenant_steps_within_the_bound(heavy: list[Job], pixels: int, at: int) -> None:
    """Without tokens all callers are one tenant: requests take turns as well."""
    simulation = Simulation(share=1.0)
    for job in heavy:
        simulation.push(job)
    for _ in range(at):
        simulation.step()
    small = simulation.push(Job("heavy", 1, 4, min(pixels, min(job.pixels for job in heavy))))
    bound = first_step_bound(small, max(job.pixels for job in heavy), 1, 1 + len(heavy))
    before = simulation.work
    while small.first_step is None:
        simulation.step()
        assert simulation.work - before <= bound


@settings(max_examples=30, deadline=None)
@given(
    jobs=st.lists(
        st.builds(
            Job,
            tenant=st.sampled_from("abc"),
            images=st.integers(1, 6),
            steps=st.integers(1, 30),
            pixels=st.sampled_from([16, 64]),
        ),
        min_size=1,
        max_size=12,
    )
)
def test_every_image_is_done_and_all_books_are_empty(jobs: list[Job]) -> None:
    """No order of turns, places and steps loses an image, or stands still."""
    simulation = Simulation(places=8)
    for job in jobs:
        simulation.push(job)
    total = sum(job.images * job.steps for job in jobs)
    for _ in range(total):
        if not any(job.left for job in jobs):
            break
        simulation.step()
    assert [job.left for job in jobs] == [0] * len(jobs)
    assert len(simulation.queue) == 0
    assert simulation.work == sum(job.images * job.steps * job.pixels for job in jobs)
    assert len(simulation.clock) == 0
    assert not simulation.clock._left


def test_tenants_get_equal_work_whatever_they_bring() -> None:
    """Sixteen large images against one small request after the other: the shares are equal after a while."""
    simulation = Simulation()
    simulation.push(Job("large", 16, 500, 256))
    small = simulation.push(Job("small", 1, 20, 64))
    for _ in range(1000):
        if not small.left:
            small = simulation.push(Job("small", 1, 20, 64))
        simulation.step()
    assert simulation.served["small"] == pytest.approx(simulation.served["large"], rel=0.1)


def test_a_stream_of_small_requests_does_not_hold_up_a_large_one() -> None:
    """Of one tenant, each small request is new and behind nobody; the large one has its share all the same."""
    simulation = Simulation(share=1.0)
    large = simulation.push(Job("t", 1, 40, 256))
    small = simulation.push(Job("t", 8, 1, 16))
    for _ in range(4000):
        if not small.left:
            small = simulation.push(Job("t", 8, 1, 16))
        simulation.step()
        if not large.left:
            break
    assert not large.left
    assert simulation.work <= 3 * 40 * 256 + 8 * 256 * 2


def test_who_leaves_forgets_and_an_idle_clock_begins_anew() -> None:
    """Leaving twice, serving nobody and asking for a stranger do no harm."""
    clock: FairClock[Job] = FairClock()
    one, two = Job("a", 1, 1, 1), Job("b", 1, 1, 1)
    clock.join(one)
    clock.join(two)
    clock.serve({one: 10})
    assert (clock.behind(one), clock.behind(two)) == ((-5, 0), (5, 0))
    clock.leave(one)
    clock.leave(one)
    assert clock.behind(one) == (0, 0)
    clock.join(one)
    assert clock.behind(one) == (-5, 0)  # what a tenant has had is not forgotten while there is work
    clock.leave(one)
    clock.leave(two)
    clock.serve({one: 10})
    clock.join(two)
    assert clock.behind(two) == (0, 0)
