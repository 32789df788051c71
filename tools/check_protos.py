"""Fails if the committed stubs are not what the .proto files generate."""

from __future__ import annotations

import filecmp
import sys
import tempfile
from importlib import resources
from pathlib import Path

from grpc_tools import protoc

ROOT = Path(__file__).parent.parent
STUBS = Path("lora_api/v1")


def main() -> int:
    """Generates into a temporary folder and compares; returns the exit code."""
    protos = sorted(str(path) for path in (ROOT / "protos" / STUBS).glob("*.proto"))
    with tempfile.TemporaryDirectory() as folder:
        outputs = [f"--{kind}_out=quiet:{folder}" for kind in ("mypy", "mypy_grpc")]
        outputs += [f"--{kind}_out={folder}" for kind in ("python", "grpc_python")]
        google = resources.files("grpc_tools") / "_proto"
        if protoc.main(["protoc", f"-I{ROOT / 'protos'}", f"-I{google}", *outputs, *protos]):
            return 1
        generated = {path.name for path in (Path(folder) / STUBS).iterdir()}
        committed = {path.name for path in (ROOT / "client" / STUBS).glob("*_pb2*")}
        _, differ, missing = filecmp.cmpfiles(
            Path(folder) / STUBS, ROOT / "client" / STUBS, sorted(generated), shallow=False
        )
    drift = sorted({*differ, *missing, *(committed - generated)})
    if drift:
        sys.stderr.write(f"stubs differ from protos/ (run `make protos`): {', '.join(drift)}\n")
    return 1 if drift else 0


if __name__ == "__main__":
    sys.exit(main())
