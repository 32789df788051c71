"""The throughput cells as a picture: images a second of the service and of the ways beside it. Needs matplotlib."""

from __future__ import annotations

from pathlib import Path
from typing import Any

_BASELINES = {
    "a": ("diffusers, eager, a lock", "image_s", 1),
    "b": ("diffusers, tuned", "image_s", 1),
    "c": ("peft, mixed batch", "batch_s", 4),
}


def plot(cells: dict[str, Any], path: Path) -> None:
    """Writes a PNG; does nothing if there is nothing to show, or no matplotlib (extra `benchmarks`)."""
    bars = _bars(cells)
    try:
        import matplotlib
    except ImportError:
        return
    if not bars:
        return
    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 0.5 + 0.4 * len(bars)), layout="constrained")
    names, rates, ours = zip(*bars, strict=True)
    drawn = axes.barh(names, rates, color=["#1f77b4" if each else "#bbbbbb" for each in ours])
    axes.bar_label(drawn, fmt="%.2f", padding=3)
    axes.margins(x=0.12)
    axes.invert_yaxis()
    axes.set_xlabel("images per second")
    axes.set_title(str(cells.get("machine", {}).get("gpu") or "CPU"))
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def _bars(cells: dict[str, Any]) -> list[tuple[str, float, bool]]:
    """(label, images a second, whether it is the service's), in the order of the cells."""
    bars = []
    for name, cell in cells.items():
        if "images_per_s" in cell:
            bars.append((name, float(cell["images_per_s"]), True))
        baseline, *size = name.split()
        if baseline in _BASELINES:
            label, key, images = _BASELINES[baseline]
            if key in cell:
                bars.append((f"{label}, {' '.join(size)}", images / cell[key], False))
    return bars
