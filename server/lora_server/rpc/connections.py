"""What each connection, and each address, costs the server, and who has to go. Event loop only.

Calls without a known token, of health among them, are a stranger's. A connection has a small allowance of them, as its
address has; who uses it up hears TOO_MANY_CALLS once, then nothing, and loses the connection a second later. Nothing is
answered in between, so that a connection can have no more calls in that second than it may have streams. A connection
that has made a call with a token is never closed for the calls of strangers: it may be that of a proxy.
"""

from __future__ import annotations

import asyncio
import contextlib
import enum
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import structlog

from lora_server.errors import TooManyCallsError
from lora_server.rpc import sockets

_log = structlog.get_logger(__name__)

STRANGERS_CALLS, STRANGERS_CALLS_PER_S = 50, 10.0
"""Calls without a token that one connection may make at once, and go on making."""

ADDRESS_CALLS, ADDRESS_CALLS_PER_S = 300, 50.0
"""The same for all connections of an address; over them, each connection may make HOT_CALLS."""

HOT_CALLS = 4
MAX_STREAMS = 128
"""Calls of one connection at one time."""

MAX_HELD_CALLS = 1_000
HOLD_S = 1.0
SWEEP_S, BESIEGED_SWEEP_S = 1.0, 0.1
STRANGERS_IDLE_S, KNOWN_IDLE_S = 60.0, 5.0
MAX_UNREAD_BYTES = 32 * 1024 * 1024
MAX_UNREAD_BYTES_IN_ALL = 256 * 1024 * 1024
_UNREAD_FOR_S = 5.0
_ROOM_TIMEOUT_S = 10.0
_MAX_STALLED_CALLS = 8
_UNIX = "unix"


class Verdict(enum.Enum):
    """What to do with a stranger's call."""

    ANSWER = enum.auto()
    REFUSE = enum.auto()
    HOLD = enum.auto()


class Allowance:
    """A bucket that leaks."""

    def __init__(self, most: float, per_s: float) -> None:
        self._most = most
        self._per_s = per_s
        self._level = 0.0
        self._at_s = 0.0

    def level(self, now_s: float) -> float:
        """How much of it is used."""
        self._level = max(0.0, self._level - (now_s - self._at_s) * self._per_s)
        self._at_s = now_s
        return self._level

    def use(self, now_s: float) -> float:
        """Uses one more; returns the level, which never exceeds twice what is allowed, so that it passes soon."""
        self._level = min(self.level(now_s) + 1, 2 * self._most)
        return self._level


@dataclass(eq=False, slots=True)
class Connection:
    """One connection; of a Unix socket, whose peers have no name, one call.

    Attributes:
        known: Whether a call with a token, or any on a server without tokens, was made over it.
        called_s: When it was seen first, or a call was made over it last.
        held: Calls that came after it was condemned.
        calls: Calls that gRPC has not done with.
        finished: When those of them that only wait for their reader were finished.
        unread: Bytes of answers that were handed to gRPC and not taken, by call.
        expected_bytes: Bytes that answers may have that are being made.
    """

    peer: sockets.Peer | None
    called_s: float
    known: bool = False
    condemned: bool = False
    held: int = 0
    calls: int = 0
    strangers: Allowance = field(default_factory=lambda: Allowance(STRANGERS_CALLS, STRANGERS_CALLS_PER_S))
    finished: dict[object, float] = field(default_factory=dict)
    unread: dict[object, tuple[int, float]] = field(default_factory=dict)
    expected_bytes: int = 0
    read: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def unread_bytes(self) -> int:
        """Bytes of all answers that are not taken."""
        return sum(size for size, _ in self.unread.values())

    @contextlib.contextmanager
    def call(self, context: Any) -> Iterator[Callable[[], None]]:
        """Counts a call until gRPC has done with it, which may be long after its handler has.

        What is yielded is to be told if the handler has nothing left to do but to wait for the reader.
        """
        call = object()

        def ended() -> None:
            self.finished.setdefault(call, time.monotonic())

        def done(_: object) -> None:
            self.calls -= 1
            self.finished.pop(call, None)

        self.calls += 1
        context.add_done_callback(done)
        try:
            yield ended
        finally:
            ended()

    @contextlib.contextmanager
    def sending(self, size: int) -> Iterator[None]:
        """Counts *size* bytes of an answer until they are taken."""
        answer = object()
        self.unread[answer] = (size, time.monotonic())
        try:
            yield
        finally:
            del self.unread[answer]
            self.read.set()

    @contextlib.contextmanager
    def expecting(self, size: int) -> Iterator[None]:
        """Counts *size* bytes of an answer that is being made."""
        self.expected_bytes += size
        try:
            yield
        finally:
            self.expected_bytes -= size
            self.read.set()

    async def room(self, size: int = 0) -> None:
        """Waits until what its peer has not read is little enough for one more answer, of *size* bytes perhaps.

        Raises:
            TooManyCallsError: If that takes over ten seconds.
        """
        try:
            async with asyncio.timeout(_ROOM_TIMEOUT_S):
                while self.unread_bytes + self.expected_bytes + size > MAX_UNREAD_BYTES:
                    self.read.clear()
                    await self.read.wait()
        except TimeoutError:
            raise TooManyCallsError("answers that nobody reads", "read them first") from None


class Connections:
    """All connections of a server."""

    def __init__(self, most: int, stalled_reader_timeout_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        """Keeps half of *most* free as far as connections of strangers go, and an eighth as far as idle ones do."""
        self._most = most
        self._stalled_reader_timeout_s = stalled_reader_timeout_s
        self._clock = clock
        self._port: int | None = None
        self._connections: dict[sockets.Peer, Connection] = {}
        self._addresses: dict[str, Allowance] = {}
        self._condemned: list[Connection] = []
        self._held = 0
        self._besieged = False
        self._sweeping: asyncio.Task[None] | None = None
        self.closed = 0

    def start(self, address: str) -> None:
        """Begins to look after the connections of *address*, as bound; those of a Unix socket look after themselves."""
        if not address.startswith(f"{_UNIX}:"):
            self._port = int(address.rpartition(":")[2])
            self._sweeping = asyncio.ensure_future(self._sweep_for_ever())

    def stop(self) -> None:
        """Ends that. Idempotent."""
        if self._sweeping is not None:
            self._sweeping.cancel()

    def of(self, peer: str) -> Connection:
        """Returns the connection of the peer that gRPC calls so, over which a call comes."""
        key = sockets.peer_of(peer)
        return Connection(None, self._clock()) if key is None else self._of(key)

    def _of(self, peer: sockets.Peer) -> Connection:
        connection = self._connections.get(peer)
        if connection is None:
            connection = self._connections[peer] = Connection(peer, self._clock())
        connection.called_s = self._clock()
        return connection

    def stranger(self, connection: Connection) -> Verdict:
        """Counts a call without a token over *connection*, and says what to do with it."""
        if connection.peer is None:
            return Verdict.ANSWER
        now_s, host = self._clock(), connection.peer[0]
        of_address = self._addresses.setdefault(host, Allowance(ADDRESS_CALLS, ADDRESS_CALLS_PER_S)).use(now_s)
        calls = connection.strangers.use(now_s)
        if connection.condemned:
            return self._verdict_on_condemned(connection)
        if calls <= (HOT_CALLS if of_address > ADDRESS_CALLS else STRANGERS_CALLS):
            return Verdict.ANSWER
        if not connection.known:
            self._condemn(connection)
        return Verdict.REFUSE

    def _verdict_on_condemned(self, connection: Connection) -> Verdict:
        connection.held += 1
        if connection.held == 2 * MAX_STREAMS:  # it does not wait for answers, but takes its calls back
            self._close([connection], self._descriptors())
        return Verdict.HOLD if self._held < MAX_HELD_CALLS else Verdict.REFUSE

    async def hold(self) -> None:
        """Waits until the connection of a held call is closed, which cancels it."""
        self._held += 1
        try:
            await asyncio.sleep(2 * HOLD_S)
        finally:
            self._held -= 1

    def _condemn(self, connection: Connection) -> None:
        connection.condemned = True
        self._condemned.append(connection)
        if len(self._condemned) == 1:
            asyncio.get_running_loop().call_later(HOLD_S, self._close_condemned)

    def _close_condemned(self) -> None:
        condemned, self._condemned = self._condemned, []
        self._close(condemned, self._descriptors())

    def _descriptors(self) -> dict[sockets.Peer, int]:
        return {} if self._port is None else sockets.connections(self._port)

    def _close(self, connections: list[Connection], descriptors: dict[sockets.Peer, int]) -> None:
        for connection in connections:
            peer = connection.peer
            if peer is not None and self._port is not None and peer in descriptors:
                self.closed += sockets.shut(peer, descriptors[peer], self._port)
                self._connections.pop(peer, None)

    async def _sweep_for_ever(self) -> None:
        told = 0
        while True:
            await asyncio.sleep(BESIEGED_SWEEP_S if self._besieged else SWEEP_S)
            try:
                self._sweep()
            except Exception:
                _log.exception("the connections could not be looked after")
            if self.closed > told:
                _log.warning("closed connections", connections=self.closed - told)
                told = self.closed

    def _sweep(self) -> None:
        """Forgets who has gone, and closes what is idle, stalled, or too much."""
        now_s, descriptors = self._clock(), self._descriptors()
        for peer in self._connections.keys() - descriptors.keys():
            del self._connections[peer]
        for peer in descriptors.keys() - self._connections.keys():
            self._of(peer)
        self._addresses = {host: each for host, each in self._addresses.items() if each.level(now_s)}
        mine = list(self._connections.values())
        self._close([each for each in mine if self._is_idle(each, now_s) or self._is_stalled(each, now_s)], descriptors)
        crowd = self._crowd(now_s)
        self._besieged = bool(crowd)
        self._close(crowd, descriptors)
        self._close(self._worst_reader(now_s), descriptors)

    def _is_idle(self, connection: Connection, now_s: float) -> bool:
        return not connection.known and not connection.calls and now_s - connection.called_s > STRANGERS_IDLE_S

    def _is_stalled(self, connection: Connection, now_s: float) -> bool:
        """Whether so many of its calls have nothing left but a reader who does not read, or all that it has."""
        stalled = sum(now_s - since_s > self._stalled_reader_timeout_s for since_s in connection.finished.values())
        return stalled >= _MAX_STALLED_CALLS or 0 < stalled == connection.calls

    def _crowd(self, now_s: float) -> list[Connection]:
        """Who has to go to keep room free: of the address that has the most connections, the longest silent first."""
        everybody = self._connections.values()
        count_of = Counter(peer[0] for peer in self._connections)
        strangers = [each for each in everybody if not each.known]
        idle = [each for each in everybody if each.known and not each.calls and now_s - each.called_s > KNOWN_IDLE_S]
        going: list[Connection] = []
        for some, most in ((strangers, self._most // 2), (idle, self._most * 7 // 8)):
            some.sort(key=lambda each: (-count_of[each.peer[0]] if each.peer else 0, each.called_s))
            going += some[: max(0, len(everybody) - len(going) - most)]
        return going

    def _worst_reader(self, now_s: float) -> list[Connection]:
        """Who has left the most unread, if that of all is too much, and it is not only just sent."""
        sizes = {each: each.unread_bytes for each in self._connections.values() if each.unread}
        if sum(sizes.values()) <= MAX_UNREAD_BYTES_IN_ALL:
            return []
        late = [each for each in sizes if now_s - min(since_s for _, since_s in each.unread.values()) > _UNREAD_FOR_S]
        return sorted(late, key=lambda each: sizes[each])[-1:]
