"""A house with something to tell: its counters, and a request that has ended."""

from __future__ import annotations

from lora_server.observer import RequestSummary, Stage
from lora_server.types import (
    ApplicationWay,
    AppliedAdapter,
    CacheInfo,
    DeviceMemory,
    EngineInfo,
    GenerationParameters,
    GenerationRequest,
    GenerationStats,
    ModelDefaults,
    ModelInfo,
    QueueInfo,
)

PROMPT = "a secret star"
TRACEPARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


class House:
    """The engine and the manager, as far as they are read."""

    model = ModelInfo("demo", "sd3", "P", "cuda:0", "bfloat16", ModelDefaults(64, 64, 4, 4.0), 16, 384)

    def info(self) -> EngineInfo:
        """Counters of an engine on a GPU."""
        return EngineInfo(
            steps_by_way={ApplicationWay.SLOTS: 7},
            image_steps=21,
            switches=1,
            page_writes=2,
            compiles=3,
            captures=4,
            prompt_hits=5,
            prompt_misses=6,
            device_memory=DeviceMemory(100, 40, 50, 60),
        )

    def queue_info(self) -> QueueInfo:
        """A queue with somebody in it."""
        return QueueInfo(3, 1, 64, 8, 2, 1.5)

    def cache_info(self) -> CacheInfo:
        """Books of a cache."""
        return CacheInfo(1000, 100, 10, 9, 4, 8, 2, 11, 12, 13, leases=1, device_evictions=14)


def summary(outcome: str = "OK") -> RequestSummary:
    """A request of one adapter that took two seconds, from 100 s to 102 s."""
    request = GenerationRequest(
        "r1", GenerationParameters(PROMPT, "", 64, 64, 4, 4.0, 1, 1), tenant="t", traceparent=TRACEPARENT
    )
    stats = GenerationStats("r1", 0.5, 0.25, 0.1, 1.0, 0.1, 0.05, 2.0, 4, {ApplicationWay.MERGED: 4}, 1.5)
    stages = (Stage("queue", 100.0, 100.5), Stage("denoise", 100.6, 101.6), Stage("decode", 101.6, 103.0))
    adapters = (AppliedAdapter("neon", 1, "sha256:00", 0.5),)
    return RequestSummary(request, outcome, adapters, stats, stages, 100.0, 102.0)
