"""What a local adapter sends to a server: its files, their manifest, and their bytes in chunks."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from lora_api.v1 import adapter_service_pb2

CHUNK_BYTES = 1024 * 1024
_SUFFIXES = (".safetensors", ".json", ".md")
_PART = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,127}")
_NOT_OURS = ("trainer_state.json", "training_args.json")
_BELONGS = re.compile(r"(transformer|unet|text_encoder)(_\d+)?|(.+[_-])?embeddings")
"""Sub-folders that may belong to an adapter: they are sent, so that the server can say what it cannot apply."""
_PICKLED_EMBEDDINGS = re.compile(
    r".*\.pti|(.*[_-]emb|.*embeddings?.*|learned_embeds.*|.*textual[_-]?inversion.*)\.(bin|pt|pth|ckpt|pkl)", re.I
)


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
        return [LocalFile(place, place.name if _PART.fullmatch(place.name) else "adapter.safetensors")]
    if not place.is_dir():
        raise ValueError(f"{str(path)!r} is neither a folder nor a .safetensors file")
    wanted = set(components)
    inner = sorted(each.name for each in place.iterdir() if each.name in wanted or _BELONGS.fullmatch(each.name))
    folders = [place, *(place / name for name in inner if (place / name).is_dir())]
    files = [
        LocalFile(file, file.relative_to(place).as_posix())
        for folder in folders
        for file in sorted(folder.iterdir())
        if file.is_file()
        and file.name.endswith(_SUFFIXES)
        and _PART.fullmatch(file.name)
        and file.name not in _NOT_OURS
    ]
    if not any(file.name.endswith(".safetensors") for file in files):
        raise ValueError(f"{str(path)!r} has no .safetensors file")
    pickled = next((each.name for each in sorted(place.iterdir()) if _PICKLED_EMBEDDINGS.fullmatch(each.name)), None)
    if pickled is not None and not allow_partial:
        raise ValueError(f"{pickled!r} holds embeddings of new words, which are not sent; allow_partial goes without")
    return files


def default_name(path: str | Path) -> str:
    """A name made from the file's or folder's, as the server makes them."""
    place = Path(path).expanduser().absolute()
    stem = place.name.removesuffix(".safetensors").lower()
    return re.sub(r"[^a-z0-9._-]+", "-", stem).strip("-._")[:128] or "adapter"


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
