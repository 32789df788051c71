"""What is not finite is never a picture: the request ends, who is at fault is found out, and nobody else notices."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from lora_server.app import Core
from lora_server.errors import (
    AdapterOutputNotFiniteError,
    LoraServerError,
    ModelOutputNotFiniteError,
    RequestCancelledError,
)
from lora_server.types import AdapterSource, AdapterUse, GenerationParameters, GenerationRequest
from lora_server.use_settings import UseSettings
from safetensors.torch import save_file

from tests.parity.engine_harness import events, make_request, pictures, start_core

WANTED = GenerationParameters("a red star", "", 64, 64, 4, 4.0, 1, 1)
OTHERS: list[tuple[str, float]] = [("a", 1.0), ("b", -0.5)]
FF = "transformer_blocks.2.ff.net"


def write(path: Path, module: str, a: float, b: float, shape: tuple[int, int, int]) -> None:
    """A bare file that changes one module by factors of one value each; *shape* is (rank, in, out)."""
    rank, width, out = shape
    factors = {
        "A": torch.full((rank, width), a, dtype=torch.float64),
        "B": torch.full((out, rank), b, dtype=torch.float64),
    }
    save_file({f"{module}.lora_{name}.weight": value for name, value in factors.items()}, path)


@pytest.fixture(scope="module")
def root(demo_adapters: Path) -> Path:
    """Adapters whose weights are finite, and whose products are not in float64."""
    bad = demo_adapters / "bad"
    bad.mkdir(exist_ok=True)
    write(bad / "step.safetensors", "transformer.proj_out", 1e160, 1e160, (4, 160, 64))
    write(bad / "inner.safetensors", f"transformer.{FF}.0.proj", 1e160, 1e160, (4, 160, 640))
    write(bad / "text.safetensors", "text_encoder_2.text_projection", 1e160, 1e160, (4, 48, 48))
    write(bad / "wide.safetensors", f"transformer.{FF}.0.proj", 1e45, 1e45, (4, 160, 640))
    write(bad / "tall.safetensors", f"transformer.{FF}.2", 1e45, 1e45, (4, 640, 160))
    return demo_adapters


@pytest.fixture(scope="module")
def core(root: Path) -> Iterator[Core]:
    """An engine with the embedded model in float64."""
    core = start_core("demo", root)
    yield core
    core.stop()


@pytest.fixture(scope="module")
def untouched(root: Path) -> Iterator[Core]:
    """Another one, which never meets a bad adapter."""
    core = start_core("demo", root)
    yield core
    core.stop()


def submit(core: Core, root: Path, name: str, uses: Sequence[tuple[str, float]], **options: Any) -> Any:
    return core.engine.submit(make_request(root, name, options.pop("wanted", WANTED), list(uses), **options))


def failure(job: Any) -> LoraServerError:
    with pytest.raises(LoraServerError) as caught:
        events(job)
    return caught.value


def check_books(core: Core) -> None:
    """Nothing is held, and nothing that is not finite is left in weights, pages, or embeddings."""
    engine: Any = core.engine
    deadline_s = time.monotonic() + 5
    while core.manager.cache_info().leases or engine.queue_info().running_requests:
        assert time.monotonic() < deadline_s, "leaked"
        time.sleep(0.01)
    core.manager.check_integrity()

    def left(runner: Any, _: object) -> list[str]:
        stacks = [*runner.store._stacks, *runner.store._a, *runner.store._b]
        weights = [p for module in runner._family.components.values() for p in module.parameters()]
        held = [t for each in engine._prompts._held.values() for t in each.tensors.values()]
        kinds = (("pages", stacks), ("weights", weights), ("prompts", held))
        return [name for name, tensors in kinds if not all(bool(t.isfinite().all()) for t in tensors)]

    assert engine.call(left).result(timeout=10) == []
    assert not len(engine._inquests)
    assert engine.info().restarts == 0


@pytest.mark.parametrize("lookahead", [1, 2])
@pytest.mark.parametrize("bad", ["step", "inner", "text"])
def test_the_adapter_at_fault_is_named_and_others_of_its_batches_go_on(
    core: Core, untouched: Core, root: Path, monkeypatch: pytest.MonkeyPatch, bad: str, lookahead: int
) -> None:
    """Paged beside it, others get the very bytes of a server that never met it; so does the base afterwards."""
    engine: Any = core.engine
    costs = SimpleNamespace(
        switch_s=1.0, step_s=lambda *_, **__: 1.0, fastest_s=lambda _: 0.0, observe=lambda *_, **__: 0
    )
    monkeypatch.setattr(engine._stepper, "costs", costs)  # so that they step together, from pages
    monkeypatch.setattr(engine, "_lookahead", lookahead)
    held = threading.Event()
    engine.call(lambda *_: held.wait(5))
    name = f"{bad}-{lookahead}"
    victims = [submit(core, root, f"{name}-{k}", uses) for k, uses in enumerate([[], *([use] for use in OTHERS)])]
    guilty = [submit(core, root, f"{name}-bad-{k}", [(f"bad/{bad}.safetensors", 1.0)]) for k in range(2)]
    held.set()
    for job in guilty:
        error = failure(job)
        assert isinstance(error, AdapterOutputNotFiniteError)
        assert error.metadata["adapters"] == f"{bad}.safetensors"
        assert error.metadata["component"] == ("text_encoder_2" if bad == "text" else "transformer")
        assert error.metadata.get("step") in ([None] if bad == "text" else ["1", "2"])
        assert error.metadata["digests"].startswith("sha256:")
    for k, uses in enumerate([[], *([use] for use in OTHERS)]):
        theirs = submit(untouched, root, f"{name}-{k}", uses)
        assert np.array_equal(pictures(events(victims[k]))[0], pictures(events(theirs))[0])
    check_books(core)
    after = pictures(events(submit(core, root, f"{name}-after", [])))
    assert np.array_equal(after[0], pictures(events(submit(untouched, root, f"{name}-after", [])))[0])


def test_of_several_adapters_only_those_at_fault_are_named(core: Core, root: Path) -> None:
    """Each is tried alone."""
    error = failure(submit(core, root, "one-of-three", [("a", 1.0), ("bad/step.safetensors", 0.5), ("b", 1.0)]))
    assert isinstance(error, AdapterOutputNotFiniteError)
    assert (error.metadata["adapters"], error.metadata["scales"]) == ("step.safetensors", "0.5")
    check_books(core)


def test_adapters_that_only_fail_together_are_both_named(core: Core, root: Path) -> None:
    """Alone each gives a picture, of whatever kind."""
    both = [("bad/wide.safetensors", 1.0), ("bad/tall.safetensors", 1.0)]
    for k, use in enumerate(both):
        assert len(pictures(events(submit(core, root, f"alone-{k}", [use])))) == 1
    error = failure(submit(core, root, "together", both))
    assert isinstance(error, AdapterOutputNotFiniteError)
    assert error.metadata["adapters"] == "wide.safetensors,tall.safetensors"
    check_books(core)


def test_merged_weights_that_overflow_are_the_adapters_fault(core: Core, untouched: Core, root: Path) -> None:
    """By block scales it can only be merged; the weights are the base's again, bit for bit."""
    settings = UseSettings(block_scales=(("proj_out", 1.0),))
    use = AdapterUse(AdapterSource(str(root / "bad/step.safetensors")), 1.0, None, settings)
    error = failure(core.engine.submit(GenerationRequest("merged", WANTED, (use,))))
    assert isinstance(error, AdapterOutputNotFiniteError)
    check_books(core)
    ours, theirs = (pictures(events(submit(each, root, "base-again", []))) for each in (core, untouched))
    assert np.array_equal(ours[0], theirs[0])


def test_an_adapter_that_acts_late_fails_late_and_can_be_cancelled_while_it_is_looked_into(
    core: Core, root: Path
) -> None:
    """The step is that of its schedule; the base is made again step by step, and leaves room for others."""
    settings = UseSettings(start=0.5)
    use = AdapterUse(AdapterSource(str(root / "bad/inner.safetensors")), 1.0, None, settings)
    error = failure(core.engine.submit(GenerationRequest("late", WANTED, (use,))))
    assert error.metadata["step"] == "3"
    wanted = GenerationParameters("a red star", "", 64, 64, 200, 4.0, 1, 1)
    job = core.engine.submit(GenerationRequest("late-and-long", wanted, (use,)))
    subscription = job.subscribe(lambda: None)
    deadline_s = time.monotonic() + 30
    while job not in core.engine._inquests:  # type: ignore[attr-defined]
        subscription.poll()
        assert time.monotonic() < deadline_s
        time.sleep(0.001)
    assert len(pictures(events(submit(core, root, "meanwhile", [])))) == 1
    subscription.close()
    assert isinstance(failure(job), RequestCancelledError)
    check_books(core)


@pytest.mark.parametrize("uses", [[], [("a", 1.0)]], ids=["base", "adapter"])
@pytest.mark.parametrize("stage", ["step", "preview", "decode"])
def test_the_models_own_fault_is_not_laid_to_an_adapter(
    core: Core, untouched: Core, root: Path, uses: list[tuple[str, float]], stage: str
) -> None:
    """A bias that overflows, in the network or in its decoder."""
    family: Any = core.engine._runner._family  # type: ignore[attr-defined]
    broken = family._transformer.proj_out if stage == "step" else family._pipeline.vae.decoder.conv_out
    name, component = f"{stage}-{len(uses)}", "transformer" if stage == "step" else "vae"
    options = {"preview_interval_steps": 2} if stage == "preview" else {}
    true = broken.bias.detach().clone()
    core.engine.call(lambda *_: broken.bias.fill_(float("inf"))).result(timeout=5)
    try:
        error = failure(submit(core, root, f"broken-{name}", uses, **options))
    finally:
        core.engine.call(lambda *_: broken.bias.copy_(true)).result(timeout=5)
    assert isinstance(error, ModelOutputNotFiniteError)
    assert (error.metadata["component"], error.metadata["dtype"]) == (component, "float64")
    check_books(core)
    ours, theirs = (pictures(events(submit(each, root, f"mended-{name}", uses))) for each in (core, untouched))
    assert np.array_equal(ours[0], theirs[0])


def test_one_image_of_several_that_is_not_finite_ends_its_request(core: Core, root: Path) -> None:
    """A request has all of its images or an error."""
    wanted = GenerationParameters("a red star", "", 64, 64, 3, 4.0, 1, 3)
    error = failure(submit(core, root, "three", [("bad/step.safetensors", 1.0)], wanted=wanted))
    assert isinstance(error, AdapterOutputNotFiniteError)
    check_books(core)


def test_prompts_that_are_finite_are_not_encoded_anew(core: Core, root: Path) -> None:
    """In another batch they might round otherwise, and the base's next picture with them."""
    before = core.engine.info().prompt_misses
    wanted = replace(WANTED, prompt="a prompt of its own")
    pictures(events(submit(core, root, "prompt-before", [], wanted=wanted)))
    failure(submit(core, root, "prompt-bad", [("bad/step.safetensors", 1.0)], wanted=wanted))
    pictures(events(submit(core, root, "prompt-after", [], wanted=wanted)))
    assert core.engine.info().prompt_misses <= before + 2  # once, and the negative prompt if it was not known
