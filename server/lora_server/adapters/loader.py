"""Reads an adapter from disk to ready tensors: the only part of the manager's work that touches torch.

Called on loader threads; holds no state but its configuration.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch

from lora_server.adapters.api import LoadedAdapter
from lora_server.adapters.companions import Companions, listing_of, look_around
from lora_server.adapters.formats.header import Limits
from lora_server.adapters.formats.inputs import Model
from lora_server.adapters.formats.reader import AdapterReader
from lora_server.adapters.formats.report import make_report
from lora_server.adapters.roots import AdapterRoots
from lora_server.adapters.settling import read_settled
from lora_server.adapters.source import AdapterFiles, AdapterFolder, FileBytes, Signature
from lora_server.config import LimitsConfig
from lora_server.models.block_scales import changed_paths
from lora_server.models.host_memory import Allocate, ordinary_memory
from lora_server.models.weights import AdapterTargets
from lora_server.threads import in_own_thread


class AdapterLoader:
    """Locates, reads, checks and converts adapters for one served model; implements the manager's `Loader`."""

    def __init__(
        self,
        roots: AdapterRoots,
        targets: AdapterTargets,
        model: tuple[str, str, str],
        dtype: torch.dtype,
        limits: LimitsConfig,
        slot_rank: int = 128,
        allocate: Allocate = ordinary_memory,
    ) -> None:
        """*model*: its name, family and denoising component; *dtype*: what to convert to.

        *slot_rank* is the largest rank that the device's pages hold; *allocate* makes the memory of what is converted.
        """
        name, family, denoiser = model
        self._roots = roots
        self._components = sorted(targets)
        self._limits = limits
        self._reader = AdapterReader(
            targets,
            denoiser,
            name,
            dtype,
            limits.max_rank,
            family=family,
            allocate=allocate,
            slot_rank=min(slot_rank, limits.max_rank),
            max_modules=limits.max_adapter_modules,
            limits=Limits(limits.max_adapter_header_bytes, limits.max_adapter_tensors),
        )

    @property
    def served(self) -> Model:
        """The model that adapters are read for."""
        return self._reader.served

    def locate(self, path: str | Path) -> Path:
        """Returns the folder or file that *path* means; see `AdapterRoots.locate`."""
        return self._roots.locate(path)

    def signature(self, folder: Path) -> Signature:
        """Returns what changes when a file of the adapter does."""
        return self._signature(self._folder(folder))

    def files(self, folder: Path) -> AdapterFiles:
        """Returns the bytes of the adapter's files, unchecked; with a note of what lies beside them, for copies."""
        files = self._folder(folder).read(self._limits.max_adapter_file_bytes)
        return replace(files, cards={**files.cards, **listing_of(folder)})

    def load(self, folder: Path) -> LoadedAdapter:
        """Reads and checks everything; raises a domain error that names what is wrong."""
        return self._load(folder, allow_partial=False)

    def load_partial(self, folder: Path) -> LoadedAdapter:
        """The same, but leaves out tensors whose module the model has not; the report names them."""
        return self._load(folder, allow_partial=True)

    def _load(self, folder: Path, *, allow_partial: bool) -> LoadedAdapter:
        # This thread's own: a second team of OpenMP threads slows the engine's (threads.py), or takes its core on CUDA.
        torch.set_num_threads(1)
        reader = self._folder(folder)
        look_around(folder, reader, allow_partial=allow_partial)  # what is no adapter is told before it is waited for

        def look_and_read() -> tuple[Companions, Mapping[str, FileBytes]]:
            around = look_around(folder, reader, allow_partial=allow_partial)
            return around, reader.contents(self._limits.max_adapter_file_bytes)

        signature, (around, contents) = read_settled(lambda: self._signature(reader), look_and_read, folder.name)
        digesting = in_own_thread(lambda: reader.digest_of(contents))  # a third of a load's time
        try:
            read = self._reader.read_planned(folder.name, contents, allow_partial=allow_partial)
        finally:
            digest = digesting.result()  # what is refused is let go of too before this thread reads the next
        origin = digest, sum(map(len, contents.values()))
        merged_only = read.weights.merged_only(self._reader.denoiser)
        report = make_report(folder.name, read.layout, origin, reader.cards(), around, merged_only=merged_only)
        modules = changed_paths(read.weights, self._reader.denoiser, self._reader.targets)
        return LoadedAdapter(digest, read.weights, signature, modules, report)

    def _signature(self, folder: AdapterFolder) -> Signature:
        """Of the cards too: new trigger words are noticed, though they make no new version."""
        return (*folder.signature(), *folder.signature_of(folder.card_names()))

    def _folder(self, folder: Path) -> AdapterFolder:
        return AdapterFolder(folder, self._components, self._roots)
