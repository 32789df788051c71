"""What a file says of its model is obeyed: another model's file is refused, and words that nobody knows are told."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from lora_server.adapters.formats.declared import family_of_words
from lora_server.adapters.formats.families import family_of
from lora_server.adapters.formats.inspection import Inspection, Serving
from lora_server.adapters.loader import AdapterLoader
from lora_server.adapters.roots import AdapterRoots
from lora_server.config import LimitsConfig
from lora_server.errors import AdapterIncompatibleError
from lora_server.models.base import adapter_targets
from safetensors.torch import save_file

from tests.dialects import dotted, write_lora
from tests.factories import TinyNet

WORDS: dict[str, list[str]] = {
    "flux2": [
        "flux-2-dev/lora", "Flux.2-klein-4B", "flux2_klein_9b", "flux2", "FLUX.2-dev", "flux-2-klein-base", "flux_2",
    ],
    "flux": [
        "flux-1-dev/lora", "flux1", "flux", "Flux.1-dev", "flux-1-schnell", "flux_kontext", "flux1-fill-dev",
    ],
    "chroma": ["chroma", "Chroma1-HD", "chroma-radiance"],
    "sdxl": ["stable-diffusion-xl-v1-base/lora", "sdxl_base_v1-0", "sdxl_1.0", "SDXL", "stable-diffusion-xl-base-1.0"],
    "sdxl-refiner": ["stable-diffusion-xl-v1-refiner", "sdxl_refiner_v1-0"],
    "sd1": ["stable-diffusion-v1/lora", "sd_v1", "sd_1.5", "stable-diffusion-v1-5", "sd1.5"],
    "sd2": ["stable-diffusion-v2-768-v/lora", "sd_v2", "sd_v2_v", "stable-diffusion-2-1", "sd2"],
    "sd3": ["stable-diffusion-3-medium", "sd3.5-large", "sd3_m", "stable-diffusion-3.5-large/lora", "sd3"],
    "qwen-image": ["qwen-image", "qwen_image_edit", "Qwen-Image-Edit-2509", "qwen_image:2512"],
    "z-image": ["z-image", "zimage:turbo", "Z-Image-Turbo", "z_image_turbo"],
    "wan": ["wan2.1", "wan21:14b", "Wan2.2-I2V-A14B", "wan"],
    "hunyuan-video": ["hunyuan-video", "hunyuan_video"],
    "lumina": ["lumina-2", "lumina2"],
}  # fmt: skip
UNKNOWN = ["something-new/lora", "my merge", "anima", "flu", "1", "x" * 1000, "\x1b[31m", "stable-diffusion"]
TENSORS = write_lora(
    {"blocks.0.to_q": (6, 6)}, dotted("transformer.", "lora_A", "lora_B"), alpha_of=lambda _: None
).tensors


def load(place: Path, family: str, *, allow_partial: bool = False) -> tuple[str, ...]:
    """The warnings of a load for a model of *family*, after a report without a server has said the same."""
    targets = adapter_targets({"transformer": TinyNet()})
    loader = AdapterLoader(
        AdapterRoots([Path("/")]), targets, ("m", family, "transformer"), torch.float32, LimitsConfig()
    )
    report = (loader.load_partial if allow_partial else loader.load)(place).report
    assert report is not None
    assert Inspection(place, Serving(loader.served), allow_partial=allow_partial).report().warnings == report.warnings
    return report.warnings


def bare(folder: Path, **metadata: str) -> Path:
    """A file that fits the model, with a header."""
    place = folder / "x.safetensors"
    save_file(TENSORS, place, {key.replace("__", "."): value for key, value in metadata.items()})
    return place


@pytest.mark.parametrize("family", WORDS)
def test_the_words_of_a_family(family: str) -> None:
    """As specifications and trainers write them."""
    assert {text: family_of_words(text) for text in WORDS[family]} == dict.fromkeys(WORDS[family], family)


@pytest.mark.parametrize(
    "served", ["flux", "sdxl", "sd1", "sd2", "sd3", "qwen-image", "z-image", "Chroma", "Flux2", "Wan"]
)
def test_a_file_for_another_model_is_refused_whatever_fits(tmp_path: Path, served: str) -> None:
    """By either field of the header; both models are named, allowed to leave things out or not."""
    own = family_of_words(served)
    for family, words in WORDS.items():
        for field in ("modelspec__architecture", "ss_base_model_version"):
            place = bare(tmp_path, **{field: words[0]})
            if family == own:
                assert load(place, served) == ()
                continue
            for allow_partial in (False, True):
                with pytest.raises(AdapterIncompatibleError) as refused:
                    load(place, served, allow_partial=allow_partial)
            facts = refused.value.metadata
            assert facts["key"] == field.replace("__", ".")
            assert facts["adapter_family"] != facts["model_family"]
            assert words[0] in str(refused.value)


@pytest.mark.parametrize("words", UNKNOWN)
def test_unknown_words_pass_with_a_warning(tmp_path: Path, words: str) -> None:
    """Names and shapes are checked as ever; the report says what was not."""
    (warning,) = load(bare(tmp_path, modelspec__architecture=words), "flux")
    assert "not known" in warning
    assert "\x1b" not in warning
    assert len(warning) <= 400
    assert load(bare(tmp_path, modelspec__architecture=words), "") == ()


def test_of_a_served_model_that_nobody_knows_nothing_can_be_told(tmp_path: Path) -> None:
    """No refusal, but a word."""
    assert "cannot be told" in load(bare(tmp_path, modelspec__architecture="flux-1-dev"), "BrandNew")[0]


BASES = {
    "black-forest-labs/FLUX.1-dev": "flux", "black-forest-labs/FLUX.2-klein-4B": "flux2",
    "Qwen/Qwen-Image": "qwen-image", "stabilityai/stable-diffusion-xl-base-1.0": "sdxl",
    "stable-diffusion-v1-5/stable-diffusion-v1-5": "sd1",
    "Tongyi-MAI/Z-Image-Turbo": "z-image", "lodestones/Chroma1-HD": "chroma", "Wan-AI/Wan2.1-T2V-14B-Diffusers": "wan",
    "me/FLUX.1-dev-but-sdxl": None, "/home/me/FLUX.1-dev": None, "FLUX.1-dev": None, "stabilityai/sd-turbo": None,
}  # fmt: skip


@pytest.mark.parametrize("base", BASES)
def test_the_base_of_a_configuration_counts_if_it_is_a_publishers(tmp_path: Path, base: str) -> None:
    """Anybody else's repository, or a folder, may be called anything."""
    config = {
        "peft_type": "LORA",
        "r": 4,
        "lora_alpha": 4,
        "target_modules": ["blocks.0.to_q"],
        "base_model_name_or_path": base,
    }
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    save_file(TENSORS, tmp_path / "adapter_model.safetensors")
    if BASES[base] in (None, "flux"):
        assert load(tmp_path, "flux") == ()
        return
    with pytest.raises(AdapterIncompatibleError) as refused:
        load(tmp_path, "flux")
    assert refused.value.metadata["model_family"] == "FLUX.1"


KEYS = {
    "diffusers' FLUX.2": {"transformer.single_transformer_blocks.0.attn.to_qkv_mlp_proj.lora_A.weight": (4, 3072)},
    "its feed-forward": {"transformer.transformer_blocks.0.ff.linear_in.lora_A.weight": (4, 3072)},
    "its modulation": {"diffusion_model.single_stream_modulation.lin.lora_A.weight": (4, 6144)},
    "dev": {"diffusion_model.double_blocks.0.img_attn.qkv.lora_A.weight": (4, 6144)},
    "klein 9B": {"lora_unet_single_blocks_0_linear1.lora_down.weight": (4, 4096)},
}


@pytest.mark.parametrize("case", KEYS)
def test_flux_2_is_told_by_names_and_widths(tmp_path: Path, case: str) -> None:
    """Beside tensors that fit, too, though the load might leave the rest out."""
    assert family_of(KEYS[case]) == "flux2"
    odd = {key: torch.zeros(shape) for key, shape in KEYS[case].items()}
    save_file(TENSORS | odd, tmp_path / "x.safetensors")
    with pytest.raises(AdapterIncompatibleError, match=r"FLUX\.2.*FLUX\.1"):
        load(tmp_path / "x.safetensors", "flux", allow_partial=True)


def test_a_refiners_file_is_told_by_its_text() -> None:
    """Its cross-attention reads 1280 features."""
    name = "lora_unet_input_blocks_4_1_transformer_blocks_0_attn2_to_k.lora_down.weight"
    assert family_of({name: (4, 1280)}) == "sdxl-refiner"
