"""WatchServer without a server."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import aclosing
from contextvars import copy_context
from typing import Any

import pytest
from google.protobuf import duration_pb2
from lora_api.v1 import adapter_pb2, server_service_pb2
from lora_server.errors import InvalidRequestError, TooManyWatchersError, UnauthenticatedError
from lora_server.rpc.backend import Backend
from lora_server.rpc.watching import Watchers, watch
from lora_server.security.caller import Caller, set_caller
from lora_server.types import AdapterState, Glance, Viewer

from tests.unit.monitoring.house import House


class Adapters(House):
    """A manager that knows nobody any more."""

    glances = 0

    def glance(self, name: str, viewer: Viewer) -> Any:
        """Two adapters, one of them of another tenant; and a name of the tenant's own that is another's as well."""
        self.glances += 1
        if name == "neon":
            return Glance(AdapterState.CACHED)
        if name == "mine":
            return Glance(AdapterState.RESIDENT, is_on_demand=True)
        return Glance(AdapterState.REGISTERED, is_pinned=True) if viewer.is_operator else None


TOP = [("neon", 3, False), ("bound", 2, False), ("mine", 2, False), ("mine", 1, True), ("forgotten", 1, True)]


@pytest.fixture
def backend() -> Backend:
    """A house to watch."""
    house: Any = Adapters()
    return Backend(house, house, "1", 0.0, 60.0, top_adapters=lambda _: TOP)


def request(interval_s: float | None = None, **fields: Any) -> server_service_pb2.WatchServerRequest:
    """A request to watch."""
    message = server_service_pb2.WatchServerRequest(**fields)
    if interval_s is not None:
        message.interval.CopyFrom(duration_pb2.Duration(nanos=int(interval_s * 1e9)))
    return message


async def test_the_first_response_comes_at_once_and_others_follow(backend: Backend) -> None:
    """Each has all sections, and the most used adapters."""
    async with aclosing(watch(backend, Watchers(1), request(0.25, max_adapters=1))) as responses:
        first = await anext(responses)
        second = await anext(responses)
    assert (first.queue.queued_requests, first.engine.image_steps, first.cache.hits) == (3, 21, 11)
    assert [(each.name, each.uses, each.state) for each in first.adapters] == [
        ("neon", 3, adapter_pb2.ADAPTER_STATE_CACHED)
    ]
    assert 0.2 < second.time.ToNanoseconds() / 1e9 - first.time.ToNanoseconds() / 1e9 < 2


async def test_watchers_are_bounded_and_leave_their_place(backend: Backend) -> None:
    """One more than may is refused; when one has left, another may come."""
    watchers = Watchers(1)
    async with aclosing(watch(backend, watchers, request())) as one:
        await anext(one)
        with pytest.raises(TooManyWatchersError):
            await anext(watch(backend, watchers, request()))
    async with aclosing(watch(backend, watchers, request())) as another:
        await anext(another)


async def test_a_tenant_cannot_take_all_places(backend: Backend) -> None:
    """Half of them are left for others."""
    watchers = Watchers(4)
    set_caller(Caller("acme", frozenset(["generate"])))
    async with (
        aclosing(watch(backend, watchers, request())) as one,
        aclosing(watch(backend, watchers, request())) as two,
    ):
        await anext(one)
        await anext(two)
        with pytest.raises(TooManyWatchersError):
            await anext(watch(backend, watchers, request()))
        set_caller(Caller("umbrella", frozenset(["generate"])))
        await anext(watch(backend, watchers, request()))


def faulty() -> Iterator[server_service_pb2.WatchServerRequest]:
    """Requests outside their bounds."""
    yield request(0.1)
    yield request(max_adapters=1001)
    yield server_service_pb2.WatchServerRequest(interval=duration_pb2.Duration(seconds=3601))


@pytest.mark.parametrize("bad", faulty())
async def test_bounds_hold(backend: Backend, bad: server_service_pb2.WatchServerRequest) -> None:
    """Refused before anything is sent."""
    with pytest.raises(InvalidRequestError):
        await anext(watch(backend, Watchers(1), bad))


def seen_by(watchers: Watchers, backend: Backend, role: str) -> server_service_pb2.WatchServerResponse:
    """What a token of that role is shown."""

    def look() -> server_service_pb2.WatchServerResponse:
        set_caller(Caller("acme", frozenset([role])))
        return watchers.look(backend, 20)

    return copy_context().run(look)


def test_a_tenant_sees_no_adapters_of_others(backend: Backend) -> None:
    """Nor the uses of what others call as it calls its own; who manages adapters sees all that is registered."""
    own = [(each.name, each.uses) for each in seen_by(Watchers(1), backend, "generate").adapters]
    assert own == [("neon", 3), ("mine", 1), ("forgotten", 1)]
    everything = seen_by(Watchers(1), backend, "admin").adapters
    assert [each.name for each in everything] == [name for name, *_ in TOP]
    assert [each.name for each in everything if each.pinned] == ["bound"]


def test_watchers_who_see_the_same_share_one_message(backend: Backend) -> None:
    """However many they are, an interval's work is done once for each view."""
    watchers, house = Watchers(9), backend.adapters
    assert isinstance(house, Adapters)
    messages = [seen_by(watchers, backend, role) for role in ("generate", "admin", "generate", "admin", "generate")]
    assert messages[0] is messages[2] is messages[4]
    assert messages[1] is messages[3] is not messages[0]
    assert house.glances == 2 * len(TOP)


async def test_a_watcher_whose_token_is_revoked_is_told_so(backend: Backend) -> None:
    """At the next response."""

    def revoked() -> Caller:
        raise UnauthenticatedError

    set_caller(Caller("acme", frozenset(["generate"])), revoked)
    async with aclosing(watch(backend, Watchers(1), request(0.25))) as responses:
        await anext(responses)
        with pytest.raises(UnauthenticatedError):
            await anext(responses)
