"""When a request that the server had no room for is sent again: when the server says, and not for ever. No I/O."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from dataclasses import dataclass

from lora_client.errors import LoraClientError, QueueFullError

DEFAULT_MAX_ATTEMPTS = 10
_JITTER = 0.1
"""Share of a wait by which it is made longer at random."""


@dataclass(frozen=True, slots=True)
class RetryPolicy:
    """How often, and for how long at most, a request for images is sent again when the server answers QUEUE_FULL.

    Each wait is as long as the server asks for (RetryInfo), a little longer at random, and within the caller's timeout;
    the request keeps its id.

    Attributes:
        max_attempts: The most attempts, the first one included, at least 1; 1 never sends anything again.
        max_wait_s: The longest single wait, in seconds; who is asked to wait longer gets the error at once.
        on_wait: Called before each wait with its seconds and the error, in the caller's thread; None tells nobody.
    """

    max_attempts: int = DEFAULT_MAX_ATTEMPTS
    max_wait_s: float = 300.0
    on_wait: Callable[[float, LoraClientError], None] | None = None

    def __post_init__(self) -> None:
        if self.max_attempts < 1:
            raise ValueError(f"max_attempts is at least 1, not {self.max_attempts}")


class Attempts:
    """The attempts of one request, within its timeout."""

    def __init__(self, policy: RetryPolicy, timeout_s: float | None) -> None:
        """Begins now; *timeout_s* bounds all attempts and waits together, None does not."""
        self._policy = policy
        self._left = policy.max_attempts
        self._deadline_s = None if timeout_s is None else time.monotonic() + timeout_s

    def remaining_s(self) -> float | None:
        """What is left of the timeout, for the next attempt; None without one."""
        return None if self._deadline_s is None else max(0.0, self._deadline_s - time.monotonic())

    def wait_s(self, error: QueueFullError) -> float:
        """Returns how long to wait before the next attempt, and tells the policy's listener.

        Raises:
            QueueFullError: *error*, if there is no attempt left, or no time.
        """
        self._left -= 1
        asked_s, remaining_s = error.retry_after_s, self.remaining_s()
        if self._left < 1 or asked_s is None or asked_s > self._policy.max_wait_s:
            raise error
        wait_s = asked_s * (1 + _JITTER * random.random())
        if remaining_s is not None and wait_s >= remaining_s:
            raise error
        if self._policy.on_wait is not None:
            self._policy.on_wait(wait_s, error)
        return wait_s
