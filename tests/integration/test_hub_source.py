"""Adapters from the hub through a true server: fetched, drawn with, moved along with their branch."""

from __future__ import annotations

from pathlib import Path

import pytest
from lora_client import AdapterUse, LoraClient
from lora_client.errors import AdapterSourceForbiddenError, AdapterSourceNotFoundError

from tests.fake_hub import serving_hub
from tests.integration.test_uploads import QUICK, serving


def contents(folder: Path) -> dict[str, bytes]:
    """The files of an adapter."""
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_an_adapter_of_the_hub_is_fetched_and_follows_its_branch(
    demo_adapters: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A moved branch is the next version, what is missing says so, and after a kill it is all there without the hub."""
    with serving_hub() as hub:
        hub.push("me/Style", contents(demo_adapters / "text"))
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        monkeypatch.setenv("HF_HUB_OFFLINE", "0")
        with serving(tmp_path, "--allow-hub") as (address, _), LoraClient(address, timeout_s=60) as client:
            first = client.adapters.load("hub://me/Style")
            assert (first.name, first.path) == ("style", "hub://me/Style@main")
            assert {component.name for component in first.current.components} == {"transformer", "text_encoder"}
            used = client.generate("a ring", seed=1, adapters=["hub://me/Style@main:0.5"], options=QUICK)
            assert used.stats.adapters[0].adapter.digest == first.current_digest
            hub.push("me/Style", contents(demo_adapters / "a"))
            second = client.adapters.load("hub://me/Style@main")
            assert (second.name, second.ids) == (first.name, first.ids)
            assert [version.digest for version in second.versions][1:] == [first.current_digest]
            with pytest.raises(AdapterSourceNotFoundError, match="not on the hub"):
                client.adapters.load("hub://me/other")
        hub.down = True
        with serving(tmp_path, "--allow-hub") as (address, _), LoraClient(address, timeout_s=60) as client:
            assert client.adapters.get("style").current_digest == second.current_digest
            again = client.generate("a ring", seed=1, adapters=["style"], options=QUICK)
            assert again.stats.adapters[0].adapter.digest == second.current_digest
            assert len(list((tmp_path / "hub" / "me--Style").glob("?" * 40))) == 1, "what the branch was is not kept"


def test_the_hub_is_off_unless_the_operator_allows_it(server_address: str) -> None:
    """A source of the hub is forbidden then, in loads and in uses."""
    with LoraClient(server_address, timeout_s=60) as client:
        with pytest.raises(AdapterSourceForbiddenError, match="--allow-hub"):
            client.adapters.load("hub://me/style")
        with pytest.raises(AdapterSourceForbiddenError):
            client.generate("a ring", adapters=["hub://me/style:0.5"], options=QUICK)
    assert AdapterUse.parse("hub://me/style@main:0.5").scale == 0.5
