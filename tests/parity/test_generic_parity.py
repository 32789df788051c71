"""A pipeline that has no family here, driven by a true engine: its images are those of its own call, and the engine's
promises (progress, previews, cancellation, deadlines, one request at a time) hold for it."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import PixArtSigmaPipeline
from lora_server.app import Core
from lora_server.errors import (
    AdapterOutputNotFiniteError,
    DeadlineExceededError,
    LoraServerError,
    ModelOutputNotFiniteError,
    RequestCancelledError,
)
from lora_server.types import (
    ApplicationWay,
    ExecutionPath,
    GenerationParameters,
    GenerationRequest,
    PreviewEvent,
    ProgressEvent,
)
from peft import PeftModel
from PIL import Image
from safetensors.torch import save_file

from tests.factories import write_adapter
from tests.parity import tiny_flow
from tests.parity.engine_harness import events, make_request, pictures, start_core, stats

STEPS = 3
T5_LAYER = "encoder.block.1.layer.1.DenseReluDense.wo"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny PixArt-Sigma, and adapters of its transformer (`a`, `b`) and of its text encoder as well (`text`)."""
    root = tmp_path_factory.mktemp("pixart")
    tiny_flow.build_pixart(root / "model")
    write_adapter(root / "a", pipeline(root).transformer, 1, 0.2, target_modules=["to_q", "to_v", "ff.net.2"])
    write_adapter(root / "b", pipeline(root).transformer, 2, 0.2, target_modules=["to_out.0", "proj_out"])
    write_adapter(root / "text", pipeline(root).transformer, 3, 0.1, target_modules=["to_k"])
    write_adapter(root / "text" / "text_encoder", pipeline(root).text_encoder, 4, 0.5, target_modules=["q", "wo"])
    return root


@pytest.fixture(scope="module")
def core(folder: Path) -> Iterator[Core]:
    """A running engine with the pipeline."""
    core = start_core(str(folder / "model"), folder)
    yield core
    core.stop()


def pipeline(folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    loaded = PixArtSigmaPipeline.from_pretrained(folder / "model", dtype=dtype)
    loaded.set_progress_bar_config(disable=True)
    return loaded


def oracle(folder: Path, wanted: GenerationParameters, uses: dict[str, float]) -> list[np.ndarray]:
    """The pipeline's own call, an image at a time, with adapters by peft."""
    own = pipeline(folder, torch.float64)
    for component in ("transformer", "text_encoder"):
        places = {n: folder / n if component == "transformer" else folder / n / component for n in uses}
        members = [name for name in uses if places[name].is_dir()]
        if not members:
            continue
        adapted = PeftModel.from_pretrained(getattr(own, component), places[members[0]], members[0])
        for name in members[1:]:
            adapted.load_adapter(places[name], name)
        adapted.base_model.set_adapter(members)
        for module in adapted.modules():
            for name in members:
                if hasattr(module, "set_scale") and name in getattr(module, "scaling", {}):
                    module.set_scale(name, uses[name])
        setattr(own, component, adapted.to(torch.float64).base_model.model)
    return [
        np.asarray(
            own(
                wanted.prompt,
                negative_prompt=wanted.negative_prompt,
                width=wanted.width_px,
                height=wanted.height_px,
                num_inference_steps=wanted.num_inference_steps,
                guidance_scale=wanted.guidance_scale,
                generator=torch.Generator().manual_seed(seed),
                use_resolution_binning=False,
            ).images[0]
        )
        for seed in wanted.seeds
    ]


def request(folder: Path, name: str, uses: dict[str, float] | None = None, **changes: Any) -> GenerationRequest:
    defaults: dict[str, Any] = {
        "prompt": "a red star",
        "negative_prompt": "",
        "width_px": 64,
        "height_px": 96,
        "num_inference_steps": STEPS,
        "guidance_scale": 4.0,
        "seed": 11,
        "num_images": 1,
    }
    options = {key: changes.pop(key) for key in ("deadline_s", "preview_interval_steps") if key in changes}
    return make_request(
        folder, name, GenerationParameters(**{**defaults, **changes}), list((uses or {}).items()), **options
    )


CASES: dict[str, tuple[dict[str, Any], dict[str, float]]] = {
    "base": ({}, {}),
    "three images": ({"num_images": 3}, {}),
    "without guidance": ({"guidance_scale": 1.0}, {}),
    "negative prompt, wide": ({"negative_prompt": "a blue ring", "width_px": 112}, {}),
    "one adapter": ({}, {"a": 1.0}),
    "two adapters, two images": ({"num_images": 2}, {"a": 0.7, "b": -0.5}),
    "text encoder": ({}, {"text": 1.0}),
    "base again": ({}, {}),
}


@pytest.mark.parametrize("case", CASES)
def test_draws_what_the_pipeline_draws(case: str, core: Core, folder: Path) -> None:
    """Every image is the pipeline's own in float64, to the last of 8 bits, each with its seed; adapters are merged."""
    changes, uses = CASES[case]
    wanted = request(folder, case.replace(" ", "-").replace(",", ""), uses, **changes)
    told = events(core.engine.submit(wanted))
    for ours, expected in zip(pictures(told), oracle(folder, wanted.parameters, uses), strict=True):
        np.testing.assert_array_equal(ours, expected)
    cost = stats(told)
    assert cost.way is (ApplicationWay.MERGED if uses else ApplicationWay.BASE)
    assert cost.mean_batch_images == 1


def test_requests_that_come_together_run_one_after_another(core: Core, folder: Path) -> None:
    """Each is the picture of it alone: the scheduler, the text encoders and the weights are never shared."""
    uses: list[dict[str, float]] = [{"text": 1.0}, {}, {"a": 1.0}]
    wanted = [request(folder, f"together-{k}", use, seed=k) for k, use in enumerate(uses)]
    jobs = [core.engine.submit(each) for each in wanted]
    for job, each, use in zip(jobs, wanted, uses, strict=True):
        np.testing.assert_array_equal(pictures(events(job))[0], oracle(folder, each.parameters, use)[0])


def test_tells_progress_and_shows_previews(core: Core, folder: Path) -> None:
    """Progress ends at the number of steps that was asked for; a preview is a picture."""
    told = events(core.engine.submit(request(folder, "shown", num_inference_steps=30, preview_interval_steps=1)))
    progress = [event for event in told if isinstance(event, ProgressEvent)]
    assert (progress[-1].completed_steps, progress[-1].total_steps) == (30, 30)
    previews = [event for event in told if isinstance(event, PreviewEvent)]
    assert Image.open(BytesIO(previews[0].data)).size == (64, 96)


def test_a_cancelled_request_ends_within_a_step_and_leaves_no_thread(core: Core, folder: Path) -> None:
    """The pipeline's call unwinds, and the next request draws the right picture."""
    job = core.engine.submit(request(folder, "cancelled", num_inference_steps=1000))
    subscription = job.subscribe(lambda: None)
    while not job.completed_steps:
        time.sleep(0.001)
    subscription.close()
    deadline_s = time.monotonic() + 10
    while any(thread.name == "pipeline-call" for thread in threading.enumerate()):
        assert time.monotonic() < deadline_s, "the call did not end"
        time.sleep(0.001)
    assert job.completed_steps < 1000
    with pytest.raises(RequestCancelledError):
        events(job)
    wanted = request(folder, "after")
    np.testing.assert_array_equal(
        pictures(events(core.engine.submit(wanted)))[0], oracle(folder, wanted.parameters, {})[0]
    )


def test_a_deadline_ends_a_request(core: Core, folder: Path) -> None:
    """Between two steps, as everywhere."""
    wanted = request(folder, "late", num_inference_steps=1000, deadline_s=time.monotonic() + 0.3)
    with pytest.raises(DeadlineExceededError):
        events(core.engine.submit(wanted))


def test_a_failing_call_fails_its_request_only(core: Core, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the pipeline raises ends the request as ENGINE_FAILURE; the engine goes on."""
    vae = type(core.family._pipeline.vae)  # type: ignore[attr-defined]
    with monkeypatch.context() as patch:
        patch.setattr(vae, "decode", lambda *_, **__: 1 / 0)
        with pytest.raises(LoraServerError):
            events(core.engine.submit(request(folder, "broken")))
    assert pictures(events(core.engine.submit(request(folder, "whole"))))


def test_says_how_it_runs(core: Core) -> None:
    """GetServerInfo's facts: the path, and the size that the patches and the VAE divide."""
    info = core.engine.model
    assert (info.family, info.execution) == ("PixArtSigma", ExecutionPath.WHOLE_PIPELINE)
    assert info.size_multiple_px == 16
    assert info.defaults.num_inference_steps == 20
    assert info.adaptable_components == ("text_encoder", "transformer")


@pytest.mark.parametrize("bad", ["transformer", "text_encoder"])
def test_an_adapter_whose_output_is_not_finite_is_named(core: Core, folder: Path, bad: str) -> None:
    """Whatever the pipeline would make of it: its own last step turns NaN into black."""
    module, width = {"transformer": ("transformer.proj_out", 32), "text_encoder": (f"text_encoder.{T5_LAYER}", 37)}[bad]
    factors = {
        "A": torch.full((4, width), 1e160, dtype=torch.float64),
        "B": torch.full((32, 4), 1e160, dtype=torch.float64),
    }
    path = folder / f"bad-{bad}.safetensors"
    save_file({f"{module}.lora_{name}.weight": value for name, value in factors.items()}, path)
    before = pictures(events(core.engine.submit(request(folder, f"before-{bad}"))))
    with pytest.raises(AdapterOutputNotFiniteError) as caught:
        events(core.engine.submit(request(folder, f"bad-{bad}", {"a": 1.0, path.name: 1.0})))
    assert (caught.value.metadata["adapters"], caught.value.metadata["component"]) == (path.name, bad)
    after = pictures(events(core.engine.submit(request(folder, f"after-{bad}"))))
    assert np.array_equal(before[0], after[0])
    assert not core.manager.cache_info().leases


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("previews", [False, True])
def test_an_autoencoder_that_overflows_is_the_models_fault(
    core: Core, folder: Path, previews: bool, value: float
) -> None:
    """At the end, where the pipeline decodes by itself (and here fails over NaN), and in a preview."""
    bias = core.family._pipeline.vae.decoder.conv_out.bias  # type: ignore[attr-defined]
    true = bias.detach().clone()
    core.engine.call(lambda *_: bias.fill_(value)).result(timeout=5)
    options: dict[str, Any] = {"preview_interval_steps": 1} if previews else {}
    try:
        with pytest.raises(ModelOutputNotFiniteError) as caught:
            events(core.engine.submit(request(folder, f"vae-{previews}-{value}", {"a": 1.0}, **options)))
    finally:
        core.engine.call(lambda *_: bias.copy_(true)).result(timeout=5)
    assert caught.value.metadata["component"] == "vae"
