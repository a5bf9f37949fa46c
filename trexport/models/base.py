"""BASE on the command line: where a model comes from."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property
from importlib.resources import files
from pathlib import Path
from typing import Any, final

from trexport.errors import BaseError, UsageError
from trexport.hashing import hash_of_bytes, hash_of_tensors
from trexport.io_spec import Dtype
from trexport.models.architectures import ARCHITECTURES, RANDOM, Architecture, architecture_of, class_of
from trexport.models.weights import SHORT_DTYPES, Entry, RandomWeights, SafetensorsFile, WeightFile
from trexport.models.writer import bytes_of
from trexport.progress import SILENT, Progress
from trlora.errors import nearest

WEIGHTS_STEM = "diffusion_pytorch_model"

INDEX_NAME = f"{WEIGHTS_STEM}.safetensors.index.json"
_DENOISERS = tuple(dict.fromkeys(kind.folder for kind in ARCHITECTURES.values() if kind.sampling is not None))


@final
@dataclass(frozen=True)
class Base:
    """A model before it is one in memory: its config and its weights on demand."""

    name: str
    """As it was given."""
    config: Mapping[str, Any]
    weights: Sequence[WeightFile]
    folder: Path | None = None
    """The pipeline's folder, or the model's own where there is no pipeline; None for `random:`."""
    index: Mapping[str, Any] | None = field(default=None, repr=False)
    """The shard index, where the weights are sharded."""
    variant: str | None = None
    """The infix of the weight files' names, for instance `fp16`."""

    @cached_property
    def architecture(self) -> Architecture:
        """What follows from the config."""
        return architecture_of(self.config, list(self.shapes()))

    def plain_name(self, name: str) -> str:
        """A weight file's name without the variant: what `from_pretrained` looks for when it is not told of one."""
        return name.replace(f".{self.variant}", "", 1) if self.variant else name

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Every parameter and its shape."""
        return {entry.name: entry.shape for file in self.weights for entry in file.entries}

    def weight_shapes(self) -> dict[str, tuple[int, ...]]:
        """The weights of linear layers, (out, in), and of convolutions, (out, in/groups, height, width), by module path."""
        is_layer = self.architecture.is_layer
        return {
            path: shape
            for path, shape in (
                (n.removesuffix(".weight"), s) for n, s in self.shapes().items() if n.endswith(".weight")
            )
            if len(shape) in (2, 4) and is_layer(path)
        }

    def addable(self) -> dict[str, tuple[int, ...]]:
        """Every parameter: a merge adds to any."""
        return self.shapes()

    @property
    def size_bytes(self) -> int:
        return sum(entry.size_bytes for file in self.weights for entry in file.entries)

    @property
    def dtype(self) -> Dtype:
        """The dtype of most of its bytes.

        Raises:
            BaseError: it is none of float32, float16 and bfloat16.
        """
        sizes: dict[str, int] = {}
        for file in self.weights:
            for entry in file.entries:
                sizes[entry.dtype] = sizes.get(entry.dtype, 0) + entry.size_bytes
        name = max(sizes, key=lambda key: sizes[key])
        short: dict[str, Dtype] = {full: dtype for dtype, full in SHORT_DTYPES.items()}
        if name not in short:
            raise BaseError(f"{self.name}: weights in {name}, expected F32, F16 or BF16; pass --dtype")
        return short[name]

    def content_hash(self, progress: Progress = SILENT) -> str:
        """The content hash of the weights, see `trexport.hashing.hash_of_tensors`: reads all of them."""
        digests: dict[str, tuple[str, str, tuple[int, ...]]] = {}
        with progress.task("hash", self.size_bytes) as task, ThreadPoolExecutor(2) as pool:

            def digest(file: WeightFile, entry: Entry) -> None:
                found = hash_of_bytes(bytes_of(file.tensor(entry.name)))
                digests[entry.name] = (found, entry.dtype, entry.shape)
                task.advance(entry.size_bytes)

            for future in [pool.submit(digest, file, entry) for file in self.weights for entry in file.entries]:
                future.result()
        return hash_of_tensors(digests)


def open_base(name: str, *, revision: str | None = None, variant: str | None = None) -> Base:
    """Open a BASE: a diffusers pipeline's folder (its UNet or transformer is meant) or one model's own, a Hub id,
    `random:NAME`, or `sample:digits`.

    Args:
        revision: branch, tag or commit of a Hub id.
        variant: of the weight files, for instance `fp16`.

    Raises:
        UsageError: an unknown `random:` or `sample:` name.
        BaseError: nothing there, no weights, or weights that cannot be read.
    """
    scheme, _, rest = name.partition(":")
    if scheme == "random" and rest:
        return _random(name, rest)
    if scheme == "sample" and rest:
        return _folder(name, sample_folder(rest), variant)
    path = Path(name)
    if path.exists():
        return _folder(name, path, variant)
    if looks_like_hub_id(name):
        return _folder(name, _download(name, revision, variant), variant)
    raise BaseError(
        f"{name}: no such folder; expected a diffusers folder, a Hub id (owner/name), "
        f"random:{{{','.join(RANDOM)}}} or sample:digits"
    )


def sample_folder(name: str) -> Path:
    """The folder of a sample that ships in the package.

    Raises:
        UsageError: an unknown sample.
    """
    root = Path(str(files("trexport.models") / "samples"))
    known = sorted(path.name for path in root.iterdir() if path.is_dir()) if root.is_dir() else []
    if name not in known:
        raise UsageError(f"sample:{name}: unknown sample, expected one of {known}{nearest(name, known)}")
    return root / name


def _random(name: str, architecture: str) -> Base:
    if architecture not in RANDOM:
        known = list(RANDOM)
        raise UsageError(f"{name}: unknown architecture, expected one of {known}{nearest(architecture, known)}")
    from trexport.models.model import empty_model

    kind = architecture_of(RANDOM[architecture])
    model = empty_model(kind)
    shapes = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    return Base(name, kind.full_config(model), [RandomWeights(name, shapes, stem=kind.stem)])


def _folder(name: str, folder: Path, variant: str | None) -> Base:
    if folder.is_file():
        raise BaseError(
            f"{folder}: a file, expected a diffusers folder (with config.json, or model_index.json and unet/)"
        )
    # of a pipeline what denoises is meant; its ControlNet is opened by its own folder
    inner = next((folder / part for part in _DENOISERS if (folder / part).is_dir()), folder)
    file = inner / "config.json"
    if not file.is_file():
        raise BaseError(
            f"{folder}: no model inside, expected config.json, or that of a pipeline in {' or '.join(_DENOISERS)}"
        )
    try:
        config = json.loads(file.read_bytes())
    except ValueError as error:
        raise BaseError(f"{file}: not JSON ({error})") from error
    if not isinstance(config, dict) or class_of(config) not in ARCHITECTURES:
        found = class_of(config) if isinstance(config, dict) else None
        raise BaseError(f"{file}: the model is a {found}, expected one of {list(ARCHITECTURES)}")
    architecture = architecture_of(config)
    weights, index = weight_files(inner, variant, architecture.stem, architecture.pickle_stem)
    return Base(name, config, weights, folder, index, variant)


def weight_files(
    unet: Path, variant: str | None, stem: str = WEIGHTS_STEM, pickle_stem: str = WEIGHTS_STEM
) -> tuple[list[WeightFile], Mapping[str, Any] | None]:
    """The safetensors files of a model's folder, and their index where there are several.

    Args:
        variant: the infix of their names.
        stem: how their names begin.
        pickle_stem: how those of pickles do, which are refused by name.

    Raises:
        BaseError: none, only pickles, or files that cannot be read.
    """
    infix = f".{variant}" if variant else ""
    index_file = unet / f"{stem}.safetensors.index{infix}.json"
    single = unet / f"{stem}{infix}.safetensors"
    if single.is_file():
        return [SafetensorsFile(single)], None
    if index_file.is_file():
        try:
            index = json.loads(index_file.read_bytes())
            names = sorted(set(index["weight_map"].values()))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise BaseError(f"{index_file}: damaged shard index ({type(error).__name__}: {error})") from error
        for name in names:
            if Path(name).name != name or not (unet / name).is_file():
                raise BaseError(f"{index_file}: names the shard {name!r}, which is not in {unet}")
        shards: list[WeightFile] = [SafetensorsFile(unet / name) for name in names]
        held = {entry.name: shard.name for shard in shards for entry in shard.entries}
        for key, name in index["weight_map"].items():
            if held.get(key) != name:
                raise BaseError(f"{index_file}: says {key} is in {name}, found in {held.get(key)}")
        return shards, index
    names = {path.name for start in (stem, pickle_stem) for path in unet.glob(f"{start}*") if path.is_file()}
    others = sorted(names)
    pickles = [name for name in others if name.endswith((".bin", ".ckpt", ".pt"))]
    if pickles and len(pickles) == len(others):
        raise BaseError(
            f"{unet}: only {pickles} found, which are pickles and are not read; convert them with diffusers: "
            "from_pretrained(...).save_pretrained(..., safe_serialization=True)"
        )
    hint = f"; found {others}, choose one with --variant" if others else ""
    raise BaseError(f"{unet}: no weights, expected {single.name} or {index_file.name}{hint}")


def looks_like_hub_id(name: str) -> bool:
    """Whether a name has the form owner/name."""
    parts = name.split("/")
    return len(parts) == 2 and all(part and not part.startswith(".") for part in parts) and not name.startswith("/")


def _download(name: str, revision: str | None, variant: str | None) -> Path:
    infix = f".{variant}" if variant else ""
    wanted = [f"{WEIGHTS_STEM}{infix}.safetensors", f"{WEIGHTS_STEM}{infix}-*.safetensors", f"*.index{infix}.json"]
    patterns = ["model_index.json", "scheduler/*.json"]
    patterns += [f"{prefix}{p}" for prefix in ("", *(f"{n}/" for n in _DENOISERS)) for p in ("config.json", *wanted)]
    return download(name, revision, patterns)


def download(name: str, revision: str | None, patterns: Sequence[str]) -> Path:
    """The folder of a Hub id's files that match any of `patterns`, fetched where they are not here.

    Raises:
        BaseError: they cannot be fetched.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=list(patterns)))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise BaseError(
            f"{name}: neither a folder here nor fetched from the Hub ({type(error).__name__}: {reason}); "
            "check the name, the network, and HF_TOKEN for a gated model"
        ) from error
