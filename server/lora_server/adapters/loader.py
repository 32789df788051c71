"""Reads an adapter from disk to ready tensors: the only part of the manager's work that touches torch.

Called on loader threads; holds no state but its configuration.
"""

from __future__ import annotations

from pathlib import Path

import torch

from lora_server.adapters.api import LoadedAdapter
from lora_server.adapters.formats.peft import PeftReader
from lora_server.adapters.source import AdapterFolder, AdapterRoots, Signature
from lora_server.config import LimitsConfig
from lora_server.models.weights import AdapterTargets


class AdapterLoader:
    """Locates, reads, checks and converts adapters for one served model; implements the manager's `Loader`."""

    def __init__(
        self,
        roots: AdapterRoots,
        targets: AdapterTargets,
        model: tuple[str, str, str],
        weights_for: tuple[torch.dtype, torch.device],
        limits: LimitsConfig,
    ) -> None:
        """*model*: its name, family and denoising component; *weights_for*: the type and device to convert for."""
        name, family, denoiser = model
        self._roots = roots
        self._components = sorted(targets)
        self._limits = limits
        dtype, device = weights_for
        self._on_cuda = device.type == "cuda"
        self._reader = PeftReader(
            targets, denoiser, name, dtype, limits.max_rank, pin_memory=self._on_cuda, family=family
        )

    def locate(self, path: str) -> Path:
        """Returns the folder that *path* means; see `AdapterRoots.locate`."""
        return self._roots.locate(path)

    def signature(self, folder: Path) -> Signature:
        """Returns what changes when a file of the adapter does."""
        return self._folder(folder).signature()

    def load(self, folder: Path) -> LoadedAdapter:
        """Reads and checks everything; raises a domain error that names what is wrong."""
        if not self._on_cuda:
            torch.set_num_threads(
                1
            )  # this thread's own: a second team of OpenMP threads slows the engine's (threads.py)
        reader = self._folder(folder)
        signature = reader.signature()  # before the bytes: a change in between is noticed at the next look
        files = reader.read(self._limits.max_adapter_file_bytes)
        return LoadedAdapter(files.digest, self._reader.read(folder.name, files.contents), signature)

    def _folder(self, folder: Path) -> AdapterFolder:
        return AdapterFolder(folder, self._components, self._roots)
