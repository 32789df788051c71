"""The exceptions of the house: one class a reason, raised with facts, never with prose.

    LoraServerError
    ├── InvalidRequestError            INVALID_REQUEST
    ├── ResponseTooLargeError          RESPONSE_TOO_LARGE
    ├── AdapterError
    │   ├── AdapterNotFoundError       ADAPTER_NOT_FOUND
    │   ├── AdapterSourceNotFoundError ADAPTER_SOURCE_NOT_FOUND
    │   ├── AdapterSourceForbiddenError ADAPTER_SOURCE_FORBIDDEN
    │   ├── AdapterAlreadyExistsError  ADAPTER_ALREADY_EXISTS
    │   ├── AdapterPinnedError         ADAPTER_PINNED
    │   ├── AdapterMalformedError      ADAPTER_MALFORMED
    │   │   └── AdapterChangingError
    │   ├── AdapterIncompatibleError   ADAPTER_INCOMPATIBLE
    │   ├── AdapterRankTooLargeError   ADAPTER_RANK_TOO_LARGE
    │   ├── AdapterFileTooLargeError   ADAPTER_FILE_TOO_LARGE
    │   ├── AdapterHeaderTooLargeError ADAPTER_HEADER_TOO_LARGE
    │   ├── AdapterTooManyTensorsError ADAPTER_TOO_MANY_TENSORS
    │   ├── AdapterTooManyModulesError ADAPTER_TOO_MANY_MODULES
    │   ├── UploadsDisabledError       UPLOADS_DISABLED
    │   ├── UploadMismatchError        UPLOAD_MISMATCH
    │   ├── HubUnavailableError        HUB_UNAVAILABLE
    │   ├── AdapterInUseError          ADAPTER_IN_USE
    │   ├── AdapterOutputNotFiniteError ADAPTER_OUTPUT_NOT_FINITE
    │   └── AdapterDigestMismatchError ADAPTER_DIGEST_MISMATCH
    ├── CacheExhaustedError            CACHE_EXHAUSTED
    │   └── PinsExhaustedError
    ├── StoreFullError                 STORE_FULL
    ├── DiskFullError                  DISK_FULL
    ├── QueueFullError                 QUEUE_FULL
    │   ├── WaitTooLongError
    │   └── UnreadImagesError
    ├── TooManyUploadsError            QUEUE_FULL
    ├── UnauthenticatedError           UNAUTHENTICATED
    ├── PermissionDeniedError          PERMISSION_DENIED
    ├── TooManyWatchersError           TOO_MANY_WATCHERS
    ├── TooManyCallsError              TOO_MANY_CALLS
    ├── ReaderStalledError             READER_STALLED
    ├── DeviceOutOfMemoryError         GPU_OUT_OF_MEMORY
    ├── ModelOutputNotFiniteError      MODEL_OUTPUT_NOT_FINITE
    ├── ServerNotReadyError            SERVER_NOT_READY
    ├── ServerDrainingError            SERVER_DRAINING
    ├── DeadlineExceededError          REQUEST_DEADLINE_EXCEEDED
    ├── RequestCancelledError          REQUEST_CANCELLED
    └── EngineFailureError             ENGINE_FAILURE
        ├── StateNotSavedError
        └── StorageFailedError

`reason` is the name of a value of the contract's enum ErrorReason; `rpc/status` maps it to a canonical code.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import ClassVar

from lora_server.bounds import MAX_MESSAGE_CHARS, MAX_VALUE_CHARS, shorten

_DIGEST_CHARS = len("sha256:") + 12
"""So much of a digest is enough for people; machines get the whole."""


class LoraServerError(Exception):
    """Base of all errors that a caller may see.

    Attributes:
        reason: Name of the value of ErrorReason.
        metadata: Facts for machines; keys as documented at the reason.
        retry_after_s: After how long trying again may help, or None if it does not.
    """

    reason: ClassVar[str]
    retry_after_s: float | None = None

    def __init__(self, message: str, **metadata: object) -> None:
        """What is repeated of a caller's values is cut, wherever it comes from."""
        super().__init__(shorten(message, MAX_MESSAGE_CHARS))
        self.metadata = {key: shorten(str(value), MAX_VALUE_CHARS) for key, value in metadata.items()}

    @property
    def message(self) -> str:
        """One actionable sentence for a person."""
        return str(self)


@dataclass(frozen=True, slots=True)
class FieldFault:
    """One fault of one request field; *field* is its path, such as ``spec.adapters[1].scale``."""

    field: str
    description: str


MAX_FAULTS = 16
"""How many faults of a request are told at once: a request may have millions."""


class InvalidRequestError(LoraServerError):
    """Request fields are invalid; tells the first 16 of *faults* and whether there are more, and makes no others."""

    reason = "INVALID_REQUEST"

    def __init__(self, faults: Iterable[FieldFault]) -> None:
        found = iter(faults)
        told = [_shortened(fault) for fault in islice(found, MAX_FAULTS)]
        if next(found, None) is not None:
            told.append(FieldFault("request", f"has more faults than these {MAX_FAULTS}"))
        listed = "; ".join(f"{fault.field}: {fault.description}" for fault in told)
        super().__init__(f"Invalid request: {listed}.", fields=",".join(fault.field for fault in told))
        self.faults = tuple(told)


def _shortened(fault: FieldFault) -> FieldFault:
    return FieldFault(shorten(fault.field, MAX_VALUE_CHARS), shorten(fault.description, MAX_VALUE_CHARS))


class ResponseTooLargeError(LoraServerError):
    """A unary response could exceed what its caller can receive."""

    reason = "RESPONSE_TOO_LARGE"

    def __init__(self, possible_bytes: int, max_response_bytes: int) -> None:
        super().__init__(
            f"The images may take {possible_bytes} bytes, over max_response_bytes = {max_response_bytes}; "
            "use StreamGenerate, ask for fewer or smaller images, or raise max_response_bytes and your receive limit.",
            possible_bytes=possible_bytes,
            max_response_bytes=max_response_bytes,
        )


class AdapterError(LoraServerError):
    """Base of what is wrong with an adapter."""


class AdapterNotFoundError(AdapterError):
    """No adapter is registered under this name, id or digest."""

    reason = "ADAPTER_NOT_FOUND"

    def __init__(self, adapter: str | int) -> None:
        super().__init__(f"No adapter {adapter!r} is registered; load it first, or name its path.", adapter=adapter)


class AdapterSourceNotFoundError(AdapterError):
    """The path does not exist, is not readable, or is not a folder that holds an adapter."""

    reason = "ADAPTER_SOURCE_NOT_FOUND"

    def __init__(self, path: str, detail: str = "no such file or folder") -> None:
        super().__init__(f"Cannot read the adapter {path!r}: {detail}.", path=path)


class AdapterSourceForbiddenError(AdapterError):
    """The path leads out of every adapter root, or names a kind of source that is off."""

    reason = "ADAPTER_SOURCE_FORBIDDEN"

    def __init__(self, path: str, detail: str = "is not under an --adapter-root of this server") -> None:
        super().__init__(f"The path {path!r} {detail}.", path=path)


class AdapterAlreadyExistsError(AdapterError):
    """The name or id belongs to another source."""

    reason = "ADAPTER_ALREADY_EXISTS"

    def __init__(self, adapter: str | int, source: str) -> None:
        super().__init__(
            f"Adapter {adapter!r} already belongs to the source {source!r}; choose another, or load with replace.",
            adapter=adapter,
        )


class AdapterPinnedError(AdapterError):
    """The adapter is pinned."""

    reason = "ADAPTER_PINNED"

    def __init__(self, adapter: str) -> None:
        super().__init__(f"Adapter {adapter!r} is pinned; unpin it first.", adapter=adapter)


class AdapterMalformedError(AdapterError):
    """The files are no valid adapter; *key* names the first offending tensor, field or file, if one is at fault."""

    reason = "ADAPTER_MALFORMED"

    def __init__(self, path: str, detail: str, key: str = "") -> None:
        where = f" at {key!r}" if key else ""
        super().__init__(f"The adapter {path!r} is malformed{where}: {detail}.", path=path, key=key)


class AdapterChangingError(AdapterMalformedError):
    """The adapter's files are being written: no version of them can be read yet."""

    retry_after_s = 1.0

    def __init__(self, path: str) -> None:
        super().__init__(path, "its files are being written; try again when that is done")


class AdapterIncompatibleError(AdapterError):
    """The adapter is valid but does not fit the served model; *key* names the first offending tensor or field.

    *families* are the adapter's and the model's, by name, if the adapter is known to be for another one.
    """

    reason = "ADAPTER_INCOMPATIBLE"

    def __init__(
        self, path: str, model: str, detail: str, key: str = "", families: tuple[str, str] | None = None
    ) -> None:
        where = f" at {key!r}" if key else ""
        facts = {"path": path, "key": key, "model": model}
        message = f"The adapter {path!r} does not fit the model {model!r}{where}: {detail}."
        if families is not None:
            facts |= {"adapter_family": families[0], "model_family": families[1]}
            message = (
                f"The adapter {path!r} is for {families[0]}; the model {model!r} is {families[1]}: use an adapter "
                f"that was trained on {families[1]} ({key!r}: {detail})."
            )
        super().__init__(message, **facts)


class AdapterRankTooLargeError(AdapterError):
    """The adapter's rank exceeds the configured limit."""

    reason = "ADAPTER_RANK_TOO_LARGE"

    def __init__(self, path: str, rank: int, max_rank: int) -> None:
        super().__init__(
            f"The adapter {path!r} has rank {rank}; this server takes at most {max_rank} (--max-rank).",
            path=path,
            rank=rank,
            max_rank=max_rank,
        )


class AdapterFileTooLargeError(AdapterError):
    """One of the adapter's files exceeds the configured limit."""

    reason = "ADAPTER_FILE_TOO_LARGE"

    def __init__(self, path: str, key: str, size_bytes: int, max_bytes: int) -> None:
        super().__init__(
            f"The adapter {path!r} has a file {key!r} of {size_bytes} bytes; this server takes at most {max_bytes} "
            "(--max-adapter-file-bytes).",
            path=path,
            key=key,
            size_bytes=size_bytes,
            max_bytes=max_bytes,
        )


class AdapterHeaderTooLargeError(AdapterError):
    """The header of a safetensors file exceeds the configured limit."""

    reason = "ADAPTER_HEADER_TOO_LARGE"

    def __init__(self, path: str, header_bytes: int, max_bytes: int) -> None:
        super().__init__(
            f"The adapter {path!r} has a header of {header_bytes} bytes; this server takes at most {max_bytes} "
            "(--max-adapter-header-bytes).",
            path=path,
            header_bytes=header_bytes,
            max_bytes=max_bytes,
        )


class AdapterTooManyTensorsError(AdapterError):
    """A file has more tensors than the configured limit."""

    reason = "ADAPTER_TOO_MANY_TENSORS"

    def __init__(self, path: str, tensors: int, max_tensors: int) -> None:
        super().__init__(
            f"The adapter {path!r} has {tensors} tensors; this server takes at most {max_tensors} "
            "(--max-adapter-tensors).",
            path=path,
            tensors=tensors,
            max_tensors=max_tensors,
        )


class AdapterTooManyModulesError(AdapterError):
    """The adapter changes more modules than the configured limit."""

    reason = "ADAPTER_TOO_MANY_MODULES"

    def __init__(self, path: str, modules: int, max_modules: int) -> None:
        super().__init__(
            f"The adapter {path!r} changes {modules} modules; this server takes at most {max_modules} "
            "(--max-adapter-modules).",
            path=path,
            modules=modules,
            max_modules=max_modules,
        )


class UploadsDisabledError(AdapterError):
    """The server has nowhere to keep files."""

    reason = "UPLOADS_DISABLED"

    def __init__(self) -> None:
        super().__init__("This server keeps no uploads; start it with --state-dir, or load the adapter from a path.")


class UploadMismatchError(AdapterError):
    """What arrived of an upload's file *path* is not what its manifest promised."""

    reason = "UPLOAD_MISMATCH"

    def __init__(self, path: str, expected: str, actual: str) -> None:
        super().__init__(
            f"The upload of {path!r} broke: expected {expected}, got {actual}; nothing was kept, send it again.",
            path=path,
            expected=expected,
            actual=actual,
        )


class HubUnavailableError(AdapterError):
    """The Hugging Face hub cannot be asked."""

    reason = "HUB_UNAVAILABLE"
    retry_after_s = 10.0

    def __init__(self, repo_id: str) -> None:
        super().__init__(
            f"The hub cannot be asked about {repo_id!r}, and the server did not fetch it before; try again later.",
            repo_id=repo_id,
        )


class AdapterInUseError(AdapterError):
    """A running request leases the adapter."""

    reason = "ADAPTER_IN_USE"
    retry_after_s = 1.0

    def __init__(self, adapter: str) -> None:
        super().__init__(f"Adapter {adapter!r} is in use by a running request; wait, or drain it.", adapter=adapter)


class AdapterDigestMismatchError(AdapterError):
    """The adapter is not the version that the request expects."""

    reason = "ADAPTER_DIGEST_MISMATCH"

    def __init__(self, adapter: str, expected: str, actual: str) -> None:
        super().__init__(
            f"Adapter {adapter!r} is {actual}, not the expected {expected}.",
            adapter=adapter,
            expected=expected,
            actual=actual,
        )


class CacheExhaustedError(LoraServerError):
    """What is needed can never fit beside what is pinned. The cache is unchanged."""

    reason = "CACHE_EXHAUSTED"

    def __init__(self, what: str, needed: int, evictable: int) -> None:
        super().__init__(
            f"The adapter cache cannot hold {needed} more {what}: only {evictable} are not pinned; "
            "unpin adapters or enlarge the cache.",
            **{f"needed_{what}": needed, f"evictable_{what}": evictable},
        )


class StoreFullError(LoraServerError):
    """Files would make the server's store larger than it may be; nothing was kept."""

    reason = "STORE_FULL"

    def __init__(self, needed_bytes: int, used_bytes: int, max_bytes: int, flag: str = "--max-store-bytes") -> None:
        super().__init__(
            f"The server's store has {used_bytes} of at most {max_bytes} bytes, so {needed_bytes} more do not fit; "
            f"unload or unpin adapters, or raise {flag}.",
            needed_bytes=needed_bytes,
            used_bytes=used_bytes,
            max_bytes=max_bytes,
        )


class DiskFullError(LoraServerError):
    """The disk would have less free than it must; nothing was kept."""

    reason = "DISK_FULL"

    def __init__(self, needed_bytes: int, free_bytes: int, min_free_bytes: int) -> None:
        super().__init__(
            f"The server's disk has {free_bytes} bytes free, of which {min_free_bytes} must stay so, and "
            f"{needed_bytes} more do not fit; free some, or lower --min-free-disk-bytes.",
            needed_bytes=needed_bytes,
            free_bytes=free_bytes,
            min_free_bytes=min_free_bytes,
        )


class PinsExhaustedError(CacheExhaustedError):
    """One more pin would leave too little that can be evicted; *pinned* names what is pinned. Nothing is changed."""

    def __init__(self, what: str, needed: int, left: int, pinned: Sequence[str]) -> None:
        LoraServerError.__init__(
            self,
            f"Cannot pin {needed} more {what}: pins may take {left} more, and part of the cache always stays free of "
            f"them; pinned are {', '.join(pinned) or 'none'}. Unpin some, or enlarge the cache.",
            **{f"needed_{what}": needed, f"evictable_{what}": left, "pinned": ",".join(pinned)},
        )
        self._facts = what, needed, left

    def without_names(self) -> CacheExhaustedError:
        """Returns the same error for those who must not know what is pinned."""
        return CacheExhaustedError(*self._facts)


class QueueFullError(LoraServerError):
    """The queue holds as many requests as it may: of all tenants, or of this one.

    *retry_after_s* is when a place should be free, by the measured rate.
    """

    reason = "QUEUE_FULL"

    def __init__(
        self, max_queued_requests: int, retry_after_s: float = 1.0, *, max_queued_per_tenant: int | None = None
    ) -> None:
        facts = {"max_queued_requests": max_queued_requests}
        whose = f"The queue is full ({max_queued_requests} requests)"
        if max_queued_per_tenant is not None:
            facts["max_queued_per_tenant"] = max_queued_per_tenant
            whose = f"As many of your requests wait as may ({max_queued_per_tenant})"
        super().__init__(f"{whose}; try again in {retry_after_s:.1f} s.", **facts)
        self.retry_after_s = retry_after_s


class WaitTooLongError(QueueFullError):
    """The work before the request takes longer than it may, or than the request's deadline leaves."""

    def __init__(self, expected_wait_s: float, max_wait_s: float, retry_after_s: float) -> None:
        LoraServerError.__init__(
            self,
            f"The work before this request takes about {expected_wait_s:.1f} s, over the {max_wait_s:.1f} s that it "
            f"may wait (--max-expected-wait, and its deadline); try again in {retry_after_s:.1f} s.",
            expected_wait_s=f"{expected_wait_s:.3f}",
            max_wait_s=f"{max_wait_s:.3f}",
        )
        self.retry_after_s = retry_after_s


class UnreadImagesError(QueueFullError):
    """The caller's tenant has left so many images unread that it gets no more."""

    def __init__(self, unread_bytes: int, max_unread_bytes: int, retry_after_s: float) -> None:
        LoraServerError.__init__(
            self,
            f"{unread_bytes} bytes of your finished images have not been read, of at most {max_unread_bytes}; "
            "read them, or leave their calls.",
            unread_bytes=unread_bytes,
            max_unread_bytes=max_unread_bytes,
        )
        self.retry_after_s = retry_after_s


class TooManyUploadsError(LoraServerError):
    """As many uploads of this tenant are under way as may."""

    reason = "QUEUE_FULL"
    retry_after_s = 10.0

    def __init__(self, max_uploads: int) -> None:
        super().__init__(
            f"{max_uploads} uploads of yours are under way, as many as may; wait for one to end.",
            max_uploads=max_uploads,
        )


class TooManyWatchersError(LoraServerError):
    """As many watch the server as may."""

    reason = "TOO_MANY_WATCHERS"
    retry_after_s = 10.0

    def __init__(self, max_watchers: int) -> None:
        super().__init__(
            f"{max_watchers} streams watch this server, as many as may; poll GetServerInfo, or try again later.",
            max_watchers=max_watchers,
        )


class TooManyCallsError(LoraServerError):
    """More of *what* than the server holds for one connection or address; *advice* says what to do about it."""

    reason = "TOO_MANY_CALLS"
    retry_after_s = 1.0

    def __init__(self, what: str, advice: str) -> None:
        super().__init__(f"Too many {what} from here; {advice}.", what=what)


class ReaderStalledError(LoraServerError):
    """The client of a stream takes nothing of it."""

    reason = "READER_STALLED"

    def __init__(self, timeout_s: float) -> None:
        super().__init__(
            f"Nothing of the stream was read for {timeout_s:g} s; read it, or leave it.", timeout_s=timeout_s
        )


class DeviceOutOfMemoryError(LoraServerError):
    """The device ran out of memory on this request."""

    reason = "GPU_OUT_OF_MEMORY"

    def __init__(self) -> None:
        super().__init__("The device ran out of memory on this request; ask for fewer or smaller images.")


class AdapterOutputNotFiniteError(AdapterError):
    """With these adapters a network gave values that are not finite, and without them it did not.

    *adapters* are names, digests and scales. *step* counts from 1; None if encoding prompts or decoding gave them.
    """

    reason = "ADAPTER_OUTPUT_NOT_FINITE"

    def __init__(self, adapters: Sequence[tuple[str, str, float]], component: str, step: int | None) -> None:
        named = ", ".join(f"{name!r} (scale {scale:g}, {digest[:_DIGEST_CHARS]})" for name, digest, scale in adapters)
        names, digests, scales = zip(*adapters, strict=True)
        super().__init__(
            f"With {'the adapter' if len(names) == 1 else 'the adapters'} {named} the {component} gave values that are "
            f"not finite{_at_step(step)}, which the model alone does not; use a lower scale, or another adapter.",
            adapters=",".join(names),
            digests=",".join(digests),
            scales=",".join(f"{scale:g}" for scale in scales),
            component=component,
            **({} if step is None else {"step": step}),
        )


class ModelOutputNotFiniteError(LoraServerError):
    """The base model itself gave values that are not finite.

    *step* counts from 1; None if encoding prompts or decoding gave them.
    """

    reason = "MODEL_OUTPUT_NOT_FINITE"

    def __init__(self, model: str, dtype: str, component: str, step: int | None) -> None:
        super().__init__(
            f"The {component} of the model {model!r} gave values that are not finite{_at_step(step)}, without any "
            f"adapter; it runs in {dtype}: serve it in a wider type (--dtype bfloat16 or float32), or look after its "
            "files.",
            model=model,
            dtype=dtype,
            component=component,
            **({} if step is None else {"step": step}),
        )


def _at_step(step: int | None) -> str:
    return "" if step is None else f" at step {step}"


class ServerNotReadyError(LoraServerError):
    """The server is still loading."""

    reason = "SERVER_NOT_READY"
    retry_after_s = 1.0

    def __init__(self) -> None:
        super().__init__("The server is still loading its model; try again shortly.")


class ServerDrainingError(LoraServerError):
    """The server is shutting down."""

    reason = "SERVER_DRAINING"
    retry_after_s = 1.0

    def __init__(self) -> None:
        super().__init__("The server is shutting down and takes no new work; try another instance.")


class DeadlineExceededError(LoraServerError):
    """The request's deadline passed."""

    reason = "REQUEST_DEADLINE_EXCEEDED"

    def __init__(self, request_id: str) -> None:
        super().__init__("The deadline of the request passed; allow more time or ask for less.", request_id=request_id)


class RequestCancelledError(LoraServerError):
    """The request was cancelled by its caller."""

    reason = "REQUEST_CANCELLED"

    def __init__(self, request_id: str) -> None:
        super().__init__("The request was cancelled.", request_id=request_id)


class EngineFailureError(LoraServerError):
    """Something failed that is not the caller's fault; the cause is chained and logged, never sent."""

    reason = "ENGINE_FAILURE"

    def __init__(self, request_id: str = "") -> None:
        super().__init__(
            "The server failed on this request; its log has the details under the request id.",
            request_id=request_id,
        )


class StateNotSavedError(EngineFailureError):
    """A change took effect, but the state directory could not be written, so it would not survive a restart."""

    def __init__(self, detail: str) -> None:
        LoraServerError.__init__(self, f"The change took effect but was not saved ({detail}); look after the disk.")


class StorageFailedError(EngineFailureError):
    """The disk of the state directory fails, or cannot be written; nothing was kept."""

    def __init__(self, detail: str) -> None:
        LoraServerError.__init__(
            self, f"The server cannot write its state directory ({detail}), so nothing was kept; look after the disk."
        )


class UnauthenticatedError(LoraServerError):
    """The call has no bearer token, or one that this server does not know. Says no more, and never the token."""

    reason = "UNAUTHENTICATED"

    def __init__(self) -> None:
        super().__init__("This server wants a bearer token that it knows: send it as metadata 'authorization'.")


class PermissionDeniedError(LoraServerError):
    """The caller's token does not have the role that the method needs."""

    reason = "PERMISSION_DENIED"

    def __init__(self, method: str, role: str) -> None:
        super().__init__(
            f"{method} needs a token with the role {role!r}; ask the operator for one.", method=method, role=role
        )
