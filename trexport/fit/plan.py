"""What a fit is given: the weights of two checkpoints side by side, checked before anything takes long."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import final

import torch
from torch import Tensor

from trexport.errors import TrexportError
from trexport.formats import looks_like
from trexport.hashing import hash_of_bytes
from trexport.models.base import Base, open_base
from trexport.models.model import empty_model
from trexport.models.weights import SafetensorsFile, WeightFile
from trexport.models.writer import bytes_of
from trexport.progress import SILENT, Progress
from trlora import find_targets
from trlora.targets import PRESETS


@final
@dataclass(frozen=True)
class Pair:
    """A parameter in both checkpoints."""

    name: str
    base: WeightFile
    tuned: WeightFile

    def weights(self) -> tuple[Tensor, Tensor]:
        return self.base.tensor(self.name), self.tuned.tensor(self.name)


@final
@dataclass(frozen=True)
class TargetLayer:
    """A layer whose weight an adapter is to be fitted to."""

    path: str
    shape: tuple[int, ...]
    pair: Pair
    hashes: tuple[str, str]
    """Of the two weights."""


@final
@dataclass(frozen=True)
class FitPlan:
    """Two checkpoints compared."""

    base: Base
    tuned: Base
    layers: tuple[TargetLayer, ...]
    """The targets that changed."""
    unchanged: int
    """How many targets did not."""
    target_change: float
    """`‖W* − W0‖_F` over all targets."""
    other_change: float
    """The same over everything else that both have in one shape, which no adapter here can hold."""
    others: tuple[str, ...]
    """What else changed, or is in one of them only, the most changed first."""

    @property
    def target_share(self) -> float:
        """The targets' share of the squared change."""
        return self.target_change**2 / (self.target_change**2 + self.other_change**2)


def open_tuned(name: str, base: Base) -> Base:
    """Open TUNED: what `open_base` opens, or one safetensors file with a UNet's parameters under their own names.

    Raises:
        UsageError, BaseError: as `open_base`.
    """
    path = Path(name)
    return Base(name, base.config, [SafetensorsFile(path)]) if path.is_file() else open_base(name)


def plan_fit(base: Base, tuned: Base, targets: Sequence[str], *, progress: Progress = SILENT) -> FitPlan:
    """Compare two checkpoints; reads all of both.

    Args:
        targets: presets' names or regular expressions for whole module paths; a layer that any of them matches is one.

    Raises:
        TargetError: nothing matches.
        TrexportError: a target is not in both, of another shape, not of floating-point numbers, or not finite; or nothing
            changed.
    """
    pattern = "|".join(f"(?:{PRESETS.get(target, target)})" for target in targets)
    paths = list(find_targets(empty_model(base.architecture), pattern))
    before, after = _files(base), _files(tuned)
    _check_same_architecture(base, tuned, paths)
    shapes, others = base.shapes(), tuned.shapes()
    wanted = [f"{path}.weight" for path in paths]
    rest = [name for name in shapes if name not in set(wanted)]
    pairs = {
        name: Pair(name, before[name], after[name])
        for name in [*wanted, *rest]
        if name in others and shapes[name] == others[name]
    }
    changes: dict[str, float] = {}
    hashes: dict[str, tuple[str, str]] = {}
    with progress.task("compare", len(pairs)) as task, ThreadPoolExecutor(2) as pool:

        def compare(pair: Pair) -> None:
            weights = pair.weights()
            changes[pair.name] = _distance(*weights)
            if pair.name in wanted_names:
                first, second = (hash_of_bytes(bytes_of(weight)) for weight in weights)
                hashes[pair.name] = (first, second)
            task.advance(1)

        wanted_names = set(wanted)
        for future in [pool.submit(compare, pair) for pair in pairs.values()]:
            future.result()
    _check_finite(base, tuned, [pairs[name] for name in wanted if not math.isfinite(changes[name])])
    changed = sorted((name for name in rest if changes.get(name, 0) != 0), key=lambda name: (-changes[name], name))
    only = [name for name in {**shapes, **others} if name not in pairs]
    layers = tuple(
        TargetLayer(path, shapes[name], pairs[name], hashes[name])
        for path, name in zip(paths, wanted, strict=True)
        if changes[name] != 0
    )
    if not layers:
        there = (
            f"; {len(changed)} other tensors differ, {changed[0]} the most: choose it with --targets"
            if changed
            else ": they are the same checkpoint"
        )
        raise TrexportError(
            f"{tuned.name}: nothing to fit, its {len(paths)} targets have the very weights of {base.name}{there}"
        )
    return FitPlan(
        base,
        tuned,
        layers,
        len(paths) - len(layers),
        _norm(changes[name] for name in wanted),
        _norm(changes[name] for name in changed if math.isfinite(changes[name])),
        (*changed, *only),
    )


def _files(base: Base) -> dict[str, WeightFile]:
    return {entry.name: file for file in base.weights for entry in file.entries}


def _distance(before: Tensor, after: Tensor) -> float:
    """`‖after − before‖_F`; NaN where that is what they hold, 0 for integers."""
    if not (before.dtype.is_floating_point and after.dtype.is_floating_point):
        return 0.0 if before.dtype == after.dtype else math.nan
    return float(torch.linalg.vector_norm(after.float() - before.float(), dtype=torch.float64))


def _norm(values: Iterable[float]) -> float:
    return math.sqrt(math.fsum(value * value for value in values))


def _check_same_architecture(base: Base, tuned: Base, paths: Sequence[str]) -> None:
    expected, found = base.weight_shapes(), tuned.weight_shapes()
    problems = [
        f"{path}.weight: {'missing' if path not in found else f'shape {found[path]}'}, expected {expected[path]}"
        for path in paths
        if found.get(path) != expected.get(path)
    ]
    if not problems:
        return
    looks = [_looks(shapes) for shapes in (expected, found)]
    hint = "" if looks[0] == looks[1] else f"; {base.name} looks like {looks[0]}, {tuned.name} like {looks[1]}"
    raise TrexportError(
        f"{tuned.name}: not a fine-tune of {base.name}: {len(problems)} of {len(paths)} targets do not match{hint}; "
        f"first {problems[0]}"
    )


def _looks(shapes: Mapping[str, tuple[int, ...]]) -> str:
    return looks_like({path: math.prod(shape[1:]) for path, shape in shapes.items()}) or "an unknown model"


def _check_finite(base: Base, tuned: Base, pairs: Sequence[Pair]) -> None:
    """Raises for the first of the pairs whose difference is not finite."""
    if not pairs:
        return
    pair = pairs[0]
    for model, weight in zip((base, tuned), pair.weights(), strict=True):
        if not weight.dtype.is_floating_point:
            raise TrexportError(f"{model.name}: {pair.name} has dtype {weight.dtype}, expected a floating-point one")
        count = int((~torch.isfinite(weight)).sum())
        if count:
            raise TrexportError(
                f"{model.name}: {pair.name}: {count} of {weight.numel()} values are NaN or Inf, and nothing can be fitted "
                f"to that; {len(pairs)} of the targets have such values"
            )
    raise TrexportError(f"{tuned.name}: {pair.name} is too far from {base.name}'s: their difference is not finite")
