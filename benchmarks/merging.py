"""A change of merged weights by shape of model: one kernel against gather, batched product and scatter.

python -m benchmarks.merging [--device cuda]

Stacks as the store has them, with columns for pages behind each weight; all modules change but a few, one of them in
their midst, as in SDXL and whenever an adapter leaves modules out. Without CUDA both rows are torch's products.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch
from lora_server.models import merge
from lora_server.models.linear_store import LinearStore, linear_shapes
from lora_server.models.merge import ScaledAdapter, WeightMerger
from lora_server.models.weights import AdapterWeights, LowRankDelta, pack
from torch import nn

from benchmarks.timing import median_s

_COLUMNS = 128
_MODELS = {"SD3.5 medium": (1536, 243, 2), "FLUX.1 dev": (3072, 266, 3)}
"""Width, changed linears and unchanged ones of the shape (width, width)."""


def main() -> None:
    """Prints a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--shrink", type=int, default=1, help="divides widths and numbers, for a try on the CPU")
    parser.add_argument("--ranks", default="16,64")
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    dtype = torch.bfloat16
    with torch.inference_mode():
        for name, sizes in _MODELS.items():
            width, changed, others = (max(2, size // arguments.shrink) for size in sizes)
            for rank in map(int, arguments.ranks.split(",")):
                net = _net(width, changed, others, device, dtype)
                targets = {"net": linear_shapes(net)}
                adapters = [_adapter(width, changed, rank, seed, targets).to(device) for seed in range(2)]
                merger = WeightMerger("net", LinearStore(net, _COLUMNS))
                _report(f"{name}, rank {rank}", merger, adapters, 2 * changed * width**2 * 2, device)


def _net(width: int, changed: int, others: int, device: torch.device, dtype: torch.dtype) -> nn.Sequential:
    with torch.device("meta"):
        net = nn.Sequential(*[nn.Linear(width, width, bias=False) for _ in range(changed + others)])
    net.to_empty(device=device).to(dtype).requires_grad_(False)
    for parameter in net.parameters():
        parameter.normal_(0, 0.02)
    return net


def _adapter(width: int, changed: int, rank: int, seed: int, targets: dict[str, dict[str, object]]) -> AdapterWeights:
    torch.manual_seed(seed)
    deltas = {}
    for k in range(changed):
        place = k if k < changed // 2 else k + 1  # one in the middle is left out
        a, b = (torch.randn(shape).bfloat16() * 0.02 for shape in ((rank, width), (width, rank)))
        deltas[str(place)] = LowRankDelta(a, b, 1.0)
    return pack({"net": deltas}, targets)  # type: ignore[arg-type]


def _report(
    what: str, merger: WeightMerger, adapters: list[AdapterWeights], traffic: int, device: torch.device
) -> None:
    turn = iter(range(10**6))

    def change() -> None:
        k = next(turn) % 2
        merger.apply([ScaledAdapter(f"sha256:{k}", 0.8, adapters[k])])

    kernel = median_s(change, device)
    products = _with_products(lambda: median_s(change, device))
    for how, seconds in (("one kernel", kernel), ("products of torch", products)):
        print(f"{what:24} {how:18} {seconds * 1e3:7.2f} ms  {traffic / seconds / 1e12:5.2f} TB/s", flush=True)


def _with_products(action: Callable[[], float]) -> float:
    found, merge._has_kernel = merge._has_kernel, lambda _: False
    try:
        return action()
    finally:
        merge._has_kernel = found


if __name__ == "__main__":
    main()
