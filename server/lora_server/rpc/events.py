"""A job's events as an async iterator: the bridge from engine threads to the event loop."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator

from lora_server.engine.api import Job
from lora_server.types import GenerationEvent, ProgressEvent, QueuedEvent

HEARTBEAT_S = 10.0


async def follow(job: Job, heartbeat_s: float = HEARTBEAT_S) -> AsyncGenerator[GenerationEvent, None]:
    """Yields the job's events to the last; when nothing happens for *heartbeat_s*, its latest state again.

    Leaves the job however it ends: an abandoned or cancelled iteration cancels a job that nobody else follows.

    Raises:
        LoraServerError: If the job fails.
    """
    loop = asyncio.get_running_loop()
    news = asyncio.Event()

    def wake() -> None:
        # The loop may be closed when a job outlives the server.
        if not loop.is_closed():
            loop.call_soon_threadsafe(news.set)

    subscription = job.subscribe(wake)
    latest: GenerationEvent | None = None
    try:
        while not subscription.finished:
            news.clear()
            events = subscription.poll()
            for event in events:
                if isinstance(event, (QueuedEvent, ProgressEvent)):
                    latest = event
                yield event
            if events or subscription.finished:
                continue
            try:
                await asyncio.wait_for(news.wait(), heartbeat_s)
            except TimeoutError:
                if latest is not None:
                    yield latest
    finally:
        subscription.close()
