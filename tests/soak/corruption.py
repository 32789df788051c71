"""Adapters that are broken, each in its own way; the server has to refuse all of them."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


def _cut(folder: Path) -> None:
    data = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(data[: len(data) // 2])


def _empty(folder: Path) -> None:
    (folder / WEIGHTS).write_bytes(b"")


def _header_without_end(folder: Path) -> None:
    data = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(b"\xff" * 7 + b"\x7f" + data[8:])


def _noise(folder: Path) -> None:
    data = bytearray((folder / WEIGHTS).read_bytes())
    data[8:200] = bytes(range(7, 199))
    (folder / WEIGHTS).write_bytes(data)


def _other_modules(folder: Path) -> None:
    data = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(data.replace(b"transformer_blocks", b"transformer_blockz"))


def _half_a_config(folder: Path) -> None:
    text = (folder / CONFIG).read_text()
    (folder / CONFIG).write_text(text[: len(text) // 2])


CORRUPTIONS: dict[str, Callable[[Path], None]] = {
    "cut": _cut,
    "empty": _empty,
    "header without end": _header_without_end,
    "noise": _noise,
    "other modules": _other_modules,
    "half a config": _half_a_config,
}


def corrupt(origin: Path, target: Path, how: str) -> Path:
    """Writes a copy of the adapter *origin* to *target*, broken as *how* says; returns it."""
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(origin, target)
    CORRUPTIONS[how](target)
    return target
