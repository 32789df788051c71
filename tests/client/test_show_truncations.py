"""`lora-client show` prints what a file says was cut off its prompts, whatever a stranger wrote there."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from lora_client.cli.provenance import METADATA_KEY
from lora_client.cli.show import show
from PIL import Image, PngImagePlugin

PROVENANCE: dict[str, Any] = {
    "schema": 1, "prompt": "a star", "negative_prompt": "", "seed": 1, "num_inference_steps": 2, "guidance_scale": 4.0,
    "width_px": 8, "height_px": 8, "adapters": [],
}  # fmt: skip
CUT = {"encoder": "text_encoder", "max_tokens": 77, "num_tokens": 90, "dropped_text": "a ring", "negative": True}


def shown(folder: Path, truncations: object, capsys: pytest.CaptureFixture[str]) -> list[str]:
    """The lines of warning that `show` prints of a file."""
    text = PngImagePlugin.PngInfo()
    text.add_text(METADATA_KEY, json.dumps({**PROVENANCE, "prompt_truncations": truncations}))
    Image.new("RGB", (8, 8)).save(folder / "x.png", pnginfo=text)
    show(folder / "x.png")
    return [line for line in capsys.readouterr().out.splitlines() if line.startswith("warning")]


def test_each_is_a_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With what was cut off, if the file tells it."""
    without = {key: value for key, value in CUT.items() if key not in ("dropped_text", "negative")}
    first, second = shown(tmp_path, [CUT, without], capsys)
    assert first.endswith("the negative prompt has 90 tokens, of which 'text_encoder' reads 77; cut off: 'a ring'")
    assert second.endswith("the prompt has 90 tokens, of which 'text_encoder' reads 77; cut off: '(not in the file)'")


@pytest.mark.parametrize("odd", [None, 3, "x", {}, [3], [[]], [{}], [{**CUT, "max_tokens": "77"}], [{"encoder": []}]])
def test_what_has_not_the_form_is_left_out(odd: object, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """No traceback and no line."""
    assert shown(tmp_path, odd, capsys) == []


def test_escapes_and_line_breaks_do_not_reach_the_terminal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Neither of the text nor of the encoder's name."""
    (line,) = shown(tmp_path, [{**CUT, "encoder": "\x1b[2J\nx", "dropped_text": "\x1b]0;y\x07\nwarning: z"}], capsys)
    assert line.isprintable()
