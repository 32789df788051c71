"""Whether one more image may begin: places are kept for other tenants, other requests and short images. Pure data.

Not thread-safe: the engine thread's own.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Iterable
from dataclasses import dataclass

from lora_server.scheduler.shares import Shares

_KEPT_FOR_SHORT = 0.25
"""Share of the places that only short images get."""
_SHORT = 0.5
"""The most work of a short image, as a share of the most that any active image has left."""
_HALVED_EVERY = 2
"""Places after which only images half as long are short, so that a still shorter one finds a place, too."""


@dataclass(frozen=True, slots=True)
class ActiveWork:
    """An image that is being denoised: whose it is, and the work that it has left, in any unit."""

    tenant: str
    request: Hashable
    work: int


class Places:
    """The places of active images, as they are while several begin.

    A tenant holds its share; a request half of the places. The last quarter is for images that are short beside the
    longest that is active: they give their places back soon, so also among many long requests of one tenant a small
    one waits for a small part of their time.
    """

    def __init__(self, total: int, tenant_share: float, active: Iterable[ActiveWork]) -> None:
        self._shares = Shares.by(total, tenant_share)
        self._of_request: Counter[Hashable] = Counter()
        self._of_tenant: Counter[str] = Counter()
        self._longest = 0
        for each in active:
            self.take(each)

    def has_room(self, image: ActiveWork) -> bool:
        """Whether *image* may begin."""
        total, active = self._shares.total, self._of_tenant.total()
        if not self._shares.has_room(self._of_tenant[image.tenant], active):
            return False
        if self._of_request[image.request] >= max(1, total // 2):
            return False
        beyond = active - (total - int(total * _KEPT_FOR_SHORT))
        if beyond < 0 or not self._of_tenant[image.tenant]:
            return True
        return image.work <= self._longest * _SHORT ** (1 + beyond // _HALVED_EVERY)

    def take(self, image: ActiveWork) -> None:
        """Notes that *image* begins, or is active."""
        self._of_request[image.request] += 1
        self._of_tenant[image.tenant] += 1
        self._longest = max(self._longest, image.work)
