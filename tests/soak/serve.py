"""`lora-server`, that also writes its books into a file when it gets SIGUSR1: memory, leases, slots, integrity.

python -m tests.soak.serve BOOKS_FILE serve --listen ...

Runs the command itself, with the arguments after the file; nothing of the server is changed.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
import threading
from pathlib import Path
from typing import Any

from lora_server import app, cli

from benchmarks.hostile import core_books


def write_books(core: app.Core, path: Path) -> None:
    """Writes the books of *core* in one piece. Stops the event loop for a moment; call it on that."""
    books: dict[str, Any] = core_books(core) | {"threads": threading.active_count(), "integrity": "right"}
    try:
        core.manager.check_integrity()
        core.engine.call(lambda runner, _: runner.pages.check_integrity()).result(timeout=30)
    except AssertionError as error:
        books["integrity"] = f"wrong: {error}"
    aside = path.with_suffix(".tmp")
    aside.write_text(json.dumps(books))
    os.replace(aside, path)


def main() -> None:
    """See the module's docstring."""
    path = Path(sys.argv.pop(1))
    build_core = app.build_core

    def build(*arguments: Any, **options: Any) -> app.Core:
        core = build_core(*arguments, **options)
        cores.append(core)
        return core

    def on_signal(*_: object) -> None:  # the loop is between two of its callbacks then, and no lock is held
        asyncio.get_running_loop().call_soon_threadsafe(lambda: write_books(cores[-1], path))

    cores: list[app.Core] = []
    app.build_core = build
    signal.signal(signal.SIGUSR1, on_signal)
    cli.main()


if __name__ == "__main__":
    main()
