"""Trigger words from an adapter's own files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from lora_server.adapters import metadata
from lora_server.adapters.roots import AdapterRoots
from lora_server.adapters.source import AdapterFolder
from lora_server.errors import AdapterMalformedError
from lora_server.use_settings import MAX_TRIGGER_CHARS, with_trigger_words
from safetensors.torch import save

PLAIN = save({"x": torch.zeros(1)})
CARDS = ("lora_inference.json", "README.md")


def words(card: str = "", settings: object = None, phrase: str | None = None) -> tuple[str, ...]:
    """The trigger words of an adapter with these files."""
    files = {"README.md": card.encode()} if card else {}
    if settings is not None:
        files["lora_inference.json"] = json.dumps(settings).encode()
    header = {"modelspec.trigger_phrase": phrase} if phrase else {}
    return metadata.trigger_words(metadata.read_cards("x", files), header)


@pytest.mark.parametrize(
    ("front", "expected"),
    [
        ("instance_prompt: a photo of sks dog", ("a photo of sks dog",)),
        ("trigger: neon", ("neon",)),
        ("trigger_words:\n- one\n- two\n- one", ("one", "two")),
        ("instance_prompt: null\ntags: [lora]", ()),
        ("instance_prompt: a\ntrigger_words: [b]", ("b",)),
        ("trigger: 'two\\n  lines'", ("two\\n lines",)),
        ("trigger: |\n  two\n  lines", ("two lines",)),
        ("trigger: [1, 2]", ()),
        ("trigger: [[", ()),
        ("- trigger", ()),
        ("x: " + ":".join(["1"] * 400) + ".5\ntrigger: a", ("a",)),
        ("x: !!int ''\ny: !!bool x\nz: !!timestamp x\ntrigger: a", ("a",)),
        ("trigger: !!bool x", ()),
        ("x: &x a\ntrigger: [*x, [b], {c: d}, null]", ("a",)),
    ],
)
def test_a_model_card_names_them_in_its_front_matter(front: str, expected: tuple[str, ...]) -> None:
    """As people write it; what cannot be read says nothing and breaks nothing."""
    assert words(f"---\n{front}\n---\n# A card\ntrigger: not here") == expected
    assert words(f"# A card\n{front}") == ()


def test_the_servers_own_file_counts_before_the_header_and_the_card() -> None:
    """The first place that names any words wins."""
    card = "---\ntrigger: card\n---\n"
    assert words(card) == ("card",)
    assert words(card, phrase="header") == ("header",)
    assert words(card, {"trigger_words": ["own", "words"]}, "header") == ("own", "words")
    assert words(card, {"trigger_words": []}) == ("card",)


@pytest.mark.parametrize(
    "settings",
    [
        {"trigger_word": ["x"]},
        ["x"],
        {"trigger_words": "x"},
        {"trigger_words": [1]},
        {"trigger_words": ["\ud800"]},
        {"trigger_words": ["x" * (MAX_TRIGGER_CHARS + 1)]},
        {"trigger_words": [str(k) for k in range(17)]},
    ],
)
def test_the_servers_own_file_must_be_right(settings: object) -> None:
    """It is written for this server, so a mistake in it is an error and not silence."""
    with pytest.raises(AdapterMalformedError) as caught:
        words(settings=settings)
    assert caught.value.metadata["key"] == "lora_inference.json"


@given(card=st.binary(max_size=200), phrase=st.text(max_size=2000))
def test_whatever_others_wrote_the_words_keep_their_bounds(card: bytes, phrase: str) -> None:
    """Words are printable, each on one line, and together not longer than a prompt can bear."""
    header = {"modelspec.trigger_phrase": phrase}
    for files, fields in (({"README.md": b"---\n" + card + b"\n---\n"}, {}), ({}, header)):
        found = metadata.trigger_words(metadata.read_cards("x", files), fields)
        assert all(word.isprintable() and word.strip() for word in found)
        assert len(with_trigger_words("", found)) <= MAX_TRIGGER_CHARS


def test_metadata_changes_the_signature_and_not_the_digest(tmp_path: Path) -> None:
    """New words are noticed at the next use, and are no new version of the weights."""
    (tmp_path / "adapter_config.json").write_text("{}")
    (tmp_path / "adapter_model.safetensors").write_bytes(PLAIN)
    folder = AdapterFolder(tmp_path, (), AdapterRoots([tmp_path]))
    digest, before = folder.read(1 << 20).digest, folder.signature_of(CARDS)
    (tmp_path / "README.md").write_text("---\ntrigger: x\n---\n")
    assert folder.read(1 << 20).digest == digest
    assert folder.signature_of(CARDS) != before
    assert set(folder.read_optional(CARDS, 100)) == {"README.md"}
    assert not folder.read_optional(CARDS, 10)


def test_a_card_that_is_a_link_out_of_the_roots_is_not_read(tmp_path: Path) -> None:
    """Metadata is held to the same roots as weights."""
    root = tmp_path / "root"
    root.mkdir()
    (tmp_path / "secret").write_text("---\ntrigger: secret\n---\n")
    (root / "README.md").symlink_to(tmp_path / "secret")
    assert not AdapterFolder(root, (), AdapterRoots([root])).read_optional(CARDS, 1000)
