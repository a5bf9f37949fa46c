"""An artifact's steps and trajectories beside the reference's."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import final

import torch
from torch import Tensor

from trexport.backends import Runner
from trexport.io_spec import ADAPTER_INDEX, ADAPTER_STRENGTH, ModelSpec
from trexport.models.adapters import BoundAdapter
from trexport.models.architectures import Architecture
from trexport.models.diffusion import Denoising
from trexport.models.model import batch_of
from trexport.parity.metrics import cosine, max_abs, psnr_db, relative_l2
from trexport.parity.reference import Reference
from trexport.parity.report import StepParity, TrajectoryParity
from trexport.progress import Progress


@final
@dataclass(frozen=True)
class Who:
    """Whose pictures are drawn."""

    label: str
    chosen: Sequence[int | None] | None
    """Of a bank, the numbers of adapters, from 0, that samples take in turn; None for every other form: all at once."""

    def numbers(self, batch: int) -> list[int | None] | None:
        """An adapter for each sample."""
        return None if self.chosen is None else [self.chosen[row % len(self.chosen)] for row in range(batch)]

    def sizes(self, sizes: dict[str, int], io: ModelSpec) -> dict[str, int]:
        """Sizes that have room for every adapter in one batch, where the batch is free."""
        if self.chosen is None or "batch_size" not in io.free_axes:
            return sizes
        return sizes | {"batch_size": max(sizes["batch_size"], min(len(self.chosen), 63))}

    def in_batches(self, io: ModelSpec) -> list[Who]:
        """The same in turns, where a fixed batch has no room for every adapter."""
        batch = io.fixed_sizes().get("batch_size")
        if self.chosen is None or batch is None:
            return [self]
        return [replace(self, chosen=self.chosen[start : start + batch]) for start in range(0, len(self.chosen), batch)]

    def among(self, adapters: Sequence[BoundAdapter]) -> list[BoundAdapter]:
        """The adapters that it draws with."""
        return list(adapters) if self.chosen is None else [adapters[n] for n in self.chosen if n is not None]

    def feeds(self, batch: int, adapters: Sequence[float]) -> dict[str, Tensor]:
        """The bank's index and strengths, none for other forms."""
        numbers = self.numbers(batch)
        if numbers is None:
            return {}
        strengths = [1.0 if number is None else adapters[number] for number in numbers]
        index = [0 if number is None else number + 1 for number in numbers]
        return {ADAPTER_INDEX: torch.tensor(index), ADAPTER_STRENGTH: torch.tensor(strengths)}


def compare_step(
    runner: Runner,
    reference: Reference,
    io: ModelSpec,
    feeds: Mapping[str, Tensor],
    sizes: dict[str, int],
    timestep: float,
    seed: int,
    who: Who,
) -> StepParity:
    """One step of an artifact against the reference."""
    given = runner({**feeds, **who.feeds(sizes["batch_size"], reference.strengths)})
    found = [given[tensor.name].float().cpu() for tensor in io.outputs]
    expected, plain = _expected(reference, who, batch_of(io, feeds), feeds), reference.plain(feeds)
    each = [_compare_output(*tensors, who) for tensors in zip(found, expected, plain, strict=True)]
    # of several outputs the worst counts; of their effects the greatest
    shown = max(each, key=lambda output: output["effect"])
    return StepParity(
        sizes=sizes,
        timestep=timestep,
        seed=seed,
        max_abs=_greatest(output["max_abs"] for output in each),
        max_abs_ratio=_greatest(output["max_abs_ratio"] for output in each),
        relative_l2=_greatest(output["relative_l2"] for output in each),
        cosine=-_greatest(-output["cosine"] for output in each),
        effect=shown["effect"],
        distance_to_base=shown["distance_to_base"],
        who=who.label,
    )


def _compare_output(found: Tensor, expected: Tensor, plain: Tensor, who: Who) -> dict[str, float]:
    error = max_abs(found, expected)
    # of a mixed batch the worst sample counts, not their mean
    rows = range(len(found)) if who.chosen is not None else [slice(None)]
    return {
        "max_abs": error,
        "max_abs_ratio": error / max(expected.abs().max().item(), 1e-30),
        "relative_l2": _greatest(relative_l2(found[row], expected[row]) for row in rows),
        "cosine": cosine(found, expected),
        "effect": relative_l2(expected, plain),
        "distance_to_base": relative_l2(found, plain),
    }


def _greatest(values: Iterable[float]) -> float:
    """A NaN is greater than all."""
    return max(values, key=lambda value: (value != value, value))


def _expected(reference: Reference, who: Who, batch: int, feeds: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
    numbers = who.numbers(batch)
    return reference.adapted(feeds) if numbers is None else reference.mixed(feeds, numbers)


def compare_trajectory(
    runner: Runner,
    reference: Reference,
    denoising: Denoising,
    io: ModelSpec,
    architecture: Architecture,
    feeds: Mapping[str, Tensor],
    who: Who,
    progress: Progress,
) -> TrajectoryParity:
    """A whole denoising of an artifact against the reference's."""
    latents, output = denoising.sampling.latents, io.outputs[0].name
    left_out = (latents, "timestep", ADAPTER_INDEX, ADAPTER_STRENGTH)
    given = {name: tensor for name, tensor in feeds.items() if name not in left_out}
    noise = feeds[latents].float()

    def run(f: Mapping[str, Tensor]) -> Tensor:
        # guidance doubles the batch, which a model of fixed sizes does not take
        parts = []
        for first in range(0, f[latents].shape[0], len(noise)):
            rows = architecture.rows(f, first, first + len(noise))
            parts.append(runner({**rows, **who.feeds(len(noise), reference.strengths)})[output].cpu())
        return torch.cat(parts)

    found = denoising.run(run, noise, given, progress=progress)
    wide = {name: tensor.float() for name, tensor in given.items()}
    expected = denoising.run(
        lambda f: _expected(reference, who, f[latents].shape[0], f)[0], noise, wide, progress=progress
    )
    plain = denoising.run(lambda f: reference.plain(f)[0], noise, wide, progress=progress)
    return TrajectoryParity(
        steps=denoising.steps,
        guidance=denoising.guidance,
        seed=0,
        relative_l2=relative_l2(found, expected),
        psnr_db=psnr_db(found, expected),
        effect=relative_l2(expected, plain),
    )
