"""Signed distances of the shapes, tabulated once on a grid: negative inside, in units of the shape's radius."""

from __future__ import annotations

import math

import torch

from tools.demo_model.scenes import SHAPES

GRID = 257
EXTENT = 2.5
"""The table covers -EXTENT..EXTENT in both directions, with the shape's radius as unit."""


def distance_table(device: torch.device) -> torch.Tensor:
    """Returns (len(SHAPES), 1, GRID, GRID) signed distances, y downwards."""
    axis = torch.linspace(-EXTENT, EXTENT, GRID, dtype=torch.float64)
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    points = torch.stack([x, y], dim=-1)
    return torch.stack([_distance(shape, points) for shape in SHAPES])[:, None].float().to(device)


def _distance(shape: str, points: torch.Tensor) -> torch.Tensor:
    radius = points.norm(dim=-1)
    if shape == "circle":
        return radius - 0.92
    if shape == "ring":
        return (radius - 0.74).abs() - 0.25
    rounding = {"square": 0.10, "triangle": 0.07, "star": 0.05, "cross": 0.08, "heart": 0.03, "moon": 0.03}[shape]
    return _polygon(points, _vertices(shape)) - rounding


def _vertices(shape: str) -> torch.Tensor:
    if shape == "square":
        corners = [(-0.70, -0.70), (0.70, -0.70), (0.70, 0.70), (-0.70, 0.70)]
    elif shape == "triangle":
        corners = [(0.0, -0.95), (0.98, 0.72), (-0.98, 0.72)]
    elif shape == "cross":
        a, b = 0.28, 0.88
        corners = [(-a, -b), (a, -b), (a, -a), (b, -a), (b, a), (a, a), (a, b), (-a, b), (-a, a), (-b, a)]
        corners += [(-b, -a), (-a, -a)]
    elif shape == "star":
        corners = [
            (r * math.sin(k * math.pi / 5), 0.06 - r * math.cos(k * math.pi / 5))
            for k, r in enumerate([1.06, 0.44] * 5)
        ]
    elif shape == "moon":
        corners = _crescent()
    else:  # the heart's classic parametrisation by powers of sine and cosine
        angles = [2 * math.pi * k / 64 for k in range(64)]
        corners = [
            (
                math.sin(t) ** 3,
                -(13 * math.cos(t) - 5 * math.cos(2 * t) - 2 * math.cos(3 * t) - math.cos(4 * t)) / 16 - 0.10,
            )
            for t in angles
        ]
    return torch.tensor(corners, dtype=torch.float64)


def _crescent() -> list[tuple[float, float]]:
    """A disc with a smaller disc bitten out of its upper right: the outer arc, then the inner arc back."""
    outer, inner, apart, turn = 0.95, 0.76, 0.48, -0.4
    half_outer = math.acos((outer**2 + apart**2 - inner**2) / (2 * outer * apart))
    half_inner = math.pi - math.acos((inner**2 + apart**2 - outer**2) / (2 * inner * apart))
    steps = 40
    arc = [half_outer + (2 * math.pi - 2 * half_outer) * k / steps for k in range(steps + 1)]
    back = [2 * math.pi - half_inner - (2 * math.pi - 2 * half_inner) * k / steps for k in range(1, steps)]
    points = [(outer * math.cos(t), outer * math.sin(t)) for t in arc]
    points += [(apart + inner * math.cos(t), inner * math.sin(t)) for t in back]
    cos, sin = math.cos(turn), math.sin(turn)
    return [(x * cos - y * sin + 0.12, x * sin + y * cos) for x, y in points]


def _polygon(points: torch.Tensor, vertices: torch.Tensor) -> torch.Tensor:
    """Exact signed distance to a simple polygon: nearest edge, and the parity of edges crossed by a ray."""
    nearest = torch.full(points.shape[:-1], math.inf, dtype=points.dtype)
    inside = torch.zeros(points.shape[:-1], dtype=torch.bool)
    for start, end in zip(vertices, vertices.roll(-1, 0), strict=True):
        edge, offset = end - start, points - start
        along = ((offset @ edge) / (edge @ edge)).clamp(0, 1)
        nearest = torch.minimum(nearest, (offset - along[..., None] * edge).norm(dim=-1))
        spans = (start[1] > points[..., 1]) != (end[1] > points[..., 1])
        slope = edge[0] / edge[1] if edge[1] != 0 else torch.tensor(0.0, dtype=points.dtype)
        inside ^= spans & (points[..., 0] < start[0] + slope * offset[..., 1])
    return torch.where(inside, -nearest, nearest)
