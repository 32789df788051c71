"""How long the embedded model takes: 20 steps with guidance at its default size, in this process.

python -m benchmarks.demo_speed [--threads 2]
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch
from lora_server.config import EngineConfig, ModelConfig
from lora_server.engine.batch_runner import BatchImage, BatchRunner
from lora_server.models.registry import load_model
from lora_server.types import ApplicationWay, GenerationParameters


def main() -> None:
    """Prints the median of five pictures after one to warm up, and its parts."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=2)
    torch.set_num_threads(parser.parse_args().threads)
    family = load_model(ModelConfig(model="demo", device="cpu", dtype="float32"))
    runner, defaults = BatchRunner(family, EngineConfig()), family.info.defaults
    wanted = GenerationParameters(
        "a red star on a navy background", "", defaults.width_px, defaults.height_px,
        defaults.num_inference_steps, defaults.guidance_scale, seed=1, num_images=1,
    )  # fmt: skip
    totals, steps = [], []
    with torch.inference_mode():
        for _ in range(6):
            began_s = time.perf_counter()
            conditioning = runner.condition(wanted, ())
            (state,) = runner.begin(wanted, conditioning)
            stepping_s = time.perf_counter()
            while not state.finished:
                runner.step([BatchImage(state, ())], ApplicationWay.BASE)
            steps.append(time.perf_counter() - stepping_s)
            runner.decode([state])
            totals.append(time.perf_counter() - began_s)
    print(f"{defaults.num_inference_steps} steps, guidance {defaults.guidance_scale:g}, torch {torch.__version__}")
    print(f"picture {statistics.median(totals[1:]):.2f} s, of it steps {statistics.median(steps[1:]):.2f} s")


if __name__ == "__main__":
    main()
