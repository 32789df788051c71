"""Who may do what on a true server with TLS, tokens and adapters of one tenant."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import grpc
import pytest
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase
from lora_client import AdapterUse, GenerationOptions, LoraClient, Tls
from lora_client.errors import (
    AdapterNotFoundError,
    AdapterSourceNotFoundError,
    InvalidRequestError,
    PermissionDeniedError,
    UnauthenticatedError,
)

from tests.conftest import BIN
from tests.integration.secure import SecureServer

QUICK = GenerationOptions(num_inference_steps=2)


@pytest.fixture(scope="module")
def secure(tmp_path_factory: pytest.TempPathFactory, demo_adapters: Path) -> Iterator[SecureServer]:
    """One server for this file."""
    server = SecureServer.start(tmp_path_factory.mktemp("secure"), demo_adapters)
    yield server
    server.stop()
    log = server.log.read_text()
    assert "UNAUTHENTICATED" in log
    assert not any(token in log for token in server.tokens.values())
    hashes = [line.split()[0].removeprefix("sha256:") for line in server.token_file.read_text().splitlines()]
    assert not any(each in log for each in hashes)
    assert '"tenant": "acme"' in log


def test_without_a_known_token_only_health_answers(secure: SecureServer) -> None:
    """Health is open; every other call is UNAUTHENTICATED, streams too, and repeats nothing of what was sent."""
    with secure.client(None) as nobody:
        assert nobody.health()
        calls = (nobody.server_info, nobody.adapters.list, lambda: nobody.generate("x", options=QUICK))
        for call in calls:
            with pytest.raises(UnauthenticatedError):
                call()
    with LoraClient(
        secure.address, tls=Tls(secure.ca.read_bytes(), server_name="localhost"), token="lora_wrong"
    ) as wrong:
        with pytest.raises(UnauthenticatedError) as error:
            wrong.server_info()
        assert "lora_wrong" not in repr(error.value)
        assert "lora_wrong" not in str(error.value.metadata)


def test_roles_are_per_rpc(secure: SecureServer, demo_adapters: Path) -> None:
    """One who generates changes no adapter, one who manages makes no image, both read."""
    with secure.client("ann") as ann, secure.client("root") as root:
        assert ann.generate("a red star", options=QUICK).images
        with pytest.raises(PermissionDeniedError) as denied:
            ann.adapters.load(str(demo_adapters / "b"))
        assert denied.value.metadata == {"method": "LoadAdapter", "role": "admin"}
        assert root.adapters.load(str(demo_adapters / "b"), name="bee").name == "bee"
        with pytest.raises(PermissionDeniedError):
            root.generate("a red star", options=QUICK)
        assert ann.server_info().version == root.server_info().version


def test_an_adapter_of_one_tenant_does_not_exist_for_others(secure: SecureServer, demo_adapters: Path) -> None:
    """By name, digest and path, warm as it is; it is in no list either; the administrator sees whose it is."""
    with secure.client("ann") as ann, secure.client("ulf") as ulf, secure.client("root") as root:
        mine = root.adapters.get("mine")
        assert mine.tenants == ("acme",)
        assert ann.generate("a red star", adapters=["mine"], options=QUICK).stats.adapters[0].load_time_s == 0
        for use in ("mine", AdapterUse(digest=mine.current_digest)):
            with pytest.raises(AdapterNotFoundError):
                ulf.generate("a red star", adapters=[use], options=QUICK)
        for path in (demo_adapters / "a", demo_adapters / "a" / "transformer", demo_adapters):
            with pytest.raises(AdapterSourceNotFoundError) as refused:
                ulf.generate("a red star", adapters=[AdapterUse(path=str(path))], options=QUICK)
            with pytest.raises(AdapterSourceNotFoundError) as missing:
                ulf.generate("a red star", adapters=[AdapterUse(path=str(demo_adapters / "none"))], options=QUICK)
            assert str(refused.value) == str(missing.value).replace(str(demo_adapters / "none"), str(path))
        with pytest.raises(AdapterNotFoundError):
            ulf.adapters.get("mine")
        assert "mine" in {each.name for each in ann.adapters.list()}
        assert "mine" not in {each.name for each in ulf.adapters.list()}


def test_a_request_id_belongs_to_its_tenant(secure: SecureServer) -> None:
    """Who guesses another's request id neither gets its pictures nor blocks it."""
    options = GenerationOptions(num_inference_steps=2, request_id="guess-me")
    with secure.client("ann") as ann, secure.client("ulf") as ulf:
        first = ann.generate("a red star", seed=1, options=options)
        assert ulf.generate("a blue ring", seed=1, options=options).images[0].data != first.images[0].data
        assert ann.generate("a red star", seed=1, options=options).images[0].data == first.images[0].data


def test_the_command_line_takes_the_token_from_the_environment(secure: SecureServer) -> None:
    """LORA_TOKEN over TLS; never in plain text over a network; the server's own probe needs none."""
    environment = {**os.environ, "LORA_TOKEN": secure.tokens["root"]}
    port = secure.address.rpartition(":")[2]
    command = [BIN / "lora-client", "--server", f"localhost:{port}", "--tls-ca", secure.ca, "adapters", "list"]
    listed = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert "mine" in listed.stdout
    plain = [BIN / "lora-client", "--server", f"192.0.2.1:{port}", "info"]
    refused = subprocess.run(plain, env=environment, capture_output=True, text=True, timeout=20)
    assert refused.returncode == 2
    assert "never sent in plain text" in refused.stderr
    assert secure.tokens["root"] not in refused.stderr
    probe = [BIN / "lora-server", "health", "--address", f"localhost:{port}", "--tls-ca", secure.ca]
    assert subprocess.run(probe, capture_output=True, text=True, check=True).stdout == "SERVING\n"


def test_health_takes_all_it_needs_from_the_environment(secure: SecureServer) -> None:
    """The one command of every container's check works with TLS too: the address, whom to trust, the server's name."""
    environment = {
        **os.environ,
        "LORA_SERVER_RPC_LISTEN": f"0.0.0.0:{secure.address.rpartition(':')[2]}",
        "LORA_SERVER_HEALTH_TLS_CA": str(secure.ca),
        "LORA_SERVER_HEALTH_TLS_SERVER_NAME": "localhost",
    }
    probe = [BIN / "lora-server", "health", "--timeout", "4"]
    done = subprocess.run(probe, env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "SERVING\n"), done.stderr


def test_reflection_is_off(secure: SecureServer) -> None:
    """With --no-reflection nobody can list the services."""
    tls = Tls(secure.ca.read_bytes(), server_name="localhost")
    with grpc.secure_channel(secure.address, tls.credentials(), options=tls.options()) as channel:
        database = ProtoReflectionDescriptorDatabase(channel)
        with pytest.raises(grpc.RpcError) as error:
            database.get_services()
        assert error.value.code() is grpc.StatusCode.UNIMPLEMENTED


def test_a_revoked_token_is_refused_within_a_second(secure: SecureServer) -> None:
    """The file is read again when it changes; a broken file revokes nobody, and lets nobody in."""
    lines = secure.token_file.read_text().splitlines()
    with secure.client("ulf") as ulf:
        ulf.server_info()
        secure.token_file.write_text("broken")
        time.sleep(0.7)
        ulf.server_info()
        secure.token_file.write_text("\n".join([lines[0], lines[2]]))
        time.sleep(0.7)
        with pytest.raises(UnauthenticatedError):
            ulf.server_info()
        secure.token_file.write_text("\n".join(lines))
        time.sleep(0.7)
        ulf.server_info()


def test_a_name_or_id_that_a_request_makes_is_its_tenants_alone(secure: SecureServer, demo_adapters: Path) -> None:
    """Nobody else draws with it, an operator takes it, and a refused request makes none."""
    squat, by_id = AdapterUse(path=str(demo_adapters / "b"), id=4711), AdapterUse(id=4711)
    with secure.client("ann") as ann, secure.client("ulf") as ulf, secure.client("root") as root:
        used = ulf.generate("a red star", adapters=[squat], options=QUICK).stats.adapters[0].adapter
        assert (
            ulf.generate("a red star", adapters=[by_id], options=QUICK).stats.adapters[0].adapter.digest == used.digest
        )
        with pytest.raises(AdapterNotFoundError):
            ann.generate("a red star", adapters=[by_id], options=QUICK)
        loaded = root.adapters.load(str(demo_adapters / "text"), id=4711)
        assert loaded.current_digest != used.digest
        for client in (ann, ulf):
            drawn = client.generate("a red star", adapters=[by_id], options=QUICK).stats.adapters[0].adapter
            assert drawn.digest == loaded.current_digest
        before = [(each.name, each.ids) for each in ulf.adapters.list()]
        twice = [AdapterUse(path=f"{demo_adapters}/b{end}") for end in ("//", "/.", "/./")]
        with pytest.raises(InvalidRequestError):
            ulf.generate("a red star", adapters=twice, options=QUICK)
        assert [(each.name, each.ids) for each in ulf.adapters.list()] == before


def test_an_emptied_token_file_revokes_every_token(secure: SecureServer) -> None:
    """Within a second; whoever watches is told so. Removing it does the same, and nobody is let in meanwhile."""
    text = secure.token_file.read_text()
    with secure.client("ulf") as ulf, secure.client("root") as root:
        watching = ulf.watch_server(interval_s=0.25)
        next(watching)
        for revoke in (lambda: secure.token_file.write_text(""), secure.token_file.unlink):
            revoke()
            time.sleep(0.7)
            for client in (ulf, root):
                with pytest.raises(UnauthenticatedError):
                    client.server_info()
            secure.token_file.write_text(text)
            time.sleep(0.7)
            root.server_info()
        with pytest.raises(UnauthenticatedError):
            list(islice(watching, 20))
