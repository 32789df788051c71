"""SD3's joint attention with q, k and v projected together, so that their adapters share one product with the input.

The arithmetic is that of diffusers' JointAttnProcessor2_0 (Esser et al. 2024, section 4), which the parity tests hold
it to; the one difference is that three linears which read one input are asked at once.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from lora_server.models.lora_linear import project_together


class JointAttention:
    """A processor for diffusers' `Attention`, image tokens first, text tokens behind them."""

    def __call__(
        self, attn: Any, hidden_states: Tensor, encoder_hidden_states: Tensor | None = None, **_: Any
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Returns the attended image tokens, (B, N, C), and the text tokens, (B, T, C), if there are any."""
        query, key, value = _heads(attn, project_together((attn.to_q, attn.to_k, attn.to_v), hidden_states))
        query, key = _normed(attn.norm_q, query), _normed(attn.norm_k, key)
        if encoder_hidden_states is not None:
            linears = (attn.add_q_proj, attn.add_k_proj, attn.add_v_proj)
            text_query, text_key, text_value = _heads(attn, project_together(linears, encoder_hidden_states))
            query = torch.cat([query, _normed(attn.norm_added_q, text_query)], dim=2)
            key = torch.cat([key, _normed(attn.norm_added_k, text_key)], dim=2)
            value = torch.cat([value, text_value], dim=2)
        mixed = functional.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)
        image_tokens = hidden_states.shape[1]
        image: Tensor = attn.to_out[1](attn.to_out[0](mixed[:, :image_tokens]))
        if encoder_hidden_states is None:
            return image
        text = mixed[:, image_tokens:]
        return image, text if attn.context_pre_only else attn.to_add_out(text)


def _heads(attn: Any, projected: tuple[Tensor, ...]) -> list[Tensor]:
    """Splits each (B, T, C) into heads, (B, heads, T, C / heads)."""
    return [each.unflatten(-1, (attn.heads, -1)).transpose(1, 2) for each in projected]


def _normed(norm: Any, tokens: Tensor) -> Tensor:
    if norm is None:
        return tokens
    normed: Tensor = norm(tokens)
    return normed
