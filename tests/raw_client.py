"""A client of HTTP/2 with every window and every byte under control: what well-behaved ones would never do."""

from __future__ import annotations

import asyncio
import struct
from typing import Any, Self

import h2.config
import h2.connection
import h2.events
import h2.exceptions
import h2.settings

PATH = "/lora_api.v1.GenerationService/Generate"


class RawClient:
    """One connection; what arrives is kept by stream."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, window: int) -> None:
        self._reader, self._writer = reader, writer
        self.http = h2.connection.H2Connection(h2.config.H2Configuration(header_encoding="utf-8"))
        self.http.initiate_connection()
        self.http.update_settings({h2.settings.SettingCodes.INITIAL_WINDOW_SIZE: window})
        self.headers: dict[int, dict[str, str]] = {}
        self.received: dict[int, int] = {}
        self.closed = False
        self._reading: asyncio.Task[None] | None = None

    @classmethod
    async def connect(cls, address: str, window: int = 65_535) -> Self:
        """Connects; *window* is what each stream's answer may take before it is asked for."""
        host, _, port = address.rpartition(":")
        client = cls(*await asyncio.open_connection(host, int(port)), window)
        client._flush()
        client._reading = asyncio.create_task(client._read())
        return client

    def call(self, path: str = PATH, *, token: str | None = None) -> int:
        """Opens a stream with the headers of a call; returns its number."""
        stream: int = self.http.get_next_available_stream_id()
        pairs = [
            (":method", "POST"),
            (":scheme", "http"),
            (":path", path),
            (":authority", "localhost"),
            ("te", "trailers"),
            ("content-type", "application/grpc"),
        ]
        self.http.send_headers(stream, pairs + ([("authorization", f"Bearer {token}")] if token else []))
        self._flush()
        return stream

    def send(self, stream: int, message: bytes, *, announced: int | None = None, end: bool = True) -> None:
        """Sends a message that fits into the windows, or the beginning of one of *announced* bytes."""
        size = len(message) if announced is None else announced
        body = b"\0" + struct.pack(">I", size) + message
        most = self.http.max_outbound_frame_size
        parts = [body[at : at + most] for at in range(0, len(body), most)]
        for k, part in enumerate(parts):
            self.http.send_data(stream, part, end_stream=end and k == len(parts) - 1)
        self._flush()

    def window(self, stream: int) -> int:
        """How much may be sent on *stream* at this moment."""
        return int(self.http.local_flow_control_window(stream))

    async def statuses(self, count: int, timeout_s: float = 10.0) -> list[str]:
        """Waits until so many calls have ended; returns their `grpc-status`."""
        async with asyncio.timeout(timeout_s):
            while True:
                found = [each["grpc-status"] for each in self.headers.values() if "grpc-status" in each]
                if len(found) >= count or self.closed:
                    return found
                await asyncio.sleep(0.01)

    async def until_closed(self, timeout_s: float = 10.0) -> None:
        """Waits until the server closes the connection."""
        async with asyncio.timeout(timeout_s):
            while not self.closed:
                await asyncio.sleep(0.01)

    async def close(self) -> None:
        """Goes away without a word."""
        assert self._reading is not None
        self._reading.cancel()
        self._writer.close()
        await asyncio.wait([self._reading])

    def _flush(self) -> None:
        if not self.closed:
            self._writer.write(self.http.data_to_send())

    async def _read(self) -> None:
        try:
            while data := await self._reader.read(65_536):
                for event in self.http.receive_data(data):
                    self._note(event)
                self._flush()
        except (OSError, h2.exceptions.ProtocolError):  # reset, or more after the end
            pass
        finally:
            self.closed = True

    def _note(self, event: Any) -> None:
        if isinstance(event, h2.events.ResponseReceived | h2.events.TrailersReceived):
            self.headers.setdefault(event.stream_id, {}).update(dict(event.headers))
        elif isinstance(event, h2.events.DataReceived):
            self.received[event.stream_id] = self.received.get(event.stream_id, 0) + len(event.data)
