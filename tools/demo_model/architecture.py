"""The parts of the embedded model: the classes of Stable Diffusion 3.5, small."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel
from transformers import (
    CLIPTextConfig,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5TokenizerFast,
)

from tools.demo_model.scenes import SIDE_PX
from tools.demo_model.tokenizers import MAX_TOKENS, clip_tokenizer, t5_tokenizer

LATENT_CHANNELS = 16
_CLIP_WIDTH = 48
_T5_WIDTH = 96


def build_vae() -> AutoencoderKL:
    """The autoencoder: 8x smaller sides, 16 channels, no attention in the middle."""
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(24, 48, 64, 64),
        layers_per_block=1,
        latent_channels=LATENT_CHANNELS,
        norm_num_groups=8,
        sample_size=SIDE_PX,
        mid_block_add_attention=False,
        use_quant_conv=False,
        use_post_quant_conv=False,
        scaling_factor=1.0,
        shift_factor=0.0,
    )


def build_transformer() -> SD3Transformer2DModel:
    """The denoiser: six joint blocks of width 160, dual attention in the first three, RMS-normed queries and keys."""
    return SD3Transformer2DModel(
        sample_size=SIDE_PX // 8,
        patch_size=2,
        in_channels=LATENT_CHANNELS,
        num_layers=6,
        attention_head_dim=40,
        num_attention_heads=4,
        joint_attention_dim=_T5_WIDTH,
        caption_projection_dim=160,
        pooled_projection_dim=2 * _CLIP_WIDTH,
        out_channels=LATENT_CHANNELS,
        pos_embed_max_size=24,
        dual_attention_layers=(0, 1, 2),
        qk_norm="rms_norm",
    )


def build_clip(tokenizer: CLIPTokenizer) -> CLIPTextModelWithProjection:
    """One of the two CLIP text encoders, two layers of width 48."""
    return CLIPTextModelWithProjection(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=_CLIP_WIDTH,
            intermediate_size=4 * _CLIP_WIDTH,
            projection_dim=_CLIP_WIDTH,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=MAX_TOKENS,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def build_t5(tokenizer: T5TokenizerFast) -> T5EncoderModel:
    """The T5 encoder, two layers of width 96."""
    return T5EncoderModel(
        T5Config(
            vocab_size=len(tokenizer),
            d_model=_T5_WIDTH,
            d_kv=24,
            d_ff=192,
            num_layers=2,
            num_heads=4,
            dropout_rate=0.0,
            feed_forward_proj="gated-gelu",
            pad_token_id=0,
            eos_token_id=1,
            decoder_start_token_id=0,
        )
    )


@dataclass
class Conditioner:
    """Tokenizers and text encoders, joined the way `StableDiffusion3Pipeline.encode_prompt` joins them."""

    tokenizers: tuple[CLIPTokenizer, CLIPTokenizer, T5TokenizerFast]
    encoders: torch.nn.ModuleList

    @classmethod
    def build(cls) -> Conditioner:
        """New encoders with random weights."""
        clips, t5 = (clip_tokenizer(), clip_tokenizer()), t5_tokenizer()
        encoders = [build_clip(clips[0]), build_clip(clips[1]), build_t5(t5)]
        return cls((*clips, t5), torch.nn.ModuleList(encoders))

    def token_ids(self, captions: list[str]) -> torch.Tensor:
        """Returns (B, 3, MAX_TOKENS) token ids of each caption for the three encoders."""
        rows = [
            tokenizer(
                captions, padding="max_length", max_length=MAX_TOKENS, truncation=True, return_tensors="pt"
            ).input_ids
            for tokenizer in self.tokenizers
        ]
        return torch.stack(rows, dim=1)

    def __call__(self, token_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns token embeddings (B, 2 * MAX_TOKENS, 96) and pooled embeddings (B, 96)."""
        first = self.encoders[0](token_ids[:, 0], output_hidden_states=True)
        second = self.encoders[1](token_ids[:, 1], output_hidden_states=True)
        t5 = self.encoders[2](token_ids[:, 2])[0]
        clip = torch.cat([first.hidden_states[-2], second.hidden_states[-2]], dim=-1)
        clip = torch.nn.functional.pad(clip, (0, t5.shape[-1] - clip.shape[-1]))
        return torch.cat([clip, t5], dim=1), torch.cat([first[0], second[0]], dim=-1)


def build_scheduler() -> FlowMatchEulerDiscreteScheduler:
    """Rectified flow, with the timestep shift of SD3."""
    return FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000, shift=3.0)
