"""Which of an adapter's files hold tensors, and what lies beside them: the shapes that a folder may have.

| in the folder | what it is |
|---|---|
| adapter_config.json, adapter_model.safetensors (and sub-folders named after components) | PEFT |
| pytorch_lora_weights.safetensors | diffusers |
| exactly one other *.safetensors | any dialect |
"""

from __future__ import annotations

from collections.abc import Mapping

from lora_server.adapters.formats.header import Buffer, Limits, header_of_bytes
from lora_server.adapters.formats.inputs import SourceFile
from lora_server.adapters.formats.peft_config import parse_config
from lora_server.adapters.source import CONFIG_FILE, WEIGHTS_FILE
from lora_server.errors import AdapterMalformedError


def source_files(adapter: str, contents: Mapping[str, Buffer], denoiser: str, limits: Limits) -> list[SourceFile]:
    """Reads the headers and configurations among an adapter's files, by relative path.

    Raises:
        AdapterMalformedError: If one is broken, or a PEFT folder is incomplete.
        AdapterHeaderTooLargeError, AdapterTooManyTensorsError: If a limit is exceeded.
    """
    if not any(path.endswith(CONFIG_FILE) for path in contents):
        return [
            SourceFile(header_of_bytes(adapter, path, data, limits))
            for path, data in sorted(contents.items())
            if path.endswith(".safetensors")
        ]
    files, seen = [], set()
    for folder in sorted({path.rpartition("/")[0] for path in contents}):
        component = folder or denoiser
        if component in seen:
            raise AdapterMalformedError(adapter, f"adapts {component} twice", folder)
        seen.add(component)
        prefix = f"{folder}/" if folder else ""
        for name in (CONFIG_FILE, WEIGHTS_FILE):
            if prefix + name not in contents:
                raise AdapterMalformedError(adapter, "the file is missing", prefix + name)
        config = parse_config(adapter, prefix, bytes(memoryview(contents[prefix + CONFIG_FILE])))
        header = header_of_bytes(adapter, prefix + WEIGHTS_FILE, contents[prefix + WEIGHTS_FILE], limits)
        files.append(SourceFile(header, config, folder or None))
    return files
