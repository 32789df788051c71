"""Scales by component and by block, and schedules over the steps, against diffusers' own ways of doing the same.

Component and block scales are `set_adapters` with a dictionary; a schedule is `callback_on_step_end` that sets other
scales for the step after. In float64 the pictures are equal after 8-bit rounding.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lora_server.config import EngineConfig
from lora_server.engine.job import EngineJob, Timings
from lora_server.engine.stepper import Stepper
from lora_server.models.merge import ScaledAdapter
from lora_server.types import ApplicationWay, GenerationParameters, GenerationRequest
from lora_server.use_settings import UseSettings
from safetensors.torch import load_file

from tests.parity.harness import Pair
from tests.parity.subjects_sd3 import SD3

pytestmark = pytest.mark.filterwarnings("ignore:Already found a `peft_config`")  # diffusers, on a second adapter

Use = tuple[str, float, UseSettings]
"""An adapter's folder, its scale, where and when it acts."""

HALVES = UseSettings(component_scales=(("transformer", 0.5), ("text_encoder", -1.5)))
TEXT_ONLY = UseSettings(component_scales=(("transformer", 0.0),))
BLOCKS = UseSettings(block_scales=(("transformer_blocks.0", 0.0), ("transformer_blocks.2", -0.5)))
PROJECTIONS = UseSettings(
    component_scales=(("transformer", 2.0),), block_scales=(("*.*.attn.to_v", 0.25), ("*.*.attn.to_k", 0.0))
)
MIDDLE = UseSettings(start=0.25, end=0.75)
LATE = UseSettings(start=0.5)
EARLY_BLOCKS = UseSettings(block_scales=(("transformer_blocks.1", 0.3),), end=0.5)
CASES: dict[str, tuple[int, list[Use]]] = {
    "component scales": (11, [("text", 0.8, HALVES)]),
    "text encoder alone": (12, [("text", 1.0, TEXT_ONLY)]),
    "block scales": (13, [("a", 1.0, BLOCKS)]),
    "globs and a component": (14, [("a", 0.7, PROJECTIONS), ("b", -1.0, UseSettings())]),
    "schedule": (15, [("a", 1.0, MIDDLE)]),
    "schedule and text encoder": (16, [("text", 1.0, LATE)]),
    "hand-over": (17, [("a", 1.2, EARLY_BLOCKS), ("b", 0.9, LATE)]),
}


def request(case: str) -> tuple[GenerationParameters, list[Use]]:
    """What a case asks for."""
    seed, uses = CASES[case]
    return small(seed), uses


def small(seed: int) -> GenerationParameters:
    """A quarter of the usual picture: what is tested here does not depend on the size."""
    return SD3.parameters(seed=seed, width_px=64, height_px=64)


class Engine:
    """Our way: the stepper and all below it, as the engine drives them."""

    def __init__(self, root: Path) -> None:
        self.pair = Pair(SD3, "demo", "float64", root)
        self.stepper = Stepper(self.pair.runner, EngineConfig())
        self.ways: list[ApplicationWay] = []

    def draw(self, requests: list[tuple[GenerationParameters, list[Use]]]) -> list[np.ndarray]:
        """The first image of each request, all of them under way at once."""
        self.ways = []
        with torch.inference_mode():
            states = [state for wanted, uses in requests for state in self._begin(wanted, uses)]
            while batch := self.stepper.launch():
                self.stepper.finish(batch)
                self.ways.append(batch.way)
            return [self.pair.runner.decode([state]).pixels.numpy() for state in states]

    def _begin(self, wanted: GenerationParameters, uses: list[Use]) -> list[Any]:
        plain = [(self.pair.adapter(name, scale), settings) for name, scale, settings in uses]
        composition = [ScaledAdapter(m.digest, m.scale, m.weights, settings) for m, settings in plain]
        conditioning = self.pair.runner.condition(wanted, composition)
        states = self.pair.runner.begin(wanted, conditioning)
        job = EngineJob(GenerationRequest("r", wanted), Timings(0.0), lambda _: None)
        job.composition = tuple(composition)
        self.stepper.add(job, states)
        return states


@pytest.fixture(scope="module")
def engine(demo_adapters: Path) -> Iterator[Engine]:
    """One engine for all cases; no bucket is warm, so the policy decides by what it sees."""
    return Engine(demo_adapters)


@pytest.fixture(scope="module")
def expected(demo_adapters: Path) -> Any:
    """The oracle's picture of a case, drawn once."""
    return cache(lambda case: oracle(demo_adapters, *request(case)))


def oracle(root: Path, wanted: GenerationParameters, uses: list[Use]) -> np.ndarray:
    """The picture by diffusers: adapters loaded by its own loader, scales set by its own methods."""
    from diffusers import StableDiffusion3Pipeline
    from lora_server.demo.paths import model_dir

    pipeline = StableDiffusion3Pipeline.from_pretrained(model_dir(), dtype=torch.float64)
    pipeline.set_progress_bar_config(disable=True)
    for name, _, _ in uses:
        pipeline.load_lora_weights(_diffusers_keys(root / name), adapter_name=name)
    pipeline.transformer.to(torch.float64)
    pipeline.text_encoder.to(torch.float64)
    names = [name for name, _, _ in uses]
    text = [scale * settings.component_factor("text_encoder") for _, scale, settings in uses]
    pipeline.set_adapters(names, [{"transformer": 0.0, "text_encoder": scale} for scale in text])

    def set_step(step: int) -> None:
        acting = [settings.start * wanted.num_inference_steps <= step < settings.end * wanted.num_inference_steps
                  for _, _, settings in uses]  # fmt: skip
        weights = [_weights(use) if acts else 0.0 for use, acts in zip(uses, acting, strict=True)]
        pipeline.transformer.set_adapters(names, weights)

    def on_step_end(pipeline: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        set_step(step + 1)
        return tensors

    set_step(0)
    generator = torch.Generator().manual_seed(wanted.seed)
    latents = torch.randn((1, 16, wanted.height_px // 8, wanted.width_px // 8), generator=generator)
    images = pipeline(
        wanted.prompt,
        height=wanted.height_px,
        width=wanted.width_px,
        num_inference_steps=wanted.num_inference_steps,
        guidance_scale=wanted.guidance_scale,
        latents=latents.double(),
        max_sequence_length=20,
        output_type="np",
        callback_on_step_end=on_step_end,
    ).images
    return (images * 255).round().astype(np.uint8)


def _diffusers_keys(folder: Path) -> dict[str, torch.Tensor]:
    """A peft folder in diffusers' own names, with alpha / rank in B (these adapters have alpha 8; `b` is rsLoRA)."""
    from peft import LoraConfig

    found = {}
    for component, path in (("transformer", folder), ("text_encoder", folder / "text_encoder")):
        if not path.is_dir():
            continue
        config = LoraConfig.from_pretrained(path)
        scaling = config.lora_alpha / (config.r**0.5 if config.use_rslora else config.r)
        for key, tensor in load_file(path / "adapter_model.safetensors").items():
            factor = scaling if ".lora_B." in key else 1.0
            found[key.replace("base_model.model", component)] = tensor.double() * factor
    return found


def _weights(use: Use) -> Any:
    """The transformer's scale as diffusers takes it: a number, or a dictionary by parts of module names."""
    _, scale, settings = use
    scale *= settings.component_factor("transformer")
    blocks = {pattern.replace("*.", ""): scale * factor for pattern, factor in settings.block_scales}
    return {**blocks, "transformer_blocks": scale} if blocks else scale


@pytest.mark.parametrize("case", CASES)
def test_equals_diffusers(case: str, engine: Engine, expected: Any) -> None:
    """Every value is equal after rounding to 8 bits."""
    (drawn,) = engine.draw([request(case)])
    np.testing.assert_array_equal(drawn, expected(case))


def test_all_of_them_at_once_equal_each_alone(engine: Engine, expected: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Requests whose adapters act in different places and at different steps share the engine, some of them batches,
    with a plain and a base request: each is the oracle's picture."""
    monkeypatch.setattr(engine.stepper.costs, "switch_s", 100.0)  # so that what can mix does, also on the CPU
    plain: list[tuple[GenerationParameters, list[Use]]] = [
        (small(11), []),
        (small(11), [("a", 1.0, UseSettings())]),
    ]
    base, _, *drawn = engine.draw([*plain, *map(request, CASES)])
    assert {ApplicationWay.SLOTS, ApplicationWay.MERGED} <= set(engine.ways)
    for case, picture in zip(CASES, drawn, strict=True):
        np.testing.assert_array_equal(picture, expected(case), err_msg=case)
    np.testing.assert_array_equal(base, engine.draw(plain[:1])[0])


def test_the_settings_change_the_picture(engine: Engine, expected: Any) -> None:
    """Each kind of setting is visible at all, or the cases would prove nothing."""
    for case in CASES:
        wanted, uses = request(case)
        plain = [(name, scale, UseSettings()) for name, scale, _ in uses]
        difference = np.abs(engine.draw([(wanted, plain)])[0].astype(int) - expected(case))
        assert difference.mean() > 0.3, case
