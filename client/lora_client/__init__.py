"""Client of the LoRA diffusion service: thin, typed, without torch.

from lora_client import LoraClient

with LoraClient("127.0.0.1:50051") as client:
    client.generate("a red star", adapters=["neon:0.8"], seed=42).images[0].save("star.png")
"""

from lora_client._channel import Tls
from lora_client._retry import RetryPolicy
from lora_client.aio import AsyncLoraClient
from lora_client.client import LoraClient
from lora_client.errors import LoraClientError
from lora_client.types import (
    Adapter,
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
    Provenance,
    Queued,
    ServerInfo,
    ServerWatch,
    SkipLayerGuidance,
    Stats,
)

__all__ = [
    "Adapter",
    "AdapterUse",
    "AdapterUseCount",
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
    "Provenance",
    "Queued",
    "RetryPolicy",
    "ServerInfo",
    "ServerWatch",
    "SkipLayerGuidance",
    "Stats",
    "Tls",
]
