"""Messages that the client makes of its values."""

from __future__ import annotations

import pytest
from lora_api.v1 import adapter_pb2
from lora_client import _requests


def test_a_pin_has_its_level_and_end() -> None:
    """Fractions of a second included."""
    request = _requests.pin_request("neon", "device", 1.5)
    assert request.level == adapter_pb2.PIN_LEVEL_DEVICE
    assert (request.ttl.seconds, request.ttl.nanos) == (1, 500_000_000)


def test_a_pin_without_end_says_so() -> None:
    """Absent, not zero."""
    assert not _requests.pin_request(7, "host", None).HasField("ttl")


def test_an_unknown_level_is_named() -> None:
    """With what there is."""
    with pytest.raises(ValueError, match=r"'disk'; choose of host, device"):
        _requests.pin_request("neon", "disk", None)


@pytest.mark.parametrize(("tenants", "given"), [(None, False), ((), True), (("a", "b"), True)])
def test_tenants_are_changed_only_when_given(tenants: tuple[str, ...] | None, given: bool) -> None:
    """An empty list opens the adapter to everybody; None leaves it as it is."""
    request = _requests.load_request(
        "x", name=None, id=None, default_scale=None, replace=False, allow_partial=False, tenants=tenants
    )
    assert request.HasField("tenants") is given
    assert tuple(request.tenants.names) == (tenants or ())
