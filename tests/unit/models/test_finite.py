"""Finite or not, by one number a row: every type, every place, every way of not being finite."""

from __future__ import annotations

import math

import pytest
import torch
from lora_server.models.finite import FiniteCheck, OutputWatch, peaks
from torch import nn

TYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("shape", [(4, 3), (4, 16, 33, 7), (4, 1, 5000)])
def test_a_peak_is_finite_if_the_whole_row_is(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    """The largest finite numbers are finite; one NaN or infinity anywhere is not."""
    rows = torch.randn(shape).to(dtype)
    rows[0] = torch.finfo(dtype).max
    for row, value in enumerate((math.nan, math.inf, -math.inf), 1):
        rows[row].view(-1)[(row * 977) % rows[row].numel()] = value
    assert peaks(rows).isfinite().tolist() == [True, False, False, False]
    assert peaks(rows.transpose(1, -1)).isfinite().tolist() == [True, False, False, False]


def test_a_check_names_the_first_component_of_each_subject() -> None:
    """Of mixed types; whole numbers and subjects that are fine are not named."""
    check = FiniteCheck()
    check.add([0, 1], "text", torch.tensor([[1.0], [math.nan]], dtype=torch.float16))
    check.add([1, 2], "network", torch.tensor([[math.inf], [math.inf]], dtype=torch.float64))
    check.add([0], "pixels", torch.zeros((1, 3), dtype=torch.uint8))
    check.add([3], "network", torch.full((1, 2), 1e300, dtype=torch.float64))
    assert check.send().faulty() == {1: "text", 2: "network"}
    assert FiniteCheck().send().faulty() == {}


class Nested(nn.Module):
    """Returns what text encoders return: fields, and a list of hidden states."""

    def forward(self, x: torch.Tensor) -> dict[str, object]:
        return {"last": x, "hidden": (x / 0, x, x), "ids": torch.tensor([1]), "none": None}


def test_a_watch_sees_outputs_and_not_what_is_deep_inside() -> None:
    """Hidden states before the last two are a network's own business."""
    modules = {"encoder": Nested(), "network": nn.Linear(2, 2)}
    watch = OutputWatch(modules)
    modules["encoder"](torch.ones(1, 2))
    assert watch.first_not_finite() is None
    modules["encoder"](torch.full((1, 2), math.inf))
    modules["network"](torch.full((1, 2), math.nan))
    assert watch.first_not_finite() == "encoder"
    watch.close()
    modules["network"](torch.full((1, 2), math.nan))
    assert watch.take() == []
