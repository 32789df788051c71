"""The judge: a small classifier of shape, colour and look, trained on the renderer's pictures alone.

python -m tools.demo_model.judge --minutes 2     # trains it again; the weights lie beside this file
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional

from tools.demo_model.pictures import Studio
from tools.demo_model.render import LOOKS
from tools.demo_model.scenes import COLOURS, SHAPES, SIDE_PX, Scene
from tools.demo_model.training import Plan, compiled, pick_device, train

WEIGHTS = Path(__file__).parent / "judge.safetensors"
CROP_PX = 80
_INPUT_PX = 64


class Judge(nn.Module):
    """Says what is at a place of a picture, and in which look the picture is."""

    def __init__(self) -> None:
        super().__init__()
        self.thing = _trunk(len(SHAPES) + len(COLOURS))
        self.look = _trunk(len(LOOKS))

    def things(self, crops: Tensor) -> tuple[Tensor, Tensor]:
        """Returns logits of shape and of colour for crops, (B, 3, 64, 64) in 0..1."""
        shape, colour = self.thing(crops - 0.5).split([len(SHAPES), len(COLOURS)], dim=1)
        return shape, colour

    def looks(self, pictures: Tensor) -> Tensor:
        """Returns logits of the look for whole pictures, (B, 3, H, W) in 0..1."""
        return self.look(pictures - 0.5)


def _trunk(outputs: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    channels = 3
    for width in (24, 48, 96, 128):
        layers += [nn.Conv2d(channels, width, 3, stride=2, padding=1), nn.GroupNorm(8, width), nn.SiLU()]
        layers += [nn.Conv2d(width, width, 3, padding=1, groups=8), nn.GroupNorm(8, width), nn.SiLU()]
        channels = width
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(channels * 16, outputs))


def crop(pictures: Tensor, centre_px: Tensor) -> Tensor:
    """Cuts CROP_PX squares around *centre_px*, (B, 2), out of (B, 3, H, W); returns (B, 3, 64, 64)."""
    axis = torch.linspace(-CROP_PX / 2, CROP_PX / 2, _INPUT_PX, device=pictures.device)
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    grid = (torch.stack([x, y], dim=-1) + centre_px[:, None, None]) / (SIDE_PX / 2) - 1
    return functional.grid_sample(pictures, grid, align_corners=False, padding_mode="border")


def load_judge(device: torch.device) -> Judge:
    """Loads the trained judge."""
    judge = Judge()
    judge.load_state_dict({name: value.float() for name, value in load_file(WEIGHTS).items()})
    return judge.to(device).eval().requires_grad_(False)


@torch.no_grad()
def judge_pictures(judge: Judge, pictures: Tensor, scenes: list[Scene]) -> list[dict[str, object]]:
    """Judges pictures, (B, 3, H, W) in 0..1, against their scenes: what stands at each place, and the look."""
    looks = judge.looks(pictures).argmax(1).tolist()
    verdicts = []
    for picture, scene, look in zip(pictures, scenes, looks, strict=True):
        centres = torch.tensor([scene.centre_px(thing) for thing in scene.things], device=pictures.device)
        shape, colour = judge.things(crop(picture.expand(len(centres), -1, -1, -1), centres))
        shapes = [SHAPES[k] for k in shape.argmax(1).tolist()]
        colours = [list(COLOURS)[k] for k in colour.argmax(1).tolist()]
        verdicts.append(
            {
                "shapes": [said == thing.shape for said, thing in zip(shapes, scene.things, strict=True)],
                "colours": [said == thing.colour for said, thing in zip(colours, scene.things, strict=True)],
                "look": list(LOOKS)[look],
            }
        )
    return verdicts


def main() -> None:
    """Trains the judge, reports its accuracy on held-out renderings for each look, and saves it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=2.0)
    parser.add_argument("--batch", type=int, default=500)
    parser.add_argument("--scenes", type=int, default=60_000)
    parser.add_argument("--out", type=Path, default=WEIGHTS)
    arguments = parser.parse_args()
    device = pick_device()
    torch.manual_seed(0)
    judge = Judge().to(device)
    train(
        _loss(judge, Studio(arguments.scenes, device, seed=3), arguments.batch),
        [judge],
        Plan(arguments.minutes, 2e-3),
        "judge",
    )
    save_file({name: value.half().contiguous().cpu() for name, value in judge.state_dict().items()}, arguments.out)
    judge.eval()
    studio = Studio(1000, device, seed=4, held_out=True)
    for look in LOOKS:
        print(
            f"judge on held-out renderings, {look}: {summarise(_judge_studio(judge, studio, look), look)}",
            flush=True,
        )


def _judge_studio(judge: Judge, studio: Studio, look: str) -> list[dict[str, object]]:
    pictures = studio.paint(torch.arange(len(studio), device=next(judge.parameters()).device), look)
    return judge_pictures(judge, pictures, studio.scenes)


def summarise(verdicts: list[dict[str, object]], look: str) -> dict[str, float]:
    """Shares: objects of the right shape, of the right colour; pictures with all of them right; of the right look."""
    shapes = [right for verdict in verdicts for right in verdict["shapes"]]  # type: ignore[attr-defined]
    colours = [right for verdict in verdicts for right in verdict["colours"]]  # type: ignore[attr-defined]
    whole = [all(v["shapes"]) and all(v["colours"]) for v in verdicts]  # type: ignore[call-overload]
    looks = [verdict["look"] == look for verdict in verdicts]
    shares = {"shape": shapes, "colour": colours, "picture": whole, "look": looks}
    return {name: round(sum(values) / len(values), 4) for name, values in shares.items()}


def _loss(judge: Judge, studio: Studio, batch: int):  # type: ignore[no-untyped-def]
    device = next(judge.parameters()).device
    targets = torch.arange(len(LOOKS), device=device).repeat_interleave(batch // len(LOOKS))
    colours = torch.tensor(list(COLOURS.values()), device=device)
    look_logits = compiled(judge.looks, device)
    thing_logits = compiled(judge.thing, device)

    def loss() -> Tensor:
        index = torch.randint(len(studio), (batch,), device=device)
        with torch.no_grad():
            pictures = studio.paint_mixed(index)
            pictures = (pictures + 0.03 * torch.randn_like(pictures) * torch.rand(batch, 1, 1, 1, device=device)).clamp(
                0, 1
            )
            two = studio.tensors.radius_px[index, 1] > 0
            slot = (torch.rand(batch, device=device) < 0.5) & two
            pick = slot.long()[:, None]
            centre = studio.tensors.centre_px[index].gather(1, pick[..., None].expand(-1, -1, 2))[:, 0]
            crops = crop(pictures, centre + 3 * torch.randn(batch, 2, device=device))
            shape = studio.tensors.shape[index].gather(1, pick)[:, 0]
            painted = studio.tensors.colour[index].gather(1, pick[..., None].expand(-1, -1, 3))
            colour = (painted - colours).square().sum(-1).argmin(1)
        said_shape, said_colour = thing_logits(crops - 0.5).split([len(SHAPES), len(COLOURS)], dim=1)
        return (
            functional.cross_entropy(said_shape, shape)
            + functional.cross_entropy(said_colour, colour)
            + functional.cross_entropy(look_logits(pictures), targets)
        )

    return loss


if __name__ == "__main__":
    main()
