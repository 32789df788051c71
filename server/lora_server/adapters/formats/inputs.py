"""What is planned and against what: an adapter's files as read so far, the model, and what is allowed."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from lora_server.adapters.formats.families import mismatch
from lora_server.adapters.formats.header import TensorFile
from lora_server.adapters.formats.names import Catalog, NameTable, Place
from lora_server.adapters.formats.peft_config import PeftConfig
from lora_server.errors import AdapterIncompatibleError


@dataclass(frozen=True)
class Model:
    """What adapters are matched against.

    Attributes:
        name: For messages.
        denoiser: The component that files without a component's name are for.
        catalog: Shapes by component and path; None if the model is not known.
        family: For messages; empty if unknown.
    """

    name: str
    denoiser: str
    catalog: Catalog | None
    family: str = ""

    @cached_property
    def names(self) -> NameTable:
        """Its modules under all their names."""
        return NameTable(self.catalog, self.denoiser)

    def incompatible(self, adapter: str, tensors: TensorFile, detail: str, key: str) -> AdapterIncompatibleError:
        """The error that the model has no place for *key* of *adapter*; it names both families if they tell."""
        shapes = {name: info.shape for name, info in tensors.tensors.items()}
        return AdapterIncompatibleError(adapter, self.name, detail, key, mismatch(shapes, self.family))


@dataclass(frozen=True, slots=True)
class Rules:
    """What is allowed: the largest rank, the most modules, and whether tensors of no module may be left out."""

    max_rank: int = 2**31
    max_modules: int = 2**31
    allow_partial: bool = False


@dataclass(frozen=True, slots=True)
class SourceFile:
    """One file of tensors, with what lies beside it.

    Attributes:
        tensors: Its header.
        config: Its PEFT configuration, or None.
        component: Which component it is for, if its place says so.
    """

    tensors: TensorFile
    config: PeftConfig | None = None
    component: str | None = None

    def written(self, name: str, place: Place) -> tuple[str, ...]:
        """The names that its configuration may have for the module *name*, which goes to *place*.

        PEFT saves a module under the name that the patterns were matched with; diffusers puts the component's before.
        """
        return place.written(name if self.config is not None else None)

    @property
    def named_base(self) -> str:
        """What the file says of the model that it is for, to be put behind a message; empty if nothing."""
        base = self.config.base_model if self.config is not None else ""
        base = base or self.tensors.metadata.get("ss_base_model_version", "")
        return f" (it names {base!r} as its base model)" if base else ""
