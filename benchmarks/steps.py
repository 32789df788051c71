"""What one step costs, on the engine's own thread: base, merged, open pages; a change of weights; share of the peak."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from lora_server.engine.batch_runner import BatchImage, BatchRunner
from lora_server.engine.stepper import Stepper
from lora_server.models.base import DenoisingState, ModelFamily, Prompt, adapter_targets
from lora_server.models.merge import ScaledAdapter
from lora_server.models.weights import AdapterWeights, LowRankDelta, pack
from lora_server.types import ApplicationWay, GenerationParameters

from benchmarks.adapters import ATTENTION
from benchmarks.presets import Preset
from benchmarks.profile import by_kind
from benchmarks.service import Running
from benchmarks.timing import median_s

_RUNS = 9
_MATMUL_SIDE = 8192


def measure(running: Running, preset: Preset, size: int) -> dict[str, Any]:
    """Measures at one size, between two requests."""
    family = running.core.family

    def on_engine(runner: BatchRunner, _: Stepper) -> dict[str, Any]:
        return _Meter(family, runner, preset, size).all()

    found: dict[str, Any] = running.core.engine.call(on_engine).result()
    return found


def random_adapter(family: ModelFamily, rank: int, seed: int) -> AdapterWeights:
    """An adapter of all attention projections, on the device."""
    targets = adapter_targets({family.denoiser: family.components[family.denoiser]})
    generator = torch.Generator(family.device).manual_seed(seed)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, device=family.device, dtype=family.dtype) * 0.02

    deltas = {
        path: LowRankDelta(random(rank, shape.in_features).cpu(), random(shape.out_features, rank).cpu(), 1.0)
        for path, shape in targets[family.denoiser].items()
        if path.endswith(ATTENTION)
    }
    return pack({family.denoiser: deltas}, targets).to(family.device)


class _Meter:
    def __init__(self, family: ModelFamily, runner: BatchRunner, preset: Preset, size: int) -> None:
        self._family = family
        self._runner = runner
        self._preset = preset
        self._size = size
        self._adapters = [random_adapter(family, 16, seed) for seed in range(4)]

    def all(self) -> dict[str, Any]:
        one, four = self._states(1), self._states(4)
        found: dict[str, Any] = {}
        for name, states in (("1", one), ("4", four)):
            plain = [BatchImage(state, ()) for state in states]
            same = [BatchImage(state, self._composition(0)) for state in states]
            each = [BatchImage(state, self._composition(k)) for k, state in enumerate(states)]
            # Interleaved, so that the clock of the device is the same for all.
            found |= self._medians({
                f"base_{name}_s": lambda plain=plain: self._step(plain, ApplicationWay.BASE),
                f"merged_{name}_s": lambda same=same: self._step(same, ApplicationWay.MERGED),
                f"slots_{name}_s": lambda each=each: self._step(each, ApplicationWay.SLOTS),
            })  # fmt: skip
            found[f"flop_{name}"] = self._flop(states)
            found[f"profile_base_{name}"] = by_kind(lambda plain=plain: self._step(plain, ApplicationWay.BASE))  # type: ignore[misc]
            found[f"profile_slots_{name}"] = by_kind(lambda each=each: self._step(each, ApplicationWay.SLOTS))  # type: ignore[misc]
        found["switch_s"] = self._switch()
        found["page_write_s"] = self._page_write()
        found["matmul_flop_per_s"] = self._matmul_rate()
        found["decode_s"] = self._time(lambda: self._runner.decode(one))
        found["encode_s"] = self._time(lambda: self._runner.encode([Prompt("a"), Prompt("b")], ()))
        self._runner.restore()
        self._runner.pages.clear()
        return found

    def _composition(self, k: int) -> Sequence[ScaledAdapter]:
        return [ScaledAdapter(f"benchmark:{k}", 1.0, self._adapters[k])]

    def _states(self, images: int) -> list[DenoisingState]:
        side = self._size
        wanted = GenerationParameters("a red star", "", side, side, 1000, self._preset.guidance_scale, 0, images)
        conditioning = self._runner.condition(wanted, ())
        return self._runner.begin(wanted, conditioning)

    def _step(self, images: Sequence[BatchImage], way: ApplicationWay) -> None:
        self._runner.step(images, way)
        self._runner.wait()

    def _medians(self, actions: dict[str, Callable[[], None]]) -> dict[str, float]:
        seconds: dict[str, list[float]] = {name: [] for name in actions}
        for run in range(_RUNS + 1):
            for name, action in actions.items():
                action()  # the change of weights or pages that it needs
                began_s = time.perf_counter()
                action()
                if run:
                    seconds[name].append(time.perf_counter() - began_s)
        return {name: statistics.median(values) for name, values in seconds.items()}

    def _time(self, action: Callable[[], object]) -> float:
        seconds = []
        for _ in range(4):
            began_s = time.perf_counter()
            action()
            self._runner.wait()
            seconds.append(time.perf_counter() - began_s)
        return statistics.median(seconds[1:])

    def _switch(self) -> float:
        turn = iter(range(10**6))
        return self._time(lambda: self._runner.merge(self._composition(next(turn) % 2)))

    def _page_write(self) -> float:
        """Four adapters written into pages that held others."""
        from lora_server.models.pages import write_pages

        def write() -> None:
            for k in range(4):
                store, width = self._runner.store, self._runner.pages.page_columns
                write_pages(store, self._family.denoiser, self._adapters[k], [k], width)

        return self._time(write) / 4

    def _flop(self, states: Sequence[DenoisingState]) -> int:
        """Floating-point operations of one step, counted by torch, eagerly."""
        from torch.utils.flop_counter import FlopCounterMode

        fused: Any = {torch.ops.aten._addmm_activation: lambda _, x, w, **__: 2 * x[0] * x[1] * w[1]}
        with FlopCounterMode(display=False, custom_mapping=fused) as counter:
            self._family.step(states, lambda _, inputs, __: self._runner.denoiser.eager(inputs, {}))
        return int(counter.get_total_flops())

    def _matmul_rate(self) -> float:
        device = self._family.device
        side = _MATMUL_SIDE if device.type == "cuda" else 1024
        a, b = (torch.randn(side, side, device=device, dtype=self._family.dtype) for _ in range(2))
        return 2 * side**3 / median_s(lambda: a @ b, device)
