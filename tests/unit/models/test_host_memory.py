"""The pool of host memory, over an ordinary block."""

from __future__ import annotations

import gc
import random
from concurrent.futures import ThreadPoolExecutor

import torch
from lora_server.models.host_memory import HostPool, host_memory, ordinary_memory


def make_pool(size: int = 4096) -> tuple[HostPool, torch.Tensor]:
    """A pool and its block, filled with ones."""
    block = torch.ones(size, dtype=torch.uint8)
    return HostPool(block), block


def lies_in(tensor: torch.Tensor, block: torch.Tensor) -> bool:
    """Whether the tensor's memory is a part of the block's."""
    return block.data_ptr() <= tensor.data_ptr() < block.data_ptr() + block.numel()


def test_a_tensor_lies_in_the_block() -> None:
    """What is written into it is written into the block."""
    pool, block = make_pool()
    tensor = pool.allocate(256, torch.bfloat16).zero_()
    assert lies_in(tensor, block)
    assert int((block == 0).sum()) == 512
    assert pool.free_bytes == 4096 - 512


def test_a_part_comes_back_when_the_last_view_is_gone() -> None:
    """Not when the tensor is that the pool returned: a view keeps the memory."""
    pool, _ = make_pool()
    tensor = pool.allocate(512, torch.float32)
    view = tensor[:8].view(2, 4)
    del tensor
    gc.collect()
    assert pool.free_bytes == 2048
    del view
    assert pool.free_bytes == 4096


def test_beyond_the_block_memory_is_ordinary() -> None:
    """A load never fails because the pool is full."""
    pool, block = make_pool()
    held = pool.allocate(4096, torch.uint8)
    tensor = pool.allocate(1, torch.float32).fill_(2.0)
    assert lies_in(held, block)
    assert not lies_in(tensor, block)
    assert tensor.item() == 2.0


def test_neighbours_are_joined() -> None:
    """Freed out of order, the whole block is one piece again."""
    pool, block = make_pool()
    parts = [pool.allocate(1024, torch.uint8) for _ in range(4)]
    for k in (2, 0, 3, 1):
        parts[k] = torch.empty(0)
    assert lies_in(pool.allocate(4096, torch.uint8), block)


def test_nothing_is_empty() -> None:
    """A tensor without elements takes nothing."""
    pool, _ = make_pool()
    assert pool.allocate(0, torch.float16).shape == (0,)
    assert pool.free_bytes == 4096


def test_parts_never_overlap_under_threads() -> None:
    """Four threads write their own mark and find it again, whatever the others allocate and drop."""
    pool, block = make_pool(64 * 1024)

    def work(mark: int) -> None:
        rng = random.Random(mark)
        held: list[torch.Tensor] = []
        for _ in range(300):
            held.append(pool.allocate(rng.randrange(1, 3000), torch.int32).fill_(mark))
            if len(held) > 4:
                gone = held.pop(rng.randrange(len(held)))
                assert bool((gone == mark).all())

    with ThreadPoolExecutor(4) as threads:
        for done in [threads.submit(work, mark) for mark in range(4)]:
            done.result()
    assert pool.free_bytes == block.numel()


def test_the_cpu_takes_ordinary_memory() -> None:
    """Nothing is locked where nothing is uploaded."""
    assert host_memory(torch.device("cpu"), 2**30) is ordinary_memory
