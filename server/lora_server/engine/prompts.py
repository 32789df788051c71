"""Prompt embeddings, kept for requests of one tenant that say the same under the same text-encoder adapters.

Nothing is shared between tenants: how long a prompt takes would tell one what another has drawn. Encodes what is
missing in one batch for each composition of the text encoders. Engine thread only.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable, Mapping, Sequence

from lora_server.engine.batch_runner import BatchRunner
from lora_server.engine.composition import Composition
from lora_server.models.base import Conditioning, Prompt, PromptEmbedding
from lora_server.types import GenerationParameters


class PromptCache:
    """Embeddings by (tenant, prompt, composition of the text encoders); least recently used first to go.

    | invariant | |
    |---|---|
    | `used_bytes` | sum of the embeddings held, at most the budget |
    """

    def __init__(self, runner: BatchRunner, budget_bytes: int) -> None:
        self._runner = runner
        self.budget_bytes = budget_bytes
        self._held: OrderedDict[Hashable, PromptEmbedding] = OrderedDict()
        self.used_bytes = 0
        self.hits = self.misses = self.evictions = 0

    def conditionings(
        self, requests: Sequence[tuple[str, GenerationParameters]], composition: Composition
    ) -> list[Conditioning]:
        """Returns what steers each request, (tenant, parameters); all have *composition* in the text encoders."""
        adapters = self._runner.text_key(composition)
        prompts = [[(tenant, prompt) for prompt in self._runner.prompts(each)] for tenant, each in requests]
        wanted = [prompt for each in prompts for prompt in each]
        found = {prompt: held for prompt in wanted if (held := self._held.get((prompt, adapters))) is not None}
        missing = [prompt for prompt in dict.fromkeys(wanted) if prompt not in found]
        self.hits += sum(prompt in found for prompt in wanted)
        self.misses += len(missing)
        if missing:
            encoded = self._runner.encode([prompt for _, prompt in missing], composition)
            for prompt, embedding in zip(missing, encoded, strict=True):
                found[prompt] = embedding
                self._keep((prompt, adapters), embedding)
        for prompt in wanted:
            if (prompt, adapters) in self._held:
                self._held.move_to_end((prompt, adapters))
        return [_conditioning(each, found) for each in prompts]

    def forget(self, tenant: str, parameters: GenerationParameters, composition: Composition) -> None:
        """Forgets the prompts of a request; they are encoded anew when they are next asked for."""
        adapters = self._runner.text_key(composition)
        for prompt in self._runner.prompts(parameters):
            dropped = self._held.pop(((tenant, prompt), adapters), None)
            self.used_bytes -= 0 if dropped is None else dropped.size_bytes

    def clear(self) -> None:
        """Forgets all embeddings."""
        self._held.clear()
        self.used_bytes = 0

    def _keep(self, key: Hashable, embedding: PromptEmbedding) -> None:
        if embedding.size_bytes > self.budget_bytes:
            return
        self._held[key] = embedding
        self.used_bytes += embedding.size_bytes
        while self.used_bytes > self.budget_bytes:
            _, dropped = self._held.popitem(last=False)
            self.used_bytes -= dropped.size_bytes
            self.evictions += 1


def _conditioning(
    prompts: Sequence[tuple[str, Prompt]], found: Mapping[tuple[str, Prompt], PromptEmbedding]
) -> Conditioning:
    positive, *negative = [found[prompt] for prompt in prompts]
    return Conditioning(positive, negative[0] if negative else None)
