"""The command `lora-server`: reads flags into a `ServerConfig` and runs the server. Knows no part of it but `app`."""

from __future__ import annotations

import asyncio
import re
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import typer
from pydantic import ValidationError

from lora_server.config import Preload, ServerConfig
from lora_server.telemetry import LogFormat, configure_logging

_UNITS = {"": 1, "k": 1000, "m": 1000**2, "g": 1000**3, "ki": 1024, "mi": 1024**2, "gi": 1024**3}

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Serves one diffusion model with thousands of LoRA adapters over gRPC.",
)


def parse_bytes(text: str) -> int:
    """Reads a size such as 4GiB, 500MB or 1048576, in bytes.

    Raises:
        typer.BadParameter: If it is none.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kmg]i?)?b?", text.strip().lower())
    if match is None:
        raise typer.BadParameter(f"{text!r} is not a size; write bytes, or a number with KB, MB, GB, KiB, MiB or GiB")
    return int(float(match[1]) * _UNITS[match[2] or ""])


def parse_preloads(paths: list[str], scales: list[float]) -> tuple[Preload, ...]:
    """Joins `--lora-path [NAME=]DIR` with `--lora-scale`: none, one for all, or one for each.

    Raises:
        typer.BadParameter: If the numbers do not fit together.
    """
    if len(scales) not in (0, 1, len(paths)) or (scales and not paths):
        raise typer.BadParameter(f"{len(scales)} --lora-scale for {len(paths)} --lora-path: give none, one, or as many")
    filled = scales if len(scales) == len(paths) else (scales or [1.0]) * len(paths)
    preloads = []
    for text, scale in zip(paths, filled, strict=True):
        name, separator, path = text.partition("=")
        named = bool(separator) and "/" not in name
        preloads.append(Preload(path=path if named else text, name=name if named else None, scale=scale))
    return tuple(preloads)


def parse_sizes(texts: list[str]) -> tuple[tuple[int, int], ...] | None:
    """Reads sizes such as 1024x768; None if there are none.

    Raises:
        typer.BadParameter: If one is no size.
    """
    matches = [re.fullmatch(r"(\d+)x(\d+)", text) for text in texts]
    if not all(matches):
        raise typer.BadParameter("a size is WIDTHxHEIGHT in pixels, such as 1024x768")
    return tuple((int(match[1]), int(match[2])) for match in matches if match) or None


@app.command()
def serve(
    model: Annotated[
        str, typer.Option(help="'demo' (embedded), a diffusers folder, a .safetensors checkpoint, or a hub id.")
    ] = "demo",
    model_config: Annotated[
        Path | None, typer.Option(help="Folder with configuration and tokenizers, for a .safetensors checkpoint.")
    ] = None,
    listen: Annotated[str, typer.Option(help="HOST:PORT or unix:PATH; port 0 takes a free port.")] = "127.0.0.1:50051",
    adapter_root: Annotated[
        list[Path], typer.Option(help="Folder under which adapter paths may lie; repeatable.")
    ] = [],  # noqa: B006 - typer copies it
    lora_path: Annotated[
        list[str], typer.Option(help="[NAME=]DIR: an adapter cached before serving; repeatable.")
    ] = [],  # noqa: B006
    lora_scale: Annotated[
        list[float], typer.Option(help="Default scale of the --lora-path: one for all, or one for each.")
    ] = [],  # noqa: B006
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    dtype: Annotated[str, typer.Option(help="auto, float64, float32, bfloat16 or float16.")] = "auto",
    cache_bytes: Annotated[str, typer.Option(help="Host memory for adapters, such as 4GiB.")] = "4GiB",
    max_cached_adapters: Annotated[int, typer.Option(help="Most adapters in host memory.")] = 1000,
    max_pinned_share: Annotated[
        float, typer.Option(help="Share of that memory that pins may take, 0 to 1; the rest always stays evictable.")
    ] = 0.9,
    device_slots: Annotated[int, typer.Option(help="Most adapters resident on the device.")] = 64,
    max_rank: Annotated[int, typer.Option(help="Largest rank of an adapter.")] = 256,
    max_queued_requests: Annotated[int, typer.Option(help="Requests that may wait.")] = 64,
    max_batch_images: Annotated[int, typer.Option(help="Most images denoised together.")] = 8,
    compile_blocks: Annotated[
        bool, typer.Option("--compile/--no-compile", help="Compiled blocks and CUDA graphs, on CUDA.")
    ] = True,
    warm_size: Annotated[
        list[str], typer.Option(help="WIDTHxHEIGHT to make ready before serving; repeatable. Default: the model's.")
    ] = [],  # noqa: B006
    deterministic: Annotated[
        bool, typer.Option(help="Equal bytes whatever else is running: every image steps alone, adapters merged.")
    ] = False,
    threads: Annotated[int | None, typer.Option(help="CPU threads of the model; default: torch's.")] = None,
    drain_timeout: Annotated[float, typer.Option(help="Seconds that running requests get at shutdown.")] = 30.0,
    prompt_metadata: Annotated[bool, typer.Option(help="Write prompts into the images' metadata.")] = True,
    log_level: Annotated[str, typer.Option(help="debug, info, warning or error.")] = "info",
    log_format: Annotated[LogFormat, typer.Option(help="auto, console or json.")] = "auto",
    log_prompts: Annotated[bool, typer.Option("--log-prompts", help="Write prompts into the log.")] = False,
    metrics_listen: Annotated[
        str | None, typer.Option(help="HOST:PORT of Prometheus metrics; port 0 takes a free one. Default: none.")
    ] = None,
    metrics_adapters: Annotated[int, typer.Option(help="Adapters with a label of their own in metrics.")] = 20,
    otlp_endpoint: Annotated[
        str | None, typer.Option(help="URL for traces by OTLP over gRPC; needs the extra [otel]. Default: none.")
    ] = None,
    max_queued_per_tenant: Annotated[
        int | None, typer.Option(help="Requests of one tenant that may wait; default: as many as of all.")
    ] = None,
    max_request_megapixel_steps: Annotated[
        float | None, typer.Option(help="Most work in one request: width x height / 10^6 x steps x images.")
    ] = None,
) -> None:
    """Serves a model until SIGTERM or SIGINT; a second signal ends at once.

    Prints one line with the address to standard output when it serves; logs go to standard error.
    """
    values: dict[str, Any] = {
        "model": {"model": model, "config_folder": model_config, "device": device, "dtype": dtype},
        "cache": {
            "budget_bytes": parse_bytes(cache_bytes),
            "max_adapters": max_cached_adapters,
            "max_pinned_share": max_pinned_share,
            "device_slots": device_slots,
        },
        "limits": {"max_rank": max_rank, "max_request_megapixel_steps": max_request_megapixel_steps},
        "engine": {
            "max_queued_requests": max_queued_requests,
            "max_batch_images": max_batch_images,
            "compile": compile_blocks,
            "warm_sizes": parse_sizes(warm_size),
            "deterministic": deterministic,
            "threads": threads,
            "max_queued_per_tenant": max_queued_per_tenant,
        },
        "telemetry": {
            "metrics_listen": metrics_listen,
            "metrics_adapters": metrics_adapters,
            "otlp_endpoint": otlp_endpoint,
            "log_prompts": log_prompts,
        },
        "rpc": {"listen": listen, "drain_timeout_s": drain_timeout, "prompt_metadata": prompt_metadata},
        "adapter_roots": adapter_root,
    }
    try:
        config = ServerConfig(**values, preloads=parse_preloads(lora_path, lora_scale))
        configure_logging(log_level, log_format)
    except ValidationError as error:
        faults = "; ".join(f"{'.'.join(map(str, fault['loc']))}: {fault['msg']}" for fault in error.errors())
        raise typer.BadParameter(faults) from error
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    raise typer.Exit(_run(config))


def _run(config: ServerConfig) -> int:
    """Runs the server; an error at start is one line on standard error, and exit code 1."""
    from lora_server.app import Server
    from lora_server.errors import LoraServerError
    from lora_server.models.registry import ModelLoadError
    from lora_server.monitoring.tracing import OtelMissingError

    def on_serving(address: str) -> None:
        sys.stdout.write(f"lora-server serves {config.model.model} on {address}\n")
        sys.stdout.flush()

    async def run() -> int:
        return await Server(config).run(on_serving)

    try:
        return asyncio.run(run())
    except (OSError, OtelMissingError, ModelLoadError, LoraServerError) as error:
        sys.stderr.write(f"error: {error}\n")
        return 1


@app.command("version")
def show_version() -> None:
    """Prints the version."""
    sys.stdout.write(f"lora-inference {version('lora-inference')}\n")


def main() -> None:
    """The entry point `lora-server`."""
    app()
