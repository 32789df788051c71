"""Client of the LoRA diffusion service: thin, typed, without torch.

from lora_client import LoraClient

with LoraClient("127.0.0.1:50051") as client:
    client.generate("a red star", adapters=["neon:0.8"], seed=42).images[0].save("star.png")
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lora_client._channel import Tls
    from lora_client._retry import RetryPolicy
    from lora_client.aio import AsyncLoraClient
    from lora_client.client import LoraClient
    from lora_client.errors import LoraClientError
    from lora_client.types import (
        Adapter,
        AdapterLike,
        AdaptersLike,
        AdapterUse,
        AdapterUseCount,
        Completed,
        Event,
        GenerationOptions,
        GenerationResult,
        Image,
        ImageReady,
        LoadReport,
        Preview,
        Progress,
        PromptTruncation,
        Provenance,
        Queued,
        ServerInfo,
        ServerWatch,
        SkipLayerGuidance,
        Stats,
    )

__all__ = [
    "Adapter",
    "AdapterLike",
    "AdapterUse",
    "AdapterUseCount",
    "AdaptersLike",
    "AsyncLoraClient",
    "Completed",
    "Event",
    "GenerationOptions",
    "GenerationResult",
    "Image",
    "ImageReady",
    "LoadReport",
    "LoraClient",
    "LoraClientError",
    "Preview",
    "Progress",
    "PromptTruncation",
    "Provenance",
    "Queued",
    "RetryPolicy",
    "ServerInfo",
    "ServerWatch",
    "SkipLayerGuidance",
    "Stats",
    "Tls",
]

_HOMES = {
    "Tls": "_channel",
    "RetryPolicy": "_retry",
    "AsyncLoraClient": "aio",
    "LoraClient": "client",
    "LoraClientError": "errors",
}


def __getattr__(name: str) -> Any:
    """Imports at first use: the command line quiets gRPC before gRPC is imported, which reads its variables then."""
    if name in __all__:
        return getattr(importlib.import_module(f"{__name__}.{_HOMES.get(name, 'types')}"), name)
    if name in ("aio", "client", "errors", "types"):
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
