"""The data of a control's training: latents of pictures, embeddings of captions, and the conditions, cut alike."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from caches import Cache, key_of
from conditions import as_control, canny
from failures import RecipeError, listed
from images import Crop, pixels, read
from PIL import Image
from subject_data import Picture
from torch import Tensor

KINDS = ("files", "segmentation", "canny")


def condition_of(path: Path, crop: Crop, kind: str) -> Tensor:
    """(3, height, width) or (height, width), uint8: a condition cut to its square, or the edges of the square."""
    if kind == "canny":
        return canny(crop.apply(read(path)))
    return pixels(crop.apply(read(path), smooth=kind != "segmentation"))


def check_conditions(paths: list[Path], sizes: list[tuple[int, int]]) -> None:
    """
    Raises:
        RecipeError: conditions that are unreadable, or not of the shape of their pictures: all of them are named.
    """
    wrong = []
    for path, (width, height) in zip(paths, sizes, strict=True):
        try:
            found = read(path).size
        except RecipeError as error:
            wrong.append(str(error))
            continue
        # as far apart as rounding to whole pixels brings them
        if abs(found[0] * height - found[1] * width) > max(*found, width, height):
            wrong.append(f"{path}: {found[0]}×{found[1]} pixels, its picture has {width}×{height}")
    if wrong:
        raise RecipeError(f"{len(wrong)} of {len(paths)} conditions do not go with their pictures:{listed(wrong)}")


class ControlData:
    """Samples by number. Draws from torch's own generator which way round a picture is, and whether its caption is there."""

    def __init__(
        self,
        cache: Cache,
        pictures: list[Picture],
        conditions: list[Path],
        captions: list[str],
        embeddings: Mapping[str, str],
        *,
        kind: str,
        empty_share: float,
    ) -> None:
        """
        Args:
            conditions: of each picture; the picture itself for canny.
            captions: of each picture.
            embeddings: caption → its embedding's name in the cache; the empty one too.
            kind: of `KINDS`.
            empty_share: of captions that are left out.
        """
        self.cache, self.pictures, self.conditions = cache, pictures, conditions
        self.captions, self.embeddings, self.kind, self.empty_share = captions, embeddings, kind, empty_share

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitem__(self, number: int) -> dict[str, Tensor]:
        picture = self.pictures[number]
        left_out = bool(torch.rand(()) < self.empty_share)
        flip = len(picture.keys) > 1 and bool(torch.rand(()) < 0.5)
        sample = self.cache[picture.keys[flip]] | self.cache[self.embeddings["" if left_out else self.captions[number]]]
        control = as_control(self._condition(number))
        sample["control"] = control.flip(-1) if flip else control
        return sample | {"time_ids": picture.time_ids()} if "pooled" in sample else sample

    def _condition(self, number: int) -> Tensor:
        if self.kind == "canny":
            return self.cache[edges_key(self.pictures[number])]["edges"]
        return condition_of(self.conditions[number], self.pictures[number].crop, self.kind)


def edges_key(picture: Picture) -> str:
    """The name of a picture's edges in the cache: made from the same content and crop as its latents."""
    return key_of("canny", picture.content, vars(picture.crop))


def picture_of(control: Tensor) -> Image.Image:
    """A condition, for people to look at."""
    return Image.fromarray((control * 255).round().to(torch.uint8).permute(1, 2, 0).numpy())
