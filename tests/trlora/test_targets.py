from __future__ import annotations

import pytest
from torch import nn

from tests.helpers import ATTENTION_PATHS, BLOCK, spec_of, tiny_unet
from trlora import TargetError, find_targets, inject_

FEED_FORWARD = [f"{BLOCK}.ff.net.0.proj", f"{BLOCK}.ff.net.2"]


def test_the_default_is_every_attention_projection_in_the_models_order() -> None:
    model = tiny_unet(blocks=2)
    found = find_targets(model)
    expected = [*ATTENTION_PATHS, *(path.replace("blocks.0.attn", "blocks.1.attn") for path in ATTENTION_PATHS)]
    assert list(found) == expected == list(find_targets(model, "attention"))
    assert all(found[path] is model.get_submodule(path) for path in expected)


def test_the_transformer_preset_adds_the_feed_forward_layers() -> None:
    assert list(find_targets(tiny_unet(), "transformer")) == [*ATTENTION_PATHS, *FEED_FORWARD]


def test_a_regular_expression_is_for_the_whole_path() -> None:
    model = tiny_unet()
    assert list(find_targets(model, r".*\.to_q")) == [f"{BLOCK}.attn1.to_q", f"{BLOCK}.attn2.to_q"]
    with pytest.raises(TargetError, match=r"to_q.*choose no module"):
        find_targets(model, "to_q")  # no path is just this
    with pytest.raises(TargetError, match=r"choose no module"):
        find_targets(model, r"down_blocks\.0\.attentions\.0\.proj")  # nor this, though two begin so


def test_a_list_keeps_its_order() -> None:
    paths = [f"{BLOCK}.ff.net.2", "down_blocks.0.attentions.0.proj_in", f"{BLOCK}.attn1.to_q"]
    assert list(find_targets(tiny_unet(), paths)) == paths
    assert list(find_targets(tiny_unet(), iter(paths))) == paths


def test_a_predicate_sees_paths_and_modules() -> None:
    model = tiny_unet()
    found = find_targets(model, lambda path, module: isinstance(module, nn.Linear) and module.bias is None)
    assert list(found) == [path for path in ATTENTION_PATHS if "to_out" not in path]
    assert list(find_targets(model, lambda path, module: path.endswith("proj_in"))) == [
        "down_blocks.0.attentions.0.proj_in"
    ]


def test_a_listed_path_that_is_not_there_names_the_nearest() -> None:
    with pytest.raises(TargetError, match=rf"'{BLOCK}\.attn1\.to_qq'.*TinyUNet.*'{BLOCK}\.attn1\.to_q'"):
        find_targets(tiny_unet(), [f"{BLOCK}.attn1.to_qq"])


def test_a_module_that_is_not_linear_is_refused() -> None:
    with pytest.raises(TargetError, match="norm is a LayerNorm"):
        find_targets(tiny_unet(), ["norm"])
    with pytest.raises(TargetError, match=r"expected an nn.Linear"):
        find_targets(tiny_unet(), ".*attn1.*")  # the projections, and the lists that hold them


@pytest.mark.parametrize("targets", [[], lambda path, module: False, "nothing like this"])
def test_choosing_nothing_is_refused(targets) -> None:
    with pytest.raises(TargetError, match=r"choose no module of TinyUNet.*'attention'"):
        find_targets(tiny_unet(), targets)


def test_layers_that_have_an_adapter_are_refused() -> None:
    model = tiny_unet()
    inject_(model, spec_of(), ATTENTION_PATHS[:1])
    with pytest.raises(TargetError, match=rf"{ATTENTION_PATHS[0]} has an adapter already"):
        find_targets(model)


def test_the_layer_inside_an_adapted_layer_is_not_a_target() -> None:
    """An adapter inside an adapter could not be taken out again."""
    model = tiny_unet()
    inject_(model, spec_of(), ATTENTION_PATHS[:1])
    found = find_targets(model, lambda path, module: isinstance(module, nn.Linear))
    assert not [path for path in found if path.startswith(ATTENTION_PATHS[0])]
    assert set(ATTENTION_PATHS[1:]) < set(found)
    with pytest.raises(TargetError, match=rf"{ATTENTION_PATHS[0]}\.base"):
        find_targets(model, [f"{ATTENTION_PATHS[0]}.base"])
