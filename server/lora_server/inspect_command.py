"""The command `lora-server inspect`: what the server would understand of a local adapter, without a server."""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from lora_client.console import flush, print_json, print_line, tell

from lora_server.adapters.formats.inputs import Model
from lora_server.adapters.formats.inspection import Inspection, Serving, model_of_folder
from lora_server.demo.paths import model_dir
from lora_server.errors import LoraServerError
from lora_server.settings import CONFIG_ENV, resolve
from lora_server.types import ComponentSummary, LoadReport

_MAX_LISTED = 10


def inspect_command(
    path: Annotated[Path, typer.Argument(metavar="FILE_OR_FOLDER", help="A .safetensors file, or a folder.")],
    model: Annotated[
        str | None, typer.Option(help="'demo' or a diffusers folder to match the adapter against.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Tells what an adapter is: dialect, kind, ranks, modules, base model, trigger words, digest.

    Says what a server would say, by the same code: with --model it matches every tensor against the model's modules,
    and the limits are those of the environment (LORA_SERVER_LIMITS_MAX_RANK and so on). What a server would refuse is
    an error and exit code 1; the report is then of what a load with --allow-partial would read, if that could. Reads
    headers, and the values only for the digest, which comes last.
    """
    serving = _serving(model)
    found, refusal = _inspected(path, serving)
    if found is not None and not as_json:
        for line in _lines(found.report()):
            print_line(line)
        flush()
    digest = ""
    if found is not None:
        try:
            digest = found.digest()
        except LoraServerError as error:
            refusal = refusal or error
    if as_json:
        print_json(_fields(found, digest, refusal))
    elif digest:
        print_line(f"{'digest':<14} {digest}")
    if refusal is not None:
        tell(f"error: {refusal}")
        raise typer.Exit(1)


def _inspected(path: Path, serving: Serving) -> tuple[Inspection | None, LoraServerError | None]:
    """What a load would read, or why it would refuse and what it would read if it might leave things out."""
    try:
        return _reported(Inspection(path, serving)), None
    except LoraServerError as error:
        with contextlib.suppress(LoraServerError):
            return _reported(Inspection(path, serving, allow_partial=True)), error
        return None, error


def _reported(found: Inspection) -> Inspection:
    """*found*, which has a report: a card of it may be refused."""
    found.report()
    return found


def _fields(found: Inspection | None, digest: str, refusal: LoraServerError | None) -> dict[str, Any]:
    report = dataclasses.asdict(dataclasses.replace(found.report(), digest=digest)) if found is not None else {}
    return report | {"refused": None if refusal is None else {"reason": refusal.reason, "message": str(refusal)}}


def _serving(model: str | None) -> Serving:
    """A server as the environment configures it, with *model*; what cannot be used ends the process."""
    try:
        config = resolve({}, Path(os.environ[CONFIG_ENV]) if os.environ.get(CONFIG_ENV) else None).config
        slot_rank = config.engine.page_columns * config.engine.num_pages
        return Serving(_model(model), config.limits, slot_rank)
    except (ValueError, OSError, LoraServerError) as error:
        tell(f"error: {error}")
        raise typer.Exit(1) from error


def _model(name: str | None) -> Model | None:
    if name is None:
        return None
    if name == "demo":
        return dataclasses.replace(model_of_folder(model_dir()), name=name)
    return model_of_folder(Path(name))


def _lines(report: LoadReport) -> Iterator[str]:
    """The report in words, a line or more a field; without what the files do not say."""
    for label, values in _rows(report).items():
        for n, value in enumerate(each for each in values if each):
            yield f"{label if n == 0 else '':<14} {value}"


def _rows(report: LoadReport) -> dict[str, Sequence[str]]:
    listed = report.unmatched_keys[:_MAX_LISTED]
    more = report.num_unmatched_keys - len(listed)
    return {
        "dialect": [report.dialect],
        "kind": [", ".join(report.kinds) + (" (merged only)" if report.merged_only else "")],
        "rank": [_range(report.min_rank, report.max_rank)],
        "alpha": [_range(report.min_alpha, report.max_alpha)],
        **{each.name: [_component(each)] for each in report.components},
        "files": [f"{report.size_bytes} bytes"],
        "base model": [report.base_model],
        "title": [report.title],
        "trigger words": [", ".join(report.trigger_words)],
        "suggested": ["" if report.suggested_scale is None else f"scale {report.suggested_scale:g}"],
        "unmatched": [*listed, f"and {more} more" if more else ""],
        "warning": report.warnings,
    }


def _component(component: ComponentSummary) -> str:
    return f"{component.num_modules} modules, rank {_range(component.min_rank, component.max_rank)}"


def _range(low: float, high: float) -> str:
    return f"{low:g}" if low == high else f"{low:g} to {high:g}"
