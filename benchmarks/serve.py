"""The service beside what a user has today, in one run on one machine: images a second, latencies, overheads.

python -m benchmarks.serve --preset demo --device cpu
python -m benchmarks.serve --preset sd35-medium-random --device cuda --cells steps,closed,a,b

Results accumulate in --out as JSON; a cell that is there is not run again unless --again. --table only prints them.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from lora_server.config import EngineConfig
from lora_server.models.base import adapter_targets

from benchmarks.adapters import write_adapters
from benchmarks.baselines import Diffusers
from benchmarks.plot import plot
from benchmarks.presets import PRESETS, Preset
from benchmarks.service import Running, service
from benchmarks.service_cells import ServiceCells
from benchmarks.table import print_table

_BASELINES = frozenset("abc")
CELLS = ("steps", "closed", "open", "popular", "cold", "a", "b", "c")


class Results:
    """What was measured, on disk after every cell."""

    def __init__(self, path: Path, *, again: bool) -> None:
        self.path = path
        self._again = again
        self.cells: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {}

    def measure(self, name: str, action: Callable[[], dict[str, Any]]) -> None:
        """Runs *action* for the cell *name*, unless it is there; what fails is written down and passed over."""
        if name in self.cells and not self._again:
            return
        began_s = time.monotonic()
        try:
            found = action()
        except Exception as error:
            found = {"error": f"{type(error).__name__}: {error}"[:500]}
        found["cell_s"] = round(time.monotonic() - began_s, 1)
        self.cells[name] = {"run": _run_name(), **found}
        print(name, json.dumps(found, default=str), flush=True)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.write_text(json.dumps(self.cells, indent=1, default=str) + "\n")


def main() -> None:
    """Measures the cells that are asked for."""
    arguments = _arguments()
    preset = PRESETS[arguments.preset]
    results = Results(arguments.out / f"{preset.name}-{arguments.device}.json", again=arguments.again)
    if arguments.table:
        print_table(results.cells)
        return
    results.measure("machine", _machine)
    root = arguments.adapters or Path(tempfile.mkdtemp(prefix="benchmark-adapters-"))
    cells = set(arguments.cells.split(","))
    sizes = tuple(int(size) for size in arguments.sizes.split(",")) if arguments.sizes else preset.sizes_px
    ours, others = cells - _BASELINES, cells & _BASELINES
    if ours and others:  # each in a process of its own, so that neither leaves threads or memory to the other
        for part in (others, ours):
            command = [sys.executable, "-m", "benchmarks.serve", *sys.argv[1:], "--cells", ",".join(sorted(part))]
            subprocess.run(command, check=True)
    elif ours:
        _measure_service(preset, sizes, cells, results, root, arguments)
    else:
        _measure_baselines(preset, sizes, cells, results, root, arguments)
    cells_there = Results(results.path, again=False).cells
    print_table(cells_there)
    plot(cells_there, results.path.with_suffix(".png"))


def _measure_service(
    preset: Preset, sizes: tuple[int, ...], cells: set[str], results: Results, root: Path, arguments: argparse.Namespace
) -> None:
    engine = EngineConfig(
        max_batch_images=arguments.batch,
        max_active_images=max(16, arguments.batch),
        warm_sizes=tuple((size, size) for size in sizes),
        warm_images=tuple(int(n) for n in arguments.warm.split(",")),
        num_pages=arguments.pages,
        column_buckets=(64,),
        max_queued_requests=4096,
        threads=_THREADS,
    )
    with service(preset, root, engine, arguments.device, slots=arguments.slots) as running:
        results.measure("start", lambda: {"seconds": running.start_s, "engine": _engine(running)})
        ours = ServiceCells(running, preset, root, arguments, results.measure)
        for size in sizes:
            ours.measure(size, cells)
        ours.measure_unloaded(min(sizes), cells)
        results.measure("end", lambda: {"engine": _engine(running), "memory": _memory()})


def _measure_baselines(
    preset: Preset, sizes: tuple[int, ...], cells: set[str], results: Results, root: Path, arguments: argparse.Namespace
) -> None:
    torch.set_num_threads(_THREADS)  # the service's loaders have set their own, which became the process's default
    baseline = Diffusers(preset, arguments.device)
    targets = adapter_targets({baseline.component: baseline.network})
    baseline.load(write_adapters(root, targets, 4, arguments.ranks, baseline.network.dtype))
    graphs = arguments.device == "cuda"
    runs = 3 if graphs else 20  # the CPU's are short and vary
    for size in sizes:
        if "a" in cells:
            results.measure(f"a {size}", lambda size=size: {"image_s": baseline.eager(size, runs)})  # type: ignore[misc]
        if "c" in cells:
            results.measure(f"c {size}", lambda size=size: {"batch_s": baseline.mixed(size, 2), "images": 4})  # type: ignore[misc]
    for size in sizes:
        if "b" in cells:

            def tuned(size: int = size) -> dict[str, Any]:
                seconds, change = baseline.tuned(size, 6, graphs=graphs)
                return {"image_s": seconds, "change_s": change}

            results.measure(f"b {size}", tuned)


def _engine(running: Running) -> dict[str, Any]:
    info = running.core.engine.info()
    ways = {way.value: steps for way, steps in info.steps_by_way.items()}
    return {name: getattr(info, name) for name in info.__slots__ if name != "steps_by_way"} | {"steps": ways}


def _memory() -> dict[str, Any]:
    import resource

    host = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    device = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0
    return {"host_bytes": host, "device_bytes": device}


def _machine() -> dict[str, Any]:
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    versions = {name: version(name) for name in ("torch", "diffusers", "peft", "transformers", "grpcio")}
    return {"gpu": gpu, "cpus": os.cpu_count(), "python": platform.python_version(), "versions": versions}


def _run_name() -> str:
    return time.strftime("%Y-%m-%d %H:%M", time.gmtime(_BEGAN_S))


_BEGAN_S = time.time()
_THREADS = torch.get_num_threads()


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(number) for number in text.split(","))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=sorted(PRESETS), default="demo")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--cells", default=",".join(CELLS), help="which to measure, of " + ", ".join(CELLS))
    parser.add_argument("--sizes", default="", help="sides in pixels; default: the preset's")
    parser.add_argument("--count", type=int, default=16, help="adapters to load")
    parser.add_argument("--ranks", type=_numbers, default=(16,), help="ranks of the adapters, in turn, such as 8,16,64")
    parser.add_argument("--adapters-used", default="1,16", help="numbers of adapters of the closed loads")
    parser.add_argument("--concurrency", type=int, default=16, help="callers of the closed loads")
    parser.add_argument("--profiles", default="A", help="popularity profiles of the cell `popular`: A, B")
    parser.add_argument("--rates", default="1", help="arrivals a second of the open loads")
    parser.add_argument("--seconds", type=float, default=20.0, help="of each load")
    parser.add_argument("--batch", type=int, default=8, help="most images of a batch")
    parser.add_argument("--warm", default="1,4", help="batches to warm up, in images")
    parser.add_argument("--pages", type=int, default=8)
    parser.add_argument("--slots", type=int, default=64)
    parser.add_argument("--adapters", type=Path, default=None, help="folder for the random adapters")
    parser.add_argument("--out", type=Path, default=Path("out/benchmarks"))
    parser.add_argument("--again", action="store_true", help="measure cells anew that are there")
    parser.add_argument("--table", action="store_true", help="only print what is there")
    return parser.parse_args()


if __name__ == "__main__":
    main()
