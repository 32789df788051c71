"""The ways a user has today, each at its best: diffusers eager, diffusers tuned, peft's mixed batch.

Every function returns seconds: of one image or batch with its change of adapter, measured after a warm-up, prompts and
decoding included, encoding of files not.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.load import WORDS
from benchmarks.presets import Preset


class Diffusers:
    """A diffusers pipeline with adapters loaded through its own loaders."""

    def __init__(self, preset: Preset, device: str) -> None:
        """Builds the pipeline."""
        self._preset = preset
        self.device = torch.device(device)
        dtype = torch.bfloat16 if device == "cuda" else torch.float32
        self.pipeline = preset.pipeline(self.device, dtype)
        self.pipeline.set_progress_bar_config(disable=True)
        self.component = "transformer" if hasattr(self.pipeline, "transformer") else "unet"
        self.names: list[str] = []

    @property
    def network(self) -> Any:
        """The component that steps."""
        return getattr(self.pipeline, self.component)

    def load(self, adapters: list[Path]) -> None:
        """Loads *adapters*, all of them resident as a user would keep them."""
        self.names = [path.name.replace(".", "-") for path in adapters]
        for path, name in zip(adapters, self.names, strict=True):
            self.network.load_lora_adapter(_tensors(path), network_alphas=None, adapter_name=name, prefix=None)
        self.network.set_adapters(self.names[:1], [1.0])

    def draw(self, side_px: int, seed: int, images: int = 1, **options: Any) -> Any:
        """One call of the pipeline."""
        prompts = [" ".join((WORDS * 2)[(seed + k) % len(WORDS) :][:12]) for k in range(images)]
        if self.component == "transformer":  # of SD3
            options["max_sequence_length"] = self._preset.settings.max_sequence_length or 256
        return self.pipeline(
            prompts,
            height=side_px,
            width=side_px,
            num_inference_steps=self._preset.steps,
            guidance_scale=self._preset.guidance_scale,
            generator=[torch.Generator().manual_seed(seed + k) for k in range(images)],
            output_type="np",
            **options,
        ).images

    def eager(self, side_px: int, runs: int) -> float:
        """(a) As the documentation shows: set_adapters for each request, unmerged, eager, one at a time."""

        def one(k: int) -> None:
            self.network.set_adapters([self.names[k % len(self.names)]], [1.0])
            self.draw(side_px, k)

        return self._median(one, runs)

    def mixed(self, side_px: int, runs: int, images: int = 4) -> float:
        """(c) peft's own mixed batch: `adapter_names` for each row of one forward pass. Seconds of the batch."""
        transformer = self.network
        plain = transformer.forward
        chosen = [self.names[k % len(self.names)] for k in range(images)]

        def forward(*args: Any, **kwargs: Any) -> Any:
            with _adapter_names(transformer, chosen * 2):
                return plain(*args, **kwargs)

        transformer.set_adapters(self.names, [1.0] * len(self.names))
        transformer.forward = forward
        try:
            return self._median(lambda k: self.draw(side_px, k, images), runs)
        finally:
            transformer.forward = plain
            transformer.set_adapters(self.names[:1], [1.0])

    def tuned(self, side_px: int, runs: int, *, graphs: bool) -> tuple[float, float]:
        """(b) The best tuning: cuDNN attention, the model compiled (with CUDA graphs), fused weights, unfused and fused
        for each request. Returns seconds of an image, and of a change of adapter."""
        pipeline, transformer = self.pipeline, self.network
        changes: list[float] = []

        def change(k: int) -> None:
            began_s = time.monotonic()
            pipeline.unfuse_lora(components=[self.component])
            transformer.set_adapters([self.names[k % len(self.names)]], [1.0])
            pipeline.fuse_lora(components=[self.component])
            self._wait()
            changes.append(time.monotonic() - began_s)

        pipeline.fuse_lora(components=[self.component])
        plain = transformer.forward
        if self.device.type == "cuda":
            torch._dynamo.reset()
            # Without guards on modules: peft's make the compiler compile anew for each adapter's name, and looking at
            # them takes ten times as long as the step. What is merged runs no code of peft.
            options: dict[str, Any] = {
                "guard_filter_fn": torch.compiler.skip_guard_on_all_nn_modules_unsafe,
                "triton.cudagraphs": graphs,
            }
            transformer.forward = torch.compile(plain, options=options, dynamic=False)
        try:
            with self._attention():

                def one(k: int) -> None:
                    change(k)
                    self.draw(side_px, k)

                one(1)
                changes.clear()
                seconds = self._median(one, runs)
        finally:
            transformer.forward = plain
            pipeline.unfuse_lora(components=[self.component])
        return seconds, statistics.median(changes)

    def _attention(self) -> AbstractContextManager[None]:
        if self.device.type != "cuda":
            return nullcontext()
        found: AbstractContextManager[None] = sdpa_kernel(
            [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.MATH], set_priority=True
        )
        return found

    def _median(self, action: Callable[[int], object], runs: int) -> float:
        with torch.inference_mode():
            action(0)
            self._wait()
            seconds = []
            for k in range(1, runs + 1):
                began_s = time.monotonic()
                action(k)
                self._wait()
                seconds.append(time.monotonic() - began_s)
        return statistics.median(seconds)

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()


def _tensors(path: Path) -> dict[str, torch.Tensor]:
    """The adapter's tensors under the names of diffusers."""
    from safetensors.torch import load_file

    return {
        key.removeprefix("base_model.model."): value
        for key, value in load_file(path / "adapter_model.safetensors").items()
    }


def _adapter_names(transformer: torch.nn.Module, names: list[str]) -> AbstractContextManager[None]:
    """peft's mixed batch without its PeftModel: hooks that hand each layer the adapter of each row."""
    from contextlib import contextmanager

    from peft.tuners.lora import LoraLayer

    @contextmanager
    def hooked() -> Any:
        def before(_: torch.nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
            return args, {**kwargs, "adapter_names": names}

        layers = [module for module in transformer.modules() if isinstance(module, LoraLayer)]
        handles = [layer.register_forward_pre_hook(before, with_kwargs=True) for layer in layers]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    found: AbstractContextManager[None] = hooked()
    return found
