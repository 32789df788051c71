"""The flags of `lora-server`."""

from __future__ import annotations

import pytest
import typer
from lora_server.config import parse_bytes
from lora_server.flags import parse_preloads


@pytest.mark.parametrize(("text", "size"), [("1048576", 2**20), ("4GiB", 2**32), ("1.5 MB", 1_500_000), ("2kb", 2000)])
def test_sizes_have_units(text: str, size: int) -> None:
    """Bytes, or a number with a decimal or binary unit."""
    assert parse_bytes(text) == size


@pytest.mark.parametrize("text", ["", "many", "-1", "4XB", "1e9"])
def test_what_is_no_size_is_refused(text: str) -> None:
    """A clear error, not a guess."""
    with pytest.raises(ValueError, match="is not a size"):
        parse_bytes(text)


def test_preloads_take_names_and_scales() -> None:
    """One scale for all, or one for each; NAME= in front of the folder."""
    preloads = parse_preloads(["brand=/a", "/b=c"], [0.5])
    assert [(each.name, each.path, each.scale) for each in preloads] == [("brand", "/a", 0.5), (None, "/b=c", 0.5)]
    assert [each.scale for each in parse_preloads(["/a", "/b"], [1.0, 2.0])] == [1.0, 2.0]
    with pytest.raises(typer.BadParameter):
        parse_preloads(["/a", "/b"], [1.0, 2.0, 3.0])
