"""A bank with what adapters change in whole weights as its inputs, for who writes weights faster than a graph computes with
cores."""

from __future__ import annotations

from collections.abc import Collection

import onnx_ir as ir

from trexport.graph.passes.banked_layers import BankedLayer, replace_banked
from trexport.graph.passes.written import without_cores


def change_name(path: str) -> str:
    """The input that holds a layer's stack."""
    return f"{path}.change"


def written_bank(model: ir.Model, cores: Collection[str], places: int) -> ir.Model:
    """Put `x·(W0 + s·change)` in the place of every `ai.trlora::BankedLinear_…`, each sample with the place and the strength
    that it chooses as before; in place. The inputs for cores are gone, those that choose stay.

    The changes are inputs without a value, `<path>.change`, (places + 1, in, out) in the weight's type; place 0 is to be
    zero.

    Args:
        cores: the names of the inputs that are stacks of cores.

    Raises:
        ValueError: another operator; `is_written` tells.
    """
    scales: list[ir.Value] = []

    def weights_of(layer: BankedLayer) -> ir.Value:
        rows, columns = layer.sizes()
        stack = layer.new_input(model.graph, change_name(layer.path), [places + 1, columns, rows])
        body = layer.body
        if not scales:  # one for all layers
            scales.append(body.reshape(body.op("CastLike", layer.strength, layer.weight), [-1, 1, 1]))
        change = body.op("Mul", body.op("Gather", stack, layer.place, axis=0), scales[0])
        return body.op("Add", change, body.transpose(layer.weight, [1, 0]))

    replace_banked(model, weights_of)
    return without_cores(model, cores)
