"""The command `lora-server inspect`: what the server would understand of a local adapter, without a server."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import Annotated

import typer
from lora_client.console import print_json, print_line, tell

from lora_server.adapters.formats.inputs import Model
from lora_server.adapters.formats.inspection import digest_of, inspect_adapter, model_of_folder
from lora_server.demo.paths import model_dir
from lora_server.errors import LoraServerError
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

    Reads headers, and the rest only for the digest, which comes last. With --model it matches every tensor against the
    model's modules, lists those that have none, and exits with 1 if there are any: a server refuses such a file unless
    the load allows it.
    """
    try:
        against = _model(model)
        report = inspect_adapter(path, against)
        if not as_json:
            for label, value in _rows(report):
                print_line(f"{label:<14} {value}")
            sys.stdout.flush()
        digest = digest_of(path, against)
    except (LoraServerError, ValueError) as error:
        tell(f"error: {error}")
        raise typer.Exit(1) from error
    if as_json:
        whole = dataclasses.asdict(dataclasses.replace(report, digest=digest))
        print_json(whole)
    else:
        print_line(f"{'digest':<14} {digest}")
    if report.num_unmatched_keys:
        raise typer.Exit(1)


def _model(name: str | None) -> Model | None:
    if name is None:
        return None
    if name == "demo":
        return dataclasses.replace(model_of_folder(model_dir()), name=name)
    return model_of_folder(Path(name))


def _rows(report: LoadReport) -> list[tuple[str, str]]:
    """The report in words, a label and a line; without what the files do not say."""
    rows = {
        "dialect": report.dialect,
        "kind": ", ".join(report.kinds) + (" (merged only)" if report.merged_only else ""),
        "rank": _range(report.min_rank, report.max_rank),
        "alpha": _range(report.min_alpha, report.max_alpha),
        **{each.name: _component(each) for each in report.components},
        "files": f"{report.size_bytes} bytes",
        "base model": report.base_model,
        "title": report.title,
        "trigger words": ", ".join(report.trigger_words),
        "suggested": "" if report.suggested_scale is None else f"scale {report.suggested_scale:g}",
    }
    listed = report.unmatched_keys[:_MAX_LISTED]
    more = report.num_unmatched_keys - len(listed)
    unmatched = [*listed, *([f"and {more} more"] if more else [])]
    lines = [(label, value) for label, value in rows.items() if value]
    return lines + [("" if k else "unmatched", value) for k, value in enumerate(unmatched)]


def _component(component: ComponentSummary) -> str:
    return f"{component.num_modules} modules, rank {_range(component.min_rank, component.max_rank)}"


def _range(low: float, high: float) -> str:
    return f"{low:g}" if low == high else f"{low:g} to {high:g}"
