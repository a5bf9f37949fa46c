"""Where does an ONNX model leave its tolerance? The first tensor that does, found by bisection.

The exporter gives a value of the ONNX graph the name of the node of the torch graph that it came from. So the torch graph
is exported anew, run in float32 with every value at hand, and the model is run with some of its inner tensors as outputs:
a few probes a round, between the last one that was good and the first that was not.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

import onnx
import torch
from torch import Tensor, fx
from torch.export import ExportedProgram
from torch.export.graph_signature import ConstantArgument

from trexport.backends.base import Device
from trexport.backends.onnxruntime import exact, open_session
from trexport.graph.check import load_graph
from trexport.graph.export import trace
from trexport.graph.passes.metadata import SCOPE_KEY
from trexport.io_spec import DTYPES as DTYPES_OF_WEIGHTS
from trexport.io_spec import ModelSpec
from trexport.models.model import DTYPES, sizes_of
from trexport.parity.metrics import relative_l2
from trexport.parity.report import FirstDeviation

_PROBES = 8


@final
@dataclass(frozen=True)
class _Probe:
    """A tensor that both graphs have."""

    name: str
    operator: str
    module: str


def first_deviation(
    model: torch.nn.Module,
    config: Mapping[str, Any],
    onnx_path: Path,
    spec: ModelSpec,
    feeds: Mapping[str, Tensor],
    tolerance: float,
    device: Device,
    opset: int,
) -> FirstDeviation | None:
    """The first tensor whose relative L2 exceeds `tolerance`; None when none does while it is watched (then a fusion that
    the runtime makes only when nobody looks is at fault).

    Args:
        model: the reference, float32, on the CPU, adapters merged.
        config: its base's.
        feeds: inputs for which the output is wrong.
        opset: the artifact's, so that the new export has the same names.

    Raises:
        ExportError: the reference cannot be exported.
    """
    program = trace(model, config, spec_as_float32(spec), sizes_of(spec, feeds), opset)
    graph = load_graph(onnx_path)
    exported = program.exported_program
    assert exported is not None
    known = {node.name: node for node in exported.graph.nodes}
    probes = [
        _Probe(output, node.op_type, scope)
        for node in graph.graph.node
        for output in node.output
        for scope in [next((p.value for p in node.metadata_props if p.key == SCOPE_KEY), "")]
        if output in known and isinstance(known[output].meta.get("val"), Tensor)
        if known[output].meta["val"].dtype.is_floating_point
    ]
    graph_output = graph.graph.output[0].name
    probes.append(_Probe(graph_output, "output", ""))
    names_wanted = {probe.name for probe in probes}
    ordered = [
        feeds[tensor.name].float() if tensor.dtype in DTYPES_OF_WEIGHTS else feeds[tensor.name]
        for tensor in spec.inputs
    ]
    expected = _replay(exported, ordered, names_wanted, graph_output)
    probes = [probe for probe in probes if probe.name in expected]

    errors: dict[int, float] = {}

    def measure(indices: Sequence[int]) -> None:
        wanted = [probes[i] for i in indices if i not in errors]
        if not wanted:
            return
        found = _run_probes(graph, onnx_path.parent, spec, feeds, [probe.name for probe in wanted], device)
        for i in indices:
            if i in errors:
                continue
            value, reference = found[probes[i].name], expected[probes[i].name]
            # names that agree by chance do not count: same name, another tensor
            errors[i] = relative_l2(value, reference) if value.shape == reference.shape else 0.0

    low, high = -1, len(probes) - 1
    measure([high])
    if not _outside(errors[high], tolerance):
        return None
    while high - low > 1:
        span = high - low
        inner = sorted({low + span * k // (_PROBES + 1) for k in range(1, _PROBES + 1)} - {low, high})
        measure(inner or [low + 1])
        bad = [i for i in sorted(errors) if low < i <= high and _outside(errors[i], tolerance)]
        high = bad[0]
        low = max((i for i in errors if i < high and not _outside(errors[i], tolerance)), default=-1)
    # the order of a graph is not one line: go on from there to what it was computed from, as long as that is wrong too
    index_of = {probe.name: index for index, probe in enumerate(probes)}
    producer = {output: node for node in graph.graph.node for output in node.output}
    while True:
        ancestors = [index_of[name] for name in _nearest(probes[high].name, producer, index_of)]
        measure(ancestors)
        worse = [index for index in ancestors if _outside(errors[index], tolerance)]
        if not worse:
            break
        high = min(worse)
    probe = probes[high]
    last = max(ancestors, key=lambda index: errors[index], default=None)
    return FirstDeviation(
        tensor=probe.name,
        operator=probe.operator,
        module=probe.module,
        relative_l2=errors[high],
        last_good=None if last is None else probes[last].name,
        last_good_relative_l2=None if last is None else errors[last],
    )


def _nearest(name: str, producer: Mapping[str, onnx.NodeProto], known: Mapping[str, int]) -> list[str]:
    """The nearest known tensors that `name` is computed from."""
    found: dict[str, None] = {}
    seen: set[str] = set()
    waiting = list(producer[name].input) if name in producer else []
    while waiting:
        current = waiting.pop()
        if current in seen:
            continue
        seen.add(current)
        if current in known:
            found[current] = None
        elif current in producer:
            waiting.extend(producer[current].input)
    return list(found)


def spec_as_float32(spec: ModelSpec) -> ModelSpec:
    """The same model in float32."""
    fields = spec.to_dict()
    for tensor in [*fields["inputs"], *fields["outputs"]]:
        tensor["dtype"] = "fp32" if tensor["dtype"] in DTYPES_OF_WEIGHTS else tensor["dtype"]
    return ModelSpec.from_dict(fields)


def _outside(error: float, tolerance: float) -> bool:
    return not error <= tolerance  # a NaN is outside


def _replay(program: ExportedProgram, feeds: Sequence[Tensor], wanted: set[str], output: str) -> dict[str, Tensor]:
    """Run the exported torch graph and keep the values of some nodes; `feeds` in the order of its inputs."""
    kept: dict[str, Tensor] = {}

    class Recorder(fx.Interpreter):
        def run_node(self, n: fx.Node) -> Any:
            value = super().run_node(n)
            if n.name in wanted and isinstance(value, Tensor):
                kept[n.name] = value.detach().clone()
            return value

    state = dict(program.state_dict) | dict(program.constants)
    values = iter(feeds)
    arguments: list[Any] = []
    for entry in program.graph_signature.input_specs:
        if entry.target is not None:
            arguments.append(state[entry.target])
        elif isinstance(entry.arg, ConstantArgument):
            arguments.append(entry.arg.value)
        else:
            arguments.append(next(values))
    with torch.inference_mode():
        result = Recorder(program.graph_module).run(*arguments)
    kept[output] = result[0] if isinstance(result, (tuple, list)) else result
    return kept


def _run_probes(
    graph: onnx.ModelProto,
    folder: Path,
    spec: ModelSpec,
    feeds: Mapping[str, Tensor],
    names: Sequence[str],
    device: Device,
) -> dict[str, Tensor]:
    """Run the model with some inner tensors as its outputs."""
    probed = onnx.ModelProto()
    probed.CopyFrom(graph)
    existing = {output.name for output in probed.graph.output}
    for name in names:
        if name not in existing:
            probed.graph.output.append(onnx.ValueInfoProto(name=name))
    session = open_session(probed.SerializeToString(), device, folder=folder, provider=exact(spec))
    binding = session.io_binding()
    inputs = {t.name: feeds[t.name].to(DTYPES[t.dtype]).contiguous() for t in spec.inputs}
    for tensor in spec.inputs:
        value = inputs[tensor.name]
        element = {torch.float32: 1, torch.int64: 7, torch.float16: 10, torch.bfloat16: 16}[value.dtype]
        binding.bind_input(tensor.name, "cpu", 0, element, list(value.shape), value.data_ptr())
    for name in names:
        binding.bind_output(name, "cpu")
    session.run_with_iobinding(binding)
    return {name: torch.from_numpy(value.numpy()) for name, value in zip(names, binding.get_outputs(), strict=True)}
