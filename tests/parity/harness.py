"""Our pictures beside the oracle's: a subject is a tiny model of one family, a case what to draw with which adapters.

The oracle is the family's own pipeline of diffusers, with adapters loaded through peft, unmerged. In float64 the
pictures are equal after 8-bit rounding. In float32, padding, merging and batching round differently, the base model
too: at most one level apart, in at most 0.05% of the values (design.md 5).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lora_server.adapters.formats.reader import AdapterReader
from lora_server.adapters.roots import AdapterRoots
from lora_server.adapters.source import AdapterFolder
from lora_server.config import EngineConfig, ModelConfig
from lora_server.engine.batch_runner import BatchImage, BatchRunner
from lora_server.models.base import adapter_targets
from lora_server.models.merge import ScaledAdapter
from lora_server.models.registry import load_model
from lora_server.types import ApplicationWay, GenerationParameters
from peft import PeftModel

from tests.factories import write_adapter

PROMPT = "a big red star on a navy background"
Uses = list[tuple[str, float]]
Case = tuple[dict[str, Any], Uses]

CASES: dict[str, Case] = {
    "base": ({}, []),
    "base without guidance": ({"guidance_scale": 1.0}, []),
    "base, three images": ({"num_images": 3}, []),
    "one adapter": ({}, [("a", 1.0)]),
    "one adapter without guidance, three images": ({"guidance_scale": 1.0, "num_images": 3}, [("a", 1.0)]),
    "scale 0.5": ({}, [("a", 0.5)]),
    "scale -1": ({}, [("a", -1.0)]),
    "scale 0": ({}, [("a", 0.0)]),
    "two adapters": ({}, [("a", 0.7), ("b", 1.0)]),
    "text encoder": ({}, [("text", 1.0)]),
    "text encoder with another": ({}, [("b", -0.5), ("text", 0.8)]),
}
"""What every family has to draw; subjects add their own."""


@dataclass(frozen=True)
class Subject:
    """A tiny model of one family.

    Attributes:
        name: The family's.
        build: Writes the model into an empty folder and returns what to give `--model`.
        pipeline: Loads the oracle in a type.
        adapters: By name: what peft adapts in each component, and how strongly.
        side_px, latent: Of its usual picture; channels of the latents, and pixels to one of them.
        guidance_scale: Of its usual picture. Random networks amplify rounding, guidance more so: keep float32 in mind.
        options: What the oracle's call gets beside prompts, sizes, steps, guidance and noise.
        prepare: Changes the oracle's pipeline for a request, such as its scheduler.
        common: Which of the cases of every family are drawn; None for all. For families that share all code with one
            that draws them all.
        cases, mixed: Beside those of every family.
        schedulers: Those that requests may name here; drawn in float64 only.
        flips: Share of values that may be one level off in float64 too: diffusers' own code for some networks rounds
            to float32 inside (rotary embeddings, norms), where the last digit of a double can tip the balance.
    """

    name: str
    build: Callable[[Path], str]
    pipeline: Callable[[str, torch.dtype], Any]
    denoiser: str
    adapters: Mapping[str, Mapping[str, tuple[float, dict[str, Any]]]]
    side_px: int
    latent: tuple[int, int]
    guidance_scale: float = 4.0
    options: Callable[[GenerationParameters], dict[str, Any]] = lambda wanted: {}
    prepare: Callable[[Any, GenerationParameters], None] = lambda pipeline, wanted: None
    common: tuple[str, ...] | None = None
    cases: Mapping[str, Case] = field(default_factory=dict)
    schedulers: tuple[str, ...] = ()
    mixed: tuple[Case, ...] = ()
    flips: float = 0.0

    def parameters(self, **changes: Any) -> GenerationParameters:
        """What to draw."""
        defaults: dict[str, Any] = {
            "prompt": PROMPT,
            "negative_prompt": "",
            "width_px": self.side_px,
            "height_px": self.side_px,
            "num_inference_steps": 4,
            "guidance_scale": self.guidance_scale,
            "seed": 11,
            "num_images": 1,
        }
        return GenerationParameters(**{**defaults, **changes})

    @property
    def all_cases(self) -> dict[str, Case]:
        """Those of every family, and its own."""
        return {**(CASES if self.common is None else {case: CASES[case] for case in self.common}), **self.cases}


class Pair:
    """A subject in one type, drawn by us and by the oracle; used for all cases in turn, so that each also proves that
    the last left no trace."""

    def __init__(self, subject: Subject, model: str, dtype: str, root: Path) -> None:
        self.subject = subject
        self.model = model
        self.dtype: torch.dtype = getattr(torch, dtype)
        self.family = load_model(ModelConfig(model=model, device="cpu", dtype=dtype))  # type: ignore[arg-type]
        self.runner = BatchRunner(self.family, EngineConfig())
        self.root = root
        self._drawn: dict[object, np.ndarray] = {}

    def draw(self, wanted: GenerationParameters, uses: Uses, way: ApplicationWay = ApplicationWay.MERGED) -> np.ndarray:
        """One request's images, (B, H, W, 3)."""
        (images,) = self.draw_together([(wanted, uses)], way)
        return images

    def draw_together(self, requests: list[tuple[GenerationParameters, Uses]], way: ApplicationWay) -> list[np.ndarray]:
        """The images of several requests, stepped in one batch; who has more steps goes on without the others."""
        with torch.inference_mode():
            jobs = [self._begin(wanted, uses) for wanted, uses in requests]
            while active := [image for job in jobs for image in job if not image.state.finished]:
                lead = active[0].state.shape
                batch = [image for image in active if image.state.shape == lead]
                self.runner.step(batch, way if any(image.composition for image in batch) else ApplicationWay.BASE)
            return [torch.cat([self.runner.decode([image.state]).pixels for image in job]).numpy() for job in jobs]

    def _begin(self, wanted: GenerationParameters, uses: Uses) -> list[BatchImage]:
        composition = [self.adapter(name, scale) for name, scale in uses]
        conditioning = self.runner.condition(wanted, composition)
        return [BatchImage(state, composition) for state in self.runner.begin(wanted, conditioning)]

    def adapter(self, name: str, scale: float) -> ScaledAdapter:
        """One of the subject's adapters, read as the server reads it."""
        targets = adapter_targets(self.family.components)
        files = AdapterFolder(self.root / name, sorted(targets), AdapterRoots([self.root])).read(1 << 30)
        reader = AdapterReader(targets, self.family.denoiser, self.model, self.family.dtype, 256)
        return ScaledAdapter(files.digest, scale, reader.read(name, files.contents))

    def oracle(self, wanted: GenerationParameters, uses: Uses) -> np.ndarray:
        """The same pictures by diffusers and peft; drawn once."""
        key = wanted, tuple(uses)
        if key not in self._drawn:
            self._drawn[key] = self._oracle(wanted, uses)
        return self._drawn[key]

    def _oracle(self, wanted: GenerationParameters, uses: Uses) -> np.ndarray:
        """Noise is drawn in float32, as a float32 pipeline draws it; schedulers go on with the same generators."""
        pipeline = self.subject.pipeline(self.model, self.dtype)
        pipeline.set_progress_bar_config(disable=True)
        for component in self.family.components:
            self._adapt(pipeline, component, uses)
        self.subject.prepare(pipeline, wanted)
        channels, factor = self.subject.latent
        shape = (1, channels, wanted.height_px // factor, wanted.width_px // factor)
        generators = [torch.Generator().manual_seed(seed) for seed in wanted.seeds]
        latents = torch.cat([torch.randn(shape, generator=generator) for generator in generators]).to(self.dtype)
        options = {
            "negative_prompt": wanted.negative_prompt or None,
            "height": wanted.height_px,
            "width": wanted.width_px,
            "num_inference_steps": wanted.num_inference_steps,
            "guidance_scale": wanted.guidance_scale,
            "num_images_per_prompt": wanted.num_images,
            "latents": latents,
            "generator": generators,
            "output_type": "np",
            **self.subject.options(wanted),
        }
        images = pipeline(wanted.prompt, **options).images
        return (images * 255).round().astype(np.uint8)

    def _adapt(self, pipeline: Any, component: str, uses: Uses) -> None:
        denoises = component == self.subject.denoiser
        # peft warns of names that its own prefix contains, such as `a`.
        folders = {f"use-{n}": self.root / n if denoises else self.root / n / component for n, _ in uses}
        members = [(f"use-{n}", s) for n, s in uses if folders[f"use-{n}"].is_dir()]
        if not members:
            return
        adapted = None
        for name, _ in members:
            if adapted is None:
                adapted = PeftModel.from_pretrained(getattr(pipeline, component), folders[name], name)
            else:
                adapted.load_adapter(folders[name], name)
        assert adapted is not None
        adapted.base_model.set_adapter([name for name, _ in members])
        for module in adapted.modules():
            for name, scale in members:
                if hasattr(module, "set_scale") and name in getattr(module, "scaling", {}):
                    module.set_scale(name, scale)
        adapted.to(self.dtype)
        setattr(pipeline, component, adapted.base_model.model)


def write_adapters(subject: Subject, model: str, root: Path) -> None:
    """Writes the subject's adapters with peft's own writer."""
    seed = 0
    for name, components in subject.adapters.items():
        for component, (amount, config) in components.items():
            seed += 1
            module = getattr(subject.pipeline(model, torch.float32), component)
            folder = root / name if component == subject.denoiser else root / name / component
            write_adapter(folder, module, seed, amount, **config)


def assert_same(
    ours: np.ndarray, expected: np.ndarray, dtype: torch.dtype, what: object = "", flips: float = 0.0
) -> None:
    """Holds the bounds of the type (design.md 5: order of rounding); *flips* is the subject's."""
    difference = np.abs(ours.astype(int) - expected)
    if dtype == torch.float64 and not flips:
        assert difference.max() == 0, what
    else:
        assert difference.max() <= 1, what
        assert (difference > 0).mean() <= (flips if dtype == torch.float64 else 0.0005), what
