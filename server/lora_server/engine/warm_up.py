"""Before serving: captures the declared buckets and measures what steps, open pages and changes of weights cost.

The policy decides by these costs. Leaves the model as it was: the adapter used here adds nothing.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import structlog
import torch

from lora_server.config import EngineConfig
from lora_server.engine.batch_runner import BatchImage, BatchRunner
from lora_server.engine.stepper import Stepper
from lora_server.models.base import DenoisingState, ModelFamily, adapter_targets
from lora_server.models.merge import ScaledAdapter
from lora_server.models.weights import AdapterWeights, LowRankDelta, pack
from lora_server.types import ApplicationWay, GenerationParameters

_log = structlog.get_logger(__name__)
_TIMED_RUNS = 3
_SHARE_OF_FREE_MEMORY = 0.8


class WarmUpError(Exception):
    """The model was loaded, but its first steps fail: it cannot be served."""

    def __init__(self, cause: Exception) -> None:
        """Names the first line of *cause*, whose rest is for the log."""
        what = next(iter(str(cause).splitlines()), "") or "no message"
        super().__init__(f"the model cannot be served, its warm-up failed: {type(cause).__name__}: {what}")


@dataclass(frozen=True, slots=True)
class _Parts:
    family: ModelFamily
    runner: BatchRunner
    stepper: Stepper
    config: EngineConfig
    began_s: float

    @property
    def on_cuda(self) -> bool:
        return self.family.device.type == "cuda"

    @property
    def late(self) -> bool:
        """Without CUDA nothing has to be captured, and a large model would take minutes: it learns as it serves."""
        return not self.on_cuda and time.monotonic() - self.began_s > self.config.warm_up_s


def warm_up(family: ModelFamily, runner: BatchRunner, stepper: Stepper, config: EngineConfig) -> None:
    """Captures and measures every declared size and batch, without adapters and with. Blocks for seconds to minutes."""
    parts = _Parts(family, runner, stepper, config, time.monotonic())
    defaults = family.info.defaults
    sizes = config.warm_sizes
    warm_sizes = ((defaults.width_px, defaults.height_px),) if sizes is None else sizes
    if parts.on_cuda and not config.deterministic:  # which is to choose alike at every start
        _choose_attention(parts, warm_sizes)
    adapters = [_idle_adapter(parts, target_class) for target_class in config.warm_classes]
    for size in warm_sizes:
        for images in config.warm_images:
            if parts.late or images > config.max_batch_images:
                break
            states = _states(parts, size, images)
            _measure_batch(parts, states, adapters)
            runner.warm_decode(states[0])
    if sizes != () and adapters and not parts.late:
        stepper.costs.switch_s = _measure_switch(parts, adapters[0])
    runner.restore()
    runner.pages.clear()
    _log.info("warm", seconds=round(time.monotonic() - parts.began_s, 2), captures=runner.denoiser.captures)


def _states(parts: _Parts, size: tuple[int, int], images: int) -> list[DenoisingState]:
    parameters = _parameters(parts.family, size, images)
    conditioning = parts.runner.condition(parameters, ())
    return parts.runner.begin(parameters, conditioning)


def _choose_attention(parts: _Parts, sizes: Sequence[tuple[int, int]]) -> None:
    """By one step of one image of every size."""
    images = [BatchImage(state, ()) for size in sizes for state in _states(parts, size, 1)]
    with parts.runner.denoiser.choosing_attention():  # of steps alone: the text encoders' attention is another
        for image in images:
            _step(parts, [image], ApplicationWay.BASE)
            parts.runner.wait()


def _measure_batch(parts: _Parts, states: Sequence[DenoisingState], adapters: Sequence[AdapterWeights]) -> None:
    rows = sum(state.rows for state in states)
    plain = [BatchImage(state, ()) for state in states]
    if parts.on_cuda:
        _measure_memory(parts, plain)
    seconds = _measure(parts, lambda: _step(parts, plain, ApplicationWay.BASE))
    parts.stepper.costs.observe(states[0].shape, rows, seconds, slots=False)
    if parts.config.deterministic:
        return
    # The smallest choice is what most batches open, and what the costs are known by.
    for choice in parts.runner.column_choices if parts.on_cuda else parts.runner.column_choices[:1]:
        for weights in adapters:
            # On CUDA the open columns cost, whoever opens them; on the CPU the columns of each row.
            adapters_used = (
                choice // parts.config.page_columns if parts.on_cuda else min(len(states), parts.config.num_pages)
            )
            mixed = list(_mixed(states, weights, adapters_used))
            seconds = _measure(parts, lambda mixed=mixed: _step(parts, mixed, ApplicationWay.SLOTS))  # type: ignore[misc]
            if choice == parts.runner.column_choices[0] and weights is adapters[0]:
                parts.stepper.costs.observe(states[0].shape, rows, seconds, slots=True)


@contextmanager
def _rewinding(images: Sequence[BatchImage]) -> Iterator[None]:
    """Puts the images back to where they were, so that their steps never run out."""
    before = [(image.state.schedule, image.state.latents, image.state.step_index) for image in images]
    yield
    for image, (schedule, latents, step_index) in zip(images, before, strict=True):
        image.state.schedule, image.state.latents, image.state.step_index = schedule, latents, step_index


def _step(parts: _Parts, images: Sequence[BatchImage], way: ApplicationWay) -> None:
    with _rewinding(images):
        parts.runner.step(images, way)


def _measure(parts: _Parts, action: Callable[[], None]) -> float:
    """The least of a few runs, after one that captures what it needs."""
    with parts.runner.denoiser.capturing():
        action()
    parts.runner.wait()
    seconds = []
    for _ in range(1 if parts.late else _TIMED_RUNS):
        began_s = time.monotonic()
        action()
        parts.runner.wait()
        seconds.append(time.monotonic() - began_s)
    return min(seconds)


def _measure_memory(parts: _Parts, images: Sequence[BatchImage]) -> None:
    """Learns how many latent pixels fit into the memory that is left."""
    device = parts.family.device
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    _step(parts, images, ApplicationWay.BASE)
    parts.runner.wait()
    taken = torch.cuda.max_memory_allocated(device) - before
    free, _ = torch.cuda.mem_get_info(device)
    pixels = sum(image.state.latent_pixels for image in images)
    parts.stepper.limit_latent_pixels(int(free * _SHARE_OF_FREE_MEMORY * pixels / max(1, taken)))


def _measure_switch(parts: _Parts, weights: AdapterWeights) -> float:
    def switch() -> None:
        for digest in ("first", "second"):
            parts.runner.merge([ScaledAdapter(f"warm-up:{digest}", 1.0, weights)])

    return _measure(parts, switch) / 2


def _mixed(states: Sequence[DenoisingState], weights: AdapterWeights, adapters: int) -> Iterator[BatchImage]:
    """Spreads so many adapters over the images, so that a batch opens all the columns that it should."""
    for k, state in enumerate(states):
        mine = range(k, adapters, len(states))
        yield BatchImage(state, [ScaledAdapter(f"warm-up:{place}", 1.0, weights) for place in mine])


def _idle_adapter(parts: _Parts, target_class: int) -> AdapterWeights:
    """An adapter of one page that changes every linear of a class, by nothing."""
    denoiser, rank = parts.family.denoiser, parts.config.page_columns
    targets = adapter_targets({denoiser: parts.family.components[denoiser]})
    classes = parts.runner.target_classes
    paths = classes[min(target_class, len(classes) - 1)]
    deltas = {
        path: LowRankDelta(
            torch.zeros((rank, shape.in_features), dtype=parts.family.dtype),
            torch.zeros((shape.out_features, rank), dtype=parts.family.dtype),
            1.0,
        )
        for path, shape in targets[denoiser].items()
        if path in paths
    }
    return pack({denoiser: deltas}, targets).to(parts.family.device)


def _parameters(family: ModelFamily, size: tuple[int, int], images: int) -> GenerationParameters:
    return GenerationParameters(
        prompt="",
        negative_prompt="",
        width_px=size[0],
        height_px=size[1],
        num_inference_steps=family.info.defaults.num_inference_steps,
        guidance_scale=2.0,
        seed=0,
        num_images=images,
    )
