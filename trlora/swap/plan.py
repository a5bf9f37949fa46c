"""Which layers the swap kernel takes, in which launches, and why it leaves the others."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import final

import torch
from torch import Tensor

from trlora.layers import LayerAdapter
from trlora.ring import TwoSites
from trlora.swap.packed import Factors
from trlora.swap.two_site import RingSites, ring_sites, splits_of, two_sites
from trlora.swap.variant import SHARED_BYTES, Variant, free_splits

_RING_RANK = 8
_LOW_RANK = 128


@final
@dataclass(frozen=True)
class Group:
    """The layers of one launch."""

    variant: Variant
    paths: Sequence[str]
    factors: Sequence[Sequence[Factors]]
    """By adapter, then by layer."""


@final
@dataclass(frozen=True)
class Plan:
    """What is done with every layer."""

    groups: Sequence[Group]
    torch: Mapping[str, str]
    """Layers that are computed by plain torch → why."""
    unchanged: Sequence[str]
    """Layers that no adapter is on."""


@final
@dataclass
class _Sites:
    """The factors of a layer with the adapters that are on it, before the launch's sizes are known."""

    width: int
    n_lo: int
    transforms: list[TwoSites | None]
    rings: list[RingSites | None] = field(default_factory=list)
    low_ranks: list[tuple[Tensor, Tensor] | None] = field(default_factory=list)

    @property
    def terms(self) -> tuple[int, ...]:
        return tuple(0 if sites is None else max(1, len(sites.fast)) for sites in self.transforms)

    @property
    def work(self) -> int:
        """Of the transforms, in multiplications for every entry of W0."""
        return sum(self.terms) * (self.n_lo + self.width // self.n_lo)

    @property
    def ring_pairs(self) -> tuple[int, ...]:
        return tuple(0 if sites is None else (sites.fast.shape[2] + 1) // 2 for sites in self.rings)

    @property
    def low_rank_steps(self) -> tuple[int, ...]:
        return tuple(0 if pair is None else (pair[0].shape[1] + 15) // 16 for pair in self.low_ranks)


def plan_of(
    weights: Mapping[str, Tensor],
    buffers: Mapping[str, Tensor],
    adapters: Sequence[Mapping[str, LayerAdapter]],
    why_not: str | None = None,
    shared_limit: int = SHARED_BYTES,
) -> Plan:
    """Plan a swap.

    Args:
        weights: layer path → W0; sizes, dtype and strides count.
        buffers: the same paths → where W' goes.
        adapters: those that are active together, by layer path, on the CPU: their factors are many small matrices.
        why_not: why the kernel takes no layer at all; None where it can run.
        shared_limit: bytes of shared memory that a block may have.
    """
    left: dict[str, str] = {}
    unchanged: list[str] = []
    found: dict[tuple[int, int, int, str, torch.dtype], dict[str, _Sites]] = {}
    for path, weight in weights.items():
        here = [_acting(adapter.get(path)) for adapter in adapters]
        if all(item is None for item in here):
            unchanged.append(path)
            continue
        if why_not is None and not (weight.is_contiguous() and buffers[path].is_contiguous()):
            sites = "a weight that is not contiguous"
        else:
            sites = why_not or _sites(weight, here)
        if isinstance(sites, str):
            left[path] = sites
            continue
        kind = "ring" if any(sites.ring_pairs) else "low rank" if any(sites.low_rank_steps) else "none"
        key = (weight.flatten(1).shape[1], sites.width, sites.n_lo, kind, weight.dtype)
        found.setdefault(key, {})[path] = sites
    groups = []
    for (stride, width, n_lo, _, dtype), layers in found.items():
        variant = Variant(
            stride,
            width,
            n_lo,
            dtype == torch.bfloat16,
            terms=_most([sites.terms for sites in layers.values()]),
            ring_pairs=_most([sites.ring_pairs for sites in layers.values()]),
            low_rank_steps=_most([sites.low_rank_steps for sites in layers.values()]),
        )
        fitted = variant.fitted(shared_limit)
        if fitted is None:
            left |= dict.fromkeys(layers, f"no kernel for {_described(variant)}")
            continue
        factors = [[_factors(sites, number) for sites in layers.values()] for number in range(len(adapters))]
        groups.append(Group(fitted, list(layers), factors))
    return Plan(groups, left, unchanged)


def _acting(adapter: LayerAdapter | None) -> LayerAdapter | None:
    """The adapter, or None where it changes nothing whatever its strength."""
    if adapter is None or (adapter.transform.trivial and adapter.residual.trivial and not adapter.outside):
        return None
    return adapter


def _most(counts: Sequence[tuple[int, ...]]) -> tuple[int, ...]:
    """The greatest of every adapter."""
    return tuple(max(column) for column in zip(*counts, strict=True))


def _sites(weight: Tensor, adapters: Sequence[LayerAdapter | None]) -> _Sites | str:
    """A layer's factors, or why the kernel does not take it."""
    if weight.dtype not in (torch.float16, torch.bfloat16):
        return f"weights in {str(weight.dtype).removeprefix('torch.')}"
    if any(adapter is not None and not adapter.magnitude.trivial for adapter in adapters):
        return "a magnitude"
    if any(adapter is not None and not adapter.output_transform.trivial for adapter in adapters):
        return "a transform of outputs"
    columns = weight.flatten(1).shape[1]
    transforms = [None if adapter is None or adapter.transform.trivial else adapter.transform for adapter in adapters]
    residuals = [None if adapter is None or adapter.residual.trivial else adapter.residual for adapter in adapters]
    cuts = [set(splits_of(transform)) for transform in transforms if transform is not None]
    if cuts:
        splits = [(columns, n_lo) for n_lo in sorted(set.intersection(*cuts))]
    else:
        splits = [(columns, n_lo) for n_lo in range(16, 129, 16) if columns % n_lo == 0]
        splits = [
            split
            for split in splits
            if all(residual is None or ring_sites(residual, split[1]) is not None for residual in residuals)
        ] or list(free_splits(columns))
    splits = [split for split in splits if Variant(columns, *split, False, terms=(1,)).fitted(1 << 18) is not None]
    if not splits:
        names = " and ".join(sorted({type(transform).__name__ for transform in transforms if transform is not None}))
        return f"{names or 'rows'} of {columns} columns"
    best: _Sites | None = None
    for width, n_lo in splits:
        sites = _Sites(width, n_lo, [None if item is None else two_sites(item, n_lo) for item in transforms])
        if best is None or sites.work < best.work:
            best = sites
        if not cuts:
            break  # the first is the best one
    assert best is not None
    rings = [None if residual is None else ring_sites(residual, best.n_lo) for residual in residuals]
    if all((ring is None) == (residual is None) for ring, residual in zip(rings, residuals, strict=True)) and all(
        ring is None or max(*ring.left.shape[1:], ring.fast.shape[2]) <= _RING_RANK for ring in rings
    ):
        best.rings = rings
        best.low_ranks = [None] * len(rings)
        return best
    best.rings = [None] * len(rings)
    best.low_ranks = [None if item is None else _doubled(item.low_rank()) for item in residuals]
    rank = max((pair[0].shape[1] for pair in best.low_ranks if pair is not None), default=0)
    if rank > _LOW_RANK:
        return f"a residual of rank {rank}"
    return best


def _factors(sites: _Sites, adapter: int) -> Factors:
    return Factors(sites.transforms[adapter], sites.rings[adapter], sites.low_ranks[adapter])


def _doubled(pair: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    return pair[0].detach().double(), pair[1].detach().double()


def _described(variant: Variant) -> str:
    parts = [f"{variant.stride} columns cut at {variant.n_lo}"]
    parts += [f"{variant.adapters} adapters"] if variant.adapters > 1 else []
    parts += [f"{sum(variant.terms)} terms"] if any(variant.terms) else []
    parts += [f"rank {16 * sum(variant.low_rank_steps)}"] if any(variant.low_rank_steps) else []
    return ", ".join(parts)
