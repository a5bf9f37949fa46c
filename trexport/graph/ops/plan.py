"""The path plan: how each adapted layer of a factored graph is computed.

Three ways give the same result. `activations` applies the transform's cores to the activations; `dense` forms T once and
multiplies the activations with it; `weight` rebuilds the adapted weight. The first two keep the residual as two thin
products beside the layer. The gain of a magnitude and a transform of outputs stand outside of both: such layers take the
third. Which is cheapest depends on the tokens that a layer sees against its width.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Self, final

from trexport.errors import UsageError
from trexport.graph.ops.slots import LayerSlot

Path = Literal["activations", "dense", "weight"]
PATHS: tuple[Path, ...] = ("activations", "dense", "weight")


@final
@dataclass(frozen=True)
class CostModel:
    """Seconds of a layer's extra work: operations over one rate, elements moved over another."""

    name: str
    dense_flops_per_second: float
    """Of large products."""
    thin_flops_per_second: float
    """Of products with a side of some ten elements, such as those with cores."""
    elements_per_second: float


# fitted to single operators in ONNX Runtime on two cores: seven layers of Stable Diffusion 1.5, each by every path; the
# choice was the fastest in all of them
CPU = CostModel("cpu", 4e11, 2.5e11, 7e9)
# an H100's rates, not fitted
CUDA = CostModel("cuda", 6e14, 1.0e14, 8e11)
COST_MODELS: dict[str, CostModel] = {model.name: model for model in (CPU, CUDA)}


@final
@dataclass(frozen=True)
class LayerPlan:
    """The path of one layer, and what the paths would cost."""

    path: Path
    tokens: int
    """Rows of activations at the declared optimum, batch included."""
    cost_ms: Mapping[str, float]
    """Of each path, over the plain layer, by the cost model: to compare, not to predict."""

    def to_dict(self) -> dict[str, Any]:
        return {"path": self.path, "tokens": self.tokens, "cost_ms": dict(self.cost_ms)}

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> Self:
        return cls(fields["path"], fields["tokens"], fields["cost_ms"])


def plan_layer(
    slots: Sequence[LayerSlot],
    shape: Sequence[int],
    tokens: int,
    model: CostModel,
    forced: Path | None = None,
    samples: int = 1,
) -> LayerPlan:
    """Choose the cheapest path.

    Args:
        slots: of the adapters on the layer.
        shape: (out_features, in_features), or of a convolution (out, in/groups, height, width).
        tokens: rows of activations; of a convolution places of its output.
        forced: take this path whatever it costs.
        samples: that have an adapter each, in a bank: T or the weight is then formed for every one.

    Raises:
        UsageError: another path than `weight` is forced on a layer with a magnitude or a transform of outputs, or on a
            convolution that has more than low-rank residuals.
    """
    paths: tuple[Path, ...] = ("weight",) if any(slot.outside for slot in slots) else PATHS
    convolution, shape = len(shape) > 2, (shape[0], math.prod(shape[1:]))
    if convolution and paths == PATHS:
        thin = all(slot.transform is None and slot.residual is not None and slot.residual.has_factors for slot in slots)
        paths = ("activations", "weight") if thin else ("weight",)
        forced = "activations" if thin and forced == "dense" else forced  # no transform is to be formed
        if forced is not None and forced not in paths:
            raise UsageError(
                f"--path {forced}: transforms and Kronecker products on convolutions rebuild the weight; leave it to the "
                "plan, or give --path weight"
            )
    if forced is not None and forced not in paths:
        raise UsageError(
            f"--path {forced}: a magnitude (of DoRA, BOFT or (IA)³) or a transform of outputs (of LyCORIS' OFT and BOFT) "
            "stands outside of the adapted product, so its layers rebuild their weight; leave it to the plan, or give "
            "--path weight"
        )
    each = -(-tokens // samples)
    costs = {path: round(1e3 * samples * _seconds(path, slots, shape, each, model), 6) for path in paths}
    return LayerPlan(forced or min(paths, key=lambda path: costs[path]), tokens, costs)


def _seconds(path: Path, slots: Sequence[LayerSlot], shape: Sequence[int], tokens: int, model: CostModel) -> float:
    rows, columns = shape
    seconds = 0.0
    for slot in slots:
        if slot.transform is not None:
            flops, moved = slot.transform.work(rows if path == "weight" else tokens, dense=path == "dense")
            rate = model.dense_flops_per_second if path == "dense" else model.thin_flops_per_second
            # and the sum x + s·(T·x − x), or that of the weights
            moved += 3.0 * columns * (rows if path == "weight" else tokens)
            seconds += flops / rate + moved / model.elements_per_second
        if slot.residual is not None:
            if path == "weight":
                flops, moved = slot.residual.delta_work(), 3.0 * rows * columns
            else:
                flops, moved = slot.residual.work(tokens), float(tokens) * (columns + 3 * rows)
            seconds += flops / model.thin_flops_per_second + moved / model.elements_per_second
        if slot.magnitude is not None:
            seconds += 6.0 * rows * columns / model.elements_per_second
        if slot.output_transform is not None:
            flops, moved = slot.output_transform.work(columns, dense=False)
            seconds += flops / model.thin_flops_per_second + (moved + 4.0 * rows * columns) / model.elements_per_second
    if path == "weight":
        seconds += 2.0 * rows * columns / model.elements_per_second  # the runtime cannot prepare the weight beforehand
    return seconds
