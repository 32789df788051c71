"""What is told of a cut prompt is what the pipeline of each family cuts: held against the ids that its encoders get."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from lora_server.config import ModelConfig
from lora_server.engine.images import metadata_json
from lora_server.models.base import Prompt
from lora_server.models.qwen_image import QwenImage
from lora_server.models.registry import load_model
from lora_server.types import ImageEvent, StatsEvent

from tests.parity import tiny_flow
from tests.parity.engine_harness import events, make_request, start_core
from tests.parity.harness import Subject
from tests.parity.subjects_flow import FLUX, QWEN_IMAGE, Z_IMAGE
from tests.parity.subjects_sd3 import SD3
from tests.parity.subjects_unet import SD1, SDXL

SUBJECTS = [SD3, SD1, SDXL, FLUX, QWEN_IMAGE, Z_IMAGE]
WORDS = "a big red star, a small blue ring and a green moon on a navy background, "


@dataclass
class Loaded:
    """A family, and what its text encoders were given last."""

    family: Any
    seen: dict[str, torch.Tensor]

    def ids(self, prompt: Prompt) -> dict[str, list[float]]:
        """What each encoder gets for a prompt; of Qwen-Image what comes out, for the pipeline cuts that once more."""
        self.seen.clear()
        with torch.inference_mode():
            (embedding,) = self.family.encode([prompt])
        if isinstance(self.family, QwenImage):
            return {"text_encoder": embedding["tokens"][0].flatten().tolist()}
        return {name: ids[0].tolist() for name, ids in self.seen.items()}


@pytest.fixture(scope="module", params=SUBJECTS, ids=lambda subject: subject.name)
def loaded(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Loaded]:
    """Each family, spied upon."""
    subject: Subject = request.param
    folder = tmp_path_factory.mktemp("truncations")
    family = load_model(ModelConfig(model=subject.build(folder / "model"), device="cpu", dtype="float32"))
    seen: dict[str, torch.Tensor] = {}
    hooks = []
    for name, module in family.components.items():
        if name != family.denoiser:

            def note(_: Any, args: Any, options: Any, name: str = name) -> None:
                seen[name] = args[0] if args else options["input_ids"]

            hooks.append(module.register_forward_pre_hook(note, with_kwargs=True))
    yield Loaded(family, seen)
    for hook in hooks:
        hook.remove()


def long_prompt(loaded: Loaded) -> str:
    """Longer than every encoder reads, by fewer characters than are told."""
    text = WORDS
    wanted = len([name for name in loaded.family.components if name != loaded.family.denoiser])
    while len(loaded.family.truncations(Prompt(text))) < wanted:
        text += "stars "
    return text + "and then some"


def test_what_is_told_is_what_the_encoders_do_not_get(loaded: Loaded) -> None:
    """For each of them: one character less and nothing is cut, and what is left is all that it reads."""
    text = long_prompt(loaded)
    told = loaded.family.truncations(Prompt(text, negative=True))
    assert sorted(each.encoder for each in told) == sorted(loaded.ids(Prompt(text)))
    given = loaded.ids(Prompt(text))
    for each in told:
        assert each.negative
        assert each.num_tokens > each.max_tokens
        assert text.endswith(each.dropped_text) or len(each.dropped_text) == 200
        begin = text.rindex(each.dropped_text)
        word_end = text.find(" ", begin + 1) + 1  # a word that is cut in its middle is told by its end
        changed = loaded.ids(Prompt(text[:word_end] + "%" * len(text[word_end:])))
        assert changed[each.encoder] == given[each.encoder], "what is told as cut off was read"
        earlier = loaded.ids(Prompt(text[: begin - 4] + "%%%" + text[begin - 1 :]))
        assert earlier[each.encoder] != given[each.encoder], "what is not told was cut off"


def test_a_prompt_that_fits_is_not_told_of(loaded: Loaded) -> None:
    """To the last token: the longest that fits is told of as soon as it has one more word."""
    text, family = "a", loaded.family
    while not family.truncations(Prompt(text + " a")):
        text += " a"
    assert family.truncations(Prompt(text)) == ()
    (first, *_) = family.truncations(Prompt(text + " a"))
    assert first.dropped_text.strip() == "a"
    assert first.num_tokens > first.max_tokens
    longer, fits = loaded.ids(Prompt(text + " a")), loaded.ids(Prompt(text))
    assert len(longer[first.encoder]) >= len(fits[first.encoder])


LONG = " ".join(["a big red star"] * 40)
FIELDS = {"width_px": 64, "height_px": 64, "num_inference_steps": 2, "num_images": 1}


def ended(core: Any, name: str, root: Path, parameters: Any, **options: Any) -> tuple[Any, Any]:
    """The provenance and the stats of a request."""
    told = events(core.engine.submit(make_request(root, name, parameters, [], **options)))
    (image,) = [event.image for event in told if isinstance(event, ImageEvent)]
    (stats,) = [event.stats for event in told if isinstance(event, StatsEvent)]
    return image.provenance, stats


def test_the_reply_and_the_file_tell_of_it_also_when_the_prompt_is_known(demo_adapters: Path) -> None:
    """Both prompts, each with its encoders; from the cache as at the first time; nothing where nothing is cut."""
    core = start_core("demo", demo_adapters)
    try:
        wanted = replace(SD3.parameters(**FIELDS), prompt=LONG, negative_prompt=LONG + ", a ring")
        first, stats = ended(core, "first", demo_adapters, wanted)
        hits = core.engine.info().prompt_hits
        again, _ = ended(core, "again", demo_adapters, replace(wanted, seed=5))
        assert core.engine.info().prompt_hits == hits + 2
        assert [(each.encoder, each.negative) for each in first.prompt_truncations][:2] == [
            ("text_encoder", False),
            ("text_encoder_2", False),
        ]
        assert any(each.negative for each in first.prompt_truncations)
        assert first.prompt_truncations == again.prompt_truncations == stats.prompt_truncations
        off, _ = ended(core, "no guidance", demo_adapters, replace(wanted, guidance_scale=1.0))
        assert not any(each.negative for each in off.prompt_truncations)
        short, _ = ended(core, "short", demo_adapters, replace(wanted, prompt="a star", negative_prompt=""))
        assert short.prompt_truncations == ()
    finally:
        core.stop()
    told = json.loads(metadata_json(first, prompt_metadata=True))["prompt_truncations"]
    assert told[0]["dropped_text"] == first.prompt_truncations[0].dropped_text
    assert len(told[0]["dropped_text"]) <= 200
    hidden = metadata_json(first, prompt_metadata=False)
    assert "dropped_text" not in hidden
    assert "star" not in hidden
    assert json.loads(hidden)["prompt_truncations"][0]["num_tokens"] == told[0]["num_tokens"]
    assert "prompt_truncations" not in metadata_json(short, prompt_metadata=True)


def test_a_pipeline_without_a_family_is_overheard(tmp_path: Path) -> None:
    """PixArt makes its prompt lower-case and strips it; what its tokenizer cuts then is told, of either prompt."""
    core = start_core(str(tiny_flow.build_pixart(tmp_path / "model")), tmp_path)
    limit = 300  # the pipeline's own
    try:
        parameters = SD3.parameters(**FIELDS, prompt=" A Star " * 60, negative_prompt="rings, " * 80)
        provenance, stats = ended(core, "long", tmp_path, parameters)
        assert provenance.prompt_truncations == stats.prompt_truncations
        positive, negative = provenance.prompt_truncations
        assert (positive.encoder, positive.max_tokens, positive.negative) == ("text_encoder", limit, False)
        assert (negative.max_tokens, negative.negative) == (limit, True)
        assert positive.num_tokens > limit
        text = parameters.prompt.strip().lower()
        assert text.endswith(positive.dropped_text) or len(positive.dropped_text) == 200
        short, _ = ended(core, "short", tmp_path, replace(parameters, prompt="a star", negative_prompt="ring"))
        assert short.prompt_truncations == ()
    finally:
        core.stop()
