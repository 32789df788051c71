"""One call of a diffusers pipeline, turned inside out: it stops after each of its steps until it is told to go on.

The call runs in a thread of its own, because its loop cannot be left from within. The threads take turns: either the
owner runs or the call does, never both, so that the model still has one user at a time. Knows nothing of pipelines
but that they report their steps.
"""

from __future__ import annotations

import enum
import threading
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from queue import SimpleQueue
from typing import Generic, TypeVar

import torch
from torch import Tensor

ResultT = TypeVar("ResultT")
ReportStep = Callable[[Tensor | None], None]
"""What the call reports a step with; its latents, if they are exposed. Returns when the call may go on."""


class _Order(enum.Enum):
    GO_ON = enum.auto()
    GIVE_UP = enum.auto()


class _GivenUp(BaseException):
    """Unwinds a call that nobody waits for; not an Exception, so that no pipeline catches it."""


@dataclass(frozen=True, slots=True)
class _Step:
    latents: Tensor | None


@dataclass(frozen=True, slots=True)
class _Result(Generic[ResultT]):
    value: ResultT


@dataclass(frozen=True, slots=True)
class _Failure:
    error: BaseException


class _Channel(Generic[ResultT]):
    """What the two threads hand over; the call's thread holds this and not the `PipelineCall`."""

    def __init__(self) -> None:
        self.orders: SimpleQueue[_Order] = SimpleQueue()
        self.reports: SimpleQueue[_Step | _Result[ResultT] | _Failure] = SimpleQueue()

    def report_step(self, latents: Tensor | None) -> None:
        self.reports.put(_Step(latents))
        self.wait()

    def wait(self) -> None:
        if self.orders.get() is _Order.GIVE_UP:
            raise _GivenUp

    def give_up(self) -> None:
        self.orders.put(_Order.GIVE_UP)


class PipelineCall(Generic[ResultT]):
    """A call that is advanced step by step. If it is let go of before its end, it unwinds and its thread ends.

    Attributes:
        steps: Steps done.
        latents: What the last step reported.
        result: What the call returned, once it has.
    """

    def __init__(self, run: Callable[[ReportStep], ResultT], device: torch.device) -> None:
        """Takes what to run; nothing runs before the first `advance`. *run* must not hold this object."""
        self.steps = 0
        self.latents: Tensor | None = None
        self.result: ResultT | None = None
        self._failure: BaseException | None = None
        self._channel: _Channel[ResultT] = _Channel()
        self._thread = threading.Thread(
            target=_main, args=(self._channel, run, device), name="pipeline-call", daemon=True
        )
        weakref.finalize(self, self._channel.give_up)

    def advance(self) -> None:
        """Lets the call take its next step, or return if there is none; waits for it. At its end it does nothing.

        Raises:
            BaseException: What the call raised; again at every later call.
        """
        if self._failure is not None:
            raise self._failure
        if self.result is not None:
            return
        if self._thread.ident is None:
            self._thread.start()
        self._channel.orders.put(_Order.GO_ON)
        report = self._channel.reports.get()
        if isinstance(report, _Step):
            self.steps += 1
            self.latents = report.latents
            return
        self._thread.join()
        if isinstance(report, _Failure):
            self._failure = report.error
            raise self._failure
        self.result = report.value


def _main(channel: _Channel[ResultT], run: Callable[[ReportStep], ResultT], device: torch.device) -> None:
    try:
        channel.wait()
        if device.type == "cuda":
            torch.cuda.set_device(device)
        with torch.inference_mode():
            result = run(channel.report_step)
    except _GivenUp:
        return
    except BaseException as error:
        channel.reports.put(_Failure(error))
    else:
        channel.reports.put(_Result(result))
