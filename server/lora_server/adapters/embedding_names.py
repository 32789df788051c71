"""Which files hold embeddings of new words rather than an adapter, by the names that trainers give them."""

from __future__ import annotations

import re
from collections.abc import Iterable

_FILE = re.compile(
    r"(?:.*[_-]emb|.*embeddings?.*|learned_embeds.*|.*textual[_-]?inversion.*)\.(safetensors|bin|pt|pth|ckpt|pkl)|.*\.pti",
    re.IGNORECASE,
)
_FOLDER = re.compile(r"(?:.+[_-])?embeddings", re.IGNORECASE)


def is_embeddings(name: str) -> bool:
    """Whether a file or folder of this name holds embeddings: pivotal tuning's, textual inversion's, OneTrainer's."""
    return _FILE.fullmatch(name) is not None or is_embeddings_folder(name)


def is_embeddings_folder(name: str) -> bool:
    """Whether a folder of this name holds embeddings."""
    return _FOLDER.fullmatch(name) is not None


def adapters_among(names: Iterable[str]) -> list[str]:
    """The files of *names* that may be adapters; if all look like embeddings, one is only called so."""
    listed = list(names)
    return [name for name in listed if not is_embeddings(name)] or listed
