"""`trexport merge`: adapters folded into a dense model, streamed weight by weight."""

from __future__ import annotations

import json
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
from trexport.disk import check_disk
from trexport.errors import TrexportError, UsageError
from trexport.hashing import hash_of_bytes, hash_of_tensors, sha256_of_file
from trexport.io_spec import Dtype
from trexport.manifest import BaseRecord, Manifest, package_versions
from trexport.models.adapters import BoundAdapter
from trexport.models.base import Base
from trexport.models.model import layers_of
from trexport.models.weights import SHORT_DTYPES, TORCH_DTYPES, Entry, WeightFile
from trexport.models.writer import SafetensorsWriter, bytes_of
from trexport.progress import SILENT, Progress
from trlora import LayerAdapter, LayerMerge, MergeReport, adapted_bias, merge_layer
from trlora.files import atomic_folder, check_free

_AHEAD = 32
"""Tensors computed or hashed ahead of the writing: bounds the memory (by some 200 MB in Stable Diffusion 1.5), and keeps
every core busy where small tensors follow large ones."""


@final
@dataclass(frozen=True)
class MergePlan:
    """What a merge is going to do."""

    out: Path
    tensors: int
    adapted: int
    size_bytes: int


def plan_merge(
    base: Base, adapters: Sequence[BoundAdapter], out: Path, dtype: Dtype | None = None, *, overwrite: bool = False
) -> MergePlan:
    """What `merge` would do, nothing written. Raises what `merge` would raise before it writes."""
    if not adapters:
        raise UsageError("no adapter given, there is nothing to merge")
    check_free(out, overwrite=overwrite)
    entries = [entry for file in base.weights for entry in _target_entries(file, dtype)]
    size_bytes = sum(entry.size_bytes for entry in entries)
    check_disk(out, size_bytes)
    return MergePlan(out, len(entries), len(layers_of(adapters)), size_bytes)


def merge(
    base: Base,
    adapters: Sequence[BoundAdapter],
    out: Path,
    *,
    dtype: Dtype | None = None,
    overwrite: bool = False,
    progress: Progress = SILENT,
) -> MergeReport:
    """Write a model's folder that its class's `from_pretrained` loads, with the adapters in its weights.

    Every weight is computed in float32 and cast once. File names, shards, the order of the tensors and (unless `dtype`
    is given) their dtypes stay the base's; the same inputs give the same bytes.

    Raises:
        FileExistsError: `out` holds something and `overwrite` is not set.
        UsageError: no adapter given.
        TrexportError: less free disk than the result needs.
        OSError: the disk filled up all the same. Nothing is left then.
    """
    plan = plan_merge(base, adapters, out, dtype, overwrite=overwrite)
    chosen = dtype or _dtype_of(base)
    layers = layers_of(adapters)
    records: list[LayerMerge] = []
    with (
        atomic_folder(out, overwrite=overwrite) as folder,
        _Hashes() as source_hashes,
        _Hashes() as result_hashes,
        progress.task("merge", plan.size_bytes) as task,
    ):
        for file in base.weights:
            entries = _target_entries(file, dtype)
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
        config = {key: value for key, value in base.config.items() if key != "_name_or_path"}
        _write_json(folder / "config.json", config)
        if base.index is not None:
            places = {key: base.plain_name(name) for key, name in base.index["weight_map"].items()}
            index = f"{base.architecture.stem}.safetensors.index.json"
            _write_json(folder / index, {"metadata": {"total_size": plan.size_bytes}, "weight_map": places})
        others = [path for path in sorted(folder.iterdir()) if path.suffix == ".json"]
        Manifest(
            kind="dense",
            form="merged",
            dtype=chosen,
            io=base.architecture.spec(chosen),
            base=BaseRecord(base.name, source_hashes.total()),
            adapters=tuple(adapter.record() for adapter in adapters),
            files={path.name: sha256_of_file(path) for path in others},
            weights_hash=result_hashes.total(),
            versions=package_versions(),
        ).write(folder)
    return MergeReport(tuple(records))


def _target_entries(file: WeightFile, dtype: Dtype | None) -> list[Entry]:
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


def _dtype_of(base: Base) -> Dtype:
    """The dtype of most of the base's bytes."""
    sizes: dict[str, int] = {}
    for file in base.weights:
        for entry in file.entries:
            sizes[entry.dtype] = sizes.get(entry.dtype, 0) + entry.size_bytes
    name = max(sizes, key=lambda key: sizes[key])
    short: dict[str, Dtype] = {full: dtype for dtype, full in SHORT_DTYPES.items()}
    if name not in short:
        raise TrexportError(f"{base.name}: weights in {name}, expected F32, F16 or BF16; pass --dtype")
    return short[name]


def _write_json(path: Path, fields: dict[str, Any]) -> None:
    path.write_text(json.dumps(fields, indent=2, sort_keys=True) + "\n", encoding="utf-8")
