"""Overhears what a pipeline that encodes by itself lets its tokenizers cut off."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

from lora_server.models.base import Prompt
from lora_server.models.prompt_length import TextLimit, truncations
from lora_server.types import PromptTruncation

Heard = Callable[[str, int], None]
"""Gets a text and the most tokens that are kept of it."""


def record_truncations(pipeline: Any, prompts: Sequence[tuple[Prompt, list[PromptTruncation]]]) -> None:
    """Lets the tokenizers of *pipeline*, a copy made for one call, tell what they cut off each prompt.

    A prompt's list gets one entry for each encoder, however often the call encodes it. What a pipeline cuts off
    otherwise than by its tokenizer, or rewrites before, is not heard.
    """
    for name, tokenizer in pipeline.components.items():
        if name.startswith("tokenizer") and callable(tokenizer):
            encoder = name.replace("tokenizer", "text_encoder")
            vars(pipeline)[name] = _telling(tokenizer, _note(encoder, tokenizer, prompts))


def _telling(tokenizer: Any, heard: Heard) -> Any:
    """A copy of *tokenizer*, of a subclass because pipelines ask for its class, that tells what it is asked to cut."""

    def call(self: Any, *args: Any, **options: Any) -> Any:
        texts = args[0] if args else options.get("text")
        if options.get("truncation") and options.get("max_length"):
            for text in [texts] if isinstance(texts, str) else texts or ():
                if isinstance(text, str):
                    heard(text, options["max_length"])
        return kind.__call__(self, *args, **options)

    kind = type(tokenizer)
    told = copy.copy(tokenizer)
    told.__class__ = type(kind.__name__, (kind,), {"__call__": call})
    return told


def _note(encoder: str, tokenizer: Any, prompts: Sequence[tuple[Prompt, list[PromptTruncation]]]) -> Heard:
    def heard(text: str, max_tokens: int) -> None:
        found = [
            (len(part), part, begin, k) for k, (prompt, _) in enumerate(prompts) for part, begin in _in(text, prompt)
        ]
        if not found:
            return
        _, part, begin, k = max(found)
        prompt, told = prompts[k]
        if any(each.encoder == encoder for each in told):
            return
        limit = TextLimit(encoder, tokenizer, max_tokens, wrap=lambda _: (text, begin))
        told += truncations([limit], Prompt(part, negative=prompt.negative))

    return heard


def _in(text: str, prompt: Prompt) -> list[tuple[str, int]]:
    """The prompt as it stands in *text*, and where; pipelines strip it, and some make it lower-case."""
    for part in (prompt.text, prompt.text.strip(), prompt.text.strip().lower()):
        if part and part in text:
            return [(part, text.index(part))]
    return []
