"""Who makes a call, for those who serve it. Set once at the border; without a token file everybody is anybody."""

from __future__ import annotations

from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass

from lora_server.types import DEFAULT_TENANT, Viewer

ROLES = ("generate", "admin")


@dataclass(frozen=True, slots=True)
class Caller:
    """Who makes a call.

    Attributes:
        tenant: Whose queue, whose request ids and whose adapters.
        roles: What the caller may do, of ROLES.
    """

    tenant: str
    roles: frozenset[str]

    @property
    def viewer(self) -> Viewer:
        """As whom the caller is shown adapters: who manages them finds those that are bound to others, too."""
        return Viewer(self.tenant, is_operator="admin" in self.roles)


ANYBODY = Caller(DEFAULT_TENANT, frozenset(ROLES))
"""Every caller of a server without a token file."""

_caller: ContextVar[Caller] = ContextVar("caller", default=ANYBODY)
_again: ContextVar[Callable[[], Caller]] = ContextVar("again", default=lambda: ANYBODY)


def current_caller() -> Caller:
    """Returns who makes the call that this task serves."""
    return _caller.get()


def set_caller(caller: Caller, again: Callable[[], Caller] | None = None) -> None:
    """Says who makes the call that this task serves, to it and to what it starts; *again* finds that out anew."""
    _caller.set(caller)
    _again.set(again or (lambda: caller))


def renew_caller() -> Caller:
    """Finds out anew who makes a call that lasts, and returns it as `current_caller` does from then on.

    Raises:
        UnauthenticatedError, PermissionDeniedError: If the call would not be let in any more.
    """
    caller = _again.get()()
    _caller.set(caller)
    return caller
