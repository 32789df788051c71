"""Settings of a use against the version that it is resolved to."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from lora_server.adapters.api import LoadedAdapter
from lora_server.adapters.manager import AdapterManager
from lora_server.config import CacheConfig
from lora_server.errors import InvalidRequestError
from lora_server.types import AdapterSource, AdapterUse, ByName, ComponentSummary, LoadReport
from lora_server.use_settings import UseSettings

from tests.unit.adapters.memory_loader import FakeWeights, MemoryLoader

MODULES = tuple(f"blocks.{k}.to_q" for k in range(4))


class DescribedLoader(MemoryLoader):
    """Adapters of a transformer; `/a` has trigger words."""

    def __init__(self) -> None:
        super().__init__()
        self.words: tuple[str, ...] = ("neon", "glow")

    def load(self, folder: Path) -> LoadedAdapter:
        loaded = super().load(folder)
        weights = FakeWeights(10, components=(ComponentSummary("transformer", 4, 4, 4),))
        words = self.words if str(folder) == "/a" else ()
        report = LoadReport(
            "peft", ("lora",), 4, 4, 4.0, 4.0, weights.components, 10, loaded.digest, trigger_words=words
        )
        return LoadedAdapter(loaded.digest, weights, loaded.signature, MODULES, report)


@pytest.fixture
def loader() -> DescribedLoader:
    """Its words can be changed."""
    return DescribedLoader()


@pytest.fixture
def manager(loader: DescribedLoader) -> Iterator[AdapterManager]:
    """With `a` and `b` registered."""
    made = AdapterManager(CacheConfig(), loader)
    for name in "ab":
        made.load(AdapterSource(f"/{name}", name=name)).result(5)
    yield made
    made.close()


def use(name: str, **settings: object) -> AdapterUse:
    """One adapter with settings."""
    return AdapterUse(ByName(name), 0.5, settings=UseSettings(**settings))  # type: ignore[arg-type]


def test_settings_arrive_where_the_adapter_is_applied(manager: AdapterManager) -> None:
    """Resolving keeps the settings, and hands over the trigger words only if they were asked for."""
    asked, silent = use("a", start=0.25, use_trigger_words=True), use("b", block_scales=(("blocks.1", 0.0),))
    first, second = manager.resolve([asked, silent]).result(5)
    assert (first.applied.settings, second.applied.settings) == (asked.settings, silent.settings)
    assert (first.trigger_words, second.trigger_words) == (("neon", "glow"), ())


def test_every_setting_that_would_do_nothing_is_named(manager: AdapterManager) -> None:
    """A pattern without a module, a component that the adapter leaves alone, words that it has not."""
    uses = [
        use("a", block_scales=(("blocks.3", 0.0), ("block.3", 0.0)), component_scales=(("transformer", 1.0),)),
        use("b", component_scales=(("text_encoder", 0.5),), use_trigger_words=True),
    ]
    with pytest.raises(InvalidRequestError) as refused:
        manager.resolve(uses).result(5)
    assert [fault.field for fault in refused.value.faults] == [
        "spec.adapters[0].block_scales[1].pattern",
        "spec.adapters[1].component_scales[0].component",
        "spec.adapters[1].use_trigger_words",
    ]
    assert "'block.3'" in refused.value.message
    assert "'b'" in refused.value.message
    assert "blocks.0.to_q" in refused.value.message


def test_new_trigger_words_of_the_same_weights_are_seen(manager: AdapterManager, loader: DescribedLoader) -> None:
    """A changed model card is noticed at the next use; the version is the same."""
    before = manager.get(ByName("a"))
    loader.words = ("other",)
    loader.folders["/a"] = ("a", 11)  # the signature changes, the digest does not
    (resolved,) = manager.resolve([use("a", use_trigger_words=True)]).result(5)
    assert resolved.trigger_words == ("other",)
    after = manager.get(ByName("a"))
    assert (after.current_digest, len(after.versions)) == (before.current_digest, 1)
    assert after.versions[0].trigger_words == ("other",)
