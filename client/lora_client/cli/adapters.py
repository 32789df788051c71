"""`lora-client adapters`: what the server knows and keeps warm."""

from __future__ import annotations

from typing import Annotated

import typer

from lora_client.cli.common import Connection, find_ref, print_json
from lora_client.cli.generate import absolute_path
from lora_client.cli.listing import print_adapters, size_text
from lora_client.console import print_line
from lora_client.types import Adapter, LoadReport

app = typer.Typer(no_args_is_help=True, help="Loads, lists, pins and unloads adapters.", rich_markup_mode=None)
Ref = Annotated[str, typer.Argument(metavar="NAME_OR_ID", help="A name, or an id; digits are a name first.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]


@app.command("load")
def load(
    context: typer.Context,
    path: Annotated[str, typer.Argument(help="The adapter's folder or .safetensors file, on the server.")],
    name: Annotated[str | None, typer.Option(help="Name to register; default: made from the folder's.")] = None,
    id: Annotated[int | None, typer.Option(help="Id to register; default: the path's stable id.")] = None,  # noqa: A002
    scale: Annotated[float | None, typer.Option(help="Default scale of uses that name none.")] = None,
    pin: Annotated[bool, typer.Option("--pin", help="Keep it loaded.")] = False,
    tenant: Annotated[
        list[str] | None, typer.Option(help="Bind it: only this tenant may use it; repeatable. Default: unchanged.")
    ] = None,
    replace: Annotated[bool, typer.Option("--replace", help="Take the name from another source.")] = False,
    allow_partial: Annotated[
        bool,
        typer.Option("--allow-partial", help="Leave out what the model has no module for, and embeddings beside it."),
    ] = False,
    json: Json = False,
) -> None:
    """Reads, checks, registers and caches an adapter."""
    connection: Connection = context.obj
    with connection.open() as client:
        adapter = client.adapters.load(
            absolute_path(path),
            name=name,
            id=id,
            default_scale=scale,
            replace=replace,
            allow_partial=allow_partial,
            tenants=tenant,
        )
        if pin:
            adapter = client.adapters.pin(adapter.name)
    _show(adapter, as_json=json)


@app.command("push")
def push(
    context: typer.Context,
    path: Annotated[str, typer.Argument(help="A folder or .safetensors file on this machine.")],
    name: Annotated[str | None, typer.Option(help="Name to register; default: made from the path's.")] = None,
    scale: Annotated[float | None, typer.Option(help="Default scale of uses that name none.")] = None,
    pin: Annotated[bool, typer.Option("--pin", help="Keep it loaded.")] = False,
    replace: Annotated[
        bool, typer.Option("--replace", help="Take the name from an adapter that was not pushed.")
    ] = False,
    allow_partial: Annotated[
        bool,
        typer.Option("--allow-partial", help="Leave out what the model has no module for, and embeddings beside it."),
    ] = False,
    tenant: Annotated[
        list[str] | None, typer.Option(help="The only tenants that may use it; repeatable. Default: unchanged.")
    ] = None,
    json: Json = False,
) -> None:
    """Sends an adapter to the server, which keeps it in its state directory, and loads it."""
    connection: Connection = context.obj
    with connection.open() as client:
        try:
            adapter = client.adapters.push(
                path,
                name=name,
                default_scale=scale,
                replace=replace,
                allow_partial=allow_partial,
                tenants=tenant,
            )
        except ValueError as error:
            raise typer.BadParameter(str(error)) from error
        if pin:
            adapter = client.adapters.pin(adapter.name)
    _show(adapter, as_json=json)


@app.command("list")
def list_adapters(
    context: typer.Context,
    state: Annotated[
        list[str] | None,
        typer.Option(help="Only adapters that are registered, loading, cached, resident or failed; repeatable."),
    ] = None,
    prefix: Annotated[str, typer.Option(help="Only adapters whose names begin with this.")] = "",
    json: Json = False,
) -> None:
    """Lists the registered adapters by name."""
    connection: Connection = context.obj
    with connection.open() as client:
        adapters = client.adapters.list(states=state or (), name_prefix=prefix)
    if json:
        print_json(adapters)
        return
    print_adapters(adapters)


@app.command("get")
def get(context: typer.Context, adapter: Ref, json: Json = False) -> None:
    """Shows one adapter."""
    connection: Connection = context.obj
    with connection.open() as client:
        _show(client.adapters.get(find_ref(client, adapter)), as_json=json)


@app.command("pin")
def pin(
    context: typer.Context,
    adapter: Ref,
    level: Annotated[str, typer.Option(help="host or device.")] = "host",
    ttl: Annotated[float | None, typer.Option(help="Seconds; default: without an end.")] = None,
    json: Json = False,
) -> None:
    """Keeps an adapter loaded until it is unpinned."""
    if level not in ("host", "device"):
        raise typer.BadParameter("--level is host or device")
    connection: Connection = context.obj
    with connection.open() as client:
        _show(client.adapters.pin(find_ref(client, adapter), level=level, ttl_s=ttl), as_json=json)


@app.command("unpin")
def unpin(context: typer.Context, adapter: Ref, json: Json = False) -> None:
    """Ends a pin."""
    connection: Connection = context.obj
    with connection.open() as client:
        _show(client.adapters.unpin(find_ref(client, adapter)), as_json=json)


@app.command("unload")
def unload(
    context: typer.Context,
    adapter: Ref,
    drain: Annotated[bool, typer.Option("--drain", help="Let running requests finish on it.")] = False,
) -> None:
    """Forgets an adapter; its files are not touched."""
    connection: Connection = context.obj
    with connection.open() as client:
        freed_bytes = client.adapters.unload(find_ref(client, adapter), drain=drain)
    print_line(f"unloaded {adapter}, {size_text(freed_bytes)} freed")


def _show(adapter: Adapter, *, as_json: bool) -> None:
    if as_json:
        print_json(adapter)
        return
    version = adapter.current
    pin = f"{adapter.pin.level}, until {adapter.pin.expire_time or 'unpinned'}" if adapter.pin else "none"
    rows = {
        "name": adapter.name,
        "ids": ", ".join(map(str, adapter.ids)),
        "path": adapter.path,
        "digest": version.digest,
        "state": version.state,
        "size": size_text(version.size_bytes),
        "default scale": f"{adapter.default_scale:g}",
        "pin": pin,
        "versions": str(len(adapter.versions)),
    }
    for component in version.components:
        rows[component.name] = f"{component.num_modules} modules, rank {_range(component.min_rank, component.max_rank)}"
    if version.trigger_words:
        rows["trigger words"] = ", ".join(version.trigger_words)
    if version.report is not None:
        rows |= _report_rows(version.report)
    for label, value in rows.items():
        print_line(f"{label:<14} {value}")


def _report_rows(report: LoadReport) -> dict[str, str]:
    """What was understood of the files; without what they do not say."""
    suggested = "" if report.suggested_scale is None else f"{report.suggested_scale:g}"
    rows = {
        "dialect": report.dialect,
        "kind": ", ".join(report.kinds) + (" (merged only)" if report.merged_only else ""),
        "alpha": _range(report.min_alpha, report.max_alpha),
        "files": size_text(report.size_bytes),
        "base model": report.base_model,
        "title": report.title,
        "trigger words": ", ".join(report.trigger_words),
        "suggested": suggested and f"scale {suggested}",
    }
    if report.num_unmatched_keys:
        rows["left out"] = f"{report.num_unmatched_keys} tensors: {', '.join(report.unmatched_keys)}"
    rows["warning"] = "; ".join(report.warnings)
    return {label: value for label, value in rows.items() if value}


def _range(low: float, high: float) -> str:
    return f"{low:g}" if low == high else f"{low:g} to {high:g}"
