"""The parts of the soak that judge: each has to be able to say that something is wrong."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import pytest
from lora_client import Adapter
from lora_client.errors import AdapterInUseError, UnavailableError
from lora_client.types import Pin, Version

from tests.soak import leaks, report
from tests.soak.ledger import Entry, Interrupted, Ledger
from tests.soak.outcome import Outcome
from tests.soak.pictures import difference

OLD, NEW = Entry("sha256:old", None, 1.0), Entry("sha256:new", None, 1.0)
BOOKS = {
    "rss_bytes": 600 * 2**20,
    "descriptors": 20,
    "tasks": 20,
    "threads": 14,
    "integrity": "right",
    "running": 0,
    "queued": 0,
    "leases": 0,
    "slots_taken": 0,
}


@dataclass
class Outage:
    """A time without a server."""

    killed_s: float = 100.0
    serving_s: float | None = 108.0


def listed(name: str, entry: Entry, state: str = "cached") -> Adapter:
    """What the server lists for *entry*."""
    version = Version(entry.digest, 1, 1, (), state, None, None, "")
    pin = Pin(entry.pin, None) if entry.pin else None
    return Adapter(name, (1,), "/a", (version,), entry.digest, pin, entry.default_scale)


def test_a_picture_beyond_the_bound_is_wrong() -> None:
    """One level in one value of many may be; two levels, one level everywhere, or another shape may not."""
    picture = np.full((64, 64, 3), 7, np.uint8)
    close, far = picture.copy(), picture.copy()
    close[2, 1, 0] += 1
    far[2, 1, 0] += 2
    assert difference(close, picture) == ""
    assert "2 levels apart" in difference(far, picture)
    assert "in 100.00% of the values" in difference(picture + 1, picture)
    assert "shape" in difference(picture[:2], picture)


@pytest.mark.parametrize(
    "change",
    [{"leases": 1}, {"slots_taken": 2}, {"rss_bytes": 700 * 2**20}, {"descriptors": 40}, {"integrity": "wrong: x"}],
)
def test_each_leak_is_told(change: dict[str, int]) -> None:
    """Equal books are right; a lease, a slot, memory, descriptors or wrong books are not."""
    assert leaks.faults(BOOKS, BOOKS) == []
    assert len(leaks.faults(BOOKS, BOOKS | change)) == 1


def test_the_slope_of_memory_is_a_minute_s_growth() -> None:
    """One byte a second is sixty a minute."""
    assert leaks.slope_bytes_a_minute([(float(at), 1000 + at) for at in range(10)]) == pytest.approx(60)


async def test_a_pin_that_is_lost_is_told() -> None:
    """What was acknowledged has to be listed: the version, the pin, and that it is cached."""
    ledger = Ledger(known={"x": OLD})
    async with ledger.change("x", replace(OLD, pin="host")):
        pass
    pinned = replace(OLD, pin="host")
    assert ledger.settle([listed("x", pinned)]) == []
    assert len(ledger.settle([listed("x", pinned, state="registered")])) == 1
    assert len(ledger.settle([listed("x", OLD)])) == 1
    assert ledger.settle([listed("x", OLD)]) == [], "it is told once"
    assert len(ledger.settle([])) == 1


async def test_a_change_that_a_kill_interrupts_may_have_happened_or_not() -> None:
    """Either is right, a third state is not; a change that is refused has not happened."""
    for found, faults in ((OLD, 0), (NEW, 0), (replace(NEW, default_scale=2.0), 1)):
        ledger = Ledger(known={"x": OLD})
        with pytest.raises(Interrupted):
            async with ledger.change("x", NEW):
                raise UnavailableError("gone", code="UNAVAILABLE")
        assert ledger.doubtful("x")
        assert len(ledger.settle([listed("x", found)])) == faults
        assert not ledger.doubtful("x")
    ledger = Ledger(known={"x": OLD})
    with pytest.raises(AdapterInUseError):
        async with ledger.change("x", None):
            raise AdapterInUseError("used")
    assert len(ledger.settle([])) == 1


async def test_a_version_that_was_not_current_is_a_wrong_answer() -> None:
    """A request may get what was current at any moment between its begin and its end, and nothing else."""
    now_s = 0.0
    ledger = Ledger(clock=lambda: now_s, known={"x": OLD})
    assert ledger.settle([listed("x", OLD)]) == []
    now_s = 10.0
    async with ledger.change("x", NEW):
        now_s = 12.0
    asked = [
        Outcome("draw", began_s, ended_s, images=1, name="x", digest=entry.digest)
        for began_s, ended_s, entry in [
            (1, 5, OLD), (1, 5, NEW), (11, 11, OLD), (11, 11, NEW), (13, 14, OLD), (13, 14, NEW), (9, 14, OLD)
        ]
    ]  # fmt: skip
    wrong = report.wrong_answers(asked, ledger)
    assert [each.split()[3] for each in wrong] == ["sha256:new,", "sha256:old,"]


def test_an_error_is_in_order_only_beside_what_explains_it() -> None:
    """The server may be unavailable beside a kill, a deadline may pass where it cannot be met, and nothing else."""

    def errors(*outcomes: Outcome) -> int:
        return len(report.unexpected_errors(outcomes, [Outage()]))

    gone = Outcome("draw", 99, 101, "UnavailableError")
    assert errors(gone, replace(gone, began_s=110, ended_s=111)) == 0
    assert errors(replace(gone, began_s=50, ended_s=60), replace(gone, began_s=200, ended_s=201)) == 2
    assert errors(Outcome("hurry", 1, 2, "DeadlineExceededError"), Outcome("hurry", 1, 2, "QueueFullError")) == 0
    assert errors(Outcome("draw", 1, 2, "DeadlineExceededError"), Outcome("draw", 99, 101, "EngineFailureError")) == 2


def test_unavailability_lasts_from_the_kill_to_the_next_picture() -> None:
    """A picture that was done before does not count; none at all is for ever."""
    drawn = [Outcome("draw", 90, 99, images=1), Outcome("draw", 100, 110, images=1)]
    assert report.unavailabilities(drawn, [Outage()]) == [10.0]
    assert report.unavailabilities(drawn[:1], [Outage()]) == [float("inf")]
