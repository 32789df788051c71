"""Bearer tokens: a file of hashes, each with roles and a tenant. Pure Python; knows neither calls nor gRPC.

The file has a line a token: `sha256:HEX ROLES TENANT`, ROLES with commas between; `#` begins a comment. Tokens are 256
random bits, so that a plain SHA-256 cannot be turned back, and need no salt. No token, and no hash, is ever part of an
error or of the log.
"""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
import stat
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from lora_server.security.caller import ROLES, Caller
from lora_server.security.watched import NothingInFileError, Watched

TENANT_PATTERN = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_LINE = re.compile(r"sha256:([0-9a-f]{64})\s+(\S+)\s+(\S+)")
_TOKEN_BYTES = 32
_MAX_TOKEN_CHARS = 512


@dataclass(frozen=True, slots=True)
class _Entry:
    digest: bytes
    caller: Caller


@dataclass(frozen=True, slots=True)
class TokenTable:
    """The tokens of one file."""

    entries: tuple[_Entry, ...]

    def find(self, token: str) -> Caller | None:
        """Returns whose token it is, or None. Compares with every entry, each in constant time."""
        digest = hashlib.sha256(token[:_MAX_TOKEN_CHARS].encode("utf-8", "surrogatepass")).digest()
        found = None
        for entry in self.entries:
            if hmac.compare_digest(entry.digest, digest):
                found = entry.caller
        return found


def read_tokens(path: Path) -> TokenTable:
    """Reads a token file.

    Raises:
        OSError: If it cannot be read.
        NothingInFileError: If it has no token.
        ValueError: If a line is not understood, a token is there twice, or others may write the file.
    """
    if path.stat().st_mode & stat.S_IWOTH:
        raise ValueError(f"the token file {str(path)!r} can be written by everybody; chmod o-w it")
    entries: dict[bytes, _Entry] = {}
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        text = line.partition("#")[0].strip()
        if not text:
            continue
        try:
            entry = _parse(text)
        except ValueError as error:
            raise ValueError(f"line {number} of the token file {str(path)!r} {error}") from None
        if entry.digest in entries:
            raise ValueError(f"line {number} of the token file {str(path)!r} has the token of an earlier line")
        entries[entry.digest] = entry
    if not entries:
        raise NothingInFileError(f"the token file {str(path)!r} has no token; make one with lora-server token new")
    return TokenTable(tuple(entries.values()))


def watched_tokens(path: Path) -> Watched[TokenTable]:
    """Reads a token file, and again when it changes; see `Watched`. Raises what `read_tokens` raises, now.

    A file that is removed, emptied or made unreadable revokes every token: whoever does that means it, and nobody can
    call until it is back. One that cannot be understood revokes none, because a typing error, or a file that is half
    written, must not stop a service; it admits nobody new either.
    """
    return Watched("tokens", [path], lambda: read_tokens(path), when_gone=TokenTable(()))


def _parse(text: str) -> _Entry:
    match = _LINE.fullmatch(text)
    if match is None:
        raise ValueError("is not 'sha256:64 HEX DIGITS, ROLES, TENANT' with blanks between")
    digest, roles, tenant = match.groups()
    return _Entry(bytes.fromhex(digest), Caller(check_tenant(tenant), check_roles(roles.split(","))))


def check_roles(roles: Sequence[str]) -> frozenset[str]:
    """Returns *roles* as a set; ValueError if one is unknown or there is none."""
    unknown = [role for role in roles if role not in ROLES]
    if unknown or not roles:
        raise ValueError(f"names the role {unknown[0] if unknown else ''!r}; roles are {' and '.join(ROLES)}")
    return frozenset(roles)


def check_tenant(tenant: str) -> str:
    """Returns *tenant*; ValueError if it is no name of one."""
    if TENANT_PATTERN.fullmatch(tenant) is None:
        raise ValueError(
            f"names the tenant {tenant!r}; one is 1 to 64 characters of [A-Za-z0-9._-], the first a letter or digit"
        )
    return tenant


def new_token(roles: Sequence[str], tenant: str) -> tuple[str, str]:
    """Makes a token; returns it, and the line for the file. Raises ValueError for an unknown role or a bad tenant."""
    allowed, name = check_roles(roles), check_tenant(tenant)
    token = f"lora_{secrets.token_urlsafe(_TOKEN_BYTES)}"
    ordered = ",".join(role for role in ROLES if role in allowed)
    return token, f"sha256:{hashlib.sha256(token.encode()).hexdigest()} {ordered} {name}"
