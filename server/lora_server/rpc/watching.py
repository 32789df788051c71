"""WatchServer: what the server does, again and again, to a bounded number of watchers. Event loop only."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Iterator, Sequence
from contextlib import contextmanager

from lora_api.v1 import adapter_pb2, server_service_pb2

from lora_server.errors import AdapterNotFoundError, FieldFault, InvalidRequestError, TooManyWatchersError
from lora_server.rpc import convert
from lora_server.rpc.backend import Backend
from lora_server.security.caller import current_caller
from lora_server.types import ByName, may_use

_DEFAULT_INTERVAL_S = 1.0
_MIN_INTERVAL_S = 0.25
_MAX_INTERVAL_S = 3600.0
_DEFAULT_ADAPTERS = 20
_MAX_ADAPTERS = 1000
_ALL = 1_000_000
"""More than are counted."""


class Watchers:
    """How many watch."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._now = 0

    @contextmanager
    def one_more(self) -> Iterator[None]:
        """Counts a watcher for as long as it lasts; raises TooManyWatchersError if as many watch as may."""
        if self._now >= self._most:
            raise TooManyWatchersError(self._most)
        self._now += 1
        try:
            yield
        finally:
            self._now -= 1


async def watch(
    backend: Backend, watchers: Watchers, request: server_service_pb2.WatchServerRequest
) -> AsyncGenerator[server_service_pb2.WatchServerResponse, None]:
    """Yields a response at once, and one after every interval, for ever.

    Raises:
        InvalidRequestError, TooManyWatchersError: Before the first.
    """
    interval_s, adapters = _checked(request)
    with watchers.one_more():
        while True:
            yield snapshot(backend, adapters)
            await asyncio.sleep(interval_s)


def snapshot(backend: Backend, adapters: int) -> server_service_pb2.WatchServerResponse:
    """Says what the server does now, with so many of the most used adapters, of those that the caller may see."""
    return server_service_pb2.WatchServerResponse(
        time=convert.timestamp(time.time()),
        start_time=convert.timestamp(backend.start_time_s),
        model=backend.engine.model.name,
        queue=convert.queue_info_message(backend.engine.queue_info()),
        cache=convert.cache_info_message(backend.adapters.cache_info()),
        engine=convert.engine_info_message(backend.engine.info()),
        adapters=[_use_message(backend, name, uses) for name, uses in _most_used(backend, adapters)],
    )


def _most_used(backend: Backend, count: int) -> Sequence[tuple[str, int]]:
    """The most used adapters; to a tenant, only those that it may use: not even the names of the others."""
    viewer = current_caller().sees_as
    if viewer is None:
        return backend.top_adapters(count)
    seen = {info.name for info in backend.adapters.list() if may_use(info.tenants, viewer)}
    return [(name, uses) for name, uses in backend.top_adapters(_ALL) if name in seen][:count]


def _use_message(backend: Backend, name: str, uses: int) -> server_service_pb2.AdapterUseCount:
    message = server_service_pb2.AdapterUseCount(name=name, uses=uses)
    try:
        info = backend.adapters.get(ByName(name))
    except AdapterNotFoundError:
        message.state = adapter_pb2.ADAPTER_STATE_UNSPECIFIED
        return message
    current = next(version for version in info.versions if version.digest == info.current_digest)
    message.state = convert.state_value(current.state)
    message.pinned = info.pin is not None
    return message


def _checked(request: server_service_pb2.WatchServerRequest) -> tuple[float, int]:
    faults = []
    interval_s = request.interval.ToNanoseconds() / 1e9 if request.HasField("interval") else _DEFAULT_INTERVAL_S
    if not _MIN_INTERVAL_S <= interval_s <= _MAX_INTERVAL_S:
        faults.append(FieldFault("interval", f"is {interval_s:g} s; must be from {_MIN_INTERVAL_S:g} s to one hour"))
    adapters = request.max_adapters if request.HasField("max_adapters") else _DEFAULT_ADAPTERS
    if adapters > _MAX_ADAPTERS:
        faults.append(FieldFault("max_adapters", f"is {adapters}; must be from 0 to {_MAX_ADAPTERS}"))
    if faults:
        raise InvalidRequestError(faults)
    return interval_s, adapters
