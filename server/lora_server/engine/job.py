"""One accepted request on its way through the engine.

A job's fields belong to the engine thread; what others may touch (the event log, the cancel flag) is thread-safe.
"""

from __future__ import annotations

import threading
from collections import Counter, deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from lora_server.adapters.api import AdapterLease, ResolvedAdapter
from lora_server.engine.events import EventLog, LogSubscription
from lora_server.engine.span import Span
from lora_server.observer import RequestSummary, Stage
from lora_server.types import (
    AdapterUsage,
    ApplicationWay,
    AppliedAdapter,
    GenerationRequest,
    GenerationStats,
    PromptTruncation,
)
from lora_server.use_settings import with_trigger_words

if TYPE_CHECKING:
    from lora_server.models.base import DenoisingState
    from lora_server.models.merge import ScaledAdapter


@dataclass(slots=True)
class Timings:
    """Where a job's time went; monotonic seconds for moments, seconds for spans.

    Attributes:
        stages: When what was done; for traces.
    """

    accepted_s: float
    adapter_wait_s: float = 0.0
    started_s: float | None = None
    text_encode: Span = field(default_factory=Span)
    text_encode_began_s: float | None = None
    denoise_s: float = 0.0
    decode_s: float = 0.0
    image_encode_s: float = 0.0
    stages: list[Stage] = field(default_factory=list)

    def note(self, name: str, began_s: float, ended_s: float) -> None:
        """Adds a stage of the job's way."""
        self.stages.append(Stage(name, began_s, ended_s))

    def extend(self, name: str, began_s: float, ended_s: float) -> None:
        """Lets the last stage of that *name* last until *ended_s*; adds it if there is none."""
        for place in range(len(self.stages) - 1, -1, -1):
            if self.stages[place].name == name:
                self.stages[place] = Stage(name, self.stages[place].began_s, ended_s)
                return
        self.note(name, began_s, ended_s)


@dataclass(eq=False)
class EngineJob:
    """A request, its events and its state in the engine. Compared by identity.

    Attributes:
        request: What was asked for.
        timings: Where the time went.
        on_cancel: Called, from any thread, when the last reader has left.
        on_held: Called, from any thread, with the bytes of images that have come to be held for readers, or are no
            more.
        resolved: The adapters' versions, once they are fixed.
        parameters: What to draw; once the adapters are fixed, with their trigger words in the prompt.
        pending: The future that the job waits for (resolving or acquiring adapters), if any.
        lease: Held from admission to the last decoded image.
        images_left_to_decode: Images whose pixels are not there yet.
        composition: The adapters' weights on the device, from admission on.
        holds_slots: Whether its adapters' slots are taken.
        total_steps: Steps to do, summed over images; before the job begins, what its request says. Some schedulers
            take more.
        completed_steps: Steps done, summed over images.
        cut_off: What tokenizers cut off each of its prompts.
        steps: Batches that it took part in, by the way its adapters were applied.
        batch_images: Images of those batches, its own and others', summed.
        cancelled: Whether its last reader has left.
        deadline_s: Monotonic time after which no reader waits any more, or None.
        expected_s: Seconds from its acceptance after which it should be done, by the measured rate and fair turns; None
            if nothing was measured yet.
        position: Requests that were to start before it, as it was last told; None before that.
        images_to_begin: Images that have no place among the active ones yet.
        states: Images that are drawn and have no place yet, in the order of their turns.
        images_left: Images that are not yet encoded; guarded by `finish_lock`.
    """

    request: GenerationRequest
    timings: Timings
    on_cancel: Callable[[EngineJob], None]
    on_held: Callable[[EngineJob, int], None] = lambda _job, _bytes: None
    resolved: tuple[ResolvedAdapter, ...] | None = None
    pending: Future[object] | None = None
    lease: AdapterLease | None = None
    images_left_to_decode: int = 0
    composition: tuple[ScaledAdapter, ...] = ()
    holds_slots: bool = False
    total_steps: int = 0
    completed_steps: int = 0
    cut_off: Sequence[Sequence[PromptTruncation]] = ()
    steps: Counter[ApplicationWay] = field(default_factory=Counter)
    batch_images: int = 0
    cancelled: bool = False
    deadline_s: float | None = None
    expected_s: float | None = None
    position: int | None = None
    images_to_begin: int = 0
    states: deque[DenoisingState] = field(default_factory=deque)
    finish_lock: threading.Lock = field(default_factory=threading.Lock)

    def __post_init__(self) -> None:
        self.log = EventLog(on_abandoned=self.cancel, on_held=lambda change: self.on_held(self, change))
        self.images_left = self.images_left_to_decode = self.images_to_begin = self.request.parameters.num_images
        self.total_steps = self.request.parameters.num_images * self.request.parameters.num_inference_steps
        self.deadline_s = self.request.deadline_s
        self.parameters = self.request.parameters

    def resolve(self, adapters: tuple[ResolvedAdapter, ...]) -> None:
        """Fixes the adapters, and with them the prompt; again, if what their names mean has changed meanwhile."""
        self.resolved = adapters
        self.parameters = self.request.parameters
        words = [word for adapter in adapters for word in adapter.trigger_words]
        if words:
            prompt = with_trigger_words(self.parameters.prompt, words)
            self.parameters = replace(self.parameters, prompt=prompt)

    @property
    def tenant(self) -> str:
        """Whose queue it waits in."""
        return self.request.tenant

    @property
    def begun(self) -> bool:
        """Whether one of its images has a place, or had."""
        return self.timings.started_s is not None

    @property
    def batches(self) -> int:
        """Batches that it took part in."""
        return self.steps.total()

    @property
    def applied(self) -> Sequence[AppliedAdapter]:
        """The adapters as they are applied, in the order of the request; empty before they are resolved."""
        return tuple(adapter.applied for adapter in self.resolved or ())

    @property
    def truncations(self) -> tuple[PromptTruncation, ...]:
        """What tokenizers cut off its prompts; empty before they are encoded."""
        return tuple(truncation for each in self.cut_off for truncation in each)

    def subscribe(self, wake: Callable[[], None]) -> LogSubscription:
        """Joins the job."""
        return self.log.subscribe(wake)

    def keep(self) -> Callable[[], None]:
        """Counts the job's images as unread until the returned function is called; see `engine.api.Job.keep`."""
        return self.log.keep()

    def cancel(self) -> None:
        """Asks the engine to let go of the job within one step; idempotent, thread-safe."""
        self.cancelled = True
        self.on_cancel(self)

    def expired(self, now_s: float) -> bool:
        """Whether its deadline has passed."""
        return self.deadline_s is not None and now_s >= self.deadline_s

    def extend_deadline(self, deadline_s: float | None) -> None:
        """Lets the job live as long as the most patient of its readers."""
        if self.deadline_s is not None:
            self.deadline_s = None if deadline_s is None else max(self.deadline_s, deadline_s)

    @property
    def pixels(self) -> int:
        """Pixels of one of its images."""
        return self.request.parameters.width_px * self.request.parameters.height_px

    @property
    def image_pixel_steps(self) -> int:
        """The work of one of its images, in pixels times steps."""
        return self.pixels * self.request.parameters.num_inference_steps

    @property
    def remaining_pixel_steps(self) -> int:
        """The work that it has left, in pixels of images times steps; about right from any thread."""
        return self.pixels * max(0, self.total_steps - self.completed_steps)

    def summary(self, outcome: str, now_s: float) -> RequestSummary:
        """Returns how it went, as of *now_s*."""
        timings = self.timings
        queued_until_s = now_s if timings.started_s is None else timings.started_s
        stages = [Stage("queue", timings.accepted_s, queued_until_s), *timings.stages]
        if timings.text_encode_began_s is not None:
            began_s = timings.text_encode_began_s
            stages.append(Stage("encode", began_s, began_s + timings.text_encode.seconds))
        return RequestSummary(
            request=self.request,
            outcome=outcome,
            adapters=tuple(self.applied),
            stats=self.stats(now_s),
            stages=tuple(sorted(stages, key=lambda stage: stage.began_s)),
            accepted_s=timings.accepted_s,
            ended_s=now_s,
        )

    def stats(self, now_s: float) -> GenerationStats:
        """Returns what the request cost, as of *now_s*."""
        timings = self.timings
        started_s = timings.started_s if timings.started_s is not None else now_s
        return GenerationStats(
            request_id=self.request.request_id,
            queue_time_s=max(0.0, started_s - timings.accepted_s - timings.adapter_wait_s),
            adapter_wait_time_s=timings.adapter_wait_s,
            text_encode_time_s=timings.text_encode.seconds,
            denoise_time_s=timings.denoise_s,
            decode_time_s=timings.decode_s,
            image_encode_time_s=timings.image_encode_s,
            total_time_s=now_s - timings.accepted_s,
            completed_steps=self.completed_steps,
            steps_by_way=dict(self.steps),
            mean_batch_images=self.batch_images / self.batches if self.batches else 0.0,
            adapters=tuple(
                AdapterUsage(adapter.applied, adapter.state_on_arrival, adapter.load_time_s)
                for adapter in self.resolved or ()
            ),
            prompt_truncations=self.truncations,
        )
