"""The choice of an attention kernel, on the CPU, which has two of them."""

from __future__ import annotations

import math

import pytest
import torch
from lora_server.models import attention_kernels
from lora_server.models.attention_kernels import AttentionMeter
from torch.nn import functional
from torch.nn.attention import SDPBackend

CPU_KERNELS = [SDPBackend.FLASH_ATTENTION, SDPBackend.MATH]


def attend(tokens: int = 32) -> torch.Tensor:
    """An attention of random tokens."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn((1, 2, tokens, 16), generator=generator) for _ in range(3))
    return functional.scaled_dot_product_attention(q, k, v)


def test_the_result_is_that_without_a_meter() -> None:
    """Measuring changes nothing."""
    with AttentionMeter(CPU_KERNELS):
        found = attend()
    assert torch.equal(found, attend())


def test_the_faster_kernel_is_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """By the sum over all attentions, whatever the order of the candidates."""
    seconds = iter([3.0, 1.0, 1.0, 2.0])  # flash and math of 32 tokens, flash and math of 48
    monkeypatch.setattr(attention_kernels, "_seconds", lambda *_: next(seconds))
    meter = AttentionMeter(CPU_KERNELS)
    with meter:
        attend(32)
        attend(48)
        attend(32)  # known already, and counted again
    assert meter.fastest_first == [SDPBackend.MATH, SDPBackend.FLASH_ATTENTION]
    assert meter.milliseconds == {"FLASH_ATTENTION": 7000.0, "MATH": 4000.0}


def test_a_kernel_that_cannot_run_is_last() -> None:
    """cuDNN has none for the CPU."""
    meter = AttentionMeter([SDPBackend.CUDNN_ATTENTION, *CPU_KERNELS])
    with meter:
        attend()
    assert meter.fastest_first[-1] == SDPBackend.CUDNN_ATTENTION
    assert math.isinf(meter.milliseconds["CUDNN_ATTENTION"])
    assert 0 < meter.milliseconds["MATH"] < 10_000


def test_other_functions_pass() -> None:
    """Only attention is timed."""
    meter = AttentionMeter(CPU_KERNELS)
    with meter:
        assert torch.nn.functional.relu(torch.tensor([-1.0, 2.0])).tolist() == [0.0, 2.0]
    assert meter.milliseconds == {"FLASH_ATTENTION": 0.0, "MATH": 0.0}
