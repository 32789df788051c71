"""The handlers on gRPC: maps errors to statuses, logs each call, counts calls in flight. The border of the house."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, NoReturn

import grpc
import grpc.aio
import structlog
from grpc_status import rpc_status
from lora_api.v1 import (
    adapter_service_pb2_grpc,
    generation_service_pb2_grpc,
    server_service_pb2_grpc,
)

from lora_server.errors import (
    EngineFailureError,
    LoraServerError,
    ReaderStalledError,
    ServerDrainingError,
    ServerNotReadyError,
)
from lora_server.observer import OK, Observer, SilentObserver
from lora_server.rpc.handlers import Handlers
from lora_server.rpc.status import CODES, to_status

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

    def enter(self, *, counted: bool = True) -> Handlers:
        """Lets a call in; one that is not *counted* is not waited for, and must not `leave`.

        Raises:
            ServerDrainingError, ServerNotReadyError: If it may not.
        """
        if self.draining:
            raise ServerDrainingError()
        if self.handlers is None:
            raise ServerNotReadyError()
        if counted:
            self._inside += 1
            self._empty.clear()
        return self.handlers

    def leave(self) -> None:
        """Notes that a call that was let in has ended."""
        self._inside -= 1
        if not self._inside:
            self._empty.set()

    async def wait_empty(self) -> None:
        """Waits until nobody is inside."""
        await self._empty.wait()


class Border:
    """Runs handlers for servicers: everything that crosses is a message or a status with details."""

    def __init__(
        self, gate: Gate, observer: Observer | None = None, stalled_reader_timeout_s: float = float("inf")
    ) -> None:
        """A stream whose client takes no message for *stalled_reader_timeout_s* is ended."""
        self._gate = gate
        self._observer = observer or SilentObserver()
        self._stalled_reader_timeout_s = stalled_reader_timeout_s
        self._sending: set[asyncio.Future[Any]] = set()

    async def unary(self, name: str, request: Any, context: Context) -> Any:
        """Runs the unary handler *name*."""
        began_s, peer = time.monotonic(), context.peer()
        try:
            handlers = self._gate.enter()
            try:
                extra = (_deadline_s(context), partial(_when_ended, context)) if name == "generate" else ()
                method: Callable[..., Awaitable[Any]] = getattr(handlers, name)
                response = await method(request, *extra)
            finally:
                self._gate.leave()
        except asyncio.CancelledError:
            self._note(name, _CANCELLED, began_s, peer)
            raise
        except Exception as error:
            await self._abort(name, error, began_s, context, peer)
        self._note(name, OK, began_s, peer)
        return response

    async def stream(self, name: str, request: Any, context: Context) -> AsyncIterator[Any]:
        """Runs the streaming handler *name*."""
        # A cancelled stream may be closed after its call is gone; asking for the peer then crashes in gRPC's core.
        began_s, peer = time.monotonic(), context.peer()
        code = _CANCELLED  # unless it gets to its end
        counted = name not in _UNCOUNTED
        try:
            handlers = self._gate.enter(counted=counted)
            try:
                method: Callable[..., AsyncGenerator[Any, None]] = getattr(handlers, name)
                responses = method(request, _deadline_s(context))
                try:
                    async for response in responses:
                        if self._gate.draining and not counted:
                            raise ServerDrainingError()
                        with self._cut_off_if_stalled(context):
                            yield response
                finally:
                    await responses.aclose()
            finally:
                if counted:
                    self._gate.leave()
            code = OK
        except LoraServerError as error:
            code = error.reason
            await context.abort_with_status(rpc_status.to_status(to_status(error)))
        except (asyncio.CancelledError, GeneratorExit):
            raise
        except Exception as error:
            code = "ENGINE_FAILURE"
            if context.done():  # the peer is gone; what failed is the sending
                code = _CANCELLED
                return
            _log.exception("call failed", method=name)
            await context.abort_with_status(rpc_status.to_status(to_status(EngineFailureError())))
            del error
        finally:
            self._note(name, code, began_s, peer)

    async def _abort(self, name: str, error: Exception, began_s: float, context: Context, peer: str) -> NoReturn:
        """Ends a call with the status of *error*; what is not a domain error is logged and stays here."""
        if not isinstance(error, LoraServerError):
            _log.error("call failed", method=name, exc_info=error)
            error = EngineFailureError()
        self._note(name, error.reason, began_s, peer)
        await context.abort_with_status(rpc_status.to_status(to_status(error)))
        raise AssertionError("abort_with_status raises")

    def _note(self, name: str, outcome: str, began_s: float, peer: str) -> None:
        """Tells of a call that has ended: OK, CANCELLED or a reason. Requests for images have a line of their own."""
        seconds = time.monotonic() - began_s
        code = CODES[outcome].name if outcome in CODES else outcome
        reason = outcome if outcome in CODES else ""
        self._observer.call_ended(name, code, reason, seconds)
        told = name in _DATA_PLANE and reason not in _AT_THE_GATE
        log = _log.debug if told else _log.info
        log("rpc", method=name, code=outcome, duration_s=round(seconds, 4), peer=peer)

    def _sent(self, sending: asyncio.Future[Any]) -> None:
        self._sending.discard(sending)
        if not sending.cancelled():
            sending.exception()  # it always ends with one

    @contextmanager
    def _cut_off_if_stalled(self, context: Context) -> Iterator[None]:
        """Ends the call if what is yielded within is not taken in time: who never reads must not hold images for ever.

        gRPC takes messages ahead of the reader only up to its windows. Its task is cancelled, which lets go of the
        job; the status goes after the message that is stuck, so it is sent by a task that may wait as long as that.
        """
        timeout_s, task = self._stalled_reader_timeout_s, asyncio.current_task()
        if task is None or timeout_s == float("inf"):
            yield
            return

        def cut_off() -> None:
            status = rpc_status.to_status(to_status(ReaderStalledError(timeout_s)))
            sending = asyncio.ensure_future(context.abort_with_status(status))
            self._sending.add(sending)
            sending.add_done_callback(self._sent)
            task.cancel()

        timer = asyncio.get_running_loop().call_later(timeout_s, cut_off)
        try:
            yield
        finally:
            timer.cancel()


def _when_ended(context: Context, action: Callable[[], None]) -> None:
    """Calls *action* when the response of the call has been taken, or the call has ended otherwise."""
    context.add_done_callback(lambda _: action())  # type: ignore[arg-type] # the stubs ask for a protocol


def _deadline_s(context: Context) -> float | None:
    remaining_s = context.time_remaining()
    return None if remaining_s is None else time.monotonic() + remaining_s


class GenerationServicer(generation_service_pb2_grpc.GenerationServiceServicer):
    """GenerationService on the wire."""

    def __init__(self, border: Border) -> None:
        self._border = border

    async def Generate(self, request: Any, context: Any) -> Any:  # noqa: N802
        """See the contract."""
        return await self._border.unary("generate", request, context)

    async def StreamGenerate(self, request: Any, context: Any) -> AsyncIterator[Any]:  # noqa: N802
        """See the contract."""
        async for response in self._border.stream("stream_generate", request, context):
            yield response


class AdapterServicer(adapter_service_pb2_grpc.AdapterServiceServicer):
    """AdapterService on the wire."""

    def __init__(self, border: Border) -> None:
        self._border = border

    async def LoadAdapter(self, request: Any, context: Any) -> Any:  # noqa: N802
        """See the contract."""
        return await self._border.unary("load_adapter", request, context)

    async def UploadAdapter(self, request_iterator: Any, context: Any) -> Any:  # noqa: N802
        """See the contract."""
        return await self._border.unary("upload_adapter", request_iterator, context)

    async def UnloadAdapter(self, request: Any, context: Any) -> Any:  # noqa: N802
        """See the contract."""
        return await self._border.unary("unload_adapter", request, context)

    async def PinAdapter(self, request: Any, context: Any) -> Any:  # noqa: N802
        """See the contract."""
        return await self._border.unary("pin_adapter", request, context)

    async def UnpinAdapter(self, request: Any, context: Any) -> Any:  # noqa: N802
        """See the contract."""
        return await self._border.unary("unpin_adapter", request, context)

    async def GetAdapter(self, request: Any, context: Any) -> Any:  # noqa: N802
        """See the contract."""
        return await self._border.unary("get_adapter", request, context)

    async def ListAdapters(self, request: Any, context: Any) -> Any:  # noqa: N802
        """See the contract."""
        return await self._border.unary("list_adapters", request, context)


class ServerServicer(server_service_pb2_grpc.ServerServiceServicer):
    """ServerService on the wire."""

    def __init__(self, border: Border) -> None:
        self._border = border

    async def GetServerInfo(self, request: Any, context: Any) -> Any:  # noqa: N802
        """See the contract."""
        return await self._border.unary("get_server_info", request, context)

    async def WatchServer(self, request: Any, context: Any) -> AsyncIterator[Any]:  # noqa: N802
        """See the contract."""
        async for response in self._border.stream("watch_server", request, context):
            yield response
