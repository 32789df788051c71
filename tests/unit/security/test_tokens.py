"""Token files: what is read, what is refused, and what is never said."""

from __future__ import annotations

import hashlib
import hmac
from pathlib import Path

import pytest
from lora_api.v1 import adapter_service_pb2, generation_service_pb2, server_service_pb2
from lora_server.errors import PermissionDeniedError, UnauthenticatedError
from lora_server.rpc.auth import ROLE_OF, identify
from lora_server.security.tokens import new_token, read_tokens


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """A path for a token file."""
    return tmp_path / "tokens"


def test_a_new_token_is_known_by_the_line_that_came_with_it(file: Path) -> None:
    """Roles and tenant are the line's; any other token is unknown; the file has no token."""
    token, line = new_token(["admin", "generate"], "acme")
    other, _ = new_token(["admin"], "acme")
    file.write_text(f"# ours\n\n{line}  # of Ann\n")
    table = read_tokens(file)
    caller = table.find(token)
    assert caller is not None
    assert (caller.tenant, caller.roles) == ("acme", {"admin", "generate"})
    assert token not in file.read_text()
    assert all(table.find(wrong) is None for wrong in (other, "", token[:-1], token + "x", "\ud800", "x" * 10**6))


@pytest.mark.parametrize("which", [0, 1, 2, None])
def test_every_line_is_compared_in_constant_time(
    file: Path, monkeypatch: pytest.MonkeyPatch, which: int | None
) -> None:
    """By hmac.compare_digest, all lines in turn, wherever the token is found, and if it is not found at all."""
    made = [new_token(["generate"], f"tenant{k}") for k in range(3)]
    file.write_text("\n".join(line for _, line in made))
    table = read_tokens(file)
    token = "lora_unknown" if which is None else made[which][0]
    compared: list[set[bytes]] = []
    compare = hmac.compare_digest

    def recorded(a: bytes, b: bytes) -> bool:
        compared.append({a, b})
        return compare(a, b)

    monkeypatch.setattr(hmac, "compare_digest", recorded)
    caller = table.find(token)
    assert (caller and caller.tenant) == (None if which is None else f"tenant{which}")
    asked = hashlib.sha256(token.encode()).digest()
    assert compared == [{hashlib.sha256(each.encode()).digest(), asked} for each, _ in made]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "has no token"),
        ("sha256:00 generate acme", "line 1 .* is not"),
        (f"sha256:{'0' * 64} generate", "line 1 .* is not"),
        (f"\nsha256:{'0' * 64} generate,root acme", "line 2 .* role 'root'"),
        (f"sha256:{'0' * 64} generate, a", "role ''"),
        (f"sha256:{'0' * 64} generate -acme", "tenant '-acme'"),
        (f"sha256:{'0' * 64} admin a\nsha256:{'0' * 64} generate b", "line 2 .* earlier line"),
    ],
)
def test_bad_files_are_refused_with_the_line(file: Path, text: str, message: str) -> None:
    """Nothing is guessed."""
    file.write_text(text)
    with pytest.raises(ValueError, match=message):
        read_tokens(file)


def test_a_file_that_everybody_may_write_is_refused(file: Path) -> None:
    """Who can write it can make himself an administrator."""
    file.write_text(new_token(["admin"], "acme")[1])
    file.chmod(0o666)
    with pytest.raises(ValueError, match="chmod o-w"):
        read_tokens(file)


def test_the_table_names_every_method_of_ours() -> None:
    """A new RPC must decide who may call it; forgotten ones would need admin."""
    files = (adapter_service_pb2, generation_service_pb2, server_service_pb2)
    services = [service for file in files for service in file.DESCRIPTOR.services_by_name.values()]
    assert {method.name for service in services for method in service.methods} <= set(ROLE_OF)


GENERATE, LOAD = "/lora_api.v1.GenerationService/Generate", "/lora_api.v1.AdapterService/LoadAdapter"


def test_roles_decide_and_no_role_implies_another(file: Path) -> None:
    """An administrator makes no images unless it may; reading takes any token; what is unknown takes admin."""
    generate, admin = new_token(["generate"], "a"), new_token(["admin"], "b")
    file.write_text(f"{generate[1]}\n{admin[1]}\n")
    table = read_tokens(file)

    def call(method: str, token: str, scheme: str = "Bearer") -> str:
        return identify(table, method, (("authorization", f"{scheme} {token}"),)).tenant

    assert call(GENERATE, generate[0]) == call("/lora_api.v1.AdapterService/ListAdapters", generate[0], "bearer") == "a"
    assert call(LOAD, admin[0]) == call("/grpc.reflection.v1alpha.ServerReflection/X", admin[0]) == "b"
    for method, token in ((GENERATE, admin[0]), (LOAD, generate[0]), ("/lora_api.v1.NewService/New", generate[0])):
        with pytest.raises(PermissionDeniedError) as denied:
            call(method, token)
        assert token not in str(denied.value)


@pytest.mark.parametrize("header", [None, "TOKEN", "Basic TOKEN", "Bearer", "Bearer x", "Bearer TOKEN TOKEN", "twice"])
def test_without_exactly_one_bearer_token_nobody_is_known(file: Path, header: str | None) -> None:
    """A missing, malformed, unknown or doubled header is one and the same error, which repeats none of it."""
    token, line = new_token(["generate"], "a")
    file.write_text(line)
    text = (header or "").replace("TOKEN", token)
    metadata = [] if header is None else [("authorization", text)]
    if header == "twice":
        metadata = [("authorization", f"Bearer {token}")] * 2
    with pytest.raises(UnauthenticatedError) as unknown:
        identify(read_tokens(file), GENERATE, metadata)
    assert token not in repr(unknown.value)
