"""A model's folder is held to its files: every component whole, of the class named, in the variant asked for."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lora_server.config import ModelConfig, ServerConfig
from lora_server.demo.paths import model_dir
from lora_server.models.registry import ModelLoadError, load_model
from lora_server.preflight import content_faults
from safetensors.torch import load_file, save_file

from tests.parity import tiny_flow
from tests.parity.subjects_unet import SD1, SDXL

Tensors = dict[str, torch.Tensor]
_TEXT_NAME = "text_model.encoder.layers.0.mlp.fc1.weight"


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tiny models of three families, by name."""
    root = tmp_path_factory.mktemp("models")
    SD1.build(root / "sd1")
    SDXL.build(root / "sdxl")
    tiny_flow.build_flux(root / "flux")
    shutil.copytree(model_dir(), root / "sd3")
    return root


@pytest.fixture
def copy(models: Path, tmp_path: Path) -> Callable[[str], Path]:
    """Copies one of them, to be changed."""
    return lambda name: Path(shutil.copytree(models / name, tmp_path / name))


def load(folder: Path, **options: Any) -> Any:
    return load_model(ModelConfig(model=str(folder), device="cpu", **options))


def refused(folder: Path, message: str, *, at_check: bool, **options: Any) -> None:
    """Refused at start; *at_check*: by `check-config` too, which reads names and headers only."""
    config = ModelConfig(model=str(folder), device="cpu", **options)
    with pytest.raises(ModelLoadError, match=message):
        load_model(config)
    faults = content_faults(ServerConfig(model=config))
    assert bool(faults) is at_check, faults


def rewrite(folder: Path, change: Callable[[Tensors], Tensors], metadata: dict[str, str] | None = None) -> None:
    """Changes the tensors of a component's first file."""
    file = min(folder.glob("*.safetensors"))
    save_file(change(load_file(file)), file, metadata={"format": "pt", **(metadata or {})})


def without(part: str) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {name: each for name, each in tensors.items() if part not in name}


def with_(name: str, tensor: torch.Tensor) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {**tensors, name: tensor}


def configure(folder: Path, **changes: Any) -> None:
    """Changes a component's configuration."""
    file = next(path for path in (folder / "config.json", folder / "scheduler_config.json") if path.exists())
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


@pytest.mark.parametrize(
    ("model", "component", "part"),
    [
        ("sd3", "text_encoder", _TEXT_NAME),
        ("sd3", "text_encoder_2", "text_projection.weight"),
        ("sd3", "transformer", "transformer_blocks.0.attn.to_q.weight"),
        ("sd3", "vae", "decoder.conv_in.bias"),
        ("sdxl", "unet", "add_embedding.linear_1.weight"),
        ("sdxl", "text_encoder_2", "layers.1.self_attn.q_proj.bias"),
        ("flux", "text_encoder_2", "encoder.block.0.layer.0.SelfAttention.q.weight"),
        ("flux", "transformer", "proj_out.weight"),
    ],
)
def test_a_missing_tensor_is_refused_by_name(
    copy: Callable[[str], Path], model: str, component: str, part: str
) -> None:
    """Of any component, and of a shard whose index names it."""
    folder = copy(model)
    rewrite(folder / component, without(part))
    refused(folder, f"weights of {component} lack .*{part}", at_check=False)


def test_an_encoder_without_embeddings_is_refused(copy: Callable[[str], Path]) -> None:
    """T5 has them under two names, one of which suffices."""
    folder = copy("flux")
    kept = load_file(folder / "text_encoder_2" / "model.safetensors")["shared.weight"]
    for name in ("shared.weight", "encoder.embed_tokens.weight"):
        rewrite(folder / "text_encoder_2", lambda tensors: without("embed_tokens")(without("shared")(tensors)))
        rewrite(folder / "text_encoder_2", with_(name, kept))
        encoder = load(folder).components["text_encoder_2"]
        torch.testing.assert_close(encoder.encoder.embed_tokens.weight, kept, rtol=0, atol=0)
    rewrite(folder / "text_encoder_2", lambda tensors: without("embed_tokens")(without("shared")(tensors)))
    refused(folder, r"text_encoder_2 lack .*(shared|embed_tokens)", at_check=False)


@pytest.mark.parametrize("component", ["text_encoder", "transformer", "vae"])
def test_a_renamed_or_surplus_tensor_is_refused_by_name(copy: Callable[[str], Path], component: str) -> None:
    """A prefix is a name, too; positions that count are no weights."""
    folder = copy("sd3")
    rewrite(folder / component, with_("more.weight", torch.ones(2)))
    refused(folder, f"weights of {component} hold more.weight", at_check=False)
    rewrite(folder / component, lambda tensors: {f"module.{name}": each for name, each in tensors.items()})
    refused(folder, f"weights of {component} lack .*hold module", at_check=False)


def test_positions_are_no_surplus(copy: Callable[[str], Path]) -> None:
    """Old files of CLIP have them."""
    folder = copy("sd3")
    rewrite(folder / "text_encoder", with_("text_model.embeddings.position_ids", torch.arange(20)[None]))
    load(folder)


def test_what_clip_compares_with_images_is_no_surplus(copy: Callable[[str], Path]) -> None:
    """Files of the encoder alone, which people put into folders, keep CLIP's projection; the class ends before it."""
    folder = copy("sd1")
    rewrite(folder / "text_encoder", with_("text_projection.weight", torch.eye(16)))
    rewrite(folder / "text_encoder", with_("logit_scale", torch.ones(())))
    load(folder)


@pytest.mark.parametrize("prediction_type", ["epsilon", "flow_prediction"])
def test_a_flow_may_say_that_it_is_one(copy: Callable[[str], Path], prediction_type: str) -> None:
    """diffusers' `from_config` keeps what other schedulers' files said; of noise it is their default."""
    folder = copy("sd3")
    configure(folder / "scheduler", prediction_type=prediction_type)
    load(folder)
    configure(folder / "scheduler", prediction_type="v_prediction")
    refused(folder, "FlowMatchEulerDiscreteScheduler, which has no prediction_type", at_check=False)


@pytest.mark.parametrize("component", ["text_encoder", "transformer", "vae"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_value_that_is_not_finite_is_refused(copy: Callable[[str], Path], component: str, value: float) -> None:
    """With its tensor."""

    def spoil(tensors: Tensors) -> Tensors:
        name = min(name for name in tensors if name.endswith("bias"))
        return {**tensors, name: tensors[name].index_fill(0, torch.tensor([1]), value)}

    folder = copy("sd3")
    rewrite(folder / component, spoil)
    refused(folder, f"bias of {component} has values that are not finite in float32", at_check=False)


def test_values_beyond_a_half_type_are_refused(copy: Callable[[str], Path]) -> None:
    """They are numbers in the file, and infinite in float16."""
    folder = copy("sd3")
    bias = load_file(folder / "vae" / "diffusion_pytorch_model.safetensors")["decoder.conv_in.bias"]
    rewrite(folder / "vae", with_("decoder.conv_in.bias", torch.full_like(bias, 1e6)))
    load(folder)
    with pytest.raises(ModelLoadError, match=r"decoder.conv_in.bias of vae .*float16"):
        load(folder, dtype="float16")


@pytest.mark.parametrize(
    ("component", "name"),
    [("vae", "decoder.conv_in.bias"), ("text_encoder", "text_model.encoder.layers.0.mlp.fc1.bias")],
)
def test_another_shape_is_refused(copy: Callable[[str], Path], component: str, name: str) -> None:
    """By each library's loader."""
    folder = copy("sd3")
    rewrite(folder / component, with_(name, torch.ones(3)))
    refused(folder, rf"{name} .*\[3\]", at_check=False)


def shard(folder: Path, class_name: str, library: str) -> None:
    """Saves a component in shards."""
    import diffusers
    import transformers

    module = getattr({"diffusers": diffusers, "transformers": transformers}[library], class_name).from_pretrained(
        folder
    )
    for file in folder.glob("*.safetensors"):
        file.unlink()
    module.save_pretrained(folder, max_shard_size="100KB")


@pytest.mark.parametrize(
    ("component", "class_name", "library"),
    [
        ("transformer", "SD3Transformer2DModel", "diffusers"),
        ("text_encoder", "CLIPTextModelWithProjection", "transformers"),
    ],
)
def test_shards_are_held_to_their_index(
    copy: Callable[[str], Path], component: str, class_name: str, library: str
) -> None:
    """Whole they are served; a shard, or a tensor of one, that is not there is refused by name."""
    folder = copy("sd3")
    shard(folder / component, class_name, library)
    files = sorted((folder / component).glob("*.safetensors"))
    assert len(files) > 1
    load(folder)
    tensors = load_file(files[0])
    lost = next(name for name, tensor in tensors.items() if tensor.numel())
    save_file(without(lost)(tensors), files[0], metadata={"format": "pt"})
    refused(folder, rf"{component}: the shard {files[0].name} lacks {lost}", at_check=True)
    save_file({**tensors, "more.weight": torch.ones(1)}, files[0], metadata={"format": "pt"})
    refused(folder, rf"{component}: the shard {files[0].name} holds more.weight", at_check=True)
    files[1].unlink()
    refused(folder, rf"weights of {component} lack the shard {files[1].name}", at_check=True)


def vary(folder: Path, variant: str, *components: str, keep: bool = False) -> None:
    """Renames, or copies, weights to a variant."""
    for component in components:
        for file in list((folder / component).glob("*.safetensors")):
            target = file.with_name(file.name.replace(".safetensors", f".{variant}.safetensors"))
            (shutil.copy if keep else shutil.move)(file, target)


_ALL = ("text_encoder", "text_encoder_2", "transformer", "vae")


def test_the_only_variant_is_found(copy: Callable[[str], Path]) -> None:
    """In the whole folder and in one component; said, it is taken, and so are plain files where there is no other."""
    folder = copy("sd3")
    vary(folder, "fp16", "vae")
    load(folder)
    load(folder, variant="fp16")
    refused(folder, "no component has weights of the variant 'bf16'.* there are fp16", at_check=True, variant="bf16")
    vary(folder, "fp16", *(each for each in _ALL if each != "vae"))
    load(folder)


def test_plain_weights_go_before_variants(copy: Callable[[str], Path]) -> None:
    """Unless one is asked for; of several and no word, none is guessed."""
    folder = copy("sd3")
    vary(folder, "fp16", "vae", keep=True)
    file = folder / "vae" / "diffusion_pytorch_model.fp16.safetensors"
    plain = load_file(file)["decoder.conv_in.bias"]
    save_file({**load_file(file), "decoder.conv_in.bias": plain + 1}, file, metadata={"format": "pt"})

    def bias(**options: Any) -> torch.Tensor:
        return load(folder, **options)._pipeline.vae.state_dict()["decoder.conv_in.bias"]

    torch.testing.assert_close(bias(), plain.float())
    torch.testing.assert_close(bias(variant="fp16"), (plain + 1).float())
    (folder / "vae" / "diffusion_pytorch_model.safetensors").rename(
        folder / "vae" / "diffusion_pytorch_model.non_ema.safetensors"
    )
    refused(folder, r"vae are there as the variants fp16, non_ema only: say which \(--variant\)", at_check=True)
    torch.testing.assert_close(bias(variant="non_ema"), plain.float())


def test_shards_of_a_variant_are_found(copy: Callable[[str], Path]) -> None:
    """With the index that the library writes for them."""
    from diffusers import SD3Transformer2DModel

    folder = copy("sd3")
    network = SD3Transformer2DModel.from_pretrained(folder / "transformer")
    (folder / "transformer" / "diffusion_pytorch_model.safetensors").unlink()
    network.save_pretrained(folder / "transformer", variant="fp16", max_shard_size="500KB")
    load(folder)


def test_pickles_are_refused_with_what_to_do(copy: Callable[[str], Path]) -> None:
    """And weights under a name that nobody looks for."""
    folder = copy("sd3")
    file = folder / "vae" / "diffusion_pytorch_model.safetensors"
    file.rename(file.with_suffix(".bin"))
    refused(folder, r"vae are there as diffusion_pytorch_model.bin only .*convert", at_check=True)
    file.with_suffix(".bin").rename(folder / "vae" / "model.safetensors")
    refused(folder, r"vae has no weights: .*diffusion_pytorch_model.safetensors.*there is model.safe", at_check=True)


def test_a_snapshot_of_links_is_a_folder(models: Path, tmp_path: Path) -> None:
    """As the hub's cache has it; a link to nothing is named."""
    for file in (models / "sd3").rglob("*.*"):
        link = tmp_path / "snapshot" / file.relative_to(models / "sd3")
        link.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(file, blob := tmp_path / f"blob{abs(hash(file))}")
        os.symlink(blob, link)
    load(tmp_path / "snapshot")
    broken = tmp_path / "snapshot" / "vae" / "diffusion_pytorch_model.safetensors"
    os.remove(broken.resolve())
    refused(tmp_path / "snapshot", "vae/diffusion_pytorch_model.safetensors is a link to nothing", at_check=True)


def test_a_file_that_is_cut_short_is_refused(copy: Callable[[str], Path]) -> None:
    """With its component."""
    folder = copy("sd3")
    file = folder / "vae" / "diffusion_pytorch_model.safetensors"
    for size in (file.stat().st_size - 1, 300, 0):
        os.truncate(file, size)
        refused(folder, "vae: diffusion_pytorch_model.safetensors is not a valid safetensors file", at_check=True)


@pytest.mark.parametrize(
    ("model", "component", "changes", "message"),
    [
        ("sd1", "unet", {"in_channels": 9}, "unet takes 9 channels.*inpainting"),
        ("sd1", "unet", {"in_channels": 8}, "unet takes 8 channels.*instruct-pix2pix"),
        ("sdxl", "unet", {"in_channels": 9}, "unet takes 9 channels.*inpainting"),
        ("sdxl", "unet", {"in_channels": 5}, "unet takes 5 channels.*depth"),
        ("sd1", "unet", {"out_channels": 8}, "unet gives 8 channels"),
        ("sdxl", "unet", {"projection_class_embeddings_input_dim": 56}, "refiner"),
        ("sdxl", "unet", {"cross_attention_dim": 48}, "texts of width 48"),
        ("flux", "transformer", {"in_channels": 96}, "transformer takes 96 channels.*FLUX Fill"),
        ("flux", "transformer", {"in_channels": 32}, "transformer takes 32 channels.*depth, edges"),
        ("sd3", "transformer", {"in_channels": 17}, "transformer takes 17 channels"),
        ("sd1", "unet", {"_class_name": "UNetMotionModel"}, "own file says UNetMotionModel"),
        ("sd1", "scheduler", {"_class_name": "DDIMScheduler"}, "own file says DDIMScheduler"),
        ("sd1", "scheduler", {"prediction_type": "v-pred"}, "prediction_type 'v-pred'"),
        ("sd3", "vae", {"quantization_config": {"quant_method": "bitsandbytes"}}, "vae has a quantization_config"),
        ("sd3", "text_encoder", {"quantization_config": {"quant_method": "gptq"}}, "text_encoder has a quantization"),
    ],
)
def test_parts_that_do_not_fit_are_refused(
    copy: Callable[[str], Path], model: str, component: str, changes: dict[str, Any], message: str
) -> None:
    """Networks of another task, another model's, quantised ones: before anything is loaded."""
    folder = copy(model)
    configure(folder / component, **changes)
    refused(folder, message, at_check=True)


def test_an_encoder_of_another_kind_is_refused(copy: Callable[[str], Path]) -> None:
    """What transformers only warns of."""
    folder = copy("flux")
    configure(folder / "text_encoder", model_type="t5")
    refused(folder, "CLIPTextModel as text_encoder, whose own file says t5", at_check=False)


def test_a_part_that_is_absent_is_refused(copy: Callable[[str], Path]) -> None:
    """Where the family needs it."""
    folder = copy("sdxl")
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps({**index, "text_encoder": [None, None]}))
    refused(folder, "no text_encoder", at_check=True)


@pytest.mark.parametrize(
    ("change", "metadata", "message"),
    [
        (with_("v_pred", torch.tensor([])), {}, "unet say v_prediction, the scheduler's configuration epsilon"),
        (with_("ztsnr", torch.tensor([])), {}, "unet say zero terminal SNR"),
        (dict, {"modelspec.prediction_type": "v"}, "unet say v_prediction"),
        (dict, {"modelspec.architecture": "flux-1-dev"}, "unet: .*flux-1-dev"),
        (with_("conv_out.weight_scale", torch.ones(1)), {}, "unet: .*quantised.*weight_scale"),
        (with_("conv_out.bias", torch.ones(4, dtype=torch.uint8)), {}, "unet: .*quantised.*U8"),
    ],
)
def test_weights_that_contradict_the_folder_are_refused(
    copy: Callable[[str], Path], change: Callable[[Tensors], Tensors], metadata: dict[str, str], message: str
) -> None:
    """A folder has a scheduler's configuration of its own, and no word of a file goes before it."""
    folder = copy("sd1")
    rewrite(folder / "unet", change, metadata)
    refused(folder, message, at_check=True)


def test_quantised_encoders_are_refused(copy: Callable[[str], Path]) -> None:
    """Any component's; what else a header says is the denoiser's to say."""
    folder = copy("sd1")
    rewrite(
        folder / "vae", dict, {"modelspec.architecture": "stable-diffusion-xl-v1/vae", "modelspec.predict_key": "v"}
    )
    load(folder)
    rewrite(folder / "text_encoder", with_(f"{_TEXT_NAME}.absmax", torch.ones(1)))
    refused(folder, "text_encoder: .*quantised.*absmax", at_check=True)


def test_weights_that_say_what_the_folder_says_are_served(copy: Callable[[str], Path]) -> None:
    """The tensor that says so is no surplus."""
    folder = copy("sd1")
    rewrite(folder / "unet", with_("v_pred", torch.tensor([])), {"modelspec.prediction_type": "v"})
    configure(folder / "scheduler", prediction_type="v_prediction")
    load(folder)


def test_a_scheduler_that_cannot_end_in_noise_is_refused(copy: Callable[[str], Path]) -> None:
    """If its file says so; diffusers passes it over."""
    folder = copy("sd1")
    configure(folder / "scheduler", prediction_type="v_prediction", rescale_betas_zero_snr=True)
    refused(folder, "PNDMScheduler, which has no rescale_betas_zero_snr", at_check=False)


@pytest.mark.parametrize("model", ["sd1", "sdxl", "flux", "sd3"])
def test_whole_models_pass(models: Path, model: str) -> None:
    """Nothing of what libraries save is refused."""
    load(models / model)
    assert content_faults(ServerConfig(model=ModelConfig(model=str(models / model)))) == []


@pytest.mark.parametrize(
    "file", ["model_index.json", "unet/config.json", "text_encoder/config.json", "scheduler/scheduler_config.json"]
)
@pytest.mark.parametrize("text", ["", "[]", '{"_class_name": 7}'])
def test_nonsense_is_one_line(copy: Callable[[str], Path], file: str, text: str) -> None:
    """Whatever is in the configurations: a sentence, and never another kind of error."""
    folder = copy("sd1")
    (folder / file).write_text(text)
    with pytest.raises(ModelLoadError) as raised:
        load(folder)
    assert "\n" not in str(raised.value)
    content_faults(ServerConfig(model=ModelConfig(model=str(folder))))
