"""Errors on the wire: one ErrorInfo, bounded, and never anything internal."""

from __future__ import annotations

from collections.abc import Callable
from urllib.parse import quote

import pytest
from google.rpc import error_details_pb2
from lora_server.errors import (
    AdapterDigestMismatchError,
    AdapterNotFoundError,
    AdapterSourceForbiddenError,
    FieldFault,
    InvalidRequestError,
    LoraServerError,
    QueueFullError,
)
from lora_server.rpc.status import to_status


@pytest.mark.parametrize("letter", ["d", "\u4e2d", "\U0001f600", "\n"])
@pytest.mark.parametrize(
    "make",
    [
        lambda text: InvalidRequestError([FieldFault(text, text)] * 10_000),
        lambda text: AdapterSourceForbiddenError(text),
        lambda text: AdapterDigestMismatchError(text, text, text),
    ],
)
def test_a_status_fits_into_what_clients_take(make: Callable[[str], LoraServerError], letter: str) -> None:
    """Trailing metadata stays below 8 KiB, as gRPC writes it and with Base64, whatever texts are repeated."""
    status = to_status(make(letter * 4096))
    sent = len(quote(status.message, safe=""))
    assert sent + status.ByteSize() * 4 / 3 < 8192 - 256
    assert status.message.isascii() == letter.isascii()


def test_faults_that_fit_are_all_told() -> None:
    """Sixteen faults of common length are in the details, each of them."""
    faults = [
        FieldFault(f"spec.adapters[0].block_scales[{k}].scale", "is 101.0; must be from -100 to 100") for k in range(16)
    ]
    violations = error_details_pb2.BadRequest()
    to_status(InvalidRequestError(faults)).details[1].Unpack(violations)
    assert [each.field for each in violations.field_violations] == [fault.field for fault in faults]


def test_names_that_are_not_utf8_do_not_break_the_border() -> None:
    """A lone surrogate is escaped."""
    assert "udc80" in to_status(AdapterNotFoundError("\udc80")).message


def test_waiting_helps_is_said() -> None:
    """A full queue comes with RetryInfo, beside exactly one ErrorInfo."""
    status = to_status(QueueFullError(3))
    kinds = [detail.TypeName() for detail in status.details]
    assert kinds == ["google.rpc.ErrorInfo", "google.rpc.RetryInfo"]
    info = error_details_pb2.ErrorInfo()
    status.details[0].Unpack(info)
    assert (info.reason, info.domain, info.metadata["max_queued_requests"]) == ("QUEUE_FULL", "lora-inference", "3")
