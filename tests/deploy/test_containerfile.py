"""The Containerfile: clean, small in rights, and true to the command line. Nothing here builds it."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tomllib

import pytest

from tests.conftest import BIN
from tests.deploy.facts import DEPLOY, ROOT, Image, assert_flags_exist, configuration, port_of, tool


@pytest.fixture(scope="module")
def image() -> Image:
    """The Containerfile, read."""
    return Image()


def test_the_linter_finds_nothing() -> None:
    """Hadolint, which also runs shellcheck over RUN, is content."""
    done = subprocess.run([tool("hadolint"), DEPLOY / "Containerfile"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def test_all_that_is_copied_is_there_and_reaches_the_builder(image: Image) -> None:
    """Every source of COPY exists, and the ignore file, which lets nothing else through, lets it through."""
    copies = {value for stage in image.stages.values() for name, value in stage if name == "COPY"}
    sources = {word for value in copies if "--from" not in value for word in value.split()[:-1]}
    let_through = {line[1:] for line in (ROOT / ".containerignore").read_text().splitlines() if line.startswith("!")}
    assert sources == let_through
    assert all((ROOT / source).exists() for source in sources)
    assert (DEPLOY / "Containerfile.dockerignore").read_text() == (ROOT / ".containerignore").read_text()


def test_the_requirements_are_those_of_the_server() -> None:
    """The layer of dependencies gets what pyproject.toml asks for, with the extras server and otel."""
    command = [sys.executable, DEPLOY / "requirements.py", "server", "otel"]
    printed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    assert printed == [*project["dependencies"], *extras["server"], *extras["otel"]]


@pytest.mark.parametrize("stage", ["runtime", "cuda"])
def test_nobody_is_root(image: Image, stage: str) -> None:
    """A container runs as a user by number, as Kubernetes' runAsNonRoot wants it."""
    assert re.fullmatch(r"[1-9]\d+:[1-9]\d+", image.last(stage, "USER"))


def test_the_plain_image_has_no_build_tools(image: Image) -> None:
    """The default stage is the last one, installs no package of the system, and takes pip away."""
    assert list(image.stages)[-1] == "runtime"
    commands = " ".join(image.values("runtime", "RUN"))
    assert "apt-get" not in commands
    assert re.search(r"pip uninstall .*\bpip\b", commands)


def test_the_image_serves_where_it_says(image: Image) -> None:
    """Its environment is a configuration that the server takes, on the exposed ports, with its state in the volume."""
    words = [*json.loads(image.last("runtime", "CMD")), "--insecure"]
    assert json.loads(image.last("runtime", "ENTRYPOINT")) == ["lora-server"]
    config = configuration(words, image.environment("runtime"))
    ports = {port_of(config["rpc"]["listen"]), port_of(config["telemetry"]["metrics_listen"])}
    assert ports == {int(port) for port in image.last("runtime", "EXPOSE").split()}
    (volume,) = json.loads(image.last("runtime", "VOLUME"))
    assert config["state_dir"].startswith(f"{volume}/")
    kept = {name: value for name, value in image.environment("cuda").items() if name.endswith(("HOME", "CACHE_DIR"))}
    assert len(kept) == 3
    assert all(value.startswith(f"{volume}/") for value in kept.values())
    assert all(folder in image.values("runtime", "RUN")[0] for folder in (volume, *config["adapter_roots"]))


def test_the_health_check_is_the_servers_own(image: Image, server_address: str) -> None:
    """The command of HEALTHCHECK finds a true server healthy, and ends before the container's own patience does."""
    options, _, command = image.last("runtime", "HEALTHCHECK").partition("CMD ")
    program, *words = json.loads(command)
    assert_flags_exist(words)
    environment = {**os.environ, "LORA_SERVER_RPC_LISTEN": server_address}
    done = subprocess.run([BIN / program, *words], env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "SERVING\n"), done.stderr
    patience_s = float(re.findall(r"--timeout=(\d+)s", options)[0])
    assert 2 * float(words[words.index("--timeout") + 1]) < patience_s  # to connect, and to get an answer
