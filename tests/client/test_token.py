"""Where a client sends its token, and where it refuses to."""

from __future__ import annotations

import pytest
from lora_client import AsyncLoraClient, LoraClient, Tls
from lora_client._channel import bearer_metadata

SENT = (("authorization", "Bearer lora_t"),)


@pytest.mark.parametrize("server", ["127.0.0.1:1", "localhost:1", "[::1]:1", "127.3.2.1:1", "unix:/x", "unix:///x"])
def test_plain_text_is_local(server: str) -> None:
    """Loopback and Unix sockets carry a token; without one nothing is sent."""
    assert bearer_metadata(server, None, "lora_t") == SENT
    assert bearer_metadata(server, None, None) == bearer_metadata(server, None, "") == ()


@pytest.mark.parametrize(
    "server", ["10.0.0.1:1", "example.com:1", "localhost.example.com:1", "127.0.0.1.example.com:1", "dns:///x:1", "x"]
)
async def test_a_token_never_crosses_a_network_in_plain_text(server: str) -> None:
    """Both clients refuse before they connect, and do not repeat the token; TLS may carry it anywhere."""
    with pytest.raises(ValueError, match="never sent in plain text") as refused:
        LoraClient(server, token="lora_t")
    assert "lora_t" not in str(refused.value)
    with pytest.raises(ValueError, match="never sent in plain text"):
        AsyncLoraClient(server, token="lora_t")
    assert bearer_metadata(server, Tls(), "lora_t") == SENT


@pytest.mark.parametrize("token", ["a b", "a\n", "ü"])
def test_what_cannot_be_a_token_is_refused(token: str) -> None:
    """Before gRPC refuses it in other words."""
    with pytest.raises(ValueError, match="printable ASCII"):
        bearer_metadata("unix:/x", None, token)
