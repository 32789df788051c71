"""What Prometheus scrapes, and that the dashboard and the alerts ask for nothing else."""

from __future__ import annotations

import contextlib
import json
import re
import socket
import threading
import time
import urllib.request
from pathlib import Path
from typing import Any

import pytest
import yaml
from lora_server.monitoring import exporter as exporter_module
from lora_server.monitoring.collector import HouseCollector
from lora_server.monitoring.exporter import Exporter
from lora_server.monitoring.metrics import Metrics
from lora_server.monitoring.uses import AdapterUses
from lora_server.types import ApplicationWay
from prometheus_client import generate_latest
from prometheus_client.parser import text_string_to_metric_families

from tests.unit.monitoring.house import House, summary

OPERATIONS = Path(__file__).parents[3] / "docs" / "operations"


@pytest.fixture
def metrics() -> Metrics:
    """Metrics of a house in which everything has happened once."""
    metrics, uses, house = Metrics(), AdapterUses(5), House()
    collector = HouseCollector("1.2.3", uses)
    collector.watch(house, house)
    collector.serving = True
    metrics.registry.register(collector)
    for observer in (metrics, uses):
        observer.call_ended("generate", "NOT_FOUND", "ADAPTER_NOT_FOUND", 0.1)
        observer.request_refused("r0", "t", "QUEUE_FULL")
        observer.request_ended(summary())
        observer.step_ended(ApplicationWay.SLOTS, 6, 0.04)
        observer.adapter_loaded("folder", "ADAPTER_MALFORMED", 0.2)
        observer.out_of_memory("step")
    return metrics


def samples(metrics: Metrics) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    """All samples, as Prometheus would read them."""
    text = generate_latest(metrics.registry).decode()
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def test_what_happens_is_counted(metrics: Metrics) -> None:
    """Outcomes and durations, each under its labels."""
    found = samples(metrics)
    call = (("code", "NOT_FOUND"), ("method", "generate"), ("reason", "ADAPTER_NOT_FOUND"))
    assert found["lora_calls_total", call] == 1
    assert found["lora_requests_total", (("outcome", "OK"),)] == 1
    assert found["lora_requests_refused_total", (("reason", "QUEUE_FULL"),)] == 1
    assert found["lora_request_denoise_seconds_sum", ()] == 1.0
    assert found["lora_step_rows_sum", (("way", "slots"),)] == 6
    load = (("outcome", "ADAPTER_MALFORMED"), ("source", "folder"))
    assert found["lora_adapter_load_seconds_count", load] == 1
    assert found["lora_out_of_memory_total", (("stage", "step"),)] == 1


def test_the_houses_counters_are_read(metrics: Metrics) -> None:
    """Every tier has its own hits, evictions and bytes; the device has its memory."""
    found = samples(metrics)
    assert found["lora_queue_requests", ()] == 3
    assert found["lora_queue_estimated_wait_seconds", ()] == 1.5
    assert found["lora_steps_total", (("way", "slots"),)] == 7
    assert found["lora_cache_hits_total", (("tier", "host"),)] == 11
    assert found["lora_cache_evictions_total", (("tier", "device"),)] == 14
    assert found["lora_cache_misses_total", (("tier", "prompts"),)] == 6
    assert found["lora_leases", ()] == 1
    assert found["lora_device_memory_bytes", (("kind", "free"),)] == 40
    assert found["lora_adapter_uses_total", (("adapter", "neon"),)] == 1


def test_before_the_house_is_there_it_does_not_serve() -> None:
    """A scrape while the model is loaded finds `lora_serving` 0, and no error."""
    metrics = Metrics()
    metrics.registry.register(HouseCollector("1", AdapterUses(1)))
    found = samples(metrics)
    assert found["lora_serving", ()] == 0
    assert ("lora_queue_requests", ()) not in found


def test_the_exporter_answers_on_its_port(metrics: Metrics) -> None:
    """Prometheus gets the registry over HTTP, until it is stopped."""
    exporter = Exporter("127.0.0.1:0", metrics.registry)
    url = f"http://{exporter.address}/metrics"
    with urllib.request.urlopen(url, timeout=5) as response:
        assert b"lora_serving 1.0" in response.read()
    with pytest.raises(OSError, match="cannot serve metrics"):
        Exporter(exporter.address, metrics.registry)
    exporter.stop()
    with pytest.raises(OSError, match="refused"):
        urllib.request.urlopen(url, timeout=5)


def expressions(value: Any) -> list[str]:
    """All PromQL in a dashboard or in rules."""
    if isinstance(value, dict):
        return [each for key, item in value.items() for each in ([item] if key == "expr" else expressions(item))]
    return [each for item in value for each in expressions(item)] if isinstance(value, list) else []


@pytest.mark.parametrize("name", ["grafana-dashboard.json", "prometheus-alerts.yaml"])
def test_every_metric_that_is_asked_for_exists(metrics: Metrics, name: str) -> None:
    """No panel and no alert waits for a series that the server never has, nor for a label that it has not."""
    found = samples(metrics)
    labels: dict[str, set[str]] = {}
    for sample, pairs in found:
        labels.setdefault(sample, set()).update(label for label, _ in pairs)
    text = (OPERATIONS / name).read_text()
    asked = expressions(json.loads(text) if name.endswith("json") else yaml.safe_load(text))
    assert len(asked) >= 8
    for expression in asked:
        for metric, selector in re.findall(r"\b((?:lora|process)_[a-z_]+)\b(?:\{([^}]*)\})?", expression):
            assert metric in labels, f"{metric} in {expression}"
            wanted = set(re.findall(r"(\w+)\s*=~?", selector))
            assert wanted <= labels[metric] | {"job", "instance"}, f"{selector} in {expression}"
        for group in re.findall(r"by\s*\(([^)]*)\)", expression):
            known = set().union(*labels.values()) | {"job", "instance"}
            assert {each.strip() for each in group.split(",")} <= known, expression


def test_every_alert_says_what_to_do() -> None:
    """Each has a severity, a summary and a description."""
    rules = yaml.safe_load((OPERATIONS / "prometheus-alerts.yaml").read_text())
    for rule in (rule for group in rules["groups"] for rule in group["rules"]):
        assert rule["labels"]["severity"] in ("page", "ticket"), rule["alert"]
        assert {"summary", "description"} <= rule["annotations"].keys(), rule["alert"]


def test_connections_that_say_nothing_take_neither_threads_nor_the_port(metrics: Metrics, monkeypatch: Any) -> None:
    """Two hundred of them: a few threads, and a scrape is answered; who stays is ended by time, also byte by byte."""
    monkeypatch.setattr(exporter_module, "MAX_CONNECTION_S", 1.0)
    before = threading.active_count()
    exporter = Exporter("127.0.0.1:0", metrics.registry)
    host, _, port = exporter.address.rpartition(":")
    silent = [socket.create_connection((host, int(port))) for _ in range(200)]
    try:
        with urllib.request.urlopen(f"http://{exporter.address}/metrics", timeout=10) as response:
            assert b"lora_serving" in response.read()
        assert threading.active_count() - before <= 2 * exporter_module.MAX_CONNECTIONS + 1
        deadline_s = time.monotonic() + 20
        while threading.active_count() > before + 1:
            assert time.monotonic() < deadline_s
            with contextlib.suppress(OSError):
                silent[-1].send(b"G")
            time.sleep(0.1)
    finally:
        for each in silent:
            each.close()
        exporter.stop()
