"""Whether the next image of a job may begin now: places, device slots, and what its tenant has left unread.

Made anew for each time that images begin. Engine thread only.
"""

from __future__ import annotations

from collections.abc import Sequence

from lora_server.engine.holdings import Holdings
from lora_server.engine.job import EngineJob
from lora_server.engine.residency import DeviceResidency
from lora_server.scheduler.places import ActiveWork, Places
from lora_server.scheduler.shares import Shares


class Room:
    """What is free, as it is while several images begin.

    If the job whose turn it is lacks device slots, no other that wants some goes before it, so that it gets them when
    running jobs give them back; jobs that want none go on.
    """

    def __init__(
        self,
        places: Places,
        holdings: Holdings,
        residency: DeviceResidency,
        slots: Shares,
        running: Sequence[EngineJob],
    ) -> None:
        """*slots* are the device's; *running* the jobs that hold some, a live list."""
        self._places = places
        self._holdings = holdings
        self._residency = residency
        self._slots = slots
        self._running = running
        self._slots_wanted = False

    def may_begin(self, job: EngineJob) -> bool:
        """Whether the next image of *job*, whose adapters are resolved, may begin."""
        if not self._places.has_room(_work(job)) or not self._holdings.may_begin(job):
            return False
        return job.begun or not job.resolved or self._has_slots(job)

    def take(self, job: EngineJob) -> None:
        """Notes that an image of *job* begins."""
        self._places.take(_work(job))

    def _has_slots(self, job: EngineJob) -> bool:
        if self._slots_wanted:
            return False
        held = {
            each.applied.digest
            for other in self._running
            if other.tenant == job.tenant
            for each in other.resolved or ()
        }
        new = {each.applied.digest for each in job.resolved or ()} - held
        if self._slots.of_a_tenant < self._slots.total and not self._slots.has_room(len(held), 0, len(new)):
            return False  # its tenant's share; others go on
        self._slots_wanted = bool(self._running) and not self._residency.has_room(job.resolved or ())
        return not self._slots_wanted


def _work(job: EngineJob) -> ActiveWork:
    return ActiveWork(job.tenant, job, job.image_pixel_steps)
