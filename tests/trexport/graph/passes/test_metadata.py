import pytest

from trexport.artifact import Artifact
from trexport.graph.check import load_graph
from trexport.graph.passes.metadata import SCOPE_KEY, module_of


@pytest.mark.parametrize(
    ("scopes", "path"),
    [("['', 'conv_in', 'conv2d']", "conv_in"), ("['', 'add']", ""), ("", ""), ("['', 'a', 'a.b', 'x']", "a.b")],
)
def test_the_module_of_a_scope(scopes: str, path: str) -> None:
    assert module_of(scopes) == path


def test_nodes_keep_their_module_and_nothing_else(onnx_artifact: Artifact) -> None:
    nodes = load_graph(onnx_artifact.onnx_path).graph.node
    assert {prop.key for node in nodes for prop in node.metadata_props} == {SCOPE_KEY}
    by_module = {prop.value: node.op_type for node in nodes for prop in node.metadata_props}
    assert by_module["conv_in"] == "Conv"
    assert not any(node.doc_string for node in nodes)
