"""Who is at fault for values that are not finite: found out by making the image again, not guessed.

By the base alone: if that fails too, the model is. If it does not, the adapters are; of several, those that fail alone,
or all of them, if they only fail together. One pass through a network at a time, between the batches of others. Engine
thread only.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from functools import partial

import structlog

from lora_server.engine.batch_runner import TEXT, BatchRunner
from lora_server.engine.guard import Guard
from lora_server.engine.job import EngineJob
from lora_server.engine.retrace import Fault, Stage, retrace
from lora_server.errors import AdapterOutputNotFiniteError, LoraServerError, ModelOutputNotFiniteError
from lora_server.models.merge import ScaledAdapter
from lora_server.types import AppliedAdapter, ModelInfo

_log = structlog.get_logger(__name__)
_MAX_STEPS = 64
"""Most steps that are made again to tell several adapters apart; the base is always made again, whatever it takes."""

Verdict = Generator[None, None, LoraServerError]


class Inquests:
    """The jobs whose fault is being looked into; they hold what they held and step no more."""

    def __init__(self, runner: BatchRunner, model: ModelInfo, guard: Guard) -> None:
        """*guard* ends the jobs with the verdicts."""
        self._runner = runner
        self._model = model
        self._guard = guard
        self._open: dict[EngineJob, Verdict] = {}

    def __len__(self) -> int:
        return len(self._open)

    def __contains__(self, job: EngineJob) -> bool:
        return job in self._open

    def open(self, fault: Fault) -> None:
        """Begins to look into a fault, unless another one of its job is being looked into."""
        if fault.job not in self._open:
            self._open[fault.job] = self._verdict(fault)

    def advance(self) -> None:
        """Takes one pass for the oldest job, if there is one; ends the job when it is clear who is at fault."""
        if self._open:
            job, verdict = next(iter(self._open.items()))
            self._guard.alone(job, partial(_advance, verdict), "inquest")

    def drop(self, job: EngineJob) -> None:
        """Looks no further into a job that has ended; idempotent."""
        self._open.pop(job, None)

    def clear(self) -> None:
        """Drops all jobs."""
        self._open.clear()

    def _verdict(self, fault: Fault) -> Verdict:
        composition = list(zip(fault.job.applied, fault.job.composition, strict=True))
        component = yield from self._where(fault)
        by_base = (yield from retrace(self._runner, fault, ())) if composition else component
        if by_base is not None:
            step = self._step(fault, by_base)
            error: LoraServerError = ModelOutputNotFiniteError(self._model.name, self._model.dtype, by_base, step)
        else:
            guilty = yield from self._guilty(fault, composition)
            error = AdapterOutputNotFiniteError(
                [(each.name, each.digest, each.scale) for each in guilty], component, self._step(fault, component)
            )
        self._runner.clean([member.digest for _, member in composition])
        _log.warning(
            "values that are not finite",
            request_id=fault.job.request.request_id, reason=error.reason, **error.metadata,
        )  # fmt: skip
        return error

    def _where(self, fault: Fault) -> Generator[None, None, str]:
        """The component that gave the values; which text encoder did is seen when it is done again."""
        if fault.steps > 1:
            return fault.component
        again = yield from retrace(self._runner, fault, fault.job.composition)
        return again or fault.component

    def _guilty(
        self, fault: Fault, composition: Sequence[tuple[AppliedAdapter, ScaledAdapter]]
    ) -> Generator[None, None, list[AppliedAdapter]]:
        everybody = [applied for applied, _ in composition]
        if len(composition) == 1 or len(composition) * fault.steps > _MAX_STEPS:
            return everybody
        found = []
        for applied, member in composition:
            if (yield from retrace(self._runner, fault, [member])) is not None:
                found.append(applied)
        return found or everybody

    def _step(self, fault: Fault, component: str) -> int | None:
        """The step, from 1, at which the denoiser gave the values; None if another component did."""
        encoding = component == TEXT or component in self._runner.text_encoders
        return None if encoding or fault.stage is not Stage.STEP else fault.steps


def _advance(verdict: Verdict) -> None:
    try:
        next(verdict)
    except StopIteration as end:
        raise end.value from None
