"""What is repeated of a caller's values is bounded: in errors, and in every line of the log."""

from __future__ import annotations

import json

import pytest
import structlog
from lora_server.errors import (
    AdapterMalformedError,
    AdapterNotFoundError,
    AdapterSourceForbiddenError,
    FieldFault,
    InvalidRequestError,
    UploadMismatchError,
)
from lora_server.telemetry.logs import configure_logging

LONG = "x" * 4_000_000


@pytest.mark.parametrize(
    "error",
    [
        AdapterNotFoundError(LONG),
        AdapterSourceForbiddenError(LONG),
        AdapterMalformedError(LONG, LONG, LONG),
        UploadMismatchError(LONG, LONG, LONG),
        InvalidRequestError([FieldFault(LONG, LONG)] * 3),
        InvalidRequestError([FieldFault("f", "d" * 100)] * 100_000),
    ],
    ids=lambda error: error.reason,
)
def test_an_error_is_short_whatever_it_repeats(error: AdapterNotFoundError) -> None:
    """Its message and each of its facts."""
    assert len(str(error)) <= 4_000
    assert all(len(value) <= 1_000 for value in error.metadata.values())


def test_that_there_are_more_faults_than_are_told_is_told() -> None:
    """So that nobody believes to have mended all."""
    assert "has more faults than these 16" in str(InvalidRequestError([FieldFault("f", "d")] * 20))


@pytest.mark.parametrize("value", [LONG, LONG.encode(), [LONG] * 100, {"a": LONG}, [[LONG] * 100] * 100])
def test_a_line_of_the_log_is_short(value: object, capsys: pytest.CaptureFixture[str]) -> None:
    """Texts, lists and mappings, as the log is set up for the process."""
    configure_logging("info", "json")
    try:
        structlog.get_logger().info("request", value=value, count=3)
    finally:
        structlog.reset_defaults()
    line = capsys.readouterr().err
    assert len(line) < 500_000
    assert (json.loads(line)["event"], json.loads(line)["count"]) == ("request", 3)
