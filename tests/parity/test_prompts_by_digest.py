"""Embeddings of prompts are known by the digests of what was applied, never by a name."""

from __future__ import annotations

from pathlib import Path

import torch
from lora_server.engine.prompts import PromptCache
from lora_server.models.merge import ScaledAdapter

from tests.parity.harness import Pair, write_adapters
from tests.parity.subjects_unet import SD1


def test_a_new_version_never_meets_the_embeddings_of_the_old(tmp_path: Path) -> None:
    """The same prompt with the same adapter is found; with the next version, or another scale, it is encoded again."""
    pair = Pair(SD1, SD1.build(tmp_path / "model"), "float64", tmp_path)
    write_adapters(SD1, pair.model, tmp_path)
    wanted, cache = SD1.parameters(guidance_scale=1.0), PromptCache(pair.runner, 1 << 20)
    old = pair.adapter("text", 1.0)
    changed = tmp_path / "text" / "text_encoder" / "adapter_config.json"
    changed.write_text(changed.read_text().replace('"lora_alpha": ', '"lora_alpha": 1'))
    new = pair.adapter("text", 1.0)
    assert old.digest != new.digest, "the weights' files are the same, and the version is not"

    def encoded(*composition: ScaledAdapter) -> torch.Tensor:
        with torch.inference_mode():
            (found,) = cache.conditionings([("tenant", wanted)], composition)
        return next(iter(found.positive.tensors.values()))

    first = encoded(old)
    assert not torch.equal(encoded(new), first)
    assert not torch.equal(encoded(), first)
    assert not torch.equal(encoded(ScaledAdapter(old.digest, 0.5, old.weights)), first)
    assert encoded(old) is first
    assert (cache.hits, cache.misses) == (1, 4)
