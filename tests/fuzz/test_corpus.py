"""Every input of the fuzzer's corpus: no crash, no hang, no more memory than the file, the tensors and 16 MiB."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

CORPUS = Path(__file__).parent / "corpus"
_CODE = """
import json, sys
from pathlib import Path
from tests.fuzz.harness import Harness
harness = Harness()
corpus = Path(sys.argv[1])
harness.run((corpus / "valid").read_bytes())  # what is loaded once, and caches that fill once, belong to nobody
for path in sorted(corpus.iterdir()):
    try:
        verdict = harness.run(path.read_bytes())
        print(json.dumps([path.name, verdict.error, verdict.fault()]))
    except BaseException as crash:
        print(json.dumps([path.name, "", f"crashed: {crash!r}"]))
harness.close()
"""


@pytest.fixture(scope="module")
def verdicts() -> dict[str, tuple[str, str]]:
    """(Domain error, fault) of every input; from a process of its own, whose peak of memory is nobody else's."""
    done = subprocess.run(
        [sys.executable, "-c", _CODE, CORPUS], capture_output=True, text=True, cwd=Path(__file__).parents[2], check=True
    )
    return {name: (error, fault) for name, error, fault in map(json.loads, done.stdout.splitlines())}


@pytest.mark.parametrize("name", sorted(path.name for path in CORPUS.iterdir()))
def test_an_input_of_the_corpus_is_read_or_refused(verdicts: dict[str, tuple[str, str]], name: str) -> None:
    """Valid ones are read, all others get a domain error, and none costs more than it may."""
    error, fault = verdicts[name]
    assert fault == ""
    assert not (name.startswith("valid") and error)
