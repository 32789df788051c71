"""What deploy/ says, and what the command line knows, in a form that tests compare."""

from __future__ import annotations

import io
import os
import shutil
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from dockerfile_parse import DockerfileParser
from lora_server.cli import app
from typer.main import get_command
from typer.testing import CliRunner

from tests.conftest import BIN

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"


def tool(name: str) -> str:
    """The path of a checker that comes with the extra `dev`, or with the system; skips without it, fails in CI."""
    found = shutil.which(name, path=f"{BIN}{os.pathsep}{os.environ['PATH']}")
    if found is None:
        (pytest.fail if os.environ.get("CI") else pytest.skip)(f"there is no {name} on this machine")
    return str(found)


def parameters_of(name: str) -> list[Any]:
    """The parameters of one command of `lora-server`, as click has them."""
    group: Any = get_command(app)
    return list(group.commands[name].params)


def flags_of(command: str) -> set[str]:
    """All flags of a command of `lora-server`."""
    return {flag for each in parameters_of(command) for flag in (*each.opts, *each.secondary_opts)}


def variables_of(command: str) -> set[str]:
    """The environment variables that the command itself reads, besides those of settings."""
    names: set[str] = set()
    for each in parameters_of(command):
        envvar = each.envvar
        names.update([envvar] if isinstance(envvar, str) else envvar or ())
    return names


def assert_flags_exist(words: Sequence[str]) -> None:
    """Fails if a call of `lora-server`, as words without the program, has a flag that its command lacks."""
    given = {word.partition("=")[0] for word in words if word.startswith("--")}
    assert given <= flags_of(words[0]), f"{words} has flags that `lora-server {words[0]}` does not"


def configuration(words: Sequence[str], environment: Mapping[str, str]) -> dict[str, Any]:
    """What `lora-server` makes of a call of `serve` in exactly this environment; refuses what a start would refuse."""
    assert words[0] == "serve"
    clean: dict[str, str | None] = {name: None for name in os.environ if name.startswith("LORA_SERVER_")}
    result = CliRunner().invoke(app, [*words, "--print-config"], env={**clean, **environment})
    assert result.exit_code == 0, result.output
    return tomllib.loads(result.output)


def port_of(address: str) -> int:
    """The port of HOST:PORT."""
    return int(address.rpartition(":")[2])


def is_below(path: str, folders: Iterable[str]) -> bool:
    """Whether *path* is one of the folders, or in one."""
    return any(Path(path).is_relative_to(folder) for folder in folders)


class Image:
    """The Containerfile's stages, each with the instructions of those that it stands on."""

    def __init__(self) -> None:
        """Reads deploy/Containerfile."""
        parser = DockerfileParser(fileobj=io.BytesIO((DEPLOY / "Containerfile").read_bytes()))
        self.stages: dict[str, list[tuple[str, str]]] = {}
        stage = "before"
        for line in parser.structure:
            name, value = line["instruction"], line["value"]
            if name == "FROM":
                base, _, stage = value.partition(" AS ")
                self.stages[stage] = list(self.stages.get(base, []))
            elif name != "COMMENT":
                self.stages.setdefault(stage, []).append((name, value))

    def values(self, stage: str, instruction: str) -> list[str]:
        """The values of an instruction in a stage, first to last."""
        return [value for name, value in self.stages[stage] if name == instruction]

    def last(self, stage: str, instruction: str) -> str:
        """The value that holds at the end of a stage."""
        return self.values(stage, instruction)[-1]

    def environment(self, stage: str) -> dict[str, str]:
        """The environment of a container of a stage."""
        pairs = [pair.partition("=") for value in self.values(stage, "ENV") for pair in value.split()]
        return {name: value for name, _, value in pairs}
