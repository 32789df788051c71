"""What a checkpoint of one file says of itself, and whether it is whole: obeyed, or refused by name at start."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lora_server.config import ModelConfig
from lora_server.models.declared import Declared
from lora_server.models.registry import ModelLoadError, load_model
from lora_server.models.schedulers import as_declared
from lora_server.models.single_file import SingleFile
from lora_server.models.single_file_check import check_file
from lora_server.models.weight_files import Component
from safetensors.torch import load_file, save_file

from tests import original_layout
from tests.parity import tiny_flow
from tests.parity.subjects_unet import SD1

Tensors = dict[str, torch.Tensor]
_CONV_IN = "model.diffusion_model.input_blocks.0.0.weight"
_TEXT = "cond_stage_model.transformer.text_model.encoder.layers.0.mlp.fc1.weight"
_OUT = "model.diffusion_model.out.2.bias"
_EMPTY = torch.tensor([])


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the configuration of the tiny SD 1.5."""
    root = tmp_path_factory.mktemp("words")
    SD1.build(root / "model")
    return root


@pytest.fixture(scope="module")
def tensors(root: Path) -> Tensors:
    """Its weights in the original layout."""
    return original_layout.of_sd1(SD1.pipeline(str(root / "model"), torch.float32))


def load(root: Path, tensors: Tensors, metadata: dict[str, str] | None = None, **options: Any) -> Any:
    """What the server makes of a file."""
    save_file(tensors, root / "file.safetensors", metadata=metadata)
    file = str(root / "file.safetensors")
    return load_model(ModelConfig(model=file, config_folder=root / "model", device="cpu", **options))


def without(name: str) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {each: tensor for each, tensor in tensors.items() if each != name}


def with_(name: str, tensor: torch.Tensor = _EMPTY) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {**tensors, name: tensor}


def renamed(old: str, new: str) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {new if name == old else name: tensor for name, tensor in tensors.items()}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without(_TEXT), r"text_encoder lack .*encoder\.layers\.0\.mlp\.fc1\.weight"),
        (without(_OUT), r"unet lack conv_out\.bias"),
        (without("first_stage_model.decoder.conv_in.weight"), r"vae lack decoder\.conv_in\.weight"),
        (without("first_stage_model.quant_conv.weight"), r"vae lack quant_conv\.weight"),
        (without("model.diffusion_model.time_embed.0.weight"), r"unet lack time_embedding\.linear_1\.weight"),
        (renamed(_TEXT, f"{_TEXT}s"), r"text_encoder lack .*mlp\.fc1\.weight"),
        (renamed(_OUT, f"_orig_mod.{_OUT}"), r"unet lack conv_out\.bias"),
        (with_("model.diffusion_model.output_blocks.3.2.conv.weight", torch.ones(2)), r"output_blocks\.3\.2\.conv"),
        (with_("cond_stage_model.transformer.text_model.encoder.layers.2.mlp.fc1.bias", torch.ones(2)), r"layers\.2\."),
        (with_("first_stage_model.decoder.more.weight", torch.ones(2)), r"decoder\.more\.weight"),
        (with_("lora_unet_x.lora_up.weight", torch.ones(2)), r"lora_unet_x"),
        (with_(_TEXT, torch.ones(3, 3)), r"fc1\.weight.*\[3, 3\]"),
        (with_(_OUT, torch.full((4,), torch.nan)), r"conv_out\.bias of unet .* not finite"),
        (with_(_CONV_IN, torch.ones(16, 9, 3, 3)), r"'inpainting'"),
        (with_(_CONV_IN, torch.ones(16, 8, 3, 3)), r"'instruct-pix2pix'"),
        (with_("conditioner.embedders.0.model.transformer.resblocks.9.mlp.c_proj.bias"), "'xl_refiner'"),
        (with_("single_stream_modulation.lin.weight", torch.ones(4)), "'flux-2-dev', which is not for a StableDiff"),
        (with_("edm_mean", torch.ones(4)), "edm_mean"),
        (with_("edm_vpred.sigma_max", torch.ones(1)), r"edm_vpred\.sigma_max"),
        (with_("model.diffusion_model.scaled_fp8"), "quantised.*scaled_fp8"),
        (with_("model.diffusion_model.out.2.scale_weight", torch.ones(1)), "quantised.*scale_weight"),
        (with_("model.diffusion_model.out.2.weight_scale", torch.ones(1)), "quantised.*weight_scale"),
        (with_("model.diffusion_model.out.2.input_scale", torch.ones(1)), "quantised.*input_scale"),
        (with_("model.diffusion_model.out.2.comfy_quant", torch.ones(1)), "quantised.*comfy_quant"),
        (with_("a.weight.quant_state.bitsandbytes__nf4", torch.ones(1)), "quantised.*nf4"),
        (with_(_OUT, torch.ones(4, dtype=torch.int8)), r"quantised: model.*out\.2\.bias is of type I8"),
        (with_("ztsnr"), "no v_pred"),
        (with_("model_ema.diffusion_modelout2bias", torch.ones(4)), "--variant non_ema or --variant ema"),
    ],
)
def test_a_file_that_is_not_exactly_a_model_is_refused(
    root: Path, tensors: Tensors, change: Callable[[Tensors], Tensors], message: str
) -> None:
    """Missing, renamed, surplus, of another shape, not a number, of another task or type: by name, at start."""
    with pytest.raises(ModelLoadError, match=message):
        load(root, change(tensors))


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"modelspec.prediction_type": "flow"}, "prediction_type = 'flow'"),
        ({"modelspec.architecture": "stable-diffusion-xl-v1-base"}, "stable-diffusion-xl-v1-base"),
        ({"modelspec.architecture": "flux-1-dev"}, "flux-1-dev"),
        ({"modelspec.architecture": "stable-diffusion-v1/lora"}, "no text-to-image model"),
        ({"modelspec.architecture": "stable-diffusion-v1-inpainting"}, "no text-to-image model"),
        ({"ss_base_model_version": "sdxl_base_v1-0"}, "ss_base_model_version"),
        ({"_quantization_metadata": "{}"}, "quantised.*_quantization_metadata"),
        ({"modelspec.prediction_type": "epsilon", "ss_v_parameterization": "True"}, "contradict"),
    ],
)
def test_a_header_that_names_another_model_is_refused(
    root: Path, tensors: Tensors, metadata: dict[str, str], message: str
) -> None:
    """By field and value."""
    with pytest.raises(ModelLoadError, match=message):
        load(root, tensors, metadata)


def test_tensors_and_header_must_agree(root: Path, tensors: Tensors) -> None:
    """Both are named."""
    with pytest.raises(
        ModelLoadError, match=r"tensor v_pred says v_prediction; modelspec.prediction_type says epsilon"
    ):
        load(root, with_("v_pred")(tensors), {"modelspec.prediction_type": "epsilon"})


@pytest.mark.parametrize(
    ("names", "metadata"),
    [
        (["v_pred"], {}),
        (["model.diffusion_model.v_pred"], {}),
        ([], {"modelspec.prediction_type": "v"}),
        ([], {"modelspec.prediction_type": "v_prediction"}),
        ([], {"modelspec.predict_key": "v"}),
        ([], {"ss_v_parameterization": "True"}),
        ([], {"ss_base_model_version": "sd_v2_768_v"}),
        (["v_pred"], {"modelspec.prediction_type": "v", "modelspec.architecture": "stable-diffusion-v1"}),
    ],
)
def test_a_file_that_predicts_velocity_is_served_so(
    root: Path, tensors: Tensors, names: list[str], metadata: dict[str, str]
) -> None:
    """Whatever its configuration says; the spacing of its steps stays."""
    family = load(root, {**tensors, **dict.fromkeys(names, _EMPTY)}, metadata)
    config = family._pipeline.scheduler.config
    assert (config.prediction_type, config.timestep_spacing) == ("v_prediction", "leading")


def test_words_go_before_the_configuration_both_ways() -> None:
    """Noise, where the configuration says velocity; and no word changes nothing."""
    from diffusers import DDIMScheduler, PNDMScheduler

    velocity = DDIMScheduler(prediction_type="v_prediction")
    assert as_declared(velocity, Declared("epsilon")).config.prediction_type == "epsilon"
    assert as_declared(velocity, Declared()) is velocity
    zero = as_declared(velocity, Declared(zero_terminal_snr=True))
    assert (zero.alphas_cumprod[-1].item(), zero.config.timestep_spacing) == (0, "trailing")
    with pytest.raises(ValueError, match="PNDMScheduler, has no rescale_betas_zero_snr"):
        as_declared(PNDMScheduler(), Declared("v_prediction", zero_terminal_snr=True))


def test_a_projection_that_diffusers_overwrites_must_be_what_it_writes(tmp_path: Path) -> None:
    """SD3's first encoder: the identity, whatever the file has."""
    name = "text_encoders.clip_l.transformer.text_projection.weight"
    for matrix, spare in ((torch.eye(4), {name}), (2 * torch.eye(4), set())):
        save_file({name: matrix.half()}, tmp_path / "sd3.safetensors")
        file = SingleFile(tmp_path / "sd3.safetensors", tmp_path, None)
        assert file._unit_projections({name: (4, 4)}) == spare


def test_what_belongs_to_training_is_no_surplus(root: Path, tensors: Tensors) -> None:
    """Noise levels, counters, positions and CLIP's temperature are in many checkpoints, and in no picture."""
    names = ["betas", "sqrt_one_minus_alphas_cumprod", "posterior_mean_coef1", "logvar", "global_step", "scale_factor"]
    names += ["cond_stage_model.transformer.text_model.embeddings.position_ids", "cond_stage_model.logit_scale"]
    names += ["model_ema.decay", "model_ema.num_updates", "first_stage_model.model_ema.decay"]
    levels = SD1.pipeline(str(root / "model"), torch.float32).scheduler.alphas_cumprod
    extra = {name: torch.ones(1) for name in [*names, "first_stage_model.loss.x"]}
    load(root, {**tensors, **extra, "alphas_cumprod": levels.half()})
    for other in (levels[:-1].clone(), levels**1.1, levels - levels[-1]):
        with pytest.raises(ModelLoadError, match="alphas_cumprod has other noise levels"):
            load(root, {**tensors, "alphas_cumprod": other})


def test_a_file_that_may_predict_either_needs_its_configuration(tmp_path: Path) -> None:
    """SD 2.x: diffusers would take it for 2.1, whatever it is."""
    key = "model.diffusion_model.input_blocks.2.1.transformer_blocks.0.attn2.to_k.weight"
    save_file({key: torch.ones(1, 1024)}, tmp_path / "sd2.safetensors")
    with pytest.raises(ModelLoadError, match=r"SD 2.x.*does not say which.*--model-config"):
        load_model(ModelConfig(model=str(tmp_path / "sd2.safetensors")))


def test_a_header_that_says_what_is_so_is_served(root: Path, tensors: Tensors) -> None:
    """Also with values of trainers that say nothing."""
    metadata = {
        "modelspec.architecture": "stable-diffusion-v1",
        "ss_v2": "False",
        "modelspec.prediction_type": "epsilon",
        "modelspec.predict_key": "",
    }
    assert load(root, tensors, metadata)._pipeline.scheduler.config.prediction_type == "epsilon"


def test_of_two_sets_of_weights_the_chosen_one_is_served(root: Path, tensors: Tensors) -> None:
    """A checkpoint as trained has the denoiser twice."""
    start = "model.diffusion_model."
    averaged = {
        "model_ema." + "".join(name.split(".")[1:]): tensor + 1
        for name, tensor in tensors.items()
        if name.startswith(start)
    }
    both = {**tensors, **averaged, "model_ema.decay": torch.ones(1)}
    for variant, expected in (("non_ema", 0), ("ema", 1)):
        unet = load(root, both, variant=variant).components["unet"]
        torch.testing.assert_close(unet.state_dict()["conv_out.bias"], tensors[_OUT] + expected)
    with pytest.raises(ModelLoadError, match="variants"):
        load(root, tensors, variant="ema")
    with pytest.raises(ModelLoadError, match=r"surplus|model_emadiffusion|hold model_ema"):
        load(root, {**both, "model_ema.diffusion_modelmore": torch.ones(1)}, variant="ema")


def test_plain_float8_is_cast(root: Path, tensors: Tensors) -> None:
    """Without scales it is what it says."""
    small = {name: tensor.to(torch.float8_e4m3fn) for name, tensor in tensors.items()}
    unet = load(root, small).components["unet"]
    torch.testing.assert_close(unet.state_dict()["conv_out.bias"], small[_OUT].float())


def test_the_shared_embeddings_of_t5_are_whole(tmp_path: Path) -> None:
    """SD3's files have them under one name or two; layers beyond the configuration's are surplus."""
    tiny_flow.build_flux(tmp_path)
    part = [Component("text_encoder_2", "transformers", "T5EncoderModel")]
    prefix = "text_encoders.t5xxl.transformer."
    held = load_file(tmp_path / "text_encoder_2" / "model.safetensors")
    shapes = {prefix + name: tuple(tensor.shape) for name, tensor in held.items()}
    check_file(shapes, part, tmp_path, ())
    check_file({**shapes, f"{prefix}encoder.embed_tokens.weight": shapes[f"{prefix}shared.weight"]}, part, tmp_path, ())
    with pytest.raises(ValueError, match=r"text_encoder_2 lack encoder\.final_layer_norm\.weight"):
        check_file({k: v for k, v in shapes.items() if "final_layer_norm" not in k}, part, tmp_path, ())
    with pytest.raises(ValueError, match=r"hold .*block\.7\."):
        check_file({**shapes, f"{prefix}encoder.block.7.layer.0.layer_norm.weight": (32,)}, part, tmp_path, ())


def test_links_are_files(root: Path, tensors: Tensors, tmp_path: Path) -> None:
    """As a hub's cache has them, a link named .safetensors to a blob; and the other way round."""
    save_file(tensors, tmp_path / "blob")
    os.symlink(tmp_path / "blob", tmp_path / "tiny.safetensors")
    save_file(tensors, tmp_path / "v2.safetensors")
    os.symlink(tmp_path / "v2.safetensors", tmp_path / "current")
    for link in ("tiny.safetensors", "current"):
        config = ModelConfig(model=str(tmp_path / link), config_folder=root / "model", device="cpu")
        assert load_model(config).info.name == link


def test_gguf_is_refused_for_what_it_is(tmp_path: Path) -> None:
    """Not as a pickle."""
    (tmp_path / "x.gguf").write_bytes(b"GGUF")
    with pytest.raises(ModelLoadError, match="GGUF file are quantised"):
        load_model(ModelConfig(model=str(tmp_path / "x.gguf")))
