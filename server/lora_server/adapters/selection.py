"""Which files of a folder are a user's weights, by their names alone. Pure functions."""

from __future__ import annotations

import re
from pathlib import PurePosixPath

SUFFIX = ".safetensors"
PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_UNFINISHED = (".tmp", ".temp", ".incomplete", ".part", ".partial", ".download")
_TRAINING = re.compile(
    r"(optimi[sz]er|optim|optimi[sz]er_state|optimi[sz]er_states|(lr_)?scheduler|(grad_)?scaler|sampler|dataloader"
    r"|train(ing|er)?_states?|train(ing|er)?_args|random_states?|rng_states?|ema_optimi[sz]er)([-_.]?\d+)*"
)


def is_user_file(name: str) -> bool:
    """Whether a file may be what its folder is about.

    Not hidden files (macOS writes `._NAME` beside NAME, the hub's cache and this server write marks), nor what is
    still being written, nor the state of a training.
    """
    stem = PurePosixPath(name).stem.lower()
    return not (name.startswith(".") or stem.endswith(_UNFINISHED) or _TRAINING.fullmatch(stem))


def is_weights(name: str) -> bool:
    """Whether a file of this name counts as weights, if nobody named it."""
    return name.endswith(SUFFIX) and is_user_file(name)


def is_pickle(name: str) -> bool:
    """Whether a file of this name may be weights in a form that is never opened."""
    return name.endswith(PICKLE_SUFFIXES) and is_user_file(name)
