"""The service as it is deployed, in this process: engine thread, gRPC server on a loopback port, cache and all."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_server.app import Core, build_core
from lora_server.config import CacheConfig, EngineConfig, ModelConfig, RpcConfig, ServerConfig
from lora_server.rpc.backend import Backend
from lora_server.rpc.server import RpcServer
from lora_server.threads import share_the_interpreter

from benchmarks.presets import Preset

_PAGE_LOCKED_BYTES = 16 * 2**30
"""Room for the 256 adapters of the largest workload and those that are loaded beside it, of 24 MB each; CUDA only."""


@dataclass(frozen=True)
class Running:
    """A service that serves."""

    address: str
    core: Core
    start_s: float


@contextmanager
def service(preset: Preset, root: Path, engine: EngineConfig, device: str, slots: int = 64) -> Iterator[Running]:
    """Runs the service for *preset*; adapters come from under *root*."""
    config = ServerConfig(
        model=ModelConfig(model=preset.name, device=device),  # type: ignore[arg-type]
        engine=engine,
        cache=CacheConfig(device_slots=slots, budget_bytes=64 * 2**30, page_locked_bytes=_PAGE_LOCKED_BYTES),
        rpc=RpcConfig(listen="127.0.0.1:0"),
        adapter_roots=(root,),
    )
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()

    def run(coroutine: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(coroutine, loop).result()

    share_the_interpreter()
    began_s = time.monotonic()
    core = build_core(config, load=preset.family)
    rpc = RpcServer(config)
    address = run(rpc.start())
    run(rpc.serve(Backend(core.engine, core.manager, "benchmark", time.time(), 60.0)))
    try:
        yield Running(address, core, time.monotonic() - began_s)
    finally:
        run(rpc.stop())
        core.stop()
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
