"""A UNet's attention with q, k and v projected together, so that their adapters share one product with the input.

The arithmetic is that of diffusers' AttnProcessor2_0, without the branches that blocks of text-to-image UNets do not
take; the parity tests hold it to that.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn import functional

from lora_server.models.lora_linear import project_together


class UNetAttention:
    """A processor for the `Attention` of a `BasicTransformerBlock`: among the image's tokens, or from them to the text.

    UNets of text-to-image pipelines give it no mask.
    """

    def __call__(
        self, attn: Any, hidden_states: Tensor, encoder_hidden_states: Tensor | None = None, **_: Any
    ) -> Tensor:
        """Returns the attended image tokens, (B, N, C)."""
        if encoder_hidden_states is None:
            projected = project_together((attn.to_q, attn.to_k, attn.to_v), hidden_states)
        else:
            projected = (attn.to_q(hidden_states), *project_together((attn.to_k, attn.to_v), encoder_hidden_states))
        query, key, value = (each.unflatten(-1, (attn.heads, -1)).transpose(1, 2) for each in projected)
        mixed = functional.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)
        attended: Tensor = attn.to_out[1](attn.to_out[0](mixed))
        return attended


def project_attention_together(unet: nn.Module) -> None:
    """Gives the processor to every attention of *unet* whose arithmetic it knows; leaves the others theirs."""
    blocks = (block for block in unet.modules() if type(block).__name__ == "BasicTransformerBlock")
    for attention in (each for block in blocks for name, each in block.named_children() if name in ("attn1", "attn2")):
        if _is_plain(attention):
            attention.set_processor(UNetAttention())  # type: ignore[operator]


def _is_plain(attn: Any) -> bool:
    extras = (attn.spatial_norm, attn.group_norm, attn.norm_cross, attn.norm_q, attn.norm_k, attn.residual_connection)
    return type(attn.processor).__name__ == "AttnProcessor2_0" and not any(extras) and attn.rescale_output_factor == 1
