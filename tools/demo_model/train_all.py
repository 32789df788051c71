"""Trains everything in one process and one stretch of time: autoencoder, base model, then each adapter.

python -m tools.demo_model.train_all --minutes 30
"""

from __future__ import annotations

import argparse
from pathlib import Path

from tools.demo_model import train_adapters, train_base, train_vae
from tools.demo_model.training import WORK_FOLDER

_VAE_SHARE, _BASE_SHARE = 0.2, 0.5


def main() -> None:
    """Splits the minutes between the trainings; what is finished is on disk at once."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=30.0, help="of training, compilation not counted")
    parser.add_argument("--resume-vae", action="store_true", help="go on from the vae/ in the work folder")
    parser.add_argument("--work", type=Path, default=Path(WORK_FOLDER))
    parser.add_argument("--scenes", default="300000")
    parser.add_argument("--batch", default="512")
    arguments = parser.parse_args()
    work = str(arguments.work)
    vae_minutes, base_minutes = arguments.minutes * _VAE_SHARE, arguments.minutes * _BASE_SHARE
    adapter_minutes = (arguments.minutes - vae_minutes - base_minutes) / len(train_adapters.CONFIGS)
    batch = ["--batch", arguments.batch]
    fewer = ["--scenes", str(int(arguments.scenes) // 5)]
    resume = ["--resume"] if arguments.resume_vae else []
    train_vae.main(["--minutes", str(vae_minutes), "--out", work, *resume])
    train_base.main(
        ["--minutes", str(base_minutes), "--work", work, "--out", work, "--scenes", arguments.scenes, *batch]
    )
    train_adapters.main(
        ["--minutes", str(adapter_minutes), "--model", f"{work}/model", "--out", f"{work}/adapters", *fewer]
    )


if __name__ == "__main__":
    main()
