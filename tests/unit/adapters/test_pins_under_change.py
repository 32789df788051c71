"""Pins whose version goes meanwhile: the next one is pinned, and a pin that is given up holds nothing."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from lora_server.adapters.keeper import Keeper
from lora_server.adapters.leases import Leases
from lora_server.errors import AdapterNotFoundError
from lora_server.types import AdapterSource, ByName, PinLevel

from tests.unit.adapters.test_storage_faults import House


@pytest.fixture
def house(tmp_path: Path) -> Iterator[House]:
    """With one adapter, `a`."""
    made = House(tmp_path / "state")
    (tmp_path / "a.safetensors").write_bytes(b"one")
    made.manager.load(AdapterSource(str(tmp_path / "a.safetensors"), name="a")).result(5)
    yield made
    made.close()


def before(monkeypatch: pytest.MonkeyPatch, owner: type, method: str, change: Callable[[], object]) -> None:
    """Lets *change* happen once, just before *method* is called."""
    original: Any = getattr(owner, method)
    left = [change]

    def changed(*args: Any, **options: Any) -> Any:
        if left:
            left.pop()()
        return original(*args, **options)

    monkeypatch.setattr(owner, method, changed)


@pytest.mark.parametrize(("owner", "method"), [(Keeper, "copy"), (Leases, "acquire")])
def test_a_pin_whose_version_is_overwritten_and_evicted_pins_the_next(
    house: House, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, owner: type, method: str
) -> None:
    """Between its being read and copied, or copied and leased."""
    old = house.manager.get(ByName("a")).current_digest

    def change() -> None:
        (tmp_path / "a.safetensors").write_bytes(b"two")
        with house.manager._lock:
            house.manager._cache.remove(old)

    before(monkeypatch, owner, method, change)
    info = house.manager.pin(ByName("a"), PinLevel.HOST).result(10)
    assert info.pin is not None
    assert info.current_digest != old
    assert not house.store._held


def test_a_pin_whose_adapter_goes_is_not_found(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    """By its name, however often it is tried."""
    before(monkeypatch, Keeper, "copy", lambda: house.manager.unload(ByName("a")))
    with pytest.raises(AdapterNotFoundError, match="'a'"):
        house.manager.pin(ByName("a"), PinLevel.HOST).result(10)
    until_nothing_is_held(house)


def test_a_pin_that_is_given_up_while_it_is_copied_holds_nothing(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its copy is swept, and nothing is done on the thread that gave it up."""
    begun, may_end, here = threading.Event(), threading.Event(), threading.get_ident()

    def wait() -> None:
        begun.set()
        assert may_end.wait(10)

    before(monkeypatch, Keeper, "copy", wait)
    threads: list[int] = []
    before(monkeypatch, Keeper, "release", lambda: threads.append(threading.get_ident()))
    pinning = house.manager.pin(ByName("a"), PinLevel.HOST)
    assert begun.wait(10)
    pinning.cancel()
    may_end.set()
    until_nothing_is_held(house, also=lambda: bool(threads))
    assert here not in threads


def until_nothing_is_held(house: House, also: Callable[[], bool] = lambda: True) -> None:
    """Waits for other threads."""
    end_s = time.monotonic() + 10
    while house.store._held or house.store.digests() or not also():
        assert time.monotonic() < end_s
        time.sleep(0.01)
