"""What a local adapter sends to a server: its files, their manifest, and their bytes in chunks."""

from __future__ import annotations

import hashlib
import os
import re
import unicodedata
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from lora_api.v1 import adapter_service_pb2

CHUNK_BYTES = 1024 * 1024
_SUFFIXES = (".safetensors", ".json", ".md")
_BELONGS = re.compile(r"(transformer|unet|text_encoder)(_\d+)?|(.+[_-])?embeddings")
"""Sub-folders that may belong to an adapter: they are sent, so that the server can say what it cannot apply."""
_PICKLED_EMBEDDINGS = re.compile(
    r".*\.pti|(.*[_-]emb|.*embeddings?.*|learned_embeds.*|.*textual[_-]?inversion.*)\.(bin|pt|pth|ckpt|pkl)", re.I
)
_NOT_OURS = re.compile(
    r"(optimi[sz]er|optim|optimi[sz]er_states?|(lr_)?scheduler|(grad_)?scaler|sampler|dataloader"
    r"|train(ing|er)?_states?|train(ing|er)?_args|random_states?|rng_states?|ema_optimi[sz]er)([-_.]?\d+)*"
    r"|.*\.(tmp|temp|incomplete|part|partial|download)"
)
"""Stems of what trainers and downloads leave beside an adapter; the server passes it over, too."""


@dataclass(frozen=True, slots=True)
class LocalFile:
    """One file to send, and its path in the adapter's folder."""

    path: Path
    name: str


def local_files(path: str | Path, components: Iterable[str] = (), *, allow_partial: bool = False) -> list[LocalFile]:
    """Lists what belongs to the adapter at *path*: a .safetensors file, or a folder.

    Of a folder, its weights, configurations and cards, and those of sub-folders named after *components* or like them.

    Raises:
        ValueError: If there is no adapter there, or, unless *allow_partial* is on, if a part of it cannot be sent.
    """
    place = Path(path).expanduser()
    if place.is_file() and place.name.endswith(".safetensors"):
        return [_named(place, place.parent)]
    if not place.is_dir():
        raise ValueError(f"{str(path)!r} is neither a folder nor a .safetensors file")
    wanted = set(components)
    inner = sorted(each.name for each in place.iterdir() if each.name in wanted or _BELONGS.fullmatch(each.name))
    folders = [place, *(place / name for name in inner if (place / name).is_dir())]
    files = [
        _named(file, place)
        for folder in folders
        for file in sorted(folder.iterdir())
        if file.is_file() and file.name.endswith(_SUFFIXES) and _is_an_adapters(file)
    ]
    if not any(file.name.endswith(".safetensors") for file in files):
        raise ValueError(f"{str(path)!r} has no .safetensors file")
    pickled = next((each.name for each in sorted(place.iterdir()) if _PICKLED_EMBEDDINGS.fullmatch(each.name)), None)
    if pickled is not None and not allow_partial:
        raise ValueError(f"{pickled!r} holds embeddings of new words, which are not sent; allow_partial goes without")
    return files


def _is_an_adapters(file: Path) -> bool:
    """Whether a file is the user's: not hidden, and no state of a training."""
    return not file.name.startswith(".") and not _NOT_OURS.fullmatch(file.stem.lower())


def _named(file: Path, folder: Path) -> LocalFile:
    name = file.relative_to(folder).as_posix()
    try:
        name.encode("utf-8")
    except UnicodeEncodeError:
        raise ValueError(f"the name of the file {os.fsencode(name)!r} is not UTF-8; rename it") from None
    return LocalFile(file, name)


def default_name(path: str | Path) -> str:
    """A name made from the file's or folder's, as the server makes them.

    Letters that no name may have are dropped, and digits of a hash stand for them, so that two files are two names.
    """
    place = Path(path).expanduser().absolute()
    stem = unicodedata.normalize("NFC", place.name.removesuffix(".safetensors").lower())
    slug = re.sub(r"[^a-z0-9._-]+", "-", stem).strip("-._")
    if not slug or any(char.isalnum() and not char.isascii() for char in stem):
        digits = hashlib.sha256(stem.encode("utf-8", "surrogateescape")).hexdigest()[:8]
        return f"{slug[:119] or 'adapter'}-{digits}"
    return slug[:128]


def requests(
    files: Iterable[LocalFile], manifest: adapter_service_pb2.UploadManifest
) -> Iterator[adapter_service_pb2.UploadAdapterRequest]:
    """Yields the manifest, with *files* filled in, and then their bytes."""
    files = list(files)
    for file in files:
        size_bytes, sha256 = _measured(file.path)
        manifest.files.add(path=file.name, size_bytes=size_bytes, sha256=sha256)
    yield adapter_service_pb2.UploadAdapterRequest(manifest=manifest)
    for index, file in enumerate(files):
        offset_bytes = 0
        with open(file.path, "rb") as opened:
            while data := opened.read(CHUNK_BYTES):
                chunk = adapter_service_pb2.UploadChunk(file_index=index, offset_bytes=offset_bytes, data=data)
                yield adapter_service_pb2.UploadAdapterRequest(chunk=chunk)
                offset_bytes += len(data)


def _measured(path: Path) -> tuple[int, str]:
    digest, size_bytes = hashlib.sha256(), 0
    with open(path, "rb") as file:
        while data := file.read(CHUNK_BYTES):
            digest.update(data)
            size_bytes += len(data)
    return size_bytes, digest.hexdigest()
