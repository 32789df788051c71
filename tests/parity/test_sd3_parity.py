"""The engine's pictures against the oracle: diffusers' StableDiffusion3Pipeline with adapters loaded through peft.

In float64 the pictures are equal after 8-bit rounding. In float32, padding, merging and batching round differently, the
base model too: at most one level apart, in at most 0.05% of the values.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lora_server.adapters.formats.peft import PeftReader
from lora_server.adapters.source import AdapterFolder, AdapterRoots
from lora_server.config import EngineConfig, ModelConfig
from lora_server.demo.paths import model_dir
from lora_server.engine.batch_runner import BatchImage, BatchRunner
from lora_server.engine.prompts import PromptCache
from lora_server.models.base import adapter_targets
from lora_server.models.merge import ScaledAdapter
from lora_server.models.registry import load_model
from lora_server.types import ApplicationWay, GenerationParameters, SkipLayerGuidance
from peft import PeftModel

PROMPT = "a big red star on a navy background"
STEPS = 4
CASES: dict[str, tuple[dict[str, Any], list[tuple[str, float]]]] = {
    "base": ({}, []),
    "base without guidance": ({"guidance_scale": 1.0}, []),
    "base, three images": ({"num_images": 3}, []),
    "base, negative prompt, wide": ({"negative_prompt": "a blue ring", "width_px": 192}, []),
    "skip-layer guidance": ({"skip_layer_guidance": SkipLayerGuidance((1, 2), stop=0.9)}, []),
    "one adapter": ({}, [("a", 1.0)]),
    "one adapter without guidance, three images": ({"guidance_scale": 1.0, "num_images": 3}, [("a", 1.0)]),
    "scale 0.5": ({}, [("a", 0.5)]),
    "scale -1": ({}, [("a", -1.0)]),
    "scale 0": ({}, [("a", 0.0)]),
    "two adapters": ({}, [("a", 0.7), ("b", 1.0)]),
    "text encoder": ({}, [("text", 1.0)]),
    "text encoder with another": ({}, [("b", -0.5), ("text", 0.8)]),
}


def parameters(**changes: Any) -> GenerationParameters:
    """What to draw."""
    defaults: dict[str, Any] = {
        "prompt": PROMPT,
        "negative_prompt": "",
        "width_px": 128,
        "height_px": 128,
        "num_inference_steps": STEPS,
        "guidance_scale": 4.0,
        "seed": 11,
        "num_images": 1,
    }
    return GenerationParameters(**{**defaults, **changes})


class House:
    """Our way: the family and the mergers, driven as the engine drives them."""

    def __init__(self, dtype: str, root: Path) -> None:
        self.family = load_model(ModelConfig(model="demo", device="cpu", dtype=dtype))  # type: ignore[arg-type]
        self.runner = BatchRunner(self.family, EngineConfig())
        self.root = root

    def draw(
        self, wanted: GenerationParameters, uses: list[tuple[str, float]], way: ApplicationWay = ApplicationWay.MERGED
    ) -> np.ndarray:
        """One request's images, (B, H, W, 3)."""
        (images,) = self.draw_together([(wanted, uses)], way)
        return images

    def draw_together(
        self, requests: list[tuple[GenerationParameters, list[tuple[str, float]]]], way: ApplicationWay
    ) -> list[np.ndarray]:
        """The images of several requests, stepped in one batch; who has more steps goes on without the others."""
        with torch.inference_mode():
            jobs = [self._begin(wanted, uses) for wanted, uses in requests]
            while active := [image for job in jobs for image in job if not image.state.finished]:
                self.runner.step(active, way if any(image.composition for image in active) else ApplicationWay.BASE)
            return [torch.cat([self.runner.decode([image.state]) for image in job]).numpy() for job in jobs]

    def _begin(self, wanted: GenerationParameters, uses: list[tuple[str, float]]) -> list[BatchImage]:
        composition = [self.adapter(name, scale) for name, scale in uses]
        (conditioning,) = PromptCache(self.runner, 0).conditionings([(wanted, composition)])
        return [BatchImage(state, composition) for state in self.runner.begin(wanted, conditioning)]

    def adapter(self, name: str, scale: float) -> ScaledAdapter:
        targets = adapter_targets(self.family.components)
        files = AdapterFolder(self.root / name, sorted(targets), AdapterRoots([self.root])).read(1 << 30)
        reader = PeftReader(targets, "transformer", "demo", self.family.dtype, 256)
        return ScaledAdapter(files.digest, scale, reader.read(name, files.contents))


def oracle(dtype: torch.dtype, root: Path, wanted: GenerationParameters, uses: list[tuple[str, float]]) -> np.ndarray:
    """The same picture by diffusers and peft, unmerged; noise drawn in float32, as a float32 pipeline draws it."""
    from diffusers import StableDiffusion3Pipeline

    pipeline = StableDiffusion3Pipeline.from_pretrained(model_dir(), dtype=dtype)
    pipeline.set_progress_bar_config(disable=True)
    for component in ("transformer", "text_encoder"):
        folders = {n: root / n if component == "transformer" else root / n / component for n, _ in uses}
        members = [(n, s) for n, s in uses if folders[n].is_dir()]
        if members:
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
            adapted.to(dtype)
            setattr(pipeline, component, adapted.base_model.model)
    shape = (1, 16, wanted.height_px // 8, wanted.width_px // 8)
    latents = [torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in wanted.seeds]
    guidance = wanted.skip_layer_guidance
    options = (
        {}
        if guidance is None
        else {
            "skip_guidance_layers": list(guidance.layers),
            "skip_layer_guidance_scale": guidance.scale,
            "skip_layer_guidance_start": guidance.start,
            "skip_layer_guidance_stop": guidance.stop,
        }
    )
    images = pipeline(
        wanted.prompt,
        negative_prompt=wanted.negative_prompt,
        height=wanted.height_px,
        width=wanted.width_px,
        num_inference_steps=wanted.num_inference_steps,
        guidance_scale=wanted.guidance_scale,
        num_images_per_prompt=wanted.num_images,
        latents=torch.cat(latents).to(dtype),
        max_sequence_length=20,
        output_type="np",
        **options,
    ).images
    return (images * 255).round().astype(np.uint8)


@pytest.fixture(scope="module")
def houses(demo_adapters: Path) -> dict[str, House]:
    """One house for each type; used for all cases in turn, so each case also proves that the last left no trace."""
    return {dtype: House(dtype, demo_adapters) for dtype in ("float64", "float32")}


@pytest.mark.parametrize("case", CASES)
def test_equals_diffusers_in_float64(case: str, houses: dict[str, House], demo_adapters: Path) -> None:
    """Every value is equal after rounding to 8 bits."""
    changes, uses = CASES[case]
    wanted = parameters(**changes)
    np.testing.assert_array_equal(
        houses["float64"].draw(wanted, uses), oracle(torch.float64, demo_adapters, wanted, uses)
    )


@pytest.mark.parametrize("case", CASES)
def test_is_close_to_diffusers_in_float32(case: str, houses: dict[str, House], demo_adapters: Path) -> None:
    """At most one level apart, in at most 0.05% of the values (design.md 5: order of rounding)."""
    changes, uses = CASES[case]
    wanted = parameters(**changes)
    ours = houses["float32"].draw(wanted, uses).astype(int)
    difference = np.abs(ours - oracle(torch.float32, demo_adapters, wanted, uses))
    assert difference.max() <= 1
    assert (difference > 0).mean() <= 0.0005


ADAPTED = [case for case, (_, uses) in CASES.items() if uses]


@pytest.mark.parametrize("case", ADAPTED)
def test_slots_equal_diffusers_in_float64(case: str, houses: dict[str, House], demo_adapters: Path) -> None:
    """Rows that take their adapters from the pages draw the oracle's picture, to the last of 8 bits."""
    changes, uses = CASES[case]
    wanted = parameters(**changes)
    np.testing.assert_array_equal(
        houses["float64"].draw(wanted, uses, ApplicationWay.SLOTS), oracle(torch.float64, demo_adapters, wanted, uses)
    )


MIXED: list[tuple[dict[str, Any], list[tuple[str, float]]]] = [
    ({"seed": 1}, []),
    ({"seed": 2, "num_inference_steps": 3}, [("a", 1.0)]),
    ({"seed": 3, "guidance_scale": 1.0}, [("b", 1.0)]),
    ({"seed": 4, "guidance_scale": 2.5, "prompt": "a small green moon"}, [("a", 0.6), ("b", -0.8)]),
    ({"seed": 5, "num_images": 2, "negative_prompt": "a ring"}, [("text", -1.0)]),
    ({"seed": 6, "skip_layer_guidance": SkipLayerGuidance((2,), stop=0.9)}, [("a", -0.5)]),
]


@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_a_mixed_batch_equals_each_alone(dtype: str, houses: dict[str, House], demo_adapters: Path) -> None:
    """Base, A, B, A+B, a text-encoder adapter and negative scales in one batch, with steps, guidance and seeds of
    their own: each is the oracle's picture of it alone (design.md 5 has the bounds)."""
    requests = [(parameters(**changes), uses) for changes, uses in MIXED]
    drawn = houses[dtype].draw_together(requests, ApplicationWay.SLOTS)
    for (wanted, uses), ours in zip(requests, drawn, strict=True):
        expected = oracle(getattr(torch, dtype), demo_adapters, wanted, uses)
        difference = np.abs(ours.astype(int) - expected)
        if dtype == "float64":
            assert difference.max() == 0, uses
        else:
            assert difference.max() <= 1, uses
            assert (difference > 0).mean() <= 0.0005, uses


def test_adapters_change_the_picture(houses: dict[str, House]) -> None:
    """The adapters of these cases are visible at all, or the cases would prove nothing."""
    base = houses["float32"].draw(parameters(), []).astype(int)
    for name in ("a", "b", "text"):
        assert np.abs(houses["float32"].draw(parameters(), [(name, 1.0)]) - base).mean() > 1, name


def test_base_is_the_same_bytes_before_and_after_adapters(houses: dict[str, House]) -> None:
    """A base picture does not remember what was active before."""
    before = houses["float32"].draw(parameters(), [])
    houses["float32"].draw(parameters(), [("text", 1.0), ("a", -0.3)])
    np.testing.assert_array_equal(before, houses["float32"].draw(parameters(), []))


def test_an_image_of_a_batch_is_the_image_alone(houses: dict[str, House]) -> None:
    """Image k of a request is, in float64, the picture of a request with seed + k."""
    batch = houses["float64"].draw(parameters(num_images=3), [("a", 1.0)])
    np.testing.assert_array_equal(batch[2], houses["float64"].draw(parameters(seed=13), [("a", 1.0)])[0])
