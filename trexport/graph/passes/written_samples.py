"""A bank with a weight for every sample as its inputs, for who writes weights when the choice of adapters changes and not in
every step."""

from __future__ import annotations

from collections.abc import Collection

import onnx_ir as ir

from trexport.graph.passes.banked_layers import BankedLayer, replace_banked
from trexport.graph.passes.written import without_cores


def samples_name(path: str) -> str:
    """The input that holds a layer's weights."""
    return f"{path}.samples"


def written_samples(model: ir.Model, cores: Collection[str], batch: int) -> ir.Model:
    """Put the product with a weight of its own for every sample in the place of each `ai.trlora::BankedLinear_…`; in place.
    The inputs for cores are gone; those that choose stay, and nothing reads them.

    The weights are inputs without a value, `<path>.samples`, (batch, out, in) in the weight's type.

    Args:
        cores: the names of the inputs that are stacks of cores.
        batch: the samples that the model takes.

    Raises:
        ValueError: another operator; `is_written` tells.
    """

    def weights_of(layer: BankedLayer) -> ir.Value:
        weights = layer.new_input(model.graph, samples_name(layer.path), [batch, *layer.sizes()])
        return layer.body.transpose(weights, [0, 2, 1])

    replace_banked(model, weights_of)
    return without_cores(model, cores)
