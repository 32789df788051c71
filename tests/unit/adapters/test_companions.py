"""What lies beside an adapter and belongs to it is refused by name, or left out with a word: wherever it came from."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from lora_client._upload import local_files
from lora_server.adapters.companions import NOTHING, of_file, of_folder
from lora_server.adapters.formats.inspection import Inspection, Serving
from lora_server.adapters.hub import Hub
from lora_server.adapters.loader import AdapterLoader
from lora_server.adapters.roots import AdapterRoots
from lora_server.config import LimitsConfig
from lora_server.errors import AdapterError, AdapterMalformedError
from lora_server.models.base import adapter_targets
from lora_server.types import LoadReport
from safetensors.torch import save

from tests.dialects import dotted, write_lora
from tests.factories import TinyNet
from tests.fake_hub import serving_hub
from tests.unit.adapters.test_odd_tensors import outcome

LORA = save(
    write_lora({"blocks.0.to_q": (6, 6)}, dotted("transformer.", "lora_A", "lora_B"), alpha_of=lambda _: None).tensors
)
EMBEDDINGS = save({"clip_l": torch.zeros(2, 8), "clip_g": torch.zeros(2, 8)})
CONFIG = json.dumps({"peft_type": "LORA", "r": 4, "lora_alpha": 4, "target_modules": ["blocks.0.to_q"]}).encode()
CARD = b"---\ninstance_prompt: a photo of <s0><s1>\ntrigger_words: [TOK dog, pivotal, ordinary]\n---\n"
DIFFUSERS = {"pytorch_lora_weights.safetensors": LORA}
PEFT = {"adapter_config.json": CONFIG, "adapter_model.safetensors": LORA}
Files = dict[str, bytes]

LEFT_OUT: dict[str, tuple[Files, str]] = {
    "diffusers' pivotal tuning": (DIFFUSERS | {"pivotal_emb.safetensors": EMBEDDINGS}, "pivotal_emb.safetensors"),
    "its other name": (DIFFUSERS | {"embeddings.safetensors": EMBEDDINGS}, "embeddings.safetensors"),
    "textual inversion": (DIFFUSERS | {"learned_embeds-500.safetensors": EMBEDDINGS}, "learned_embeds-500.safetensors"),
    "beside PEFT": (PEFT | {"my_emb.safetensors": EMBEDDINGS}, "my_emb.safetensors"),
    "a folder of OneTrainer's": (DIFFUSERS | {"style_embeddings/a.safetensors": EMBEDDINGS}, "style_embeddings"),
    "a component that the model has not": (
        PEFT | {"text_encoder_2/adapter_config.json": CONFIG, "text_encoder_2/adapter_model.safetensors": LORA},
        "text_encoder_2/adapter_config.json",
    ),
    "weights beside those of a sub-folder": (
        {f"transformer/{name}": data for name, data in PEFT.items()} | DIFFUSERS,
        "pytorch_lora_weights.safetensors",
    ),
}  # fmt: skip
PICKLED: dict[str, tuple[Files, str]] = {
    "cog's": (DIFFUSERS | {"embeddings.pti": b"x"}, "embeddings.pti"),
    "textual inversion": (DIFFUSERS | {"learned_embeds.bin": b"x"}, "learned_embeds.bin"),
    "a .pt": (PEFT | {"my_embeddings.pt": b"x"}, "my_embeddings.pt"),
}
UNREADABLE: dict[str, tuple[Files, str]] = {
    "shards": (
        {"adapter_config.json": CONFIG, "adapter_model.safetensors.index.json": b"{}"}
        | {f"adapter_model-0000{n}-of-00002.safetensors": LORA for n in (1, 2)},
        "adapter_model-00001-of-00002.safetensors",
    ),
    "shards without a configuration": (
        {f"pytorch_lora_weights-0000{n}-of-00002.safetensors": LORA for n in (1, 2)},
        "pytorch_lora_weights-00001-of-00002.safetensors",
    ),
    "one shard": ({"model-00001-of-00002.safetensors": LORA}, "model-00001-of-00002.safetensors"),
    "a pickle": ({"adapter_config.json": CONFIG, "adapter_model.bin": b"x"}, "adapter_model.bin"),
    "a pickle of a component": (
        PEFT | {"second/adapter_config.json": CONFIG, "second/adapter_model.bin": b"x"},
        "second/adapter_model.bin",
    ),
}
ALLOWED: dict[str, Files] = {
    "a copy as a pickle": PEFT | {"adapter_model.bin": b"x"},
    "what trainers leave": DIFFUSERS | {"optimizer.pt": b"x", "checkpoint-5/adapter_model.safetensors": LORA},
    "a whole component of a model": DIFFUSERS | {"text_encoder/model.safetensors": LORA},
}


def put(folder: Path, files: Files) -> Path:
    """Writes a folder."""
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    return folder


def from_path(folder: Path, files: Files) -> Path:
    """As a client names it, or an operator at start."""
    return put(folder / "adapter", files)


def from_upload(folder: Path, files: Files) -> Path:
    """What the client sends of it."""
    sent = local_files(put(folder / "local", files), ("transformer", "second"), allow_partial=True)
    return put(folder / "store" / "adapter", {file.name: file.path.read_bytes() for file in sent})


def from_hub(folder: Path, files: Files) -> Path:
    """A repository of the hub."""
    with serving_hub() as remote:
        remote.push("me/adapter", files)
        return Hub(folder, ("second", "transformer"), 1 << 20, remote.url).fetch("me/adapter@main")


WAYS: dict[str, Callable[[Path, Files], Path]] = {"path": from_path, "upload": from_upload, "hub": from_hub}


@pytest.fixture(autouse=True)
def _online(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)


def loader() -> AdapterLoader:
    """For a model of two components."""
    targets = adapter_targets({"transformer": TinyNet(), "second": TinyNet()})
    return AdapterLoader(AdapterRoots([Path("/")]), targets, ("tiny", "", "transformer"), torch.float32, LimitsConfig())


def load(place: Path, *, allow_partial: bool = False) -> LoadReport:
    """The report of a load, after a report without a server has said the same, or been refused alike."""
    ours = loader()
    inspected, sentence = outcome(lambda: Inspection(place, Serving(ours.served), allow_partial=allow_partial).report())
    try:
        report = (ours.load_partial if allow_partial else ours.load)(place).report
    except AdapterError as error:
        assert sentence == f"{error.reason}: {error}"  # noqa: PT017 - both are compared, and then it goes on
        raise
    assert report is not None
    assert dataclasses.replace(report, digest="") == inspected
    return report


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("case", LEFT_OUT)
def test_what_is_not_applied_is_refused_or_reported(tmp_path: Path, way: str, case: str) -> None:
    """By name; and words that would need an embedding are not offered."""
    files, name = LEFT_OUT[case]
    place = WAYS[way](tmp_path, files | {"README.md": CARD})
    with pytest.raises(AdapterMalformedError) as refused:
        load(place)
    assert refused.value.metadata["key"] == name
    report = load(place, allow_partial=True)
    assert any(name in warning for warning in report.warnings)
    assert not any("<s0>" in word for word in report.trigger_words)
    if "emb" in name:
        assert "TOK dog" not in report.trigger_words
        assert report.trigger_words[-1] == "ordinary"


@pytest.mark.parametrize("case", LEFT_OUT)
def test_a_copy_of_the_servers_own_knows_it_too(tmp_path: Path, case: str) -> None:
    """What is pinned is copied without what lies beside it; read again from there, it is reported as before."""
    files, name = LEFT_OUT[case]
    place = from_path(tmp_path, files | {"README.md": CARD})
    copied = loader().files(place)
    everything = {name: bytes(data) for name, data in {**copied.cards, **copied.contents}.items()}
    copy = put(tmp_path / "copy" / "adapter", everything)
    report = load(copy, allow_partial=True)
    assert report.warnings == load(place, allow_partial=True).warnings
    assert "emb" not in name or "TOK dog" not in report.trigger_words


@pytest.mark.parametrize("way", ["path", "hub"])
@pytest.mark.parametrize("case", PICKLED)
def test_pickled_embeddings_too(tmp_path: Path, way: str, case: str) -> None:
    """They are never opened; and a push says that they are not sent."""
    files, name = PICKLED[case]
    place = WAYS[way](tmp_path, files)
    with pytest.raises(AdapterMalformedError) as refused:
        load(place)
    assert refused.value.metadata["key"] == name
    assert name in load(place, allow_partial=True).warnings[0]
    with pytest.raises(ValueError, match=name):
        local_files(put(tmp_path / "local", files))


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("case", UNREADABLE)
def test_what_holds_the_weights_and_is_not_read_is_refused(tmp_path: Path, way: str, case: str) -> None:
    """Shards and pickles in the place of the weights: by name, whatever is allowed."""
    files, name = UNREADABLE[case]
    if way == "hub" and "without a configuration" in case:
        pytest.skip("the hub asks for one file by name")
    if way == "upload" and "pickle" in case:
        pytest.skip("pickles are not sent")
    place = WAYS[way](tmp_path, files)
    for allow_partial in (False, True):
        with pytest.raises(AdapterMalformedError, match=r"shards|pickle") as refused:
            load(place, allow_partial=allow_partial)
        assert refused.value.metadata["key"] == name


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("case", ALLOWED)
def test_what_changes_nothing_is_no_reason_to_refuse(tmp_path: Path, way: str, case: str) -> None:
    """Copies, the state of a training, and parts of other models."""
    assert load(WAYS[way](tmp_path, ALLOWED[case])).warnings == ()


def test_other_weights_are_named(tmp_path: Path) -> None:
    """Of what is passed over, the report says so."""
    place = from_path(tmp_path, DIFFUSERS | {"for-a1111.safetensors": LORA})
    assert load(place).warnings == ("for-a1111.safetensors is not read",)


def test_a_folder_of_one_adapter_and_its_embeddings(tmp_path: Path) -> None:
    """The adapter is meant, whatever it is called; and what is only named like embeddings is one, if it is alone."""
    files = {"style.safetensors": LORA, "style_emb.safetensors": EMBEDDINGS}
    for way in (from_path, from_hub):
        with pytest.raises(AdapterMalformedError, match="style_emb"):
            load(way(tmp_path / way.__name__, files))
    assert load(put(tmp_path / "alone", {"my_embeddings_style.safetensors": LORA})).warnings == ()


def test_of_a_bare_file_its_own_embeddings_count(tmp_path: Path) -> None:
    """Alone in its folder, all; beside other adapters, what is named after it."""
    folder = put(tmp_path, {"style.safetensors": LORA, "pivotal_emb.safetensors": EMBEDDINGS})
    with pytest.raises(AdapterMalformedError, match="pivotal_emb"):
        load(folder / "style.safetensors")
    put(tmp_path, {"other.safetensors": LORA})
    assert load(folder / "style.safetensors").warnings == ()
    put(tmp_path, {"style_emb.safetensors": EMBEDDINGS})
    with pytest.raises(AdapterMalformedError, match="style_emb"):
        load(folder / "style.safetensors")
    assert load(folder / "other.safetensors").warnings == ()


INSIDE = ["bundle_emb.glow.clip_l", "emb_params", "string_to_param.*", "clip_l", "<s0>", "emb.0"]


@pytest.mark.parametrize("key", INSIDE)
def test_embeddings_inside_the_file(tmp_path: Path, key: str) -> None:
    """Refused as such; left out, their words are not offered."""
    tensors = write_lora({"blocks.0.to_q": (6, 6)}, dotted("transformer.", "lora_A", "lora_B")).tensors
    data = save(tensors | {key: torch.zeros(2, 8)}, {"modelspec.trigger_phrase": "a <new> glow"})
    place = put(tmp_path, {"x.safetensors": data}) / "x.safetensors"
    with pytest.raises(AdapterMalformedError, match="embedding of new words") as refused:
        load(place)
    assert refused.value.metadata["key"] == key
    report = load(place, allow_partial=True)
    assert (report.unmatched_keys, report.trigger_words) == ((key,), ())


def test_a_tensor_that_changes_what_others_mean_is_never_left_out(tmp_path: Path) -> None:
    """Magnitudes of an unknown spelling make a plain LoRA a wrong one."""
    tensors = write_lora({"blocks.0.to_q": (6, 6)}, dotted("transformer.", "lora_A", "lora_B")).tensors
    for name in ("magnitude", "lora_A.alpha", "reshape_weight"):
        data = save(tensors | {f"transformer.blocks.0.to_q.{name}": torch.ones(6)})
        place = put(tmp_path, {"x.safetensors": data}) / "x.safetensors"
        with pytest.raises(AdapterMalformedError, match=name):
            load(place, allow_partial=True)


@pytest.mark.parametrize(
    "name", ["optimizer.safetensors", "scaler_0.safetensors", "x.tmp.safetensors", "._a.safetensors"]
)
def test_what_is_no_weights_belongs_to_nothing(name: str) -> None:
    """The state of a training or a file on its way: not told, not refused, and no other adapter to a bare file."""
    counted = ["transformer/adapter_config.json", "transformer/adapter_model.safetensors"]
    assert of_folder([*counted, name], counted) == NOTHING
    assert of_file("a.safetensors", ["a.safetensors", name, "b_emb.safetensors"]).embeddings == ("b_emb.safetensors",)
