"""Configuration: small frozen models, resolved once at start (`settings`), never mutated.

Every field has a description with its unit. Every one can be set in the environment and in the file; one with a `Flag`
is an option of the command line too, which takes its help from here.
"""

from __future__ import annotations

import ipaddress
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, field_validator, model_validator

MIB = 1024 * 1024
GIB = 1024 * MIB
_GRANT = re.compile(r"(\*|[A-Za-z0-9][A-Za-z0-9._-]{0,63})=[A-Za-z0-9._*-]+/[A-Za-z0-9._*-]+")
_UNITS = {"": 1, "k": 1000, "m": 1000**2, "g": 1000**3, "ki": 1024, "mi": 1024**2, "gi": 1024**3}


@dataclass(frozen=True, slots=True)
class Flag:
    """Marks a field that has an option `--name` on the command line."""

    name: str


def parse_bytes(value: Any) -> Any:
    """Reads a size such as 4GiB, 500MB or 1048576, in bytes; what is no text is left alone.

    Raises:
        ValueError: If a text is no size.
    """
    if not isinstance(value, str):
        return value
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kmg]i?)?b?", value.strip().lower())
    if match is None:
        raise ValueError(f"{value!r} is not a size; write bytes, or a number with KB, MB, GB, KiB, MiB or GiB")
    return int(float(match[1]) * _UNITS[match[2] or ""])


def parse_size(value: Any) -> Any:
    """Reads a size of pictures such as 1024x768, in pixels; what is no text is left alone.

    Raises:
        ValueError: If a text is no size.
    """
    if not isinstance(value, str):
        return value
    match = re.fullmatch(r"(\d+)x(\d+)", value.strip())
    if match is None:
        raise ValueError(f"{value!r} is not a size; write WIDTHxHEIGHT in pixels, such as 1024x768")
    return int(match[1]), int(match[2])


Bytes = Annotated[int, BeforeValidator(parse_bytes)]
Size = Annotated[tuple[int, int], BeforeValidator(parse_size)]


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class ModelConfig(_Frozen):
    """Which model is served, and on what."""

    model: Annotated[str, Flag("model")] = Field(
        default="demo", description="'demo' (embedded), a diffusers folder, a .safetensors checkpoint, or a hub id."
    )
    config_folder: Annotated[Path | None, Flag("model-config")] = Field(
        default=None, description="Folder with the configuration and tokenizers of a .safetensors checkpoint."
    )
    variant: Annotated[str | None, Flag("variant")] = Field(
        default=None,
        pattern=r"^\w[\w-]*$",
        description="Variant of the weights to take where there is one, such as fp16; 'ema' or 'non_ema' of a "
        "checkpoint that has both. Default: plain weights, or the only variant there is.",
    )
    device: Annotated[Literal["auto", "cpu", "cuda"], Flag("device")] = Field(
        default="auto", description="Device; auto takes CUDA if there is one."
    )
    dtype: Annotated[Literal["auto", "float64", "float32", "bfloat16", "float16"], Flag("dtype")] = Field(
        default="auto", description="Type of weights and arithmetic; auto is bfloat16 on CUDA and float32 on the CPU."
    )


class CacheConfig(_Frozen):
    """The adapter cache."""

    budget_bytes: Annotated[Bytes, Flag("cache-bytes")] = Field(
        default=4 * GIB, gt=0, description="Host bytes of converted weights."
    )
    max_adapters: Annotated[int, Flag("max-cached-adapters")] = Field(
        default=1000, gt=0, description="The most versions in the host cache."
    )
    max_pinned_share: Annotated[float, Flag("max-pinned-share")] = Field(
        default=0.9, ge=0, le=1, description="Share of the budget and of the count that pins may take, 0 to 1."
    )
    device_slots: Annotated[int, Flag("device-slots")] = Field(
        default=64, gt=0, description="The most versions resident on the device."
    )
    page_locked_bytes: Annotated[Bytes, Flag("page-locked-bytes")] = Field(
        default=4 * GIB,
        ge=0,
        description="Host bytes locked at the start for cached adapters on CUDA, at most the cache's; uploads of those "
        "beyond it take the engine thread's time.",
    )
    max_on_demand_adapters: Annotated[int, Flag("max-on-demand-adapters")] = Field(
        default=64,
        gt=0,
        description="Most names, and most ids, that are kept for each tenant of what its requests have named by path, "
        "upload or hub id; the least recently used are forgotten first.",
    )
    loader_threads: int = Field(default=2, gt=0, le=64, description="Threads that read, check and convert adapters.")


class LimitsConfig(_Frozen):
    """What one request or one adapter may ask for."""

    max_side_px: int = Field(default=2048, gt=0, description="Largest width or height in pixels.")
    max_inference_steps: int = Field(default=500, gt=0, description="Most denoising steps.")
    max_images_per_request: int = Field(default=16, gt=0, description="Most images in one request.")
    max_adapters_per_request: int = Field(default=8, gt=0, description="Most adapters in one request.")
    max_prompt_chars: int = Field(default=4000, gt=0, description="Most characters of a prompt.")
    max_rank: Annotated[int, Flag("max-rank")] = Field(default=256, gt=0, description="Largest rank of an adapter.")
    max_adapter_file_bytes: Annotated[Bytes, Flag("max-adapter-file-bytes")] = Field(
        default=8 * GIB, gt=0, description="Largest adapter file in bytes."
    )
    max_adapter_header_bytes: Annotated[Bytes, Flag("max-adapter-header-bytes")] = Field(
        default=8 * MIB, gt=0, description="Largest header of an adapter's safetensors file in bytes."
    )
    max_adapter_tensors: Annotated[int, Flag("max-adapter-tensors")] = Field(
        default=32_768, gt=0, description="Most tensors in one adapter file."
    )
    max_store_bytes: Annotated[Bytes, Flag("max-store-bytes")] = Field(
        default=64 * GIB,
        gt=0,
        description="Largest sum of uploads and of copies of pinned adapters in the state directory, in bytes.",
    )
    max_hub_bytes: Annotated[Bytes, Flag("max-hub-bytes")] = Field(
        default=64 * GIB,
        gt=0,
        description="Largest sum of downloads from the hub that are kept, in bytes; the least recently named go first.",
    )
    min_free_disk_bytes: Annotated[Bytes, Flag("min-free-disk-bytes")] = Field(
        default=512 * MIB,
        ge=0,
        description="What stays free of the disk when uploads, copies and downloads are written, in bytes.",
    )
    max_adapter_modules: Annotated[int, Flag("max-adapter-modules")] = Field(
        default=16_384, gt=0, description="Most modules that one adapter may change."
    )
    max_request_megapixel_steps: Annotated[float | None, Flag("max-request-megapixel-steps")] = Field(
        default=None,
        gt=0,
        description="Most work in one request: width x height / 10^6 x steps x images. Default: what the others allow.",
    )


class EngineConfig(_Frozen):
    """The engine thread and its queue."""

    max_queued_requests: Annotated[int, Flag("max-queued-requests")] = Field(
        default=64, gt=0, description="Requests that may wait."
    )
    max_batch_images: Annotated[int, Flag("max-batch-images")] = Field(
        default=8, gt=0, le=64, description="Most images denoised together in one step."
    )
    max_active_images: int = Field(
        default=32, gt=0, description="Images whose denoising has begun; what is beyond them waits in the queue."
    )
    tenant_share: Annotated[float, Flag("tenant-share")] = Field(
        default=0.75,
        gt=0,
        le=1,
        description="Share of the queue, the active images, the device slots and the unread images that one tenant may "
        "hold; who holds nothing is always let in. Without a token file all callers are one tenant, which has all.",
    )
    max_steps_behind: float = Field(
        default=4.0, gt=0, description="Steps that a tenant may be behind its fair share before it goes first."
    )
    max_expected_wait_s: Annotated[float, Flag("max-expected-wait")] = Field(
        default=600.0,
        gt=0,
        description="Seconds that the work before a request may take, by the measured rate; beyond, it is refused.",
    )
    max_unread_bytes: Annotated[Bytes, Flag("max-unread-bytes")] = Field(
        default=GIB,
        gt=0,
        description="Bytes of images that are made and not taken by their callers; who has more of them waits, or is "
        "refused.",
    )
    deterministic: Annotated[bool, Flag("deterministic")] = Field(
        default=False, description="Step every image alone, adapters merged: equal bytes whatever else is running."
    )
    page_columns: int = Field(default=16, gt=0, le=256, description="Columns of a page of the device stack.")
    num_pages: int = Field(default=8, gt=0, le=256, description="Pages that a batch's adapters share.")
    column_buckets: tuple[int, ...] = Field(
        default=(64,), description="Columns that a batch may open, besides all; a CUDA graph each."
    )
    compile: Annotated[bool, Flag("compile")] = Field(
        default=True, description="Compile blocks and capture CUDA graphs; nothing on the CPU."
    )
    max_graphs: int = Field(default=64, ge=0, description="Most CUDA graphs.")
    warm_sizes: Annotated[tuple[Size, ...] | None, Flag("warm-size")] = Field(
        default=None, description="Sizes WIDTHxHEIGHT in pixels to make ready before serving; default: the model's."
    )
    warm_images: tuple[int, ...] = Field(
        default=(1, 4, 8), description="Batches, in images with guidance, to warm up and measure at each size."
    )
    warm_classes: tuple[int, ...] = Field(
        default=(0,), description="Which of the family's classes of adapted linears to warm up; 0 is attention."
    )
    warm_up_s: float = Field(default=20.0, ge=0, description="Seconds after which warming up on the CPU is cut short.")
    prompt_cache_bytes: Bytes = Field(default=256 * MIB, ge=0, description="Device bytes of cached prompt embeddings.")
    result_retention_s: float = Field(default=60.0, ge=0, description="Seconds a finished result is kept for retries.")
    max_retained_bytes: Bytes = Field(default=64 * MIB, ge=0, description="Most bytes of results kept for retries.")
    threads: Annotated[int | None, Flag("threads")] = Field(
        default=None, gt=0, description="CPU threads of the model; default: torch's."
    )
    max_queued_per_tenant: Annotated[int | None, Flag("max-queued-per-tenant")] = Field(
        default=None, gt=0, description="Requests of one tenant that may wait; default: its share."
    )
    max_restarts: Annotated[int, Flag("max-restarts")] = Field(
        default=1,
        ge=0,
        description="Times an engine that dies is restarted within a minute before the server gives up.",
    )


class RpcConfig(_Frozen):
    """The listening side."""

    listen: Annotated[str, Flag("listen")] = Field(
        default="127.0.0.1:50051", description="HOST:PORT or unix:PATH; port 0 takes a free port."
    )
    insecure: Annotated[bool, Flag("insecure")] = Field(
        default=False, description="Allow plain text on an address that others can reach; only behind a TLS proxy."
    )
    reflection: Annotated[bool, Flag("reflection")] = Field(
        default=True, description="Let clients list the services (gRPC server reflection)."
    )
    drain_timeout_s: Annotated[float, Flag("drain-timeout")] = Field(
        default=30.0, ge=0, description="Seconds that running requests get at shutdown."
    )
    prompt_metadata: Annotated[bool, Flag("prompt-metadata")] = Field(
        default=True, description="Write prompts into the images' metadata."
    )
    stalled_reader_timeout_s: Annotated[float, Flag("stalled-reader-timeout")] = Field(
        default=60.0, gt=0, description="Seconds after which a stream whose client takes nothing is ended."
    )
    max_connections: Annotated[int, Flag("max-connections")] = Field(
        default=1024, gt=0, description="Most connections at one time; fewer if the process may have few descriptors."
    )
    max_watchers: Annotated[int, Flag("max-watchers")] = Field(
        default=32,
        ge=0,
        description="Most WatchServer streams at one time; where there are tokens, half of them of one tenant.",
    )
    max_uploads_per_tenant: Annotated[int, Flag("max-uploads-per-tenant")] = Field(
        default=8, gt=0, description="Most uploads of one tenant at one time."
    )
    stalled_upload_timeout_s: Annotated[float, Flag("stalled-upload-timeout")] = Field(
        default=30.0, gt=0, description="Seconds after which an upload of which nothing comes is ended."
    )
    max_upload_s: Annotated[float, Flag("max-upload-time")] = Field(
        default=3600.0, gt=0, description="Seconds that an upload may take in all."
    )

    @field_validator("listen")
    @classmethod
    def _is_an_address(cls, listen: str) -> str:
        if re.fullmatch(r"unix:.+|([^\s:\[\]/]+|\[[0-9A-Fa-f:.]+\]):\d{1,5}", listen) is None:
            raise ValueError(f"{listen!r} is not HOST:PORT, [IPV6]:PORT or unix:PATH")
        return listen


class TlsConfig(_Frozen):
    """The server's certificates, PEM files; read again when they change, without dropping calls."""

    certificate: Annotated[Path | None, Flag("tls-cert")] = Field(
        default=None, description="PEM file: the server's certificate, then its chain. Turns TLS on."
    )
    private_key: Annotated[Path | None, Flag("tls-key")] = Field(
        default=None, description="PEM file: the private key of the certificate, without a passphrase."
    )
    client_ca: Annotated[Path | None, Flag("tls-client-ca")] = Field(
        default=None,
        description="PEM file: whose client certificates to trust. Turns mutual TLS on.",
    )

    @property
    def enabled(self) -> bool:
        """Whether connections are encrypted."""
        return self.certificate is not None

    @model_validator(mode="after")
    def _complete(self) -> TlsConfig:
        if (self.certificate is None) != (self.private_key is None):
            raise ValueError("certificate and private_key (--tls-cert, --tls-key) belong together")
        if self.client_ca is not None and self.certificate is None:
            raise ValueError("client_ca (--tls-client-ca) needs certificate and private_key")
        return self


class AuthConfig(_Frozen):
    """Who may call."""

    token_file: Annotated[Path | None, Flag("token-file")] = Field(
        default=None,
        description="File of hashed bearer tokens (lora-server token new); read again when it changes.",
    )


class LogConfig(_Frozen):
    """The log, on standard error."""

    level: Annotated[Literal["debug", "info", "warning", "error"], Flag("log-level")] = Field(
        default="info", description="The least that is logged."
    )
    format: Annotated[Literal["auto", "console", "json"], Flag("log-format")] = Field(
        default="auto", description="auto is console on a terminal, JSON elsewhere."
    )


class TelemetryConfig(_Frozen):
    """What the server tells of itself."""

    metrics_listen: Annotated[str | None, Flag("metrics-listen")] = Field(
        default=None,
        pattern=r":\d{1,5}$",
        description="HOST:PORT of Prometheus metrics; port 0 takes a free port. Default: none.",
    )
    metrics_adapters: Annotated[int, Flag("metrics-adapters")] = Field(
        default=20, ge=0, le=1000, description="Adapters with a label of their own in metrics; the rest are 'other'."
    )
    otlp_endpoint: Annotated[str | None, Flag("otlp-endpoint")] = Field(
        default=None,
        description="URL to which traces go by OTLP over gRPC, such as http://127.0.0.1:4317; needs the extra [otel].",
    )
    log_prompts: Annotated[bool, Flag("log-prompts")] = Field(default=False, description="Write prompts into the log.")


class Preload(_Frozen):
    """An adapter that is cached before the server reports SERVING."""

    path: str = Field(description="Folder of the adapter, as given.")
    name: str | None = Field(default=None, description="Name to register; default: made from the folder's name.")
    scale: float = Field(default=1.0, ge=-100, le=100, allow_inf_nan=False, description="The adapter's default scale.")
    pin: Literal["host", "device"] | None = Field(default=None, description="Where to keep it for good.")
    tenants: tuple[str, ...] | None = Field(
        default=None, description="The only tenants that may use it; none are everybody."
    )


class ServerConfig(_Frozen):
    """The whole configuration of a server."""

    model: ModelConfig = ModelConfig()
    cache: CacheConfig = CacheConfig()
    limits: LimitsConfig = LimitsConfig()
    engine: EngineConfig = EngineConfig()
    rpc: RpcConfig = RpcConfig()
    tls: TlsConfig = TlsConfig()
    auth: AuthConfig = AuthConfig()
    log: LogConfig = LogConfig()
    telemetry: TelemetryConfig = TelemetryConfig()
    adapter_roots: Annotated[tuple[Path, ...], Flag("adapter-root")] = Field(
        default=(), description="Folders under which adapter paths must lie."
    )
    preloads: tuple[Preload, ...] = Field(default=(), description="Adapters cached at start.")
    state_dir: Annotated[Path | None, Flag("state-dir")] = Field(
        default=None, description="Folder of what survives a restart: names, pins, uploads. None: nothing does."
    )
    allow_hub: Annotated[bool, Flag("allow-hub")] = Field(
        default=False,
        description="Let operators load adapters from the Hugging Face hub, with the token in HF_TOKEN. Whether "
        "requests may name it: see --hub-grant.",
    )
    hub_grants: Annotated[tuple[str, ...], Flag("hub-grant")] = Field(
        default=(),
        description="TENANT=OWNER/NAME: a repository of the hub that requests of a tenant may name; * stands for any "
        "tenant, and in OWNER or NAME for any characters. Without one, a server with tokens lets only admins load from "
        "the hub, and one without tokens everybody.",
    )
    strict_pins: Annotated[bool, Flag("strict-pins")] = Field(
        default=False, description="Refuse to start if a pin of the state cannot be satisfied."
    )

    @model_validator(mode="after")
    def _slots_suffice(self) -> ServerConfig:
        if self.cache.device_slots < self.limits.max_adapters_per_request:
            raise ValueError(
                f"device_slots must be at least max_adapters_per_request ({self.limits.max_adapters_per_request})"
            )
        return self

    @field_validator("hub_grants")
    @classmethod
    def _are_grants(cls, grants: tuple[str, ...]) -> tuple[str, ...]:
        for grant in grants:
            if _GRANT.fullmatch(grant) is None:
                raise ValueError(f"{grant!r} is not TENANT=OWNER/NAME, such as acme=acme-labs/*")
        return grants

    @model_validator(mode="after")
    def _grants_need_the_hub(self) -> ServerConfig:
        if self.hub_grants and not self.allow_hub:
            raise ValueError("hub_grants (--hub-grant) needs allow_hub (--allow-hub)")
        return self

    @model_validator(mode="after")
    def _plain_text_stays_at_home(self) -> ServerConfig:
        if not (self.tls.enabled or self.rpc.insecure or is_local(self.rpc.listen)):
            raise ValueError(
                f"rpc.listen is {self.rpc.listen!r}, which others can reach, in plain text: give --tls-cert and "
                "--tls-key, listen on loopback or a Unix socket, or say --insecure"
            )
        return self


def is_local(listen: str) -> bool:
    """Whether an address is a Unix socket or on loopback; a name other than localhost is not."""
    if listen.startswith("unix:"):
        return True
    host = listen.rpartition(":")[0].strip("[]")
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
