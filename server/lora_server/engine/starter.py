"""Begins images whose turn it is; of a job's first one, takes its adapters' slots, encodes its prompt, draws its noise.

On CUDA all of that goes beside the step that runs, on a stream of its own. Engine thread only.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from functools import partial

from lora_server.engine.admission import Admission
from lora_server.engine.batch_runner import BatchRunner
from lora_server.engine.guard import Guard
from lora_server.engine.job import EngineJob
from lora_server.engine.jobs import JobTable
from lora_server.engine.prompts import PromptCache
from lora_server.engine.residency import DeviceResidency
from lora_server.engine.room import Room
from lora_server.engine.stepper import Stepper
from lora_server.models.base import Conditioning


class Starter:
    """From the waiting line to the active images, image by image."""

    def __init__(
        self, runner: BatchRunner, stepper: Stepper, residency: DeviceResidency, prompts: PromptCache, guard: Guard
    ) -> None:
        self._runner = runner
        self._stepper = stepper
        self._residency = residency
        self._prompts = prompts
        self._guard = guard

    def start(self, admission: Admission, jobs: JobTable, running: list[EngineJob], room: Room) -> None:
        """Begins images while there is *room* for them; adds their jobs to *running*."""
        starting: list[EngineJob] = []
        begun: Counter[EngineJob] = Counter()
        while (job := admission.next(room.may_begin)) is not None:
            admission.begin(job)
            room.take(job)
            begun[job] += 1
            if not job.begun:
                jobs.started(job)
                job.timings.started_s = time.monotonic()
                running.append(job)
                if self._guard.alone(job, partial(self._take_adapters, job), "upload"):
                    starting.append(job)
        by_text: dict[object, list[EngineJob]] = {}
        for job in starting:
            by_text.setdefault(self._runner.text_key(job.composition), []).append(job)
        for group in by_text.values():
            self._guard.together(group, self._begin, "encode")
        for job, images in begun.items():
            self._stepper.add(job, [job.states.popleft() for _ in range(images) if job.states])

    def _take_adapters(self, job: EngineJob) -> None:
        if job.resolved and job.lease is not None:
            with self._runner.preparing():
                job.composition = self._residency.acquire(job.resolved, job.lease)
            job.holds_slots = True

    def _begin(self, jobs: Sequence[EngineJob]) -> None:
        """Encodes the prompts of jobs that share the text encoders' adapters, and draws their noise."""
        began_s = time.monotonic()
        with self._runner.preparing():
            with self._runner.span() as span:
                wanted = [(job.tenant, job.parameters) for job in jobs]
                conditionings = self._prompts.conditionings(wanted, jobs[0].composition)
            for job, conditioning in zip(jobs, conditionings, strict=True):
                job.timings.text_encode, job.timings.text_encode_began_s = span, began_s
                self._guard.alone(job, partial(self._draw, job, conditioning), "encode")

    def _draw(self, job: EngineJob, conditioning: Conditioning) -> None:
        states = self._runner.begin(job.parameters, conditioning)
        job.cut_off = conditioning.truncations
        job.total_steps = sum(state.remaining_steps for state in states)
        job.states.extend(states)
