"""FLUX's attention with q, k and v projected together, so that their adapters share one product with the input.

The arithmetic is that of diffusers' FluxAttnProcessor, which the parity tests hold it to; the one difference is that
three linears which read one input are asked at once.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers.models.embeddings import apply_rotary_emb
from torch import Tensor
from torch.nn import functional

from lora_server.models.lora_linear import project_together


class FluxAttention:
    """A processor for diffusers' `FluxAttention`, of two streams (text before image) and of one."""

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        image_rotary_emb: Any = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Returns the attended image tokens, (B, N, C), and text tokens, (B, T, C); of one stream, all together."""
        query, key, value = _heads(attn, project_together((attn.to_q, attn.to_k, attn.to_v), hidden_states))
        query, key = attn.norm_q(query), attn.norm_k(key)
        if encoder_hidden_states is not None:
            linears = (attn.add_q_proj, attn.add_k_proj, attn.add_v_proj)
            text_query, text_key, text_value = _heads(attn, project_together(linears, encoder_hidden_states))
            query = torch.cat([attn.norm_added_q(text_query), query], dim=1)
            key = torch.cat([attn.norm_added_k(text_key), key], dim=1)
            value = torch.cat([text_value, value], dim=1)
        if image_rotary_emb is not None:
            query, key = (apply_rotary_emb(each, image_rotary_emb, sequence_dim=1) for each in (query, key))
        query, key, value = (each.transpose(1, 2) for each in (query, key, value))
        mixed = functional.scaled_dot_product_attention(query, key, value, attn_mask=attention_mask)
        tokens = mixed.transpose(1, 2).flatten(2)
        if encoder_hidden_states is None:
            return tokens
        text, image = tokens.split([encoder_hidden_states.shape[1], hidden_states.shape[1]], dim=1)
        return attn.to_out[1](attn.to_out[0](image)), attn.to_add_out(text)


def _heads(attn: Any, projected: tuple[Tensor, ...]) -> list[Tensor]:
    """Splits each (B, T, C) into heads, (B, T, heads, C / heads)."""
    return [each.unflatten(-1, (-1, attn.head_dim)) for each in projected]
