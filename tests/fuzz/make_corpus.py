"""Writes the corpus: adapters that peft wrote, and what has ever crashed, hung or swollen a reader, by name.

`python -m tests.fuzz.make_corpus` after adding a case; a crash that `make fuzz` finds is copied into corpus/ as it is.
"""

from __future__ import annotations

import json
import struct
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save

from tests.factories import TinyNet, write_adapter
from tests.fuzz.harness import IN_SUBFOLDER, NO_CONFIG, NO_WEIGHTS, frame

CORPUS = Path(__file__).parent / "corpus"
MODULE = "base_model.model.blocks.0.to_q"


def header(text: bytes, length: int | None = None) -> bytes:
    """A safetensors file of nothing but a header, which may lie about its length."""
    return struct.pack("<Q", len(text) if length is None else length) + text


def one_tensor(shape: str, offsets: str, dtype: str = "F32") -> bytes:
    """A safetensors file whose header claims one tensor."""
    text = f'{{"{MODULE}.lora_A.weight":{{"dtype":"{dtype}","shape":{shape},"data_offsets":{offsets}}}}}'
    return header(text.encode())


def many_tensors(count: int) -> bytes:
    """A header of very many tensors without a byte of data."""
    entries = [f'"{MODULE}.lora_A.{k}.weight":{{"dtype":"F32","shape":[0],"data_offsets":[0,0]}}' for k in range(count)]
    return header(("{" + ",".join(entries) + "}").encode())


def bare(tensors: dict[str, torch.Tensor], metadata: dict[str, str] | None = None) -> bytes:
    """A single file without a configuration, of any dialect."""
    return frame(b"", save({key: each.clone() for key, each in tensors.items()}, metadata), NO_CONFIG)


def dialects() -> dict[str, bytes]:
    """A valid file of every kind and way to name modules, so that the fuzzer begins there too."""
    name = "lora_unet_blocks_0_to_q"
    up, down = torch.full((6, 2), 0.5), torch.full((2, 6), 0.5)
    alpha = {f"{name}.alpha": torch.tensor(1.0)}
    lora = {f"{name}.lora_up.weight": up, f"{name}.lora_down.weight": down}
    loha = {f"{name}.hada_w{n}_{half}": each for n in "12" for half, each in (("a", up), ("b", down))}
    lokr = {f"{name}.lokr_w1": torch.ones(2, 2), f"{name}.lokr_w2_a": up[:3, :1], f"{name}.lokr_w2_b": down[:1, :3]}
    dotted = {"transformer.blocks.0.to_q.lora_A.weight": down, "transformer.blocks.0.to_q.lora_B.weight": up}
    config = {"transformer.r": 2, "transformer.lora_alpha": 4}
    said = {
        "ss_tag_frequency": json.dumps({"1_x": {"glow": 9, "sky": 2}}),
        "modelspec.title": "T",
        "lora_adapter_metadata": json.dumps(config),
    }
    return {
        "valid-kohya": bare(lora | alpha),
        "valid-fp8": bare({key: value.to(torch.float8_e4m3fn) for key, value in lora.items()} | alpha),
        "valid-loha": bare(loha | alpha),
        "valid-lokr": bare(lokr | alpha),
        "valid-dora": bare(lora | alpha | {f"{name}.dora_scale": torch.ones(6, 1)}),
        "valid-diffusers": bare(dotted, said),
        "valid-wrapped": bare({f"module._orig_mod.{key}": each for key, each in dotted.items()}),
        "valid-alpha-of-lora": bare(dotted | {"transformer.blocks.0.to_q.lora.alpha": torch.tensor(2.0)}),
        "alpha-of-a-half": bare(dotted | {"transformer.blocks.0.to_q.lora_A.alpha": torch.tensor(2.0)}),
        "joint-scalars": bare(
            {f"transformer.transformer_blocks.0.attn.to_q.lora_{e}": torch.tensor(1.0) for e in "AB"}
        ),
        "embedding-inside": bare(dotted | {"bundle_emb.glow.clip_l": torch.ones(2, 4)}),
        "declares-another": bare(dotted, {"modelspec.architecture": "flux-1-dev/lora"}),
        "name-surrogate": frame(
            b"", header(b'{"\\ud800":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}}'), NO_CONFIG
        ),
        "metadata-deep": bare(dotted, {"lora_adapter_metadata": "[" * 50_000}),
        "metadata-swells": bare(
            dotted, {"ss_tag_frequency": '{"x":{' + ",".join(f'"{n}":1' for n in range(30_000)) + "}}"}
        ),
        "header-many-fields": frame(
            b"", header(b'{"__metadata__":{' + b",".join(b'"%d":""' % n for n in range(9_000)) + b"}}"), NO_CONFIG
        ),
        "header-many-arrays": frame(b"", header(b'{"x":[' + b"[[[]]]," * 9_000 + b"1]}"), NO_CONFIG),
    }


def cards(config: bytes, weights: bytes) -> dict[str, bytes]:
    """An adapter with cards beside it, as people write them and as nobody should."""
    card = b"---\nbase_model: a/b\ninstance_prompt: a photo of sks dog\nlora_scale: 0.8\ntags: [lora]\n---\n# A card\n"
    sidecar = b'{"activation text": "glow", "preferred weight": 0.7, "sd version": "SDXL"}'
    own = b'{"trigger_words": ["own", "words"]}'
    odd = b"x: " + b":".join([b"1"] * 400) + b".5\ny: !!int ''\nz: !!timestamp x\n"
    front = b"---\n" + odd + b"w: [" + b"{a}," * 5_900 + b"]\n---\n"
    objects = b'{"":[' + b"{}," * 87_000 + b"1]}"
    return {
        "valid-cards": frame(config, weights, cards=(card, sidecar, own)),
        "valid-cards-swell": frame(config, weights, cards=(front, objects, b"")),
        "valid-cards-too-large": frame(
            config, weights, cards=(card + b" " * 300_000, sidecar * 4_000, own + b" " * 300_000)
        ),
        "cards-own-swells": frame(config, weights, cards=(b"---\n&a a: *a\n---", b"[" * 100_000, objects)),
    }


def cases() -> dict[str, bytes]:
    """All inputs by name."""
    with tempfile.TemporaryDirectory() as root:
        folder = write_adapter(Path(root) / "x", TinyNet())
        config = json.loads((folder / "adapter_config.json").read_text())
        weights = (folder / "adapter_model.safetensors").read_bytes()
        listed = write_adapter(Path(root) / "y", TinyNet(), target_modules=["to_q", "to_k"], rank_pattern={"to_k": 2})
        patterned = frame(
            (listed / "adapter_config.json").read_bytes(), (listed / "adapter_model.safetensors").read_bytes()
        )

    def changed(**changes: Any) -> bytes:
        return frame(json.dumps({**config, **changes}).encode(), weights)

    def raw(text: bytes) -> bytes:
        return frame(text, weights)

    plain = json.dumps(config).encode()
    return {
        "valid": frame(plain, weights),
        "valid-subfolder": frame(plain, weights, IN_SUBFOLDER),
        "valid-patterns": patterned,
        "valid-regex": changed(target_modules=r".*blocks\.\d\.to_q"),
        "empty": b"",
        "no-config": frame(plain, weights, NO_CONFIG),
        "no-weights": frame(plain, weights, NO_WEIGHTS),
        "alpha-beyond-floats": changed(lora_alpha=10**400),
        "layers-float": changed(target_modules=["to_q"], layers_to_transform=1.5),
        "layers-object": changed(target_modules=["to_q"], layers_to_transform={"a": 1}),
        "regex-recursion": changed(target_modules="(?R)"),
        "regex-recursive-group": changed(target_modules="(a|(?1))*"),
        "regex-fuzzy": changed(target_modules="(?:foo){e<=5}"),
        "regex-backtracks": changed(target_modules="(.*.*.*.*.*.*.*.*.*.*.*.*)*x"),
        "regex-nested-repeats": changed(target_modules="((a{0,999}){0,999}){0,999}"),
        "regex-alternatives": changed(target_modules="|".join(f"m{k}.*" for k in range(20_000))),
        "regex-deep": changed(target_modules="(" * 900 + ")" * 900),
        "regex-ignorecase-classes": changed(target_modules="(?i)" + "[\0-\U0010ffff]" * 300),
        "patterns-many": changed(rank_pattern={f"z{k}": 3 for k in range(12_000)}),
        "targets-many": changed(target_modules=[*(f"z{k}" for k in range(20_000)), "to_q"]),
        "config-deep": raw(b'{"peft_type":"LORA","init_lora_weights":' + b"[" * 900 + b"]" * 900 + b"}"),
        "config-too-deep": raw(b"[" * 100_000),
        "config-swells": raw(b'{"peft_type":"LORA","x":[' + b'{"":1},' * 50_000 + b"1]}"),
        "config-surrogate": raw(b'{"peft_type":"LORA","\\ud800":1}'),
        "config-not-utf8": raw(b"\xff\xfe{}"),
        "header-longer-than-file": frame(plain, header(b"{}", 2**63)),
        "header-huge-shape": frame(plain, one_tensor("[9999999999,9999999999]", "[0,4]")),
        "header-overflowing-shape": frame(plain, one_tensor("[4294967296,4294967296]", "[0,0]")),
        "header-empty-shape": frame(plain, one_tensor("[0,99999999999]", "[0,0]")),
        "header-negative": frame(plain, one_tensor("[-1,6]", "[0,4]")),
        "header-many-tensors": frame(plain, many_tensors(20_000)),
        "header-deep": frame(plain, header(b"[" * 50_000)),
        "weights-cut": frame(plain, weights[:-7]),
        **dialects(),
        **cards(plain, weights),
    }


def main() -> None:
    """Writes every case."""
    CORPUS.mkdir(exist_ok=True)
    for name, data in cases().items():
        (CORPUS / name).write_bytes(data)


if __name__ == "__main__":
    main()
