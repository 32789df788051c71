"""`make demo`: starts the server with the embedded model, draws one scene in many looks through `lora-client`, stops.

Writes the PNGs and a labelled contact sheet to out/. Everything goes through the installed commands, as a user's would.
"""

from __future__ import annotations

import contextlib
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

BIN = Path(sys.executable).parent
OUT = Path("out")
SEED = 7
PROMPT = "a big red star left and a blue ring right on a sky background"
SHEET: list[tuple[str, list[str]]] = [
    ("no adapter", []),
    ("neon", ["neon"]),
    ("neon : 0.5", ["neon:0.5"]),
    ("hatching", ["hatching"]),
    ("hatching : 0.5", ["hatching:0.5"]),
    ("pixel-art", ["pixel-art"]),
    ("watercolour", ["watercolour"]),
    ("neon + pixel-art", ["neon:0.7", "pixel-art:0.7"]),
    ("hatching + watercolour", ["hatching:0.6", "watercolour:0.6"]),
    ("neon : -0.5", ["neon:-0.5"]),
]
COLUMNS, TILE_PX, LABEL_PX = 5, 256, 28


def main() -> None:
    """Runs the demo and says where the pictures are."""
    OUT.mkdir(exist_ok=True)
    began_s = time.monotonic()
    with serving() as address:
        tiles = []
        for label, adapters in SHEET:
            path = OUT / f"{label.replace(' ', '').replace(':', '_').replace('+', '_')}.png"
            generate(address, adapters, path)
            tiles.append((label, path))
            print(f"  {path}  ({label})")
    contact_sheet(tiles).save(OUT / "contact_sheet.png")
    print(f"contact sheet: {(OUT / 'contact_sheet.png').resolve()}  ({time.monotonic() - began_s:.0f} s)")


@contextlib.contextmanager
def serving() -> Iterator[str]:
    """Runs a server on a free port; yields its address; stops it."""
    log = (OUT / "server.log").open("w")
    server = subprocess.Popen(
        [BIN / "lora-server", "serve", "--listen", "127.0.0.1:0"], stdout=subprocess.PIPE, stderr=log, text=True
    )
    try:
        assert server.stdout is not None
        line = server.stdout.readline()
        if not line:
            sys.exit(f"the server did not start; see {log.name}")
        print(line.strip())
        yield line.split()[-1]
    finally:
        server.terminate()
        server.wait(timeout=30)
        log.close()


def generate(address: str, adapters: list[str], path: Path) -> None:
    """Draws the scene with some adapters."""
    uses = [word for adapter in adapters for word in ("--lora", adapter)]
    command = [BIN / "lora-client", "--server", address, "generate", "--prompt", PROMPT, "--seed", str(SEED)]
    subprocess.run([*command, *uses, "--output", path, "--quiet"], check=True, stdout=subprocess.DEVNULL)


def contact_sheet(tiles: list[tuple[str, Path]]) -> Image.Image:
    """Lays out labelled pictures in rows."""
    rows = -(-len(tiles) // COLUMNS)
    sheet = Image.new("RGB", (COLUMNS * TILE_PX, rows * (TILE_PX + LABEL_PX)), "white")
    pen = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(16)
    for place, (label, path) in enumerate(tiles):
        x, y = place % COLUMNS * TILE_PX, place // COLUMNS * (TILE_PX + LABEL_PX)
        sheet.paste(Image.open(path).resize((TILE_PX, TILE_PX), Image.Resampling.LANCZOS), (x, y))
        pen.text((x + 8, y + TILE_PX + 4), label, fill="black", font=font)
    return sheet


if __name__ == "__main__":
    main()
