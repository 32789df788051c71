"""Logs: what is in a line, and what never is."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import structlog
from lora_server.telemetry.logs import LogFormat, configure_logging

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


def test_no_control_reaches_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    """Names and messages come from files and callers; an escape sequence in one is shown as text."""
    configure_logging("info", "console")
    hostile = "\x1b]52;c;b3duZWQ=\x07\x9b31m\u202e\r\nforged line"
    try:
        raise ValueError(hostile)
    except ValueError:
        structlog.get_logger().exception(f"event {hostile}", name=hostile)
    logged = capsys.readouterr().err
    assert not set(logged) & set("\x1b\x07\x9b\u202e\r")
    assert "\\x1b]52" in logged
    assert not any(line.startswith("forged") for line in logged.splitlines()[:1])


@pytest.mark.parametrize("log_format", ["console", "json"])
def test_a_long_value_is_cut(log_format: LogFormat, capsys: pytest.CaptureFixture[str]) -> None:
    """No request makes a line of megabytes; beginning and end stay, and the length is said."""
    configure_logging("info", log_format)
    structlog.get_logger().info("refused", message="a" + "x" * 4_000_000 + "z")
    logged = capsys.readouterr().err
    assert len(logged) < 10_000
    assert "(4000002 characters)" in logged
    assert "xz" in logged
