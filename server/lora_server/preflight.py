"""What is checked before a start, beyond the values: paths, certificates, tokens. Opens no port, loads no model."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

from lora_server.config import ModelConfig, Preload, ServerConfig
from lora_server.models.registry import DEMO_MODEL
from lora_server.rpc.listen import socket_path
from lora_server.security.certificates import read_certificates
from lora_server.security.tokens import check_tenant, read_tokens


def faults(config: ServerConfig) -> list[str]:
    """Returns a sentence for everything that would keep a server from starting; reads files, changes nothing."""
    token_file = config.auth.token_file
    return [
        *_model_faults(config.model),
        *(fault for root in config.adapter_roots for fault in _folder_faults("adapter_roots", root)),
        *(fault for preload in config.preloads for fault in _preload_faults(preload)),
        *_listen_faults(config.rpc.listen),
        *(_trying("tls", lambda: read_certificates(config.tls)) if config.tls.enabled else ()),
        *(_trying("auth.token_file", lambda: read_tokens(token_file)) if token_file else ()),
    ]


def notes(config: ServerConfig) -> list[str]:
    """Returns what could not be checked here."""
    if _is_hub_id(config.model.model):
        return [f"model.model: {config.model.model!r} is taken for a hub id; whether it exists is not checked"]
    return []


def _is_hub_id(model: str) -> bool:
    looks_like_a_path = model.startswith(("/", ".", "~")) or model.endswith(".safetensors")
    return model != DEMO_MODEL and not looks_like_a_path and not Path(model).exists() and model.count("/") == 1


def _model_faults(config: ModelConfig) -> Iterator[str]:
    path = Path(config.model)
    if config.model != DEMO_MODEL and not _is_hub_id(config.model) and not path.exists():
        yield f"model.model: {config.model!r} is neither 'demo', a hub id (OWNER/NAME), nor a path that exists"
    elif path.is_dir() and config.model != DEMO_MODEL and not (path / "model_index.json").is_file():
        yield f"model.model: the folder {config.model!r} has no model_index.json, so it is no pipeline of diffusers"
    if config.config_folder is not None:
        yield from _folder_faults("model.config_folder", config.config_folder)


def _folder_faults(setting: str, folder: Path) -> Iterator[str]:
    if not folder.is_dir():
        yield f"{setting}: {str(folder)!r} is no folder"
    elif not os.access(folder, os.R_OK | os.X_OK):
        yield f"{setting}: the folder {str(folder)!r} cannot be read"


def _preload_faults(preload: Preload) -> Iterator[str]:
    if not os.access(preload.path, os.R_OK):
        yield f"preloads: {preload.path!r} does not exist or cannot be read"
    for tenant in preload.tenants or ():
        yield from _trying(f"preloads: {preload.path!r}", lambda tenant=tenant: check_tenant(tenant))  # type: ignore[misc]


def _listen_faults(listen: str) -> Iterator[str]:
    if listen.startswith("unix:"):
        folder = socket_path(listen).absolute().parent
        if not (folder.is_dir() and os.access(folder, os.W_OK)):
            yield f"rpc.listen: no socket can be made in {str(folder)!r}"


def _trying(setting: str, check: Callable[[], object]) -> Iterator[str]:
    try:
        check()
    except OSError as error:
        yield f"{setting}: cannot read {str(error.filename)!r}: {error.strerror}"
    except ValueError as error:
        yield f"{setting}: {error}"
