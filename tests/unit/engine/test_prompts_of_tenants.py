"""Embeddings of prompts: shared within a tenant, never between tenants."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lora_server.engine.prompts import PromptCache
from lora_server.types import GenerationParameters


class Embedding:
    """An embedding of 10 bytes."""

    size_bytes = 10


class Runner:
    """Encodes prompts, and remembers which."""

    def __init__(self) -> None:
        self.encoded: list[str] = []

    def text_key(self, composition: Any) -> Any:
        """No adapter changes the text encoders."""
        return composition

    def prompts(self, parameters: GenerationParameters) -> list[str]:
        """The prompt, and what to avoid."""
        return [parameters.prompt, parameters.negative_prompt]

    def encode(self, prompts: Sequence[str], composition: Any) -> list[Embedding]:
        """One embedding for each."""
        self.encoded += prompts
        return [Embedding() for _ in prompts]


def wants(tenant: str, prompt: str) -> tuple[str, GenerationParameters]:
    """A request."""
    return tenant, GenerationParameters(prompt, "", 64, 64, 4, 4.0, 1, 1)


def test_no_tenant_finds_out_what_another_has_drawn() -> None:
    """The same prompt is encoded once for each tenant, alone or in one batch; the second time it is there for both."""
    runner: Any = Runner()
    cache = PromptCache(runner, 1000)
    first = cache.conditionings([wants("acme", "a star")], ())[0]
    assert runner.encoded == ["a star", ""]
    other = cache.conditionings([wants("umbrella", "a star")], ())[0]
    assert runner.encoded == ["a star", ""] * 2
    assert other.positive is not first.positive
    cache.conditionings([wants("acme", "a ring"), wants("umbrella", "a ring")], ())
    assert runner.encoded[4:] == ["a ring", "a ring"]
    again = cache.conditionings([wants("acme", "a star"), wants("umbrella", "a star")], ())
    assert len(runner.encoded) == 6
    assert again[0].positive is first.positive
    assert (cache.hits, cache.misses) == (6, 6)
