"""How much of something that all tenants use one of them may hold. Pure functions of numbers."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Shares:
    """Places, or bytes, that tenants share.

    A tenant gets its share and no more, so that the rest is there when others come; who holds nothing always gets
    something, even beyond the total, so that several tenants cannot fill it together either. There are as many
    tenants as the operator has made tokens for. Where a tenant may hold all there is, the total is the only bound.

    Attributes:
        total: What there is.
        of_a_tenant: The most that one tenant may hold.
    """

    total: int
    of_a_tenant: int

    @classmethod
    def by(cls, total: int, tenant_share: float) -> Shares:
        """Returns the shares if a tenant may hold *tenant_share* of *total*, above 0 to 1; one at least."""
        return cls(total, max(1, int(total * tenant_share)))

    def has_room(self, of_tenant: int, of_all: int, needed: int = 1) -> bool:
        """Whether a tenant that holds *of_tenant*, of *of_all* that are held, may have *needed* more."""
        if self.of_a_tenant < self.total and of_tenant == 0:
            return True
        return of_tenant + needed <= self.of_a_tenant and of_all + needed <= self.total
