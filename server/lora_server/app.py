"""The composition root: builds every part, joins them, and takes them through start, service, drain and stop.

The only file that knows everybody; nobody imports it but `cli`.
"""

from __future__ import annotations

import asyncio
import signal
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import structlog

from lora_server.adapters.hub import Hub, refuse
from lora_server.adapters.manager import AdapterManager
from lora_server.adapters.roots import AdapterRoots
from lora_server.adapters.source import HUB_SCHEME, UPLOAD_SCHEME
from lora_server.adapters.state import StateFile
from lora_server.adapters.store import ContentStore, StoreLimits, lock_directory
from lora_server.adapters.tenants import HubGrants
from lora_server.config import LimitsConfig, ModelConfig, Preload, ServerConfig
from lora_server.demo.paths import adapters_dir
from lora_server.engine.engine import EngineParts, LocalEngine
from lora_server.engine.finisher import Origin
from lora_server.models.registry import DEMO_MODEL, load_model
from lora_server.monitoring.station import Station
from lora_server.observer import Observer, SilentObserver
from lora_server.preloads import cache_again, load_all, wait_for_device
from lora_server.rpc.backend import Backend
from lora_server.rpc.server import RpcServer
from lora_server.threads import in_own_thread, share_the_interpreter

if TYPE_CHECKING:
    from lora_server.models.base import ModelFamily

_log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Core:
    """The service without its transport."""

    engine: LocalEngine
    manager: AdapterManager
    family: ModelFamily
    state: ServerState | None = None

    def stop(self) -> None:
        """Stops the engine, then the loaders. Blocks for at most one step; idempotent."""
        self.engine.stop()
        self.manager.close()
        if self.state is not None:
            self.state.close()


@dataclass(frozen=True, slots=True)
class ServerState:
    """What survives a restart, in a locked folder."""

    store: ContentStore
    file: StateFile
    lock: BinaryIO

    def close(self) -> None:
        """Lets another server have the folder; idempotent."""
        self.file.close()
        self.lock.close()


def open_state(folder: Path | None, limits: LimitsConfig) -> ServerState | None:
    """Opens the state directory, whose store keeps to *limits*, or says in the log that there is none.

    Raises:
        StateLockedError, OSError: If another server has it, or it cannot be written.
    """
    if folder is None:
        _log.warning("stateless: names, pins and loads end with this process, and uploads are refused; see --state-dir")
        return None
    lock = lock_directory(folder)
    return ServerState(
        ContentStore(folder, StoreLimits(limits.max_store_bytes, limits.min_free_disk_bytes)),
        StateFile(folder / "state.sqlite3"),
        lock,
    )


def _hub(config: ServerConfig, components: tuple[str, ...]) -> tuple[Path, Hub] | None:
    """Where downloads from the hub lie, and who fetches them; None if they are not allowed."""
    if not config.allow_hub:
        return None
    limits = config.limits
    folder = (config.state_dir or Path.home() / ".cache" / "lora-inference").absolute() / "hub"
    bounds = StoreLimits(limits.max_hub_bytes, limits.min_free_disk_bytes)
    return folder, Hub(folder, components, limits.max_adapter_file_bytes, limits=bounds)


def _roots(config: ServerConfig, state: ServerState | None, hub: tuple[Path, Hub] | None) -> AdapterRoots:
    own: list[Path] = []
    schemes: dict[str, Callable[[str], Path]] = {HUB_SCHEME: refuse}
    if state is not None:
        own.append(state.store.root)
        schemes[UPLOAD_SCHEME] = state.store.place
    if hub is not None:
        folder, fetcher = hub
        schemes[HUB_SCHEME] = fetcher.fetch
        own.append(folder)
    return AdapterRoots(adapter_roots(config), schemes, own)


def build_core(
    config: ServerConfig,
    on_failure: Callable[[], None] = lambda: None,
    load: Callable[[ModelConfig], ModelFamily] = load_model,
    observer: Observer | None = None,
) -> Core:
    """Loads the model with *load*, caches the preloads and starts the engine. Blocks for seconds to minutes.

    Raises:
        ModelLoadError: If the model cannot be served.
        WarmUpError: If its first steps fail.
        LoraServerError: If a preload cannot be loaded.
    """
    # In a thread that ends before the engine begins: the OpenMP threads that it leaves would slow the warm-up's steps,
    # and the policy believes what those cost.
    core = in_own_thread(lambda: _assemble(config, on_failure, load, observer or SilentObserver())).result()
    try:
        core.engine.start()
        wait_for_device(core.manager, config.preloads)
    except BaseException:
        core.stop()
        raise
    return core


def _assemble(
    config: ServerConfig, on_failure: Callable[[], None], load: Callable[[ModelConfig], ModelFamily], observer: Observer
) -> Core:
    """Builds everything, with the preloads in the cache; the engine has not begun."""
    state = open_state(config.state_dir, config.limits)  # first: another server's directory should not cost a load
    import torch

    threads = config.engine.threads or torch.get_num_threads()
    torch.set_num_threads(threads)
    family = load(config.model)
    manager = _manager(config, family, state, observer)
    try:
        _load_preloads(manager, config)
        origin = Origin(family.info.name, software(), prompt_metadata=config.rpc.prompt_metadata)
        alone = {} if config.auth.token_file else {"tenant_share": 1.0}  # all callers are one tenant
        engine_config = config.engine.model_copy(update={"threads": threads, **alone})
        engine = LocalEngine(EngineParts(family, manager, engine_config, origin, observer), on_failure)
    except BaseException:
        manager.close()
        if state is not None:
            state.close()
        raise
    return Core(engine, manager, family, state)


def _manager(
    config: ServerConfig, family: ModelFamily, state: ServerState | None, observer: Observer
) -> AdapterManager:
    """The adapters that *family* can take, from where *config* says; empty."""
    from lora_server.adapters.loader import AdapterLoader
    from lora_server.adapters.observed import ObservedLoader
    from lora_server.models.base import adapter_targets
    from lora_server.models.host_memory import host_memory

    targets = adapter_targets(family.components)
    hub = _hub(config, tuple(sorted(targets)))
    loader = AdapterLoader(
        roots=_roots(config, state, hub),
        targets=targets,
        model=(family.info.name, family.info.family, family.denoiser),
        dtype=family.dtype,
        limits=config.limits,
        slot_rank=config.engine.page_columns * config.engine.num_pages,
        allocate=host_memory(family.device, min(config.cache.page_locked_bytes, config.cache.budget_bytes)),
    )
    return AdapterManager(
        config.cache,
        ObservedLoader(loader, observer),
        min_free_slots=config.limits.max_adapters_per_request,
        store=state.store if state is not None else None,
        state=state.file if state is not None else None,
        # Without a state directory of its own, other servers may need what lies in the common folder.
        grants=HubGrants(config.hub_grants, everything=config.auth.token_file is None),
        sweep_downloads=hub[1].sweep if hub is not None and state is not None else None,
    )


def _load_preloads(manager: AdapterManager, config: ServerConfig) -> None:
    """Restores what was there before, and caches the preloads of the package and of *config*."""
    manager.restore(strict=config.strict_pins)
    restored = {adapter.name: adapter.source.path for adapter in manager.list()}
    # What a name means was said last by a client, unless that is gone: the package may have been moved.
    bundled = bundled_preloads(config)
    missing = [each for each in bundled if not _is_there(restored.get(each.name or ""))]
    load_all(manager, [*missing, *config.preloads], replaceable=restored)
    cache_again(manager, [each.name for each in bundled if each not in missing and each.name is not None])


def adapter_roots(config: ServerConfig) -> tuple[Path, ...]:
    """The folders that adapters may come from: the operator's, the preloads themselves, and the bundled ones."""
    preloads = [Path(preload.path).absolute() for preload in config.preloads]
    return (*config.adapter_roots, *preloads, adapters_dir())


def bundled_preloads(config: ServerConfig) -> list[Preload]:
    """The embedded model's adapters, so that they can be used by name at once; none for another model."""
    if config.model.model != DEMO_MODEL:
        return []
    return [
        Preload(path=str(folder), name=folder.name) for folder in sorted(adapters_dir().iterdir()) if folder.is_dir()
    ]


def software() -> str:
    """The name and version that provenance carries."""
    return f"lora-inference {version('lora-inference')}"


def _is_there(path: str | None) -> bool:
    """Whether a restored source can still be read, as far as a look tells."""
    return path is not None and (path.startswith(UPLOAD_SCHEME) or Path(path).exists())


class Server:
    """One server process: listens, builds its core, serves until it is told to stop."""

    def __init__(self, config: ServerConfig, dropped_log_lines: Callable[[], int] = lambda: 0) -> None:
        """Builds what listens and tells; the port of metrics, if there is one, is open from now on.

        Args:
            config: The whole configuration.
            dropped_log_lines: Returns how many lines of the log could not be written.

        Raises:
            OSError, OtelMissingError: As `Station`.
        """
        self._config = config
        self._station = Station(config.telemetry, version("lora-inference"), dropped_log_lines)
        self._rpc = RpcServer(config, self._station.observer, self._station.interceptors())
        self._stop_asked = asyncio.Event()
        self._stop_now = asyncio.Event()
        self._failed = False
        self._building: Future[Core] | None = None

    @property
    def idle(self) -> bool:
        """Whether no thread builds the model any more: one that a signal came before cannot be interrupted."""
        return self._building is None or self._building.done()

    async def run(self, on_serving: Callable[[str], None]) -> int:
        """Runs from start to end; calls *on_serving* with the address once. Returns the exit code: 0, or 1 on failure.

        Raises:
            OSError: If the address cannot be bound.
            ModelLoadError, WarmUpError, LoraServerError: As `build_core`.
        """
        share_the_interpreter()
        self._install_signals()
        address = await self._rpc.start()
        try:
            await self._serve(address, on_serving)
        finally:
            await self._rpc.stop()
            await asyncio.to_thread(self._station.stop)
        return 1 if self._failed else 0

    async def _serve(self, address: str, on_serving: Callable[[str], None]) -> None:
        loop = asyncio.get_running_loop()

        def on_failure() -> None:
            loop.call_soon_threadsafe(self._fail)

        self._building = in_own_thread(self._build(on_failure))
        core = await self._unless_stopped(asyncio.wrap_future(self._building))
        if core is None:
            return
        try:
            await self._rpc.serve(
                Backend(
                    engine=core.engine,
                    adapters=core.manager,
                    version=version("lora-inference"),
                    start_time_s=time.time(),
                    result_retention_s=self._config.engine.result_retention_s,
                    observer=self._station.observer,
                    traceparent=self._station.traceparent,
                    top_adapters=self._station.uses.top,
                )
            )
            self._station.watch(core.engine, core.manager)
            _log.info("serving", address=address, model=core.engine.model.name, device=core.engine.model.device)
            on_serving(address)
            await self._stop_asked.wait()
            await self._drain(core)
        finally:
            await asyncio.to_thread(core.stop)

    def _build(self, on_failure: Callable[[], None]) -> Callable[[], Core]:
        return lambda: build_core(self._config, on_failure, observer=self._station.observer)

    async def _drain(self, core: Core) -> None:
        """Lets running requests finish within the drain timeout; a second signal cuts it short."""
        _log.info("draining", timeout_s=self._config.rpc.drain_timeout_s)
        self._station.not_serving()
        core.engine.drain()
        tasks: list[asyncio.Future[Any]] = [
            asyncio.ensure_future(self._rpc.drain()),
            asyncio.ensure_future(self._stop_now.wait()),
        ]
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        for task in tasks:
            task.cancel()

    async def _unless_stopped(self, building: asyncio.Future[Core]) -> Core | None:
        """Returns the core, or None if a signal came first; loading cannot be interrupted, so it is left behind."""
        stopped = asyncio.ensure_future(self._stop_asked.wait())
        tasks: list[asyncio.Future[Any]] = [building, stopped]
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        stopped.cancel()
        if building.done():
            return building.result()
        building.add_done_callback(lambda done: done.cancelled() or done.exception())
        return None

    def _install_signals(self) -> None:
        loop = asyncio.get_running_loop()
        for signum in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(signum, self._on_signal)

    def _on_signal(self) -> None:
        if self._stop_asked.is_set():
            self._stop_now.set()
        self._stop_asked.set()

    def _fail(self) -> None:
        self._failed = True
        self._stop_asked.set()
        self._stop_now.set()
