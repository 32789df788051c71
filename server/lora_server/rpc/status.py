"""Domain errors to gRPC statuses: one table of codes, one form of details, nothing else ever on the wire."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import Any, NoReturn

import grpc
import grpc.aio
from google.protobuf import any_pb2, duration_pb2
from google.rpc import error_details_pb2, status_pb2
from grpc_status import rpc_status

from lora_server.errors import InvalidRequestError, LoraServerError

DOMAIN = "lora-inference"
CODES: dict[str, grpc.StatusCode] = {
    "INVALID_REQUEST": grpc.StatusCode.INVALID_ARGUMENT,
    "ADAPTER_NOT_FOUND": grpc.StatusCode.NOT_FOUND,
    "ADAPTER_SOURCE_NOT_FOUND": grpc.StatusCode.NOT_FOUND,
    "ADAPTER_SOURCE_FORBIDDEN": grpc.StatusCode.PERMISSION_DENIED,
    "ADAPTER_ALREADY_EXISTS": grpc.StatusCode.ALREADY_EXISTS,
    "ADAPTER_PINNED": grpc.StatusCode.FAILED_PRECONDITION,
    "ADAPTER_MALFORMED": grpc.StatusCode.INVALID_ARGUMENT,
    "ADAPTER_INCOMPATIBLE": grpc.StatusCode.FAILED_PRECONDITION,
    "ADAPTER_RANK_TOO_LARGE": grpc.StatusCode.FAILED_PRECONDITION,
    "ADAPTER_FILE_TOO_LARGE": grpc.StatusCode.FAILED_PRECONDITION,
    "ADAPTER_HEADER_TOO_LARGE": grpc.StatusCode.FAILED_PRECONDITION,
    "ADAPTER_TOO_MANY_TENSORS": grpc.StatusCode.FAILED_PRECONDITION,
    "ADAPTER_TOO_MANY_MODULES": grpc.StatusCode.FAILED_PRECONDITION,
    "UPLOADS_DISABLED": grpc.StatusCode.FAILED_PRECONDITION,
    "HUB_UNAVAILABLE": grpc.StatusCode.UNAVAILABLE,
    "UPLOAD_MISMATCH": grpc.StatusCode.INVALID_ARGUMENT,
    "ADAPTER_IN_USE": grpc.StatusCode.FAILED_PRECONDITION,
    "ADAPTER_OUTPUT_NOT_FINITE": grpc.StatusCode.FAILED_PRECONDITION,
    "MODEL_OUTPUT_NOT_FINITE": grpc.StatusCode.INTERNAL,
    "ADAPTER_DIGEST_MISMATCH": grpc.StatusCode.FAILED_PRECONDITION,
    "CACHE_EXHAUSTED": grpc.StatusCode.RESOURCE_EXHAUSTED,
    "QUEUE_FULL": grpc.StatusCode.RESOURCE_EXHAUSTED,
    "GPU_OUT_OF_MEMORY": grpc.StatusCode.RESOURCE_EXHAUSTED,
    "SERVER_NOT_READY": grpc.StatusCode.UNAVAILABLE,
    "SERVER_DRAINING": grpc.StatusCode.UNAVAILABLE,
    "ENGINE_FAILURE": grpc.StatusCode.INTERNAL,
    "RESPONSE_TOO_LARGE": grpc.StatusCode.FAILED_PRECONDITION,
    "REQUEST_DEADLINE_EXCEEDED": grpc.StatusCode.DEADLINE_EXCEEDED,
    "REQUEST_CANCELLED": grpc.StatusCode.CANCELLED,
    "UNAUTHENTICATED": grpc.StatusCode.UNAUTHENTICATED,
    "PERMISSION_DENIED": grpc.StatusCode.PERMISSION_DENIED,
    "STORE_FULL": grpc.StatusCode.RESOURCE_EXHAUSTED,
    "DISK_FULL": grpc.StatusCode.RESOURCE_EXHAUSTED,
    "TOO_MANY_WATCHERS": grpc.StatusCode.RESOURCE_EXHAUSTED,
    "TOO_MANY_CALLS": grpc.StatusCode.RESOURCE_EXHAUSTED,
    "READER_STALLED": grpc.StatusCode.ABORTED,
}
"""The code of every reason, as documented at the values of ErrorReason."""


@dataclass(frozen=True, slots=True)
class Status:
    """How a call ends, as `abort_with_status` takes it."""

    code: grpc.StatusCode
    details: str
    trailing_metadata: tuple[tuple[str, str | bytes], ...] = ()


# A client's gRPC refuses trailing metadata over 8 KiB, and its caller hears of nothing but that. The sentence takes
# up to three times its bytes there (`%E4` for one that is not printable ASCII), and the details a third more.
_MAX_TEXT_BYTES = 900
_MAX_VALUE_BYTES = 300
_MAX_DETAILS_BYTES = 3_600


async def end(context: Any, error: LoraServerError | Status) -> NoReturn:
    """Ends a call with *error*; for a peer that has gone, which cannot be told, as cancelled."""
    try:
        await context.abort_with_status(error if isinstance(error, Status) else as_grpc(error))
    except grpc.aio.AbortError:
        raise
    except grpc.aio.BaseError:
        raise asyncio.CancelledError from None
    raise AssertionError("abort_with_status raises")


def as_grpc(error: LoraServerError) -> Status:
    """Builds the status of an error as gRPC sends it."""
    status = rpc_status.to_status(to_status(error))
    return Status(status.code, status.details, status.trailing_metadata)


def to_status(error: LoraServerError) -> status_pb2.Status:
    """Builds the status of an error: a sentence, one ErrorInfo, BadRequest and RetryInfo where they apply."""
    metadata = {key: _shorten(value, _MAX_VALUE_BYTES) for key, value in error.metadata.items()}
    info = error_details_pb2.ErrorInfo(reason=error.reason, domain=DOMAIN, metadata=metadata)
    number, message = CODES[error.reason].value[0], _shorten(error.message, _MAX_TEXT_BYTES)
    status = status_pb2.Status(code=number, message=message, details=[_pack(info)])
    if error.retry_after_s is not None:
        delay = duration_pb2.Duration()
        delay.FromNanoseconds(int(error.retry_after_s * 1e9))
        status.details.append(_pack(error_details_pb2.RetryInfo(retry_delay=delay)))
    if isinstance(error, InvalidRequestError):
        status.details.append(_pack(_bad_request(error, _MAX_DETAILS_BYTES - status.ByteSize())))
    return status


def _bad_request(error: InvalidRequestError, most_bytes: int) -> error_details_pb2.BadRequest:
    """The faults, the first ones if there is no room for all."""
    bad_request = error_details_pb2.BadRequest()
    for fault in error.faults:
        field, description = (_shorten(text, _MAX_VALUE_BYTES) for text in (fault.field, fault.description))
        bad_request.field_violations.add(field=field, description=description)
        if bad_request.ByteSize() > most_bytes:
            del bad_request.field_violations[-1]
            break
    return bad_request


def _pack(
    message: error_details_pb2.ErrorInfo | error_details_pb2.BadRequest | error_details_pb2.RetryInfo,
) -> any_pb2.Any:
    packed = any_pb2.Any()
    packed.Pack(message)
    return packed


def _shorten(text: str, most_bytes: int) -> str:
    # Lone surrogates, from a file name that is not UTF-8, have no place in a protobuf string.
    clean = text.encode("utf-8", "backslashreplace")
    if len(clean) <= most_bytes:
        return clean.decode("utf-8")
    return clean[: most_bytes - len("...")].decode("utf-8", "ignore") + "..."
