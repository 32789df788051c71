"""The bound on a response's size holds for the worst picture there is."""

from __future__ import annotations

import numpy as np
import pytest
from lora_server.engine.images import encode_image
from lora_server.rpc.handlers import possible_image_bytes
from lora_server.types import ImageFormat, Provenance


@pytest.mark.parametrize("image_format", list(ImageFormat))
@pytest.mark.parametrize("side", [16, 128, 512])
def test_noise_stays_below_the_bound(image_format: ImageFormat, side: int) -> None:
    """Random noise with the longest prompts does not exceed what a request is refused by."""
    pixels = np.random.default_rng(0).integers(0, 256, (side, side, 3), dtype=np.uint8)
    prompt = "\N{PILE OF POO}" * 2000
    provenance = Provenance("m" * 100, prompt, prompt, 2**62, 500, 4.0, side, side, (), "lora-inference")
    image = encode_image(0, pixels, image_format, provenance, prompt_metadata=True)
    in_message = 4 * 2 * len(prompt)
    assert len(image.data) + in_message <= possible_image_bytes(side, side, image_format, 2 * len(prompt))
