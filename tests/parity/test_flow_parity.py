"""FLUX.1, Qwen-Image and Z-Image against the oracle: diffusers' own pipelines with adapters loaded through peft.

In float64 the pictures are equal after 8-bit rounding. In float32, padding, merging and batching round differently, the
base model too: at most one level apart, in at most 0.05% of the values (design.md 5).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from lora_server.adapters.formats.peft import PeftReader
from lora_server.adapters.source import AdapterFolder, AdapterRoots
from lora_server.config import EngineConfig, ModelConfig
from lora_server.engine.batch_runner import BatchImage, BatchRunner
from lora_server.engine.prompts import PromptCache
from lora_server.models.base import adapter_targets
from lora_server.models.flow_family import pack
from lora_server.models.merge import ScaledAdapter
from lora_server.models.registry import load_model
from lora_server.types import ApplicationWay, GenerationParameters
from peft import PeftModel

from tests.factories import write_adapter
from tests.parity import tiny_flow

Uses = list[tuple[str, float]]
Changes = dict[str, Any]


@dataclass(frozen=True)
class Family:
    """A tiny pipeline and how diffusers' call is told what a request says.

    Attributes:
        attention, feed_forward, text: What the adapters `a`, `b` and `text` change, for peft.
        call: The options of the pipeline's call for a request.
        packed: Whether the call takes packed latents.
        guided, unguided: What turns guidance on and off, in a request.
    """

    build: Callable[[Path], Path]
    attention: list[str]
    feed_forward: list[str]
    text: list[str]
    call: Callable[[GenerationParameters], dict[str, Any]]
    packed: bool
    guided: Changes
    unguided: Changes
    settings: str = field(default="{}")


def _flux_call(wanted: GenerationParameters) -> dict[str, Any]:
    true = {"negative_prompt": wanted.negative_prompt, "true_cfg_scale": wanted.true_cfg_scale}
    return {"guidance_scale": wanted.guidance_scale, "max_sequence_length": 40, **true}


def _qwen_call(wanted: GenerationParameters) -> dict[str, Any]:
    return {"negative_prompt": wanted.negative_prompt, "true_cfg_scale": wanted.guidance_scale}


def _z_image_call(wanted: GenerationParameters) -> dict[str, Any]:
    return {"negative_prompt": wanted.negative_prompt, "guidance_scale": wanted.guidance_scale}


ATTENTION = ["to_q", "to_k", "to_v", "to_out.0"]
FLUX = Family(
    tiny_flow.build_flux,
    [*ATTENTION, "add_q_proj"],
    ["ff.net.0.proj", "proj_mlp", "single_transformer_blocks.0.proj_out"],
    ["q_proj", "fc1"],
    _flux_call,
    packed=True,
    guided={"guidance_scale": 3.5, "true_cfg_scale": 2.0},
    unguided={"guidance_scale": 3.5},
    settings='{"max_sequence_length": 40}',
)
FAMILIES = {
    "flux": FLUX,
    "qwen": Family(
        tiny_flow.build_qwen_image,
        [*ATTENTION, "add_k_proj", "img_mod.1"],
        ["img_mlp.net.0.proj", "txt_mlp.net.2", "txt_in"],
        ["q_proj", "down_proj"],
        _qwen_call,
        packed=True,
        guided={"guidance_scale": 4.0},
        unguided={"guidance_scale": 1.0},
    ),
    "z": Family(
        tiny_flow.build_z_image,
        ATTENTION,
        ["feed_forward.w1", "feed_forward.w2", "cap_embedder.1"],
        ["q_proj", "down_proj"],
        _z_image_call,
        packed=False,
        guided={"guidance_scale": 0.8},
        unguided={"guidance_scale": 0.0},
    ),
}


def parameters(family: Family, *, guided: bool = True, **changes: Any) -> GenerationParameters:
    """What to draw."""
    defaults: dict[str, Any] = {
        "prompt": "a big red star on a navy background",
        "negative_prompt": "",
        "width_px": 64,
        "height_px": 96,
        "num_inference_steps": 3,
        "seed": 11,
        "num_images": 1,
        **(family.guided if guided else family.unguided),
    }
    return GenerationParameters(**{**defaults, **changes})


class Rig:
    """A family's tiny pipeline, its adapters, and houses and oracles of both types."""

    def __init__(self, family: Family, root: Path) -> None:
        self.family = family
        self.root = root
        self.model = family.build(root / "model")
        (self.model / "lora_inference.json").write_text(family.settings)
        self._houses: dict[str, tuple[Any, BatchRunner]] = {}
        fresh = self.pipeline(torch.float32)
        write_adapter(root / "a", fresh.transformer, 1, 0.15, target_modules=family.attention)
        fresh = self.pipeline(torch.float32)
        write_adapter(root / "b", fresh.transformer, 2, 0.15, target_modules=family.feed_forward, r=6, use_rslora=True)
        fresh = self.pipeline(torch.float32)
        write_adapter(root / "text", fresh.transformer, 3, 0.1, target_modules=["to_v"])
        write_adapter(root / "text" / "text_encoder", fresh.text_encoder, 4, 0.4, target_modules=family.text)

    def pipeline(self, dtype: torch.dtype) -> Any:
        pipeline = DiffusionPipeline.from_pretrained(self.model, dtype=dtype)
        pipeline.set_progress_bar_config(disable=True)
        return pipeline

    def house(self, dtype: str) -> tuple[Any, BatchRunner]:
        if dtype not in self._houses:
            family = load_model(ModelConfig(model=str(self.model), device="cpu", dtype=dtype))  # type: ignore[arg-type]
            self._houses[dtype] = family, BatchRunner(family, EngineConfig())
        return self._houses[dtype]

    def draw(
        self, dtype: str, requests: list[tuple[GenerationParameters, Uses]], way: ApplicationWay
    ) -> list[np.ndarray]:
        """The images of several requests, stepped in one batch; who has more steps goes on without the others."""
        _, runner = self.house(dtype)
        with torch.inference_mode():
            jobs = [self._begin(dtype, wanted, uses) for wanted, uses in requests]
            while active := [image for job in jobs for image in job if not image.state.finished]:
                assert len({image.state.shape for image in active}) == 1
                runner.step(active, way if any(image.composition for image in active) else ApplicationWay.BASE)
            return [torch.cat([runner.decode([image.state]) for image in job]).numpy() for job in jobs]

    def _begin(self, dtype: str, wanted: GenerationParameters, uses: Uses) -> list[BatchImage]:
        _, runner = self.house(dtype)
        composition = [self.adapter(dtype, name, scale) for name, scale in uses]
        (conditioning,) = PromptCache(runner, 0).conditionings([(wanted, composition)])
        return [BatchImage(state, composition) for state in runner.begin(wanted, conditioning)]

    def adapter(self, dtype: str, name: str, scale: float) -> ScaledAdapter:
        family, _ = self.house(dtype)
        targets = adapter_targets(family.components)
        files = AdapterFolder(self.root / name, sorted(targets), AdapterRoots([self.root])).read(1 << 30)
        reader = PeftReader(targets, "transformer", "tiny", family.dtype, 256)
        return ScaledAdapter(files.digest, scale, reader.read(name, files.contents))

    def oracle(self, dtype: str, wanted: GenerationParameters, uses: Uses) -> np.ndarray:
        """The same pictures by diffusers and peft, unmerged; noise drawn in float32, as a float32 pipeline draws it."""
        pipeline = self.pipeline(getattr(torch, dtype))
        for component in ("transformer", "text_encoder"):
            _adapt(pipeline, component, self.root, uses)
        factor = pipeline.vae_scale_factor
        channels = pipeline.vae.config.get("latent_channels") or pipeline.vae.config.z_dim
        shape = (1, channels, wanted.height_px // factor, wanted.width_px // factor)
        noise = torch.cat([torch.randn(shape, generator=torch.Generator().manual_seed(s)) for s in wanted.seeds])
        images = pipeline(
            wanted.prompt,
            height=wanted.height_px,
            width=wanted.width_px,
            num_inference_steps=wanted.num_inference_steps,
            num_images_per_prompt=wanted.num_images,
            latents=pack(noise).to(getattr(torch, dtype)) if self.family.packed else noise,
            output_type="np",
            **self.family.call(wanted),
        ).images
        return (images * 255).round().astype(np.uint8)


def _adapt(pipeline: Any, component: str, root: Path, uses: Uses) -> None:
    folders = {n: root / n if component == "transformer" else root / n / component for n, _ in uses}
    members = [(n, s) for n, s in uses if folders[n].is_dir()]
    if not members:
        return
    dtype = getattr(pipeline, component).dtype
    adapted = PeftModel.from_pretrained(getattr(pipeline, component), folders[members[0][0]], members[0][0])
    for name, _ in members[1:]:
        adapted.load_adapter(folders[name], name)
    adapted.base_model.set_adapter([name for name, _ in members])
    for module in adapted.modules():
        for name, scale in members:
            if hasattr(module, "set_scale") and name in getattr(module, "scaling", {}):
                module.set_scale(name, scale)
    adapted.to(dtype)
    setattr(pipeline, component, adapted.base_model.model)


@pytest.fixture(scope="module", params=FAMILIES)
def rig(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Rig:
    """One rig a family, used for all cases in turn, so each case also proves that the last left no trace."""
    return Rig(FAMILIES[request.param], tmp_path_factory.mktemp(request.param))


CASES: dict[str, tuple[Changes, Uses]] = {
    "base": ({}, []),
    "base without guidance": ({"guided": False}, []),
    "base, three images": ({"num_images": 3}, []),
    "base, negative prompt, wide": ({"negative_prompt": "a blue ring", "width_px": 112}, []),
    "one adapter": ({}, [("a", 1.0)]),
    "one adapter without guidance, three images": ({"guided": False, "num_images": 3}, [("a", 1.0)]),
    "scale -0.5": ({}, [("a", -0.5)]),
    "scale 0": ({}, [("a", 0.0)]),
    "two adapters": ({}, [("a", 0.7), ("b", 1.0)]),
    "text encoder": ({}, [("text", 1.0)]),
    "text encoder with another": ({}, [("b", -0.5), ("text", 0.8)]),
}


def check(ours: np.ndarray, expected: np.ndarray, dtype: str) -> None:
    """Holds a picture to the bounds of its type."""
    difference = np.abs(ours.astype(int) - expected)
    assert difference.max() <= (dtype == "float32")
    assert (difference > 0).mean() <= 0.0005


@pytest.mark.parametrize("case", CASES)
def test_equals_diffusers(case: str, rig: Rig) -> None:
    """In float64 every value is equal after rounding to 8 bits, with adapters merged and in slots; in float32 it is
    close."""
    changes, uses = CASES[case]
    wanted = parameters(rig.family, **changes)
    for dtype in ("float64", "float32"):
        expected = rig.oracle(dtype, wanted, uses)
        for way in (ApplicationWay.MERGED, ApplicationWay.SLOTS) if uses else (ApplicationWay.MERGED,):
            check(rig.draw(dtype, [(wanted, uses)], way)[0], expected, dtype)


MIXED: list[tuple[Changes, Uses]] = [
    ({"seed": 1}, []),
    ({"seed": 2, "num_inference_steps": 2}, [("a", 1.0)]),
    ({"seed": 3, "guided": False, "prompt": "sea"}, [("b", 1.0)]),
    ({"seed": 4, "prompt": "a small green moon over forty-two hills at night"}, [("a", 0.6), ("b", -0.8)]),
    ({"seed": 5, "num_images": 2, "negative_prompt": "a ring"}, [("text", -1.0)]),
]


@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_a_mixed_batch_equals_each_alone(dtype: str, rig: Rig) -> None:
    """Base, A, B, A+B and a text-encoder adapter in one batch, with prompts of different lengths, steps, guidance and
    seeds of their own: each is the oracle's picture of it alone."""
    requests = [(parameters(rig.family, **changes), uses) for changes, uses in MIXED]
    for (wanted, uses), ours in zip(requests, rig.draw(dtype, requests, ApplicationWay.SLOTS), strict=True):
        check(ours, rig.oracle(dtype, wanted, uses), dtype)


def test_adapters_and_prompts_change_the_picture(rig: Rig) -> None:
    """What these cases vary is visible at all, or they would prove nothing."""

    def draw(uses: Uses, **changes: Any) -> np.ndarray:
        return rig.draw("float32", [(parameters(rig.family, **changes), uses)], ApplicationWay.MERGED)[0].astype(int)

    base = draw([])
    others = [draw([(name, 1.0)]) for name in ("a", "b", "text")]
    others += [draw([], prompt="a green moon"), draw([], negative_prompt="a ring"), draw([], guided=False)]
    assert [float(np.abs(other - base).mean()) > 1 for other in others] == [True] * len(others)


def _schnell(folder: Path) -> Path:
    return tiny_flow.build_flux(folder, guidance_embeds=False)


def _z_image_bounded(wanted: GenerationParameters) -> dict[str, Any]:
    return {**_z_image_call(wanted), "cfg_truncation": 0.3, "cfg_normalization": 0.9}


VARIANTS = {
    "schnell": replace(FLUX, build=_schnell, guided={"guidance_scale": 0.0, "true_cfg_scale": 1.5}),
    "z-image with bounded guidance": replace(
        FAMILIES["z"], call=_z_image_bounded, settings='{"cfg_truncation": 0.3, "cfg_normalization": 0.9}'
    ),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_variants_equal_diffusers(variant: str, tmp_path: Path) -> None:
    """FLUX.1 without a guidance embedding; guidance that ends early and whose norm has a bound."""
    rig = Rig(VARIANTS[variant], tmp_path)
    requests: list[tuple[GenerationParameters, Uses]] = [
        (parameters(rig.family, num_inference_steps=4), []),
        (parameters(rig.family, guided=False, seed=2, num_inference_steps=3, prompt="sea"), [("a", 1.0)]),
    ]
    for (wanted, uses), ours in zip(requests, rig.draw("float64", requests, ApplicationWay.SLOTS), strict=True):
        check(ours, rig.oracle("float64", wanted, uses), "float64")


def test_bounds_of_guidance_matter(tmp_path: Path) -> None:
    """The bounds of the test above change the picture, or it would prove nothing."""
    rig = Rig(VARIANTS["z-image with bounded guidance"], tmp_path)
    wanted = parameters(rig.family, num_inference_steps=4)
    bounded = rig.oracle("float32", wanted, []).astype(int)
    for unbound in ({"cfg_truncation": 1.0}, {"cfg_normalization": False}):
        rig.family = replace(rig.family, call=lambda w, unbound=unbound: {**_z_image_bounded(w), **unbound})
        assert np.abs(rig.oracle("float32", wanted, []) - bounded).max() > 1, unbound
