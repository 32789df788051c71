"""An adapter's settings in the metadata of a file."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from lora_client.cli.show import read_provenance
from lora_server.engine.images import encode_image, metadata_json
from lora_server.rpc.validate_use import MAX_BLOCK_SCALES
from lora_server.types import AppliedAdapter, ImageFormat, Provenance
from lora_server.use_settings import EVERYWHERE, UseSettings

DIGEST = "sha256:" + "0a" * 32


def provenance(*settings: UseSettings) -> Provenance:
    """What made an image with one adapter for each of *settings*."""
    adapters = tuple(AppliedAdapter("n" * 128, 2**63 - 1, DIGEST, 0.123456789, each) for each in settings)
    return Provenance("m", "glow, a star", "", 1, 4, 4.0, 8, 8, adapters, "lora-inference")


def test_what_is_not_set_is_not_written() -> None:
    """A plain use has the four fields that it always had."""
    (adapter,) = json.loads(metadata_json(provenance(EVERYWHERE), prompt_metadata=True))["adapters"]
    assert set(adapter) == {"name", "id", "digest", "scale"}


def test_the_most_settings_of_a_request_fit_into_a_jpeg(tmp_path: Path) -> None:
    """The bound on block scales is what a JPEG's segment can hold."""
    blocks = tuple((f"{k:03}.".ljust(128, "x"), -12.3456789) for k in range(MAX_BLOCK_SCALES))
    components = tuple((f"text_encoder_{k}", -0.123456789) for k in range(4))
    most = [UseSettings(components, blocks, 0.123456789, 0.987654321, True)]
    most += [UseSettings(components, (), 0.123456789, 0.987654321, True)] * 7
    pixels = np.zeros((8, 8, 3), np.uint8)
    image = encode_image(0, pixels, ImageFormat.JPEG, provenance(*most), prompt_metadata=True)
    (tmp_path / "x.jpg").write_bytes(image.data)
    adapters = read_provenance(tmp_path / "x.jpg")["adapters"]
    assert [tuple(each) for each in adapters[0]["block_scales"]] == list(blocks)
    assert adapters[7]["schedule"] == {"start": 0.123456789, "end": 0.987654321}
