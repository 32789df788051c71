"""The command `lora-client`: makes images, manages adapters, asks the server. Human output by default, `--json` else.

Exit codes: 0 ok, 1 other failure, 2 wrong usage or invalid request, 3 not found, 4 unavailable or out of time,
5 refused (forbidden, conflict, precondition), 6 exhausted (queue, cache, memory), 130 interrupted.
"""

from __future__ import annotations

import sys

from lora_client.console import run_command


def main() -> None:
    """The entry point `lora-client`."""
    sys.exit(run_command(_run, _tell))


def _run() -> int | None:
    from lora_client.cli.app import run  # here, so that an interrupt while it is imported ends as one later does

    return run(sys.argv[1:])


def _tell(error: Exception) -> int:
    from lora_client.cli.failures import tell_error

    return tell_error(error)
