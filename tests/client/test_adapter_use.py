"""Settings of an adapter as text: read by `AdapterUse.parse`, written by `lora-client show`."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from lora_api.v1 import adapter_pb2
from lora_client import AdapterUse, _requests, _results
from lora_client.cli.show import command_line

DIGEST = "sha256:" + "0a" * 32


@pytest.mark.parametrize(
    ("text", "use"),
    [
        (
            "neon:0.8,text_encoder=0.5,transformer_blocks.0=0,start=0.2,end=0.8,trigger",
            AdapterUse(
                name="neon",
                scale=0.8,
                component_scales={"text_encoder": 0.5},
                block_scales={"transformer_blocks.0": 0.0},
                start=0.2,
                end=0.8,
                use_trigger_words=True,
            ),
        ),
        ("neon,end=.5", AdapterUse(name="neon", end=0.5)),
        ("neon,.proj_out=-1e-1", AdapterUse(name="neon", block_scales={"proj_out": -0.1})),
        ("neon,b.*.attn=0,b.1=2", AdapterUse(name="neon", block_scales={"b.*.attn": 0.0, "b.1": 2.0})),
        (
            f"neon@{DIGEST}:2,trigger",
            AdapterUse(name="neon", expected_digest=DIGEST, scale=2.0, use_trigger_words=True),
        ),
        (f"{DIGEST},start=0.5", AdapterUse(digest=DIGEST, start=0.5)),
        ("/a/b,c:1,unet=0", AdapterUse(path="/a/b,c", scale=1.0, component_scales={"unet": 0.0})),
        ("/a/b,c", AdapterUse(path="/a/b,c")),
    ],
)
def test_settings_follow_after_commas(text: str, use: AdapterUse) -> None:
    """After a name, a digest or a path, with or without a scale."""
    assert AdapterUse.parse(text) == use


@pytest.mark.parametrize(
    "text",
    ["neon,triger", "neon,start", "neon,trigger=1,start=x", "neon,a=1,a=2", "neon,trigger,trigger", ",a=1", "n,"],
)
def test_what_is_no_setting_is_refused(text: str) -> None:
    """A misspelt setting never becomes a part of the name."""
    with pytest.raises(ValueError, match=r"setting|twice|missing"):
        AdapterUse.parse(text)


FACTORS = st.floats(-100, 100, width=32).map(_results.shortest)
USES = st.builds(
    AdapterUse,
    name=st.just("neon"),
    scale=FACTORS,
    expected_digest=st.just(DIGEST),
    component_scales=st.dictionaries(st.sampled_from(["transformer", "text_encoder"]), FACTORS),
    block_scales=st.dictionaries(st.sampled_from(["proj_out", "blocks.0", "blocks.*.attn"]), FACTORS),
    start=st.floats(0, 0.5, width=32).map(_results.shortest),
    end=st.just(0.625),
)


@given(use=USES)
def test_a_shown_adapter_is_read_back_as_it_was(use: AdapterUse) -> None:
    """From the request through the message and the file's metadata to the command line: nothing is lost."""
    message = _requests.use_message(use)
    applied = _results._applied(
        adapter_pb2.AppliedAdapter(
            name="neon",
            digest=DIGEST,
            scale=message.scale,
            component_scales=message.component_scales,
            block_scales=message.block_scales,
            schedule=message.schedule,
        )
    )
    metadata = {
        "name": applied.name,
        "digest": applied.digest,
        "scale": applied.scale,
        "component_scales": [list(each) for each in applied.component_scales.items()],
        "block_scales": [list(each) for each in applied.block_scales.items()],
        "schedule": {"start": applied.start, "end": applied.end},
    }
    assert AdapterUse.parse(shown(metadata)) == use


def shown(adapter: dict[str, Any], **fields: Any) -> str:
    """The adapter in the command line of a picture."""
    import shlex

    provenance = {"seed": 1, "width_px": 8, "height_px": 8, "num_inference_steps": 1, "adapters": [adapter], **fields}
    words = shlex.split(command_line(provenance))
    return words[words.index("--lora") + 1]


def test_trigger_words_are_asked_for_again_only_without_the_prompt() -> None:
    """The prompt in a file has them already; where it was left out, the user's own needs them."""
    adapter = {"name": "neon", "digest": DIGEST, "scale": 1.0, "use_trigger_words": True}
    assert not shown(adapter, prompt="glow, a star").endswith(",trigger")
    assert shown(adapter).endswith(",trigger")
