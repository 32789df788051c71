"""What is held for somebody is counted against somebody, and after everything has ended nothing is."""

from __future__ import annotations

from typing import Any

import hypothesis.strategies as st
from hypothesis import settings
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, rule
from lora_server.config import EngineConfig
from lora_server.engine.events import LogSubscription
from lora_server.engine.holdings import Holdings
from lora_server.engine.job import EngineJob, Timings
from lora_server.engine.jobs import JobTable
from lora_server.engine.retained import Retained
from lora_server.errors import QueueFullError, RequestCancelledError
from lora_server.scheduler.shares import Shares
from lora_server.scheduler.throughput import Throughput
from lora_server.types import (
    EncodedImage,
    GenerationParameters,
    GenerationRequest,
    ImageEvent,
    ImageFormat,
    ProgressEvent,
    StatsEvent,
)

BYTES = 100


def job_of(tenant: str, name: str, holdings: Holdings, images: int = 2) -> EngineJob:
    request = GenerationRequest(name, GenerationParameters("x", "", 8, 8, 1, 4.0, 0, images), tenant=tenant)
    return EngineJob(request, Timings(0.0), lambda _: None, holdings.change)


def image(index: int, size: int = BYTES) -> ImageEvent:
    provenance: Any = None
    return ImageEvent(EncodedImage(index, ImageFormat.PNG, bytes(size), "", provenance))


def test_an_image_is_held_until_its_reader_is_done_with_it() -> None:
    """Taken is what was got the time before; what other readers have not taken stays held; who leaves holds nothing."""
    holdings = Holdings(Shares.by(1000, 1.0))
    job = job_of("t", "1", holdings)
    fast, slow = job.subscribe(lambda: None), job.subscribe(lambda: None)
    job.log.publish(image(0))
    assert holdings.used_bytes == BYTES
    fast.poll()
    slow.poll()
    assert holdings.used_bytes == BYTES
    job.log.publish(image(1))
    fast.poll()
    assert holdings.used_bytes == 2 * BYTES
    slow.poll()
    assert holdings.used_bytes == BYTES
    job.log.publish(StatsEvent(job.stats(0.0)))
    slow.close()
    fast.close()
    fast.close()
    assert (holdings.used_bytes, holdings.bytes_of("t")) == (0, 0)


def test_what_is_kept_is_held_though_it_was_read() -> None:
    """A unary response has all images until its call has ended; letting go twice counts once."""
    holdings = Holdings(Shares.by(1000, 1.0))
    job = job_of("t", "1", holdings)
    let_go, other = job.keep(), job.keep()
    reader = job.subscribe(lambda: None)
    job.log.publish(image(0))
    reader.poll()
    reader.close()
    assert holdings.used_bytes == BYTES
    let_go()
    let_go()
    assert holdings.used_bytes == BYTES
    other()
    assert holdings.used_bytes == 0


def test_a_tenant_that_holds_too_much_goes_on_with_its_oldest_request_only() -> None:
    """So that it can end, and be read; another tenant goes on whatever is held."""
    holdings = Holdings(Shares.by(4 * BYTES, 0.5))
    old, young, other = job_of("t", "1", holdings), job_of("t", "2", holdings), job_of("u", "3", holdings)
    assert holdings.may_begin(young)
    holdings.change(old, BYTES)
    holdings.change(young, BYTES)
    assert [holdings.may_begin(job) for job in (old, young, other)] == [True, False, True]
    holdings.change(old, -BYTES)
    assert holdings.may_begin(old)
    holdings.change(young, BYTES)
    assert [holdings.may_begin(job) for job in (old, young)] == [False, True]


def test_room_is_told_when_something_is_given_back() -> None:
    """So that an engine that sleeps begins what had to wait."""
    told: list[int] = []
    holdings = Holdings(Shares.by(4, 1.0), on_room=lambda: told.append(1))
    job = job_of("t", "1", holdings)
    holdings.change(job, 0)
    holdings.change(job, 4)
    assert not told
    holdings.change(job, -4)
    assert told == [1]


def finished(tenant: str, name: str, size: int) -> EngineJob:
    job = job_of(tenant, name, Holdings(Shares.by(10**9, 1.0)))
    job.log.publish(image(0, size))
    return job


def test_results_kept_for_retries_are_of_many_tenants() -> None:
    """Beyond the bound, who has most loses its oldest: a tenant with many results does not push out another's."""
    retained = Retained(60, 1000, lambda: 0.0)
    few = finished("few", "1", 300)
    retained.put(("few", "1"), few)
    for number in range(50):
        retained.put(("many", str(number)), finished("many", str(number), 100))
    assert retained.get(("few", "1")) is few
    assert retained.get(("many", "0")) is None
    assert retained.get(("many", "49")) is not None
    assert retained.used_bytes <= 1000


def test_results_are_forgotten_with_the_time() -> None:
    """All of them, whoever asks."""
    now = [0.0]
    retained = Retained(60, 1000, lambda: now[0])
    retained.put(("t", "1"), finished("t", "1", 300))
    now[0] = 61.0
    assert retained.get(("t", "2")) is None
    assert (retained.used_bytes, retained._sums) == (0, {})


class Books(RuleBasedStateMachine):
    """Requests that enter, begin, make images, are read, retried, cancelled and left, in any order."""

    jobs: Bundle[EngineJob] = Bundle("jobs")
    readers: Bundle[LogSubscription] = Bundle("readers")
    kept: Bundle[Any] = Bundle("kept")

    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0
        self.holdings = Holdings(Shares.by(8 * BYTES, 0.75))
        config = EngineConfig(max_queued_requests=6, result_retention_s=10, max_retained_bytes=5 * BYTES)
        throughput = Throughput()
        throughput.observe(64, 0.1)
        self.table = JobTable(config, lambda: self.now, throughput, self.holdings)
        self.all: list[EngineJob] = []
        self.open: list[LogSubscription] = []
        self.let_go: list[Any] = []

    @rule(target=jobs, tenant=st.sampled_from("abc"), name=st.sampled_from("12345678"))
    def enter(self, tenant: str, name: str) -> EngineJob:
        request = GenerationRequest(name, GenerationParameters("x", "", 8, 8, 1, 4.0, 0, 2), tenant=tenant)

        def create() -> EngineJob:
            return EngineJob(request, Timings(self.now), lambda job: self.leave(job), self.holdings.change)

        try:
            job, _ = self.table.enter(request, create)
        except QueueFullError:
            return self.all[0] if self.all else job_of("z", "z", self.holdings)
        self.all.append(job)
        self.open.append(job.subscribe(lambda: None))
        return job

    def leave(self, job: EngineJob) -> None:
        self.table.leave(job, keep=False)

    @rule(target=readers)
    def some_reader(self) -> LogSubscription:
        return self.open[-1] if self.open else job_of("z", "z", self.holdings).subscribe(lambda: None)

    @rule(job=jobs)
    def begin(self, job: EngineJob) -> None:
        self.table.started(job)

    @rule(job=jobs, index=st.integers(0, 1))
    def make(self, job: EngineJob, index: int) -> None:
        if job in self.table.in_flight() and (ImageEvent, index) not in job.log._latest:
            job.log.publish(image(index))
            job.completed_steps += 1
            job.log.publish(ProgressEvent(job.completed_steps, 2, 0.0))
            self.table.progressed([job])

    @rule(job=jobs)
    def finish(self, job: EngineJob) -> None:
        job.log.publish(StatsEvent(job.stats(self.now)))
        self.table.leave(job, keep=True)

    @rule(job=jobs)
    def fail(self, job: EngineJob) -> None:
        self.table.leave(job, keep=False)
        job.log.fail(RequestCancelledError("x"))

    @rule(reader=readers)
    def poll(self, reader: LogSubscription) -> None:
        try:
            reader.poll()
        except RequestCancelledError:
            reader.close()

    @rule(reader=consumes(readers))
    def close(self, reader: LogSubscription) -> None:
        reader.close()

    @rule(target=kept, job=jobs)
    def keep(self, job: EngineJob) -> Any:
        self.let_go.append(job.keep())
        return self.let_go[-1]

    @rule(let_go=kept)
    def release(self, let_go: Any) -> None:
        let_go()

    @rule(seconds=st.floats(0, 20))
    def wait(self, seconds: float) -> None:
        self.now += seconds

    @invariant()
    def books_agree(self) -> None:
        holdings, table = self.holdings, self.table
        assert holdings.used_bytes == sum(job.log._held_bytes for job in set(self.all))
        assert holdings.used_bytes == sum(sum(jobs.values()) for jobs in holdings._held.values())
        assert table._backlog.total == sum(job.remaining_pixel_steps for job in table.in_flight())
        assert table._waiting_of.total() == len(table._waiting)
        assert table._retained.used_bytes <= 5 * BYTES

    def teardown(self) -> None:
        for job in set(self.all):
            self.finish(job)
        for reader in self.open:
            reader.close()
        for let_go in self.let_go:
            let_go()
        self.now += 100
        self.table._retained.get(("nobody", ""))
        info = self.table.info()
        assert (info.queued_requests, info.running_requests, info.waiting_tenants) == (0, 0, 0)
        assert (info.unread_bytes, info.retained_bytes, info.estimated_wait_s) == (0, 0, 0)
        assert (self.holdings._held, self.holdings._sums, self.table._backlog.tenants) == ({}, {}, 0)
        assert (dict(self.table._waiting_of), self.table._retained._sums) == ({}, {})


TestBooks = Books.TestCase
TestBooks.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
