"""What the cells say, as ratios: the bars of the project beside what was measured."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from benchmarks.queueing import highest_rate, p95_s

Cells = dict[str, Any]


def print_table(cells: Cells) -> None:
    """Prints the figures that the present cells allow."""
    print()
    for what, value in rows(cells):
        print(f"{what:<72} {value}")


def rows(cells: Cells) -> Iterator[tuple[str, str]]:
    """Yields (what, value)."""
    for size in sorted({int(name.split()[1]) for name in cells if name.split()[1:2] and name.split()[1].isdigit()}):
        yield from _steps(cells.get(f"steps {size}", {}), size)
        yield from _cold(cells.get(f"cold {size}", {}), size)
        yield from _throughput(cells, size)


def _steps(cell: Cells, size: int) -> Iterator[tuple[str, str]]:
    if "base_1_s" not in cell:
        return
    for images in ("1", "4"):
        base = cell[f"base_{images}_s"]
        rate = cell[f"flop_{images}"] / base / cell["matmul_flop_per_s"]
        yield f"{size} px, base step, {images} images", f"{base * 1e3:.2f} ms, {rate:.0%} of the matmul rate"
        for way in ("merged", "slots"):
            seconds = cell[f"{way}_{images}_s"]
            yield f"{size} px, {way}, {images} images", f"{seconds * 1e3:.2f} ms, {seconds / base - 1:+.1%} over base"
    for name in ("switch_s", "page_write_s", "decode_s", "encode_s"):
        yield f"{size} px, {name.removesuffix('_s')}", f"{cell[name] * 1e3:.2f} ms"


def _cold(cell: Cells, size: int) -> Iterator[tuple[str, str]]:
    if "cold_added_s" not in cell:
        return
    yield (
        f"{size} px, change between resident adapters, added to the first step",
        f"{cell['change_added_s'] * 1e3:.1f} ms",
    )
    yield f"{size} px, cold adapter, added to the first step", f"{cell['cold_added_s'] * 1e3:.1f} ms"
    for what, key in (("alone", "steps_alone"), (f"beside {cell['loads']} loads", "steps_beside_loads")):
        steps = cell[key]
        yield (
            f"{size} px, between two steps, {what}",
            f"p50 {steps['p50_s'] * 1e3:.1f} ms, p99 {steps['p99_s'] * 1e3:.1f} ms",
        )


def _throughput(cells: Cells, size: int) -> Iterator[tuple[str, str]]:
    baselines = {
        "a": _rate(cells.get(f"a {size}", {}), "image_s", 1),
        "b": _rate(cells.get(f"b {size}", {}), "image_s", 1),
        "c": _rate(cells.get(f"c {size}", {}), "batch_s", 4),
    }
    for name, rate in baselines.items():
        if rate:
            yield f"{size} px, baseline {name}", f"{rate:.3f} images/s"
    for name, key in (("a", "image_s"), ("b", "image_s")):
        service_s = cells.get(f"{name} {size}", {}).get(key)
        if service_s:
            yield (
                f"{size} px, {name} behind a lock, Poisson arrivals",
                f"p95 {p95_s(service_s, 0.7 / service_s):.2f} s at {0.7 / service_s:.2f}/s (70% of its capacity); "
                f"p95 <= 2x its service time up to {highest_rate(service_s):.2f}/s",
            )
    for name, cell in cells.items():
        if not name.startswith(("closed", "open", "popular")) or f" {size} " not in name or "images_per_s" not in cell:
            continue
        ours = cell["images_per_s"]
        ratios = "  ".join(f"x{ours / rate:.2f} of {key}" for key, rate in baselines.items() if rate)
        batch = cell["stats"].get("batch", 0)
        yield (
            name,
            f"{ours:.3f} images/s  {ratios}  p50 {cell.get('p50_s', 0):.2f} p95 {cell.get('p95_s', 0):.2f} "
            f"p99 {cell.get('p99_s', 0):.2f} s  batch {batch:.1f} {cell['stats'].get('ways')}",
        )


def _rate(cell: Cells, key: str, images: int) -> float:
    return images / cell[key] if key in cell else 0.0
