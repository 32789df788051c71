"""Buckets that are missed, without a device: what is captured when, and what an error there costs."""

from __future__ import annotations

from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lora_server.models import denoiser
from lora_server.models.denoiser import Denoiser
from torch import Tensor


class Network:
    """Doubles its input; fails at batches of three rows."""

    device = torch.device("cpu")
    blocks = ()

    def forward(self, inputs: Mapping[str, Tensor], options: Mapping[str, Any]) -> Tensor:
        """One forward pass."""
        if len(inputs["x"]) == 3:
            raise torch.OutOfMemoryError("injected")
        return inputs["x"] * 2


@pytest.fixture
def graphed(monkeypatch: pytest.MonkeyPatch) -> Denoiser:
    """A denoiser that believes to be on CUDA; "graphs" are functions, and none fits for batches of two rows."""

    def capture(action: Any, _: Any) -> tuple[Any, Tensor]:
        output = action()
        if len(output) == 2:
            raise torch.OutOfMemoryError("injected")
        return SimpleNamespace(replay=lambda: output.copy_(action())), output

    paged: Any = SimpleNamespace(columns=0, target_class=0, open=lambda *_: None)
    network: Any = Network()
    made = Denoiser(network, paged, compiled=True, max_graphs=8)
    monkeypatch.setattr(denoiser, "capture_graph", capture)
    monkeypatch.setattr(made, "_uses_graphs", True)
    return made


def test_a_missed_bucket_is_captured_when_there_is_time(graphed: Denoiser) -> None:
    """Once; then it is replayed."""
    x = torch.arange(4.0)[None]
    assert torch.equal(graphed({"x": x}, {}), 2 * x)
    assert graphed.capture_missed()
    assert not graphed.capture_missed()
    assert graphed.captures == 1
    assert torch.equal(graphed({"x": x + 1}, {}), 2 * x + 2)
    assert not graphed.capture_missed()


def test_a_graph_that_does_not_fit_is_tried_once_and_ends_nothing(graphed: Denoiser) -> None:
    """Its bucket is run eagerly for good."""
    x = torch.ones(2, 4)
    graphed({"x": x}, {})
    assert graphed.capture_missed()
    for _ in range(2):
        assert torch.equal(graphed({"x": x}, {}), 2 * x)
        assert not graphed.capture_missed()
    assert graphed.captures == 0


def test_what_cannot_be_run_is_not_captured(graphed: Denoiser) -> None:
    """Whoever asked for it has heard; the engine must not meet the same error again by itself."""
    with pytest.raises(torch.OutOfMemoryError):
        graphed({"x": torch.ones(3, 4)}, {})
    assert not graphed.capture_missed()
