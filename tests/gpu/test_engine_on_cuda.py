"""What only a CUDA device shows: graphs, slots under eviction, page-locked memory, true lack of memory."""

from __future__ import annotations

import gc
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lora_server.app import Core
from lora_server.engine.batch_runner import BatchImage, BatchRunner
from lora_server.engine.job import EngineJob
from lora_server.errors import AdapterOutputNotFiniteError, DeviceOutOfMemoryError
from lora_server.models.base import DenoisingState, adapter_targets
from lora_server.models.host_memory import HostPool
from lora_server.models.merge import ScaledAdapter
from lora_server.models.weights import LowRankDelta, pack
from lora_server.types import AdapterSource, ApplicationWay, ByName, GenerationParameters
from safetensors.torch import save_file

from tests.gpu.conftest import DEVICE_SLOTS, NUM_ADAPTERS, SIDE_PX
from tests.parity.engine_harness import events, make_request, pictures

SOON_S = 30.0
LARGEST_SIDE_PX = 384
OTHER_SIDE_PX = SIDE_PX + 32
"""A size that the warm-up has not captured."""


def wanted(side_px: int = SIDE_PX, **changes: Any) -> GenerationParameters:
    """A request of few steps."""
    return GenerationParameters(
        **{
            "prompt": "a red star",
            "negative_prompt": "",
            "width_px": side_px,
            "height_px": side_px,
            "num_inference_steps": 4,
            "guidance_scale": 4.0,
            "seed": 1,
            "num_images": 1,
            **changes,
        }
    )


def submit(core: Core, root: Path, name: str, uses: list[tuple[str, float]], **changes: Any) -> EngineJob:
    """Begins a request."""
    return core.engine.submit(make_request(root, name, wanted(**changes), uses))


def on_engine(core: Core, action: Any) -> Any:
    """The result of *action* on the engine thread."""
    return core.engine.call(action).result(timeout=SOON_S)


def states_of(runner: BatchRunner, side_px: int, images: int = 1) -> list[DenoisingState]:
    """Images at pure noise."""
    parameters = wanted(side_px, num_images=images)
    conditioning = runner.condition(parameters, ())
    return runner.begin(parameters, conditioning)


def random_adapter(core: Core, seed: int) -> ScaledAdapter:
    """A rank of 4 on every linear of the denoiser, on the device."""
    generator = torch.Generator().manual_seed(seed)
    denoiser = core.family.denoiser
    targets = adapter_targets({denoiser: core.family.components[denoiser]})
    deltas = {
        path: LowRankDelta(
            torch.randn((4, shape.in_features), generator=generator) * 0.02,
            torch.randn((shape.out_features, 4), generator=generator) * 0.02,
            1.0,
        )
        for path, shape in targets[denoiser].items()
    }
    weights = pack({denoiser: deltas}, targets).to(core.family.device)
    return ScaledAdapter(f"sha256:{seed:064x}", 1.0, weights)


@pytest.mark.parametrize("columns", [0, 1], ids=["base", "pages"])
def test_a_replayed_graph_equals_the_same_run_eagerly(core: Core, columns: int) -> None:
    """Bit for bit, for inputs that the graph was not captured with, and padded to its rows."""

    def compare(runner: BatchRunner, _: Any) -> tuple[list[bool], int]:
        denoiser, equal = runner.denoiser, []
        runner._paged.open(runner.column_choices[0] if columns else 0, 0)

        def both(_: Any, inputs: Any, __: Any) -> torch.Tensor:
            eager = denoiser.eager(inputs, {})
            with torch.compiler.set_stance("force_eager"), denoiser.capturing():
                denoiser(inputs, {})
            others = {name: value.flip(0).contiguous() for name, value in inputs.items()}
            equal.append(torch.equal(denoiser(others, {}), denoiser.eager(others, {})))
            equal.append(torch.equal(denoiser(inputs, {}), eager))
            fewer = {name: value[:3].contiguous() for name, value in inputs.items()}
            padded = denoiser(fewer, {})
            equal.append(torch.allclose(padded, denoiser.eager(fewer, {}), rtol=1e-4, atol=1e-4))
            return eager

        before = denoiser.captures
        core.family.step(states_of(runner, OTHER_SIDE_PX, images=2), both)
        runner._paged.open(0, 0)
        return equal, denoiser.captures - before

    equal, captures = on_engine(core, compare)
    assert equal == [True, True, True]
    assert captures == 1


def test_merged_equals_pages(core: Core) -> None:
    """One step with two adapters, both ways, and the base afterwards, bit for bit."""
    adapters = (random_adapter(core, 1), random_adapter(core, 2))

    def latents(runner: BatchRunner, composition: Any, way: ApplicationWay) -> torch.Tensor:
        (state,) = states_of(runner, SIDE_PX)
        runner.step([BatchImage(state, composition)], way)
        runner.wait()
        return state.latents.double()

    def draw(runner: BatchRunner, _: Any) -> list[torch.Tensor]:
        drawn = [
            latents(runner, (), ApplicationWay.BASE),
            latents(runner, adapters, ApplicationWay.MERGED),
            latents(runner, adapters, ApplicationWay.SLOTS),
            latents(runner, (), ApplicationWay.BASE),
        ]
        runner.pages.clear()
        return drawn

    base, merged, paged, again = on_engine(core, draw)
    effect = (merged - base).norm()
    assert effect > 0.01 * base.norm()
    assert (merged - paged).norm() < 0.01 * effect
    assert torch.equal(base, again)


def test_residents_under_eviction_draw_their_own_pictures(core: Core, many_adapters: Path) -> None:
    """More adapters than slots, all at once and again in another order: each the picture it draws alone."""
    alone = [
        pictures(events(submit(core, many_adapters, f"alone-{k}", [(str(k), 1.0)])))[0] for k in range(NUM_ADAPTERS)
    ]
    assert len({each.tobytes() for each in alone}) == NUM_ADAPTERS
    for turn in range(4):
        order = [(k * 5 + turn) % NUM_ADAPTERS for k in range(NUM_ADAPTERS)]
        jobs = {k: submit(core, many_adapters, f"turn-{turn}-{k}", [(str(k), 1.0)]) for k in order}
        for k, job in jobs.items():
            (drawn,) = pictures(events(job))
            levels = np.abs(drawn.astype(int) - alone[k].astype(int))
            assert levels.max() <= 2, (turn, k)  # batched, a float32 sum is rounded in another order
    assert core.manager.cache_info().resident_adapters <= DEVICE_SLOTS
    settle(core)


def test_page_locked_memory_comes_back(core: Core, many_adapters: Path, pool: list[HostPool]) -> None:
    """A version's part is free once it is unloaded and its upload is done."""
    (taken,) = pool
    settle(core)
    before_bytes = taken.free_bytes
    copy = shutil.copytree(many_adapters / "0", many_adapters / "copy")
    config = copy / "adapter_config.json"
    config.write_text(config.read_text().replace('"lora_alpha": 8', '"lora_alpha": 4'))  # a version of its own
    core.manager.load(AdapterSource(str(copy), name="copy")).result(timeout=SOON_S)
    events(submit(core, many_adapters, "pool", [("copy", 1.0)]))
    assert taken.free_bytes < before_bytes
    settle(core)
    core.manager.unload(ByName("copy"))
    on_engine(core, lambda *_: (torch.cuda.synchronize(), core.engine._residency.trim()))
    deadline_s = time.monotonic() + SOON_S
    while taken.free_bytes < before_bytes and time.monotonic() < deadline_s:
        gc.collect()
        time.sleep(0.05)
    assert taken.free_bytes == before_bytes


@contextmanager
def nearly_full_device(left_bytes: int) -> Iterator[None]:
    """Takes all but *left_bytes* of the device's memory."""
    torch.cuda.empty_cache()
    free_bytes, _ = torch.cuda.mem_get_info()
    ballast = torch.empty(free_bytes - left_bytes, dtype=torch.uint8, device="cuda")
    yield
    del ballast
    torch.cuda.empty_cache()


def test_a_true_lack_of_memory_ends_one_request(core: Core, many_adapters: Path) -> None:
    """The request gets GPU_OUT_OF_MEMORY; afterwards memory and pictures are as before."""
    uses = [("2", 1.0)]
    before = pictures(events(submit(core, many_adapters, "before-oom", uses)))[0]
    held_bytes = on_engine(core, lambda *_: torch.cuda.memory_allocated())
    with nearly_full_device(left_bytes=2**24):
        job = submit(core, many_adapters, "oom", uses, side_px=LARGEST_SIDE_PX, num_images=16)
        with pytest.raises(DeviceOutOfMemoryError):
            events(job)
    settle(core)
    after = pictures(events(submit(core, many_adapters, "after-oom", uses)))[0]
    assert np.array_equal(before, after)
    assert on_engine(core, lambda *_: torch.cuda.memory_allocated()) <= held_bytes + 2**20
    assert core.engine.info().restarts == 0


def test_what_is_not_finite_ends_one_request(core: Core, many_adapters: Path) -> None:
    """From a replayed graph as from the weights: the adapter at fault is named, others and the base are as before."""
    factors = {"A": torch.full((4, 160), 1e19), "B": torch.full((64, 4), 1e19)}
    huge = {f"transformer.proj_out.lora_{name}.weight": value for name, value in factors.items()}
    save_file(huge, many_adapters / "huge.safetensors")
    base = pictures(events(submit(core, many_adapters, "base", [])))[0]
    alone = pictures(events(submit(core, many_adapters, "beside-alone", [("3", 1.0)])))[0]
    for turn in range(3):
        bad = submit(core, many_adapters, f"huge-{turn}", [("huge.safetensors", 1.0)])
        beside = submit(core, many_adapters, f"beside-{turn}", [("3", 1.0)])
        with pytest.raises(AdapterOutputNotFiniteError, match="huge"):
            events(bad)
        (drawn,) = pictures(events(beside))
        assert np.abs(drawn.astype(int) - alone.astype(int)).max() <= 2  # in a batch of two
    settle(core)
    assert np.array_equal(pictures(events(submit(core, many_adapters, "base-after", [])))[0], base)


def settle(core: Core) -> None:
    """Waits until nothing is held by anybody, and checks the books."""
    deadline_s = time.monotonic() + SOON_S
    while core.manager.cache_info().leases or core.engine.queue_info().running_requests:
        assert time.monotonic() < deadline_s, "leaked"
        time.sleep(0.01)
    core.manager.check_integrity()
    on_engine(core, lambda runner, _: runner.pages.check_integrity())
