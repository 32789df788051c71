"""Asks for the same picture with every registered adapter at once: python examples/many_adapters.py [HOST:PORT]"""

import asyncio
import sys

from lora_client import AsyncLoraClient


async def main(server: str) -> None:
    """Starts one request for each adapter; the server takes them as they come."""
    async with AsyncLoraClient(server) as client:
        names = [adapter.name for adapter in await client.adapters.list()]
        results = await asyncio.gather(
            *[client.generate("a blue ring on a mint background", adapters=[name], seed=7) for name in names]
        )
        for name, result in zip(names, results, strict=True):
            print(result.images[0].save(f"{name}.png"), f"{result.stats.total_time_s:.2f} s")


asyncio.run(main(sys.argv[1] if len(sys.argv) > 1 else "127.0.0.1:50051"))
