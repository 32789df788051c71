"""Fuzzes every reader of adapters with atheris: `make fuzz`, or `python -m tests.fuzz.fuzz [libFuzzer's options]`.

Stops at the first input that crashes, hangs or swells, and leaves it as crash-* in the folder of -artifact_prefix;
copy it into tests/fuzz/corpus, where the tests replay it, and mend the reader.
"""

from __future__ import annotations

import sys
import warnings
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["lora_server.adapters", "lora_server.models.weights"]):
    from tests.fuzz.harness import Harness

CORPUS = Path(__file__).parent / "corpus"


def main() -> None:
    """Runs until it is stopped, or as libFuzzer's options say (-max_total_time=SECONDS)."""
    warnings.simplefilter("ignore")
    harness = Harness()
    harness.run((CORPUS / "valid").read_bytes())

    def test_one_input(data: bytes) -> None:
        fault = harness.run(data).fault()
        if fault:
            raise AssertionError(fault)

    options = [argument for argument in sys.argv[1:] if argument.startswith("-")]
    folders = [argument for argument in sys.argv[1:] if not argument.startswith("-")]
    # New inputs go to the first folder, which must not be the committed corpus.
    atheris.Setup([sys.argv[0], "-max_len=65536", *options, *folders, str(CORPUS)], test_one_input)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
