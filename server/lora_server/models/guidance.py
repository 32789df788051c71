"""Classifier-free guidance over a batch: which rows it takes, and what their predictions add up to.

Images with guidance take a negative and a positive row, others (guidance off, or distilled into the model) one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lora_server.models.base import DenoisingState, PromptEmbedding


@dataclass(frozen=True, slots=True)
class Row:
    """One row of a forward pass: the index of its state in the batch, and the prompt that steers it."""

    index: int
    embedding: PromptEmbedding


def guidance_rows(states: Sequence[DenoisingState]) -> list[Row]:
    """The rows of a batch: the negative ones of those states that have one, then the positive ones of all."""
    negative = [
        Row(k, state.conditioning.negative)
        for k, state in enumerate(states)
        if state.rows == 2 and state.conditioning.negative is not None
    ]
    return [*negative, *(Row(k, state.conditioning.positive) for k, state in enumerate(states))]


def positive(states: Sequence[DenoisingState], predictions: Tensor) -> Tensor:
    """The predictions of the positive rows, one for each state; a view."""
    return predictions[len(predictions) - len(states) :]


def guided(states: Sequence[DenoisingState], predictions: Tensor, scales: Sequence[float] | None = None) -> Tensor:
    """Combines the predictions of `guidance_rows`, (rows, ...), to one for each state, (B, ...).

    negative + scale * (positive - negative), as diffusers does it; states of one row keep their prediction. *scales*
    has one for each state; without it they are the requests' guidance scales.
    """
    conditional = positive(states, predictions)
    members = [k for k, state in enumerate(states) if state.rows == 2]
    if not members:
        return conditional
    scales = scales or [state.parameters.guidance_scale for state in states]
    values = torch.tensor([scales[k] for k in members], dtype=predictions.dtype)
    scale = values.to(predictions.device, non_blocking=True).view(-1, *[1] * (predictions.ndim - 1))
    negative = predictions[: len(members)]
    if len(members) == len(states):
        return negative + scale * (conditional - negative)
    combined = conditional.clone()
    combined[members] = negative + scale * (conditional[members] - negative)
    return combined
