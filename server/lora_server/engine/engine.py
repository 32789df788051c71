"""The engine: one thread that owns the model and turns accepted requests into pictures, one step at a time.

The loop is four verbs: receive (what other threads have handed over), admit (who starts), step (one batch of images,
each at its own timestep and with its own adapters) and publish. Everything reaches the thread through one inbox;
everything leaves it as events of jobs.
"""

from __future__ import annotations

import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import partial
from typing import TypeVar

import numpy as np
import structlog
import torch
from numpy.typing import NDArray

from lora_server.adapters.futures import complete, fail
from lora_server.adapters.manager import AdapterManager
from lora_server.config import EngineConfig
from lora_server.engine.admission import Admission
from lora_server.engine.ahead import Ahead
from lora_server.engine.batch_runner import TEXT, BatchRunner
from lora_server.engine.decoder import Decoder
from lora_server.engine.finisher import Finisher, Origin
from lora_server.engine.guard import Guard
from lora_server.engine.holdings import Holdings
from lora_server.engine.inquest import Inquests
from lora_server.engine.job import EngineJob, Timings
from lora_server.engine.jobs import JobTable
from lora_server.engine.memory import device_memory, free_after
from lora_server.engine.news import News
from lora_server.engine.prompts import PromptCache
from lora_server.engine.residency import DeviceResidency
from lora_server.engine.retrace import Fault, Stage
from lora_server.engine.room import Room
from lora_server.engine.starter import Starter
from lora_server.engine.stepper import Advanced, Launched, Stepper, jobs_of
from lora_server.engine.warm_up import WarmUpError, warm_up
from lora_server.errors import (
    DeadlineExceededError,
    EngineFailureError,
    LoraServerError,
    RequestCancelledError,
    ServerDrainingError,
)
from lora_server.models.base import DenoisingState, ModelFamily
from lora_server.observer import OK, Observer, SilentObserver
from lora_server.scheduler.places import Places
from lora_server.scheduler.shares import Shares
from lora_server.types import (
    EngineInfo,
    ExecutionPath,
    GenerationRequest,
    ModelInfo,
    QueueInfo,
)

_log = structlog.get_logger(__name__)

_HOPELESS_MARGIN = 0.8
"""Share of the least time that the remaining steps have ever taken which must be left before a deadline."""

_DEATHS_WINDOW_S = 60.0
"""How long a death of the engine counts."""

_POLL_S = 0.001
"""How often the engine looks whether a step is done while it takes messages; the device has its next batch by then."""

T = TypeVar("T")
Message = Callable[[], None]
"""What the inbox carries: something to do on the engine thread."""


@dataclass(frozen=True, slots=True)
class EngineParts:
    """What an engine is made of."""

    family: ModelFamily
    manager: AdapterManager
    config: EngineConfig
    origin: Origin
    observer: Observer = field(default_factory=SilentObserver)


class LocalEngine:
    """The engine in this process; implements `engine.api.Engine`."""

    def __init__(self, parts: EngineParts, on_failure: Callable[[], None] = lambda: None) -> None:
        """Takes the model over. *on_failure* is called once, from the engine thread, if the engine itself dies."""
        self._model = parts.family.info
        self._config = config = config_for(self._model.execution, parts.config)
        self._family = parts.family
        self._manager = parts.manager
        self._observer = parts.observer
        self._runner = BatchRunner(parts.family, config)
        self._stepper = Stepper(self._runner, config)
        self._prompts = PromptCache(self._runner, config.prompt_cache_bytes)
        self._residency = DeviceResidency(parts.manager, parts.family.device)
        self._guard = Guard(self._fail, parts.observer)
        self._inquests = Inquests(self._runner, self._model, self._guard)
        self._news = News(self._runner, self._guard, partial(self._on_not_finite, Stage.PREVIEW))
        self._ahead = Ahead(parts.manager, self._residency, self._guard)
        self._starter = Starter(self._runner, self._stepper, self._residency, self._prompts, self._guard)
        on_not_finite = partial(self._on_not_finite, Stage.DECODE)
        self._decoder = Decoder(self._runner, parts.family.device, self._on_pixels, on_not_finite)
        self._inbox: queue.SimpleQueue[Message] = queue.SimpleQueue()
        unread = Shares.by(config.max_unread_bytes, config.tenant_share)
        self._holdings = Holdings(unread, on_room=lambda: self._inbox.put(lambda: None))
        self._jobs = JobTable(config, time.monotonic, self._stepper.throughput, self._holdings)
        self._slots = Shares.by(parts.manager.slots.num_slots, config.tenant_share)
        parts.manager.watch_device_pins(lambda adapter: self._inbox.put(lambda: self._ahead.bring_to_device([adapter])))
        parts.manager.watch_forgotten(lambda: self._inbox.put(self._residency.trim))
        self._admission = Admission(parts.manager, self._inbox.put, self._fail, self._ahead.prefetch)
        self._finisher = Finisher(parts.origin, self._on_finished)
        self._running: list[EngineJob] = []
        self._launched: deque[Launched] = deque()
        self._room_changed = True  # since it was last asked whether images can begin
        self._lookahead = 2 if self._runner.asynchronous else 1
        self._stopping = False
        self._deaths_s: list[float] = []
        self._restarts = 0
        self._ready = threading.Event()
        self._start_error: Exception | None = None
        self._on_failure = on_failure
        self._thread = threading.Thread(target=self._main, name="engine", daemon=True)

    @property
    def model(self) -> ModelInfo:
        """The served model."""
        return self._model

    def start(self) -> None:
        """Starts the engine thread and waits until it is warm; once. Blocks for seconds, on CUDA for minutes.

        Raises:
            WarmUpError: If the model's first steps fail; the thread has ended.
        """
        self._thread.start()
        self._ready.wait()
        if self._start_error is not None:
            raise WarmUpError(self._start_error)

    def stop(self) -> None:
        """Fails what is in flight with SERVER_DRAINING within one step, and ends the thread. Blocks; idempotent."""
        self._jobs.drain()
        self._inbox.put(self._request_stop)
        if self._thread.is_alive():
            self._thread.join()
        self._finisher.stop()

    def submit(self, request: GenerationRequest) -> EngineJob:
        """Accepts a request, or joins the job that has its id; see `engine.api.Engine.submit`."""
        job, new = self._jobs.enter(request, lambda: self._new_job(request))
        if new:
            self._inbox.put(lambda: self._admission.enter(job))
        return job

    def queue_info(self) -> QueueInfo:
        """Returns how many requests wait and run."""
        return self._jobs.info()

    def info(self) -> EngineInfo:
        """Returns what the engine has done since its start; any thread, without waiting for a step."""
        return EngineInfo(
            steps_by_way=dict(self._stepper.steps),
            image_steps=self._stepper.image_steps,
            switches=self._runner.counters.switches,
            page_writes=self._runner.counters.page_writes,
            compiles=self._runner.denoiser.compiles,
            captures=self._runner.denoiser.captures,
            prompt_hits=self._prompts.hits,
            prompt_misses=self._prompts.misses,
            finished_requests=self._jobs.finished_requests,
            failed_requests=self._jobs.failed_requests,
            finished_images=self._jobs.finished_images,
            active_images=len(self._stepper),
            restarts=self._restarts,
            prompt_evictions=self._prompts.evictions,
            prompt_bytes=self._prompts.used_bytes,
            prompt_budget_bytes=self._prompts.budget_bytes,
            device_adapter_bytes=self._residency.used_bytes,
            device_memory=device_memory(self._family.device),
        )

    def call(self, action: Callable[[BatchRunner, Stepper], T]) -> Future[T]:
        """Runs *action* on the engine thread, between two steps; for benchmarks and tests. Returns at once."""
        future: Future[T] = Future()

        def run() -> None:
            try:
                complete(future, action(self._runner, self._stepper))
            except BaseException as error:
                fail(future, error)

        self._inbox.put(run)
        return future

    def drain(self) -> None:
        """Takes no new work from now on; idempotent."""
        self._jobs.drain()

    # The loop. Everything below runs on the engine thread, unless it says otherwise.

    def _main(self) -> None:
        if self._config.threads is not None:
            torch.set_num_threads(self._config.threads)  # for this thread; loaders set their own
        try:
            with torch.inference_mode():
                if not self._warmed_up():
                    return
                self._ready.set()
                while not self._stopping:
                    self._run_until_stopped_or_dead()
                self._runner.restore()
        except Exception:
            _log.exception("the engine died and is not restarted")
            self._jobs.drain()
            self._end_all(EngineFailureError)
            self._on_failure()
        else:
            self._end_all(lambda _: ServerDrainingError())
        finally:
            self._ready.set()

    def _warmed_up(self) -> bool:
        """Runs the warm-up; what it fails with is for whoever starts the engine."""
        try:
            warm_up(self._family, self._runner, self._stepper, self._config)
        except Exception as error:
            _log.debug("the warm-up failed", exc_info=True)
            self._start_error = error
        return self._start_error is None

    def _run_until_stopped_or_dead(self) -> None:
        """Runs the loop; when it dies, begins anew, unless it has died too often of late: then it raises."""
        try:
            while not self._stopping:
                busy = self._step_once()
                self._receive(0 if busy else self._time_to_deadline())
        except Exception as error:
            now_s = time.monotonic()
            self._deaths_s = [each for each in self._deaths_s if now_s - each < _DEATHS_WINDOW_S] + [now_s]
            if len(self._deaths_s) > self._config.max_restarts:
                raise
            _log.exception("the engine died; it begins anew from clean weights")
            free_after(error)
            self._begin_anew()

    def _begin_anew(self) -> None:
        """Ends what was running and starts from the base weights, with nothing on the device; who waits, waits on."""
        for job in [*self._running, *self._jobs.in_flight()]:
            if job.begun and job.lease is not None and job.images_left_to_decode:
                self._fail(job, EngineFailureError(job.request.request_id))
        self._running.clear()
        self._launched.clear()
        self._news.clear()
        self._inquests.clear()
        self._decoder.clear()
        self._prompts.clear()
        self._residency.clear()
        self._runner.reset()
        self._restarts += 1
        self._observer.engine_restarted()

    def _step_once(self) -> bool:
        """Lets go of the dead, starts who can start, runs one batch; returns whether to come back at once."""
        self._sweep()
        self._admission.announce()
        self._decoder.collect()
        self._inquests.advance()
        if not self._launched:
            self._start_jobs()
        if self._launched or len(self._stepper):
            self._step()
            return True
        self._stepper.rest()
        self._news.publish()
        if len(self._decoder):
            self._decoder.collect(wait=True)
            return True
        if len(self._inquests):
            return True
        return self._inbox.empty() and not self._running and self._runner.denoiser.capture_missed()

    def _receive(self, wait_s: float | None) -> None:
        """Does what other threads have posted; blocks for *wait_s* at most until there is something, None for ever."""
        try:
            message = self._inbox.get(block=wait_s != 0, timeout=wait_s or None)
            self._room_changed = True
            while True:
                message()
                message = self._inbox.get_nowait()
        except queue.Empty:
            return

    def _sweep(self) -> None:
        """Lets go of jobs that nobody reads any more, and of those whose deadline has passed or cannot be met."""
        now_s = time.monotonic()
        for job in [*self._running, *self._admission]:
            if job.cancelled:
                self._fail(job, RequestCancelledError(job.request.request_id))
            elif job.deadline_s is None:
                continue
            elif job.expired(now_s + _HOPELESS_MARGIN * self._stepper.remaining_s(job)):
                self._fail(job, DeadlineExceededError(job.request.request_id))

    # Stepping

    def _step(self) -> None:
        """Keeps the device busy: gives it the next batch while it is still at work on the one before."""
        try:
            while len(self._launched) < self._lookahead and (launched := self._stepper.launch()):
                self._launched.append(launched)
                self._room_changed |= any(member.finished for member in launched.members)
        except Exception as error:
            self._on_failed_step(error)
            return
        self._news.publish()
        self._use_the_wait(self._launched[0])
        self._finish_oldest()

    def _use_the_wait(self, launched: Launched) -> None:
        """Receives and starts jobs while the device steps; on the CPU there is no wait."""
        while self._runner.asynchronous:
            self._start_jobs()
            if launched.span.done:
                return
            self._receive(_POLL_S)

    def _finish_oldest(self) -> None:
        launched = self._launched.popleft()
        try:
            seconds = self._stepper.finish(launched)
        except Exception as error:
            self._on_failed_step(error)
            return
        self._after_step(launched, seconds)

    def _start_jobs(self) -> None:
        if not self._room_changed or not len(self._admission):
            return
        self._room_changed = False
        places = Places(self._config.max_active_images, self._config.tenant_share, self._stepper.active())
        room = Room(places, self._holdings, self._residency, self._slots, self._running)
        self._starter.start(self._admission, self._jobs, self._running, room)

    def _on_failed_step(self, error: Exception) -> None:
        """Ends the jobs that cannot step even alone, and no others; the images are as they were before the step."""
        _log.warning("a batch failed; its jobs step one by one", error=repr(error))
        self._guard.note_memory(error, "step")
        while self._launched:
            self._finish_oldest()
        for job in list(self._running):
            self._guard.alone(job, partial(self._step_alone, job), "step")

    def _step_alone(self, job: EngineJob) -> None:
        launched = self._stepper.launch_alone(job)
        if launched is not None:
            self._after_step(launched, self._stepper.finish(launched))

    def _after_step(self, launched: Launched, seconds: float) -> None:
        now_s = time.monotonic()
        self._observer.step_ended(launched.way, launched.rows, seconds)
        for member, component in launched.faulty():
            image = member.image
            self._look_into(
                Fault(image.job, image.state.image_index, component, Stage.STEP, member.step_index, launched.way)
            )
        members = [member for member in launched.members if self._goes_on(member.image.job)]
        for job, advanced in jobs_of(members).items():
            job.timings.denoise_s += seconds
            job.timings.extend("denoise", now_s - seconds, now_s)
            job.completed_steps += len(advanced)
            job.steps[launched.way] += 1
            job.batch_images += len(launched.members)
            self._news.note(job, advanced)
        self._jobs.progressed({member.image.job for member in members})
        finished = [member for member in members if member.finished]
        if finished:
            self._decode(finished)

    # Finishing

    def _decode(self, members: Sequence[Advanced]) -> None:
        finished = [(member.image.job, member.image.state) for member in members]
        batches = [[each] for each in finished] if self._config.deterministic else self._decoder.batches(finished)
        for batch in batches:
            if len(batch) > 1 and self._guard.tried(partial(self._decoder.start, batch), "decode"):
                continue
            for job, state in batch:
                if job in self._running:  # else another of its images has failed
                    self._guard.alone(job, partial(self._decoder.start, [(job, state)]), "decode")

    def _goes_on(self, job: EngineJob) -> bool:
        """Whether a job that was launched is not cancelled or found faulty meanwhile."""
        return job in self._running and job not in self._inquests

    def _on_not_finite(self, stage: Stage, job: EngineJob, state: DenoisingState, component: str) -> None:
        if self._goes_on(job):
            way = job.stats(time.monotonic()).way
            self._look_into(Fault(job, state.image_index, component, stage, state.step_index, way))

    def _look_into(self, fault: Fault) -> None:
        """Takes a job whose values are not finite out of the batches, until it is clear who is at fault."""
        if self._goes_on(fault.job):
            self._stepper.remove(fault.job)
            if fault.component == TEXT:  # others are finite: encoded anew, in another batch, they may round otherwise
                self._prompts.forget(fault.job.tenant, fault.job.parameters, fault.job.composition)
            self._inquests.open(fault)

    def _on_pixels(self, job: EngineJob, state: DenoisingState, pixels: NDArray[np.uint8], seconds: float) -> None:
        if job not in self._running:  # cancelled meanwhile
            return
        job.timings.decode_s += seconds
        now_s = time.monotonic()
        job.timings.extend("decode", now_s - seconds, now_s)
        job.images_left_to_decode -= 1
        self._news.publish()  # progress comes before the image
        if not job.images_left_to_decode:
            self._release(job)  # before its caller hears of the end
        self._finisher.submit(job, state.image_index, pixels)

    def _fail(self, job: EngineJob, error: LoraServerError) -> None:
        self._admission.remove(job)
        self._release(job)
        self._leave(job, error)
        job.log.fail(error)

    def _leave(self, job: EngineJob, error: LoraServerError | None) -> None:
        """Takes a job out of flight and tells how it went, once; any thread."""
        if self._jobs.leave(job, keep=error is None):
            self._observer.request_ended(job.summary(OK if error is None else error.reason, time.monotonic()))

    def _release(self, job: EngineJob) -> None:
        """Gives back everything that the job holds of the engine; idempotent."""
        if job in self._running:
            self._running.remove(job)
        self._room_changed = True
        self._stepper.remove(job)
        self._inquests.drop(job)
        job.states.clear()
        job.composition = ()
        if job.holds_slots and job.resolved is not None:
            job.holds_slots = False
            self._residency.release(job.resolved)
        if job.lease is not None:
            job.lease.release()
            job.lease = None

    def _end_all(self, error: Callable[[str], LoraServerError]) -> None:
        for job in self._jobs.in_flight():
            if job.images_left_to_decode:  # else it is with the finisher
                self._fail(job, error(job.request.request_id))

    def _time_to_deadline(self) -> float | None:
        deadlines = [job.deadline_s for job in self._admission if job.deadline_s is not None]
        return max(0.0, min(deadlines) - time.monotonic()) if deadlines else None

    def _new_job(self, request: GenerationRequest) -> EngineJob:
        """Makes a job; any thread."""
        return EngineJob(
            request, Timings(accepted_s=time.monotonic()), on_cancel=self._on_cancel, on_held=self._holdings.change
        )

    def _on_cancel(self, job: EngineJob) -> None:
        """Wakes the loop, which sweeps; any thread."""
        self._leave(job, RequestCancelledError(job.request.request_id))
        self._inbox.put(lambda: None)

    def _on_finished(self, job: EngineJob, error: LoraServerError | None) -> None:
        """Ends a job whose images are encoded; encoder threads."""
        self._leave(job, error)
        if error is not None:
            job.log.fail(error)
            job.cancel()  # its other images need not be made

    def _request_stop(self) -> None:
        self._stopping = True


def config_for(execution: ExecutionPath, config: EngineConfig) -> EngineConfig:
    """Returns the configuration for a model that runs so: a whole pipeline has one request, and nothing to batch."""
    if execution is ExecutionPath.STEP_BATCHING:
        return config
    changes = {"deterministic": True, "max_batch_images": 1, "max_active_images": 1, "prompt_cache_bytes": 0}
    return config.model_copy(update={**changes, "num_pages": 1, "column_buckets": (), "compile": False})
