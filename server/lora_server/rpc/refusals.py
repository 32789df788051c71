"""Calls that are refused before they are read: as cheaply as Python can, since strangers may make thousands a second.

A refusal's status is made once, its line of the log at most once a second, with a count; and who makes too many hears
nothing more (`rpc.connections`).
"""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Callable
from functools import lru_cache
from typing import Any

import grpc
import structlog

from lora_server.errors import LoraServerError, TooManyCallsError
from lora_server.observer import Observer
from lora_server.rpc.connections import Connections, Verdict
from lora_server.rpc.status import CODES, Status, as_grpc, end
from lora_server.rpc.wire import snake_case

_log = structlog.get_logger(__name__)
_LOG_EVERY_S = 1.0
_UNKNOWN_METHOD = "unknown"
_NOT_FOUND = Status(grpc.StatusCode.UNIMPLEMENTED, "Method not found!")  # as gRPC itself says it
TOO_MANY = TooManyCallsError("calls without a token", "send one that this server knows")


class Refusals:
    """Refuses calls, and tells of them. Event loop only."""

    def __init__(self, connections: Connections, observer: Observer) -> None:
        self._connections = connections
        self._observer = observer
        self._told_s = float("-inf")
        self._untold = 0
        self._too_many = as_grpc(TOO_MANY)
        self.unknown_method = self._make(_UNKNOWN_METHOD, _NOT_FOUND.code.name, "", _NOT_FOUND)
        # By what is in an error's text: there are few methods, and few roles.
        self._handler = lru_cache(maxsize=64)(self._handler_of)

    def handler(self, method: str, error: LoraServerError) -> Any:
        """Returns a handler that ends every call of the full name *method* with *error*."""
        return self._handler(method, error.reason, error.message, error)

    def _handler_of(self, method: str, reason: str, _: str, error: LoraServerError) -> Any:
        return self._make(snake_case(method), CODES[reason].name, reason, as_grpc(error))

    def _make(self, name: str, code: str, reason: str, status: Status) -> Any:
        async def refuse(_: Any, context: Any) -> AsyncIterator[bytes]:
            await self.refuse(context, status, lambda peer: self._tell(name, code, reason, peer))
            yield b""  # makes it a generator; never reached

        return grpc.stream_stream_rpc_method_handler(refuse)

    async def refuse(self, context: Any, status: Status, tell: Callable[[str], None]) -> None:
        """Ends a stranger's call with *status*, or as the connections have it."""
        peer = context.peer()
        connection = self._connections.of(peer)
        verdict = self._connections.stranger(connection)
        if verdict is Verdict.HOLD:
            await self._connections.hold()
            await end(context, self._too_many)
        tell(peer)
        with connection.call(context):
            await end(context, status if verdict is Verdict.ANSWER else self._too_many)

    def _tell(self, name: str, code: str, reason: str, peer: str) -> None:
        self._observer.call_ended(name, code, reason, 0.0)
        now_s = time.monotonic()
        if now_s - self._told_s < _LOG_EVERY_S:
            self._untold += 1
            return
        more = {"more_refused": self._untold} if self._untold else {}
        self._told_s, self._untold = now_s, 0
        _log.warning("rpc", method=name, code=reason or code, peer=peer, **more)
