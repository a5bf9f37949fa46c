"""Folding what is constant, but never a parameter: initialisers keep their PyTorch names and bits."""

from __future__ import annotations

import onnx_ir as ir
from onnx_ir.passes import common
from onnxscript import optimizer, rewriter
from onnxscript.rewriter.rules import common as rules

_STEPS = 3
_FOLDED_ELEMENTS = 1 << 20

# Of onnxscript's default rules those about shapes; the others may take a parameter away (a bias of zeros, say).
# Not `slice_split_rule`: it found nothing in any architecture, and its matcher lists the whole graph anew at every node.
_RULES = [
    rules.cast_cast_rule,
    rules.collapse_slice_rule,
    rules.collapse_slice2_rule,
    rules.materialize_reshape_shape_rule,
    rules.no_op_cast_rule,
    rules.no_op_expand_rule,
    rules.no_op_transpose_rule,
    rules.reshape_reshape_rule,
    rules.squeeze_reshape_1d_rule,
    rules.transpose_transpose_rule,
    rules.unsqueeze_unsqueeze_rule,
]


def fold(model: ir.Model, parameters: set[str]) -> ir.Model:
    """Inline helper functions, fold constants, drop dead and repeated nodes; in place.

    The exporter's own optimiser also folds the transposes of linear weights into new, nameless initialisers and merges
    parameters that happen to be equal. A refit by name would then miss them, so neither is done here: runtimes fold
    transposes themselves when they load a model.

    Args:
        parameters: the names of the initialisers to keep.
    """

    def should_fold(node: ir.Node) -> bool | None:
        touches = any(value is not None and value.name in parameters for value in node.inputs)
        return False if touches else None

    common.InlinePass()(model)
    for _ in range(_STEPS):
        optimizer.fold_constants_ir(model, output_size_limit=_FOLDED_ELEMENTS, should_fold=should_fold)
        rewriter.rewrite(model, pattern_rewrite_rules=_RULES)
        common.RemoveUnusedNodesPass()(model)
    ir.passes.Sequential(
        common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0),
        common.IdentityEliminationPass(),
        common.CommonSubexpressionEliminationPass(),
        common.RemoveUnusedNodesPass(),
        common.RemoveUnusedFunctionsPass(),
        common.RemoveUnusedOpsetsPass(),
        common.OutputFixPass(),
        common.NameFixPass(),
    )(model)
    return model
