"""Every form in which callers may give adapters, and what is refused instead of being misread."""

from __future__ import annotations

import re
from collections import OrderedDict, UserDict
from fractions import Fraction
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import pytest
from lora_client import AdapterUse, AsyncLoraClient, GenerationOptions, LoraClient
from lora_client._uses import parse_uses

NEON, HALF = AdapterUse(name="neon"), AdapterUse(name="neon", scale=0.5)
DIGEST = "sha256:" + "0a" * 32


@pytest.mark.parametrize(
    ("given", "uses"),
    [
        ((), []),
        ([], []),
        ({}, []),
        ("neon", [NEON]),
        ("neon:0.5", [HALF]),
        (np.str_("neon"), [NEON]),
        (["neon"], [NEON]),
        (HALF, [HALF]),
        ([HALF, "neon"], [HALF, NEON]),
        ({"neon": 0.5}, [HALF]),
        (OrderedDict(neon=0.5, pixel=1), [HALF, AdapterUse(name="pixel", scale=1.0)]),
        (UserDict(neon=0.5), [HALF]),
        (MappingProxyType({"neon": 0.5}), [HALF]),
        ({NEON: 0.5}, [HALF]),
        (("neon", 0.5), [HALF]),
        ([("neon", 0.5)], [HALF]),
        ([["neon", 0.5]], [HALF]),
        ([(NEON, 0.5)], [HALF]),
        (zip(["neon"], [0.5], strict=True), [HALF]),
        ((each for each in ["neon:0.5"]), [HALF]),
        ([{"neon": 0.5}, "pixel"], [HALF, AdapterUse(name="pixel")]),
        ({"neon": np.float32(0.5)}, [HALF]),
        ({"neon": np.int64(1)}, [AdapterUse(name="neon", scale=1.0)]),
        ({"neon": Fraction(1, 2)}, [HALF]),
        ({"neon,trigger": 0.5}, [AdapterUse(name="neon", scale=0.5, use_trigger_words=True)]),
        ({DIGEST: 2}, [AdapterUse(digest=DIGEST, scale=2.0)]),
        ({"path": "/a", "scale": 0.5}, [AdapterUse(path="/a", scale=0.5)]),
        ([{"path": "/a", "scale": 0.5}], [AdapterUse(path="/a", scale=0.5)]),
        ([{"name": "neon", "weight": 0.5}], [HALF]),
        ([{"lora_name": "neon"}, {"lora_int_id": 3}], [NEON, AdapterUse(id=3)]),
        ([{"adapter_name": "neon", "lora_scale": 0.5}], [HALF]),
        ([{"name": "neon", "start": 0.5}], [AdapterUse(name="neon", start=0.5)]),
    ],
)
def test_every_form_means_its_scale(given: Any, uses: list[AdapterUse]) -> None:
    """Names, pairs, mappings, dictionaries of this and other APIs, and mixes; in their order."""
    assert parse_uses(given) == uses


@pytest.mark.parametrize(
    "given",
    [
        None, 3, 0.5, True, object(), b"neon", bytearray(b"neon"), b"", memoryview(b"neon"), Path("/a"),
        {"neon"}, frozenset(), {"neon": 0.5}.keys(), {"neon": 0.5}.items(), np.array(["neon"]), range(2),
        [None], [3], [0.5], [True], [b"neon"], [Path("/a")], [{"neon"}], [["neon", "pixel"]], [["neon"]], [[]],
        ["neon", 0.5], ("neon", None), ("neon", True), ("neon", b"1"), ("neon", {0.5}),
        [["neon", "pixel"], [0.5, 1.0]], ("neon", "pixel", 0.5), [("neon", 0.5, 1)],
        {"neon": None}, {"neon": True}, {"neon": "0.5"}, {"neon": [0.5]}, {"neon": {"scale": 0.5}},
        {"neon": np.bool_(1)},
        {1: 0.5}, {b"neon": 0.5}, {None: 0.5}, {"neon": 1j},
        {"scale": 0.5}, {"weight": 0.5}, {"path": "/a", "weight_name": "x"}, {"name": "neon", "neon": 0.5},
        {"name": "neon", "scale": None}, {"name": "neon", "scale": "0.5"}, {"name": "neon", "scale": True},
        {"name": "neon", "scale": 1, "weight": 1}, {"name": "neon", "lora_name": "neon"},
        {"adapter_names": ["neon"], "adapter_weights": [0.5]},
        {"name": "neon", "path": "/a"}, {"lora_name": "neon", "lora_int_id": 1, "lora_path": "/a"},
    ],
)  # fmt: skip
def test_what_is_no_form_is_a_type_error_in_one_sentence(given: Any) -> None:
    """No scale is dropped, no text taken letter by letter, no column or key taken for a name."""
    with pytest.raises(TypeError, match="adapters") as refused:
        parse_uses(given)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    "given",
    [
        {"neon": float("nan")}, {"neon": float("inf")}, {"neon": 1e39}, {"neon": 10**400}, {"neon": np.float32("nan")},
        {"neon:0.5": 0.8}, ("neon:0.5", 0.5), [(HALF, 0.5)], "", "neon:1e400", {"": 1},
    ],
)  # fmt: skip
def test_what_no_scale_can_be_is_a_value_error(given: Any) -> None:
    """Numbers that are not finite, two scales for one adapter, no adapter."""
    with pytest.raises(ValueError, match=r"finite|twice|missing|beyond"):
        parse_uses(given)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("neon:abc", "the adapter 'neon' and its scale 'abc'"),
        ("neon:0.8:0.3", "its scale '0.8:0.3'"),
        ("neon:", "its scale ''"),
        ("neon:nan", "its scale 'nan'"),
        ("Neon", "did you mean neon?"),
        ("Neon:0.5", "did you mean neon?"),
        (" neon", "did you mean neon?"),
        ("neon=0.5", "did you mean neon:0.5?"),
        ("local/dir", "did you mean the path ./local/dir"),
        ("neon:0,8", "did you mean neon:0.8?"),
        ("neon,unet=0,5", "did you mean neon,unet=0.5?"),
        ("neon:1e400", "from -100 to 100"),
        ("neon,unet=1e400", "from -100 to 100"),
        ("a b", "names are 1 to 128"),
        ("neon@v1", "after @ is not a digest"),
    ],
)
def test_a_misspelt_adapter_says_what_was_read(text: str, said: str) -> None:
    """And guesses: lower case, a path, a decimal comma, an equals sign."""
    with pytest.raises(ValueError, match=re.escape(said)):
        AdapterUse.parse(text)


ARGUMENTS: list[tuple[dict[str, Any], str]] = [
    ({"prompt": b"a star"}, "prompt"),
    ({"prompt": "a\ud800"}, "prompt"),
    ({"seed": 1.0}, "seed"),
    ({"seed": True}, "seed"),
    ({"seed": "1"}, "seed"),
    ({"seed": -1}, "seed: -1 .* from 0 to 9223372036854775807"),
    ({"seed": 2**63}, "seed: 9223372036854775808 .* from 0 to 9223372036854775807"),
    ({"seed": 10**5000}, "seed"),
    ({"options": {"num_images": 2}}, "options is a GenerationOptions"),
    ({"options": GenerationOptions(width_px=2**32)}, "width_px: 4294967296 .* from 0 to 4294967295"),
    ({"options": GenerationOptions(num_images=-1)}, "num_images"),
    ({"options": GenerationOptions(guidance_scale=float("nan"))}, "guidance_scale"),
    ({"options": GenerationOptions(true_cfg_scale=1e39)}, "true_cfg_scale"),
    ({"options": GenerationOptions(num_inference_steps="4")}, "num_inference_steps"),  # type: ignore[arg-type]
    ({"options": GenerationOptions(skip_layer_guidance={"layers": [1]})}, "skip_layer_guidance"),  # type: ignore[arg-type]
    ({"adapters": AdapterUse(name="a", component_scales=[("unet", 1)])}, "component_scales"),  # type: ignore[arg-type]
    ({"adapters": AdapterUse(name="a", block_scales={"b.0": "x"})}, "block_scales"),  # type: ignore[dict-item]
    ({"adapters": AdapterUse(name=b"a")}, "name"),  # type: ignore[arg-type]
    ({"adapters": AdapterUse(id=2**63)}, "id: "),
    ({"adapters": AdapterUse(name="a", use_trigger_words="no")}, "use_trigger_words"),  # type: ignore[arg-type]
    ({"adapters": None}, "adapters"),
]


@pytest.mark.parametrize(("arguments", "said"), ARGUMENTS)
async def test_both_clients_name_the_argument_before_they_connect(arguments: dict[str, Any], said: str) -> None:
    """No OverflowError of protobuf, no bytes taken for text, no boolean for a number; one rule for both clients."""
    given = {"prompt": "a star", **arguments}
    with LoraClient("127.0.0.1:9") as client, pytest.raises((TypeError, ValueError), match=said):
        client.generate(**given)
    async with AsyncLoraClient("127.0.0.1:9") as client:
        with pytest.raises((TypeError, ValueError), match=said):
            await client.generate(**given)


@pytest.mark.parametrize(
    "call",
    [
        lambda c: c.adapters.load("/a", tenants="acme"),
        lambda c: c.adapters.load("/a", tenants=[1]),
        lambda c: c.adapters.load("/a", tenants={"acme": 1}),
        lambda c: c.adapters.load(b"/a"),
        lambda c: c.adapters.load("/a", id=True),
        lambda c: c.adapters.load("/a", id=2**64),
        lambda c: c.adapters.load("/a", default_scale=float("inf")),
        lambda c: c.adapters.load("/a", replace="yes"),
        lambda c: c.adapters.list(states="cached"),
        lambda c: c.adapters.list(name_prefix=b"a"),
        lambda c: c.adapters.get(True),
        lambda c: c.adapters.get(1.0),
        lambda c: c.adapters.get(-1),
        lambda c: c.adapters.unload("a", drain="no"),
        lambda c: c.adapters.pin("a", ttl_s=float("inf")),
        lambda c: c.adapters.pin("a", ttl_s=float("nan")),
        lambda c: c.adapters.pin("a", ttl_s=-1),
        lambda c: c.adapters.pin("a", ttl_s=1e300),
        lambda c: next(c.watch_server(interval_s=float("nan"))),
        lambda c: next(c.watch_server(max_adapters=2**32)),
        lambda c: c.health(b"x"),
    ],
)
def test_calls_refuse_arguments_of_another_kind(call: Any) -> None:
    """The control plane's too."""
    with LoraClient("127.0.0.1:9", timeout_s=5) as client, pytest.raises((TypeError, ValueError)):
        call(client)


@pytest.mark.parametrize("timeout", [float("nan"), float("inf"), -1, 1e300, "5", True])
def test_a_timeout_is_seconds(timeout: Any) -> None:
    """Not what gRPC would turn into a moment of its own."""
    with pytest.raises((TypeError, ValueError), match="timeout_s"):
        LoraClient("127.0.0.1:9", timeout_s=timeout)
