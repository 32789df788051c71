"""Errors on the wire: one ErrorInfo, bounded, and never anything internal."""

from __future__ import annotations

from google.rpc import error_details_pb2
from lora_server.errors import AdapterNotFoundError, FieldFault, InvalidRequestError, QueueFullError
from lora_server.rpc.status import to_status


def test_a_status_never_exceeds_the_metadata_limit() -> None:
    """Ten thousand long faults still fit into 16 KB of trailing metadata."""
    status = to_status(InvalidRequestError([FieldFault("f" * 1000, "d" * 1000)] * 10_000))
    assert status.ByteSize() < 14_000


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
