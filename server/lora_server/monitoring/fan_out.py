"""One observer in front of many: each is told everything, and none can hurt who tells."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import structlog

from lora_server.observer import Observer, RequestSummary
from lora_server.types import ApplicationWay

_log = structlog.get_logger(__name__)


class FanOut:
    """Tells all of *observers*; what one of them raises is logged and goes no further."""

    def __init__(self, observers: Sequence[Observer]) -> None:
        self._observers = tuple(observers)

    def call_ended(self, method: str, code: str, reason: str, seconds: float) -> None:
        """Passed on."""
        self._tell(lambda each: each.call_ended(method, code, reason, seconds))

    def request_refused(self, request_id: str, tenant: str, reason: str) -> None:
        """Passed on."""
        self._tell(lambda each: each.request_refused(request_id, tenant, reason))

    def request_ended(self, summary: RequestSummary) -> None:
        """Passed on."""
        self._tell(lambda each: each.request_ended(summary))

    def step_ended(self, way: ApplicationWay, rows: int, seconds: float) -> None:
        """Passed on."""
        self._tell(lambda each: each.step_ended(way, rows, seconds))

    def adapter_loaded(self, source: str, outcome: str, seconds: float) -> None:
        """Passed on."""
        self._tell(lambda each: each.adapter_loaded(source, outcome, seconds))

    def out_of_memory(self, stage: str) -> None:
        """Passed on."""
        self._tell(lambda each: each.out_of_memory(stage))

    def engine_restarted(self) -> None:
        """Passed on."""
        self._tell(lambda each: each.engine_restarted())

    def _tell(self, what: Callable[[Observer], None]) -> None:
        for observer in self._observers:
            try:
                what(observer)
            except Exception:
                _log.exception("an observer failed", observer=type(observer).__name__)
