"""The line of a request."""

from __future__ import annotations

import pytest
import typer
from lora_server.flags import with_settings
from lora_server.monitoring.fan_out import FanOut
from lora_server.monitoring.request_log import RequestLog
from lora_server.monitoring.station import Station
from lora_server.monitoring.uses import AdapterUses
from lora_server.observer import SilentObserver
from lora_server.settings import Resolved
from structlog.testing import capture_logs

from tests.unit.monitoring.house import PROMPT, summary


def test_a_request_is_one_line_without_its_prompt() -> None:
    """Id, tenant, digests and timings are there; the prompt is nowhere in it."""
    with capture_logs() as lines:
        RequestLog().request_ended(summary())
    (line,) = lines
    assert (line["event"], line["request_id"], line["tenant"], line["outcome"]) == ("request", "r1", "t", "OK")
    assert line["adapters"] == ["neon@sha256:00:0.5"]
    assert (line["denoise_s"], line["total_s"]) == (1.0, 2.0)
    assert PROMPT not in str(line)


def test_the_prompt_is_written_if_it_is_asked_for() -> None:
    """Only then."""
    with capture_logs() as lines:
        RequestLog(prompts=True).request_ended(summary())
    assert lines[0]["prompt"] == PROMPT


@pytest.mark.parametrize("flags", [[], ["--log-prompts"]])
def test_the_flag_reaches_the_line(flags: list[str]) -> None:
    """From the command line through the configuration and the station, as `lora-server serve` goes, to the log."""
    app, found = typer.Typer(), list[Resolved]()

    def command(resolved: Resolved, print_config: bool) -> None:
        found.append(resolved)

    app.command()(with_settings(command))
    app(args=flags, standalone_mode=False)
    station = Station(found[0].config.telemetry, "1")
    with capture_logs() as lines:
        station.observer.request_ended(summary())
    station.stop()
    assert (lines[0]["event"], lines[0].get("prompt")) == ("request", PROMPT if flags else None)
    assert (PROMPT in str(lines)) == bool(flags)


def test_a_failed_request_is_a_warning() -> None:
    """With its reason as the outcome."""
    with capture_logs() as lines:
        RequestLog().request_ended(summary("GPU_OUT_OF_MEMORY"))
    assert (lines[0]["log_level"], lines[0]["outcome"]) == ("warning", "GPU_OUT_OF_MEMORY")


def test_an_observer_that_fails_hurts_nobody() -> None:
    """The others are told all the same, and whoever tells goes on."""

    class Broken(SilentObserver):
        def request_ended(self, summary: object) -> None:
            raise RuntimeError("broken")

    uses = AdapterUses(1)
    with capture_logs() as lines:
        FanOut([Broken(), uses]).request_ended(summary())
    assert next(uses.top()) == ("neon", 1, False)
    assert lines[0]["observer"] == "Broken"


def test_a_refused_request_has_its_line(caplog: pytest.LogCaptureFixture) -> None:
    """With its reason, and that it was not accepted."""
    with capture_logs() as lines:
        RequestLog().request_refused("r2", "t", "QUEUE_FULL")
    assert lines[0] == {
        "event": "request", "log_level": "info", "request_id": "r2", "tenant": "t", "outcome": "QUEUE_FULL",
        "accepted": False,
    }  # fmt: skip
