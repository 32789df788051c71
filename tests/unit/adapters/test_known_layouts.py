"""Adapters of one layout: the second is planned from what the first taught, and is itself all the same."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from lora_server.adapters.formats import known_layouts, layout
from lora_server.adapters.formats.reader import AdapterReader, ReadAdapter
from lora_server.errors import AdapterMalformedError
from lora_server.models.base import adapter_targets
from safetensors.torch import save

from tests.factories import TinyNet

RANK = 4
Contents = Mapping[str, bytearray]


@pytest.fixture
def plans(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The adapters that were planned."""
    planned: list[str] = []
    make_plan = layout.make_plan

    def noted(adapter: str, *arguments: Any) -> Any:
        planned.append(adapter)
        return make_plan(adapter, *arguments)

    monkeypatch.setattr(layout, "make_plan", noted)
    return planned


def new_reader() -> AdapterReader:
    """One that has met nothing."""
    return AdapterReader(adapter_targets({"net": TinyNet()}), "net", "tiny", torch.float64, 64)


def peft(seed: int, *, alpha: int = RANK, bad: bool = False, **config: Any) -> Contents:
    """A PEFT folder for one linear."""
    torch.manual_seed(seed)
    prefix = "base_model.model.blocks.0.to_q.lora"
    tensors = {f"{prefix}_A.weight": torch.randn(RANK, 6), f"{prefix}_B.weight": torch.randn(6, RANK)}
    if bad:
        tensors[f"{prefix}_B.weight"][0, 0] = torch.nan
    fields = {"peft_type": "LORA", "r": RANK, "lora_alpha": alpha, "target_modules": ["blocks.0.to_q"], **config}
    return {
        "adapter_model.safetensors": bytearray(save(tensors)),
        "adapter_config.json": bytearray(json.dumps(fields).encode()),
    }


def kohya(alpha: float) -> Contents:
    """A bare file whose alpha is one of its tensors."""
    torch.manual_seed(0)
    name = "lora_unet_blocks_0_to_q"
    tensors = {
        f"{name}.lora_down.weight": torch.randn(RANK, 6),
        f"{name}.lora_up.weight": torch.randn(6, RANK),
        f"{name}.alpha": torch.tensor(alpha),
    }
    return {"x.safetensors": bytearray(save(tensors))}


def delta(found: ReadAdapter) -> torch.Tensor:
    """B A of the only module."""
    (group,) = found.weights.groups["net"]
    return group.b[0] @ group.a[0]


def test_the_second_of_a_layout_is_not_planned_and_has_its_own_numbers(plans: list[str]) -> None:
    """What comes of it is what a reader makes of it that knows nothing."""
    knows = new_reader()
    first, second = knows.read_planned("first", peft(1)), knows.read_planned("second", peft(2))
    assert plans == ["first"]
    torch.testing.assert_close(delta(second), delta(new_reader().read_planned("alone", peft(2))), rtol=0, atol=0)
    assert not torch.equal(delta(first), delta(second))
    assert second.plan == first.plan


def test_errors_name_the_adapter_that_they_are_of(plans: list[str]) -> None:
    """And the layout stays known after a broken file."""
    knows = new_reader()
    knows.read_planned("first", peft(1))
    with pytest.raises(AdapterMalformedError, match=r"second.*not finite"):
        knows.read_planned("second", peft(2, bad=True))
    knows.read_planned("third", peft(3))
    assert plans == ["first"]


@pytest.mark.parametrize("change", [{"alpha": 2 * RANK}, {"use_rslora": True}, {"base_model_name_or_path": "other"}])
def test_another_configuration_is_another_layout(change: dict[str, Any], plans: list[str]) -> None:
    """Byte by byte: whether a difference matters is not asked here."""
    knows = new_reader()
    knows.read_planned("first", peft(1))
    changed = knows.read_planned("second", peft(1, **change))
    assert plans == ["first", "second"]
    alone = new_reader().read_planned("alone", peft(1, **change))
    torch.testing.assert_close(delta(changed), delta(alone), rtol=0, atol=0)


def test_an_alpha_in_the_data_is_read_each_time(plans: list[str]) -> None:
    """Two files with the same header and another alpha in their tensors are two adapters."""
    knows = new_reader()
    first, second = knows.read_planned("first", kohya(1.0)), knows.read_planned("second", kohya(3.0))
    assert plans == ["first", "second"]
    torch.testing.assert_close(delta(second), 3 * delta(first))


def test_leaving_out_is_another_rule(plans: list[str]) -> None:
    """A load that may be partial teaches nothing to one that may not."""
    knows = new_reader()
    knows.read_planned("first", peft(1), allow_partial=True)
    knows.read_planned("second", peft(2))
    assert plans == ["first", "second"]


def test_only_the_latest_are_kept(plans: list[str]) -> None:
    """The least recently used goes first."""
    knows = new_reader()
    for k in range(known_layouts._MOST_LAYOUTS):
        knows.read_planned(f"{k}", peft(1, alpha=1 + k))
    knows.read_planned("again", peft(2, alpha=1))
    knows.read_planned("one more", peft(1, alpha=100))
    knows.read_planned("still there", peft(3, alpha=1))
    knows.read_planned("gone", peft(2, alpha=2))
    assert plans == [*map(str, range(known_layouts._MOST_LAYOUTS)), "one more", "gone"]


def test_headers_of_unusual_size_are_not_kept(plans: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """What is kept is bounded."""
    monkeypatch.setattr(known_layouts, "_MOST_DESCRIBING_BYTES", 100)
    knows = new_reader()
    for name in ("first", "second"):
        knows.read_planned(name, peft(1))
    assert plans == ["first", "second"]


def test_no_bytes_of_an_adapter_are_kept() -> None:
    """The buffer is free as soon as its adapter has been read: it could not be resized while it is looked into."""
    contents = peft(1)
    knows = new_reader()
    knows.read_planned("first", contents)
    contents["adapter_model.safetensors"].clear()
