"""A PEFT configuration is matched with the names that its writer had; what frameworks put around modules is no name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from lora_server.adapters.formats.keys import split_key
from lora_server.adapters.formats.patterns import Matcher, PatternValues
from lora_server.adapters.formats.reader import AdapterReader
from lora_server.adapters.formats.wrappers import without_wrappers_in_pattern
from lora_server.adapters.roots import AdapterRoots
from lora_server.adapters.source import AdapterFolder
from lora_server.errors import AdapterMalformedError
from lora_server.models.base import adapter_targets
from lora_server.models.weights import linear_groups
from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils.other import get_pattern_key
from safetensors.torch import save_file

from tests.factories import TinyNet
from tests.unit.adapters.test_dialects import deltas, read

HIDDEN, TEXT = 160, 48
CLIP = [f"encoder.layers.{k}.self_attn.{part}_proj" for k in range(2) for part in "qv"]
DENOISER = [f"transformer_blocks.{k}.attn.to_{part}" for k in range(6) for part in "qk"]


class Text(torch.nn.Module):
    """A CLIP with the names of transformers 4, or those of 5."""

    def __init__(self, *, wrapped: bool) -> None:
        super().__init__()
        layers = [
            torch.nn.ModuleDict(
                {"self_attn": torch.nn.ModuleDict({f"{part}_proj": torch.nn.Linear(TEXT, TEXT) for part in "qv"})}
            )
            for _ in range(2)
        ]
        encoder = torch.nn.ModuleDict({"layers": torch.nn.ModuleList(layers)})
        if wrapped:
            self.text_model = torch.nn.ModuleDict({"encoder": encoder})
        else:
            self.encoder = encoder


def read_for(place: Path, *, wrapped: bool) -> dict[str, torch.Tensor]:
    """The changes of CLIP's modules, by their names without `text_model.`, in a model whose CLIP has it or not."""
    targets = adapter_targets({"transformer": TinyNet(), "text_encoder": Text(wrapped=wrapped)})
    files = AdapterFolder(place, sorted(targets), AdapterRoots([place])).read(1 << 20)
    found = AdapterReader(targets, "transformer", "tiny", torch.float64, 64).read_planned("x", files.contents)
    assert found.plan.warnings == ()
    groups = linear_groups(targets["text_encoder"])
    return {
        groups[delta.group].paths[member].removeprefix("text_model."): delta.b[k] @ delta.a[k]
        for delta in found.weights.groups["text_encoder"]
        for k, member in enumerate(delta.members)
    }


def pairs(names: list[str], width: int, ranks: dict[str, int] | None = None) -> dict[str, torch.Tensor]:
    """Both halves for each of *names*, by `NAME.lora_A.weight`."""
    generator = torch.Generator().manual_seed(3)
    found = {}
    for name in names:
        rank = (ranks or {}).get(name, 4)
        found[f"{name}.lora_A.weight"] = torch.randn((rank, width), generator=generator)
        found[f"{name}.lora_B.weight"] = torch.randn((width, rank), generator=generator)
    return found


def by_hand(tensors: dict[str, torch.Tensor], name: str, alpha: float) -> torch.Tensor:
    """alpha / r times B A."""
    a, b = tensors[f"{name}.lora_A.weight"].double(), tensors[f"{name}.lora_B.weight"].double()
    return alpha / a.shape[0] * b @ a


def folder(place: Path, tensors: dict[str, torch.Tensor], prefix: str, **config: Any) -> Path:
    """PEFT's files in *place*."""
    place.mkdir(parents=True, exist_ok=True)
    save_file({f"{prefix}{key}": value for key, value in tensors.items()}, place / "adapter_model.safetensors")
    fields = {"peft_type": "LORA", "r": 4, "lora_alpha": 4, **config}
    (place / "adapter_config.json").write_text(json.dumps(fields))
    return place


def check(changes: dict[str, torch.Tensor], tensors: dict[str, torch.Tensor], alphas: dict[str, float]) -> None:
    """Every module changes as by hand, with its own alpha."""
    assert set(changes) == set(alphas)
    for name, alpha in alphas.items():
        torch.testing.assert_close(changes[name], by_hand(tensors, name, alpha), rtol=0, atol=1e-12)


PATTERNS: dict[str, tuple[dict[str, float], list[float]]] = {
    "whole names": ({f"text_model.{CLIP[0]}": 16}, [16, 4, 4, 4]),
    "ends of names": ({"layers.1.self_attn.q_proj": 16, "v_proj": 8}, [4, 8, 16, 8]),
    "an expression from the start": (
        {r"^text_model\.encoder\.layers\.1\..*": 12, r"text_model\.encoder\.layers\.\d+\..*q_proj": 2}, [2, 4, 12, 12]
    ),
    "without the wrapper": ({CLIP[3]: 7}, [4, 4, 4, 7]),
    "the first that matches": ({"q_proj": 3, f"text_model.{CLIP[0]}": 16}, [3, 4, 3, 4]),
}  # fmt: skip


@pytest.mark.parametrize("case", PATTERNS)
@pytest.mark.parametrize("named", ["text_model.", ""])
@pytest.mark.parametrize("where", ["header", "sub-folder", "root folder"])
@pytest.mark.parametrize("wrapped", [True, False])
def test_alphas_of_clip(tmp_path: Path, case: str, named: str, where: str, wrapped: bool) -> None:
    """Whether the writer's CLIP had `text_model.` or not, and whether the server's has, its patterns mean the same."""
    patterns, alphas = PATTERNS[case]
    if where == "root folder" and "from the start" in case:
        pytest.skip("to peft, the names of such a file begin with the component's")
    tensors = pairs(CLIP, TEXT)
    config = {"alpha_pattern": patterns, "target_modules": r"text_model\.encoder\..*(q|v)_proj"}
    if where == "header":
        head = {f"text_encoder.{k}": v for k, v in ({"r": 4, "lora_alpha": 4} | config).items()}
        place = tmp_path / "x.safetensors"
        file = {f"text_encoder.{named}{key}": value for key, value in tensors.items()}
        save_file(file, place, {"lora_adapter_metadata": json.dumps(head)})
    elif where == "sub-folder":
        folder(tmp_path / "x" / "text_encoder", tensors, f"base_model.model.{named}", **config)
        place = tmp_path / "x"
    else:
        place = folder(tmp_path / "x", tensors, f"base_model.model.text_encoder.{named}", **config)
    check(read_for(place, wrapped=wrapped), tensors, dict(zip(CLIP, alphas, strict=True)))


@pytest.mark.parametrize("wrapped", [True, False])
def test_ranks_of_clip(tmp_path: Path, wrapped: bool) -> None:
    """Ranks by pattern are those that the file has."""
    tensors = pairs(CLIP, TEXT, {CLIP[1]: 2})
    ranks = {f"text_model.{CLIP[1]}": 2}
    targets = [f"text_model.{name}" for name in CLIP]
    place = folder(
        tmp_path / "text_encoder", tensors, "base_model.model.text_model.", rank_pattern=ranks, target_modules=targets
    )
    check(read_for(place.parent, wrapped=wrapped), tensors, dict.fromkeys(CLIP, 4.0))


@pytest.mark.parametrize("wrapped", [True, False])
def test_what_peft_makes_of_it(tmp_path: Path, wrapped: bool) -> None:
    """A CLIP under its old names, written by peft with patterns: the deltas are peft's own."""
    config = LoraConfig(
        r=4, lora_alpha=6, target_modules=r"text_model\.encoder\.layers\.\d\..*_proj", init_lora_weights=False,
        exclude_modules=[f"text_model.{CLIP[2]}"], rank_pattern={r"^text_model.*layers\.0.*v_proj": 2},
        alpha_pattern={f"text_model.{CLIP[0]}": 16},
    )  # fmt: skip
    get_peft_model(Text(wrapped=True), config).save_pretrained(tmp_path / "text_encoder")
    oracle = PeftModel.from_pretrained(Text(wrapped=True), tmp_path / "text_encoder")
    expected = {
        name.removeprefix("base_model.model.text_model."): module.get_delta_weight("default").detach().double()
        for name, module in oracle.named_modules()
        if hasattr(module, "get_delta_weight")
    }
    found = read_for(tmp_path, wrapped=wrapped)
    assert set(found) == set(expected) == set(CLIP) - {CLIP[2]}
    for name, change in expected.items():
        torch.testing.assert_close(found[name], change, rtol=1e-5, atol=1e-7)


def test_patterns_that_match_nothing_are_reported(tmp_path: Path) -> None:
    """To peft they change nothing; that they were meant for something else is for the reader to see."""
    tensors = pairs(DENOISER, HIDDEN)
    place = folder(
        tmp_path, tensors, "", target_modules=["attn.to_q", "attn.to_k"], alpha_pattern={"to_v": 9, r".*\.ff\..*": 2}
    )
    warnings = read(place).plan.warnings
    assert len(warnings) == 1
    assert "to_v" in warnings[0]
    assert "1 more" in warnings[0]


@pytest.mark.parametrize(
    ("patterns", "name"),
    [
        ({"to_q": 1, "a.to_q": 2}, "a.to_q"),
        ({"a.to_q": 2, "to_q": 1}, "a.to_q"),
        ({r"\d\.to_q": 3, "to_q": 1}, "b.1.to_q"),
        ({"^to_q": 3, "to_q": 1}, "b.to_q"),
        ({"o_q": 3}, "b.to_q"),
        ({r"to_(q|k)": 5, "to_q": 1}, "to_q"),
    ],
)
def test_the_pattern_is_the_one_that_peft_finds(patterns: dict[str, int], name: str) -> None:
    """Held against peft's own function."""
    expected = patterns.get(get_pattern_key(list(patterns), name), 0)
    assert PatternValues(patterns).find([name], 0, Matcher()) == expected


WRAPPED = [
    "_orig_mod.", "transformer._orig_mod.", "_orig_mod.transformer.", "module.", "module.transformer.",
    "transformer.module.", "_fsdp_wrapped_module.", "transformer._fsdp_wrapped_module._orig_mod.",
    "base_model.model.transformer._orig_mod.", "module._orig_mod.base_model.model.", "transformer.", "diffusion_model.",
    "model.diffusion_model.", "base_model.model.transformer.", "base_model.model.base_model.model.",
    "transformer.diffusion_model.", "pipe.dit.", "dit.",
]  # fmt: skip
INSIDE = [
    "",
    "_orig_mod.",
    "_checkpoint_wrapped_module.",
    "_fsdp_wrapped_module._checkpoint_wrapped_module.",
    "module.",
]


@pytest.mark.parametrize("prefix", WRAPPED)
@pytest.mark.parametrize("kind", ["bare", "folder"])
def test_prefixes_and_wrappers_in_front(tmp_path: Path, prefix: str, kind: str) -> None:
    """In a PEFT folder as in a bare file, and in any order."""
    tensors = pairs(DENOISER, HIDDEN)
    if kind == "folder" or "base_model." in prefix:  # PEFT's names need their configuration
        place = folder(tmp_path / "x", tensors, prefix, target_modules=["attn.to_q", "attn.to_k"], lora_alpha=8)
    else:
        alphas = {f"{prefix}{name}.alpha": torch.tensor(8.0) for name in DENOISER}
        place = tmp_path / "x.safetensors"
        save_file({f"{prefix}{key}": value for key, value in tensors.items()} | alphas, place)
    check(deltas(read(place)), tensors, dict.fromkeys(DENOISER, 8.0))


@pytest.mark.parametrize("wrapper", INSIDE)
@pytest.mark.parametrize("in_config", [False, True])
def test_wrappers_inside(tmp_path: Path, wrapper: str, in_config: bool) -> None:
    """After a block's number, after a linear, in the file alone or in the configuration too."""
    tensors = pairs(DENOISER, HIDDEN)
    wrapped = {
        key.replace(".attn.", f".{wrapper}attn.").replace(".lora_", f".{wrapper}lora_"): value
        for key, value in tensors.items()
    }
    inner = wrapper if in_config else ""
    alphas = {f"transformer_blocks.3.{inner}attn.to_q": 16.0}
    targets = rf".*\.{inner.replace('.', chr(92) + '.')}attn\.to_(q|k)"
    place = folder(tmp_path, wrapped, "base_model.model.", target_modules=targets, alpha_pattern=alphas)
    check(deltas(read(place)), tensors, dict.fromkeys(DENOISER, 4.0) | {DENOISER[6]: 16.0})


@pytest.mark.parametrize(
    "name",
    [
        "lora_unet__orig_mod_transformer_blocks_0_attn_to_q", "lora_unet_transformer_blocks_0__orig_mod_attn_to_q",
        "lora_unet_transformer_blocks__fsdp_wrapped_module__orig_mod_0_attn_to_q",
        "lora_unet__transformer_blocks_0_attn_to_q", "lora_unet_module_transformer_blocks_0_attn_to_q",
        "lora_transformer__checkpoint_wrapped_module_transformer_blocks_0_attn_to_q",
        "lycoris__orig_mod_transformer_blocks_0_attn_to_q",
    ],
)  # fmt: skip
def test_wrappers_in_kohyas_spelling(tmp_path: Path, name: str) -> None:
    """With underscores for the dots."""
    tensors = pairs(DENOISER[:1], HIDDEN)
    file = {
        key.replace(DENOISER[0], name).replace("lora_A", "lora_down").replace("lora_B", "lora_up"): v
        for key, v in tensors.items()
    }
    save_file(file, tmp_path / "x.safetensors")
    check(deltas(read(tmp_path / "x.safetensors")), tensors, {DENOISER[0]: 4.0})


def test_what_is_no_wrapper_stays() -> None:
    """Words that only contain one, in keys and in patterns."""
    assert split_key("x.submodule.y.lora_A.weight") == ("x.submodule.y", "lora_A")
    assert split_key("lora_unet_motion_module_3.lora_down.weight") == ("lora_unet_motion_module_3", "lora_A")
    assert without_wrappers_in_pattern(r".*submodule\.x") == r".*submodule\.x"
    assert without_wrappers_in_pattern(r"(_orig_mod\.)?x._orig_mod") == "()?x"


def test_wrapped_peft_names_need_their_configuration_too(tmp_path: Path) -> None:
    """Whatever stands before `base_model.model.`, nothing else knows alpha."""
    tensors = pairs(DENOISER[:1], HIDDEN)
    file = {f"module._orig_mod.base_model.model.{key}": value for key, value in tensors.items()}
    save_file(file, tmp_path / "x.safetensors")
    with pytest.raises(AdapterMalformedError, match="alpha only"):
        read(tmp_path / "x.safetensors")


def test_wrappers_in_a_headers_configuration(tmp_path: Path) -> None:
    """Before a component's name, or after it."""
    tensors = pairs(DENOISER[:1], HIDDEN)
    file = {f"transformer.{key}": value for key, value in tensors.items()}
    for prefix in ("_orig_mod.transformer.", "transformer._orig_mod.", "module.transformer.module."):
        header = json.dumps({f"{prefix}r": 4, f"{prefix}lora_alpha": 8})
        save_file(file, tmp_path / "x.safetensors", {"lora_adapter_metadata": header})
        check(deltas(read(tmp_path / "x.safetensors")), tensors, {DENOISER[0]: 8.0})


def test_the_same_module_wrapped_and_not_is_there_twice(tmp_path: Path) -> None:
    """Which of them counts nobody can know."""
    tensors = pairs(DENOISER[:1], HIDDEN)
    save_file(
        tensors | {f"_orig_mod.{key}": value.clone() for key, value in tensors.items()}, tmp_path / "x.safetensors"
    )
    with pytest.raises(AdapterMalformedError, match="twice"):
        read(tmp_path / "x.safetensors")


PLAIN = [True, False, None, "gaussian", "Gaussian", "orthogonal", "eva", "mica", "MiCA"]
CHANGE = ["pissa", "pissa_niter_16", "PiSSA", "olora", "OLoRA", "corda", "corda_ipm", "loftq", "lora_ga"]
UNKNOWN = ["quantum", "kaiming", 3, ["gaussian"], {"a": 1}]


@pytest.mark.parametrize("init", [*PLAIN, *CHANGE, *UNKNOWN], ids=str)
def test_ways_to_initialise(tmp_path: Path, init: object) -> None:
    """What leaves the base alone is an ordinary LoRA; what changes it, or may, is refused by the field's name."""
    tensors = pairs(DENOISER, HIDDEN)
    place = folder(
        tmp_path, tensors, "", target_modules=["attn.to_q", "attn.to_k"], lora_alpha=8, init_lora_weights=init
    )
    if init in PLAIN:
        check(deltas(read(place)), tensors, dict.fromkeys(DENOISER, 8.0))
        return
    with pytest.raises(
        AdapterMalformedError, match="changes the base weights" if init in CHANGE else "not known"
    ) as refused:
        read(place)
    assert refused.value.metadata["key"] == "init_lora_weights"


def test_mica_is_what_peft_reads(tmp_path: Path) -> None:
    """Written and read by peft itself."""

    class Net(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            made = [torch.nn.ModuleDict({"to_q": torch.nn.Linear(HIDDEN, HIDDEN)}) for _ in range(6)]
            self.transformer_blocks = torch.nn.ModuleList([torch.nn.ModuleDict({"attn": each}) for each in made])

    wrapped = get_peft_model(
        Net(), LoraConfig(r=4, lora_alpha=8, target_modules=["attn.to_q"], init_lora_weights="mica")
    )
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_A" in name:
                parameter.normal_()
    wrapped.save_pretrained(tmp_path)
    oracle = PeftModel.from_pretrained(Net(), tmp_path)
    for path, change in deltas(read(tmp_path)).items():
        expected = oracle.get_submodule(f"base_model.model.{path}").get_delta_weight("default").detach().double()
        torch.testing.assert_close(change, expected, rtol=1e-5, atol=1e-7)
