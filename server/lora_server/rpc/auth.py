"""Who may call what: one table of roles, and the interceptor that holds it. Runs before anything else of a call.

Denies by default: a method of ours that the table does not name needs the role admin, any other method any token.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import grpc
import grpc.aio
import structlog

from lora_server.errors import LoraServerError, PermissionDeniedError, UnauthenticatedError
from lora_server.rpc.refusals import Refusals
from lora_server.security.caller import Caller, set_caller
from lora_server.security.tokens import TokenTable
from lora_server.security.watched import Watched

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
    """Lets in whom *tokens* know, as `current_caller`; health, which counts strangers itself, is open to everybody."""

    def __init__(self, tokens: Watched[TokenTable] | None, refusals: Refusals) -> None:
        """Without *tokens* everybody is let in, and only methods that are not there are refused."""
        self._tokens = tokens
        self._refusals = refusals

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Any]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Any:
        """Returns the method's handler, or one that only refuses, and reads nothing."""
        handler = await continuation(handler_call_details)
        method = str(handler_call_details.method)
        if handler is None:
            return self._refusals.unknown_method
        tokens = self._tokens
        if tokens is None or method.startswith(_OPEN):
            return handler
        metadata = tuple(handler_call_details.invocation_metadata or ())
        try:
            caller = identify(tokens.get(), method, metadata)
        except LoraServerError as error:
            return self._refusals.handler(method, error)
        set_caller(caller, lambda: identify(tokens.get(), method, metadata))
        structlog.contextvars.bind_contextvars(tenant=caller.tenant)
        return handler
