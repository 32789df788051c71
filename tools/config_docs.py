"""Writes the table of settings into docs/operations/configuration.md; a test holds it in step with the code."""

from __future__ import annotations

import sys
from pathlib import Path

from lora_server.settings import Setting, all_settings, toml_value

PAGE = Path(__file__).parents[1] / "docs" / "operations" / "configuration.md"
BEGIN, END = "<!-- settings: made by tools/config_docs.py -->\n", "<!-- end of settings -->\n"


def table() -> str:
    """Returns the settings as a Markdown table, one row each."""
    rows = ["| setting | flag | default | |", "|---|---|---|---|", *map(_row, all_settings())]
    return "\n".join(rows) + "\n"


def with_table(page: str) -> str:
    """Returns *page* with the table between its marks."""
    before, _, rest = page.partition(BEGIN)
    return f"{before}{BEGIN}{table()}{END}{rest.partition(END)[2]}"


def _row(setting: Setting) -> str:
    default = setting.field.default
    shown = "" if default is None or default == () else f"`{toml_value(default)}`"
    flag = f"`{setting.flag}`" if setting.flag else "`--lora-path`" if setting.path == "preloads" else ""
    return f"| `{setting.path}` | {flag} | {shown} | {(setting.field.description or '').replace('|', chr(92) + '|')} |"


if __name__ == "__main__":
    text = PAGE.read_text(encoding="utf-8")
    PAGE.write_text(with_table(text), encoding="utf-8")
    sys.stdout.write(f"wrote {PAGE}\n")
