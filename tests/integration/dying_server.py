"""`lora-server` with an engine that dies whenever it has stepped for a request that asks for it by its prompt.

python -m tests.integration.dying_server serve --listen ...

Everything but the fault is the true thing: this runs the command itself, and breaks the engine that it has built.
"""

from __future__ import annotations

from typing import Any

from lora_server import app, cli

DEADLY = "die"
"""The prompt."""


def break_engine(engine: Any) -> None:
    """Lets the engine's thread raise where nothing of one request is at fault: after a step that has succeeded."""
    after_step = engine._after_step

    def dies(launched: Any, seconds: float) -> None:
        if any(member.image.job.request.parameters.prompt == DEADLY for member in launched.members):
            raise SystemError("injected")
        after_step(launched, seconds)

    engine._after_step = dies


def main() -> None:
    """Runs `lora-server` with the arguments of this process."""
    build_core = app.build_core

    def build(*arguments: Any, **options: Any) -> app.Core:
        core = build_core(*arguments, **options)
        break_engine(core.engine)
        return core

    app.build_core = build
    cli.main()


if __name__ == "__main__":
    main()
