"""Stream responses to events: images are put together from their chunks and verified."""

from __future__ import annotations

import hashlib

from lora_api.v1 import generation_service_pb2, image_pb2

from lora_client import _results
from lora_client.errors import ProtocolError
from lora_client.types import Completed, Event, GenerationResult, Image, ImageReady, Preview, Progress, Queued

_MAX_IMAGE_BYTES = 1 << 30


class Assembly:
    """The state of one stream: images under construction."""

    def __init__(self) -> None:
        self._infos: dict[int, image_pb2.ImageInfo] = {}
        self._parts: dict[int, bytearray] = {}

    def feed(self, response: generation_service_pb2.StreamGenerateResponse) -> Event | None:
        """Takes one response; returns the event that it makes, or None (an unfinished image, an unknown kind).

        Raises:
            ProtocolError: If chunks do not fit together, or an image differs from its checksum.
        """
        kind = response.WhichOneof("event")
        if kind == "queued":
            queued = response.queued
            expected_s = queued.expected_time.ToNanoseconds() / 1e9 if queued.HasField("expected_time") else None
            return Queued(queued.request_id, queued.position, queued.seed, expected_s)
        if kind == "progress":
            progress = response.progress
            elapsed_s = progress.elapsed_time.ToNanoseconds() / 1e9
            return Progress(progress.completed_steps, progress.total_steps, elapsed_s)
        if kind == "preview":
            return Preview(response.preview.image_index, response.preview.completed_steps, response.preview.data)
        if kind == "image_chunk":
            return self._chunk(response.image_chunk)
        if kind == "stats":
            if self._parts:
                raise ProtocolError("the stream ended within an image")
            return Completed(_results.stats(response.stats))
        return None

    def _chunk(self, chunk: generation_service_pb2.ImageChunk) -> ImageReady | None:
        index = chunk.image_index
        if chunk.HasField("info"):
            if index in self._parts or not 0 < chunk.info.size_bytes <= _MAX_IMAGE_BYTES:
                raise ProtocolError(f"image {index} begins twice, or has an impossible size")
            self._infos[index] = chunk.info
            self._parts[index] = bytearray()
        parts = self._parts.get(index)
        if parts is None or chunk.offset_bytes != len(parts):
            raise ProtocolError(f"a chunk of image {index} is missing")
        parts += chunk.data
        info = self._infos[index]
        if len(parts) > info.size_bytes:
            raise ProtocolError(f"image {index} is longer than announced")
        if len(parts) < info.size_bytes:
            return None
        del self._parts[index]
        return ImageReady(make_image(info, bytes(parts)))


def make_image(info: image_pb2.ImageInfo, data: bytes) -> Image:
    """Checks an image against its checksum and returns it."""
    if hashlib.sha256(data).hexdigest() != info.sha256:
        raise ProtocolError(f"image {info.index} differs from its checksum")
    return Image(info.index, _results.image_format(info.format), data, _results.provenance(info.provenance))


class ResultCollector:
    """Gathers the events of a request into its result."""

    def __init__(self) -> None:
        self._images: list[Image] = []
        self._completed: Completed | None = None

    def add(self, event: Event) -> None:
        """Takes one event."""
        if isinstance(event, ImageReady):
            self._images.append(event.image)
        elif isinstance(event, Completed):
            self._completed = event

    def result(self) -> GenerationResult:
        """Returns the result of a stream that has ended.

        Raises:
            ProtocolError: If it ended without stats.
        """
        if self._completed is None:
            raise ProtocolError("the stream ended without its last event")
        images = tuple(sorted(self._images, key=lambda image: image.index))
        return GenerationResult(self._completed.stats.request_id, images, self._completed.stats)
