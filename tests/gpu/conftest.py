"""Engines on a CUDA device. Without one, everything here is skipped: `python -m pytest -m gpu tests/gpu -rs`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from lora_server.app import Core, build_core
from lora_server.config import CacheConfig, EngineConfig, ModelConfig, ServerConfig
from lora_server.models import host_memory

from tests.factories import ATTENTION, write_adapter

SIDE_PX = 64
NUM_ADAPTERS = 12
DEVICE_SLOTS = 8


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Marks what is in this folder; where there is no device, says so."""
    missing = pytest.mark.skip(reason="needs a CUDA device")
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.gpu)
            item.add_marker(pytest.mark.filterwarnings("default"))  # the compiler has advice on float32
            if not torch.cuda.is_available():
                item.add_marker(missing)


@pytest.fixture(scope="session")
def many_adapters(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """More adapters of the embedded model than there are slots, by number."""
    from diffusers import StableDiffusion3Pipeline
    from lora_server.demo.paths import model_dir

    root = tmp_path_factory.mktemp("gpu-adapters")
    for k in range(NUM_ADAPTERS):
        transformer = StableDiffusion3Pipeline.from_pretrained(model_dir(), use_safetensors=True).transformer
        write_adapter(root / str(k), transformer, k, 0.05, target_modules=ATTENTION)
    return root


@pytest.fixture(scope="session")
def pool(many_adapters: Path) -> list[host_memory.HostPool]:
    """Where the engine's page-locked pool is put."""
    return []


@pytest.fixture(scope="session")
def core(many_adapters: Path, pool: list[host_memory.HostPool]) -> Iterator[Core]:
    """The embedded model in float32 on the device, with compiled blocks and graphs, and few slots."""
    with pytest.MonkeyPatch.context() as patch:

        def recording(block: torch.Tensor) -> host_memory.HostPool:
            pool.append(host_memory_pool(block))
            return pool[-1]

        host_memory_pool = host_memory.HostPool
        patch.setattr(host_memory, "HostPool", recording)
        core = build_core(
            ServerConfig(
                model=ModelConfig(device="cuda", dtype="float32"),
                cache=CacheConfig(device_slots=DEVICE_SLOTS, page_locked_bytes=2**26),
                engine=EngineConfig(warm_sizes=((SIDE_PX, SIDE_PX),), warm_images=(1, 2)),
                adapter_roots=(many_adapters,),
            )
        )
    yield core
    core.stop()
