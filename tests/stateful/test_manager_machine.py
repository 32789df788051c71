"""Manager, cache and slots under random histories, against a model of what must hold whatever happens.

Nothing runs on threads: every look at a folder and every read is a task, and the machine decides which runs when, also
between two requests. So an interleaving that breaks something shrinks to a few lines. The model knows the leases and
pins that are out, exactly; of the rest it knows what must never be.

How many histories: the settings profile of hypothesis, see CONTRIBUTING.md.
"""

from __future__ import annotations

from concurrent.futures import Future
from typing import Any

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from lora_server.adapters.api import AdapterLease
from lora_server.adapters.manager import AdapterManager
from lora_server.config import CacheConfig
from lora_server.errors import (
    AdapterInUseError,
    AdapterNotFoundError,
    AdapterPinnedError,
    CacheExhaustedError,
    LoraServerError,
)
from lora_server.types import (
    AdapterSource,
    AdapterUse,
    ByDigest,
    ByName,
    PinInfo,
    PinLevel,
)

from tests.stateful.executor import Tasks
from tests.unit.adapters.memory_loader import MemoryLoader

PATHS = ("/a", "/b", "/c", "/d")
NAMES = ("a", "b", "c", "d", "a", "b", "c", "d", "x")
CONTENTS = ("p", "q", "r", "s", "u", "t", "bad")  # folders may share content: one version of two names
SIZES = {"p": 10, "q": 10, "r": 10, "s": 15, "u": 5, "t": 40, "bad": 10}  # t never fits
BUDGET_BYTES, MAX_ADAPTERS, SLOTS = 30, 4, 3

USES = st.one_of(
    st.builds(lambda name: AdapterUse(ByName(name)), st.sampled_from(NAMES)),
    st.builds(lambda path: AdapterUse(AdapterSource(path)), st.sampled_from(PATHS)),
    st.builds(lambda name: AdapterUse(ByName(name)), st.sampled_from(NAMES)),
    st.builds(lambda content: AdapterUse(ByDigest(f"sha256:{content}")), st.sampled_from(CONTENTS[:5])),
    st.builds(
        lambda name, content: AdapterUse(ByName(name), expected_digest=f"sha256:{content}"),
        st.sampled_from(NAMES),
        st.sampled_from(CONTENTS[:5]),
    ),
)


NAMED = st.builds(
    lambda path, name, number: AdapterUse(AdapterSource(path, number, name)),
    st.sampled_from(PATHS),
    st.sampled_from(["a", "x", "y", None]),
    st.sampled_from([None, 1, 2]),
)
"""Sources that ask for names and ids of their own."""


AT_ONCE = st.sampled_from([True, True, True, False])
"""Whether everything that is due runs before the next rule, or whatever the machine likes."""


class ManagerMachine(RuleBasedStateMachine):
    """One manager and everybody who uses it."""

    def __init__(self) -> None:
        super().__init__()
        self.now_s = 1000.0
        self.tasks = Tasks()
        self.loader = MemoryLoader(
            {path: (content, SIZES[content]) for path, content in zip(PATHS, "pqrs", strict=True)}
        )
        config = CacheConfig(
            budget_bytes=BUDGET_BYTES,
            max_adapters=MAX_ADAPTERS,
            device_slots=SLOTS,
            max_pinned_share=1,
            max_on_demand_adapters=2,
        )
        self.manager = AdapterManager(config, self.loader, clock=lambda: self.now_s, pool=self.tasks.pool)
        self.pending: list[Future[Any]] = []
        self.resolved: list[Any] = []
        self.leases: list[AdapterLease] = []
        self.pins: dict[str, PinInfo] = {}
        self.slots_taken: list[list[str]] = []
        self.faults: list[str] = []  # what callbacks of futures saw, where an assertion would go unheard

    # What happens on the disk, and when

    @rule(path=st.sampled_from(PATHS), content=st.sampled_from([*CONTENTS[:5], *CONTENTS]))
    def change(self, path: str, content: str) -> None:
        self.loader.folders[path] = (content, SIZES[content])

    @rule(path=st.sampled_from(PATHS))
    def vanish(self, path: str) -> None:
        self.loader.folders.pop(path, None)

    @rule()
    def mend(self) -> None:
        self.loader.folders.update(
            {f"/{name}": (content, SIZES[content]) for name, content in zip("abcd", "pqrs", strict=True)}
        )

    @precondition(lambda self: len(self.tasks))
    @rule(place=st.integers(0, 7))
    def run_one(self, place: int) -> None:
        self.tasks.run(place)

    @precondition(lambda self: len(self.tasks))
    @rule()
    def run_all(self) -> None:
        self.tasks.run_all()

    @rule(seconds=st.integers(100, 2000))
    def wait(self, seconds: int) -> None:
        self.now_s += seconds
        self.manager._on_alarm()

    # What clients and the engine ask for

    @initialize()
    def warm(self) -> None:
        for path in PATHS:
            self._follow(self.manager.load(AdapterSource(path)))
        self.tasks.run_all()

    @rule(path=st.sampled_from(PATHS), name=st.sampled_from([None, None, "x"]), replace=st.booleans(), at_once=AT_ONCE)
    def load(self, path: str, name: str | None, replace: bool, at_once: bool) -> None:
        self._follow(self.manager.load(AdapterSource(path, name=name), replace=replace))
        self._run(at_once)

    @rule(uses=st.lists(USES, min_size=1, max_size=3), at_once=AT_ONCE)
    def resolve(self, uses: list[AdapterUse], at_once: bool) -> None:
        self._follow(self.manager.resolve(uses), self._on_resolved)
        self._run(at_once)

    @rule(path=st.sampled_from(PATHS), tenants=st.sampled_from([{"acme"}, set()]), at_once=AT_ONCE)
    def bind(self, path: str, tenants: set[str], at_once: bool) -> None:
        self._follow(self.manager.load(AdapterSource(path), tenants=frozenset(tenants)))
        self._run(at_once)

    @rule(
        uses=st.lists(st.one_of(USES, NAMED), min_size=1, max_size=2),
        tenant=st.sampled_from(["acme", "umbrella", "third"]),
        at_once=AT_ONCE,
    )
    def draw(self, uses: list[AdapterUse], tenant: str, at_once: bool) -> None:
        """A request of a tenant up to its lease: at either moment nothing of it is bound to others."""

        def acquire(resolved: Any) -> None:
            self._check_open(resolved, tenant)
            self._on_resolved(resolved)
            self._follow(self.manager.acquire(resolved), lambda lease: self._on_drawn(resolved, tenant, lease))

        self._follow(self.manager.resolve(uses, tenant), acquire)
        self._run(at_once)

    def _on_drawn(self, resolved: Any, tenant: str, lease: AdapterLease) -> None:
        self._check_open(resolved, tenant)
        self.leases.append(lease)

    def _check_open(self, resolved: Any, tenant: str) -> None:
        bound = {info.source.path: info.tenants for info in self.manager.list() if info.tenants is not None}
        for each in resolved:
            if tenant not in bound.get(str(each.found.folder), {tenant}):
                self.faults.append(f"{tenant} gets {each.found.folder}, which is bound to others")

    @precondition(lambda self: self.resolved)
    @rule(place=st.integers(0, 7), at_once=AT_ONCE)
    def acquire(self, place: int, at_once: bool) -> None:
        self._follow(self.manager.acquire(self.resolved[place % len(self.resolved)]), self.leases.append)
        self._run(at_once)

    @rule(names=st.lists(st.sampled_from(PATHS), min_size=1, max_size=2, unique=True), at_once=AT_ONCE)
    def use(self, names: list[str], at_once: bool) -> None:
        """A whole request up to its lease: resolve, and acquire what was resolved as soon as it is."""

        def acquire(resolved: Any) -> None:
            self._on_resolved(resolved)
            self._follow(self.manager.acquire(resolved), self.leases.append)

        self._follow(self.manager.resolve([AdapterUse(AdapterSource(name)) for name in names]), acquire)
        self._run(at_once)

    @precondition(lambda self: self.leases)
    @rule(place=st.integers(0, 7))
    def release(self, place: int) -> None:
        lease = self.leases.pop(place % len(self.leases))  # before it is given back, which may let others in
        lease.release()
        lease.release()

    @rule(
        name=st.sampled_from(NAMES),
        level=st.sampled_from(PinLevel),
        ttl_s=st.one_of(st.none(), st.integers(100, 2000)),  # too long for the true alarm to ring meanwhile
        at_once=AT_ONCE,
    )
    def pin(self, name: str, level: PinLevel, ttl_s: int | None, at_once: bool) -> None:
        self._follow(self.manager.pin(ByName(name), level, ttl_s), lambda info: self._on_pinned(name, info.pin))
        self._run(at_once)

    @rule(name=st.sampled_from(NAMES))
    def unpin(self, name: str) -> None:
        try:
            self.pins.pop(name, None)
            assert self.manager.unpin(ByName(name)).pin is None
        except AdapterNotFoundError:
            assert name not in self.pins

    @rule(name=st.sampled_from(NAMES), drain=st.booleans())
    def unload(self, name: str, drain: bool) -> None:
        infos = {info.name: info for info in self.manager.list()}
        mine = {version.digest for version in infos[name].versions} if name in infos else set()
        others = {v.digest for info in infos.values() if info.name != name for v in info.versions}
        try:
            freed = self.manager.unload(ByName(name), drain=drain)
        except AdapterNotFoundError:
            assert name not in infos
        except AdapterPinnedError:
            assert name in self.pins
        except AdapterInUseError:
            assert not drain
            assert mine & self._leased()
        else:
            assert name not in self.pins
            assert drain or not mine & self._leased()
            assert freed <= sum(SIZES[digest.removeprefix("sha256:")] for digest in mine - others - self._leased())

    @precondition(lambda self: self.pending)
    @rule(place=st.integers(0, 7))
    def cancel(self, place: int) -> None:
        self.pending.pop(place % len(self.pending)).cancel()

    # What the engine does with leases

    @precondition(lambda self: self.leases)
    @rule(place=st.integers(0, 7))
    def step(self, place: int) -> None:
        digests = list(self.leases[place % len(self.leases)].weights)
        try:
            self.manager.slots.acquire(digests)
        except CacheExhaustedError:
            return
        self.slots_taken.append(digests)

    @precondition(lambda self: self.slots_taken)
    @rule()
    def finish_step(self) -> None:
        self.manager.slots.release(self.slots_taken.pop())

    # What must hold

    @invariant()
    def nothing_went_wrong_unheard(self) -> None:
        assert not self.faults

    @invariant()
    def books_are_right(self) -> None:
        self.manager.check_integrity()
        info = self.manager.cache_info()
        assert info.used_bytes <= BUDGET_BYTES
        assert info.cached_adapters <= MAX_ADAPTERS

    @invariant()
    def leases_are_those_that_were_given(self) -> None:
        assert self.manager.leased_count == sum(len(lease.weights) for lease in self.leases)
        cache = self.manager._cache
        for lease in self.leases:
            for digest, weights in lease.weights.items():
                assert digest in cache
                assert cache._entries[digest].value is weights

    @invariant()
    def pins_are_those_that_were_asked_for(self) -> None:
        infos = {info.name: info for info in self.manager.list()}  # looking ends what is due, in the model too
        self.pins = {
            name: pin for name, pin in self.pins.items() if pin.expire_time_s is None or pin.expire_time_s > self.now_s
        }
        assert {name: info.pin for name, info in infos.items() if info.pin is not None} == self.pins
        assert all(infos[name].current_digest in self.manager._cache for name in self.pins)

    @invariant()
    def nobody_waits_without_a_reason(self) -> None:
        """A wake-up that was lost shows: trying again without anything having happened must help nobody."""
        if not len(self.tasks):
            before = (self.manager.waiting_count, self.manager.leased_count)
            self.manager._waiting.retry()
            assert (self.manager.waiting_count, self.manager.leased_count) == before
            if not any(not future.done() for future in self.pending):
                assert self.manager.waiting_count == 0

    def teardown(self) -> None:
        """Everybody goes home: then no future is open, nothing is leased, and the books are right."""
        while self.slots_taken:
            self.finish_step()
        while self.leases or len(self.tasks):
            self.tasks.run_all()
            if self.leases:
                self.release(0)
        assert not self.faults
        assert all(future.done() for future in self.pending)
        assert self.manager.leased_count == self.manager.waiting_count == self.manager.reading_count == 0
        self.manager.check_integrity()
        self.manager.close()

    # The model

    def _run(self, at_once: bool) -> None:
        if at_once:
            self.tasks.run_all()

    def _follow(self, future: Future[Any], on_success: Any = lambda _: None) -> None:
        def on_done(done: Future[Any]) -> None:
            if done.cancelled():
                return
            error = done.exception()
            if error is not None and not isinstance(error, LoraServerError):
                self.faults.append(f"not a domain error: {error!r}")
            if error is None:
                on_success(done.result())

        self.pending = [each for each in self.pending if not each.done()]
        self.pending.append(future)
        future.add_done_callback(on_done)

    def _on_resolved(self, resolved: Any) -> None:
        digests = [each.applied.digest for each in resolved]
        if len(set(digests)) < len(digests):
            self.faults.append(f"one version twice: {digests}")
        self.resolved = [*self.resolved[-3:], resolved]

    def _on_pinned(self, name: str, pin: PinInfo) -> None:
        self.pins[name] = pin

    def _leased(self) -> set[str]:
        return {digest for lease in self.leases for digest in lease.weights}


TestManagerMachine = ManagerMachine.TestCase
TestManagerMachine.settings = settings(
    max_examples=max(500, settings.default.max_examples),
    stateful_step_count=50,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)
