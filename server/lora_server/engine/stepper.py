"""The images that are being denoised: chooses which step together, steps them, and says what came of it.

Owns the active images and what steps have cost. Does not know the queue, leases or events. Engine thread only.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from lora_server.config import EngineConfig
from lora_server.engine.batch_runner import BatchImage, BatchRunner
from lora_server.engine.composition import Phase
from lora_server.engine.job import EngineJob
from lora_server.engine.span import Span
from lora_server.models.base import DenoisingState
from lora_server.models.finite import FiniteCheck
from lora_server.scheduler.costs import StepCosts
from lora_server.scheduler.fair_clock import FairClock
from lora_server.scheduler.places import ActiveWork
from lora_server.scheduler.policy import Rules, choose_batch
from lora_server.scheduler.throughput import Throughput
from lora_server.types import ApplicationWay

_DECODING_STEPS = 1
"""What decoding an image is counted as: else many images of a step each would cost their tenant next to nothing."""


@dataclass(eq=False, slots=True)
class ActiveImage:
    """One image that has steps left; the policy's candidate. Compared by identity."""

    job: EngineJob
    state: DenoisingState
    phases: Sequence[Phase]
    stepper: Stepper

    @property
    def behind(self) -> float:
        """How far it is behind its fair share, in what it may be."""
        return self.stepper.behind(self)

    @property
    def phase(self) -> Phase:
        """What it uses of the denoiser at its next step."""
        return self.phases[self.state.step_index]

    @property
    def composition(self) -> Hashable:
        """Names what it uses of the denoiser at its next step; falsy for the base."""
        return self.phase.key

    @property
    def ranks(self) -> Mapping[str, int]:
        """Rank of each adapter of the composition."""
        return self.phase.ranks

    @property
    def takes_slots(self) -> bool:
        """Whether the composition can be applied from pages."""
        return self.phase.takes_slots

    @property
    def shape(self) -> Hashable:
        """Images of equal shape can step together."""
        return self.state.shape

    @property
    def rows(self) -> int:
        """Rows that it adds to a batch."""
        return self.state.rows

    @property
    def latent_pixels(self) -> int:
        """What it adds to a batch's memory."""
        return self.state.latent_pixels

    @property
    def remaining_steps(self) -> int:
        """Steps that it has left."""
        return self.state.remaining_steps


@dataclass(frozen=True, slots=True)
class Advanced:
    """An image after one of its steps; its state may be further already.

    Attributes:
        step_index: Steps done.
        finished: Whether that was its last one.
    """

    image: ActiveImage
    step_index: int
    finished: bool


@dataclass(frozen=True, slots=True)
class Launched:
    """A batch that the device has been given.

    Attributes:
        members: Its images as they are after it.
        way: How adapters are applied.
        shape, rows: What its cost is known by.
        span: When it is done, and how long it took.
        check: Whether what it gave is finite; known when it is done.
    """

    members: tuple[Advanced, ...]
    way: ApplicationWay
    shape: Hashable
    rows: int
    span: Span
    check: FiniteCheck

    def faulty(self) -> list[tuple[Advanced, str]]:
        """The images whose step gave values that are not finite, with the component that did; once it is done."""
        return [(self.members[k], component) for k, component in self.check.faulty().items()]


class Stepper:
    """The active images, in the order of their arrival.

    Attributes:
        costs: What steps have cost.
        throughput: How fast requests are worked off.
        steps, image_steps: Batches by way, and the images in them, since the start.
    """

    def __init__(self, runner: BatchRunner, config: EngineConfig) -> None:
        """Begins without images."""
        self._runner = runner
        self._rules = Rules(
            max_images=1 if config.deterministic else config.max_batch_images,
            max_rows=2 * config.max_batch_images,
            mixes=not config.deterministic,
        )
        self._max_steps_behind = config.max_steps_behind
        self._images: list[ActiveImage] = []
        self._clock: FairClock[EngineJob] = FairClock()
        self._busy_since_s: float | None = None
        self.costs = StepCosts()
        self.throughput = Throughput()
        self.steps: Counter[ApplicationWay] = Counter()
        self.image_steps = 0

    def __len__(self) -> int:
        return len(self._images)

    def limit_latent_pixels(self, most: int) -> None:
        """Bounds a batch's latent pixels to what memory allows; keeps the lowest of several bounds."""
        self._rules = replace(self._rules, max_latent_pixels=min(most, self._rules.max_latent_pixels))

    def add(self, job: EngineJob, states: Sequence[DenoisingState]) -> None:
        """Lets a job's images take part from the next step on."""
        if not states:
            return
        phases = self._runner.phases(job.composition, len(states[0].schedule.timesteps))
        self._images += [ActiveImage(job, state, phases, self) for state in states]
        self._clock.join(job)

    def remove(self, job: EngineJob) -> None:
        """Takes a job's images out; idempotent."""
        self._images = [image for image in self._images if image.job is not job]
        self._clock.leave(job)

    def active(self) -> Iterator[ActiveWork]:
        """Yields what each active image has left, in pixel-steps."""
        for image in self._images:
            yield ActiveWork(image.job.tenant, image.job, image.remaining_steps * image.job.pixels)

    def behind(self, image: ActiveImage) -> float:
        """How far an image is behind its fair share, in what it may be: overdue from 1 on.

        Its tenant may be so many of its steps behind; its request, within its tenant, all steps of an image: so
        requests of a kind are done one after the other, as they came, and a small one does not wait for a large one.
        """
        of_tenant, of_request = self._clock.behind(image.job)
        steps = image.job.request.parameters.num_inference_steps
        return (of_tenant / self._max_steps_behind + of_request / steps) / image.job.pixels

    def rest(self) -> None:
        """Notes that there is nothing to step; the time until there is counts for no rate."""
        self._busy_since_s = None

    def remaining_s(self, job: EngineJob) -> float:
        """The least time that a job's slowest image still takes, by the fastest steps seen."""
        states = [*(image.state for image in self._images if image.job is job), *job.states]
        return max((each.remaining_steps * self.costs.fastest_s(each.shape) for each in states), default=0.0)

    def launch(self) -> Launched | None:
        """Chooses a batch and gives it to the device; None if there is nothing to step. `finish` must follow.

        The next batch may be launched before: the device does them in order. Images whose last step this is are
        inactive from now on. If it raises, nothing has changed.
        """
        return self._launch(self._images)

    def launch_alone(self, job: EngineJob) -> Launched | None:
        """The same for one job's images only."""
        return self._launch([image for image in self._images if image.job is job])

    def _launch(self, images: Sequence[ActiveImage]) -> Launched | None:
        batch = choose_batch(images, self._rules, self.costs, self._runner.pages, self._runner.merged)
        if batch is None:
            return None
        shape, rows = batch.members[0].shape, sum(image.rows for image in batch.members)
        with self._runner.span() as span:
            check = self._runner.step([BatchImage(each.state, each.phase.members) for each in batch.members], batch.way)
        self.steps[batch.way] += 1
        self.image_steps += len(batch.members)
        self._charge(batch.members)
        progress = tuple(Advanced(each, each.state.step_index, each.state.finished) for each in batch.members)
        return Launched(progress, batch.way, shape, rows, span, check)

    def _charge(self, stepped: Sequence[ActiveImage]) -> None:
        """Counts a step of images for their jobs, and lets go of those that have no more."""
        work: Counter[EngineJob] = Counter()
        for image in stepped:
            work[image.job] += image.job.pixels * (1 + image.state.finished * _DECODING_STEPS)
        self._clock.serve(work)
        self._images = [image for image in self._images if not image.state.finished]
        active = {id(image.job) for image in self._images}
        for job in work:
            if id(job) not in active:
                self._clock.leave(job)

    def finish(self, launched: Launched) -> float:
        """Waits for the step and notes what it cost; returns its seconds."""
        launched.span.wait()
        seconds = launched.span.seconds
        slots = launched.way is ApplicationWay.SLOTS
        self.costs.observe(launched.shape, launched.rows, seconds, slots=slots)
        self.throughput.observe(sum(member.image.job.pixels for member in launched.members), self._lasted_s(seconds))
        return seconds

    def _lasted_s(self, seconds: float) -> float:
        """How long a step of *seconds* lasted with all that was done since the one before, if work went on."""
        now_s = time.monotonic()
        began_s, self._busy_since_s = self._busy_since_s, now_s
        return seconds if began_s is None else now_s - began_s


def jobs_of(members: Iterable[Advanced]) -> dict[EngineJob, list[Advanced]]:
    """The jobs of a batch, each with its images."""
    jobs: dict[EngineJob, list[Advanced]] = {}
    for member in members:
        jobs.setdefault(member.image.job, []).append(member)
    return jobs
