"""The data of a subject's training: its pictures, and pictures of its class that hold what the base knew."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from caches import Cache, hash_of_file, key_of
from components import Components
from images import Crop, pixels, read, scaled
from torch import Tensor

from trlora.training.order import mixed


@dataclass(frozen=True)
class Picture:
    """An image cut to a square, as the cache knows what the VAE makes of it."""

    path: Path
    size: tuple[int, int]
    crop: Crop
    content: str
    """A hash of the file."""
    keys: tuple[str, ...]
    """As it is, and mirrored where that is wanted."""

    def time_ids(self) -> Tensor:
        """Original height and width, top and left of the crop, the square's: what Stable Diffusion XL is told."""
        width, height = self.size
        side = self.crop.resolution
        return torch.tensor([height, width, self.crop.top, self.crop.left, side, side]).float()


def pictures_of(
    paths: list[Path],
    sizes: list[tuple[int, int]],
    *,
    vae_hash: str,
    resolution: int,
    center_crop: bool,
    random_flip: bool,
    seed: int,
) -> list[Picture]:
    """The pictures with their crops: the middle, or one place for each, drawn once from the seed."""
    found = []
    for number, (path, size) in enumerate(zip(paths, sizes, strict=True)):
        generator = None if center_crop else torch.Generator().manual_seed(mixed(seed, number))
        crop = Crop.of(size, resolution, generator)
        flips = (False, True) if random_flip else (False,)
        content = hash_of_file(path)
        keys = tuple(key_of("latents", vae_hash, content, vars(crop), flip) for flip in flips)
        found.append(Picture(path, size, crop, content, keys))
    return found


@torch.no_grad()
def latents_of(components: Components, picture: Picture, flip: bool) -> dict[str, Tensor]:
    """`mean` and `std` (channels, height, width) of the VAE's distribution, unscaled."""
    values = scaled(pixels(picture.crop.apply(read(picture.path))))
    values = values.flip(-1) if flip else values
    vae = components.vae
    distribution = vae.encode(values[None].to(vae.device)).latent_dist
    return {"mean": distribution.mean[0], "std": distribution.std[0]}


def latent_makers(components: Components, pictures: list[Picture]) -> dict[str, Callable[[], dict[str, Tensor]]]:
    """What `Cache.fill` takes: every latent that the pictures need."""

    def maker(picture: Picture, flip: bool) -> Callable[[], dict[str, Tensor]]:
        return lambda: latents_of(components, picture, flip)

    return {
        key: maker(picture, flip)
        for picture in pictures
        for key, flip in zip(picture.keys, (False, True), strict=False)
    }


class SubjectData:
    """Samples of an instance and, with prior preservation, of the class beside it; the longer list is gone through once
    an epoch. Draws from torch's own generator which way round a picture is."""

    def __init__(
        self,
        cache: Cache,
        instances: tuple[list[Picture], Mapping[str, Tensor]],
        classes: tuple[list[Picture], Mapping[str, Tensor]] | None = None,
    ) -> None:
        """
        Args:
            instances, classes: pictures and their prompt's embedding.
        """
        self.cache = cache
        self.parts = {"instance": instances} | ({} if classes is None else {"class": classes})

    def files(self) -> list[Path]:
        """Every image."""
        return [picture.path for pictures, _ in self.parts.values() for picture in pictures]

    def told(self) -> str:
        """How many of what, for people."""
        counts = [len(pictures) for pictures, _ in self.parts.values()]
        return f"{counts[0]} pictures" + (f" and {counts[1]} of the class" if len(counts) > 1 else "")

    def __len__(self) -> int:
        return max(len(pictures) for pictures, _ in self.parts.values())

    def __getitem__(self, number: int) -> dict[str, Any]:
        if not 0 <= number < len(self):
            raise IndexError(number)
        return {name: self._sample(*part, number) for name, part in self.parts.items()}

    def _sample(self, pictures: list[Picture], embedding: Mapping[str, Tensor], number: int) -> dict[str, Tensor]:
        picture = pictures[number % len(pictures)]
        side = int(torch.randint(len(picture.keys), ())) if len(picture.keys) > 1 else 0
        sample = {**self.cache[picture.keys[side]], **embedding}
        return sample | {"time_ids": picture.time_ids()} if "pooled" in embedding else sample
