"""The supervisor's loop: starts the server, starts it again whenever it dies, and kills it when it is asked to."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

START_TIMEOUT_S = 120.0


@dataclass(slots=True)
class Outage:
    """From the moment of a kill to the moment that the next process said that it serves; monotonic seconds."""

    killed_s: float
    serving_s: float | None = None


def free_port() -> int:
    """A port that nobody has now."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port: int = probe.getsockname()[1]
        return port


class Supervisor:
    """Keeps one server alive on one address over one state directory, until `stop`."""

    def __init__(self, folder: Path, *options: str | Path) -> None:
        """*folder* gets the log and the books; *options* go to `lora-server serve`."""
        self.address = f"127.0.0.1:{free_port()}"
        self.log = folder / "server.log"
        self.outages: list[Outage] = []
        self.unasked_deaths: list[int] = []
        self.starts = 0
        self._books = folder / "books.json"
        self._command = [sys.executable, "-m", "tests.soak.serve", self._books, "serve", "--listen", self.address]
        self._command += options
        self._process: asyncio.subprocess.Process | None = None
        self._serving = asyncio.Event()
        self._stopping = False
        self._killed = False
        self._loop: asyncio.Task[int] | None = None

    async def start(self) -> None:
        """Begins the loop, and waits until the server serves."""
        self._loop = asyncio.ensure_future(self._supervise())
        await self.serving()

    async def serving(self) -> None:
        """Waits until the server serves."""
        async with asyncio.timeout(START_TIMEOUT_S):
            await self._serving.wait()

    @property
    def pid(self) -> int:
        """The process of the server."""
        assert self._process is not None
        return self._process.pid

    def kill(self) -> None:
        """Ends the server by SIGKILL, whatever it does; the loop starts the next one."""
        if not self._killed and not (self.outages and self.outages[-1].serving_s is None):
            self.outages.append(Outage(time.monotonic()))
        self._serving.clear()
        self._killed = True
        os.kill(self.pid, signal.SIGKILL)

    async def stop(self) -> int:
        """Ends server and loop by SIGTERM; returns the server's exit code."""
        assert self._process is not None
        assert self._loop is not None
        self._stopping = True
        self._process.terminate()
        return await self._loop

    def rss_bytes(self) -> int:
        """Memory of the server's process."""
        status = Path(f"/proc/{self.pid}/status").read_text()
        return int(status.split("VmRSS:")[1].split()[0]) * 1024

    async def books(self) -> dict[str, Any]:
        """Asks the server for its books, which stops its event loop for a moment."""
        self._books.unlink(missing_ok=True)
        os.kill(self.pid, signal.SIGUSR1)
        async with asyncio.timeout(30):
            while not self._books.exists():
                await asyncio.sleep(0.05)
        found: dict[str, Any] = json.loads(self._books.read_text())
        return found

    async def _supervise(self) -> int:
        while True:
            code = await self._live()
            if self._stopping:
                return code
            if not self._killed:
                self.unasked_deaths.append(code)
                self.outages.append(Outage(time.monotonic()))
            self._killed = False

    async def _live(self) -> int:
        """One life of the server; returns its exit code."""
        with open(self.log, "a") as log:
            self._process = await asyncio.create_subprocess_exec(
                *self._command, stdout=subprocess.PIPE, stderr=log, stdin=subprocess.DEVNULL
            )
        self.starts += 1
        assert self._process.stdout is not None
        if await self._process.stdout.readline():
            if self.outages:
                self.outages[-1].serving_s = time.monotonic()
            self._serving.set()
        code = await self._process.wait()
        self._serving.clear()
        return code
