"""The systemd unit: taken by systemd, closed to what it needs not, and true to the command line and its settings."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from tests.conftest import BIN
from tests.deploy.facts import DEPLOY, assert_flags_exist, configuration, is_below, tool

UNIT = DEPLOY / "systemd" / "lora-server.service"
SETTINGS = DEPLOY / "systemd" / "lora-server.toml"
INSTALLED = "/opt/lora-server/bin"
TRACES_S = 7
"""What stopping takes longer when a collector of traces is gone (docs/operations/README.md)."""


@pytest.fixture(scope="module")
def unit() -> dict[str, list[str]]:
    """All assignments of the unit, by key; systemd's keys repeat, which no parser of INI files takes."""
    found: dict[str, list[str]] = {}
    for line in UNIT.read_text().splitlines():
        key, separator, value = line.partition("=")
        if separator and not line.startswith("#"):
            found.setdefault(key, []).append(value)
    return found


@pytest.fixture
def local_unit(tmp_path: Path) -> Path:
    """The unit as it would be on this machine, whose programs lie elsewhere, with the drop-in for GPUs."""
    path = tmp_path / UNIT.name
    path.write_text(UNIT.read_text().replace(INSTALLED, str(BIN)))
    drop_ins = tmp_path / f"{UNIT.name}.d"
    drop_ins.mkdir()
    (drop_ins / "gpu.conf").write_text((DEPLOY / "systemd" / "gpu.conf").read_text())
    return path


def test_systemd_understands_it(local_unit: Path) -> None:
    """`systemd-analyze verify` has nothing to say: every key, value and program is known to it."""
    done = subprocess.run(
        [tool("systemd-analyze"), "verify", "--man=no", local_unit], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_it_is_closed(local_unit: Path) -> None:
    """By systemd's own count the exposure is at most 2.0 of 10."""
    command = [tool("systemd-analyze"), "security", "--offline=yes", "--threshold=20", UNIT]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def test_its_command_exists(unit: dict[str, list[str]]) -> None:
    """Every flag is one of `lora-server serve`, and the configuration is the file that the documentation installs."""
    (command,) = unit["ExecStart"]
    program, *words = command.split()
    assert program == f"{INSTALLED}/lora-server"
    assert_flags_exist(words)
    assert words[words.index("--config") + 1] == f"/etc/lora-server/{SETTINGS.name}"


def test_its_settings_are_valid_and_fit_the_unit(unit: dict[str, list[str]]) -> None:
    """The sample file is a configuration; it writes where the unit may, and drains before systemd kills."""
    config = configuration(["serve", "--config", str(SETTINGS)], {})
    (state,) = unit["StateDirectory"]
    assert is_below(config["state_dir"], [f"/var/lib/{state}"])
    assert config["rpc"]["drain_timeout_s"] + TRACES_S < float(unit["TimeoutStopSec"][0])
    written = [word.partition("=")[2] for line in unit["Environment"] for word in line.split() if "/" in word]
    assert all(is_below(path, [f"/var/lib/{state}"]) for path in written)


def test_it_is_restarted_when_that_can_help(unit: dict[str, list[str]]) -> None:
    """After a failure, but not after the exit code of a wrong configuration; it waits for no message of readiness."""
    assert unit["Restart"] == ["on-failure"]
    assert unit["RestartPreventExitStatus"] == ["2"]
    assert unit["Type"] == ["exec"]  # the server has no sd_notify
