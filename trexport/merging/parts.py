"""What a merge takes over of a pipeline: every component that its index lists, whether an export knows its class or not."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

from trexport.merging.weights import write_index
from trexport.models.base import Base
from trexport.models.pipeline import INDEX_FILE, TOLD_SUFFIXES, Pipeline, fetch_listed, weights_of_component

_MODEL = "config.json"
_NO_MODELS = ("tokenizer_config.json", "scheduler_config.json", "preprocessor_config.json", "processor_config.json")
"""What tells a tokenizer, a scheduler or a processor from a model, also where a `config.json` lies beside it."""
_PICKLES = (".bin", ".pt", ".ckpt")


@final
@dataclass(frozen=True)
class Part:
    """A component beside what denoises."""

    files: Sequence[Path]
    """That are taken over as they are: configs, vocabularies."""
    weights: Base | None
    """In the variant that is asked for; None of a component that has none."""

    @property
    def files_bytes(self) -> int:
        """What the files weigh."""
        return sum(file.stat().st_size for file in self.files)

    @property
    def size_bytes(self) -> int:
        """What all of it weighs."""
        return self.files_bytes + (0 if self.weights is None else self.weights.size_bytes)

    def copy(self, folder: Path) -> None:
        """Write the component into a folder that is there, under the names that `from_pretrained` looks for when it is not
        told of a variant."""
        self.copy_files(folder)
        if self.weights is None or self.weights.folder is None:
            return
        for file in self.weights.weights:
            shutil.copyfile(self.weights.folder / file.name, folder / self.weights.plain_name(file.name))
        write_index(self.weights, folder, self.weights.size_bytes)

    def copy_files(self, folder: Path) -> None:
        """Write all but the weights and their index."""
        for file in self.files:
            shutil.copyfile(file, folder / file.name)


def parts_of(base: Base, pipeline: Pipeline) -> tuple[dict[str, Part], dict[str, str]]:
    """The components of a pipeline beside what denoises, and name → class of those that cannot be taken over: they are not
    there, or their weights are pickles. Fetches what is missing of a Hub id.

    Raises:
        BaseError: weights that cannot be read, or that are there in another variant only.
    """
    listed = {name: kind for name, kind in _classes(read_index(pipeline)).items() if name != base.architecture.folder}
    fetch_listed(base, pipeline, listed)
    known = {component.source.folder: component.source for component in pipeline.components.values()}
    parts: dict[str, Part] = {}
    for name in listed:
        folder = pipeline.folder / name
        weights = known.get(folder) or weights_of_component(base, folder)
        files = [
            path for path in sorted(folder.glob("*")) if path.suffix in TOLD_SUFFIXES and ".index." not in path.name
        ]
        if weights is not None or (files and not _lacks_weights(folder)):
            parts[name] = Part(files, weights)
    return parts, {name: kind for name, kind in listed.items() if name not in parts}


def read_index(pipeline: Pipeline) -> dict[str, Any]:
    """The whole `model_index.json`."""
    return json.loads((pipeline.folder / INDEX_FILE).read_bytes())


def _classes(index: Mapping[str, Any]) -> dict[str, str]:
    return {name: value[1] for name, value in index.items() if isinstance(value, list) and value[1]}


def _lacks_weights(folder: Path) -> bool:
    """Whether a folder without safetensors should have some: it holds pickles, or the config of a model."""
    names = {path.name for path in folder.glob("*")}
    pickles = any(name.endswith(_PICKLES) for name in names)
    return pickles or (_MODEL in names and not names & set(_NO_MODELS))
