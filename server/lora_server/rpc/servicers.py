"""The border of the house: lets calls in, maps errors to statuses, logs each call, counts calls in flight."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import aclosing, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import grpc
import grpc.aio
import structlog

from lora_server.errors import (
    EngineFailureError,
    LoraServerError,
    ReaderStalledError,
    ServerDrainingError,
    ServerNotReadyError,
)
from lora_server.observer import OK, Observer, SilentObserver
from lora_server.rpc.handlers import Handlers
from lora_server.rpc.status import CODES, end

_log = structlog.get_logger(__name__)
Context = grpc.aio.ServicerContext[Any, Any]
_CANCELLED = "CANCELLED"
_DATA_PLANE = frozenset({"generate", "stream_generate"})
_AT_THE_GATE = frozenset({"SERVER_NOT_READY", "SERVER_DRAINING"})
_UNCOUNTED = frozenset({"watch_server"})
"""Calls without an end, which a draining server does not wait for."""


class Gate:
    """Whether calls are let in, and how many are inside. Event loop only."""

    def __init__(self) -> None:
        self.handlers: Handlers | None = None
        self.draining = False
        self._inside = 0
        self._empty = asyncio.Event()
        self._empty.set()

    def check(self) -> Handlers:
        """Returns the handlers.

        Raises:
            ServerDrainingError, ServerNotReadyError: If a call may not enter.
        """
        if self.draining:
            raise ServerDrainingError()
        if self.handlers is None:
            raise ServerNotReadyError()
        return self.handlers

    @contextmanager
    def inside(self, *, counted: bool = True) -> Iterator[Handlers]:
        """Lets a call in for as long as it lasts; one that is not *counted* is not waited for. Raises as `check`."""
        handlers = self.check()
        self._inside += counted
        if self._inside:
            self._empty.clear()
        try:
            yield handlers
        finally:
            self._inside -= counted
            if not self._inside:
                self._empty.set()

    async def wait_empty(self) -> None:
        """Waits until nobody is inside."""
        await self._empty.wait()


@dataclass(frozen=True, slots=True)
class Call:
    """A call as the border sees it.

    Attributes:
        name: The handler, such as `stream_generate`.
        streams: Whether it answers with a stream.
        receive: Returns the request, or the iterator of requests; raises a domain error if it is none.
        send: Sends a message; returns when gRPC has taken it, as far as the reader lets it.
        ended: Is told that nothing is left to do but to tell how the call ended.
    """

    name: str
    streams: bool
    receive: Callable[[], Awaitable[Any]]
    send: Callable[[Any], Awaitable[None]]
    ended: Callable[[], None]


class Border:
    """Runs handlers for the wire: everything that crosses is a message or a status with details."""

    def __init__(
        self, gate: Gate, observer: Observer | None = None, stalled_reader_timeout_s: float = float("inf")
    ) -> None:
        """A call whose client takes no message for *stalled_reader_timeout_s* is ended."""
        self._gate = gate
        self._observer = observer or SilentObserver()
        self._stalled_reader_timeout_s = stalled_reader_timeout_s

    async def run(self, call: Call, context: Context) -> None:
        """Receives, handles and answers a call; however it ends, it is told."""
        # A cancelled call may end after gRPC's part of it is gone; asking for the peer then crashes in gRPC's core.
        began_s, peer = time.monotonic(), context.peer()
        code = _CANCELLED  # unless it gets to its end
        try:
            await self._run(call, context)
            code = OK
        except LoraServerError as error:
            code = error.reason
            call.ended()
            await end(context, error)  # after what is stuck, if the reader has stalled
        except asyncio.CancelledError:
            raise
        except Exception as error:
            code = "ENGINE_FAILURE"
            _log.error("call failed", method=call.name, exc_info=error)
            await end(context, EngineFailureError())
        finally:
            self._note(call.name, code, began_s, peer)

    async def _run(self, call: Call, context: Context) -> None:
        self._gate.check()  # whoever is not let in need not be read
        request = await call.receive()
        counted = call.name not in _UNCOUNTED
        with self._gate.inside(counted=counted) as handlers:
            method = getattr(handlers, call.name)
            if not call.streams:
                extra = (_deadline_s(context), partial(_when_ended, context)) if call.name == "generate" else ()
                await self._send(call, await method(request, *extra))
                return
            async with aclosing(method(request, _deadline_s(context))) as responses:
                async for response in responses:
                    if self._gate.draining and not counted:
                        raise ServerDrainingError()
                    await self._send(call, response)

    def _note(self, name: str, outcome: str, began_s: float, peer: str) -> None:
        """Tells of a call that has ended: OK, CANCELLED or a reason. Requests for images have a line of their own."""
        seconds = time.monotonic() - began_s
        code = CODES[outcome].name if outcome in CODES else outcome
        reason = outcome if outcome in CODES else ""
        self._observer.call_ended(name, code, reason, seconds)
        told = name in _DATA_PLANE and reason not in _AT_THE_GATE
        log = _log.debug if told else _log.info
        log("rpc", method=name, code=outcome, duration_s=round(seconds, 4), peer=peer)

    async def _send(self, call: Call, response: Any) -> None:
        """Sends *response*, as far as gRPC takes messages ahead of the reader: up to its windows.

        Raises:
            ReaderStalledError: If nobody reads: who never does must not hold images for ever.
        """
        timeout_s = self._stalled_reader_timeout_s
        try:
            async with asyncio.timeout(None if timeout_s == float("inf") else timeout_s):
                await call.send(response)
        except TimeoutError:
            raise ReaderStalledError(timeout_s) from None
        except grpc.aio.BaseError:  # the peer has gone
            raise asyncio.CancelledError from None


def _when_ended(context: Context, action: Callable[[], None]) -> None:
    """Calls *action* when the response of the call has been taken, or the call has ended otherwise."""
    context.add_done_callback(lambda _: action())  # type: ignore[arg-type] # the stubs ask for a protocol


def _deadline_s(context: Context) -> float | None:
    remaining_s = context.time_remaining()
    return None if remaining_s is None else time.monotonic() + remaining_s
