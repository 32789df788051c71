"""Where the configuration comes from: flags, the environment, a TOML file, defaults, in this order of precedence.

Each value is taken from the first of them that has it, on its own: a file may set some fields of a section and the
environment others. Remembers where every value came from. Knows no flag's spelling but through `config.Flag`.
"""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, SecretStr, ValidationError
from pydantic.fields import FieldInfo
from pydantic_settings import BaseSettings, EnvSettingsSource, SettingsConfigDict, SettingsError

from lora_server.config import Flag, ServerConfig

ENV_PREFIX = "LORA_SERVER_"
CONFIG_ENV = f"{ENV_PREFIX}CONFIG"
"""The environment's `--config`."""


class ConfigError(ValueError):
    """The configuration cannot be used; *faults* has a sentence for each fault, with the value's origin."""

    def __init__(self, faults: list[str]) -> None:
        super().__init__("\n".join(faults))
        self.faults = faults


@dataclass(frozen=True, slots=True)
class Setting:
    """One value of the configuration; *section* is empty for those of the top level."""

    section: str
    name: str
    field: FieldInfo

    @property
    def path(self) -> str:
        """Its name in the file and in messages, such as `rpc.listen`."""
        return f"{self.section}.{self.name}" if self.section else self.name

    @property
    def env(self) -> str:
        """Its variable, such as `LORA_SERVER_RPC_LISTEN`."""
        return ENV_PREFIX + self.path.replace(".", "_").upper()

    @property
    def flag(self) -> str | None:
        """Its option on the command line, such as `--listen`, if it has one."""
        return next((f"--{mark.name}" for mark in self.field.metadata if isinstance(mark, Flag)), None)


@dataclass(frozen=True, slots=True)
class Resolved:
    """A configuration, and for each setting's path where it came from; what is not named is a default."""

    config: ServerConfig
    origins: Mapping[str, str]

    def value(self, setting: Setting) -> Any:
        """Returns the value of *setting*."""
        owner = getattr(self.config, setting.section) if setting.section else self.config
        return getattr(owner, setting.name)


def all_settings() -> Iterator[Setting]:
    """Yields every setting, those of the top level first."""
    sections = []
    for name, field in ServerConfig.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            sections.append((name, field.annotation))
        else:
            yield Setting("", name, field)
    for section, model in sections:
        for name, field in model.model_fields.items():
            yield Setting(section, name, field)


def resolve(flags: Mapping[str, Any], file: Path | None = None) -> Resolved:
    """Joins *flags* (values by path), the environment, *file* and the defaults into a configuration.

    Raises:
        ConfigError: If a source cannot be read, or the whole is not valid.
    """
    sources = [(_from_file(file), f"file {file}"), (_from_environment(), "env"), (_nested(flags), "flag")]
    values: dict[str, Any] = {}
    origins: dict[str, str] = {}
    for source, origin in sources:
        for section, content in source.items():
            if isinstance(content, dict) and isinstance(values.get(section, {}), dict):
                values[section] = {**values.get(section, {}), **content}
            else:
                values[section] = content
        origins |= {setting.path: _origin(setting, origin) for setting in all_settings() if _has(source, setting)}
    try:
        return Resolved(ServerConfig(**values), origins)
    except ValidationError as error:
        raise ConfigError([_fault(fault, origins) for fault in error.errors()]) from None


def as_toml(resolved: Resolved) -> str:
    """Writes a configuration as a file that `--config` takes, each value with its origin, secrets masked."""
    lines: list[str] = []
    section = ""
    for setting in all_settings():
        if setting.section != section:
            section = setting.section
            lines += ["", f"[{section}]"]
        value, origin = resolved.value(setting), resolved.origins.get(setting.path, "default")
        text = f"# {setting.name} is not set" if value is None else f"{setting.name} = {toml_value(value)}"
        lines.append(f"{text}  # {origin}")
    return "\n".join(lines) + "\n"


def toml_value(value: Any) -> str:
    """Writes one value in TOML; secrets, and what stands before the @ of an address, are masked."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int | float):
        return repr(value)
    if isinstance(value, BaseModel):
        items = {name: each for name, each in value if each is not None}
        return "{ " + ", ".join(f"{name} = {toml_value(each)}" for name, each in items.items()) + " }"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(toml_value(each) for each in value) + "]"
    if isinstance(value, SecretStr):
        return json.dumps("********")
    return json.dumps(re.sub(r"(?<=://)[^/@\s]+(?=@)", "********", str(value)), ensure_ascii=False)


def _from_file(file: Path | None) -> dict[str, Any]:
    if file is None:
        return {}
    try:
        return tomllib.loads(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError([f"cannot read the configuration file {str(file)!r}: {_reason(error)}"]) from None
    except tomllib.TOMLDecodeError as error:
        raise ConfigError([f"the configuration file {str(file)!r} is not TOML: {error}"]) from None


def _reason(error: Exception) -> str:
    return (error.strerror or "cannot be read") if isinstance(error, OSError) else "it is not UTF-8"


class _Fields(ServerConfig, BaseSettings):
    """The fields of the configuration, for the reader of the environment."""

    model_config = SettingsConfigDict(frozen=True, extra="forbid")


class _Environment(EnvSettingsSource):
    def decode_complex_value(self, field_name: str, field: FieldInfo, value: Any) -> Any:
        """Lists may be written with commas; what begins with a bracket is JSON."""
        if isinstance(value, str) and value.strip()[:1] not in ("[", "{"):
            if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
                raise ValueError(f"{ENV_PREFIX}{field_name.upper()} names a section; set one of its values")
            return [part.strip() for part in value.split(",") if part.strip()]
        return super().decode_complex_value(field_name, field, value)


def _from_environment() -> dict[str, Any]:
    source = _Environment(_Fields, env_prefix=ENV_PREFIX, env_nested_delimiter="_", env_nested_max_split=1)
    try:
        return source()
    except SettingsError as error:
        detail = f": {error.__cause__}" if error.__cause__ else ""
        raise ConfigError([f"environment: {error}{detail}"]) from None


def _nested(flags: Mapping[str, Any]) -> dict[str, Any]:
    nested: dict[str, Any] = {}
    for path, value in flags.items():
        section, _, name = path.rpartition(".")
        (nested.setdefault(section, {}) if section else nested)[name] = value
    return nested


def _has(source: Mapping[str, Any], setting: Setting) -> bool:
    owner = source.get(setting.section) if setting.section else source
    return isinstance(owner, Mapping) and setting.name in owner


def _origin(setting: Setting, kind: str) -> str:
    if kind == "env":
        return f"env {setting.env}"
    return f"flag {setting.flag or '--lora-path'}" if kind == "flag" else kind


def _fault(fault: Any, origins: Mapping[str, str]) -> str:
    path = ".".join(str(part) for part in fault["loc"])
    origin = next((f" ({origins[known]})" for known in origins if path == known or path.startswith(f"{known}.")), "")
    message = str(fault["msg"]).removeprefix("Value error, ")
    return f"{path}{origin}: {message}" if path else message
