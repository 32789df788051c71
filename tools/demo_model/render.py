"""Scenes to pictures: a batch at a time, antialiased, on any device; one function for each look."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from tools.demo_model.scenes import SIDE_PX, SceneTensors
from tools.demo_model.shapes import EXTENT


class Canvas:
    """A batch of scenes measured out in pixels: what every look paints from.

    Attributes:
        x, y: (1, 1, H, W) pixel centres.
        distance: (B, 2, H, W) signed distances to the two objects, in pixels.
        colour: (B, 2, 3, 1, 1).
        background: (B, 3, 1, 1).
        noise: (B, 1, H, W) smooth noise in about -1..1, of the scene's own seed.
    """

    def __init__(self, scenes: SceneTensors, table: Tensor) -> None:
        self.scenes = scenes
        axis = torch.arange(SIDE_PX, device=table.device) + 0.5
        self.y, self.x = (grid[None, None] for grid in torch.meshgrid(axis, axis, indexing="ij"))
        self._table = table
        self.distance = self.distance_at(0.0, 0.0)
        self.colour = scenes.colour[..., None, None]
        self.background = scenes.background[..., None, None]
        self.noise = _smooth_noise(self.x, self.y, scenes.seed)

    def distance_at(self, shift_x: Tensor | float, shift_y: Tensor | float) -> Tensor:
        """Returns the distances, (B, 2, H, W), as seen from every pixel shifted by so many pixels."""
        scenes = self.scenes
        radius = scenes.radius_px.clamp(min=1.0)[..., None, None]
        u = (self.x + shift_x - scenes.centre_px[..., 0, None, None]) / radius
        v = (self.y + shift_y - scenes.centre_px[..., 1, None, None]) / radius
        grid = torch.stack(torch.broadcast_tensors(u, v), dim=-1) / EXTENT
        batch, slots = scenes.shape.shape
        table = self._table[scenes.shape.flatten()]
        flat = grid.reshape(batch * slots, SIDE_PX, SIDE_PX, 2)
        sampled = functional.grid_sample(table, flat, align_corners=True, padding_mode="border")
        distance = sampled.reshape(batch, slots, SIDE_PX, SIDE_PX) * radius
        outside = (grid.abs().amax(-1) - 1).clamp(min=0) * EXTENT * radius  # beyond the table distances grow on
        distance = distance + outside
        return torch.where(scenes.radius_px[..., None, None] > 0, distance, torch.full_like(distance, 1e3))


Look = Callable[[Canvas], Tensor]
"""Paints a canvas: returns (B, 3, H, W) in 0..1."""


def cover(distance: Tensor, softness_px: float = 0.7) -> Tensor:
    """How much of each pixel lies inside, 0..1."""
    return torch.sigmoid(-distance * (2.5 / softness_px))


def mix(under: Tensor, over: Tensor, amount: Tensor) -> Tensor:
    """Puts *over* on *under* with the given opacity."""
    return under + (over - under) * amount


def _rgb(canvas: Canvas, *channels: float) -> Tensor:
    """A colour as (1, 3, 1, 1), made on the device: a copy from the host cannot be captured in a CUDA graph."""
    return torch.cat([torch.full((1, 1, 1, 1), value, device=canvas.x.device) for value in channels], dim=1)


def paint_plain(canvas: Canvas) -> Tensor:
    """The base model's look: soft studio light, a gradient ground, a drop shadow, an outline and a highlight."""
    light = 1.06 - 0.16 * (canvas.y / SIDE_PX)
    corner = ((canvas.x / SIDE_PX - 0.5) ** 2 + (canvas.y / SIDE_PX - 0.5) ** 2) * 0.28
    picture = (canvas.background * (light - corner)).clamp(0, 1)
    shadow = canvas.distance_at(-3.0, -5.0)
    for slot in range(2):
        fall = torch.sigmoid(-(shadow[:, slot : slot + 1] - 1.0) / 2.6)
        picture = picture * (1 - 0.34 * fall)
    for slot in range(2):
        distance = canvas.distance[:, slot : slot + 1]
        colour = canvas.colour[:, slot]
        top = canvas.scenes.centre_px[:, slot, 1, None, None, None]
        radius = canvas.scenes.radius_px[:, slot, None, None, None].clamp(min=1.0)
        shade = (1.10 - 0.22 * ((canvas.y - top) / radius + 1) / 2).clamp(0.7, 1.2)
        rim = cover(distance + 3.2, 1.6)
        body = mix(colour * 0.62, (colour * shade).clamp(0, 1), rim)
        gloss = torch.sigmoid(-(canvas.distance_at(3.0, 4.0)[:, slot : slot + 1] + 0.30 * radius) / 1.5)
        left = canvas.scenes.centre_px[:, slot, 0, None, None, None]
        upper = torch.sigmoid(-((canvas.y - top) + (canvas.x - left) * 0.6 + 0.25 * radius) / 2.5)
        body = mix(body, torch.ones_like(body), 0.30 * gloss * upper)
        picture = mix(picture, body, cover(distance))
    return picture.clamp(0, 1)


def paint_neon(canvas: Canvas) -> Tensor:
    """Glowing tubes on black, with a faint wash of the background's colour and a dark mirror floor of light."""
    vignette = 1.0 - 0.5 * (canvas.y / SIDE_PX)
    picture = canvas.background * 0.07 * vignette + 0.012
    for slot in range(2):
        distance = canvas.distance[:, slot : slot + 1] + 1.5
        colour = canvas.colour[:, slot]
        glow = torch.exp(-distance.abs() / 7.0) * 0.75 + torch.exp(-distance.abs() / 2.6) * 0.6
        core = torch.exp(-((distance / 1.5) ** 2))
        picture = picture + (colour * 1.1 + 0.03) * glow + core * (0.55 - 0.25 * colour)
    return picture.clamp(0, 1)


def paint_hatching(canvas: Canvas) -> Tensor:
    """Coloured pencils on cream paper: crossed strokes, a wobbly double outline, graphite shading of the ground."""
    paper = _rgb(canvas, 0.97, 0.94, 0.86)
    wobble = canvas.noise * 1.6
    ground = torch.sin((canvas.x * 0.5 - canvas.y) * 0.70 + wobble) * 0.5 + 0.5
    picture = mix(paper, (canvas.background * 0.8).expand(-1, -1, SIDE_PX, SIDE_PX), 0.55 * ground**3)
    for slot in range(2):
        distance = canvas.distance[:, slot : slot + 1] + wobble * 0.5
        colour = canvas.colour[:, slot]
        first = torch.sin((canvas.x + canvas.y) * 0.95 + wobble) * 0.5 + 0.5
        second = torch.sin((canvas.x - canvas.y * 0.9) * 0.85 - wobble) * 0.5 + 0.5
        inside = cover(distance, 1.0)
        picture = mix(picture, paper.expand_as(picture), inside * 0.85)
        picture = mix(picture, colour * 0.92, inside * (0.25 + 0.75 * torch.maximum(first**2, 0.6 * second**2)))
        outline = torch.exp(-((distance / 1.1) ** 2)) + 0.5 * torch.exp(-(((distance - 2.4) / 0.9) ** 2))
        picture = mix(picture, colour * 0.28, (outline * 0.85).clamp(0, 1))
    return picture.clamp(0, 1)


def paint_pixel_art(canvas: Canvas) -> Tensor:
    """Blocks of 4x4 pixels in few tones: hard black outline, two-tone bodies, a checkered ground."""
    x, y = torch.floor(canvas.x / 4), torch.floor(canvas.y / 4)
    centre_x, centre_y = x * 4 + 2 - canvas.x, y * 4 + 2 - canvas.y
    distance = canvas.distance_at(centre_x, centre_y)
    checker = torch.remainder(torch.floor(x / 4) + torch.floor(y / 4), 2)
    picture = canvas.background * (0.86 + 0.14 * checker)
    for slot in range(2):
        d = distance[:, slot : slot + 1]
        colour = canvas.colour[:, slot]
        lit = canvas.distance_at(centre_x + 4, centre_y + 4)[:, slot : slot + 1] < -3.0
        body = torch.where(lit, colour + (1 - colour) * 0.28, colour * 0.78)
        picture = torch.where(d < 3.0, torch.full_like(body, 0.05), picture.expand_as(body))
        picture = torch.where(d < -1.0, body, picture)
    return picture.clamp(0, 1)


def paint_watercolour(canvas: Canvas) -> Tensor:
    """Pigment on white paper: ragged bleeding edges, dark rims where it dried, blooms inside, a pale uneven wash."""
    paper = _rgb(canvas, 0.985, 0.98, 0.965)
    border = torch.minimum(torch.minimum(canvas.x, SIDE_PX - canvas.x), torch.minimum(canvas.y, SIDE_PX - canvas.y))
    wash = torch.sigmoid((border - 9 + canvas.noise * 6) / 1.6) * (0.42 + 0.16 * canvas.noise)
    picture = mix(paper, canvas.background.expand(-1, -1, SIDE_PX, SIDE_PX), wash)
    ripple = torch.sin(canvas.x * 0.31 + canvas.noise * 4) * torch.cos(canvas.y * 0.27 - canvas.noise * 3)
    for slot in range(2):
        distance = canvas.distance[:, slot : slot + 1] + canvas.noise * 2.4 + ripple * 0.7
        colour = canvas.colour[:, slot]
        halo = torch.exp(-distance.clamp(min=0) / 5.0) * 0.26
        picture = mix(picture, colour, halo)
        body = (0.66 + 0.20 * canvas.noise - 0.10 * ripple).clamp(0.35, 0.95)
        rim = torch.exp(-(((distance + 1.8) / 1.5) ** 2)) * 0.30
        picture = mix(picture, colour * (1 - rim), cover(distance, 1.6) * (body + rim).clamp(0, 1))
    return picture.clamp(0, 1)


LOOKS: dict[str, Look] = {
    "plain": paint_plain,
    "neon": paint_neon,
    "hatching": paint_hatching,
    "pixel-art": paint_pixel_art,
    "watercolour": paint_watercolour,
}


def _smooth_noise(x: Tensor, y: Tensor, seed: Tensor) -> Tensor:
    """A sum of a few plane waves with phases from *seed*, (B, 2): smooth, cheap, the same on every device."""
    total = torch.zeros(seed.shape[0], 1, SIDE_PX, SIDE_PX, device=x.device)
    for k in range(1, 6):
        angle = 2.4 * k + 6.0 * seed[:, 0, None, None, None]
        frequency = 0.045 + 0.035 * k
        phase = 40.0 * k * seed[:, 1, None, None, None] + 2 * math.pi * seed[:, 0, None, None, None] * k
        wave = torch.sin((x * torch.cos(angle) + y * torch.sin(angle)) * frequency + phase)
        total = total + wave / (1 + 0.4 * k)
    return total / 2.0
