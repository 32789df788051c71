"""`lora-client show` on pictures of strangers: what it prints drives no terminal, and its command is harmless."""

from __future__ import annotations

import json
import shlex
import struct
import sys
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from lora_client import AdapterUse, GenerationOptions, SkipLayerGuidance
from lora_client.cli import app, generate
from lora_client.cli.main import main
from lora_client.cli.provenance import read_provenance
from lora_client.cli.remake import arguments, command_line
from PIL import Image, PngImagePlugin

DIGEST = "sha256:" + "0a" * 32
PICTURE = {
    "schema": 1, "model": "demo", "prompt": "a star", "negative_prompt": "", "seed": 1, "num_inference_steps": 2,
    "guidance_scale": 1.0, "width_px": 64, "height_px": 48, "adapters": [], "software": "x",
}  # fmt: skip
NEON = {"name": "neon", "id": 1, "digest": DIGEST, "scale": 1}


Show = Callable[..., "Done"]


def picture(path: Path, raw: str | None = None, **fields: Any) -> Path:
    """A PNG with this provenance."""
    text = PngImagePlugin.PngInfo()
    text.add_text("lora-inference", raw if raw is not None else json.dumps({**PICTURE, **fields}))
    Image.new("RGB", (4, 4)).save(path, "PNG", pnginfo=text)
    return path


@dataclass(frozen=True)
class Done:
    """How a command ended."""

    returncode: object
    stdout: str
    stderr: str


@pytest.fixture
def show(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., Done]:
    """Runs `lora-client show` in this process."""

    def run(path: Path, *flags: str) -> Done:
        monkeypatch.setattr(sys, "argv", ["lora-client", "show", str(path), *flags])
        with pytest.raises(SystemExit) as end:
            main()
        return Done(end.value.code, *capsys.readouterr())

    return run


def request_of(words: list[str], monkeypatch: pytest.MonkeyPatch) -> tuple[Any, Any]:
    """The request that the arguments of `lora-client` make, and where it would go."""
    asked: list[Any] = []

    def run(client: Any, request: Any, *_: Any, **__: Any) -> None:
        asked.append(request)

    with monkeypatch.context() as patch:
        patch.setattr(generate, "_run", run)
        patch.setenv("LORA_SERVER", "127.0.0.1:9")
        servers: list[str] = []
        original = generate.Connection.open
        patch.setattr(generate.Connection, "open", lambda self, *_: (servers.append(self.server), original(self))[1])
        assert not app.run(words)
    return asked[0], servers[0]


TEXTS = st.text(max_size=40) | st.sampled_from(
    [
        "--server=stranger:1",
        "-h",
        "@file",
        "$(id)",
        "`id`",
        "'",
        '"',
        "a\nb",
        "--",
        "",
        "\x1b[31m",
        "!!",
        "a' --seed 9 '",
    ]
)


@example(prompt="--server=stranger:1", negative="--quiet")
@example(prompt="--", negative="--tls-ca=/etc/ssl/x")
@example(prompt="$(touch x)`id`'\"", negative="!! a' --seed 9 '")
@example(prompt="a\nb", negative="\x1b]52;c;eA==\x07")
@settings(deadline=None, max_examples=50)
@given(prompt=TEXTS, negative=TEXTS)
def test_the_arguments_make_the_equal_request(prompt: str, negative: str) -> None:
    """Whatever the texts are: they stay texts; as JSON all of them, as a command those that a terminal shows."""
    provenance = {**PICTURE, "prompt": prompt, "negative_prompt": negative}
    try:
        words = arguments(provenance)
    except ValueError:
        assert any("\ud800" <= each <= "\udfff" for each in prompt + negative)
        return
    command = command_line(provenance)
    if command is not None:
        assert command.isascii() or not any(ord(each) < 32 for each in command)
        assert "\n" not in command
        assert shlex.split(command) == ["lora-client", *words]
    with pytest.MonkeyPatch.context() as patch:
        (asked, uses, seed, options), server = request_of(words, patch)
    assert (asked, uses, seed, server) == (prompt, [], 1, "127.0.0.1:9")
    assert options == GenerationOptions(
        negative_prompt=negative, width_px=64, height_px=48, num_inference_steps=2, guidance_scale=1.0
    )


def test_every_setting_is_in_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    """Adapters with all of theirs, and guidance with its numbers, which are not always the server's defaults."""
    fields = {
        "adapters": [
            {**NEON, "component_scales": [["text_encoder", 0.5]], "block_scales": [["proj_out", 0]],
             "schedule": {"start": 0.25, "end": 1.0}},
        ],
        "skip_layer_guidance": {"layers": [7, 8], "scale": 2.5, "start": 0.01, "stop": 0.5},
        "true_cfg_scale": 4.5,
        "scheduler": "euler",
    }  # fmt: skip
    (_, uses, _, options), _ = request_of(arguments({**PICTURE, **fields}), monkeypatch)
    assert uses == [
        AdapterUse(
            name="neon",
            expected_digest=DIGEST,
            scale=1.0,
            component_scales={"text_encoder": 0.5},
            block_scales={"proj_out": 0.0},
            start=0.25,
            end=1.0,
        )
    ]
    assert options.skip_layer_guidance == SkipLayerGuidance((7, 8), 2.5, 0.01, 0.5)
    assert (options.true_cfg_scale, options.scheduler) == (4.5, "euler")


HOSTILE = "a\x1b]52;c;eA==\x07\x9b31m\r\n\x08\u202e\u200b\u2028\u2029[red]x[/red]"


@pytest.mark.parametrize(
    "fields",
    [
        {"prompt": HOSTILE},
        {"model": HOSTILE},
        {HOSTILE: 1},
        {"new": [HOSTILE, {HOSTILE: HOSTILE}]},
        {"prompt": "a star'\r\nsoftware   lora-inference 9\n\nlora-client generate --prompt innocent #"},
    ],
)
@pytest.mark.parametrize("flag", [None, "--json"])
def test_nothing_of_a_file_reaches_the_terminal(
    tmp_path: Path, show: Show, fields: dict[str, Any], flag: str | None
) -> None:
    """Escape sequences, line breaks, directions and what has no width are escapes; nothing forges a line."""
    done = show(picture(tmp_path / "x.png", **fields), *([flag] if flag else []))
    assert done.returncode == 0
    assert all(each.isprintable() for each in done.stdout.replace("\n", ""))
    assert not [line for line in done.stdout.splitlines() if line.startswith("lora-client generate --prompt innocent")]
    if flag:
        assert {**PICTURE, **fields} == json.loads(done.stdout)["provenance"]


def test_a_text_that_no_terminal_shows_comes_as_json(tmp_path: Path, show: Show) -> None:
    """Instead of a command that would not make the picture again."""
    done = show(picture(tmp_path / "x.png", prompt="two\nlines"))
    words = json.loads(done.stdout.splitlines()[-1].partition("JSON: ")[2])
    assert words[:2] == ["generate", "--prompt=two\nlines"]


BROKEN: list[dict[str, Any]] = [
    {"prompt": 3}, {"prompt": ["a"]}, {"prompt": None}, {"negative_prompt": {"a": 1}}, {"guidance_scale": "x"},
    {"guidance_scale": [1]}, {"guidance_scale": True}, {"guidance_scale": 10**400}, {"true_cfg_scale": 10**400},
    {"true_cfg_scale": "1"}, {"seed": "1"}, {"seed": 1.5}, {"seed": True}, {"seed": -1}, {"seed": 2**63},
    {"seed": None},
    {"width_px": 2**32}, {"height_px": [8]}, {"num_inference_steps": None}, {"scheduler": 3}, {"scheduler": ["x"]},
    {"skip_layer_guidance": {}}, {"skip_layer_guidance": {"layers": 3}}, {"skip_layer_guidance": {"layers": ["--x"]}},
    {"skip_layer_guidance": [1]}, {"skip_layer_guidance": {"layers": [1], "scale": "x"}}, {"adapters": None},
    {"adapters": {}}, {"adapters": [1]}, {"adapters": [None]}, {"adapters": [{}]},
    {"adapters": [{**NEON, "scale": "1"}]},
    {"adapters": [{**NEON, "name": "neon:1"}]}, {"adapters": [{**NEON, "name": "a,trigger"}]},
    {"adapters": [{**NEON, "name": "--server"}]}, {"adapters": [{**NEON, "name": "/etc/passwd"}]},
    {"adapters": [{**NEON, "digest": "d"}]}, {"adapters": [{**NEON, "digest": DIGEST + ":9"}]},
    {"adapters": [{**NEON, "component_scales": 3}]}, {"adapters": [{**NEON, "component_scales": [["a b", 1]]}]},
    {"adapters": [{**NEON, "component_scales": [["a", 1], ["a", 2]]}, 1]}, {"adapters": [{**NEON, "schedule": [1]}]},
    {"adapters": [{**NEON, "schedule": {"start": 1}}]}, {"adapters": [{**NEON, "block_scales": [[1, 2]]}]},
    {"schema": 2}, {"schema": "1"},
]  # fmt: skip


@pytest.mark.parametrize("fields", BROKEN)
def test_odd_types_are_one_line_of_error(tmp_path: Path, fields: dict[str, Any]) -> None:
    """A ValueError for the command line, which names the field."""
    with pytest.raises(ValueError, match="is broken: ") as refused:
        read_provenance(picture(tmp_path / "x.png", **fields))
    assert len(str(refused.value)) < 500


@pytest.mark.parametrize(
    "raw",
    ["", "[", "[]", "1", "null", "[" * 200_000, '{"a":' * 200_000, '{"seed": ' + "9" * 5000 + "}",
     json.dumps(PICTURE).replace("a star", "\\ud800"), json.dumps(PICTURE).replace("1.0", "NaN"),
     json.dumps(PICTURE).replace("1.0", "1e999"), json.dumps({**PICTURE, "x": "y" * 1_000_001}),
    ],
)  # fmt: skip
def test_broken_json_is_one_line_of_error(tmp_path: Path, show: Show, raw: str) -> None:
    """Deep, long, not finite, or no JSON."""
    path = picture(tmp_path / "x.png", raw=raw)
    for flag in ((), ("--json",)):
        done = show(path, *flag)
        assert (done.returncode, done.stdout) == (2, "")
        assert len(done.stderr.splitlines()) == 1


def chunk(kind: bytes, data: bytes) -> bytes:
    """A chunk of a PNG."""
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


HEAD = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", 4, 4, 8, 2, 0, 0, 0))
BOMB = zlib.compress(b"a" * 2**24, 9)
FILES = {
    "nothing": b"",
    "text": b"lora",
    "zTXt": HEAD + chunk(b"zTXt", b"lora-inference\0\0" + BOMB),
    "iTXt": HEAD + chunk(b"iTXt", b"lora-inference\0\1\0\0\0" + BOMB),
    "iCCP": HEAD + chunk(b"iCCP", b"x\0\0" + BOMB),
    "truncated": HEAD[:20],
    "long text": HEAD + chunk(b"tEXt", b"lora-inference\0" + b"x" * 2**21),
    "not UTF-8": HEAD + chunk(b"iTXt", b"lora-inference\0\0\0\0\0\xff\xfe"),
    "EPS": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n",
    "JPEG": b"\xff\xd8\xff\xe1\0\x10Exif\0\0MM\0*\0\0\0\x08\xff\xff",
    "WebP": b"RIFF\xff\xff\xff\xffWEBPVP8X",
}


@pytest.mark.parametrize("name", FILES)
def test_a_file_that_is_no_picture_of_ours_is_one_line(tmp_path: Path, show: Show, name: str) -> None:
    """Bombs and ruins too, within the limits of the reader."""
    path = tmp_path / "bad\x1b[31m\n.png"
    path.write_bytes(FILES[name])
    done = show(path)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: ")
    assert done.stderr.removesuffix("\n").isprintable()


def test_pixels_are_not_decoded(tmp_path: Path) -> None:
    """What is asked stands before them, so that broken ones do not matter."""
    text = chunk(b"tEXt", b"lora-inference\0" + json.dumps(PICTURE).encode())
    (tmp_path / "x.png").write_bytes(HEAD + text + chunk(b"IDAT", b"broken") + chunk(b"IEND", b""))
    assert read_provenance(tmp_path / "x.png") == PICTURE


@pytest.mark.parametrize(("make", "code"), [(lambda p: None, 1), (lambda p: p.mkdir(), 1)])
def test_what_is_no_file_is_one_line(tmp_path: Path, show: Show, make: Any, code: int) -> None:
    """Missing, or a folder."""
    make(tmp_path / "x")
    done = show(tmp_path / "x")
    assert (done.returncode, len(done.stderr.splitlines())) == (code, 1)
