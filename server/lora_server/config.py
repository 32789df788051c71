"""Configuration: small frozen models, resolved once at start, never mutated.

Every field has a description with its unit; the command line (`cli`) takes its help from here.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

MIB = 1024 * 1024
GIB = 1024 * MIB


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class ModelConfig(_Frozen):
    """Which model is served, and on what."""

    model: str = Field(
        default="demo", description="'demo' (embedded), a diffusers folder, a .safetensors checkpoint, or a hub id."
    )
    config_folder: Path | None = Field(
        default=None, description="Folder with the configuration and tokenizers of a .safetensors checkpoint."
    )
    device: Literal["auto", "cpu", "cuda"] = Field(
        default="auto", description="Device; auto takes CUDA if there is one."
    )
    dtype: Literal["auto", "float64", "float32", "bfloat16", "float16"] = Field(
        default="auto", description="Type of weights and arithmetic; auto is bfloat16 on CUDA and float32 on the CPU."
    )


class CacheConfig(_Frozen):
    """The adapter cache."""

    budget_bytes: int = Field(default=4 * GIB, gt=0, description="Host bytes of converted weights.")
    max_adapters: int = Field(default=1000, gt=0, description="The most versions in the host cache.")
    max_pinned_share: float = Field(
        default=0.9, ge=0, le=1, description="Share of the budget and of the count that pins may take, 0 to 1."
    )
    device_slots: int = Field(default=64, gt=0, description="The most versions resident on the device.")
    loader_threads: int = Field(default=2, gt=0, le=64, description="Threads that read, check and convert adapters.")


class LimitsConfig(_Frozen):
    """What one request or one adapter may ask for."""

    max_side_px: int = Field(default=2048, gt=0, description="Largest width or height in pixels.")
    max_inference_steps: int = Field(default=500, gt=0, description="Most denoising steps.")
    max_images_per_request: int = Field(default=16, gt=0, description="Most images in one request.")
    max_adapters_per_request: int = Field(default=8, gt=0, description="Most adapters in one request.")
    max_prompt_chars: int = Field(default=4000, gt=0, description="Most characters of a prompt.")
    max_rank: int = Field(default=256, gt=0, description="Largest rank of an adapter.")
    max_adapter_file_bytes: int = Field(default=8 * GIB, gt=0, description="Largest adapter file in bytes.")
    max_request_megapixel_steps: float | None = Field(
        default=None,
        gt=0,
        description="Most work in one request: width x height / 10^6 x steps x images. Default: what the others allow.",
    )


class EngineConfig(_Frozen):
    """The engine thread and its queue."""

    max_queued_requests: int = Field(default=64, gt=0, description="Requests that may wait.")
    max_batch_images: int = Field(default=8, gt=0, le=64, description="Most images denoised together in one step.")
    max_active_images: int = Field(
        default=16, gt=0, description="Images whose denoising has begun; what is beyond them waits in the queue."
    )
    max_skips: int = Field(default=32, gt=0, description="Batches that may pass an image over before it goes first.")
    deterministic: bool = Field(
        default=False, description="Step every image alone, adapters merged: equal bytes whatever else is running."
    )
    page_columns: int = Field(default=16, gt=0, le=256, description="Columns of a page of the device stack.")
    num_pages: int = Field(default=8, gt=0, le=256, description="Pages that a batch's adapters share.")
    column_buckets: tuple[int, ...] = Field(
        default=(64,), description="Columns that a batch may open, besides all; a CUDA graph each."
    )
    compile: bool = Field(default=True, description="Compile blocks and capture CUDA graphs; nothing on the CPU.")
    max_graphs: int = Field(default=64, ge=0, description="Most CUDA graphs.")
    warm_sizes: tuple[tuple[int, int], ...] | None = Field(
        default=None, description="Sizes (width, height) in pixels to warm up; None is the model's default size."
    )
    warm_images: tuple[int, ...] = Field(
        default=(1, 4, 8), description="Batches, in images with guidance, to warm up and measure at each size."
    )
    warm_classes: tuple[int, ...] = Field(
        default=(0,), description="Which of the family's classes of adapted linears to warm up; 0 is attention."
    )
    warm_up_s: float = Field(default=20.0, ge=0, description="Seconds after which warming up on the CPU is cut short.")
    prompt_cache_bytes: int = Field(default=256 * MIB, ge=0, description="Device bytes of cached prompt embeddings.")
    result_retention_s: float = Field(default=60.0, ge=0, description="Seconds a finished result is kept for retries.")
    max_retained_bytes: int = Field(default=64 * MIB, ge=0, description="Most bytes of results kept for retries.")
    threads: int | None = Field(default=None, gt=0, description="CPU threads of the model; default: torch's.")
    max_queued_per_tenant: int | None = Field(
        default=None, gt=0, description="Requests of one tenant that may wait; default: as many as of all."
    )
    max_restarts: int = Field(
        default=1,
        ge=0,
        description="Times an engine that dies is restarted within a minute before the server gives up.",
    )


class RpcConfig(_Frozen):
    """The listening side."""

    listen: str = Field(default="127.0.0.1:50051", description="HOST:PORT; port 0 takes a free port.")
    drain_timeout_s: float = Field(default=30.0, ge=0, description="Seconds that running requests get at shutdown.")
    prompt_metadata: bool = Field(default=True, description="Write prompts into the images' metadata.")
    stalled_reader_timeout_s: float = Field(
        default=60.0, gt=0, description="Seconds after which a stream whose client takes nothing is ended."
    )
    max_watchers: int = Field(default=32, ge=0, description="Most WatchServer streams at one time.")


class TelemetryConfig(_Frozen):
    """What the server tells of itself."""

    metrics_listen: str | None = Field(
        default=None,
        pattern=r":\d{1,5}$",
        description="HOST:PORT of Prometheus metrics; port 0 takes a free port. Default: none.",
    )
    metrics_adapters: int = Field(
        default=20, ge=0, le=1000, description="Adapters with a label of their own in metrics; the rest are 'other'."
    )
    otlp_endpoint: str | None = Field(
        default=None, description="URL to which traces go by OTLP over gRPC, such as http://127.0.0.1:4317."
    )
    log_prompts: bool = Field(default=False, description="Write prompts into the log.")


class Preload(_Frozen):
    """An adapter that is cached before the server reports SERVING."""

    path: str = Field(description="Folder of the adapter, as given.")
    name: str | None = Field(default=None, description="Name to register; default: made from the folder's name.")
    scale: float = Field(default=1.0, ge=-100, le=100, allow_inf_nan=False, description="The adapter's default scale.")


class ServerConfig(_Frozen):
    """The whole configuration of a server."""

    model: ModelConfig = ModelConfig()
    cache: CacheConfig = CacheConfig()
    limits: LimitsConfig = LimitsConfig()
    engine: EngineConfig = EngineConfig()
    rpc: RpcConfig = RpcConfig()
    telemetry: TelemetryConfig = TelemetryConfig()
    adapter_roots: tuple[Path, ...] = Field(default=(), description="Folders under which adapter paths must lie.")
    preloads: tuple[Preload, ...] = Field(default=(), description="Adapters cached at start.")

    @model_validator(mode="after")
    def _slots_suffice(self) -> ServerConfig:
        if self.cache.device_slots < self.limits.max_adapters_per_request:
            raise ValueError(
                f"device_slots must be at least max_adapters_per_request ({self.limits.max_adapters_per_request})"
            )
        return self
