"""The device's memory: what there is, and how to get it back after it ran out."""

from __future__ import annotations

import traceback

import torch

from lora_server.types import DeviceMemory


def free_after(error: BaseException) -> None:
    """Lets go of what a failed piece of work held, if it failed for want of memory.

    The frames of its traceback own its tensors, and would keep them for as long as the error is logged or chained.
    """
    if isinstance(error, torch.OutOfMemoryError):
        traceback.clear_frames(error.__traceback__)
        torch.cuda.empty_cache()


def device_memory(device: torch.device) -> DeviceMemory | None:
    """Returns the device's memory now; None if it is the CPU. Any thread."""
    if device.type != "cuda":
        return None
    free, total = torch.cuda.mem_get_info(device)
    return DeviceMemory(total, free, torch.cuda.memory_allocated(device), torch.cuda.memory_reserved(device))
