"""Generates random training pictures on the device, a batch at a time: crops of photographs, noise and drawings.

Shapes: B batch, H and W picture sides; pictures are [B, 3, H, W] in 0..1.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import affine_grid, grid_sample, interpolate

_ATLAS_SIDE = 720  # pixels; larger photographs are scaled down to it
_LEVELS = (1.0, 0.5)  # each photograph is kept at these scales, so that crops can be wide without aliasing
_OCTAVES = (3, 6, 12, 24, 48, 96)
_SHAPES = 6


class PictureSource:
    """A random source of picture batches, with its own seeded generator."""

    def __init__(self, photographs: list[Image.Image], device: torch.device, seed: int) -> None:
        self.device = device
        self.generator = torch.Generator(device).manual_seed(seed)
        pages = [page for photo in photographs for page in _pages(photo)]
        sides = torch.tensor([(page.shape[1], page.shape[2]) for page in pages])
        self.sides = sides.to(device, torch.float32)
        atlas = torch.zeros(len(pages), 3, *sides.amax(0).tolist(), dtype=torch.float16)
        for index, page in enumerate(pages):
            atlas[index, :, : page.shape[1], : page.shape[2]] = page
        self.atlas = atlas.to(device)

    def uniform(self, *shape: int, low: float = 0.0, high: float = 1.0) -> Tensor:
        """Uniform random numbers in [low, high)."""
        return torch.rand(shape, device=self.device, generator=self.generator) * (high - low) + low

    def chance(self, batch: int, share: float) -> Tensor:
        """A mask [B, 1, 1, 1] that is True with probability `share`."""
        return self.uniform(batch, 1, 1, 1) < share

    def photographs(self, batch: int, height: int, width: int) -> Tensor:
        """Crops of photographs with random scale, rotation, position and flip."""
        page = torch.randint(len(self.sides), (batch,), device=self.device, generator=self.generator)
        sides = self.sides[page]
        half = torch.tensor([height, width], device=self.device) / 2
        scale = torch.exp(self.uniform(batch, low=math.log(0.45), high=math.log(1.5)))
        angle = torch.randn(batch, device=self.device, generator=self.generator) * 0.15
        reach = half.norm() * scale  # from the crop's centre to its corner, in the page's pixels
        scale = scale * torch.minimum(torch.ones_like(reach), sides.amin(1) / 2 / reach)
        margin = (half.norm() * scale).unsqueeze(1)
        centre = margin + self.uniform(batch, 2) * (sides - 2 * margin).clamp(min=0)
        flip = torch.where(self.uniform(batch) < 0.5, -1.0, 1.0)
        turn = torch.where(self.uniform(batch) < 0.2, -1.0, 1.0)
        page_half = torch.tensor(self.atlas.shape[2:], device=self.device) / 2
        cos, sin = torch.cos(angle) * scale, torch.sin(angle) * scale
        theta = torch.stack(
            [
                torch.stack([flip * cos * half[1], -turn * sin * half[0], centre[:, 1] - page_half[1]], 1)
                / page_half[1],
                torch.stack([flip * sin * half[1], turn * cos * half[0], centre[:, 0] - page_half[0]], 1)
                / page_half[0],
            ],
            dim=1,
        )
        grid = affine_grid(theta, [batch, 3, height, width], align_corners=False)
        return grid_sample(self.atlas[page].float(), grid, padding_mode="reflection", align_corners=False).clamp(0, 1)

    def clouds(self, batch: int, height: int, width: int, channels: int = 3) -> Tensor:
        """Multi-scale noise with random roughness and contrast."""
        total = torch.zeros(batch, channels, height, width, device=self.device)
        falloff = self.uniform(batch, 1, 1, 1, low=0.2, high=0.9)
        for power, cells in enumerate(_OCTAVES):
            draws = torch.randn(batch, channels, cells, cells, device=self.device, generator=self.generator)
            total += falloff**power * interpolate(draws, (height, width), mode="bicubic", align_corners=False)
        total = total / total.std(dim=(1, 2, 3), keepdim=True)
        contrast, level = self.uniform(batch, 1, 1, 1, low=0.02, high=0.3), self.uniform(batch, channels, 1, 1)
        return (level + contrast * total).clamp(0, 1)

    def drawings(self, ground: Tensor) -> Tensor:
        """Soft-edged ellipses and rectangles with colour gradients, drawn over `ground`."""
        batch, _, height, width = ground.shape
        y = torch.linspace(-1, 1, height, device=self.device).view(1, 1, -1, 1)
        x = torch.linspace(-1, 1, width, device=self.device).view(1, 1, 1, -1)
        picture = ground
        for _ in range(_SHAPES):
            angle = self.uniform(batch, 1, 1, 1, high=math.pi)
            across, down = x - self.uniform(batch, 1, 1, 1, low=-1), y - self.uniform(batch, 1, 1, 1, low=-1)
            u = (across * angle.cos() + down * angle.sin()) / self.uniform(batch, 1, 1, 1, low=0.1, high=0.9)
            v = (down * angle.cos() - across * angle.sin()) / self.uniform(batch, 1, 1, 1, low=0.05, high=0.9)
            distance = torch.where(self.chance(batch, 0.5), (u * u + v * v).sqrt(), torch.maximum(u.abs(), v.abs()))
            sharpness = torch.exp(self.uniform(batch, 1, 1, 1, low=1.5, high=5.0))
            cover = torch.sigmoid((1 - distance) * sharpness) * self.uniform(batch, 1, 1, 1, low=0.4)
            colour = self.uniform(batch, 3, 1, 1) + u * self.uniform(batch, 3, 1, 1, low=-0.2, high=0.2)
            picture = picture + cover * (colour - picture)
        return picture.clamp(0, 1)

    def recoloured(self, picture: Tensor) -> Tensor:
        """Pictures with random changes of channel order, saturation, gamma and contrast; some become negatives."""
        batch = len(picture)
        order = self.uniform(batch, 3).argsort(1).view(batch, 3, 1, 1).expand_as(picture)
        picture = torch.where(self.chance(batch, 0.35), picture.gather(1, order), picture)
        grey = picture.mean(1, keepdim=True)
        saturation = self.uniform(batch, 1, 1, 1, low=0.4, high=1.7)
        saturation = torch.where(self.chance(batch, 0.1), torch.zeros_like(saturation), saturation)
        picture = (grey + (picture - grey) * saturation).clamp(0, 1)
        gamma = torch.exp(
            self.uniform(batch, 3, 1, 1, low=-0.2, high=0.2) + self.uniform(batch, 1, 1, 1, low=-0.5, high=0.5)
        )
        picture = picture.clamp(1e-4, 1) ** gamma
        gain, lift = self.uniform(batch, 1, 1, 1, low=0.6, high=1.2), self.uniform(batch, 1, 1, 1, low=-0.15, high=0.15)
        picture = torch.where(self.chance(batch, 0.5), picture, (picture - 0.5) * gain + 0.5 + lift).clamp(0, 1)
        return torch.where(self.chance(batch, 0.25), 1 - picture, picture)

    def batch(self, batch: int, height: int, width: int) -> Tensor:
        """A batch of recoloured pictures: seven eighths photographs, one eighth noise, some of both with drawings."""
        drawn = max(1, batch // 8)
        ground = torch.cat([self.photographs(batch - drawn, height, width), self.clouds(drawn, height, width)])
        over = torch.cat([ground[:drawn], ground[-(drawn + 1) // 2 :]])
        ground = torch.cat(
            [self.drawings(over[:drawn]), ground[drawn : batch - drawn // 2], self.drawings(over[drawn:])]
        )
        return self.recoloured(ground[:batch])


def _pages(photo: Image.Image) -> list[Tensor]:
    shrink = min(1.0, _ATLAS_SIDE / max(photo.size))
    pages = []
    for level in _LEVELS:
        size = round(photo.width * shrink * level), round(photo.height * shrink * level)
        pixels = np.asarray(photo.resize(size, Image.Resampling.LANCZOS))
        pages.append(torch.from_numpy(pixels.copy()).permute(2, 0, 1) / 255)
    return pages
