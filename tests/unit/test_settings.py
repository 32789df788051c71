"""Where settings come from: flags, environment, file, defaults."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest
from lora_server.config import ServerConfig
from lora_server.settings import ConfigError, all_settings, as_toml, resolve, toml_value
from pydantic import SecretStr


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """A file that sets three values."""
    path = tmp_path / "server.toml"
    path.write_text('[rpc]\nlisten = "127.0.0.1:1"\ndrain_timeout_s = 5\n[cache]\nbudget_bytes = "2GiB"\n')
    return path


def test_flags_go_before_the_environment_before_the_file(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each value is decided on its own, and its origin is remembered."""
    monkeypatch.setenv("LORA_SERVER_RPC_LISTEN", "127.0.0.1:2")
    monkeypatch.setenv("LORA_SERVER_LIMITS_MAX_RANK", "8")
    resolved = resolve({"limits.max_rank": "16"}, file)
    config = resolved.config
    assert (config.rpc.listen, config.rpc.drain_timeout_s, config.limits.max_rank) == ("127.0.0.1:2", 5, 16)
    assert (config.cache.budget_bytes, config.cache.max_adapters) == (2 * 2**30, 1000)
    assert resolved.origins == {
        "rpc.listen": "env LORA_SERVER_RPC_LISTEN",
        "rpc.drain_timeout_s": f"file {file}",
        "cache.budget_bytes": f"file {file}",
        "limits.max_rank": "flag --max-rank",
    }


def test_lists_in_the_environment_take_commas_or_json(monkeypatch: pytest.MonkeyPatch) -> None:
    """Folders and sizes as a person writes them, preloads as JSON."""
    monkeypatch.setenv("LORA_SERVER_ADAPTER_ROOTS", "/a, /b")
    monkeypatch.setenv("LORA_SERVER_ENGINE_WARM_SIZES", "64x32,32x32")
    monkeypatch.setenv("LORA_SERVER_PRELOADS", '[{"path": "/a/x", "tenants": ["acme"]}]')
    config = resolve({}).config
    assert config.adapter_roots == (Path("/a"), Path("/b"))
    assert config.engine.warm_sizes == ((64, 32), (32, 32))
    assert config.preloads[0].tenants == ("acme",)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[rpc]\nlistn = 1", "rpc.listn"),
        ("[rpc]\nlisten = 'here'", "not HOST:PORT"),
        ("[cache]\nbudget_bytes = '4XB'", "cache.budget_bytes (file "),
        ("nonsense = 1", "nonsense"),
        ("[rpc", "is not TOML"),
        ("rpc = 1", "rpc"),
        ("[rpc]\nlisten = '0.0.0.0:1'", "in plain text"),
        ("[tls]\ncertificate = '/x'", "belong together"),
    ],
)
def test_what_is_wrong_is_named_with_its_origin(tmp_path: Path, text: str, message: str) -> None:
    """An unknown key, a bad value, a combination that is not safe: each its own sentence, none accepted silently."""
    path = tmp_path / "bad.toml"
    path.write_text(text)
    with pytest.raises(ConfigError) as error:
        resolve({}, path)
    assert message in str(error.value)


def test_an_unknown_value_of_a_section_in_the_environment_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """A typing error is said; what orchestrators put beside (LORA_SERVER_SERVICE_HOST) is none of ours."""
    monkeypatch.setenv("LORA_SERVER_SERVICE_HOST", "10.0.0.1")
    monkeypatch.setenv("LORA_SERVER_PORT", "tcp://10.0.0.1:50051")
    resolve({})
    monkeypatch.setenv("LORA_SERVER_RPC_LISTN", "x")
    with pytest.raises(ConfigError, match=r"rpc\.listn"):
        resolve({})
    monkeypatch.delenv("LORA_SERVER_RPC_LISTN")
    monkeypatch.setenv("LORA_SERVER_MODEL", "demo")
    with pytest.raises(ConfigError, match="names a section"):
        resolve({})


def test_the_printed_configuration_is_a_file_that_gives_the_same(tmp_path: Path, file: Path) -> None:
    """--print-config names every setting, says where it came from, and can be used again."""
    resolved = resolve({"adapter_roots": ["/a b"], "preloads": [{"path": '/x"y', "tenants": ["t"]}]}, file)
    text = as_toml(resolved)
    assert f'listen = "127.0.0.1:1"  # file {file}' in text
    assert "max_rank = 256  # default" in text
    assert all(setting.name in text for setting in all_settings())
    again = tmp_path / "again.toml"
    again.write_text(text)
    assert resolve({}, again).config == resolved.config
    tomllib.loads(text)


def test_secrets_are_masked() -> None:
    """Neither a secret value nor a password in an address is ever printed."""
    assert "hush" not in toml_value(SecretStr("hush"))
    assert toml_value("https://me:hush@example.com/x") == '"https://********@example.com/x"'


def test_every_setting_has_its_own_variable_and_flag() -> None:
    """No two settings share a name anywhere, and each is described."""
    settings = list(all_settings())
    flags = [setting.flag for setting in settings if setting.flag]
    assert len({setting.env for setting in settings}) == len(settings)
    assert len(set(flags)) == len(flags)
    assert all(setting.field.description for setting in settings)


@pytest.mark.parametrize("listen", ["127.0.0.1:0", "localhost:1", "[::1]:1", "unix:/tmp/x", "127.8.8.8:1"])
def test_plain_text_is_allowed_at_home(listen: str) -> None:
    """Loopback and Unix sockets need no certificate."""
    ServerConfig(rpc={"listen": listen})


@pytest.mark.parametrize("listen", ["0.0.0.0:1", "[::]:1", "10.0.0.1:1", "example.com:1", "localhost.example.com:1"])
def test_plain_text_for_others_must_be_said(listen: str) -> None:
    """Whoever can be reached says --insecure, or has certificates."""
    with pytest.raises(ValueError, match="in plain text"):
        ServerConfig(rpc={"listen": listen})
    ServerConfig(rpc={"listen": listen, "insecure": True})


def test_the_documentation_has_every_setting_as_it_is() -> None:
    """The table of docs/operations/configuration.md is that of the code (python tools/config_docs.py writes it)."""
    from tools.config_docs import PAGE, with_table

    text = PAGE.read_text(encoding="utf-8")
    assert with_table(text) == text
