"""`lora-client top`: a live table of the server on a terminal, a line for each interval elsewhere."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.console import Console, Group
from rich.live import Live
from rich.table import Column, Table
from rich.text import Text

from lora_client.cli.common import Connection, print_json
from lora_client.cli.progress import is_live
from lora_client.console import flush, print_line, printable
from lora_client.types import ServerWatch

_MIB = 1024 * 1024


def top(
    context: typer.Context,
    interval: Annotated[float, typer.Option(help="Seconds between two looks, 0.25 to 3600.")] = 1.0,
    count: Annotated[int | None, typer.Option(help="Ends after so many looks; default: never.", min=1)] = None,
    max_adapters: Annotated[int, typer.Option(help="Most adapters to list.", min=0, max=1000)] = 20,
    json: Annotated[bool, typer.Option("--json", help="Prints a JSON object for each look.")] = False,
) -> None:
    """Shows what the server does: queue, rates, cache, and the adapters that are used most. Ctrl-C ends it."""
    connection: Connection = context.obj
    console = Console()
    with connection.open() as client:
        looks = client.watch_server(interval_s=interval, max_adapters=max_adapters)
        before: ServerWatch | None = None
        live = Live(console=console, auto_refresh=False) if is_live(console) and not json else None
        try:
            if live is not None:
                live.start()
            for seen, now in enumerate(looks, start=1):
                if json:
                    print_json(now)
                elif live is not None:
                    live.update(table(now, before), refresh=True)
                else:
                    print_line(line(now, before))
                flush()
                before = now
                if count is not None and seen >= count:
                    break
        finally:
            if live is not None:
                live.stop()
            looks.close()


def rate(now: ServerWatch, before: ServerWatch | None, counter: str) -> float:
    """The growth of one of the engine's counters a second, since the look before; since the start at the first."""
    earlier = before.engine[counter] if before is not None else 0
    since = before.time if before is not None else now.start_time
    seconds = (now.time - since).total_seconds()
    return (_number(now.engine[counter]) - _number(earlier)) / seconds if seconds > 0 else 0.0


def line(now: ServerWatch, before: ServerWatch | None) -> str:
    """One look on one line, for logs and pipes."""
    queue, cache = now.queue, now.cache
    used = ", ".join(f"{each.name} {each.uses}" for each in now.adapters)
    return (
        f"{now.time:%H:%M:%S} queue {queue['queued_requests']}/{queue['max_queued_requests']}, "
        f"running {queue['running_requests']}, {rate(now, before, 'finished_images'):.2f} images/s, "
        f"{rate(now, before, 'image_steps'):.1f} image steps/s, cached {cache['cached_adapters']}, "
        f"resident {cache['resident_adapters']}, hits {_share(cache['hits'], cache['misses'])}, "
        f"evictions {cache['evictions']}; {used or 'no adapters used'}"
    )


def table(now: ServerWatch, before: ServerWatch | None) -> Group:
    """One look as a picture of the terminal's width."""
    up = now.time - now.start_time
    head = Text(f"{printable(now.model)}   up {str(up).split('.')[0]}   {now.time:%Y-%m-%d %H:%M:%S} UTC", style="bold")
    facts = Table.grid(padding=(0, 3))
    queue, cache, engine = now.queue, now.cache, now.engine
    wait = queue.get("estimated_wait")
    facts.add_row(
        "queue",
        f"{queue['queued_requests']} of {queue['max_queued_requests']} wait, {queue['running_requests']} run, "
        f"{queue['waiting_tenants']} tenants"
        + (f", all done in {_number(str(wait).rstrip('s')):.1f} s" if wait else ""),
    )
    facts.add_row(
        "rate",
        f"{rate(now, before, 'finished_images'):.2f} images/s, {rate(now, before, 'image_steps'):.1f} image steps/s, "
        f"{rate(now, before, 'failed_requests'):.2f} failures/s",
    )
    ways = (f"{way} {rate(now, before, f'{way}_steps'):.1f}" for way in ("base", "merged", "slots"))
    facts.add_row("steps/s", f"{', '.join(ways)}; {rate(now, before, 'switches'):.1f} switches/s")
    facts.add_row(
        "host cache",
        f"{cache['cached_adapters']} of {cache['max_adapters']} adapters, "
        f"{_number(cache['used_bytes']) / _MIB:.0f} of {_number(cache['budget_bytes']) / _MIB:.0f} MiB, "
        f"hits {_share(cache['hits'], cache['misses'])}, {cache['evictions']} evictions, "
        f"{cache['pinned_adapters']} pins, {cache['leases']} leases",
    )
    facts.add_row(
        "device",
        f"{cache['resident_adapters']} of {cache['device_slots']} slots, "
        f"hits {_share(cache['device_hits'], cache['device_misses'])}, {cache['device_evictions']} evictions",
    )
    facts.add_row(
        "done",
        f"{engine['finished_requests']} requests, {engine['failed_requests']} failed, {engine['restarts']} restarts",
    )
    adapters = Table(Column("adapter", overflow="fold"), "uses", "state", "pinned", box=None, header_style="bold")
    for each in now.adapters:
        adapters.add_row(
            Text(printable(each.name)), str(each.uses), Text(printable(each.state)), "yes" if each.pinned else ""
        )
    return Group(head, facts, Text(""), adapters)


def _share(hits: object, misses: object) -> str:
    total = _number(hits) + _number(misses)
    return f"{_number(hits) / total:.0%}" if total else "-"


def _number(value: object) -> float:
    return float(str(value))
