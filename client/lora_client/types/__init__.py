"""What the client takes and gives: frozen values, never messages of the wire."""

from lora_client.types.requests import (
    AdapterUse,
    GenerationOptions,
    SkipLayerGuidance,
)
from lora_client.types.results import (
    AdapterUsage,
    AppliedAdapter,
    Completed,
    Event,
    GenerationResult,
    Image,
    ImageReady,
    Preview,
    Progress,
    PromptTruncation,
    Provenance,
    Queued,
    Stats,
)
from lora_client.types.server import (
    Adapter,
    AdapterUseCount,
    Component,
    LoadReport,
    Pin,
    ServerInfo,
    ServerWatch,
    Version,
)

__all__ = [
    "Adapter",
    "AdapterUsage",
    "AdapterUse",
    "AdapterUseCount",
    "AppliedAdapter",
    "Completed",
    "Component",
    "Event",
    "GenerationOptions",
    "GenerationResult",
    "Image",
    "ImageReady",
    "LoadReport",
    "Pin",
    "Preview",
    "Progress",
    "PromptTruncation",
    "Provenance",
    "Queued",
    "ServerInfo",
    "ServerWatch",
    "SkipLayerGuidance",
    "Stats",
    "Version",
]
