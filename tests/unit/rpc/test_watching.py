"""WatchServer without a server."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import aclosing
from types import SimpleNamespace
from typing import Any

import pytest
from google.protobuf import duration_pb2
from lora_api.v1 import adapter_pb2, server_service_pb2
from lora_server.errors import AdapterNotFoundError, InvalidRequestError, TooManyWatchersError
from lora_server.rpc.backend import Backend
from lora_server.rpc.watching import Watchers, snapshot, watch
from lora_server.security.caller import Caller, set_caller

from tests.unit.monitoring.house import House


class Adapters(House):
    """A manager that knows nobody any more."""

    def get(self, ref: Any) -> Any:
        """Refuses."""
        raise AdapterNotFoundError(ref.name)

    def list(self) -> Any:
        """Two adapters, one of them of another tenant."""
        return (SimpleNamespace(name="neon", tenants=None), SimpleNamespace(name="gone", tenants={"other"}))


@pytest.fixture
def backend() -> Backend:
    """A house to watch."""
    house: Any = Adapters()
    return Backend(house, house, "1", 0.0, 60.0, top_adapters=lambda count: [("neon", 3), ("gone", 1)][:count])


def request(interval_s: float | None = None, **fields: Any) -> server_service_pb2.WatchServerRequest:
    """A request to watch."""
    message = server_service_pb2.WatchServerRequest(**fields)
    if interval_s is not None:
        message.interval.CopyFrom(duration_pb2.Duration(nanos=int(interval_s * 1e9)))
    return message


async def test_the_first_response_comes_at_once_and_others_follow(backend: Backend) -> None:
    """Each has all sections, and the most used adapters, an unloaded one without a state."""
    async with aclosing(watch(backend, Watchers(1), request(0.25, max_adapters=1))) as responses:
        first = await anext(responses)
        second = await anext(responses)
    assert (first.queue.queued_requests, first.engine.image_steps, first.cache.hits) == (3, 21, 11)
    assert [(each.name, each.uses, each.state) for each in first.adapters] == [
        ("neon", 3, adapter_pb2.ADAPTER_STATE_UNSPECIFIED)
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


@pytest.mark.parametrize(("role", "names"), [("generate", ["neon"]), ("admin", ["neon", "gone"])])
async def test_a_tenant_sees_no_adapters_of_others(backend: Backend, role: str, names: list[str]) -> None:
    """Who manages adapters sees all of them."""

    async def look() -> list[str]:
        set_caller(Caller("acme", frozenset([role])))
        return [each.name for each in snapshot(backend, 20).adapters]

    assert await asyncio.create_task(look()) == names
