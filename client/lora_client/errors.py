"""The client's exceptions: one class a reason of the contract.

LoraClientError
├── InvalidRequestError, ResponseTooLargeError
├── AdapterError
│   ├── AdapterNotFoundError, AdapterSourceNotFoundError, AdapterSourceForbiddenError
│   ├── AdapterAlreadyExistsError, AdapterPinnedError, AdapterInUseError, AdapterDigestMismatchError
│   ├── AdapterMalformedError, AdapterIncompatibleError
│   └── AdapterRankTooLargeError, AdapterFileTooLargeError, AdapterHeaderTooLargeError, AdapterTooManyTensorsError,
│       AdapterTooManyModulesError, UploadsDisabledError, UploadMismatchError, HubUnavailableError,
│       AdapterOutputNotFiniteError
├── ExhaustedError: CacheExhaustedError, StoreFullError, DiskFullError, QueueFullError, GpuOutOfMemoryError,
│       TooManyWatchersError, TooManyCallsError
├── UnavailableError: ServerNotReadyError, ServerDrainingError (and a server that cannot be reached)
├── UnauthenticatedError, PermissionDeniedError
├── DeadlineExceededError, RequestCancelledError
├── EngineFailureError: ModelOutputNotFiniteError; ReaderStalledError
└── ProtocolError (the server broke the contract)
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from google.rpc import error_details_pb2
from grpc_status import rpc_status


@dataclass(frozen=True, slots=True)
class FieldFault:
    """One fault of one request field."""

    field: str
    description: str


class LoraClientError(Exception):
    """Base of everything the client raises for a call.

    Attributes:
        code: The canonical code, such as `NOT_FOUND`.
        reason: The contract's reason, such as `ADAPTER_NOT_FOUND`; empty if the server gave none.
        metadata: The reason's facts.
        field_faults: The faults of an invalid request.
        retry_after_s: After how long trying again may help, or None.
    """

    def __init__(
        self,
        message: str,
        *,
        code: str = "UNKNOWN",
        reason: str = "",
        metadata: Mapping[str, str] | None = None,
        field_faults: tuple[FieldFault, ...] = (),
        retry_after_s: float | None = None,
    ) -> None:
        super().__init__(message)
        self.code = code
        self.reason = reason
        self.metadata = dict(metadata or {})
        self.field_faults = field_faults
        self.retry_after_s = retry_after_s


class InvalidRequestError(LoraClientError):
    """Request fields are invalid."""


class ResponseTooLargeError(LoraClientError):
    """A unary response could exceed its limit."""


class AdapterError(LoraClientError):
    """Something is wrong with an adapter."""


class AdapterNotFoundError(AdapterError):
    """No such adapter is registered."""


class AdapterSourceNotFoundError(AdapterError):
    """The source cannot be read."""


class AdapterSourceForbiddenError(AdapterError):
    """The source is not under an adapter root of the server."""


class AdapterAlreadyExistsError(AdapterError):
    """The name or id belongs to another source."""


class AdapterPinnedError(AdapterError):
    """The adapter is pinned."""


class AdapterInUseError(AdapterError):
    """A running request uses the adapter."""


class AdapterDigestMismatchError(AdapterError):
    """The adapter is another version than expected."""


class AdapterMalformedError(AdapterError):
    """The files are no valid adapter."""


class AdapterIncompatibleError(AdapterError):
    """The adapter does not fit the model."""


class AdapterOutputNotFiniteError(AdapterError):
    """With the adapters that the metadata names, a network gave values that are not finite."""


class AdapterRankTooLargeError(AdapterError):
    """The adapter's rank is too large."""


class AdapterFileTooLargeError(AdapterError):
    """One of the adapter's files exceeds the server's limit."""


class AdapterHeaderTooLargeError(AdapterError):
    """The header of one of the adapter's files exceeds the server's limit."""


class AdapterTooManyTensorsError(AdapterError):
    """The adapter has more tensors than the server takes."""


class AdapterTooManyModulesError(AdapterError):
    """The adapter changes more modules than the server takes."""


class UploadsDisabledError(AdapterError):
    """The server has no state directory to keep uploads in."""


class UploadMismatchError(AdapterError):
    """An upload's bytes are not those of its manifest."""


class HubUnavailableError(AdapterError):
    """The server cannot ask the Hugging Face hub."""


class ExhaustedError(LoraClientError):
    """The server has no room."""


class CacheExhaustedError(ExhaustedError):
    """The adapter cannot fit beside what is pinned."""


class StoreFullError(ExhaustedError):
    """The server's store of uploads and pinned adapters would be larger than it may."""


class DiskFullError(ExhaustedError):
    """The server's disk has no room for the files."""


class QueueFullError(ExhaustedError):
    """Too many requests wait."""


class TooManyWatchersError(ExhaustedError):
    """Too many streams watch the server."""


class TooManyCallsError(ExhaustedError):
    """More calls or answers than the server holds for one connection; `retry_after_s` says when to try again."""


class ReaderStalledError(LoraClientError):
    """The caller took nothing of a stream for so long that the server let go of it."""


class GpuOutOfMemoryError(ExhaustedError):
    """The device ran out of memory."""


class UnavailableError(LoraClientError):
    """The server cannot be reached, or takes no work."""


class ServerNotReadyError(UnavailableError):
    """The server is still loading."""


class ServerDrainingError(UnavailableError):
    """The server is shutting down."""


class DeadlineExceededError(LoraClientError):
    """The deadline passed."""


class RequestCancelledError(LoraClientError):
    """The request was cancelled."""


class UnauthenticatedError(LoraClientError):
    """The server wants a token that it knows."""


class PermissionDeniedError(LoraClientError):
    """The token does not have the role that the call needs."""


class EngineFailureError(LoraClientError):
    """The server failed."""


class ModelOutputNotFiniteError(EngineFailureError):
    """The model itself gave values that are not finite."""


class ProtocolError(LoraClientError):
    """The server broke the contract: bytes are missing, or differ from their checksum."""


REASONS: dict[str, type[LoraClientError]] = {
    "INVALID_REQUEST": InvalidRequestError,
    "ADAPTER_NOT_FOUND": AdapterNotFoundError,
    "ADAPTER_SOURCE_NOT_FOUND": AdapterSourceNotFoundError,
    "ADAPTER_SOURCE_FORBIDDEN": AdapterSourceForbiddenError,
    "ADAPTER_ALREADY_EXISTS": AdapterAlreadyExistsError,
    "ADAPTER_PINNED": AdapterPinnedError,
    "ADAPTER_MALFORMED": AdapterMalformedError,
    "ADAPTER_INCOMPATIBLE": AdapterIncompatibleError,
    "ADAPTER_RANK_TOO_LARGE": AdapterRankTooLargeError,
    "ADAPTER_FILE_TOO_LARGE": AdapterFileTooLargeError,
    "ADAPTER_HEADER_TOO_LARGE": AdapterHeaderTooLargeError,
    "ADAPTER_TOO_MANY_TENSORS": AdapterTooManyTensorsError,
    "ADAPTER_TOO_MANY_MODULES": AdapterTooManyModulesError,
    "UPLOADS_DISABLED": UploadsDisabledError,
    "UPLOAD_MISMATCH": UploadMismatchError,
    "STORE_FULL": StoreFullError,
    "DISK_FULL": DiskFullError,
    "HUB_UNAVAILABLE": HubUnavailableError,
    "ADAPTER_IN_USE": AdapterInUseError,
    "ADAPTER_DIGEST_MISMATCH": AdapterDigestMismatchError,
    "ADAPTER_OUTPUT_NOT_FINITE": AdapterOutputNotFiniteError,
    "MODEL_OUTPUT_NOT_FINITE": ModelOutputNotFiniteError,
    "CACHE_EXHAUSTED": CacheExhaustedError,
    "QUEUE_FULL": QueueFullError,
    "GPU_OUT_OF_MEMORY": GpuOutOfMemoryError,
    "SERVER_NOT_READY": ServerNotReadyError,
    "SERVER_DRAINING": ServerDrainingError,
    "ENGINE_FAILURE": EngineFailureError,
    "RESPONSE_TOO_LARGE": ResponseTooLargeError,
    "REQUEST_DEADLINE_EXCEEDED": DeadlineExceededError,
    "REQUEST_CANCELLED": RequestCancelledError,
    "UNAUTHENTICATED": UnauthenticatedError,
    "PERMISSION_DENIED": PermissionDeniedError,
    "TOO_MANY_WATCHERS": TooManyWatchersError,
    "TOO_MANY_CALLS": TooManyCallsError,
    "READER_STALLED": ReaderStalledError,
}
"""The class of every reason of the contract."""

_BY_CODE: dict[str, type[LoraClientError]] = {
    "INVALID_ARGUMENT": InvalidRequestError,
    "NOT_FOUND": AdapterNotFoundError,
    "RESOURCE_EXHAUSTED": ExhaustedError,
    "UNAVAILABLE": UnavailableError,
    "DEADLINE_EXCEEDED": DeadlineExceededError,
    "CANCELLED": RequestCancelledError,
    "UNAUTHENTICATED": UnauthenticatedError,
    "PERMISSION_DENIED": PermissionDeniedError,
    "INTERNAL": EngineFailureError,
}


def from_rpc_error(error: Any) -> LoraClientError:
    """Turns an error of gRPC into the client's; an unknown reason is treated like its canonical code."""
    code, message = error.code().name, error.details() or ""
    info, bad_request, retry = _details(error)
    reason = info.reason if info else ""
    cls = REASONS.get(reason) or _BY_CODE.get(code, LoraClientError)
    faults = tuple(FieldFault(each.field, each.description) for each in bad_request.field_violations)
    return cls(
        message or code,
        code=code,
        reason=reason,
        metadata=info.metadata if info else {},
        field_faults=faults,
        retry_after_s=retry.retry_delay.ToNanoseconds() / 1e9 if retry else None,
    )


def _details(
    error: Any,
) -> tuple[error_details_pb2.ErrorInfo | None, error_details_pb2.BadRequest, error_details_pb2.RetryInfo | None]:
    info, bad_request, retry = None, error_details_pb2.BadRequest(), None
    try:
        status = rpc_status.from_call(error)
    except (ValueError, AttributeError):  # details that contradict the status
        status = None
    for detail in status.details if status is not None else ():
        if detail.Is(error_details_pb2.ErrorInfo.DESCRIPTOR):
            info = error_details_pb2.ErrorInfo()
            detail.Unpack(info)
        elif detail.Is(error_details_pb2.BadRequest.DESCRIPTOR):
            detail.Unpack(bad_request)
        elif detail.Is(error_details_pb2.RetryInfo.DESCRIPTOR):
            retry = error_details_pb2.RetryInfo()
            detail.Unpack(retry)
    return info, bad_request, retry
