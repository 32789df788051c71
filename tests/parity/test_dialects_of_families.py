"""Files of every dialect for FLUX.1, SD 1.5, SDXL, Z-Image and Qwen-Image: the picture is that of the same change of
the weights, made by hand in diffusers' pipeline. (SD3's with original names are in `test_dialect_pictures`.)

Names are spelled out as each trainer writes them, and beside each stands what it means in diffusers' model: nothing
here knows the server's tables.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.dialects import Written, dotted, kohya, write_lora
from tests.parity.harness import Pair, Subject, assert_same
from tests.parity.subjects_flow import FLUX, QWEN_IMAGE, Z_IMAGE
from tests.parity.subjects_sd3 import SD3
from tests.parity.subjects_unet import SD1, SDXL

Means = Mapping[str, tuple[str, ...]]
"""Modules as a file names them, and the modules of diffusers that they are, one under another."""
SWAPPED = "final_layer.adaLN_modulation.1"
"""Of FLUX: shift and scale in the original, scale and shift in diffusers."""

FLUX_ORIGINAL: Means = {
    "img_in": ("x_embedder",),
    "double_blocks.0.img_attn.qkv": tuple(f"transformer_blocks.0.attn.to_{part}" for part in "qkv"),
    "double_blocks.0.txt_attn.qkv": tuple(f"transformer_blocks.0.attn.add_{part}_proj" for part in "qkv"),
    "double_blocks.0.img_attn.proj": ("transformer_blocks.0.attn.to_out.0",),
    "double_blocks.0.txt_attn.proj": ("transformer_blocks.0.attn.to_add_out",),
    "double_blocks.0.img_mlp.0": ("transformer_blocks.0.ff.net.0.proj",),
    "double_blocks.0.txt_mlp.2": ("transformer_blocks.0.ff_context.net.2",),
    "double_blocks.0.img_mod.lin": ("transformer_blocks.0.norm1.linear",),
    "single_blocks.0.linear1": (
        *(f"single_transformer_blocks.0.attn.to_{part}" for part in "qkv"),
        "single_transformer_blocks.0.proj_mlp",
    ),
    "single_blocks.0.linear2": ("single_transformer_blocks.0.proj_out",),
    SWAPPED: ("norm_out.linear",),
}
FLUX_XLABS: Means = {
    "double_blocks.0.processor.qkv{}1": FLUX_ORIGINAL["double_blocks.0.img_attn.qkv"],
    "double_blocks.0.processor.qkv{}2": FLUX_ORIGINAL["double_blocks.0.txt_attn.qkv"],
    "double_blocks.0.processor.proj{}1": FLUX_ORIGINAL["double_blocks.0.img_attn.proj"],
    "double_blocks.0.processor.proj{}2": FLUX_ORIGINAL["double_blocks.0.txt_attn.proj"],
    "single_blocks.0.processor.qkv{}": FLUX_ORIGINAL["single_blocks.0.linear1"][:3],
    "single_blocks.0.processor.proj{}": ("single_transformer_blocks.0.proj_out",),
}
Z_IMAGE_ORIGINAL: Means = {
    "layers.0.attention.qkv": tuple(f"layers.0.attention.to_{part}" for part in "qkv"),
    "layers.1.attention.out": ("layers.1.attention.to_out.0",),
    "layers.1.feed_forward.w1": ("layers.1.feed_forward.w1",),
    "context_refiner.0.attention.qkv": tuple(f"context_refiner.0.attention.to_{part}" for part in "qkv"),
    "noise_refiner.0.feed_forward.w2": ("noise_refiner.0.feed_forward.w2",),
    "cap_embedder.1": ("cap_embedder.1",),
}
SDXL_ORIGINAL: Means = {  # of the tiny U-Net: two levels of one layer, the first with attention
    "input_blocks.0.0": ("conv_in",),
    "input_blocks.1.0.in_layers.2": ("down_blocks.0.resnets.0.conv1",),
    "input_blocks.1.0.emb_layers.1": ("down_blocks.0.resnets.0.time_emb_proj",),
    "input_blocks.1.1.proj_in": ("down_blocks.0.attentions.0.proj_in",),
    "input_blocks.1.1.transformer_blocks.1.attn2.to_k": ("down_blocks.0.attentions.0.transformer_blocks.1.attn2.to_k",),
    "input_blocks.2.0.op": ("down_blocks.0.downsamplers.0.conv",),
    "input_blocks.3.0.skip_connection": ("down_blocks.1.resnets.0.conv_shortcut",),
    "middle_block.1.transformer_blocks.0.attn1.to_q": ("mid_block.attentions.0.transformer_blocks.0.attn1.to_q",),
    "middle_block.2.out_layers.3": ("mid_block.resnets.1.conv2",),
    "output_blocks.1.1.conv": ("up_blocks.0.upsamplers.0.conv",),
    "output_blocks.3.1.transformer_blocks.0.ff.net.0.proj": (
        "up_blocks.1.attentions.1.transformer_blocks.0.ff.net.0.proj",
    ),
    "label_emb.0.2": ("add_embedding.linear_2",),
    "out.2": ("conv_out",),
}
SD1_ORIGINAL: Means = {  # the same, with one transformer block, and convolutions around it
    **{
        name: SDXL_ORIGINAL[name]
        for name in SDXL_ORIGINAL
        if not name.startswith("label_emb") and ".1.attn2" not in name
    },
    "input_blocks.1.1.transformer_blocks.0.attn2.to_v": ("down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_v",),
    "time_embed.2": ("time_embedding.linear_2",),
}
_SD1_BLOCK = "down_blocks.0.attentions.0.transformer_blocks.0"


def own(*paths: str) -> Means:
    """Modules that a dialect names as diffusers does."""
    return {path: (path,) for path in paths}


FLUX_OWN = own(
    "transformer_blocks.0.attn.to_q", "transformer_blocks.0.attn.add_k_proj", "transformer_blocks.0.norm1.linear",
    "transformer_blocks.0.ff.net.2", "single_transformer_blocks.0.attn.to_v", "single_transformer_blocks.0.proj_mlp",
    "norm_out.linear", "proj_out",
)  # fmt: skip
Z_IMAGE_OWN = own(
    "layers.0.attention.to_q", "layers.1.attention.to_out.0", "layers.1.feed_forward.w3",
    "noise_refiner.0.attention.to_v", "context_refiner.0.feed_forward.w1",
)  # fmt: skip
QWEN_OWN = own(
    "transformer_blocks.0.attn.to_q", "transformer_blocks.1.attn.add_v_proj", "transformer_blocks.1.attn.to_out.0",
    "transformer_blocks.0.img_mlp.net.0.proj", "transformer_blocks.1.txt_mlp.net.2", "transformer_blocks.0.img_mod.1",
)  # fmt: skip
SD1_OWN = own(
    "conv_in", "down_blocks.0.resnets.0.conv1", "down_blocks.0.downsamplers.0.conv", f"{_SD1_BLOCK}.attn1.to_q",
    f"{_SD1_BLOCK}.attn2.to_v", f"{_SD1_BLOCK}.ff.net.0.proj", "down_blocks.0.attentions.0.proj_in",
    "mid_block.resnets.1.conv2", "up_blocks.0.upsamplers.0.conv",
    "up_blocks.1.attentions.0.transformer_blocks.0.attn1.to_out.0",
)  # fmt: skip
SDXL_OWN = own(*(ours for (ours,) in SDXL_ORIGINAL.values() if ours != "add_embedding.linear_2"))
SD3_OWN = own(
    "transformer_blocks.0.attn.to_q", "transformer_blocks.1.attn.add_k_proj", "transformer_blocks.0.attn2.to_out.0",
    "transformer_blocks.2.norm1.linear", "transformer_blocks.5.ff.net.2", "norm_out.linear", "proj_out",
)  # fmt: skip
CLIP = own("text_model.encoder.layers.0.self_attn.q_proj", "text_model.encoder.layers.1.mlp.fc1")
T5 = own("encoder.block.0.layer.0.SelfAttention.q", "encoder.block.1.layer.1.DenseReluDense.wo")


@dataclasses.dataclass(frozen=True)
class Model:
    """What files are written for: the shapes of the oracle's weights."""

    weights: Mapping[str, Mapping[str, Tensor]]

    def weight(self, component: str, path: str) -> Tensor:
        """A weight by its path; transformers has left out CLIP's `text_model`, which files go on naming."""
        own = self.weights[component]
        return own[f"{path}.weight"] if f"{path}.weight" in own else own[f"{path.removeprefix('text_model.')}.weight"]

    def shapes(self, component: str, means: Means) -> dict[str, tuple[int, ...]]:
        """Of modules as a file names them, fused ones as high as their parts together."""
        shapes = {}
        for name, paths in means.items():
            parts = [self.weight(component, path).shape for path in paths]
            shapes[name] = (sum(shape[0] for shape in parts), *parts[0][1:])
        return shapes

    def by_path(self, component: str, means: Means, deltas: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Changes by the names of a file as changes by diffusers' paths."""
        found = {}
        for name, paths in means.items():
            delta = deltas[name]
            if name == SWAPPED:
                delta = torch.cat(delta.chunk(2)[::-1])
            heights = [self.weight(component, path).shape[0] for path in paths]
            found |= dict(zip(paths, delta.split(heights), strict=True))
        return found


Change = dict[str, dict[str, Tensor]]
Case = Callable[[Model, Path], Change]
"""Writes a file and returns what it changes, by component and diffusers' path."""


def plain(
    parts: Mapping[str, tuple[Means, Callable[[str, str], str]]],
    model: Model,
    path: Path,
    alpha: float | None = 2.0,
    dtype: torch.dtype = torch.float32,
) -> Change:
    """LoRA, of ranks 2 and 4 in one file; by component what is adapted and how it is called.

    What the file means is worked out from its factors as they were rounded to *dtype*.
    """
    file, change = Written(), Change()
    for component, (means, name_of) in parts.items():
        written = write_lora(
            model.shapes(component, means),
            name_of,
            rank_of=lambda name: 2 if "attn" in name else 4,
            alpha_of=lambda _: alpha,
            dtype=dtype,
        )
        file.tensors |= written.tensors
        change[component] = model.by_path(component, means, written.deltas)
    file.save(path)
    return change


def dora(prefix: str, component: str, means: Means, model: Model, path: Path) -> Change:
    """LoRA with `dora_scale`, a norm for each row of the (fused) weight; a convolution's row has the whole kernel."""
    names, generator = kohya(prefix), torch.Generator().manual_seed(8)
    file, deltas = write_lora(model.shapes(component, means), names), {}
    for name, delta in file.deltas.items():
        base = torch.cat([model.weight(component, each).detach().double() for each in means[name]])
        if name == SWAPPED:
            base = torch.cat(base.chunk(2)[::-1])
        each_row = (len(base), *[1] * (base.dim() - 1))
        magnitude = base.flatten(1).norm(dim=1).float() * (0.75 + 0.5 * torch.rand(len(base), generator=generator))
        file.tensors[names(name, "down").replace("lora_down.weight", "dora_scale")] = magnitude.view(each_row)
        changed = base + delta
        norms = changed.flatten(1).norm(dim=1).view(each_row)
        deltas[name] = magnitude.double().view(each_row) * changed / norms - base
    file.save(path)
    return {component: model.by_path(component, means, deltas)}


def lycoris(prefix: str, component: str, means: Means, model: Model, path: Path) -> Change:
    """LoHa and LoKr by turns; a convolution's LoHa has the kernel in the second factor's columns."""
    file, deltas, generator = Written(), {}, torch.Generator().manual_seed(7)
    for n, (name, shape) in enumerate(model.shapes(component, means).items()):
        rows, columns = shape[0], int(np.prod(shape[1:]))
        key = f"{prefix}_{name.replace('.', '_')}"
        if n % 2:
            size = (rows // 2, shape[1] // 2, *shape[2:])
            small, large = torch.randn(2, 2, generator=generator), torch.randn(size, generator=generator) * 0.05
            file.tensors |= {f"{key}.lokr_w1": small, f"{key}.lokr_w2": large}
            first = small[:, :, None, None] if len(shape) == 4 else small
            deltas[name] = torch.kron(first.double(), large.double())
            continue
        halves = [torch.randn(size, generator=generator) * 0.3 for size in ((rows, 2), (2, columns)) * 2]
        keys = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")
        file.tensors |= {f"{key}.{each}": half for each, half in zip(keys, halves, strict=True)}
        file.tensors[f"{key}.alpha"] = torch.tensor(1.0)
        a, b, c, d = (half.double() for half in halves)
        deltas[name] = (0.5 * (a @ b) * (c @ d)).view(shape)
    file.save(path)
    return {component: model.by_path(component, means, deltas)}


def diffusers_save(pipeline: str, parts: Mapping[str, Means], model: Model, path: Path) -> Change:
    """The file that the pipeline's own `save_lora_weights` writes; without a header its alpha is the rank."""
    import diffusers

    layers, change = {}, Change()
    for component, means in parts.items():
        written = write_lora(model.shapes(component, means), dotted("", "lora_A", "lora_B"), alpha_of=lambda _: None)
        layers[f"{component}_lora_layers"] = written.tensors
        change[component] = model.by_path(component, means, written.deltas)
    getattr(diffusers, pipeline).save_lora_weights(path.parent, weight_name=path.name, **layers)
    return change


def xlabs(module: str, half: str) -> str:
    """`double_blocks.0.processor.qkv_lora1.down.weight`."""
    return f"{module.format('_lora')}.{half}.weight"


LORA = partial(dotted, down="lora_A", up="lora_B")
FILES: dict[tuple[str, str], Case] = {
    ("flux", "kohya"): partial(
        plain,
        {
            "transformer": (FLUX_ORIGINAL, kohya("lora_unet")),
            "text_encoder": (CLIP, kohya("lora_te1")),
            "text_encoder_2": (T5, kohya("lora_te3")),
        },
    ),
    ("flux", "comfyui"): partial(plain, {"transformer": (FLUX_ORIGINAL, LORA("diffusion_model."))}),
    ("flux", "bfl"): partial(plain, {"transformer": (FLUX_ORIGINAL, LORA(""))}, alpha=None),
    ("flux", "xlabs"): partial(plain, {"transformer": (FLUX_XLABS, xlabs)}, alpha=None),
    ("flux", "ai-toolkit"): partial(plain, {"transformer": (FLUX_OWN, LORA("transformer."))}, alpha=None),
    ("flux", "onetrainer"): partial(
        plain, {"transformer": (FLUX_OWN, kohya("lora_transformer")), "text_encoder": (CLIP, kohya("lora_te1"))}
    ),
    ("flux", "lycoris"): partial(lycoris, "lora_unet", "transformer", FLUX_ORIGINAL),
    ("flux", "lycoris's own prefix"): partial(lycoris, "lycoris", "transformer", FLUX_OWN),
    ("flux", "diffusers"): partial(diffusers_save, "FluxPipeline", {"transformer": FLUX_OWN, "text_encoder": CLIP}),
    ("flux", "dora"): partial(dora, "lora_unet", "transformer", FLUX_ORIGINAL),
    ("flux", "fp8"): partial(plain, {"transformer": (FLUX_ORIGINAL, kohya("lora_unet"))}, dtype=torch.float8_e4m3fn),
    ("sd3", "kohya's text encoders"): partial(
        plain,
        {
            "transformer": (SD3_OWN, kohya("lora_unet")),
            "text_encoder": (CLIP, kohya("lora_te1")),
            "text_encoder_2": (CLIP, kohya("lora_te2")),
            "text_encoder_3": (T5, kohya("lora_te3")),
        },
    ),
    ("sd3", "diffusers"): partial(
        diffusers_save, "StableDiffusion3Pipeline", {"transformer": SD3_OWN, "text_encoder": CLIP}
    ),
    ("sd3", "ai-toolkit"): partial(plain, {"transformer": (SD3_OWN, LORA("transformer."))}, alpha=None),
    ("sd3", "onetrainer"): partial(
        plain, {"transformer": (SD3_OWN, kohya("lora_transformer")), "text_encoder_2": (CLIP, kohya("lora_te2"))}
    ),
    ("sd1", "kohya"): partial(plain, {"unet": (SD1_OWN, kohya("lora_unet")), "text_encoder": (CLIP, kohya("lora_te"))}),
    ("sd1", "lycoris"): partial(lycoris, "lora_unet", "unet", SD1_OWN),
    ("sd1", "comfyui"): partial(
        plain,
        {
            "unet": (SD1_ORIGINAL, LORA("diffusion_model.")),
            "text_encoder": (CLIP, LORA("text_encoders.clip_l.transformer.")),
        },
    ),
    ("sd1", "dora"): partial(dora, "lora_unet", "unet", SD1_OWN),
    ("sd1", "diffusers"): partial(diffusers_save, "StableDiffusionPipeline", {"unet": SD1_OWN, "text_encoder": CLIP}),
    ("sdxl", "kohya"): partial(
        plain,
        {
            "unet": (SDXL_ORIGINAL, kohya("lora_unet")),
            "text_encoder": (CLIP, kohya("lora_te1")),
            "text_encoder_2": (CLIP, kohya("lora_te2")),
        },
    ),
    ("sdxl", "kohya in diffusers' names"): partial(plain, {"unet": (SDXL_OWN, kohya("lora_unet"))}),
    ("sdxl", "comfyui"): partial(
        plain,
        {
            "unet": (SDXL_ORIGINAL, LORA("diffusion_model.")),
            "text_encoder": (CLIP, LORA("text_encoders.clip_l.transformer.")),
            "text_encoder_2": (CLIP, LORA("text_encoders.clip_g.transformer.")),
        },
    ),
    ("sdxl", "onetrainer"): partial(
        plain, {"unet": (SDXL_OWN, kohya("lora_unet")), "text_encoder": (CLIP, kohya("lora_te1"))}
    ),
    ("sdxl", "lycoris"): partial(lycoris, "lora_unet", "unet", SDXL_ORIGINAL),
    ("sdxl", "dora"): partial(dora, "lora_unet", "unet", SDXL_ORIGINAL),
    ("sdxl", "diffusers"): partial(
        diffusers_save, "StableDiffusionXLPipeline", {"unet": SDXL_OWN, "text_encoder": CLIP, "text_encoder_2": CLIP}
    ),
    ("z-image", "kohya"): partial(plain, {"transformer": (Z_IMAGE_ORIGINAL, kohya("lora_unet"))}),
    ("z-image", "comfyui"): partial(plain, {"transformer": (Z_IMAGE_ORIGINAL, LORA("diffusion_model."))}),
    ("z-image", "ai-toolkit"): partial(plain, {"transformer": (Z_IMAGE_OWN, LORA("diffusion_model."))}, alpha=None),
    ("z-image", "onetrainer"): partial(plain, {"transformer": (Z_IMAGE_OWN, kohya("lora_transformer"))}),
    ("z-image", "lycoris"): partial(lycoris, "lycoris", "transformer", Z_IMAGE_OWN),
    ("z-image", "dora"): partial(dora, "lora_unet", "transformer", Z_IMAGE_ORIGINAL),
    ("z-image", "diffusers"): partial(diffusers_save, "ZImagePipeline", {"transformer": Z_IMAGE_OWN}),
    ("qwen-image", "kohya"): partial(plain, {"transformer": (QWEN_OWN, kohya("lora_unet"))}),
    ("qwen-image", "comfyui"): partial(plain, {"transformer": (QWEN_OWN, LORA("diffusion_model."))}),
    ("qwen-image", "ai-toolkit"): partial(plain, {"transformer": (QWEN_OWN, LORA("transformer."))}, alpha=None),
    ("qwen-image", "onetrainer"): partial(plain, {"transformer": (QWEN_OWN, kohya("lora_transformer"))}),
    ("qwen-image", "lycoris"): partial(lycoris, "lycoris", "transformer", QWEN_OWN),
    ("qwen-image", "dora"): partial(dora, "lora_unet", "transformer", QWEN_OWN),
    ("qwen-image", "diffusers"): partial(diffusers_save, "QwenImagePipeline", {"transformer": QWEN_OWN}),
}
ENCODERS = "text_encoder", "text_encoder_2", "text_encoder_3"
SUBJECTS: dict[str, Subject] = {each.name: each for each in (FLUX, SD1, SDXL, SD3, Z_IMAGE, QWEN_IMAGE)}


@pytest.fixture(scope="module", params=SUBJECTS)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    """One family's model, in float64."""
    subject = SUBJECTS[request.param]
    root = tmp_path_factory.mktemp(subject.name)
    return Pair(subject, subject.build(root / "model"), "float64", root)


def model_of(pipeline: Any) -> Model:
    """The weights of the components that adapters change."""
    named = {name: getattr(pipeline, name, None) for name in ("transformer", "unet", *ENCODERS)}
    return Model({name: dict(each.named_parameters()) for name, each in named.items() if each is not None})


def by_hand(pair: Pair, changes: Change, scale: float, wanted: Any) -> np.ndarray:
    """The picture of the oracle's pipeline with weights that have been added to."""

    def changed(model: str, dtype: torch.dtype) -> Any:
        pipeline = pair.subject.pipeline(model, dtype)
        weights = model_of(pipeline)
        for component, deltas in changes.items():
            for path, delta in deltas.items():
                weights.weight(component, path).data += scale * delta
        return pipeline

    hand = copy.copy(pair)
    hand.subject = dataclasses.replace(pair.subject, pipeline=changed)
    return hand._oracle(wanted, [])


def test_pictures_equal_the_same_change_by_hand(pair: Pair) -> None:
    """Every dialect that is claimed for the family: fused, renamed, swapped, convolutions, text encoders.

    LoRA in all of them, LoHa, LoKr and DoRA in one each, fp8 in FLUX's (of SD3 the kinds are in
    `test_dialect_pictures`); rsLoRA and what peft's configurations say are held in `tests/unit/adapters`.
    """
    model = model_of(pair.subject.pipeline(pair.model, pair.dtype))
    wanted = pair.subject.parameters(num_inference_steps=2)
    base = pair.draw(wanted, []).astype(int)
    for family, dialect in FILES:
        if family != pair.subject.name:
            continue
        name = f"{dialect.replace(' ', '-')}.safetensors"
        changes = FILES[family, dialect](model, pair.root / name)
        expected = by_hand(pair, changes, 0.8, wanted)
        assert np.abs(base - expected).mean() > 0.5, f"{dialect}: the adapter would not be seen"
        assert_same(pair.draw(wanted, [(name, 0.8)]), expected, pair.dtype, dialect, pair.subject.flips)
