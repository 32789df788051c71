"""What it costs to look whether steps are finite: the same steps with the look and without it, in turns, as a ratio.

python -m benchmarks.finite [--preset sd35-medium-random --device cuda] [--sizes 512,1024] [--images 1,4]

Steps are given to the device as the engine gives them, the next before the last is done, in blocks; a block is timed
to its end. The host's part lasts until the last step of a block is given. On the CPU its own time counts, which others
on a busy machine do not lengthen.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Sequence
from unittest import mock

import torch
from lora_server.config import EngineConfig, ModelConfig
from lora_server.engine import batch_runner
from lora_server.engine.batch_runner import BatchImage, BatchRunner
from lora_server.models.base import DenoisingState
from lora_server.models.finite import FiniteCheck
from lora_server.types import ApplicationWay, GenerationParameters
from torch import Tensor

from benchmarks.presets import PRESETS

_STEPS = 1000


class _Unchecked(FiniteCheck):
    """Looks at nothing."""

    def add(self, subjects: Sequence[int], component: str, batch: Tensor) -> None:
        """Does not add."""

    def send(self) -> FiniteCheck:
        """Sends nothing."""
        return self


def main() -> None:
    """Prints a line for each size and number of images."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=list(PRESETS), default="demo")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--sizes", default="")
    parser.add_argument("--images", default="1,4")
    parser.add_argument("--blocks", type=int, default=20, help="Blocks of each kind.")
    parser.add_argument("--steps", type=int, default=10, help="Steps of a block.")
    arguments = parser.parse_args()
    preset = PRESETS[arguments.preset]
    family = preset.family(ModelConfig(model="demo", device=arguments.device))
    runner = BatchRunner(family, EngineConfig())
    sizes = [int(size) for size in arguments.sizes.split(",") if size] or list(preset.sizes_px)
    with torch.inference_mode():
        for size in sizes:
            for images in map(int, arguments.images.split(",")):
                wanted = GenerationParameters("a star", "", size, size, _STEPS, preset.guidance_scale, 0, images)
                conditioning = runner.condition(wanted, ())
                states = runner.begin(wanted, conditioning)
                print(f"{preset.name} {size} px, {images} images: {compare(runner, states, arguments)}", flush=True)


def compare(runner: BatchRunner, states: Sequence[DenoisingState], arguments: argparse.Namespace) -> str:
    """Steps *states* in blocks of either kind in turns; returns medians, and the median of the ratios of neighbours."""
    with runner.denoiser.capturing():
        _block(runner, states, 2)
    pairs = []
    for turn in range(arguments.blocks):
        kinds = [FiniteCheck, _Unchecked] if turn % 2 else [_Unchecked, FiniteCheck]
        found = {}
        for kind in kinds:
            with mock.patch.object(batch_runner, "FiniteCheck", kind):
                found[kind] = _block(runner, states, arguments.steps)
        pairs.append((found[FiniteCheck], found[_Unchecked]))
    (step, host), (bare, bare_host) = (
        [statistics.median(pair[side][part] for pair in pairs) for part in (0, 1)] for side in (0, 1)
    )
    ratios = sorted(checked[0] / unchecked[0] for checked, unchecked in pairs)
    quartiles = statistics.quantiles(ratios, n=4)
    return (
        f"step {bare * 1e3:.3f} ms, with the look {step * 1e3:.3f} ms, ratio {statistics.median(ratios):.4f} "
        f"(quartiles {quartiles[0]:.4f} to {quartiles[2]:.4f}); host {bare_host * 1e6:.0f} and {host * 1e6:.0f} us"
    )


def _block(runner: BatchRunner, states: Sequence[DenoisingState], steps: int) -> tuple[float, float]:
    """Seconds of a step, and of its part on the host."""
    for state in states:
        state.step_index = 1  # as most steps are; the first one looks at the prompts, too
    images = [BatchImage(state, ()) for state in states]
    clock = time.perf_counter if runner.asynchronous else time.process_time
    runner.wait()
    began_s = clock()
    for _ in range(steps):
        runner.step(images, ApplicationWay.BASE)
    given_s = clock()
    runner.wait()
    return (clock() - began_s) / steps, (given_s - began_s) / steps


if __name__ == "__main__":
    main()
