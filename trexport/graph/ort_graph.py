"""An exported graph as ONNX Runtime's CUDA provider runs it fastest: with the provider's own fused operators."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import final

import onnx
import onnx_ir as ir
import torch
from google.protobuf.message import DecodeError
from onnx_ir.passes.common import ShapeInferencePass

from trexport.errors import ArtifactError, UsageError
from trexport.graph.passes.bias_add import bias_add
from trexport.graph.passes.bias_split_gelu import bias_split_gelu
from trexport.graph.passes.group_norm import group_norm
from trexport.graph.passes.joined_products import joined_products
from trexport.graph.passes.layer_norm import layer_norm
from trexport.graph.passes.multi_head_attention import multi_head_attention
from trexport.graph.passes.neutral import neutral
from trexport.graph.passes.nhwc_conv import nhwc_conv
from trexport.graph.passes.pointwise import pointwise
from trexport.graph.passes.skip_group_norm import skip_group_norm
from trexport.graph.passes.skip_layer_norm import skip_layer_norm
from trexport.graph.passes.transposes import transposes

PASSES: Mapping[str, Callable[[ir.Model], int]] = {
    "neutral": neutral,
    "joined_products": joined_products,
    "multi_head_attention": multi_head_attention,
    "bias_split_gelu": bias_split_gelu,
    "skip_layer_norm": skip_layer_norm,
    "bias_add": bias_add,  # after skip_layer_norm, which takes biases too
    "group_norm": group_norm,
    "nhwc_conv": nhwc_conv,
    "transposes": transposes,
    "pointwise": pointwise,  # leaves biases for the next two
    "skip_group_norm": skip_group_norm,  # where no transposes are left between the sum and its norm
    "layer_norm": layer_norm,
}
"""By name, in the order in which they run."""


UNREPEATABLE = ("group_norm", "skip_group_norm")
"""Into operators whose CUDA kernels add with atomics: two runs on the same inputs differ in some last bits of each."""


def usual_passes() -> tuple[str, ...]:
    """All of them; where `torch.use_deterministic_algorithms` is set, those after which two runs give the same bits."""
    deterministic = torch.are_deterministic_algorithms_enabled()
    return tuple(name for name in PASSES if not (deterministic and name in UNREPEATABLE))


@final
@dataclass(frozen=True)
class OrtGraph:
    """A graph made for ONNX Runtime's CUDA provider."""

    model: bytes
    """Serialised; its weights lie where the exported model has them."""
    replaced: Mapping[str, int]
    """Pass → how many places in the graph it has rewritten."""

    def __str__(self) -> str:
        return ", ".join(f"{name} {count}" for name, count in self.replaced.items())


def ort_graph(path: Path, passes: Sequence[str] = tuple(PASSES), graph: bytes | None = None) -> OrtGraph:
    """The graph of an exported model rewritten by `passes`, in the order of `PASSES`. Initialisers are unchanged and stay
    where they are. All forms: weights and cores that are inputs stay inputs.

    Args:
        graph: to take in the place of the file's.

    Raises:
        ArtifactError: the file is no ONNX model.
        UsageError: an unknown pass.
    """
    unknown = [name for name in passes if name not in PASSES]
    if unknown:
        raise UsageError(f"unknown passes {unknown}, expected some of {list(PASSES)}")
    try:
        model = ir.load(path) if graph is None else ir.from_proto(onnx.load_from_string(graph))
    except DecodeError as error:
        raise ArtifactError(f"{path}: no ONNX model ({error})") from error
    ir.external_data.set_base_dir(model.graph, path.parent)
    ShapeInferencePass()(model)  # torch's exporter leaves some values without a shape
    replaced = {name: run(model) for name, run in PASSES.items() if name in passes}
    return OrtGraph(ir.serde.serialize_model(model).SerializeToString(), replaced)
