"""Runs the model for the engine: encode, step, preview, decode, each with the right adapters in the right place.

The only caller of the model family, the mergers, the pages and the denoiser; lives on the engine thread. Does not know
queues, jobs or events.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from typing import Any
from weakref import WeakKeyDictionary

import torch

from lora_server.config import EngineConfig
from lora_server.engine.composition import Composition, Phase, for_text, phases
from lora_server.engine.span import Span
from lora_server.models.base import Conditioning, DenoisingState, ModelFamily, Prompt, PromptEmbedding
from lora_server.models.denoiser import Denoiser
from lora_server.models.finite import FiniteCheck, OutputWatch
from lora_server.models.graphs import GraphedModule
from lora_server.models.linear_store import stores
from lora_server.models.lora_linear import PagedLinears, RowGate
from lora_server.models.merge import CompositionKey, WeightMerger, composition_key
from lora_server.models.pages import clear_pages, write_pages
from lora_server.models.pixels import to_pixels
from lora_server.models.weights import AdapterWeights
from lora_server.scheduler.pages import PageTable
from lora_server.types import ApplicationWay, Digest, GenerationParameters

TEXT = "text encoder"
"""What embeddings that are not finite are laid to until `watching_text` says which of several encoders gave them."""
AUTOENCODER = "vae"
_MAX_PREVIEW_SIDE_LATENTS = 32


@dataclass(frozen=True, slots=True)
class BatchImage:
    """One image of a batch and the adapters that it uses at this step."""

    state: DenoisingState
    composition: Composition


@dataclass(frozen=True, slots=True)
class Decoded:
    """Images on the device: (B, height_px, width_px, 3) uint8, and whether they are any."""

    pixels: torch.Tensor
    check: FiniteCheck


@dataclass(slots=True)
class RunnerCounters:
    """What the runner has done since its start."""

    switches: int = 0
    page_writes: int = 0


class BatchRunner:
    """The model with its mergers and pages, in the verbs of the engine.

    Every method sets what it needs first: nobody relies on what was there before.
    """

    def __init__(self, family: ModelFamily, config: EngineConfig) -> None:
        """Takes the family's components over: their linears move into stacks."""
        self._family = family
        self._deterministic = config.deterministic
        self.pages = PageTable(config.page_columns, config.num_pages)
        component_stores = stores(family.components, family.denoiser, config.page_columns * config.num_pages)
        self.store = component_stores[family.denoiser]
        self._mergers = {name: WeightMerger(name, store) for name, store in component_stores.items()}
        paths = [path for group in self.store.groups for path in group.paths]
        self.target_classes = family.target_classes(paths)
        network = family.components[family.denoiser]
        self._paged = PagedLinears(network, self.store, 2 * config.max_batch_images, self.target_classes)
        self.denoiser = Denoiser(family, self._paged, compiled=config.compile, max_graphs=config.max_graphs)
        graphs_decoder = self.denoiser.uses_graphs and family.decoder is not None
        self._decoder = GraphedModule(family.decoder) if graphs_decoder else None  # type: ignore[arg-type]
        self._column_choices = sorted(
            {min(c, self.store.columns) for c in (*config.column_buckets, self.store.columns)}
        )
        self._classes: WeakKeyDictionary[AdapterWeights, int] = WeakKeyDictionary()
        self._gates: Mapping[int, RowGate] = {}
        self._check, self._places = FiniteCheck(), dict[int, int]()
        self.counters = RunnerCounters()
        self._preparing = torch.cuda.Stream(family.device) if family.device.type == "cuda" else None

    @property
    def merged(self) -> CompositionKey | None:
        """What the denoiser's weights hold besides the base."""
        return self._mergers[self._family.denoiser].active

    @property
    def column_choices(self) -> Sequence[int]:
        """How many columns a batch may open; a batch opens the fewest that are enough."""
        return self._column_choices

    @property
    def text_encoders(self) -> Sequence[str]:
        """The components that adapters may change besides the denoiser."""
        return [name for name in self._mergers if name != self._family.denoiser]

    def phases(self, composition: Composition, num_steps: int) -> list[Phase]:
        """What *composition* does to the denoiser at each of *num_steps* steps."""
        return phases(composition, self._family.denoiser, num_steps)

    def text_key(self, composition: Composition) -> tuple[CompositionKey, ...]:
        """Names what *composition* does to the text encoders."""
        seen = for_text(composition)
        return tuple(composition_key(seen, name) for name in self.text_encoders)

    def prompts(self, parameters: GenerationParameters) -> list[Prompt]:
        """The prompts that steer a request, the positive one first."""
        positive = [Prompt(parameters.prompt)]
        if not self._family.guides(parameters):
            return positive
        return [*positive, Prompt(parameters.negative_prompt, negative=True)]

    def encode(self, prompts: Sequence[Prompt], composition: Composition) -> list[PromptEmbedding]:
        """Encodes prompts in one batch, with the composition in the text encoders."""
        seen = for_text(composition)
        for component in self.text_encoders:
            self._mergers[component].apply(seen)
        if self._deterministic:
            found = [self._family.encode([prompt])[0] for prompt in prompts]
        else:
            found = self._family.encode(prompts)
        return [
            replace(embedding, truncations=self._family.truncations(prompt))
            for prompt, embedding in zip(prompts, found, strict=True)
        ]

    def condition(self, parameters: GenerationParameters, composition: Composition) -> Conditioning:
        """Encodes what steers one request; nothing is kept."""
        positive, *negative = self.encode(self.prompts(parameters), composition)
        return Conditioning(positive, negative[0] if negative else None)

    def begin(self, parameters: GenerationParameters, conditioning: Conditioning) -> list[DenoisingState]:
        """Returns the request's images at pure noise."""
        return self._family.begin(parameters, conditioning)

    def step(self, images: Sequence[BatchImage], way: ApplicationWay) -> FiniteCheck:
        """Advances images of equal shape by one step in one batch; returns before the device has finished.

        *way* is SLOTS for any mixture that fits into the pages, MERGED for images of one composition, BASE for images
        without adapters. Returns whether what was predicted and what became of it is finite, by place in *images*; at
        an image's first step, also what its prompts became.
        """
        self.merge(images[0].composition if way is ApplicationWay.MERGED else ())
        if way is ApplicationWay.SLOTS:
            self._open_pages(images)
        else:
            self._paged.open(0, 0)
        states = [image.state for image in images]
        self._check, self._places = FiniteCheck(), {id(state): k for k, state in enumerate(states)}
        self._check_conditioning(states)
        self._family.step(states, self._denoise)
        self._check.add(range(len(states)), self._family.denoiser, torch.cat([state.latents for state in states]))
        for k, state in enumerate(states):
            for component, peak in state.peaks:
                self._check.add_peaks([k], component, peak)
        return self._check.send()

    def _check_conditioning(self, states: Sequence[DenoisingState]) -> None:
        for k, state in enumerate(states):
            for embedding in (state.conditioning.positive, state.conditioning.negative) if not state.step_index else ():
                for tensor in embedding.tensors.values() if embedding is not None else ():
                    self._check.add([k], TEXT, tensor)

    @contextmanager
    def watching_text(self) -> Iterator[OutputWatch]:
        """Within it, it is noted what each text encoder gives. Not for serving: it costs a pass over each output."""
        watch = OutputWatch({name: self._family.components[name] for name in self.text_encoders})
        try:
            yield watch
        finally:
            watch.close()

    @property
    def asynchronous(self) -> bool:
        """Whether `step` returns before it is done, so that there is a wait to be used."""
        return self._preparing is not None

    @contextmanager
    def preparing(self) -> Iterator[None]:
        """Within it, work for requests that are to start goes beside the step that runs; later steps wait for it."""
        if self._preparing is None:
            yield
            return
        main = torch.cuda.current_stream(self._family.device)
        with torch.cuda.stream(self._preparing):
            yield
        main.wait_stream(self._preparing)

    def span(self) -> AbstractContextManager[Span]:
        """Measures what is done within, without waiting for the device."""
        return Span.clocked() if self._preparing is None else Span.on_device()

    def wait(self) -> None:
        """Waits until the device has done what it was given."""
        if self._family.device.type == "cuda":
            torch.cuda.current_stream(self._family.device).synchronize()

    def decode(self, states: Sequence[DenoisingState]) -> Decoded:
        """Decodes images of equal shape to pixels; returns before the device has finished."""
        return self._decode(torch.cat([state.latents for state in states]), FiniteCheck())

    def _decode(self, latents: torch.Tensor, check: FiniteCheck) -> Decoded:
        image = self._family.decode(latents)
        check.add(range(len(image)), AUTOENCODER, image)
        return Decoded(to_pixels(image), check.send())

    def warm_decode(self, state: DenoisingState) -> None:
        """Makes ready to decode images of this shape; on CUDA that takes seconds."""
        if self._decoder is not None:
            self._decoder.capture(lambda: self.decode([state]))

    def preview(self, state: DenoisingState) -> Decoded | None:
        """Decodes the model's present estimate of an image, made small first so that it costs the same at any size.

        None if there is nothing to see: some pipelines do not show their latents.
        """
        estimate = state.latents if state.denoised is None else state.denoised
        if not estimate.is_floating_point():
            return None
        excess = max(estimate.shape[-2:]) / _MAX_PREVIEW_SIDE_LATENTS
        if excess > 1:
            size = [max(1, round(side / excess)) for side in estimate.shape[-2:]]
            estimate = torch.nn.functional.interpolate(estimate, size=size, mode="area")
        check = FiniteCheck()
        check.add([0], self._family.denoiser, estimate)
        return self._decode(estimate, check)

    def clean(self, digests: Iterable[Digest]) -> None:
        """Leaves nothing of adapters that gave what is not finite: not in weights, pages, or inputs of graphs."""
        for digest in digests:
            clear_pages(self.store, self.pages.pages_of(digest), self.pages.page_columns)
            self.pages.forget(digest)
        self.merge(())
        with self.preparing():  # where they are used
            for component in self.text_encoders:
                self._mergers[component].apply(())
        self.denoiser.clear_inputs()

    def reset(self) -> None:
        """Puts the base weights back and forgets all pages, trusting nothing of what was there."""
        for merger in self._mergers.values():
            merger.invalidate()
        self.restore()
        self.pages.clear()
        self._gates = {}
        self._paged.open(0, 0)

    def restore(self) -> None:
        """Puts the base weights back everywhere, bit for bit."""
        for merger in self._mergers.values():
            merger.apply(())

    def merge(self, composition: Composition) -> None:
        """Makes the denoiser's weights hold base + *composition*; an empty one is the base, bit for bit."""
        self.counters.switches += self._mergers[self._family.denoiser].apply(composition)

    def _open_pages(self, images: Sequence[BatchImage]) -> None:
        """Brings the batch's adapters into pages and works out what each row opens."""
        denoiser = self._family.denoiser
        members = {m.digest: m.weights for image in images for m in image.composition if m.scale_in(denoiser)}
        assert not any(m.settings.block_scales for image in images for m in image.composition if m.digest in members)
        ranks = {digest: weights.component_rank(denoiser) for digest, weights in members.items()}
        if not ranks:  # scale 0 everywhere
            self._paged.open(0, 0)
            return
        needed = self.pages.page_columns * sum(map(self.pages.pages_for, ranks.values()))
        columns = next(choice for choice in self._column_choices if choice >= needed)
        placement = self.pages.place(ranks, columns // self.pages.page_columns)
        assert placement is not None, "the policy lets only fitting batches through"
        try:
            for digest in placement.new:
                pages = placement.pages[digest]
                write_pages(self.store, denoiser, members[digest], pages, self.pages.page_columns)
                self.counters.page_writes += 1
        except BaseException:
            for digest in placement.new:
                self.pages.forget(digest)
            raise
        self._gates = {id(image.state): self._row_gate(image.composition, placement.pages, ranks) for image in images}
        self._paged.open(columns, max(self._class_of(members[digest]) for digest in ranks))

    def _row_gate(
        self, composition: Composition, pages: Mapping[str, Sequence[int]], ranks: Mapping[str, int]
    ) -> RowGate:
        width = self.pages.page_columns
        return RowGate(
            {
                pages[member.digest][column // width] * width + column % width: scale
                for member in composition
                if (scale := member.scale_in(self._family.denoiser))
                for column in range(ranks[member.digest])
            }
        )

    def _class_of(self, weights: AdapterWeights) -> int:
        """The class of linears that a version needs; worked out once."""
        found = self._classes.get(weights)
        if found is None:
            deltas = weights.groups[self._family.denoiser]
            paths = (self.store.groups[delta.group].paths[k] for delta in deltas for k in delta.members)
            found = self._classes[weights] = self._paged.class_of(paths)
        return found

    def _denoise(
        self, owners: Sequence[DenoisingState], inputs: Mapping[str, torch.Tensor], options: Mapping[str, Any]
    ) -> torch.Tensor:
        if self._paged.columns:
            self._paged.gates.set([self._gates[id(state)] for state in owners])
        prediction = self.denoiser(inputs, options)
        self._check.add([self._places[id(state)] for state in owners], self._family.denoiser, prediction)
        return prediction
