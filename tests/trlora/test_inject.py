from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from tests.helpers import (
    ATTENTION_PATHS,
    BLOCK,
    CONTEXT,
    HIDDEN,
    INNER,
    bits,
    state_bits,
    tiny_inputs,
    tiny_unet,
    trained,
)
from trlora import (
    AdaptedLinear,
    AdapterSpec,
    LayerAdapter,
    ShapeError,
    SpecError,
    TargetError,
    adapted_modules,
    attach_,
    find_targets,
    inject_,
    remove_,
    set_strengths_,
    shapes_of,
)

SPEC = AdapterSpec.from_dict(
    {"transform": {"type": "tensor_ring", "rank": 2}, "residual": {"type": "tensor_ring", "rank": 2}}
)
DIAGONAL = AdapterSpec.from_dict({"transform": {"type": "diagonal"}})
LOW_RANK = AdapterSpec.from_dict({"residual": {"type": "low_rank", "rank": 3}})


def adapters_for(model: nn.Module, spec: AdapterSpec = SPEC, seed: int = 0) -> dict[str, LayerAdapter]:
    """Trained adapters, float32, for the attention layers of a model."""
    generator = torch.Generator().manual_seed(seed)
    shapes = shapes_of(model)
    return {
        path: trained(
            LayerAdapter.from_spec(spec, shapes[path][1], shapes[path][0], generator), seed=seed, amount=0.1
        ).float()
        for path in ATTENTION_PATHS
    }


def untouched(model: nn.Module, before: dict[str, bytes]) -> bool:
    return state_bits(model) == before and not adapted_modules(model)


# --- inject_ -----------------------------------------------------------------------------------------------------------


def test_targets_are_wrapped_and_everything_else_is_frozen() -> None:
    model = tiny_unet()
    before = dict(model.named_modules())
    paths = inject_(model, SPEC)
    assert paths == ATTENTION_PATHS == list(adapted_modules(model))
    for path, layer in adapted_modules(model).items():
        assert model.get_submodule(path) is layer
        assert layer.base is before[path]
        assert list(layer.adapters) == ["default"]
        assert layer.strengths == {"default": 1.0}
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trainable == {name for name, _ in model.named_parameters() if ".adapters.default." in name}
    assert len(trainable) == 8 * (3 + 6)


def test_an_injected_model_starts_as_the_base() -> None:
    model, sample = tiny_unet(), tiny_inputs()
    expected = bits(model(*sample))
    inject_(model, SPEC)
    assert bits(model(*sample)) == expected


def test_the_seed_decides_the_start() -> None:
    def start(seed: int) -> dict[str, bytes]:
        model = tiny_unet()
        inject_(model, SPEC, seed=seed)
        return state_bits(model)

    torch.manual_seed(1)
    one = start(3)
    torch.manual_seed(2)  # the global generator has no part in it
    assert start(3) == one
    assert start(4) != one


def test_injecting_leaves_the_global_generator_alone() -> None:
    model = tiny_unet()
    before = torch.get_rng_state()
    inject_(model, SPEC)
    assert torch.equal(torch.get_rng_state(), before)


def test_layers_do_not_share_their_random_start() -> None:
    model = tiny_unet()
    inject_(model, LOW_RANK)
    starts = [bits(layer.adapters["default"].residual.lora_A.weight) for layer in adapted_modules(model).values()]  # type: ignore[union-attr]
    assert len(set(starts)) == len(starts)


def test_name_strength_and_overrides() -> None:
    model = tiny_unet()
    other = f"{BLOCK}.attn2.to_v"
    inject_(model, SPEC, overrides={other: DIAGONAL}, name="style", strength=0.25)
    for path, layer in adapted_modules(model).items():
        assert layer.strengths == {"style": 0.25}
        ((adapter, _),) = layer.active()
        assert adapter.spec == (DIAGONAL if path == other else SPEC)


@pytest.mark.parametrize(
    ("spec", "overrides", "error", "message"),
    [
        (SPEC, {f"{BLOCK}.attn2.to_x": DIAGONAL}, TargetError, "to_x.*nearest existing name"),
        (SPEC, {"down_blocks.0.attentions.0.proj_in": DIAGONAL}, TargetError, "proj_in"),
        (
            {"transform": {"type": "block_orthogonal", "block_size": 4}},
            {},
            SpecError,
            "4 does not divide 15.*; [35] does",
        ),
        ({"transform": {"type": "tensor_ring", "modes": [3, 4]}}, {}, ShapeError, r"\(3, 4\).*15|\(3, 4\).*20"),
        ({"residual": {"type": "tensor_ring", "rank": [2, 2, 2]}}, {}, ShapeError, "6"),
        (SPEC, {f"{BLOCK}.attn2.to_k": {"transform": {"type": "tensor_ring", "modes": [4, 4]}}}, ShapeError, "15"),
    ],
)
def test_what_cannot_be_built_leaves_the_model_as_it_was(spec, overrides, error, message: str) -> None:
    model = tiny_unet()
    before = state_bits(model)
    spec, *others = [
        item if isinstance(item, AdapterSpec) else AdapterSpec.from_dict(item) for item in (spec, *overrides.values())
    ]
    with pytest.raises(error, match=message):
        inject_(model, spec, overrides=dict(zip(overrides, others, strict=True)))
    assert untouched(model, before)
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_an_infinite_strength_is_refused() -> None:
    model = tiny_unet()
    before = state_bits(model)
    with pytest.raises(ValueError, match="inf"):
        inject_(model, SPEC, strength=float("inf"))
    assert untouched(model, before)


# --- attach_ -----------------------------------------------------------------------------------------------------------


def test_adapters_are_attached_beside_each_other_in_any_order() -> None:
    sample = tiny_inputs()
    outputs = []
    for names in (("a", "b"), ("b", "a")):
        model = tiny_unet()
        for name in names:
            attach_(model, adapters_for(model, seed=ord(name)), name=name, strength={"a": 0.5, "b": -0.7}[name])
        outputs.append(model(*sample))
        assert all(set(layer.adapters) == {"a", "b"} for layer in adapted_modules(model).values())
    torch.testing.assert_close(outputs[0], outputs[1], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(outputs[0], tiny_unet()(*sample), rtol=1e-2, atol=1e-2)


def test_adapters_may_be_on_different_layers() -> None:
    model = tiny_unet()
    adapters = adapters_for(model)
    attach_(model, {path: adapters[path] for path in ATTENTION_PATHS[:3]}, name="a")
    attach_(model, {path: adapters_for(model, LOW_RANK)[path] for path in ATTENTION_PATHS[2:5]}, name="b")
    names = {path: sorted(layer.adapters) for path, layer in adapted_modules(model).items()}
    assert list(names.values()) == [["a"], ["a"], ["a", "b"], ["b"], ["b"]]


@pytest.mark.parametrize("adapted", [False, True], ids=["plain model", "adapted model"])
@pytest.mark.parametrize(
    ("path", "error", "message"),
    [
        (f"{BLOCK}.attn2.to_kk", TargetError, f"'{BLOCK}.attn2.to_k'"),
        ("norm", TargetError, "norm is a LayerNorm"),
        (f"{BLOCK}.attn1.to_q", ShapeError, "15 → 20.*12 → 20"),
    ],
)
def test_a_refused_attachment_attaches_nothing(path: str, error, message: str, adapted: bool) -> None:
    model = tiny_unet()
    adapters = adapters_for(model)
    if adapted:
        attach_(model, adapters_for(model, seed=5), name="first")
    before, sample = state_bits(model), tiny_inputs()
    output, strengths = bits(model(*sample)), [layer.strengths.copy() for layer in adapted_modules(model).values()]
    wrong = copy.deepcopy(adapters[f"{BLOCK}.attn2.to_k"])
    good = {
        f"{BLOCK}.attn2.to_v": adapters[f"{BLOCK}.attn2.to_v"],
        f"{BLOCK}.attn1.to_k": adapters[f"{BLOCK}.attn1.to_k"],
    }
    with pytest.raises(error, match=message):
        attach_(model, {**good, path: wrong})
    assert state_bits(model) == before
    assert [layer.strengths for layer in adapted_modules(model).values()] == strengths
    assert bits(model(*sample)) == output


@pytest.mark.parametrize("name", ["first", "", "a.b", "keys", "items"])
def test_a_name_that_cannot_be_used_is_refused(name: str) -> None:
    model = tiny_unet()
    attach_(model, adapters_for(model), name="first")
    before = state_bits(model)
    with pytest.raises(TargetError, match=f"'{name}'"):
        attach_(model, adapters_for(model, seed=1), name=name)
    assert state_bits(model) == before


def test_a_strength_that_is_no_number_leaves_an_adapted_model_whole() -> None:
    model, sample = tiny_unet(), tiny_inputs()
    attach_(model, adapters_for(model), name="first")
    output = bits(model(*sample))
    with pytest.raises(ValueError, match="nan"):
        attach_(model, adapters_for(model, seed=1), name="second", strength=float("nan"))
    assert all(list(layer.adapters) == ["first"] for layer in adapted_modules(model).values())
    assert bits(model(*sample)) == output


def test_the_layer_inside_an_adapted_layer_cannot_be_adapted() -> None:
    model = tiny_unet()
    adapters = adapters_for(model)
    attach_(model, adapters)
    with pytest.raises(TargetError, match=r"to_q\.base"):
        attach_(model, {f"{ATTENTION_PATHS[0]}.base": adapters[ATTENTION_PATHS[0]]}, name="second")


# --- remove_, strengths, shapes ----------------------------------------------------------------------------------------


def test_removing_gives_back_the_modules_of_every_adapter() -> None:
    model, sample = tiny_unet(), tiny_inputs()
    modules, before, output = dict(model.named_modules()), state_bits(model), bits(model(*sample))
    attach_(model, adapters_for(model), name="a")
    attach_(model, adapters_for(model, LOW_RANK), name="b")
    assert bits(model(*sample)) != output
    assert remove_(model) == ATTENTION_PATHS
    assert {path: id(module) for path, module in model.named_modules()} == {p: id(m) for p, m in modules.items()}
    assert untouched(model, before)
    assert bits(model(*sample)) == output
    assert remove_(model) == []


def test_an_injected_model_can_be_injected_again_once_removed() -> None:
    model = tiny_unet()
    inject_(model, SPEC)
    remove_(model)
    assert inject_(model, LOW_RANK, "transformer") == list(find_targets(tiny_unet(), "transformer"))


def test_strengths_are_set_where_the_name_is() -> None:
    model = tiny_unet()
    adapters = adapters_for(model)
    attach_(model, {path: adapters[path] for path in ATTENTION_PATHS[:2]}, name="a")
    attach_(model, {path: adapters_for(model, seed=1)[path] for path in ATTENTION_PATHS[1:3]}, name="b")
    set_strengths_(model, {"a": 0.0, "b": -2})
    strengths = [layer.strengths for layer in adapted_modules(model).values()]
    assert strengths == [{"a": 0.0}, {"a": 0.0, "b": -2.0}, {"b": -2.0}]


def test_the_strength_of_an_unknown_name_is_refused() -> None:
    model = tiny_unet()
    attach_(model, adapters_for(model), name="watercolour")
    with pytest.raises(TargetError, match=r"'watercolor'.*nearest existing name is 'watercolour'"):
        set_strengths_(model, {"watercolor": 0.5})
    with pytest.raises(TargetError, match="'any'"):
        set_strengths_(tiny_unet(), {"any": 0.5})


def test_shapes_are_the_same_with_and_without_adapters() -> None:
    model = tiny_unet()
    shapes = shapes_of(model)
    assert shapes[f"{BLOCK}.attn1.to_q"] == (INNER, HIDDEN)
    assert shapes[f"{BLOCK}.attn2.to_k"] == (INNER, CONTEXT)
    assert shapes[f"{BLOCK}.attn2.to_out.0"] == (HIDDEN, INNER)
    assert shapes == {
        path: (module.out_features, module.in_features)
        for path, module in model.named_modules()
        if isinstance(module, nn.Linear)
    }
    attach_(model, adapters_for(model))
    assert shapes_of(model) == shapes


def test_an_adapted_model_can_be_copied() -> None:
    model, sample = tiny_unet(), tiny_inputs()
    attach_(model, adapters_for(model), strength=0.5)
    twin = copy.deepcopy(model)
    expected = bits(model(*sample))
    set_strengths_(model, {"default": 0.0})
    assert bits(twin(*sample)) == expected != bits(model(*sample))
    assert all(isinstance(layer, AdaptedLinear) for layer in adapted_modules(twin).values())
