"""Certificate files: read, and proven usable by a handshake in memory before anybody is served with them."""

from __future__ import annotations

import ssl
from dataclasses import dataclass
from pathlib import Path

from lora_server.config import TlsConfig


@dataclass(frozen=True, slots=True)
class Certificates:
    """The bytes of a server's PEM files; *client_ca* is None without mutual TLS."""

    certificate: bytes
    private_key: bytes
    client_ca: bytes | None


def certificate_files(config: TlsConfig) -> list[Path]:
    """Returns the files that *config* names."""
    return [path for path in (config.certificate, config.private_key, config.client_ca) if path is not None]


def read_certificates(config: TlsConfig) -> Certificates:
    """Reads and checks the files of a configuration with TLS.

    Raises:
        OSError: If one cannot be read.
        ValueError: If one is no PEM, the key is another certificate's or has a passphrase, or the certificate is not
            valid today.
    """
    assert config.certificate is not None
    assert config.private_key is not None
    files = certificate_files(config)
    contents = [path.read_bytes() for path in files]
    _check_pair(config.certificate, config.private_key)
    if config.client_ca is not None:
        _trusting(config.client_ca)
    return Certificates(contents[0], contents[1], contents[2] if config.client_ca is not None else None)


def _trusting(path: Path) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN  # the server's own certificate is as good as its authority
    try:
        context.load_verify_locations(path)
    except ssl.SSLError:
        raise ValueError(f"{str(path)!r} has no certificate in PEM form") from None
    return context


def _no_passphrase() -> str:
    raise ValueError("the private key has a passphrase; give one without")


def _check_pair(certificate: Path, private_key: Path) -> None:
    """Takes a handshake through memory: proves the pair, and that the certificate is valid today."""
    server_context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    try:
        server_context.load_cert_chain(certificate, private_key, _no_passphrase)
    except ssl.SSLError as error:
        detail = "do not belong together" if error.reason == "KEY_VALUES_MISMATCH" else "are not both in PEM form"
        raise ValueError(f"{str(certificate)!r} and {str(private_key)!r} {detail}") from None
    to_client, to_server = ssl.MemoryBIO(), ssl.MemoryBIO()
    server = server_context.wrap_bio(to_server, to_client, server_side=True)
    client = _trusting(certificate).wrap_bio(to_client, to_server)
    try:
        for _ in range(3):
            for side in (client, server):
                _advance(side)
    except ssl.SSLCertVerificationError as error:
        raise ValueError(f"the certificate {str(certificate)!r} cannot be used: {error.verify_message}") from None


def _advance(side: ssl.SSLObject) -> None:
    try:
        side.do_handshake()
    except ssl.SSLWantReadError:
        return
