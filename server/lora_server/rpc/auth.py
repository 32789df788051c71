"""Who may call what: one table of roles, and the interceptor that holds it. Runs before anything else of a call.

Denies by default: a method of ours that the table does not name needs the role admin, any other method any token.
"""

from __future__ import annotations

import re
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import Any

import grpc
import grpc.aio
import structlog
from grpc_status import rpc_status

from lora_server.errors import LoraServerError, PermissionDeniedError, UnauthenticatedError
from lora_server.observer import Observer, SilentObserver
from lora_server.rpc.status import CODES, to_status
from lora_server.security.caller import Caller, set_caller
from lora_server.security.tokens import TokenTable
from lora_server.security.watched import Watched

_log = structlog.get_logger(__name__)
_OURS = "/lora_api.v1."
_OPEN = "/grpc.health.v1.Health/"

ROLE_OF: dict[str, str | None] = {
    "Generate": "generate",
    "StreamGenerate": "generate",
    "LoadAdapter": "admin",
    "UploadAdapter": "admin",
    "UnloadAdapter": "admin",
    "PinAdapter": "admin",
    "UnpinAdapter": "admin",
    "GetAdapter": None,
    "ListAdapters": None,
    "GetServerInfo": None,
    "WatchServer": None,
}
"""The role that each RPC needs; None is any."""


def identify(tokens: TokenTable, method: str, metadata: Sequence[tuple[str, str | bytes]]) -> Caller:
    """Returns who makes a call of the full name *method*.

    Raises:
        UnauthenticatedError: Without exactly one bearer token that is known.
        PermissionDeniedError: If its roles do not suffice.
    """
    given = [str(value) for key, value in metadata if key == "authorization"]
    scheme, _, token = given[0].partition(" ") if len(given) == 1 else ("", "", "")
    caller = tokens.find(token.strip()) if scheme.lower() == "bearer" else None
    if caller is None:
        raise UnauthenticatedError()
    name = method.rpartition("/")[2]
    role = ROLE_OF.get(name, "admin") if method.startswith(_OURS) else None
    if role is not None and role not in caller.roles:
        raise PermissionDeniedError(name, role)
    return caller


class AuthInterceptor(grpc.aio.ServerInterceptor):
    """Lets in whom *tokens* know, as `current_caller`; health is open to everybody."""

    def __init__(self, tokens: Watched[TokenTable], observer: Observer | None = None) -> None:
        """Tells *observer* of every call that it refuses; of the others, the border does."""
        self._tokens = tokens
        self._observer = observer or SilentObserver()

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Any]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Any:
        """Returns the method's handler, or one that only refuses."""
        handler = await continuation(handler_call_details)
        method = str(handler_call_details.method)
        if handler is None or method.startswith(_OPEN):
            return handler
        metadata = tuple(handler_call_details.invocation_metadata or ())
        try:
            caller = identify(self._tokens.get(), method, metadata)
        except LoraServerError as error:
            return _refusing(handler, method, error, self._observer)
        set_caller(caller, lambda: identify(self._tokens.get(), method, metadata))
        structlog.contextvars.bind_contextvars(tenant=caller.tenant)
        return handler


def _refusing(handler: Any, method: str, error: LoraServerError, observer: Observer) -> Any:
    """A handler of the same kind that ends every call with *error*."""
    began_s = time.monotonic()

    async def refuse(context: Any) -> None:
        seconds = time.monotonic() - began_s
        _log.warning("rpc", method=method, code=error.reason, duration_s=round(seconds, 4), peer=context.peer())
        observer.call_ended(_name_of_handler(method), CODES[error.reason].name, error.reason, seconds)
        await context.abort_with_status(rpc_status.to_status(to_status(error)))

    async def unary(_: Any, context: Any) -> None:
        await refuse(context)

    async def stream(_: Any, context: Any) -> AsyncIterator[Any]:
        await refuse(context)
        yield  # makes it a generator; never reached

    make: Any = {
        (False, False): grpc.unary_unary_rpc_method_handler,
        (False, True): grpc.unary_stream_rpc_method_handler,
        (True, False): grpc.stream_unary_rpc_method_handler,
        (True, True): grpc.stream_stream_rpc_method_handler,
    }[(handler.request_streaming, handler.response_streaming)]
    return make(stream if handler.response_streaming else unary, handler.request_deserializer)


def _name_of_handler(method: str) -> str:
    """`stream_generate` of /lora_api.v1.GenerationService/StreamGenerate, as the border calls it."""
    return re.sub(r"(?<=[a-z])(?=[A-Z])", "_", method.rpartition("/")[2]).lower()
