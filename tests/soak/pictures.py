"""Right answers: each picture alone on a quiet server beforehand, and how far from it others may be."""

from __future__ import annotations

from collections.abc import Sequence
from io import BytesIO
from pathlib import Path

import numpy as np
from lora_client import GenerationOptions, GenerationResult, LoraClient
from lora_client import Image as ClientImage
from lora_client.types import AppliedAdapter
from numpy.typing import NDArray
from PIL import Image

from tests.soak.scenes import VERSIONED, Case, World

MAX_LEVELS, MAX_SHARE = 1, 0.01
"""One level off, as everywhere (design.md 5, tests.parity.harness.assert_same), but in more of the values.

The sample is rounded to float32 at each step, as diffusers' scheduler does in every type, so single values flip in
float64 too; and a flat area of `pixel-art` whose colour lies between two levels flips as a whole (11 of 12,288 values,
seen once). In float32 that comes to 8%. A wrong adapter, scale, seed or version is off by many levels.
"""

Picture = NDArray[np.uint8]


def options(case: Case, request_id: str | None = None) -> GenerationOptions:
    """How a case is drawn."""
    return GenerationOptions(
        num_inference_steps=case.steps,
        width_px=case.side_px,
        height_px=case.side_px,
        num_images=case.images,
        request_id=request_id,
    )


def pixels(data: bytes) -> Picture:
    """Decodes a file to (H, W, 3)."""
    return np.asarray(Image.open(BytesIO(data)).convert("RGB"))


def difference(drawn: Picture, expected: Picture) -> str:
    """Says how *drawn* differs beyond the bound; empty if it does not."""
    if drawn.shape != expected.shape:
        return f"shape {drawn.shape} instead of {expected.shape}"
    levels = np.abs(drawn.astype(int) - expected)
    share = float((levels > 0).mean())
    if levels.max() <= MAX_LEVELS and share <= MAX_SHARE:
        return ""
    return f"up to {levels.max()} levels apart, in {share:.2%} of the values"


class Answers:
    """Expected pictures by case and by the digest of the adapter in it that has versions."""

    def __init__(self, world: World, pictures: dict[str, Picture]) -> None:
        self._world = world
        self._pictures = pictures

    @staticmethod
    def draw(client: LoraClient, world: World, wanted: Sequence[Case]) -> Answers:
        """Draws all *wanted* cases, one after another, in all versions, by their folders; a quiet server's client."""
        pictures = {}
        for case in wanted:
            for index, digest in enumerate(world.digests[case.versioned] if case.versioned else [""]):
                uses = [
                    f"{world.version(use.name, index if use.name in VERSIONED else 0)}:{use.scale}{use.settings}"
                    for use in case.uses
                ]
                result = client.generate(case.prompt, seed=case.seed, adapters=uses, options=options(case))
                for image in result.images:
                    pictures[f"{case.key}|{digest}|{image.index}"] = pixels(image.data)
        return Answers(world, pictures)

    def save(self, path: Path) -> None:
        """Writes the pictures for other processes."""
        np.savez(path, **self._pictures)  # type: ignore[arg-type]

    @staticmethod
    def load(world: World, path: Path) -> Answers:
        """Reads what `save` wrote."""
        with np.load(path) as found:
            return Answers(world, dict(found))

    def faults(self, case: Case, result: GenerationResult, digest: str | None = None) -> list[str]:
        """Says everything that is wrong with an answer; *digest* is of the version that was asked for, if one was."""
        if len(result.images) != case.images:
            return [f"{len(result.images)} images instead of {case.images}"]
        found = [fault for image in result.images for fault in self._faults_of(case, image, digest)]
        return [f"{fault} ({case.key}, {result.stats.steps_by_way})" for fault in found]

    def _faults_of(self, case: Case, image: ClientImage, digest: str | None) -> list[str]:
        applied = sorted(image.provenance.adapters, key=lambda each: each.digest)
        used = version_of(self._world, case, applied)
        if case.versioned and (used is None or digest not in (None, used)):
            return [f"applied {[each.digest for each in applied]}, none of them {digest or case.versioned}"]
        wanted = {
            (used if use.name == case.versioned else self._world.digests[use.name][0], use.scale) for use in case.uses
        }
        if {(each.digest, round(each.scale, 6)) for each in applied} != wanted:
            return [f"applied {[(each.name, each.digest, each.scale) for each in applied]} instead of {wanted}"]
        if image.seed != case.seed + image.index:
            return [f"seed {image.seed} instead of {case.seed + image.index}"]
        fault = difference(pixels(image.data), self._pictures[f"{case.key}|{used or ''}|{image.index}"])
        return [fault] if fault else []


def version_of(world: World, case: Case, applied: Sequence[AppliedAdapter]) -> str | None:
    """The digest of the version that was applied, of the name in *case* that has versions."""
    known = world.digests[case.versioned] if case.versioned else []
    return next((each.digest for each in applied if each.digest in known), None)
