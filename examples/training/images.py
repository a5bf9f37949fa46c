"""Folders of images: found, checked, cut to size."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import final

import numpy as np
import torch
from failures import RecipeError, listed, say
from PIL import Image, ImageOps
from torch import Tensor

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
LEAST = 4
"""An image may be enlarged this often, not more."""


@final
@dataclass(frozen=True)
class Crop:
    """How a picture becomes a square: made `height` × `width`, then cut at `top`, `left`."""

    resolution: int
    height: int
    width: int
    top: int
    left: int

    @classmethod
    def of(cls, size: tuple[int, int], resolution: int, generator: torch.Generator | None = None) -> Crop:
        """For a picture of (width, height): the shorter side becomes `resolution`, then the middle is cut, or with a
        generator any place."""
        short = min(size)
        width, height = (max(resolution, round(side * resolution / short)) for side in size)
        spare = height - resolution, width - resolution
        if generator is None:
            top, left = (side // 2 for side in spare)
        else:
            top, left = (int(torch.randint(side + 1, (1,), generator=generator)) for side in spare)
        return cls(resolution, height, width, top, left)

    def apply(self, picture: Image.Image, *, smooth: bool = True) -> Image.Image:
        """The square; not `smooth` keeps colours that mean something, as those of a segmentation do."""
        how = Image.Resampling.LANCZOS if smooth else Image.Resampling.NEAREST
        resized = picture.resize((self.width, self.height), how)
        return resized.crop((self.left, self.top, self.left + self.resolution, self.top + self.resolution))


def images_in(folder: Path) -> list[Path]:
    """The images of a folder by name, not of those below it.

    Raises:
        RecipeError: no folder, or no images.
    """
    if not folder.is_dir():
        raise RecipeError(f"{folder}: no such folder, expected one with images")
    files = sorted(path for path in folder.iterdir() if path.is_file())
    found = [path for path in files if path.suffix.lower() in SUFFIXES and not path.name.startswith(".")]
    if not found:
        others = f"found {len(files)} other files, {files[0].name} first" if files else "it is empty"
        raise RecipeError(f"{folder}: no images ({', '.join(SUFFIXES)}); {others}")
    return found


def read(path: Path) -> Image.Image:
    """A picture in RGB, turned as its camera says.

    Raises:
        RecipeError: it cannot be read.
    """
    try:
        with Image.open(path) as opened:
            return ImageOps.exif_transpose(opened).convert("RGB")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise RecipeError(f"{path}: unreadable ({error}); repair it or take it away") from error


def check(paths: Sequence[Path], resolution: int) -> list[tuple[int, int]]:
    """Read all images once, before anything long starts; gives each one's (width, height).

    Raises:
        RecipeError: some are unreadable or far too small; all of them are named.
    """
    sizes: list[tuple[int, int]] = []
    wrong: list[str] = []
    least = -(-resolution // LEAST)
    with ThreadPoolExecutor() as pool:
        found = list(pool.map(_size, paths))
    for path, size in zip(paths, found, strict=True):
        if isinstance(size, RecipeError):
            wrong.append(str(size))
            continue
        if min(size) < least:
            wrong.append(f"{path}: {size[0]}×{size[1]} pixels, expected {least} at least on each side")
        sizes.append(size)
    if wrong:
        raise RecipeError(
            f"{len(wrong)} of {len(paths)} images cannot be used at --resolution {resolution}; replace or remove them, or "
            f"choose a smaller resolution:{listed(wrong)}"
        )
    small = sum(min(size) < resolution for size in sizes)
    if small:
        say(f"{small} of {len(paths)} images are smaller than {resolution} pixels and are enlarged")
    return sizes


def _size(path: Path) -> tuple[int, int] | RecipeError:
    try:
        return read(path).size
    except RecipeError as error:
        return error


def pixels(picture: Image.Image) -> Tensor:
    """(3, height, width), uint8."""
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1).contiguous()


def scaled(values: Tensor) -> Tensor:
    """uint8 pixels in [−1, 1], float32."""
    return values.float() / 127.5 - 1


def pictures(values: Tensor) -> list[Image.Image]:
    """Pictures of (batch, 3, height, width) in [−1, 1]; NaN is black."""
    levels = ((values.float().nan_to_num(-1).clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    return [Image.fromarray(level.permute(1, 2, 0).cpu().numpy()) for level in levels]
