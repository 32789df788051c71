"""Shares of tenants, and the places of active images."""

from __future__ import annotations

from lora_server.scheduler.places import ActiveWork, Places
from lora_server.scheduler.shares import Shares


def fill(places: Places, tenant: str, request: str, work: int, most: int = 99) -> int:
    """Lets images begin while there is room; returns how many."""
    for count in range(most):
        if not places.has_room(ActiveWork(tenant, request, work)):
            return count
        places.take(ActiveWork(tenant, request, work))
    return most


def test_a_tenant_gets_its_share_and_another_the_rest() -> None:
    """The share is rounded down, and one at least."""
    shares = Shares.by(10, 0.75)
    assert [shares.has_room(held, held) for held in (0, 6, 7)] == [True, True, False]
    assert shares.has_room(1, 8)
    assert not shares.has_room(1, 10)
    assert Shares.by(3, 0.01).of_a_tenant == 1


def test_who_holds_nothing_is_let_in_even_when_all_is_taken() -> None:
    """So that two tenants cannot shut out a third; but a tenant that may hold all has nobody to think of."""
    assert Shares.by(10, 0.75).has_room(0, 10)
    assert not Shares.by(10, 1.0).has_room(0, 10)
    assert not Shares.by(1, 0.5).has_room(0, 1)  # such as a pipeline that can run one image


def test_a_request_gets_half_of_the_places_and_leaves_room_for_the_next() -> None:
    """Without tenants, too; of images as long, three quarters are the most."""
    places = Places(32, 1.0, [])
    assert fill(places, "t", "huge", 500) == 16
    assert fill(places, "t", "more", 500) == 8
    assert fill(places, "t", "third", 500) == 0


def test_short_images_get_in_beside_long_ones() -> None:
    """Whatever number of long requests runs, one of half their work or less has a place of those that are kept."""
    places = Places(32, 1.0, [ActiveWork("t", number, 500) for number in range(24)])
    assert not places.has_room(ActiveWork("t", "long", 300))
    assert fill(places, "t", "short", 200) == 2
    assert fill(places, "t", "shorter", 100) == 2
    assert fill(places, "t", "very short", 30) == 4


def test_another_tenant_gets_a_place_whoever_is_there() -> None:
    """However long its image, and however many tenants have filled the places."""
    full = [ActiveWork(tenant, tenant, 1) for tenant in "aabbccdd"]
    assert Places(8, 0.75, full).has_room(ActiveWork("e", "e", 10**9))
    assert not Places(8, 0.75, full).has_room(ActiveWork("a", "other", 1))


def test_there_is_always_a_place_when_nothing_is_active() -> None:
    """The least bounds still let an image in."""
    for total in (1, 2, 3, 4):
        assert Places(total, 0.01, []).has_room(ActiveWork("t", "r", 10**9))
