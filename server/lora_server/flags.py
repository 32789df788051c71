"""The options of the command line, made from the configuration's fields, so that a setting is written down once."""

from __future__ import annotations

import inspect
import types
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import typer
from lora_client.console import tell

from lora_server.config import MIB, Preload, parse_bytes
from lora_server.settings import CONFIG_ENV, ConfigError, Resolved, Setting, all_settings, resolve

Command = Callable[[Resolved, bool], None]


def with_settings(command: Command) -> Callable[..., None]:
    """Gives *command* an option for each setting that has a flag, besides `--config` and `--print-config`.

    It is called with the resolved configuration, and with whether that is only to be printed. A configuration that is
    not valid ends the process before: a line a fault on standard error, exit code 2.
    """
    settings = {_parameter(setting): setting for setting in all_settings() if setting.flag is not None}

    def run(**given: Any) -> None:
        flags = {settings[name].path: value for name, value in given.items() if name in settings and _is_given(value)}
        try:
            preloads = parse_preloads(given["lora_path"] or [], given["lora_scale"] or [])
            if preloads:
                flags["preloads"] = preloads
            resolved = resolve(flags, given["config"])
        except ConfigError as error:
            for fault in error.faults:
                tell(f"error: {fault}")
            raise typer.Exit(2) from None
        command(resolved, bool(given["print_config"]))

    parameters = [*_OWN, *(_option(name, setting) for name, setting in settings.items())]
    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined] # typer reads it
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    run.__doc__, run.__name__ = command.__doc__, command.__name__
    return run


def parse_preloads(paths: Sequence[str], scales: Sequence[float]) -> tuple[Preload, ...]:
    """Joins `--lora-path [NAME=]DIR` with `--lora-scale`: none, one for all, or one for each.

    Raises:
        typer.BadParameter: If the numbers do not fit together.
    """
    if len(scales) not in (0, 1, len(paths)) or (scales and not paths):
        raise typer.BadParameter(f"{len(scales)} --lora-scale for {len(paths)} --lora-path: give none, one, or as many")
    filled = scales if len(scales) == len(paths) else (list(scales) or [1.0]) * len(paths)
    preloads = []
    for text, scale in zip(paths, filled, strict=True):
        name, separator, path = text.partition("=")
        named = bool(separator) and "/" not in name
        try:
            preloads.append(Preload(path=path if named else text, name=name if named else None, scale=scale))
        except ValueError as error:
            raise typer.BadParameter(f"--lora-scale {scale}: must be from -100 to 100") from error
    return tuple(preloads)


def _keyword(name: str, annotation: Any, option: Any, default: Any = None) -> inspect.Parameter:
    return inspect.Parameter(
        name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=Annotated[annotation, option]
    )


_OWN = (
    _keyword("config", Path | None, typer.Option("--config", envvar=CONFIG_ENV, help="A TOML file of settings.")),
    _keyword(
        "print_config",
        bool,
        typer.Option("--print-config", help="Print each setting and where it came from, as TOML, and exit."),
        default=False,
    ),
    _keyword(
        "lora_path",
        list[str] | None,
        typer.Option("--lora-path", help="[NAME=]DIR: an adapter cached before serving; repeatable."),
    ),
    _keyword(
        "lora_scale",
        list[float] | None,
        typer.Option("--lora-scale", help="Default scale of the --lora-path: one for all, or one for each."),
    ),
)


def _parameter(setting: Setting) -> str:
    return setting.path.replace(".", "_")


def _is_given(value: Any) -> bool:
    return value is not None and value != []


def _option(name: str, setting: Setting) -> inspect.Parameter:
    flag, kind = setting.flag, _plain(setting.field.annotation)
    assert flag is not None
    annotation: Any = list[str] | None if get_origin(kind) is tuple else str | None
    if kind is bool:
        annotation, flag = bool | None, f"{flag}/--no-{flag[2:]}"
    metavar = _metavar(kind, parses_bytes=_is_bytes(setting))
    option = typer.Option(flag, help=_help(setting, kind), metavar=metavar, show_default=False)
    return _keyword(name, annotation, option)


def _plain(annotation: Any) -> Any:
    """The type of a value that is there: `int` of `int | None`."""
    if get_origin(annotation) in (Union, types.UnionType):
        return next(each for each in get_args(annotation) if each is not type(None))
    return annotation


def _metavar(kind: Any, *, parses_bytes: bool) -> str | None:
    if get_origin(kind) is Literal:
        return "|".join(get_args(kind))
    if parses_bytes:
        return "SIZE"
    names = {int: "INTEGER", float: "NUMBER", Path: "PATH", bool: None}
    return names.get(kind, "TEXT")


def _is_bytes(setting: Setting) -> bool:
    return any(getattr(mark, "func", None) is parse_bytes for mark in setting.field.metadata)


def _help(setting: Setting, kind: Any) -> str:
    text, default = setting.field.description or "", setting.field.default
    if get_origin(kind) is tuple:
        text += " Repeatable."
    if default is None or default == ():
        return text
    if isinstance(default, bool):
        return f"{text} Default: {'on' if default else 'off'}."
    if _is_bytes(setting):
        default = f"{default // MIB}MiB"
    return f"{text} Default: {default}."
