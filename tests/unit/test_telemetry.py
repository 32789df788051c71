"""Logs: what is in a line, and what never is."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import structlog
from lora_server.telemetry import LogFormat, configure_logging

SECRET = "a prompt that is nobody's business"


@pytest.fixture(autouse=True)
def restored() -> Iterator[None]:
    """structlog as it was."""
    before = structlog.get_config()
    yield
    structlog.configure(**before)


@pytest.mark.parametrize("log_format", ["console", "json"])
def test_a_traceback_has_no_values(log_format: LogFormat, capsys: pytest.CaptureFixture[str]) -> None:
    """Frames of an unexpected error hold prompts and tokens: the log names functions and lines only."""
    configure_logging("info", log_format)

    def handle(prompt: str) -> int:
        held = {"prompt": prompt}
        return len(held) // 0

    try:
        handle(SECRET)
    except ZeroDivisionError:
        structlog.get_logger().exception("a call failed")
    logged = capsys.readouterr().err
    assert "ZeroDivisionError" in logged
    assert "handle" in logged
    assert SECRET not in logged


def test_an_unknown_level_is_named() -> None:
    """With what there is."""
    with pytest.raises(ValueError, match="'loud'; choose one of debug, info"):
        configure_logging("loud")
