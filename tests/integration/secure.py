"""A true server with TLS, tokens and a bound adapter, and its files."""

from __future__ import annotations

import subprocess
from dataclasses import dataclass
from pathlib import Path

import trustme
from lora_client import LoraClient, Tls
from lora_server.security.tokens import new_token

from tests.conftest import BIN

ROLES = {"ann": (["generate"], "acme"), "ulf": (["generate"], "umbrella"), "root": (["admin"], "operators")}


@dataclass
class SecureServer:
    """The process, where it is, and what its callers need."""

    process: subprocess.Popen[str]
    address: str
    ca: Path
    tokens: dict[str, str]
    token_file: Path
    log: Path

    def client(self, who: str | None) -> LoraClient:
        """A client with a person's token, or with none."""
        tls = Tls(self.ca.read_bytes(), server_name="localhost")
        return LoraClient(self.address, tls=tls, token=self.tokens[who] if who else None, timeout_s=30)

    @staticmethod
    def start(folder: Path, adapters: Path) -> SecureServer:
        """Writes the files, starts the server with a TOML file, and waits until it serves."""
        authority = trustme.CA()
        authority.cert_pem.write_to_path(folder / "ca.pem")
        issued = authority.issue_cert("localhost")
        issued.private_key_and_cert_chain_pem.write_to_path(folder / "server.pem")
        made = {who: new_token(*roles) for who, roles in ROLES.items()}
        (folder / "tokens").write_text("\n".join(line for _, line in made.values()))
        (folder / "server.toml").write_text(
            f"""
            adapter_roots = ["{adapters}"]
            preloads = [{{ path = "{adapters / "a"}", name = "mine", tenants = ["acme"] }}]
            [engine]
            warm_up_s = 0
            [rpc]
            listen = "127.0.0.1:0"
            reflection = false
            [tls]
            certificate = "{folder / "server.pem"}"
            private_key = "{folder / "server.pem"}"
            [auth]
            token_file = "{folder / "tokens"}"
            """
        )
        log = (folder / "log").open("w")
        command = [BIN / "lora-server", "serve", "--config", folder / "server.toml", "--log-level", "debug"]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True)
        log.close()
        assert process.stdout is not None
        line = process.stdout.readline()
        assert line, (folder / "log").read_text()
        tokens = {who: token for who, (token, _) in made.items()}
        return SecureServer(process, line.split()[-1], folder / "ca.pem", tokens, folder / "tokens", folder / "log")

    def stop(self) -> None:
        """Ends it, as a supervisor does."""
        self.process.terminate()
        code = self.process.wait(timeout=40)
        assert self.process.stdout is not None
        self.process.stdout.close()
        assert code == 0
