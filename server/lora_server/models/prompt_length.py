"""What a tokenizer cuts off a prompt that is longer than its encoder reads."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from lora_server.models.base import Prompt
from lora_server.types import MAX_DROPPED_CHARS, PromptTruncation


def _as_it_is(text: str) -> tuple[str, int]:
    return text, 0


@dataclass(frozen=True, slots=True)
class TextLimit:
    """How much of a prompt one text encoder reads.

    Attributes:
        encoder: The component.
        tokenizer: Its tokenizer, as the pipeline calls it.
        max_tokens: Tokens that are read, the tokenizer's own included.
        wrap: Puts a prompt into a template: (text, where the prompt begins in it).
        skipped: Tokens at the front of the text that do not count.
    """

    encoder: str
    tokenizer: Any
    max_tokens: int
    wrap: Callable[[str], tuple[str, int]] = _as_it_is
    skipped: int = 0


def truncations(limits: Iterable[TextLimit], prompt: Prompt) -> tuple[PromptTruncation, ...]:
    """Returns what each tokenizer cuts off *prompt*, of those that do; templates around it do not count as prompt."""
    found = []
    for limit in limits:
        text, begin = limit.wrap(prompt.text)
        num_tokens = len(limit.tokenizer(text, verbose=False).input_ids) - limit.skipped
        if num_tokens <= limit.max_tokens:
            continue
        # Some templates strip what they take.
        said = prompt.text if text.startswith(prompt.text, begin) else prompt.text.strip()
        dropped = _dropped(limit, text, (begin, begin + len(said)))
        if dropped:
            found.append(
                PromptTruncation(
                    limit.encoder, limit.max_tokens, num_tokens, dropped[:MAX_DROPPED_CHARS], prompt.negative
                )
            )
    return tuple(found)


def _dropped(limit: TextLimit, text: str, place: tuple[int, int]) -> str:
    """The part of the prompt, which is at *place* in *text*, that no kept token covers."""
    begin, end = place
    options = {"truncation": True, "max_length": limit.max_tokens + limit.skipped, "verbose": False}
    if not limit.tokenizer.is_fast:  # it does not say where its tokens are
        kept = limit.tokenizer.decode(limit.tokenizer(text, **options).input_ids, skip_special_tokens=True)
        return text[max(begin, min(len(kept), end - 1)) : end]
    spans = limit.tokenizer(text, **options, return_offsets_mapping=True).offset_mapping
    covered = [(first, last) for first, last in spans if last > first]  # what the tokenizer adds has no place
    if limit.tokenizer.truncation_side == "left":
        return text[begin : min(end, min(first for first, _ in covered))] if covered else text[begin:end]
    return text[max(begin, max(last for _, last in covered)) : end] if covered else text[begin:end]
