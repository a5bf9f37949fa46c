"""Adapters folded into the weights of a model, streamed from file to file, weight by weight."""

from __future__ import annotations

import json
import re
from collections import deque
from collections.abc import Generator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self, final

import torch
from torch import Tensor

from trexport.cores import single_threaded_torch
from trexport.hashing import hash_of_bytes, hash_of_tensors
from trexport.io_spec import Dtype
from trexport.models.adapters import BoundAdapter
from trexport.models.base import Base
from trexport.models.model import layers_of, offsets_of, with_offsets
from trexport.models.weights import SHORT_DTYPES, TORCH_DTYPES, Entry, WeightFile
from trexport.models.writer import SafetensorsWriter, bytes_of
from trexport.progress import SILENT, Progress
from trlora import LayerAdapter, LayerMerge, MergeReport, adapted_bias, merge_layer

_AHEAD = 32
"""Tensors computed or hashed ahead of the writing: bounds the memory (by some 200 MB in Stable Diffusion 1.5), and keeps
every core busy where small tensors follow large ones."""

_SHARD = re.compile(r"-\d+-of-\d+\.safetensors$")


@final
@dataclass(frozen=True)
class Written:
    """Weights that were written."""

    report: MergeReport
    dtype: Dtype
    source_hash: str
    """Of what they were before, as `BaseRecord.content_hash`."""
    result_hash: str


def write_weights(
    base: Base,
    adapters: Sequence[BoundAdapter],
    folder: Path,
    dtype: Dtype | None = None,
    *,
    progress: Progress = SILENT,
) -> Written:
    """Write the weight files of a model with adapters in them, of the same names, shards and order, into a folder that is
    there, and their index.

    Args:
        dtype: None keeps that of every tensor.
    """
    chosen = dtype or base.dtype
    layers, offsets = layers_of(adapters), offsets_of(adapters)
    records: list[LayerMerge] = []
    total = sum(entry.size_bytes for file in base.weights for entry in target_entries(file, dtype))
    with (
        _Hashes() as source_hashes,
        _Hashes() as result_hashes,
        progress.task("merge", total) as task,
    ):
        for file in base.weights:
            entries = target_entries(file, dtype)
            with (
                SafetensorsWriter(folder / base.plain_name(file.name), entries, file.metadata) as writer,
                closing(_merged_ahead(file, layers)) as merged,
            ):
                for source, target in zip(file.entries, entries, strict=True):
                    tensor = file.tensor(source.name)
                    digest = source_hashes.add(source, tensor)
                    if _layer_of(source.name) in layers:
                        tensor, record = next(merged)
                        records.append(record)
                        digest = None
                    elif source.name.endswith(".bias"):
                        scaled = _merged_bias(tensor, layers.get(source.name.removesuffix(".bias"), []))
                        tensor, digest = (tensor, digest) if scaled is None else (scaled, None)
                    if source.name in offsets:
                        tensor, digest = with_offsets(tensor.float(), offsets[source.name]), None
                    if tensor.dtype != TORCH_DTYPES[target.dtype]:
                        tensor = tensor.to(TORCH_DTYPES[target.dtype])
                        digest = None
                    result_hashes.add(target, tensor, digest)
                    place = file.place(source.name)
                    if digest is None or place is None:
                        writer.write(tensor)
                    else:
                        writer.copy(place, source.size_bytes)
                    task.advance(target.size_bytes)
        write_index(base, folder, total)
        return Written(MergeReport(tuple(records)), chosen, source_hashes.total(), result_hashes.total())


def write_index(base: Base, folder: Path, size_bytes: int) -> None:
    """Write the shard index of weights that lie in a folder under their plain names; nothing where they are in one file."""
    if base.index is None:
        return
    places = {key: base.plain_name(name) for key, name in base.index["weight_map"].items()}
    stem = _SHARD.sub("", next(iter(places.values())))
    index = {"metadata": {"total_size": size_bytes}, "weight_map": places}
    write_json(folder / f"{stem}.safetensors.index.json", index)


def target_entries(file: WeightFile, dtype: Dtype | None) -> list[Entry]:
    """The file's entries with the dtype they will be written in; integers keep theirs."""
    if dtype is None:
        return list(file.entries)
    floating = {name for name, kind in TORCH_DTYPES.items() if kind.is_floating_point}
    return [replace(entry, dtype=SHORT_DTYPES[dtype]) if entry.dtype in floating else entry for entry in file.entries]


def _layer_of(name: str) -> str:
    """The module path of a weight's name; something no module is called for any other parameter."""
    return name.removesuffix(".weight") if name.endswith(".weight") else ""


def _merged_bias(bias: Tensor, adapters: list[tuple[LayerAdapter, float]]) -> Tensor | None:
    """The bias with adapters, in float32; None where none scales it."""
    wide = bias.float()
    with torch.no_grad():
        merged = adapted_bias(wide, adapters)
    return None if merged is wide else merged


def _merged_ahead(
    file: WeightFile, layers: Mapping[str, list[tuple[LayerAdapter, float]]]
) -> Generator[tuple[Tensor, LayerMerge]]:
    """The merged weights of a file in its order, computed on another thread a few ahead of who takes them."""
    paths = iter([path for path in map(_layer_of, (entry.name for entry in file.entries)) if path in layers])
    # a layer a thread: torch's own threads would wait for each other, spinning on the cores that write and hash
    with single_threaded_torch() as threads, ThreadPoolExecutor(max(1, threads - 1)) as pool:
        pending: deque[Future[tuple[Tensor, LayerMerge]]] = deque()

        def submit() -> None:
            path = next(paths, None)
            if path is not None:
                pending.append(pool.submit(lambda: merge_layer(path, file.tensor(f"{path}.weight"), layers[path])))

        for _ in range(_AHEAD + max(1, threads - 1)):
            submit()
        try:
            while pending:
                result = pending.popleft().result()
                submit()
                yield result
        finally:
            for future in pending:
                future.cancel()


@final
class _Hashes:
    """The hashes of tensors, computed on a thread of their own: hashing releases the interpreter's lock."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(1)
        self._found: dict[str, tuple[Entry, Future[str]]] = {}
        self._pending: deque[Future[str]] = deque()

    def add(self, entry: Entry, tensor: Tensor, known: Future[str] | None = None) -> Future[str]:
        """Hash a tensor, unless its hash is `known` already (or will be)."""
        future = known or self._pool.submit(lambda: hash_of_bytes(bytes_of(tensor)))
        self._found[entry.name] = (entry, future)
        self._pending.append(future)
        if len(self._pending) > _AHEAD:  # a waiting tensor is held in memory
            self._pending.popleft().result()
        return future

    def total(self) -> str:
        """The hash of all of them, see `hash_of_tensors`."""
        items = self._found.items()
        return hash_of_tensors({name: (future.result(), e.dtype, e.shape) for name, (e, future) in items})

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *details: object) -> None:
        self._pool.shutdown(cancel_futures=True)


def write_json(path: Path, fields: dict[str, Any]) -> None:
    path.write_text(json.dumps(fields, indent=2, sort_keys=True) + "\n", encoding="utf-8")
