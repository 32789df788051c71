"""The engine: one thread that owns the model and turns accepted requests into pictures, one step at a time.

The loop is four verbs: receive (what other threads have handed over), admit (who starts), run (one step of one batch)
and publish. Everything reaches the thread through one inbox; everything leaves it as events of jobs.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import structlog
import torch

from lora_server.adapters.api import ResolvedAdapter
from lora_server.adapters.manager import AdapterManager
from lora_server.config import EngineConfig
from lora_server.engine.admission import Admission
from lora_server.engine.batch_runner import BatchRunner
from lora_server.engine.finisher import Finisher, Origin
from lora_server.engine.images import encode_preview
from lora_server.engine.job import EngineJob, Timings
from lora_server.engine.jobs import JobTable
from lora_server.engine.residency import DeviceResidency
from lora_server.errors import (
    DeadlineExceededError,
    DeviceOutOfMemoryError,
    EngineFailureError,
    LoraServerError,
    RequestCancelledError,
    ServerDrainingError,
)
from lora_server.models.base import DenoisingState, ModelFamily
from lora_server.scheduler.policy import choose_batch
from lora_server.types import (
    ApplicationWay,
    GenerationRequest,
    ModelInfo,
    PreviewEvent,
    ProgressEvent,
    QueueInfo,
)

_log = structlog.get_logger(__name__)

Message = Callable[[], None]
"""What the inbox carries: something to do on the engine thread."""


@dataclass(frozen=True, slots=True)
class EngineParts:
    """What an engine is made of."""

    family: ModelFamily
    manager: AdapterManager
    config: EngineConfig
    origin: Origin


class LocalEngine:
    """The engine in this process; implements `engine.api.Engine`."""

    def __init__(self, parts: EngineParts, on_failure: Callable[[], None] = lambda: None) -> None:
        """*on_failure* is called once, from the engine thread, if the engine itself dies; it must not block."""
        self._config = parts.config
        self._model = parts.family.info
        self._runner = BatchRunner(parts.family)
        self._residency = DeviceResidency(parts.manager, parts.family.device)
        self._jobs = JobTable(parts.config, time.monotonic)
        self._inbox: queue.SimpleQueue[Message] = queue.SimpleQueue()
        self._manager = parts.manager
        parts.manager.watch_device_pins(lambda adapter: self._inbox.put(lambda: self._bring_to_device(adapter)))
        self._admission = Admission(parts.manager, self._inbox.put, self._fail)
        self._finisher = Finisher(parts.origin, self._on_finished)
        self._running: EngineJob | None = None
        self._stopping = False
        self._on_failure = on_failure
        self._thread = threading.Thread(target=self._main, name="engine", daemon=True)

    @property
    def model(self) -> ModelInfo:
        """The served model."""
        return self._model

    def start(self) -> None:
        """Starts the engine thread; once."""
        self._thread.start()

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

    def drain(self) -> None:
        """Takes no new work from now on; idempotent."""
        self._jobs.drain()

    # The loop. Everything below runs on the engine thread, unless it says otherwise.

    def _main(self) -> None:
        try:
            with torch.inference_mode():
                while not self._stopping:
                    busy = self._step_once()
                    self._receive(wait=not busy)
                self._runner.restore()
        except Exception:
            _log.exception("the engine died")
            self._jobs.drain()
            self._end_all(EngineFailureError)
            self._on_failure()
        else:
            self._end_all(lambda _: ServerDrainingError())

    def _step_once(self) -> bool:
        """Lets go of the dead, starts the next, runs one batch; returns whether there was anything to run."""
        self._sweep()
        if self._running is None:
            self._start_next()
        job = self._running
        if job is None:
            return False
        self._guarded(job, self._advance)
        return True

    def _receive(self, *, wait: bool) -> None:
        """Does what other threads have posted; with *wait*, blocks until there is something or a deadline passes."""
        try:
            message = self._inbox.get(block=wait, timeout=self._time_to_deadline() if wait else None)
            while True:
                message()
                message = self._inbox.get_nowait()
        except queue.Empty:
            return

    def _sweep(self) -> None:
        """Lets go of jobs that nobody reads any more or whose deadline has passed."""
        now_s = time.monotonic()
        running = [self._running] if self._running is not None else []
        for job in [*running, *self._admission]:
            if job.cancelled:
                self._fail(job, RequestCancelledError(job.request.request_id))
            elif job.expired(now_s):
                self._fail(job, DeadlineExceededError(job.request.request_id))

    def _start_next(self) -> None:
        self._running = job = self._admission.next()
        if job is None:
            return
        self._jobs.started(job)
        job.timings.started_s = time.monotonic()
        self._guarded(job, self._prepare)

    def _prepare(self, job: EngineJob) -> None:
        """Puts the job's adapters onto the device, encodes its prompts and draws its noise."""
        if job.resolved and job.lease is not None:
            job.composition = self._residency.acquire(job.resolved, job.lease)
            job.holds_slots = True
        job.way = ApplicationWay.MERGED if any(a.scale for a in job.composition) else ApplicationWay.BASE
        began_s = time.monotonic()
        conditioning = self._runner.encode(job.request.parameters, job.composition)
        job.timings.text_encode_s = time.monotonic() - began_s
        job.states = self._runner.begin(job.request.parameters, conditioning)

    def _advance(self, job: EngineJob) -> None:
        """Runs one step of the job's next batch and publishes what came of it."""
        batch = choose_batch(job.states, self._config.max_batch_images)
        began_s = time.monotonic()
        self._runner.step(batch, job.composition)
        job.timings.denoise_s += time.monotonic() - began_s
        job.completed_steps += len(batch)
        job.batches += 1
        self._publish_progress(job, batch)
        for state in batch:
            if state.finished:
                self._decode(job, state)
        if not job.states:
            self._release(job)

    def _publish_progress(self, job: EngineJob, batch: Sequence[DenoisingState]) -> None:
        request = job.request
        if job.batches % request.progress_interval_steps == 0 or job.completed_steps == job.total_steps:
            elapsed_s = time.monotonic() - job.timings.accepted_s
            job.log.publish(ProgressEvent(job.completed_steps, job.total_steps, elapsed_s))
        interval = request.preview_interval_steps
        for state in batch:
            if interval and state.step_index % interval == 0 and not state.finished:
                data = encode_preview(self._runner.preview(state))
                job.log.publish(PreviewEvent(state.image_index, state.step_index, data))

    def _decode(self, job: EngineJob, state: DenoisingState) -> None:
        began_s = time.monotonic()
        pixels = self._runner.decode(state)
        job.timings.decode_s += time.monotonic() - began_s
        job.states.remove(state)
        self._finisher.submit(job, state.image_index, pixels)

    def _guarded(self, job: EngineJob, action: Callable[[EngineJob], None]) -> None:
        """Runs *action*; whatever it raises ends this job and no other."""
        try:
            action(job)
        except LoraServerError as error:
            self._fail(job, error)
        except torch.OutOfMemoryError:
            self._fail(job, DeviceOutOfMemoryError())
            torch.cuda.empty_cache()
        except Exception:
            _log.exception("request failed", request_id=job.request.request_id)
            self._fail(job, EngineFailureError(job.request.request_id))

    def _fail(self, job: EngineJob, error: LoraServerError) -> None:
        self._admission.remove(job)
        self._release(job)
        self._jobs.leave(job, keep=False)
        job.log.fail(error)

    def _release(self, job: EngineJob) -> None:
        """Gives back everything that the job holds of the engine; idempotent."""
        if self._running is job:
            self._running = None
        job.states = []
        job.composition = ()
        if job.holds_slots and job.resolved is not None:
            job.holds_slots = False
            self._residency.release(job.resolved)
        if job.lease is not None:
            job.lease.release()
            job.lease = None

    def _bring_to_device(self, adapter: ResolvedAdapter) -> None:
        """Uploads a version that was pinned to the device, so that its first request need not."""
        leasing = self._manager.acquire([adapter])
        if not leasing.done():  # unpinned again before its turn came
            leasing.cancel()
            return
        try:
            with leasing.result() as lease:
                self._residency.acquire([adapter], lease)
                self._residency.release([adapter])
        except (LoraServerError, torch.OutOfMemoryError):
            _log.warning("cannot bring a pinned adapter to the device", adapter=adapter.applied.name)

    def _end_all(self, error: Callable[[str], LoraServerError]) -> None:
        for job in self._jobs.in_flight():
            if job.states or job.completed_steps < job.total_steps:  # else it is with the finisher
                self._fail(job, error(job.request.request_id))

    def _time_to_deadline(self) -> float | None:
        deadlines = [job.deadline_s for job in self._admission if job.deadline_s is not None]
        return max(0.0, min(deadlines) - time.monotonic()) if deadlines else None

    def _new_job(self, request: GenerationRequest) -> EngineJob:
        """Makes a job; any thread."""
        return EngineJob(request, Timings(accepted_s=time.monotonic()), on_cancel=self._on_cancel)

    def _on_cancel(self, job: EngineJob) -> None:
        """Wakes the loop, which sweeps; any thread."""
        self._jobs.leave(job, keep=False)
        self._inbox.put(lambda: None)

    def _on_finished(self, job: EngineJob, error: LoraServerError | None) -> None:
        """Ends a job whose images are encoded; encoder threads."""
        self._jobs.leave(job, keep=error is None)
        if error is not None:
            job.log.fail(error)

    def _request_stop(self) -> None:
        self._stopping = True
