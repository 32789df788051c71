"""The grammar of tensor names that all dialects share: a module's name and the part that a tensor plays in its delta.

Pure strings. Which module a name means is the business of `names`.
"""

from __future__ import annotations

import enum
import re
from collections.abc import Mapping

from lora_server.adapters.formats.wrappers import without_wrappers, without_wrappers_underscored


class Role(enum.StrEnum):  # strings hash many times faster than members of an Enum
    """What a tensor is in its module's delta; the value is LyCORIS' or PEFT's name for it."""

    DOWN = "lora_A"
    UP = "lora_B"
    MID = "lora_mid"
    ALPHA = "alpha"
    MAGNITUDE = "dora_scale"
    HADA_W1_A = "hada_w1_a"
    HADA_W1_B = "hada_w1_b"
    HADA_W2_A = "hada_w2_a"
    HADA_W2_B = "hada_w2_b"
    HADA_T1 = "hada_t1"
    HADA_T2 = "hada_t2"
    LOKR_W1 = "lokr_w1"
    LOKR_W1_A = "lokr_w1_a"
    LOKR_W1_B = "lokr_w1_b"
    LOKR_W2 = "lokr_w2"
    LOKR_W2_A = "lokr_w2_a"
    LOKR_W2_B = "lokr_w2_b"
    LOKR_T2 = "lokr_t2"


_SUFFIXES: Mapping[str, Role] = {
    "lora_A": Role.DOWN,
    "lora_B": Role.UP,
    "lora_down": Role.DOWN,
    "lora_up": Role.UP,
    "lora_mid": Role.MID,
    "lora.down": Role.DOWN,
    "lora.up": Role.UP,
    "lora_linear_layer.down": Role.DOWN,
    "lora_linear_layer.up": Role.UP,
    "lora.alpha": Role.ALPHA,
    "lora_linear_layer.alpha": Role.ALPHA,
    "lora_magnitude_vector": Role.MAGNITUDE,
    **{role.value: role for role in Role if role not in (Role.DOWN, Role.UP, Role.MID)},
}
_KEY = re.compile(
    r"(?P<module>.+?)(?:\.(?P<suffix>"
    + "|".join(re.escape(suffix) for suffix in sorted(_SUFFIXES, key=len, reverse=True))
    + r")|(?P<old>_lora)(?P<number>[12]?)\.(?P<half>down|up))(?:\.(?P<adapter>[^.]+))??(?:\.weight)?"
)

_EMBEDDING = re.compile(
    r"(?:(?:bundle_)?emb[._].*|emb_params|string_to_(?:param|token)[._]?.*|clip_[lg]|t5(?:xxl)?|text_encoders?_\d|"
    r"<[^<>]+>|.*(?:learned_embeds|trainable_tokens|token_embedding).*)"
)
_DECIDES = re.compile(r"alpha|magnitude|dora|reshape|scal", re.IGNORECASE)


def split_key(key: str) -> tuple[str, Role] | None:
    """Splits a tensor's name into its module's name, without wrappers, and its role; None if it is of no known kind.

    Understands `X.lora_A.weight`, `X.lora_A.ADAPTER.weight`, `X.lora_down.weight`, `X.lora.down.weight`,
    `X_lora.down.weight` (early diffusers), `X_lora1.down.weight` (XLabs, module X1),
    `X.alpha`, `X.lora.alpha`, `X.dora_scale`, `X.lora_magnitude_vector`, and the names of
    LyCORIS.
    """
    match = _KEY.fullmatch(without_wrappers(key))
    if match is None:
        return None
    module = match["module"] if "." in match["module"] else without_wrappers_underscored(match["module"])
    if match["old"]:
        return module + match["number"], Role.DOWN if match["half"] == "down" else Role.UP
    role = _SUFFIXES[match["suffix"]]
    if match["adapter"] is not None and not key.endswith(".weight"):
        return None
    return module, role


def is_by_output(key: str) -> bool:
    """Whether the magnitudes of this name are one an output whatever their shape, as peft's are; else that tells."""
    return ".lora_magnitude_vector" in key


def changes_others(key: str) -> bool:
    """Whether a tensor of no known kind is named like what changes the meaning of others, such as a magnitude."""
    return _DECIDES.search(without_wrappers(key).removesuffix(".weight").rpartition(".")[2]) is not None


def is_embedding(key: str) -> bool:
    """Whether a tensor is of textual inversion: what words that were added to the vocabulary mean."""
    return _EMBEDDING.fullmatch(key) is not None
