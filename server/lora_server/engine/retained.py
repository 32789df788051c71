"""Results of finished requests, kept for a while for callers that ask again.

Not thread-safe: under its owner's lock.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lora_server.engine.job import EngineJob

RequestKey = tuple[str, str]
"""Tenant and request id."""


class Retained:
    """Finished jobs by tenant and request id, within bounds of time and bytes.

    If there are too many bytes, the tenant that has most of them loses its oldest result: nobody's retries suffer from
    another's.

    | invariant | |
    |---|---|
    | `used_bytes` | sum of the images of `_results`, at most the bound |
    | `_sums`, `_keys` | the same, and the keys in the same order, for each tenant; no tenant without results |
    """

    def __init__(self, keep_s: float, max_bytes: int, clock: Callable[[], float]) -> None:
        self._keep_s = keep_s
        self._max_bytes = max_bytes
        self._clock = clock
        self._results: OrderedDict[RequestKey, tuple[float, int, EngineJob]] = OrderedDict()
        self._keys: dict[str, OrderedDict[RequestKey, None]] = {}
        self._sums: dict[str, int] = {}
        self.used_bytes = 0

    def get(self, key: RequestKey) -> EngineJob | None:
        """Returns the job of *key*, if its result is kept."""
        self.forget_old()
        found = self._results.get(key)
        return found[2] if found else None

    def put(self, key: RequestKey, job: EngineJob) -> None:
        """Keeps a result, if it is not larger than all may be."""
        size_bytes, tenant = job.log.size_bytes, key[0]
        if self._keep_s <= 0 or size_bytes > self._max_bytes:
            return
        self._drop(key)
        self._results[key] = (self._clock() + self._keep_s, size_bytes, job)
        self._keys.setdefault(tenant, OrderedDict())[key] = None
        self._sums[tenant] = self._sums.get(tenant, 0) + size_bytes
        self.used_bytes += size_bytes
        self.forget_old()
        while self.used_bytes > self._max_bytes:
            most = max(self._sums, key=self._sums.__getitem__)
            self._drop(next(iter(self._keys[most])))

    def forget_old(self) -> None:
        """Lets go of results whose time is over."""
        now_s = self._clock()
        while self._results:
            key, (expire_s, _, _) = next(iter(self._results.items()))
            if expire_s > now_s:
                return
            self._drop(key)

    def _drop(self, key: RequestKey) -> None:
        found, tenant = self._results.pop(key, None), key[0]
        if found is None:
            return
        self.used_bytes -= found[1]
        self._sums[tenant] -= found[1]
        del self._keys[tenant][key]
        if not self._keys[tenant]:
            del self._keys[tenant], self._sums[tenant]
