"""ADAPTER[=STRENGTH] on the command line: a checkpoint bound to a base."""

from __future__ import annotations

import hashlib
import math
import re
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol, TypeVar, final

import torch

from trexport.errors import AdapterWarning, TrexportError, UsageError
from trexport.formats import left_out, looks_like, read_adapter, widths_of
from trexport.hashing import sha256_of_file, sha256_of_folder
from trexport.manifest import AdapterRecord
from trexport.models.architectures.unet import UNet
from trexport.models.base import Base, sample_folder
from trlora import Adapter, AdapterConfig, AdapterSpec, CheckpointError, LayerAdapter, LayerParts
from trlora.errors import nearest
from trlora.targets import PRESETS

_T = TypeVar("_T")
_TEXT_MODEL = "text_model."
_STRENGTH = re.compile(r"(?P<name>.+)=(?P<strength>[^=/\\]*)")


class Layers(Protocol):
    """What adapters are bound to: a `trexport.models.base.Base`, or the layers of an exported graph."""

    @property
    def name(self) -> str: ...

    def weight_shapes(self) -> dict[str, tuple[int, ...]]:
        """Of the layers that adapters may be on, module path → (out, in), or of a convolution
        (out, in/groups, height, width)."""
        ...

    def addable(self) -> Mapping[str, tuple[int, ...]] | None:
        """The parameters that offsets are added to, by name; None where nobody adds them."""
        ...


@final
@dataclass(frozen=True)
class BoundAdapter:
    """An adapter on a base, at a strength."""

    name: str
    """As it was given, strength excluded."""
    adapter: Adapter
    layers: Mapping[str, LayerAdapter]
    strength: float
    sha256: str
    components: Mapping[str, BoundAdapter] = field(default_factory=dict)
    """What of it is on the text encoders of the base's pipeline, by the component's name, at the same strength."""

    @property
    def on_base(self) -> bool:
        """Whether anything of it is on the base itself, and not on text encoders only."""
        return self.places > 0

    @property
    def places(self) -> int:
        """How many layers, biases and normalisations it changes, its components aside."""
        return len(self.layers) + len(self.adapter.offsets)

    def record(self) -> AdapterRecord:
        layers, offsets = len(self.layers), len(self.adapter.offsets)
        components = {name: bound.places for name, bound in self.components.items()}
        return AdapterRecord(
            self.name, self.strength, self.sha256, layers, self.adapter.parameters, offsets, components
        )


def open_adapters(
    arguments: Sequence[str], base: Layers, components: Callable[[], Mapping[str, Layers] | None] = lambda: None
) -> list[BoundAdapter]:
    """Open `ADAPTER[=STRENGTH]` arguments and bind every tensor of each to a layer of the base, or of a text encoder.

    ADAPTER is a folder or file of any format of `trexport.formats`, `sample:digits/NAME`, or `random:tlora:2:6` (random and
    trained on nothing, for measuring; also `random:tlora-star:2:4`, `random:lora:4`). A strength left out is the
    checkpoint's own.

    Args:
        components: gives the text encoders beside the base, by name, where an adapter has something for them; None where
            the base is alone. What is for text encoders is left out then, with an `AdapterWarning`.

    Raises:
        UsageError: a strength that is no number, an unknown name, or the same adapter twice.
        CheckpointError: the adapter is refused, or does not fit the base or a text encoder; or what is left out is all of
            it.
    """
    bound: list[BoundAdapter] = []
    for argument in arguments:
        name, strength = split_strength(argument)
        if any(name == other.name for other in bound):
            raise UsageError(f"{name}: given twice; give it once, with the sum of the strengths")
        if name.startswith("random:"):
            adapter = _random_adapter(name, base)
            digest = hashlib.sha256(name.encode()).hexdigest()
        else:
            path = adapter_path(name)
            adapter = read_adapter(path)
            digest = sha256_of_folder(path) if path.is_dir() else sha256_of_file(path)
        chosen = adapter.config.strength if strength is None else strength
        beside = _beside(name, adapter, components(), chosen, digest) if adapter.components else {}
        bound.append(BoundAdapter(name, adapter, _bind(adapter, base), chosen, digest, beside))
    return bound


def on_component(adapters: Sequence[BoundAdapter], component: str) -> list[BoundAdapter]:
    """What of some adapters is on a component."""
    return [adapter.components[component] for adapter in adapters if component in adapter.components]


def _beside(
    name: str, adapter: Adapter, components: Mapping[str, Layers] | None, strength: float, digest: str
) -> dict[str, BoundAdapter]:
    """An adapter's parts for text encoders, bound to them."""
    if components is None:
        note = left_out(adapter.components)
        if not adapter.layers and not adapter.offsets:
            raise CheckpointError(f"{name}: nothing for the UNet or transformer inside, {note}; give a whole pipeline")
        warnings.warn(f"{name}: {note}: only the UNet or transformer is adapted here", AdapterWarning, stacklevel=3)
        return {}
    bound: dict[str, BoundAdapter] = {}
    for component, part in adapter.components.items():
        if component not in components:
            found = ", ".join(sorted(components)) or "no text encoder"
            raise CheckpointError(
                f"{name}: adapters of {len(part.layers)} layers of {component}, the base's pipeline has {found}; with "
                "--unet-only what is for text encoders is left out"
            )
        layers = components[component]
        part = replace(part, layers=as_text_names(part.layers, layers.addable() or {}), source=f"{name}: {component}")
        part = replace(part, offsets=as_text_names(part.offsets, layers.addable() or {}))
        bound[component] = BoundAdapter(name, part, _bind(part, layers), strength, digest)
    return bound


def as_text_names(named: Mapping[str, _T], known: Iterable[str]) -> dict[str, _T]:
    """Something by the names of a text encoder's modules or parameters, by those that the encoder has: transformers has
    CLIP's modules below `text_model` up to version 4, and some of them no more from 5 on.

    Raises:
        CheckpointError: a module is there by both names.
    """
    below = any(name.startswith(_TEXT_MODEL) for name in known)
    bare = {name.removeprefix(_TEXT_MODEL): value for name, value in named.items()}
    for name in named:
        if name.startswith(_TEXT_MODEL) and name.removeprefix(_TEXT_MODEL) in named:
            raise CheckpointError(f"{name} and {name.removeprefix(_TEXT_MODEL)} are one module; expected one of them")
    outside = "text_projection"  # which is below in no version
    return {
        f"{_TEXT_MODEL}{name}" if below and not name.startswith(outside) else name: value
        for name, value in bare.items()
    }


def _bind(adapter: Adapter, base: Layers) -> Mapping[str, LayerAdapter]:
    shapes = base.weight_shapes()
    try:
        return replace(adapter, components={}).bind(shapes, base.addable())  # those are bound beside it
    except CheckpointError as error:
        wanted = looks_like(widths_of(adapter.layers))
        found = looks_like({path: math.prod(shape[1:]) for path, shape in shapes.items()})
        there = "" if found is None else f", {base.name} like {found}"
        if isinstance(base, Base) and base.architecture.noun != UNet.noun:
            there = f", {base.name} is a {base.architecture.noun}"
        elif wanted == found:
            raise
        if wanted is None:
            raise
        raise CheckpointError(f"{error}\nthe adapter looks like one for {wanted}{there}") from error


def split_strength(argument: str) -> tuple[str, float | None]:
    """`PATH=0.5` → (`PATH`, 0.5); a path that exists as it stands is never split.

    Raises:
        UsageError: what follows the `=` is no finite number.
    """
    match = None if Path(argument).exists() else _STRENGTH.fullmatch(argument)
    if match is None:
        return argument, None
    try:
        strength = float(match["strength"])
    except ValueError:
        strength = math.nan
    if not math.isfinite(strength):
        raise UsageError(
            f"{argument}: strength {match['strength']!r}, expected a finite number as in {match['name']}=0.8"
        )
    return match["name"], strength


def adapter_path(name: str) -> Path:
    """The file or folder of an adapter argument.

    Raises:
        UsageError: an unknown sample adapter.
        TrexportError: nothing there.
    """
    if name.startswith("sample:"):
        sample, _, leaf = name.removeprefix("sample:").partition("/")
        folder = sample_folder(sample) / "adapters"
        known = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
        if leaf not in known:
            names = [f"sample:{sample}/{entry}" for entry in known]
            raise UsageError(f"{name}: unknown adapter, expected one of {names}{nearest(name, names)}")
        return folder / leaf
    path = Path(name)
    if not path.exists():
        raise TrexportError(f"{name}: no such adapter file or folder")
    return path


_RANDOM: dict[str, tuple[int, Any]] = {
    "tlora": (
        2,
        lambda t, r: {"transform": {"type": "tensor_ring", "rank": t}, "residual": {"type": "tensor_ring", "rank": r}},
    ),
    "tlora-star": (
        2,
        lambda t, r: {"transform": {"type": "tensor_ring", "rank": t}, "residual": {"type": "low_rank", "rank": r}},
    ),
    "lora": (1, lambda r: {"residual": {"type": "low_rank", "rank": r}}),
}


def _random_adapter(name: str, base: Layers) -> Adapter:
    kind, *ranks = name.removeprefix("random:").split(":")
    if kind not in _RANDOM or len(ranks) != _RANDOM[kind][0] or not all(rank.isdigit() and int(rank) for rank in ranks):
        raise UsageError(f"{name}: expected random:tlora:2:6, random:tlora-star:2:4 or random:lora:4 (kind and ranks)")
    spec = AdapterSpec.from_dict(_RANDOM[kind][1](*map(int, ranks)))
    pattern = re.compile(PRESETS["attention"])
    layers: dict[str, LayerParts] = {}
    for path, shape in base.weight_shapes().items():
        if not pattern.fullmatch(path):
            continue
        rows, columns = shape
        # a layer at a time, so that it depends on nothing but the names
        digest = hashlib.sha256(f"{name} {path}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))
        layer = LayerAdapter.from_spec(spec, columns, rows, generator)
        for parameter in layer.parameters():
            # as far from the start as training takes an adapter: a change of some percent of the weight
            parameter.data += torch.randn(parameter.shape, generator=generator) * 0.02
        layers[path] = LayerParts.of(layer)
    if not layers:
        raise UsageError(f"{name}: {base.name} has no attention projections to adapt")
    return Adapter(AdapterConfig(default=spec), layers, name)
