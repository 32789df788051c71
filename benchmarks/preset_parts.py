"""The parts that published models share, at their true sizes (their config.json files)."""

from __future__ import annotations

from typing import Any


def clip_l() -> Any:
    """CLIP-L's configuration."""
    from transformers import CLIPTextConfig

    return CLIPTextConfig(
        vocab_size=49408, hidden_size=768, intermediate_size=3072, projection_dim=768,
        num_hidden_layers=12, num_attention_heads=12, hidden_act="quick_gelu",
    )  # fmt: skip


def clip_g() -> Any:
    """CLIP-G's configuration."""
    from transformers import CLIPTextConfig

    return CLIPTextConfig(
        vocab_size=49408, hidden_size=1280, intermediate_size=5120, projection_dim=1280,
        num_hidden_layers=32, num_attention_heads=20, hidden_act="gelu",
    )  # fmt: skip


def t5_xxl() -> Any:
    """The configuration of T5-XXL's encoder."""
    from transformers import T5Config

    return T5Config(
        vocab_size=32128, d_model=4096, d_kv=64, d_ff=10240, num_layers=24, num_heads=64,
        feed_forward_proj="gated-gelu", tie_word_embeddings=False,
    )  # fmt: skip


def autoencoder(**changes: Any) -> Any:
    """The autoencoder that all of them have; *changes*: latent channels, scaling, and what else differs."""
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        block_out_channels=(128, 256, 512, 512), down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4, layers_per_block=2, sample_size=1024, **changes,
    )  # fmt: skip
