"""`lora-client generate`: one request, its progress, its files."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

from lora_client._retry import DEFAULT_MAX_ATTEMPTS, RetryPolicy
from lora_client.cli.common import Connection, print_json
from lora_client.cli.progress import ProgressDisplay
from lora_client.cli.skip_layers import parse_skip_layers
from lora_client.client import LoraClient
from lora_client.console import print_line
from lora_client.types import AdapterUse, Completed, GenerationOptions, Image, ImageReady, Preview

_FORMATS = {".png": "png", ".webp": "webp", ".jpg": "jpeg", ".jpeg": "jpeg"}
_PREVIEW_STEPS = 5


def generate(
    context: typer.Context,
    prompt: Annotated[str, typer.Option(help="What to draw.")],
    lora: Annotated[
        list[str] | None,
        typer.Option(
            help="NAME[@sha256:HEX][:SCALE] or ./PATH[:SCALE], an adapter to apply; repeatable. Settings may follow, "
            "each after a comma: COMPONENT=FACTOR (such as text_encoder=0.5), BLOCK.PATTERN=FACTOR (such as "
            "transformer_blocks.0=0 or transformer_blocks.*.attn=0.5), start=FRACTION and end=FRACTION of the steps, "
            "trigger (its trigger words in front of the prompt)."
        ),
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of the first image.")] = 42,
    height: Annotated[int | None, typer.Option(help="Height in pixels; default: the model's.")] = None,
    width: Annotated[int | None, typer.Option(help="Width in pixels; default: the model's.")] = None,
    num_inference_steps: Annotated[int | None, typer.Option(help="Denoising steps; default: the model's.")] = None,
    guidance_scale: Annotated[float | None, typer.Option(help="Guidance; default: the model's.")] = None,
    true_cfg_scale: Annotated[
        float | None, typer.Option(help="Guidance by the negative prompt, where the model's own is distilled (FLUX.1).")
    ] = None,
    negative_prompt: Annotated[str, typer.Option(help="What to avoid.")] = "",
    num_images: Annotated[int, typer.Option(help="How many; image k has seed + k.")] = 1,
    lora_path: Annotated[
        str | None, typer.Option(help="An adapter's folder on the server: preloads and uses it.")
    ] = None,
    lora_request_path: Annotated[
        str | None, typer.Option(help="An adapter's folder on the server: loads it on demand and uses it.")
    ] = None,
    lora_request_id: Annotated[
        int | None, typer.Option(help="The id of --lora-request-path, or alone: use the adapter with this id.")
    ] = None,
    lora_scale: Annotated[
        list[float] | None,
        typer.Option(help="Scale of those adapters that have none in --lora; default: their own."),
    ] = None,
    output: Annotated[
        Path, typer.Option(help="File to write; several images: stem_0.png, stem_1.png. The suffix sets the format.")
    ] = Path("lora_output.png"),
    preview: Annotated[bool, typer.Option(help="Write stem.preview.jpg while it is being drawn.")] = False,
    skip_layers: Annotated[
        str,
        typer.Option(
            help="Skip-layer guidance: block numbers such as 7,8,9; then perhaps :SCALE, start=FRACTION, stop=FRACTION."
        ),
    ] = "",
    scheduler: Annotated[
        str | None, typer.Option(help="Scheduler, such as euler_ancestral (`lora-client info` lists them).")
    ] = None,
    request_id: Annotated[str | None, typer.Option(help="Names the request, for safe retries.")] = None,
    max_attempts: Annotated[
        int,
        typer.Option(
            min=1, help="Attempts while the server's queue is full, each when the server says; 1 gives up at once."
        ),
    ] = DEFAULT_MAX_ATTEMPTS,
    quiet: Annotated[bool, typer.Option(help="No progress on standard error.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print files, provenance and stats as JSON.")] = False,
) -> None:
    """Makes images. Paths of the files go to standard output, progress to standard error."""
    connection: Connection = context.obj
    _check_writable(output)
    options = GenerationOptions(
        negative_prompt=negative_prompt,
        width_px=width,
        height_px=height,
        num_inference_steps=num_inference_steps,
        guidance_scale=guidance_scale,
        true_cfg_scale=true_cfg_scale,
        num_images=num_images,
        format=_format(output),
        skip_layer_guidance=parse_skip_layers(skip_layers),
        scheduler=scheduler,
        preview_interval_steps=_PREVIEW_STEPS if preview else None,
        request_id=request_id,
    )
    uses = [AdapterUse.parse(text) for text in lora or ()]
    if lora_path is not None:
        uses.append(AdapterUse(path=absolute_path(lora_path)))
    if lora_request_path is not None:
        uses.append(AdapterUse(path=absolute_path(lora_request_path), id=lora_request_id))
    elif lora_request_id is not None:
        uses.append(AdapterUse(id=lora_request_id))
    uses = scaled(uses, lora_scale or ())
    display = ProgressDisplay(quiet=quiet)
    with connection.open(RetryPolicy(max_attempts=max_attempts, on_wait=display.show_wait)) as client:
        if lora_path is not None:
            client.adapters.load(absolute_path(lora_path))
        _run(
            client,
            (prompt, uses, seed, options),
            _Output(output, num_images),
            display,
            as_json=json,
        )


def scaled(uses: Sequence[AdapterUse], scales: Sequence[float]) -> list[AdapterUse]:
    """Returns *uses*, those without a scale with that of `--lora-scale`.

    Raises:
        ValueError: If there is none without a scale, or more than one scale.
    """
    if not scales:
        return list(uses)
    if len(scales) > 1:
        raise ValueError(
            f"--lora-scale is given {len(scales)} times; write each scale behind its name: --lora NAME:SCALE"
        )
    if all(use.scale is not None for use in uses):
        what = "every --lora has a scale of its own" if uses else "no adapter is given, by --lora say"
        raise ValueError(f"--lora-scale {scales[0]:g} would scale nothing: {what}")
    return [use if use.scale is not None else dataclasses.replace(use, scale=scales[0]) for use in uses]


@dataclasses.dataclass(frozen=True, slots=True)
class _Output:
    """Where images go."""

    path: Path
    num_images: int

    def file(self, image: Image) -> Path:
        if self.num_images == 1:
            return self.path
        return self.path.with_name(f"{self.path.stem}_{image.index}{self.path.suffix}")

    def preview(self, event: Preview) -> Path:
        suffix = "" if self.num_images == 1 else f"_{event.image_index}"
        return self.path.with_name(f"{self.path.stem}{suffix}.preview.jpg")


def _run(
    client: LoraClient,
    request: tuple[str, Sequence[AdapterUse], int, GenerationOptions],
    output: _Output,
    display: ProgressDisplay,
    *,
    as_json: bool,
) -> None:
    prompt, uses, seed, options = request
    written: list[tuple[Path, Image]] = []
    with display:
        for event in client.stream_generate(prompt, adapters=uses, seed=seed, options=options):
            display.show(event)
            if isinstance(event, ImageReady):
                path = output.file(event.image)
                with _named(path):
                    written.append((event.image.save(path), event.image))
            elif isinstance(event, Preview):
                path = output.preview(event)
                with _named(path):
                    path.write_bytes(event.data)
            elif isinstance(event, Completed):
                stats = event.stats
    if as_json:
        files = [{"path": str(path), "provenance": image.provenance} for path, image in written]
        print_json({"images": files, "stats": stats})
    else:
        for path, _ in sorted(written, key=lambda item: item[1].index):
            print_line(str(path))


@contextmanager
def _named(path: Path) -> Iterator[None]:
    """Lets an error name the file, as that of a full disk does not by itself."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from None


def _check_writable(output: Path) -> None:
    """Finds out before the work whether its result can be written."""
    folder = output.parent
    if output.is_dir():
        raise IsADirectoryError(f"{output} is a folder; name a file with --output")
    if not folder.is_dir():
        raise FileNotFoundError(f"the folder {folder} does not exist")
    if not os.access(folder, os.W_OK):
        raise PermissionError(f"the folder {folder} cannot be written")


def _format(output: Path) -> str:
    try:
        return _FORMATS[output.suffix.lower()]
    except KeyError:
        raise ValueError(f"{output} must end in {', '.join(_FORMATS)}") from None


def absolute_path(path: str) -> str:
    """An absolute path stays as typed, for the stable id belongs to its text; a relative one is of this folder."""
    return path if os.path.isabs(path) or "://" in path else os.path.abspath(os.path.expanduser(path))
