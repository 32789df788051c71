"""Tiny pipelines with random weights of the true classes: FLUX.1, Qwen-Image, Z-Image, and PixArt-Sigma, which has no
family here. Tokenizers are built from an alphabet of bytes, so nothing is downloaded.

Weights are drawn wide enough for a prompt to be visible in the picture, and the last layers are never zero.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers.convert_slow_tokenizer import bytes_to_unicode

ALPHABET = list(bytes_to_unicode().values())
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def build_flux(folder: Path, *, guidance_embeds: bool = True) -> Path:
    """Saves a tiny `FluxPipeline`: dev with its guidance embedding and its dynamic shift, or schnell without both."""
    from diffusers import FluxPipeline, FluxTransformer2DModel

    torch.manual_seed(1)
    transformer = FluxTransformer2DModel(
        patch_size=1,
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        pooled_projection_dim=32,
        guidance_embeds=guidance_embeds,
        axes_dims_rope=(4, 4, 8),
    )
    pipeline = FluxPipeline(
        scheduler=_scheduler(dynamic=guidance_embeds),
        vae=_image_vae(4),
        text_encoder=_clip(),
        tokenizer=_clip_tokenizer(),
        text_encoder_2=_t5(),
        tokenizer_2=_t5_tokenizer(),
        transformer=_lively(transformer, 3.0),
    )
    return _save(pipeline, folder)


def build_qwen_image(folder: Path) -> Path:
    """Saves a tiny `QwenImagePipeline`, with the video VAE and a Qwen2.5-VL text encoder."""
    from diffusers import AutoencoderKLQwenImage, QwenImagePipeline, QwenImageTransformer2DModel

    torch.manual_seed(2)
    transformer = QwenImageTransformer2DModel(
        patch_size=2,
        in_channels=16,
        out_channels=4,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        axes_dims_rope=(4, 6, 6),
    )
    vae = AutoencoderKLQwenImage(
        base_dim=8,
        z_dim=4,
        dim_mult=[1, 2, 2, 2],
        num_res_blocks=1,
        latents_mean=[0.1, -0.2, 0.3, 0.0],
        latents_std=[1.5, 2.0, 1.0, 1.2],
    )
    pipeline = QwenImagePipeline(
        scheduler=_scheduler(dynamic=True, shift_terminal=0.02),
        vae=_lively(vae, 1.5),
        text_encoder=_lively(_qwen_vl(), 4.0),
        tokenizer=_qwen_tokenizer(),
        transformer=_lively(transformer, 3.0),
    )
    return _save(pipeline, folder)


def build_z_image(folder: Path) -> Path:
    """Saves a tiny `ZImagePipeline` with a Qwen3 text encoder."""
    from diffusers import ZImagePipeline, ZImageTransformer2DModel

    torch.manual_seed(3)
    transformer = ZImageTransformer2DModel(
        in_channels=4,
        dim=32,
        n_layers=2,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
        cap_feat_dim=32,
        axes_dims=[4, 6, 6],
        axes_lens=[256, 32, 32],
    )
    with torch.no_grad():
        for token in (transformer.x_pad_token, transformer.cap_pad_token):
            token.normal_()
    pipeline = ZImagePipeline(
        scheduler=_scheduler(dynamic=False, shift=3.0),
        vae=_image_vae(4),
        text_encoder=_lively(_qwen3()),
        tokenizer=_qwen_tokenizer(),
        transformer=_lively(transformer),
    )
    return _save(pipeline, folder)


def build_pixart(folder: Path) -> Path:
    """Saves a tiny `PixArtSigmaPipeline`, which the server only knows as a diffusers pipeline."""
    from diffusers import DPMSolverMultistepScheduler, PixArtSigmaPipeline, PixArtTransformer2DModel

    torch.manual_seed(4)
    transformer = PixArtTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=4,
        out_channels=8,
        num_layers=2,
        cross_attention_dim=32,
        sample_size=16,
        patch_size=2,
        caption_channels=32,
        use_additional_conditions=False,
    )
    vae = _image_vae(4)
    vae.register_to_config(shift_factor=None)
    pipeline = PixArtSigmaPipeline(
        tokenizer=_t5_tokenizer(),
        text_encoder=_t5(),
        vae=vae,
        transformer=_lively(transformer),
        scheduler=DPMSolverMultistepScheduler(),
    )
    return _save(pipeline, folder)


def _save(pipeline: Any, folder: Path) -> Path:
    pipeline.save_pretrained(folder, safe_serialization=True)
    return folder


def _lively(module: Any, factor: float = 2.0) -> Any:
    """Widens the weights of linears and convolutions, so that what goes in is seen in what comes out."""
    with torch.no_grad():
        for part in module.modules():
            if isinstance(part, torch.nn.Linear | torch.nn.Conv2d | torch.nn.Conv3d):
                if not part.weight.any():
                    torch.nn.init.xavier_uniform_(part.weight)
                part.weight.mul_(factor)
    return module


def _scheduler(*, dynamic: bool, **config: Any) -> Any:
    from diffusers import FlowMatchEulerDiscreteScheduler

    return FlowMatchEulerDiscreteScheduler(
        use_dynamic_shifting=dynamic, max_image_seq_len=256, base_image_seq_len=16, **config
    )


def _image_vae(latent_channels: int) -> Any:
    from diffusers import AutoencoderKL

    vae = AutoencoderKL(
        down_block_types=["DownEncoderBlock2D"] * 4,
        up_block_types=["UpDecoderBlock2D"] * 4,
        block_out_channels=[8, 8, 16, 16],
        layers_per_block=1,
        latent_channels=latent_channels,
        norm_num_groups=4,
        use_quant_conv=False,
        use_post_quant_conv=False,
        shift_factor=0.11,
        scaling_factor=0.36,
    )
    return _lively(vae, 1.5)


def _clip() -> Any:
    from transformers import CLIPTextConfig, CLIPTextModel

    config = CLIPTextConfig(
        vocab_size=2 * len(ALPHABET) + 2,
        hidden_size=32,
        intermediate_size=37,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=40,
        bos_token_id=2 * len(ALPHABET),
        eos_token_id=2 * len(ALPHABET) + 1,
    )
    return _lively(CLIPTextModel(config), 4.0)


def _t5() -> Any:
    from transformers import T5Config, T5EncoderModel

    config = T5Config(
        vocab_size=len(_t5_pieces()),
        d_model=32,
        d_kv=8,
        d_ff=37,
        num_layers=2,
        num_heads=4,
        feed_forward_proj="gated-gelu",
    )
    return T5EncoderModel(config)


def _qwen_vl() -> Any:
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    text = {
        "vocab_size": len(ALPHABET) + 4,
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "rope_scaling": {"mrope_section": [2, 3, 3], "rope_type": "default", "type": "default"},
        "rope_theta": 1000000.0,
    }
    vision = {
        "depth": 1,
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_heads": 2,
        "out_hidden_size": 32,
        "fullatt_block_indexes": [0],
    }
    return Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(text_config=text, vision_config=vision))


def _qwen3() -> Any:
    from transformers import Qwen3Config, Qwen3Model

    return Qwen3Model(
        Qwen3Config(
            vocab_size=len(ALPHABET) + 4,
            hidden_size=32,
            intermediate_size=32,
            num_hidden_layers=3,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=16,
        )
    )


def _clip_tokenizer() -> Any:
    from transformers import CLIPTokenizer

    vocab = [*ALPHABET, *(letter + "</w>" for letter in ALPHABET), "<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(vocab={piece: k for k, piece in enumerate(vocab)}, merges=[], model_max_length=40)


def _t5_pieces() -> list[tuple[str, float]]:
    letters = "abcdefghijklmnopqrstuvwxyz0123456789.,'-"
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("\u2581", -6.0)]
    return [*pieces, *((letter, -9.0) for letter in letters)]


def _t5_tokenizer() -> Any:
    from transformers import T5TokenizerFast

    return T5TokenizerFast(vocab=_t5_pieces(), extra_ids=0, model_max_length=40)


def _qwen_tokenizer() -> Any:
    from transformers import Qwen2Tokenizer

    # With one token for most of its system prompt, Qwen-Image's template has the 34 tokens that the pipeline drops.
    system = (
        "Describe the image by detailing the color, shape, size, texture, quantity, text, spatial relationships of the"
    )
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", system + " object"]
    vocab = {piece: k for k, piece in enumerate([*ALPHABET, *special])}
    tokenizer = Qwen2Tokenizer(vocab=vocab, merges=[], model_max_length=2048, extra_special_tokens=special[1:])
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer
