"""`lora-client adapters list` as text: one line an adapter, one word a column, no name ever cut."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Sequence

from lora_client.console import print_line, printable
from lora_client.types import Adapter

_COLUMNS = ("name", "state", "rank", "size", "scale", "pin", "components", "ids", "digest")
_LEFT_OUT = ("digest", "ids", "components")
"""What a narrow terminal does without, the first first."""
_SHOWN_DIGEST = slice(7, 19)
"""The digits that tell digests apart to a person."""


def print_adapters(adapters: Sequence[Adapter]) -> None:
    """Prints a table: whole values for pipes and files, as many columns as fit for a terminal."""
    is_terminal = sys.stdout.isatty()
    columns = list(_COLUMNS)
    rows = [_row(each, short=is_terminal) for each in adapters]
    widths = {name: max([len(name), *(len(row[name]) for row in rows)]) for name in columns}
    if is_terminal:
        room = shutil.get_terminal_size().columns
        for name in _LEFT_OUT:
            if sum(widths[each] + 2 for each in columns) - 2 > room:
                columns.remove(name)
    for row in ({name: name for name in columns}, *rows):
        print_line("  ".join(row[name].ljust(widths[name]) for name in columns).rstrip())


def size_text(size_bytes: int) -> str:
    """Returns a size as one word, such as `1.5MiB`."""
    size = float(size_bytes)
    for unit in ("B", "KiB", "MiB"):
        if size < 1024:
            return f"{size:.0f}{unit}" if unit == "B" else f"{size:.1f}{unit}"
        size /= 1024
    return f"{size:.1f}GiB"


def _row(adapter: Adapter, *, short: bool) -> dict[str, str]:
    version = adapter.current
    values = (
        adapter.name,
        version.state,
        str(version.rank),
        size_text(version.size_bytes),
        f"{adapter.default_scale:g}",
        adapter.pin.level if adapter.pin else "",
        ",".join(component.name for component in version.components),
        ",".join(map(str, adapter.ids)),
        version.digest[_SHOWN_DIGEST] if short else version.digest,
    )
    return {name: printable(value).replace(" ", "_") or "-" for name, value in zip(_COLUMNS, values, strict=True)}
