"""Same request, same picture: how far images differ that were drawn alone and in mixed batches, merged and from pages.

python -m benchmarks.fidelity [--device cuda] [--requests 64]

Draws every request of a random mix (held-out captions, numbers of steps, guidance, no, one or two bundled adapters,
negative scales too) alone with merged weights, alone from pages, and in batches with others from pages; prints PSNR
between them, worst and mean.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from lora_server.adapters.loader import AdapterLoader
from lora_server.adapters.roots import AdapterRoots
from lora_server.config import EngineConfig, LimitsConfig, ModelConfig
from lora_server.demo.paths import adapters_dir
from lora_server.engine.batch_runner import BatchImage, BatchRunner
from lora_server.models.base import ModelFamily, adapter_targets
from lora_server.models.merge import ScaledAdapter
from lora_server.models.registry import load_model
from lora_server.models.weights import AdapterWeights
from lora_server.types import ApplicationWay, GenerationParameters

from tools.demo_model.scenes import sample_scene

_BATCH = 8


@dataclass(frozen=True)
class Request:
    """What to draw, with which adapters."""

    parameters: GenerationParameters
    composition: tuple[ScaledAdapter, ...]


def main() -> None:
    """Draws, compares, prints; writes JSON if asked to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--dtype", default="auto", choices=["auto", "float32", "float64", "bfloat16"])
    parser.add_argument("--requests", type=int, default=64)
    parser.add_argument("--no-compile", action="store_true")
    parser.add_argument("--out", type=Path, default=None)
    arguments = parser.parse_args()
    family = load_model(ModelConfig(model="demo", device=arguments.device, dtype=arguments.dtype))
    runner = BatchRunner(family, EngineConfig(compile=not arguments.no_compile, column_buckets=()))
    with torch.inference_mode(), runner.denoiser.capturing():
        found = compare(runner, requests(family, arguments.requests))
    found |= {"device": str(family.device), "dtype": str(family.dtype), "requests": arguments.requests}
    found |= {"compiles": runner.denoiser.compiles, "captures": runner.denoiser.captures}
    print(json.dumps(found, indent=1))
    if arguments.out:
        arguments.out.write_text(json.dumps(found, indent=1) + "\n")


def compare(runner: BatchRunner, wanted: Sequence[Request]) -> dict[str, object]:
    """Draws *wanted* in every manner and returns PSNR in dB between them."""
    merged = [draw(runner, [each], ApplicationWay.MERGED)[0] for each in wanted]
    captures = runner.denoiser.captures
    again = [draw(runner, [each], ApplicationWay.MERGED)[0] for each in wanted[:8]]
    slots = [draw(runner, [each], ApplicationWay.SLOTS)[0] for each in wanted]
    batched = [
        image
        for first in range(0, len(wanted), _BATCH)
        for image in draw(runner, wanted[first : first + _BATCH], ApplicationWay.SLOTS)
    ]
    return {
        "alone again, equal bytes": all(np.array_equal(a, b) for a, b in zip(merged, again, strict=False)),
        "captures by adapters alone": captures,
        "slots against merged, alone": _psnrs(merged, slots),
        "slots, batched against alone": _psnrs(slots, batched),
        "batched slots against merged alone": _psnrs(merged, batched),
    }


def requests(family: ModelFamily, count: int) -> list[Request]:
    """A random mix; the same for the same count."""
    rng = random.Random(7)
    adapters = _bundled(family)
    made = []
    for index in range(count):
        chosen = rng.sample(sorted(adapters), rng.choice([0, 1, 1, 2]))
        scales = [rng.choice([1.0, 1.0, 0.5, -0.5]) for _ in chosen]
        parameters = GenerationParameters(
            sample_scene(rng, held_out=True).caption,
            "",
            128,
            128,
            rng.choice([12, 20]),
            rng.choice([4.0, 4.0, 2.5]),
            index,
            1,
        )
        composition = tuple(ScaledAdapter(n, s, adapters[n]) for n, s in zip(chosen, scales, strict=True))
        made.append(Request(parameters, composition))
    return made


def draw(runner: BatchRunner, wanted: Sequence[Request], way: ApplicationWay) -> list[np.ndarray]:
    """Draws requests in one batch, which gets smaller as those with fewer steps end."""
    images = []
    for each in wanted:
        conditioning = runner.condition(each.parameters, each.composition)
        images += [BatchImage(s, each.composition) for s in runner.begin(each.parameters, conditioning)]
    while active := [image for image in images if not image.state.finished]:
        runner.step(active, way if any(image.composition for image in active) else ApplicationWay.BASE)
    return [runner.decode([image.state]).pixels[0].cpu().numpy() for image in images]


def _bundled(family: ModelFamily) -> dict[str, AdapterWeights]:
    roots = AdapterRoots([adapters_dir()])
    targets = adapter_targets(family.components)
    loader = AdapterLoader(roots, targets, ("demo", family.info.family, family.denoiser), family.dtype, LimitsConfig())
    found = {}
    for folder in sorted(adapters_dir().iterdir()):
        weights = loader.load(folder).weights
        assert isinstance(weights, AdapterWeights)
        found[folder.name] = weights.to(family.device)
    return found


def _psnrs(first: Sequence[np.ndarray], second: Sequence[np.ndarray]) -> dict[str, float]:
    """Worst, mean over images, and the share of images that are equal; equal images count as 99 dB."""
    values = [_psnr(a, b) for a, b in zip(first, second, strict=True)]
    equal = sum(np.array_equal(a, b) for a, b in zip(first, second, strict=True)) / len(values)
    return {"worst_db": round(min(values), 2), "mean_db": round(sum(values) / len(values), 2), "equal_share": equal}


def _psnr(a: np.ndarray, b: np.ndarray) -> float:
    error = float(np.mean((a.astype(float) - b.astype(float)) ** 2))
    return min(99.0, 10 * float(np.log10(255**2 / error))) if error else 99.0


if __name__ == "__main__":
    main()
