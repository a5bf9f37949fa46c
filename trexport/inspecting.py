"""`trexport inspect`: what is this file or folder? Recognised from its content, never from its name."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, final

import safetensors

from trexport.adapter_file import factored_of, swappable_of
from trexport.artifact import Artifact, open_artifact
from trexport.backends import engine_backend_of
from trexport.errors import TrexportError
from trexport.formats import is_adapter, looks_like, method_of, ranks_of, read_adapter, widths_of
from trexport.formats.content import is_adapter_file
from trexport.graph.check import load_graph, spec_of_graph
from trexport.hashing import sha256_of_file, sha256_of_folder
from trexport.manifest import MANIFEST_NAME
from trexport.models.adapters import adapter_path
from trexport.models.architectures import FOLDERS, class_of
from trexport.models.base import open_base
from trexport.progress import SILENT, Progress
from trexport.restoring import restored_adapter
from trlora import Adapter
from trlora.checkpoint import CONFIG_NAME, WEIGHTS_NAME


@final
@dataclass(frozen=True)
class Inspection:
    """What was found: facts, and a table for what there are many of."""

    path: str
    kind: str
    facts: dict[str, Any]
    columns: Sequence[str] = ()
    rows: Sequence[Sequence[Any]] = field(default=(), repr=False)

    def to_dict(self) -> dict[str, Any]:
        table = [dict(zip(self.columns, row, strict=True)) for row in self.rows]
        return {"path": self.path, "kind": self.kind} | self.facts | {"table": table}


def inspect(name: str, *, progress: Progress = SILENT) -> Inspection:
    """Recognise and describe an adapter, a base model or pipeline, an ONNX model, or an artifact of trexport.

    Args:
        name: a path, or a `sample:` or `random:` name.

    Raises:
        TrexportError: nothing there, or nothing that is known.
        CheckpointError, BaseError, ArtifactError: known, but damaged.
    """
    if name.startswith("sample:") and "/" in name:
        return _adapter(name, adapter_path(name))
    if name.startswith(("sample:", "random:")):
        return _unet(name, progress)
    path = Path(name)
    if not path.exists():
        raise TrexportError(f"{name}: no such file or folder")
    if path.is_dir():
        return _folder(name, path, progress)
    with path.open("rb") as stream:
        head = stream.read(16)
    if _is_safetensors(path):
        return _safetensors(name, path)
    if is_adapter_file(path):
        return _described(name, path, restored_adapter(path))
    if head[:1] == b"\x08":  # the first field of an ONNX ModelProto, ir_version
        return _onnx(name, path)
    if path.suffix == ".safetensors":
        return _adapter(name, path)  # damaged: its reader says how
    raise TrexportError(f"{name}: neither safetensors nor ONNX, and nothing else is read")


def _folder(name: str, path: Path, progress: Progress) -> Inspection:
    if (path / MANIFEST_NAME).is_file():
        return _artifact(name, path, progress)
    alone = len(list(path.glob("*.safetensors"))) == 1 and not (path / "config.json").is_file()
    if (path / CONFIG_NAME).is_file() or (path / WEIGHTS_NAME).is_file() or (alone and is_adapter(path)):
        return _adapter(name, path)
    for model in (*(path / folder / "model.onnx" for folder in FOLDERS), path / "model.onnx"):
        if model.is_file():
            return _onnx(name, model)
    return _unet(name, progress)


def _adapter(name: str, path: Path) -> Inspection:
    return _described(name, path, read_adapter(path))


def _described(name: str, path: Path, adapter: Adapter) -> Inspection:
    config = adapter.config
    facts = {
        "format": adapter.format,
        "method": method_of(adapter),
        "ranks": ranks_of(adapter),
        "default": config.default.to_dict(),
        "overrides": len(config.overrides),
        "strength": config.strength,
        "layers": len(adapter.layers),
        "offsets": len(adapter.offsets),
        "parameters": adapter.parameters,
        "dtype": sorted({str(tensor.dtype).removeprefix("torch.") for tensor in adapter.tensors().values()}),
        "base_model": config.base_model.to_dict(),
        "looks_like": looks_like(widths_of(adapter.layers)),
        "components": {name: len(part.layers) + len(part.offsets) for name, part in adapter.components.items()},
        "carried": _carried(adapter),
        "sha256": sha256_of_folder(path) if path.is_dir() else sha256_of_file(path),
    }
    rows = []
    for layer, parts in adapter.layers.items():
        tensors = [tensor for part in parts.members.values() for tensor in part.parameters()]
        shapes = " ".join("×".join(map(str, tensor.shape)) for tensor in tensors)
        inputs, outputs = ("any" if n is None else n for n in (parts.in_features, parts.out_features))
        rows.append((layer, f"{inputs} → {outputs}", sum(t.numel() for t in tensors), shapes))
    rows += [(name, "offset", tensor.numel(), str(len(tensor))) for name, tensor in adapter.offsets.items()]
    return Inspection(name, "adapter", facts, ("layer", "features", "parameters", "tensors"), rows)


def _carried(adapter: Adapter) -> dict[str, str]:
    """Form → whether an adapter can be in it, and why not."""
    if adapter.components:
        beside = f"what is for {', '.join(sorted(adapter.components))}"
        own = _carried(replace(adapter, components={}))
        if not adapter.layers and not adapter.offsets:
            own = dict.fromkeys(own, "no: all of it is for text encoders") | {"merged": "yes"}
        merged = f"{own['merged']}, {beside} with a whole pipeline"
        return {form: said if said.startswith("no") else f"{said}, without {beside}" for form, said in own.items()} | {
            "merged": merged
        }
    biases = sum(parts.magnitude is not None and parts.magnitude.scales_bias for parts in adapter.layers.values())
    if adapter.offsets:
        no = f"no: {len(adapter.offsets)} biases and weights of normalisations change"
        return {"merged": "yes", "factored": no, "swappable": no}
    return {
        "merged": "yes",
        "factored": "yes",
        "swappable": f"no: the biases of {biases} layers change, where they have one" if biases else "yes",
    }


def _unet(name: str, progress: Progress) -> Inspection:
    base = open_base(name)
    entries = [entry for file in base.weights for entry in file.entries]
    dtypes = Counter(entry.dtype for entry in entries)
    facts = {
        "class": class_of(base.config),
        "parameters": sum(entry.size_bytes // _item(entry.dtype) for entry in entries),
        "size_bytes": base.size_bytes,
        "dtypes": dict(dtypes),
        "files": [file.name for file in base.weights],
        "sample_size": base.config.get("sample_size"),
        "cross_attention_dim": base.config.get("cross_attention_dim"),
        "block_out_channels": base.config.get("block_out_channels"),
        "linear_layers": sum(len(shape) == 2 for shape in base.weight_shapes().values()),
        "content_hash": base.content_hash(progress),
    }
    rows = [(entry.name, entry.dtype, "×".join(map(str, entry.shape)), entry.size_bytes) for entry in entries]
    return Inspection(name, base.architecture.noun, facts, ("tensor", "dtype", "shape", "bytes"), rows)


def _item(dtype: str) -> int:
    from trexport.models.weights import TORCH_DTYPES

    return TORCH_DTYPES[dtype].itemsize


def _artifact(name: str, path: Path, progress: Progress) -> Inspection:
    artifact = open_artifact(path, progress=progress)
    facts = artifact.manifest.to_dict()
    if artifact.manifest.kind == "engine":
        return _engine(name, artifact)
    kind = {"dense": f"merged {facts['io']['model']} of trexport", "onnx": "ONNX artifact of trexport"}[facts["kind"]]
    io = [*artifact.manifest.io.inputs, *artifact.manifest.io.outputs]
    rows = [(tensor.name, tensor.dtype, str(list(tensor.axes))) for tensor in io]
    del facts["kind"], facts["io"], facts["factored"], facts["swappable"]
    facts["components"] = {n: {k: v for k, v in c.items() if k != "io"} for n, c in facts["components"].items()}
    for part, record in artifact.manifest.components.items():
        tensors = [*record.io.inputs, *record.io.outputs]
        rows += [(f"{part}: {tensor.name}", tensor.dtype, str(list(tensor.axes))) for tensor in tensors]
    if artifact.manifest.swappable is not None:
        swappable = swappable_of(artifact)
        sizes = {name: tensor.nbytes for name, tensor in swappable.slot.neutral().items()}
        facts |= {"blank": swappable.blank, "adapted_layers": len(swappable.slot.layers)}
        facts |= {"adapter_bytes": sum(sizes.values())}
        columns = ("input or output; adapted layer", "dtype; members", "axes; shapes")
        rows += [
            (
                path,
                layer.signature(),
                " ".join("×".join(map(str, s)) for op in layer.parts.values() for s in op.shapes.values()),
            )
            for path, layer in swappable.slot.layers.items()
        ]
        return Inspection(name, "swappable ONNX artifact of trexport", facts | {"verified": True}, columns, rows)
    if artifact.manifest.factored is not None:
        factored = factored_of(artifact)
        paths = Counter(layer.path for layer in factored.plan.values())
        facts |= {"slots": len(factored.slots), "bank": factored.bank, "blank": factored.blank}
        facts |= {"adapted_layers": len(factored.plan)}
        facts |= {"plan": dict(paths), "plan_for": factored.plan_for, "optimum": dict(factored.optimum)}
        columns = ("input or output; adapted layer", "dtype; path, tokens", "axes; cost of each path, ms")
        rows += [
            (path, f"{layer.path}, {layer.tokens}", ", ".join(f"{k} {v:.3f}" for k, v in layer.cost_ms.items()))
            for path, layer in factored.plan.items()
        ]
        return Inspection(name, "factored ONNX artifact of trexport", facts | {"verified": True}, columns, rows)
    return Inspection(name, kind, facts | {"verified": True}, ("input or output", "dtype", "axes"), rows)


def _engine(name: str, artifact: Artifact) -> Inspection:
    """From its record alone: an engine may be for a machine that this is not."""
    manifest, record = artifact.manifest, artifact.engine_record
    ok, why = engine_backend_of(record.backend).loads_here(record)
    facts = {
        "backend": record.backend,
        "loads_here": ok,
        "why": why,
        "form": manifest.form,
        "dtype": manifest.dtype,
        "targets": list(record.targets),
        "profiles (batch x height x width x tokens)": [str(profile) for profile in record.profiles],
        "runtime": dict(record.runtime),
        "settings": dict(record.settings),
        "size_bytes": (artifact.folder / record.file).stat().st_size,
        "adapted_layers": len(record.layers),
        "base": vars(manifest.base),
        "adapters": [vars(adapter) for adapter in manifest.adapters],
        "files": dict(manifest.files),
        "versions": dict(manifest.versions),
        "verified": True,
    }
    rows = [
        (tensor.name, tensor.dtype, " ".join("x".join(map(str, shape)) for shape in profile.shapes(tensor)))
        for profile in record.profiles
        for tensor in manifest.io.inputs
    ]
    columns = ("input", "dtype", "least, usual and greatest shape")
    return Inspection(name, f"{manifest.form} engine of trexport", facts, columns, rows)


def _onnx(name: str, path: Path) -> Inspection:
    model = load_graph(path)
    operators = Counter(f"{node.domain}::{node.op_type}" if node.domain else node.op_type for node in model.graph.node)
    spec = spec_of_graph(model)
    facts = {
        "ir_version": model.ir_version,
        "opsets": {entry.domain or "ai.onnx": entry.version for entry in model.opset_import},
        "producer": f"{model.producer_name} {model.producer_version}".strip(),
        "nodes": len(model.graph.node),
        "initializers": len(model.graph.initializer),
        "functions": len(model.functions),
        "inputs": {tensor.name: [tensor.dtype, list(tensor.axes)] for tensor in spec.inputs},
        "outputs": {tensor.name: [tensor.dtype, list(tensor.axes)] for tensor in spec.outputs},
        "sha256": sha256_of_file(path),
    }
    return Inspection(name, "onnx", facts, ("operator", "nodes"), operators.most_common())


def _safetensors(name: str, path: Path) -> Inspection:
    with safetensors.safe_open(path, framework="pt") as reader:
        metadata = reader.metadata() or {}
        keys = list(reader.keys())
        shapes = {key: reader.get_slice(key).get_shape() for key in keys}
        dtypes = {key: reader.get_slice(key).get_dtype() for key in keys}
    if is_adapter(path):
        return _adapter(name, path)
    facts = {"tensors": len(keys), "metadata": metadata, "sha256": sha256_of_file(path)}
    rows = [(key, dtypes[key], "×".join(map(str, shapes[key]))) for key in keys]
    return Inspection(name, "safetensors, no adapter that is known", facts, ("tensor", "dtype", "shape"), rows)


def _is_safetensors(path: Path) -> bool:
    try:
        with safetensors.safe_open(path, framework="pt"):
            return True
    except safetensors.SafetensorError:
        return False
