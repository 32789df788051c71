"""Every family against its pipeline of diffusers with adapters loaded through peft, and against itself.

A family is added to `SUBJECTS`; see docs/adding-a-model.md.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from lora_server.types import ApplicationWay

from tests.parity.harness import Case, Pair, Subject, assert_same, write_adapters
from tests.parity.subjects_flow import FLUX, QWEN_IMAGE, Z_IMAGE
from tests.parity.subjects_sd3 import SD3
from tests.parity.subjects_unet import SD1, SD2, SDXL

SUBJECTS: dict[str, Subject] = {subject.name: subject for subject in (SD3, SD1, SD2, SDXL, FLUX, QWEN_IMAGE, Z_IMAGE)}
ALL = [(name, case) for name, subject in SUBJECTS.items() for case in subject.all_cases]
ADAPTED = [(name, case) for name, case in ALL if SUBJECTS[name].all_cases[case][1]]
MIXED: tuple[Case, ...] = (
    ({"seed": 1}, []),
    ({"seed": 2, "num_inference_steps": 3}, [("a", 1.0)]),
    ({"seed": 3, "guidance_scale": 1.0}, [("b", 1.0)]),
    ({"seed": 4, "guidance_scale": 2.5, "prompt": "a small green moon"}, [("a", 0.6), ("b", -0.8)]),
    ({"seed": 5, "num_images": 2, "negative_prompt": "a ring"}, [("text", -1.0)]),
)
GetPair = Callable[[str, str], Pair]


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> GetPair:
    """A family in a type, built when it is first asked for."""
    models: dict[str, tuple[str, Path]] = {}
    pairs: dict[tuple[str, str], Pair] = {}

    def get(name: str, dtype: str) -> Pair:
        subject = SUBJECTS[name]
        if name not in models:
            root = tmp_path_factory.mktemp(name)
            models[name] = subject.build(root / "model"), root
            write_adapters(subject, models[name][0], root)
        if (name, dtype) not in pairs:
            model, root = models[name]
            pairs[name, dtype] = Pair(subject, model, dtype, root)
        return pairs[name, dtype]

    return get


@pytest.mark.parametrize(("name", "case"), ALL)
def test_equals_diffusers_in_float64(name: str, case: str, pair: GetPair) -> None:
    """Every value is equal after rounding to 8 bits."""
    subject, double = SUBJECTS[name], pair(name, "float64")
    changes, uses = subject.all_cases[case]
    wanted = subject.parameters(**changes)
    assert_same(double.draw(wanted, uses), double.oracle(wanted, uses), torch.float64, flips=subject.flips)


@pytest.mark.parametrize(("name", "case"), ADAPTED)
def test_slots_equal_diffusers_in_float64(name: str, case: str, pair: GetPair) -> None:
    """Rows that take their adapters from the pages draw the oracle's picture, to the last of 8 bits."""
    subject, double = SUBJECTS[name], pair(name, "float64")
    changes, uses = subject.all_cases[case]
    wanted = subject.parameters(**changes)
    assert_same(
        double.draw(wanted, uses, ApplicationWay.SLOTS), double.oracle(wanted, uses), torch.float64, flips=subject.flips
    )


@pytest.mark.parametrize(
    ("name", "scheduler"), [(name, each) for name, subject in SUBJECTS.items() for each in subject.schedulers]
)
def test_schedulers_equal_diffusers(name: str, scheduler: str, pair: GetPair) -> None:
    """Each scheduler that a request may name, with its history and its noise by image: two images in one batch."""
    subject, double = SUBJECTS[name], pair(name, "float64")
    wanted, uses = subject.parameters(scheduler=scheduler, num_images=2), [("a", 1.0)]
    assert_same(
        double.draw(wanted, uses, ApplicationWay.SLOTS), double.oracle(wanted, uses), torch.float64, flips=subject.flips
    )


@pytest.mark.parametrize("name", SUBJECTS)
def test_all_schedulers_are_tested(name: str, pair: GetPair) -> None:
    """What a server offers is what the tests above have drawn, by this family or by its kin."""
    offered = pair(name, "float64").family.info.schedulers
    assert set(offered) <= {each for subject in SUBJECTS.values() for each in subject.schedulers}
    assert set(SUBJECTS[name].schedulers) <= set(offered)


@pytest.mark.parametrize(("name", "case"), ALL)
def test_is_close_to_diffusers_in_float32(name: str, case: str, pair: GetPair) -> None:
    """At most one level apart, in at most 0.05% of the values."""
    subject, single = SUBJECTS[name], pair(name, "float32")
    changes, uses = subject.all_cases[case]
    wanted = subject.parameters(**changes)
    assert_same(single.draw(wanted, uses), single.oracle(wanted, uses), torch.float32)


@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("name", SUBJECTS)
def test_a_mixed_batch_equals_each_alone(name: str, dtype: str, pair: GetPair) -> None:
    """Base, A, B, A+B, a text-encoder adapter and negative scales in one batch, with steps, guidance, seeds and (where
    the family has them) schedulers of their own: each is the oracle's picture of it alone."""
    subject, drawing = SUBJECTS[name], pair(name, dtype)
    requests = [(subject.parameters(**changes), uses) for changes, uses in (*MIXED, *subject.mixed)]
    drawn = drawing.draw_together(requests, ApplicationWay.SLOTS)
    for (wanted, uses), ours in zip(requests, drawn, strict=True):
        assert_same(ours, drawing.oracle(wanted, uses), getattr(torch, dtype), uses, subject.flips)


@pytest.mark.parametrize("name", SUBJECTS)
def test_adapters_change_the_picture(name: str, pair: GetPair) -> None:
    """The adapters of these cases are visible at all, and pictures are no flat grey, or the cases would prove
    nothing."""
    subject, single = SUBJECTS[name], pair(name, "float32")
    base = single.draw(subject.parameters(), []).astype(int)
    assert base.std() > 2
    for adapter in subject.adapters:
        assert np.abs(single.draw(subject.parameters(), [(adapter, 1.0)]) - base).mean() > 1, adapter


@pytest.mark.parametrize("name", SUBJECTS)
def test_base_is_the_same_bytes_before_and_after_adapters(name: str, pair: GetPair) -> None:
    """A base picture does not remember what was active before."""
    subject, single = SUBJECTS[name], pair(name, "float32")
    before = single.draw(subject.parameters(), [])
    single.draw(subject.parameters(), [(list(subject.adapters)[-1], 1.0), ("a", -0.3)])
    np.testing.assert_array_equal(before, single.draw(subject.parameters(), []))


@pytest.mark.parametrize("name", SUBJECTS)
def test_an_image_of_a_batch_is_the_image_alone(name: str, pair: GetPair) -> None:
    """Image k of a request is, in float64, the picture of a request with seed + k."""
    subject, double = SUBJECTS[name], pair(name, "float64")
    batch = double.draw(subject.parameters(num_images=3), [("a", 1.0)])
    alone = double.draw(subject.parameters(seed=13), [("a", 1.0)])
    assert_same(batch[2:], alone, torch.float64, flips=subject.flips)


@pytest.mark.parametrize("name", SUBJECTS)
def test_a_step_does_not_look_through_the_modules(name: str, pair: GetPair, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU the host has a few milliseconds a step; with the interpreter's lock held, loads would suffer, too.

    diffusers' `device` and `dtype` look through all modules of a network, which takes 1 to 3 ms of a true one.
    """
    double = pair(name, "float64")
    wanted = SUBJECTS[name].parameters()
    with torch.inference_mode():
        images = double._begin(wanted, [("a", 1.0)])
        zeros = torch.zeros(1).double()
        monkeypatch.setattr(
            double.runner, "denoiser", lambda inputs, options: zeros.expand(next(iter(inputs.values())).shape)
        )
        for way in (ApplicationWay.SLOTS, ApplicationWay.MERGED):  # what is kept is asked for once
            double.runner.step(images, way)
        looks: list[object] = []
        for look in ("named_modules", "named_parameters"):
            plain = getattr(torch.nn.Module, look)
            monkeypatch.setattr(torch.nn.Module, look, lambda *a, plain=plain, **k: looks.append(a) or plain(*a, **k))
        for way in (ApplicationWay.SLOTS, ApplicationWay.MERGED):
            double.runner.step(images, way)
            double.runner.wait()
    assert not looks
