"""Failures stay where they belong: what fails for several jobs is tried for each alone, and ends those that fail so.

Engine thread only.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import structlog
import torch

from lora_server.engine.job import EngineJob
from lora_server.engine.memory import free_after
from lora_server.errors import DeviceOutOfMemoryError, EngineFailureError, LoraServerError
from lora_server.observer import Observer

_log = structlog.get_logger(__name__)


class Guard:
    """Runs the work of jobs; a *stage* is its name in logs and metrics (`encode`, `step`, `decode`, ...)."""

    def __init__(self, fail: Callable[[EngineJob, LoraServerError], None], observer: Observer) -> None:
        """*fail* ends a job."""
        self._fail = fail
        self._observer = observer

    def alone(self, job: EngineJob, action: Callable[[], None], stage: str) -> bool:
        """Runs *action*; whatever it raises ends this job and no other. Returns whether it succeeded."""
        try:
            action()
        except LoraServerError as error:
            failure = error
        except torch.OutOfMemoryError as error:
            self.note_memory(error, stage)
            failure = DeviceOutOfMemoryError()
        except Exception:
            _log.exception("request failed", request_id=job.request.request_id, stage=stage)
            failure = EngineFailureError(job.request.request_id)
        else:
            return True
        self._fail(job, failure)
        return False

    def together(self, jobs: Sequence[EngineJob], action: Callable[[Sequence[EngineJob]], None], stage: str) -> None:
        """Runs *action* for all *jobs*; if that raises, for each alone, and ends those that fail even so."""
        if len(jobs) > 1 and self.tried(partial(action, jobs), stage):
            return
        for job in jobs:
            self.alone(job, partial(action, [job]), stage)

    def tried(self, action: Callable[[], None], stage: str) -> bool:
        """Runs work of several jobs; False if it must be done one by one, because one of them may be at fault."""
        try:
            action()
        except Exception as error:
            _log.warning("work of several requests failed; they go on one by one", stage=stage, error=repr(error))
            self.note_memory(error, stage)
            return False
        return True

    def note_memory(self, error: Exception, stage: str) -> None:
        """Frees what *error* holds of the device, and counts it if memory ran out."""
        free_after(error)
        if isinstance(error, torch.OutOfMemoryError):
            self._observer.out_of_memory(stage)
