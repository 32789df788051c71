"""The way in for every other pipeline of diffusers that draws images from text: its own `__call__`, step by step.

The pipeline encodes, loops and decodes by itself; the engine tells it when to take its next step. So its images are its
own, and what families have is missing: requests run one after another, image by image, and adapters are merged.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lora_server.models.base import Conditioning, Denoise, DenoisingState, Prompt, PromptEmbedding
from lora_server.models.finite import OutputWatch, peaks
from lora_server.models.pipeline_call import PipelineCall, ReportStep
from lora_server.models.pipeline_traits import (
    check_suitable,
    denoiser_of,
    own_defaults,
    preview_latents,
    size_multiple,
    takes_negative_prompts,
    vae_shift,
    watched_modules,
)
from lora_server.models.settings import ModelSettings
from lora_server.models.tokenizer_record import record_truncations
from lora_server.types import ExecutionPath, GenerationParameters, ModelInfo, PromptTruncation

_MAX_SIDE_PX = 2**16


@dataclass(frozen=True, slots=True)
class _Count:
    """A schedule that only counts; the pipeline's scheduler knows the rest."""

    timesteps: Tensor


@dataclass(frozen=True, slots=True)
class _Running:
    """A call, and the scheduler that it alone uses."""

    call: PipelineCall[Tensor]
    scheduler: Any


@dataclass(slots=True, eq=False, kw_only=True)
class _CallState(DenoisingState):
    """One image; *latents* are its pixels, (1, 3, height_px, width_px) uint8, zero until the call has returned."""

    start: Callable[[], _Running]
    running: _Running | None = None


class GenericPipeline:
    """Any loaded text-to-image pipeline as a `ModelFamily`."""

    def __init__(self, pipeline: Any, name: str, settings: ModelSettings) -> None:
        """Takes a pipeline, already on its device and in its type; owns it from now on.

        Raises:
            UnsuitablePipelineError: If it does not draw images from text alone, or does not report its steps.
        """
        self._pipeline = pipeline
        self._accepts = inspect.signature(pipeline.__call__).parameters
        self._name = name
        self._settings = settings
        self.denoiser = denoiser_of(pipeline)
        check_suitable(pipeline, self._accepts)
        pipeline.set_progress_bar_config(disable=True)
        self._watch = OutputWatch(watched_modules(pipeline, self.denoiser))

    @cached_property
    def device(self) -> torch.device:
        """Where the weights are; diffusers looks through all modules to answer."""
        return torch.device(self._network.device)

    @cached_property
    def dtype(self) -> torch.dtype:
        """Type of the weights and of the arithmetic; kept as the device is."""
        dtype = self._network.dtype
        assert isinstance(dtype, torch.dtype)
        return dtype

    @property
    def components(self) -> Mapping[str, torch.nn.Module]:
        """The denoiser and all text encoders."""
        return {
            name: module
            for name, module in self._pipeline.components.items()
            if isinstance(module, torch.nn.Module) and (name == self.denoiser or name.startswith("text_encoder"))
        }

    @property
    def info(self) -> ModelInfo:
        """What the server says of the model."""
        return ModelInfo(
            name=self._name,
            family=type(self._pipeline).__name__.removesuffix("Pipeline"),
            pipeline_class=type(self._pipeline).__name__,
            device=str(self.device),
            dtype=str(self.dtype).removeprefix("torch."),
            defaults=self._settings.defaults(own_defaults(self._pipeline, self._network.config, self._accepts)),
            size_multiple_px=size_multiple(self._pipeline, self._network.config),
            max_side_px=_MAX_SIDE_PX,
            adaptable_components=tuple(sorted(self.components)),
            execution=ExecutionPath.WHOLE_PIPELINE,
            negative_prompts=takes_negative_prompts(self._accepts),
            guidance_threshold=1.0 if "guidance_scale" in self._accepts else None,
        )

    @property
    def blocks(self) -> Sequence[torch.nn.Module]:
        """None: nothing is compiled."""
        return []

    @property
    def decoder(self) -> None:
        """None: the pipeline decodes."""

    def target_classes(self, paths: Sequence[str]) -> Sequence[frozenset[str]]:
        """Everything."""
        return [frozenset(paths)]

    def guides(self, parameters: GenerationParameters) -> bool:
        """Where there is a negative prompt; the pipeline makes the row for it."""
        return bool(parameters.negative_prompt)

    def encode(self, prompts: Sequence[Prompt]) -> list[PromptEmbedding]:
        """Encodes nothing: the pipeline does, when its call begins. Embeddings are not to be kept."""
        return [PromptEmbedding({"later": torch.zeros((1, 1), device=self.device)}) for _ in prompts]

    def truncations(self, prompt: Prompt) -> list[PromptTruncation]:  # noqa: ARG002
        """Returns a list that is filled when the pipeline encodes: in the first step."""
        return []

    def begin(self, parameters: GenerationParameters, conditioning: Conditioning) -> list[DenoisingState]:
        """Returns the states of a request's images; each has its own call, generator and scheduler."""
        schedule = _Count(torch.arange(parameters.num_inference_steps))
        nothing = torch.zeros((1, 3, parameters.height_px, parameters.width_px), dtype=torch.uint8)
        return [
            _CallState(
                parameters=parameters,
                image_index=k,
                conditioning=conditioning,
                schedule=schedule,
                latents=nothing,
                start=partial(self._start, parameters, conditioning, seed),
            )
            for k, seed in enumerate(parameters.seeds)
        ]

    def step(self, states: Sequence[DenoisingState], denoise: Denoise) -> None:  # noqa: ARG002
        """Advances every state by one step, one after another; the last step decodes, too."""
        for state in states:
            assert isinstance(state, _CallState)
            self._watch.take()
            try:
                _advance(state)
            except Exception:
                state.peaks = self._watch.take()
                if all(bool(peak.isfinite()) for _, peak in state.peaks):
                    raise
                state.step_index += 1  # what failed over values that are not finite is told by them
                continue
            shown = [] if state.denoised is None else [(self.denoiser, peaks(state.denoised))]
            state.peaks = [*self._watch.take(), *shown]

    def forward(self, inputs: Mapping[str, Tensor], options: Mapping[str, Any]) -> Tensor:  # noqa: ARG002
        """Is never asked for: `step` leaves the network to the pipeline."""
        raise AssertionError("the pipeline runs its network itself")

    def decode(self, latents: Tensor) -> Tensor:
        """Returns finished pixels as they are, (B, 3, height_px, width_px); decodes latents of previews."""
        if latents.dtype == torch.uint8:
            return latents
        vae = self._pipeline.vae
        unscaled = latents.to(vae.dtype) / vae.config.scaling_factor + vae_shift(vae)
        image: Tensor = vae.decode(unscaled, return_dict=False)[0]
        return image

    @property
    def _network(self) -> Any:
        return getattr(self._pipeline, self.denoiser)

    def _start(self, parameters: GenerationParameters, conditioning: Conditioning, seed: int) -> _Running:
        twin, options, reports = _twin(self._pipeline), self._options(parameters, seed), self._reports(parameters)
        record_truncations(twin, _prompts(parameters, conditioning))

        def run(report: ReportStep) -> Tensor:
            return _pixels(twin(**options, **reports(report)))

        return _Running(PipelineCall(run, self.device), twin.scheduler)

    def _options(self, parameters: GenerationParameters, seed: int) -> dict[str, Any]:
        """What the call gets; the pipeline's own default where a request has no word for it."""
        wanted: dict[str, Any] = {
            "prompt": parameters.prompt,
            "height": parameters.height_px,
            "width": parameters.width_px,
            "num_inference_steps": parameters.num_inference_steps,
            "guidance_scale": parameters.guidance_scale,
            "generator": torch.Generator("cpu").manual_seed(seed),
            "use_resolution_binning": False,  # else the size would be another than asked for
        }
        if parameters.negative_prompt:
            wanted["negative_prompt"] = parameters.negative_prompt
        if self._settings.max_sequence_length is not None:
            wanted["max_sequence_length"] = self._settings.max_sequence_length
        return {name: value for name, value in wanted.items() if name in self._accepts}

    def _reports(self, parameters: GenerationParameters) -> Any:
        """Makes, of the way to report a step, the options that make the pipeline report its steps."""
        pipeline, accepts = self._pipeline, self._accepts

        def show(latents: Any) -> Tensor | None:
            return preview_latents(pipeline, latents, parameters)

        def options(report: ReportStep) -> dict[str, Any]:
            if "callback_on_step_end" not in accepts:
                return {"callback": lambda _, __, latents: report(show(latents)), "callback_steps": 1}

            def on_step_end(_: Any, __: int, ___: Any, tensors: dict[str, Any]) -> dict[str, Any]:
                report(show(tensors.get("latents")))
                return {}

            exposed = [name for name in ("latents",) if name in getattr(pipeline, "_callback_tensor_inputs", ())]
            return {"callback_on_step_end": on_step_end, "callback_on_step_end_tensor_inputs": exposed}

        return options


def _prompts(
    parameters: GenerationParameters, conditioning: Conditioning
) -> list[tuple[Prompt, list[PromptTruncation]]]:
    """The prompts, each with the list that `truncations` made for it."""
    texts = ((parameters.prompt, conditioning.positive), (parameters.negative_prompt, conditioning.negative))
    return [
        (Prompt(text, negative=embedding is conditioning.negative), embedding.truncations)
        for text, embedding in texts
        if embedding is not None and isinstance(embedding.truncations, list)
    ]


def _twin(pipeline: Any) -> Any:
    """Copies a pipeline for one call: the same components, its own state and scheduler."""
    twin = copy.copy(pipeline)
    twin.scheduler = type(pipeline.scheduler).from_config(pipeline.scheduler.config)
    return twin


def _advance(state: _CallState) -> None:
    """Advances a call by its share of one step: some schedulers take more steps than were asked for.

    A state at its first step whose call has returned was put back (warming up does that), and begins anew.
    """
    if state.running is None or (state.step_index == 0 and state.running.call.result is not None):
        state.running = state.start()
    call, wanted, done = state.running.call, len(state.schedule.timesteps), state.step_index + 1
    if call.result is None:
        call.advance()
        expected = max(wanted, len(state.running.scheduler.timesteps))
        while call.result is None and (done == wanted or call.steps < done * expected // wanted):
            call.advance()
    state.step_index = done
    state.denoised = call.latents
    if done == wanted and call.result is not None:
        state.latents = call.result


def _pixels(output: Any) -> Tensor:
    """The one image of a pipeline's output, (1, 3, height_px, width_px) uint8."""
    array = np.asarray(output.images[0].convert("RGB"))
    return torch.from_numpy(array.copy()).permute(2, 0, 1)[None]
