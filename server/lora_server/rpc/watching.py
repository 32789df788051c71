"""WatchServer: what the server does, again and again, to a bounded number of watchers. Event loop only."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import AsyncGenerator, Iterator
from contextlib import contextmanager
from itertools import islice

from lora_api.v1 import server_service_pb2

from lora_server.errors import FieldFault, InvalidRequestError, TooManyWatchersError
from lora_server.rpc import convert
from lora_server.rpc.backend import Backend
from lora_server.security.caller import ANYBODY, current_caller, renew_caller
from lora_server.types import Viewer

_DEFAULT_INTERVAL_S = 1.0
_MIN_INTERVAL_S = 0.25
_MAX_INTERVAL_S = 3600.0
_DEFAULT_ADAPTERS = 20
_MAX_ADAPTERS = 1000
_SHARED_S = 0.2
"""How old what is shown may be: less than the shortest interval, so that nobody is shown the same again."""


class Watchers:
    """How many watch, and what they are shown: the same message to all who see the same. Event loop only."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._of: Counter[str] = Counter()
        self._shown: dict[tuple[Viewer, int], tuple[float, server_service_pb2.WatchServerResponse]] = {}

    @contextmanager
    def one_more(self) -> Iterator[None]:
        """Counts a watcher for as long as it lasts; raises TooManyWatchersError if as many watch as may.

        Where there are tenants, one may have half of the places, so that it cannot shut the others out.
        """
        caller = current_caller()
        tenant, share = caller.tenant, self._most if caller is ANYBODY else max(1, self._most // 2)
        if self._of.total() >= self._most or self._of[tenant] >= share:
            raise TooManyWatchersError(min(self._most, share))
        self._of[tenant] += 1
        try:
            yield
        finally:
            self._of[tenant] -= 1

    def look(self, backend: Backend, adapters: int) -> server_service_pb2.WatchServerResponse:
        """Returns what the caller is shown now, or was a moment ago; not to be changed."""
        now_s, key = time.monotonic(), (current_caller().viewer, adapters)
        self._shown = {each: shown for each, shown in self._shown.items() if now_s - shown[0] < _SHARED_S}
        if key not in self._shown:
            self._shown[key] = now_s, snapshot(backend, adapters)
        return self._shown[key][1]


async def watch(
    backend: Backend, watchers: Watchers, request: server_service_pb2.WatchServerRequest
) -> AsyncGenerator[server_service_pb2.WatchServerResponse, None]:
    """Yields a response at once, and one after every interval, as long as the caller's token is valid.

    Raises:
        InvalidRequestError, TooManyWatchersError: Before the first.
        UnauthenticatedError, PermissionDeniedError: When the token is revoked.
    """
    interval_s, adapters = _checked(request)
    with watchers.one_more():
        while True:
            yield watchers.look(backend, adapters)
            await asyncio.sleep(interval_s)
            renew_caller()


def snapshot(backend: Backend, adapters: int) -> server_service_pb2.WatchServerResponse:
    """Says what the server does now, with so many of the most used adapters, of those that the caller may see."""
    return server_service_pb2.WatchServerResponse(
        time=convert.timestamp(time.time()),
        start_time=convert.timestamp(backend.start_time_s),
        model=backend.engine.model.name,
        queue=convert.queue_info_message(backend.engine.queue_info()),
        cache=convert.cache_info_message(backend.adapters.cache_info()),
        engine=convert.engine_info_message(backend.engine.info()),
        adapters=islice(_most_used(backend, current_caller().viewer), adapters),
    )


def _most_used(backend: Backend, viewer: Viewer) -> Iterator[server_service_pb2.AdapterUseCount]:
    """Yields the most used adapters; to a tenant only those that it finds: not even the names of others."""
    for name, uses, is_own in backend.top_adapters(viewer.tenant):
        seen = backend.adapters.glance(name, viewer)
        is_same = seen is not None and seen.is_on_demand == is_own
        if is_same or is_own or viewer.is_operator:
            message = server_service_pb2.AdapterUseCount(name=name, uses=uses)
            if seen is not None and is_same:
                message.state = convert.state_value(seen.state)
                message.pinned = seen.is_pinned
            yield message


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
