from __future__ import annotations

import copy
import hashlib
import io
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

from tests.helpers import ATTENTION_PATHS, BLOCK, bits, spec_of, state_bits, tiny_inputs, tiny_unet, trained
from trlora import (
    AdaptedLinear,
    Adapter,
    AdapterConfig,
    AdapterSpec,
    BaseModel,
    CheckpointError,
    adapter_from_model,
    attach_,
    inject_,
    load_adapter,
    merge_,
    remove_,
    save_adapter,
    shapes_of,
)
from trlora import checkpoint as checkpoint_module

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
LAYER = f"{BLOCK}.attn2.to_k"
"""15 → 20 features, in modes (3, 1, 5) and (2, 5, 2)."""

Tensors = dict[str, Tensor]
Config = dict[str, Any]


def numbers(*shape: int) -> Tensor:
    """Exact in float32, the same on every machine."""
    count = torch.Size(shape).numel()
    return ((torch.arange(count) * 37 % 61 - 30) / 64).reshape(shape)


def small() -> tuple[Tensors, Config]:
    """A valid adapter for one layer of the small model."""
    tensors = {
        f"{LAYER}.transform.core.0": numbers(3, 3, 2, 3),
        f"{LAYER}.transform.core.1": numbers(1, 1, 3, 1),
        f"{LAYER}.transform.core.2": numbers(5, 5, 1, 2),
        f"{LAYER}.residual.lora_A.weight": numbers(4, 15),
        f"{LAYER}.residual.lora_B.weight": numbers(20, 4),
    }
    config = {
        "format": "trlora",
        "format_version": 1,
        "base_model": {"name_or_path": "here/base", "class": "TinyUNet", "sha256": None},
        "default": {
            "transform": {"type": "tensor_ring", "order": 3, "rank": [2, 3, 1], "modes": [3, 1, 5]},
            "residual": {"type": "low_rank", "rank": 4, "alpha": 8.0},
        },
        "overrides": {},
        "strength": 0.75,
    }
    return tensors, config


def write(path: Path, tensors: Tensors, config: object) -> Path:
    """A checkpoint as another program might have written it: folder, or one file."""
    if path.suffix == ".safetensors":
        safetensors.torch.save_file(tensors, path, metadata={"trlora": json.dumps(config)})
    else:
        path.mkdir()
        safetensors.torch.save_file(tensors, path / WEIGHTS)
        (path / CONFIG).write_text(json.dumps(config))
    return path


def refused(path: Path, *expected: str) -> str:
    """Load and bind to the small model; the message of the refusal, which holds every expected text."""
    base = tiny_unet()
    before = state_bits(base)
    with pytest.raises(CheckpointError) as error:
        attach_(base, load_adapter(path).bind(shapes_of(base)))
    for text in expected:
        assert text in str(error.value)
    assert path.name in str(error.value)
    assert state_bits(base) == before
    assert not any(isinstance(module, AdaptedLinear) for module in base.modules())
    return str(error.value)


@pytest.fixture(params=["adapter", "adapter.safetensors"])
def target(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return tmp_path / request.param


# --- what is accepted --------------------------------------------------------------------------------------------------


def test_a_checkpoint_is_read_as_it_is_written_down(target: Path) -> None:
    tensors, config = small()
    adapter = load_adapter(write(target, tensors, config))
    assert {key: bits(tensor) for key, tensor in adapter.tensors().items()} == {k: bits(t) for k, t in tensors.items()}
    assert adapter.config.to_dict() == config
    assert adapter.config.strength == 0.75
    assert adapter.config.base_model == BaseModel("here/base", "TinyUNet", None)
    assert adapter.parameters == sum(tensor.numel() for tensor in tensors.values())


def test_the_weights_are_those_of_the_formula(target: Path) -> None:
    """The keys mean what the format says: read by hand, `W0·T + (alpha/r)·B·A`."""
    tensors, config = small()
    base = tiny_unet()
    w0 = base.get_parameter(f"{LAYER}.weight").detach().double()
    a, b = (tensors[f"{LAYER}.residual.lora_{n}.weight"].double() for n in "AB")
    cores = [tensors[f"{LAYER}.transform.core.{d}"].double() for d in range(3)]
    matrix = torch.zeros(15, 15, dtype=torch.float64)
    for i in range(15):
        for j in range(15):
            matrix[i, j] = torch.trace(cores[0][i % 3, j % 3] @ cores[1][0, 0] @ cores[2][i // 3, j // 3])
    attach_(base, load_adapter(write(target, tensors, config)).bind(shapes_of(base)))
    merge_(base)
    torch.testing.assert_close(base.get_parameter(f"{LAYER}.weight").double(), w0 @ matrix + 2 * b @ a)


def test_what_the_config_may_leave_out(target: Path) -> None:
    tensors, config = small()
    for name in ("base_model", "overrides", "strength"):
        del config[name]
    config["default"]["transform"]["modes"] = None
    config["default"]["residual"]["alpha"] = None
    adapter = load_adapter(write(target, tensors, config))
    assert adapter.config.strength == 1.0
    assert adapter.config.base_model == BaseModel()
    assert adapter.config.overrides == {}


def test_overrides_describe_their_layers(target: Path) -> None:
    tensors, config = small()
    other = f"{BLOCK}.attn1.to_q"
    tensors[f"{other}.transform.scale"] = numbers(12)
    config["overrides"] = {other: {"transform": {"type": "diagonal"}, "residual": {"type": "none"}}}
    base = tiny_unet()
    bound = load_adapter(write(target, tensors, config)).bind(shapes_of(base))
    assert torch.equal(bound[other].transform.matrix(), torch.diag(numbers(12)))
    assert bound[other].residual.trivial
    assert set(bound) == {LAYER, other}


def test_words_of_the_format_may_stand_in_a_modules_path(target: Path) -> None:
    model = nn.ModuleDict({"transform": nn.ModuleDict({"residual": nn.Linear(15, 6), "transform": nn.Linear(6, 15)})})
    spec = {"transform": {"type": "diagonal"}, "residual": {"type": "low_rank", "rank": 2}}
    paths = inject_(model, AdapterSpec.from_dict(spec), r"transform\.\w+")
    assert paths == ["transform.residual", "transform.transform"]
    adapter = adapter_from_model(model)
    save_adapter(adapter, target)
    assert set(load_adapter(target).layers) == set(paths)


def test_layers_without_parameters_are_no_part_of_a_checkpoint(target: Path) -> None:
    model = tiny_unet()
    low_rank = AdapterSpec.from_dict({"residual": {"type": "low_rank", "rank": 2}})
    inject_(model, low_rank, overrides={LAYER: AdapterSpec.from_dict({})})
    save_adapter(adapter_from_model(model), target)
    loaded = load_adapter(target)
    assert set(loaded.layers) == set(ATTENTION_PATHS) - {LAYER}
    loaded.bind(shapes_of(model))


def test_the_commonest_description_becomes_the_default() -> None:
    model = tiny_unet()
    low_rank = AdapterSpec.from_dict({"residual": {"type": "low_rank", "rank": 2}})
    diagonal = AdapterSpec.from_dict({"transform": {"type": "diagonal"}})
    inject_(model, low_rank, overrides={LAYER: diagonal})
    config = adapter_from_model(model).config
    assert config.default == low_rank
    assert config.overrides == {LAYER: diagonal}
    assert config.base_model.class_name == "TinyUNet"


def test_an_adapter_is_taken_from_a_model_by_name() -> None:
    model = tiny_unet()
    inject_(model, AdapterSpec.from_dict({"transform": {"type": "diagonal"}}), name="style")
    assert len(adapter_from_model(model, "style", strength=0.5).layers) == len(ATTENTION_PATHS)
    assert adapter_from_model(model, "style", strength=0.5).config.strength == 0.5
    with pytest.raises(CheckpointError, match="'default'"):
        adapter_from_model(model)
    with pytest.raises(CheckpointError, match="'style'"):
        adapter_from_model(tiny_unet(), "style")


def test_half_precision_tensors_are_kept(target: Path) -> None:
    tensors, config = small()
    for dtype in (torch.float16, torch.bfloat16, torch.float64):
        cast = {key: tensor.to(dtype) for key, tensor in tensors.items()}
        path = write(target.with_stem(str(dtype).removeprefix("torch.")), cast, config)
        loaded = load_adapter(path).tensors()
        assert {key: bits(tensor) for key, tensor in loaded.items()} == {k: bits(t) for k, t in cast.items()}


# --- writing -----------------------------------------------------------------------------------------------------------


def trained_adapter(seed: int = 0) -> Adapter:
    model = tiny_unet()
    spec = {"transform": {"type": "tensor_ring", "rank": 3}, "residual": {"type": "tensor_ring", "rank": 2}}
    inject_(model, AdapterSpec.from_dict(spec))
    for module in model.modules():
        if isinstance(module, AdaptedLinear):
            trained(module.adapters, seed=seed).float()
    return adapter_from_model(model)


def contents(path: Path) -> dict[str, bytes]:
    """Every file below a folder."""
    return {str(file.relative_to(path)): file.read_bytes() for file in path.rglob("*") if file.is_file()}


def test_the_same_adapter_gives_the_same_bytes(tmp_path: Path) -> None:
    for part in ("one", "two"):
        adapter = trained_adapter()
        save_adapter(adapter, tmp_path / part / "adapter")
        save_adapter(adapter, tmp_path / part / "adapter.safetensors")
    assert contents(tmp_path / "one") == contents(tmp_path / "two")
    assert set(contents(tmp_path / "one")) == {f"adapter/{WEIGHTS}", f"adapter/{CONFIG}", "adapter.safetensors"}


def test_a_checkpoint_read_and_written_again_has_the_same_bytes(tmp_path: Path) -> None:
    save_adapter(trained_adapter(), tmp_path / "one" / "a")
    save_adapter(trained_adapter(), tmp_path / "one" / "a.safetensors")
    save_adapter(load_adapter(tmp_path / "one" / "a.safetensors"), tmp_path / "two" / "a")
    save_adapter(load_adapter(tmp_path / "one" / "a"), tmp_path / "two" / "a.safetensors")
    assert contents(tmp_path / "one") == contents(tmp_path / "two")


def test_golden_bytes(tmp_path: Path) -> None:
    """Format version 1, byte for byte. A difference here is a change of the format (or of safetensors' header)."""
    tensors, config = small()
    adapter = load_adapter(write(tmp_path / "source", tensors, config))
    save_adapter(adapter, tmp_path / "folder")
    save_adapter(adapter, tmp_path / "file.safetensors")
    hashes = {
        name: hashlib.sha256(data).hexdigest() for name, data in contents(tmp_path).items() if "source" not in name
    }
    assert hashes == {
        f"folder/{WEIGHTS}": "cbf35dbcb9391cbb336e5b9541cab64d1f02320119cd354d0f962ab14161425a",
        f"folder/{CONFIG}": "49b439f4aab4cda396aaeea24cb887974652a12a6dd3e212e71d601ab8fa71a5",
        "file.safetensors": "04f9c69cfab328bdc7613845490518da2aa6d52cebd4f99778e449b222da4d3b",
    }


def test_something_in_the_place_is_not_overwritten(target: Path) -> None:
    first, second = trained_adapter(0), trained_adapter(1)
    save_adapter(first, target)
    before = contents(target.parent)
    with pytest.raises(FileExistsError, match=target.name):
        save_adapter(second, target)
    assert contents(target.parent) == before
    save_adapter(second, target, overwrite=True)
    assert contents(target.parent) != before
    assert set(contents(target.parent)) == set(before)


def test_a_folder_with_another_thing_in_it_is_refused(tmp_path: Path) -> None:
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="not empty"):
        save_adapter(trained_adapter(), tmp_path / "adapter")
    assert contents(tmp_path) == {"adapter/notes.txt": b"mine"}


def test_an_empty_folder_is_filled(tmp_path: Path) -> None:
    (tmp_path / "adapter").mkdir()
    save_adapter(trained_adapter(), tmp_path / "adapter")
    assert set(contents(tmp_path)) == {f"adapter/{WEIGHTS}", f"adapter/{CONFIG}"}


@pytest.mark.parametrize("there", [False, True], ids=["nothing there", "an adapter there"])
@pytest.mark.parametrize("failure", [OSError("disk full"), KeyboardInterrupt()], ids=["error", "interrupt"])
def test_an_interrupted_save_leaves_things_as_they_were(
    target: Path, there: bool, failure: BaseException, monkeypatch: pytest.MonkeyPatch
) -> None:
    if there:
        save_adapter(trained_adapter(0), target)
    before = contents(target.parent)
    calls = []

    def half(tensors: Tensors, path: Path, **_: object) -> None:
        Path(path).write_bytes(b"half a fi")
        calls.append(path)
        raise failure

    monkeypatch.setattr(checkpoint_module.safetensors.torch, "save_file", half)
    with pytest.raises(type(failure)):
        save_adapter(trained_adapter(1), target, overwrite=True)
    assert calls
    assert contents(target.parent) == before
    assert [path.name for path in target.parent.iterdir()] == ([target.name] if there else [])


def test_a_save_interrupted_between_its_files_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: Path, *_: object, **__: object) -> None:
        assert (self.parent / WEIGHTS).is_file()  # the first file is written already
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "write_text", fail)
    with pytest.raises(KeyboardInterrupt):
        save_adapter(trained_adapter(), tmp_path / "adapter")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_values_that_are_not_finite_are_not_written(target: Path, value: float) -> None:
    adapter = trained_adapter()
    key, tensor = list(adapter.tensors().items())[3]
    tensor.view(-1)[1] = value
    with pytest.raises(CheckpointError, match=key):
        save_adapter(adapter, target)
    assert list(target.parent.iterdir()) == []


# --- what is refused ---------------------------------------------------------------------------------------------------


def without(*names: str) -> Callable[[Tensors, Config], None]:
    def change(tensors: Tensors, config: Config) -> None:
        for name in names:
            del tensors[f"{LAYER}.{name}"]

    return change


def with_tensor(name: str, tensor: Tensor) -> Callable[[Tensors, Config], None]:
    return lambda tensors, config: tensors.update({f"{LAYER}.{name}": tensor})


def with_key(key: str) -> Callable[[Tensors, Config], None]:
    return lambda tensors, config: tensors.update({key: numbers(3, 4)})


def with_field(part: str, **fields: Any) -> Callable[[Tensors, Config], None]:
    return lambda tensors, config: config["default"][part].update(fields)


def with_value(name: str, value: float) -> Callable[[Tensors, Config], None]:
    def change(tensors: Tensors, config: Config) -> None:
        tensors[f"{LAYER}.{name}"].view(-1)[2] = value

    return change


def with_type(part: str, fields: Config) -> Callable[[Tensors, Config], None]:
    return lambda tensors, config: config["default"].update({part: fields})


def moved(path: str) -> Callable[[Tensors, Config], None]:
    def change(tensors: Tensors, config: Config) -> None:
        for key in list(tensors):
            tensors[key.replace(LAYER, path)] = tensors.pop(key)

    return change


CORE, A, B = f"{LAYER}.transform.core", f"{LAYER}.residual.lora_A.weight", f"{LAYER}.residual.lora_B.weight"

TENSORS_REFUSED = {
    "unknown key": (with_key("alien.weight"), ["alien.weight"]),
    "unknown key with no path": (with_key("transform.core.0"), ["transform.core.0"]),
    "unknown tensor": (with_tensor("transform.cores.0", numbers(3, 4)), [f"{LAYER}.transform.cores.0"]),
    "one core too many": (with_tensor("transform.core.3", numbers(1, 1, 2, 2)), [f"{CORE}.3"]),
    "another member's tensor": (with_tensor("residual.row_core.0", numbers(3, 4)), [f"{LAYER}.residual.row_core.0"]),
    "missing core": (without("transform.core.1"), [f"{CORE}.1", "missing"]),
    "missing last core": (without("transform.core.2"), [f"{CORE}.2", "missing"]),
    "missing transform": (without(*(f"transform.core.{d}" for d in range(3))), [f"{CORE}.0", "missing"]),
    "missing factor": (without("residual.lora_B.weight"), [B, "missing"]),
    "missing residual": (without("residual.lora_A.weight", "residual.lora_B.weight"), [A, "missing"]),
    "NaN": (with_value("transform.core.2", float("nan")), [f"{CORE}.2", "1 of 50"]),
    "infinity": (with_value("residual.lora_A.weight", float("inf")), [A, "1 of 60"]),
    "integers": (with_tensor("residual.lora_B.weight", numbers(20, 4).int()), [B, "int32"]),
    "booleans": (with_tensor("residual.lora_B.weight", numbers(20, 4) > 0), [B, "bool"]),
    "eight-bit floats": (
        with_tensor("residual.lora_B.weight", numbers(20, 4).to(torch.float8_e4m3fn)),
        [B, "float8_e4m3fn"],
    ),
    "dimensions": (with_tensor("transform.core.1", numbers(3, 1)), [f"{CORE}.1", "(3, 1)", "4 dimensions"]),
    "an open ring": (with_tensor("transform.core.1", numbers(1, 1, 2, 1)), [f"{CORE}.0", "rank 3", "core.1", "rank 2"]),
    "a rectangular core": (with_tensor("transform.core.1", numbers(1, 2, 3, 1)), [f"{CORE}.1", "1", "2"]),
    "factors that do not meet": (with_tensor("residual.lora_B.weight", numbers(20, 3)), [A, "(4, 15)", "(20, 3)"]),
    "inputs that do not multiply": (with_tensor("residual.lora_A.weight", numbers(4, 16)), [LAYER, "15", "16"]),
    "outputs that do not multiply": (with_tensor("residual.lora_B.weight", numbers(21, 4)), [LAYER, "21", "20"]),
    "an empty tensor": (with_tensor("residual.lora_B.weight", torch.zeros(0, 4)), [LAYER, "0", "20"]),
    "rank zero": (
        lambda t, c: t.update({A: torch.zeros(0, 15), B: torch.zeros(20, 0)}),
        [f"{LAYER}.residual.rank", "4", "0"],
    ),
    "no such module": (
        moved(f"{BLOCK}.attn2.to_kk"),
        [f"{BLOCK}.attn2.to_kk", f"the nearest existing name is '{LAYER}'"],
    ),
    "a module that is not linear": (moved("norm"), ["norm", "no such linear layer"]),
    "no tensors": (lambda t, c: t.clear(), ["no tensors"]),
}


@pytest.mark.parametrize(("change", "expected"), TENSORS_REFUSED.values(), ids=TENSORS_REFUSED)
def test_tensors_that_are_refused(change: Callable[[Tensors, Config], None], expected: list[str], target: Path) -> None:
    tensors, config = small()
    change(tensors, config)
    refused(write(target, tensors, config), *expected)


RING, RANK_4 = "tensor_ring", {"type": "low_rank", "rank": 4}

CONTRADICTIONS = {
    "rank": (with_field("transform", rank=2), [f"{LAYER}.transform.rank", "2", "[2, 3, 1]"]),
    "ranks": (with_field("transform", rank=[2, 1, 3]), [f"{LAYER}.transform.rank", "[2, 3, 1]"]),
    "number of ranks": (with_field("transform", rank=[2, 3]), [f"{LAYER}.transform.rank", "(2, 3)", "3"]),
    "modes": (with_field("transform", modes=[5, 1, 3]), [f"{LAYER}.transform.modes", "[5, 1, 3]", "[3, 1, 5]"]),
    "lower order": (with_type("transform", {"type": RING, "order": 2, "rank": 1}), [f"{CORE}.1", "core.0"]),
    "higher order": (with_field("transform", order=4, modes=None), [f"{CORE}.3", "missing"]),
    "low rank": (with_field("residual", rank=5), [f"{LAYER}.residual.rank", "5", "4"]),
    "type of the transform": (with_type("transform", {"type": "diagonal"}), [f"{LAYER}.transform.scale", "missing"]),
    "type of the residual": (with_type("residual", {"type": RING}), [f"{LAYER}.residual.row_core.0", "missing"]),
    "no transform": (with_type("transform", {"type": "identity"}), [f"{CORE}.0", "identity"]),
    "no residual": (with_type("residual", {"type": "none"}), [A, "none"]),
    "an override for nothing": (
        lambda t, c: c["overrides"].update({f"{LAYER}x": {"residual": RANK_4}}),
        [f"{LAYER}x", f"the nearest existing name is '{LAYER}'"],
    ),
}


@pytest.mark.parametrize(("change", "expected"), CONTRADICTIONS.values(), ids=CONTRADICTIONS)
def test_a_config_that_contradicts_the_tensors_is_refused(
    change: Callable[[Tensors, Config], None], expected: list[str], target: Path
) -> None:
    tensors, config = small()
    change(tensors, config)
    refused(write(target, tensors, config), *expected)


def test_other_contradictions_of_members_name_their_field(target: Path) -> None:
    tensors = {f"{LAYER}.transform.skew": numbers(5, 3)}
    config = {**small()[1], "default": {"transform": {"type": "block_orthogonal", "block_size": 5}}}
    refused(write(target, tensors, config), f"{LAYER}.transform.block_size", "5", "3")
    tensors = {f"{LAYER}.transform.skew": numbers(3, 9)}
    refused(write(target.with_stem("other"), tensors, config), f"{LAYER}.transform.skew", "9 entries")


def test_an_open_residual_ring_names_its_core(target: Path) -> None:
    shapes = {"row_core.0": (4, 2, 3), "row_core.1": (5, 3, 2), "column_core.0": (3, 2, 1), "column_core.1": (5, 3, 2)}
    tensors = {f"{LAYER}.residual.{name}": numbers(*shape) for name, shape in shapes.items()}
    config = {**small()[1], "default": {"residual": {"type": RING, "order": 2, "rank": [2, 3, 2, 3]}}}
    refused(write(target, tensors, config), f"{LAYER}.residual.column_core.0", "rank 1", "column_core.1", "rank 3")
    tensors[f"{LAYER}.residual.column_core.0"] = numbers(3, 2, 3)
    load_adapter(write(target.with_stem("good"), tensors, config)).bind(shapes_of(tiny_unet()))


def configured(**fields: Any) -> Callable[[Config], object]:
    return lambda config: {**config, **fields}


CONFIGS_REFUSED = {
    "newer version": (configured(format_version=2), ["format_version 2", "1"]),
    "far newer version": (configured(format_version=10**30), ["format_version"]),
    "version zero": (configured(format_version=0), ["format_version"]),
    "version as text": (configured(format_version="1"), ["format_version"]),
    "version as truth": (configured(format_version=True), ["format_version"]),
    "another format": (configured(format="lora"), ["'lora'", "'trlora'"]),
    "no format": (lambda c: {k: v for k, v in c.items() if k != "format"}, ["format"]),
    "a PEFT config": (lambda c: {"peft_type": "LORA", "r": 4}, ["trlora"]),
    "a list": (lambda c: [c], ["list"]),
    "null": (lambda c: None, ["NoneType"]),
    "unknown field": (configured(override={}), ["'override'", "nearest existing name is 'overrides'"]),
    "unknown part": (lambda c: {**c, "default": {**c["default"], "scale": 2}}, ["scale"]),
    "no default": (lambda c: {k: v for k, v in c.items() if k != "default"}, ["default"]),
    "default as text": (configured(default="tensor_ring"), ["default"]),
    "overrides as list": (configured(overrides=[]), ["overrides"]),
    "strength NaN": (configured(strength=float("nan")), ["strength"]),
    "strength infinite": (configured(strength=float("inf")), ["strength"]),
    "strength beyond floats": (configured(strength=10**400), ["strength"]),
    "strength as text": (configured(strength="1"), ["strength"]),
    "strength as truth": (configured(strength=True), ["strength"]),
    "base model as text": (configured(base_model="sd15"), ["base_model", "sd15"]),
    "base model as list": (configured(base_model=[]), ["base_model"]),
    "base model with numbers": (configured(base_model={"sha256": 5}), ["base_model.sha256", "5"]),
    "unknown field of the base model": (configured(base_model={"hash": "x"}), ["hash"]),
    "unknown type": (configured(default={"transform": {"type": "tensor_rng"}}), ["tensor_rng", "'tensor_ring'"]),
    "no type": (configured(default={"transform": {"order": 3}}), ["type"]),
    "unknown field of a member": (
        configured(default={"transform": {"type": "tensor_ring", "ranks": 2}}),
        ["ranks", "nearest existing name is 'rank'"],
    ),
    "alpha beyond floats": (configured(default={"residual": {**RANK_4, "alpha": 10**400}}), ["alpha"]),
}


@pytest.mark.parametrize(("change", "expected"), CONFIGS_REFUSED.values(), ids=CONFIGS_REFUSED)
def test_configs_that_are_refused(change: Callable[[Config], object], expected: list[str], target: Path) -> None:
    tensors, config = small()
    refused(write(target, tensors, change(copy.deepcopy(config))), *expected)


@pytest.mark.parametrize("text", [b"", b"{", b"\xff\xfe", b"[" * 100_000, b"not JSON"], ids=lambda text: repr(text[:8]))
def test_a_config_that_is_not_json_is_refused(text: bytes, tmp_path: Path) -> None:
    path = write(tmp_path / "adapter", *small())
    (path / CONFIG).write_bytes(text)
    refused(path, CONFIG, "not JSON")


def test_metadata_that_is_not_json_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "adapter.safetensors"
    safetensors.torch.save_file(small()[0], path, metadata={"trlora": "{"})
    refused(path, "'trlora'", "not JSON")


@pytest.mark.parametrize("metadata", [None, {"format": "pt"}])
def test_a_file_of_another_program_is_refused(metadata: dict[str, str] | None, tmp_path: Path) -> None:
    path = tmp_path / "adapter.safetensors"
    safetensors.torch.save_file(small()[0], path, metadata=metadata)
    refused(path, "'trlora'", "'format'" if metadata else "none")


@pytest.mark.parametrize("name", [WEIGHTS, CONFIG])
def test_a_folder_without_one_of_its_files_is_refused(name: str, tmp_path: Path) -> None:
    path = write(tmp_path / "adapter", *small())
    (path / name).unlink()
    refused(path, name)


def test_nothing_there_is_said_so(target: Path) -> None:
    with pytest.raises(FileNotFoundError, match=target.name):
        load_adapter(target)


def weights_of(path: Path) -> Path:
    return path / WEIGHTS if path.is_dir() else path


@pytest.mark.parametrize("length", [0, 1, 7, 8, 100, -1])
def test_a_truncated_file_is_refused(length: int, target: Path) -> None:
    file = weights_of(write(target, *small()))
    file.write_bytes(file.read_bytes()[:length])
    refused(target, "truncated")


def test_bytes_at_the_end_are_refused(target: Path) -> None:
    file = weights_of(write(target, *small()))
    file.write_bytes(file.read_bytes() + b"\0")
    refused(target, "corrupt")


@pytest.mark.parametrize("seed", range(5))
def test_random_bytes_are_refused(seed: int, target: Path) -> None:
    file = weights_of(write(target, *small()))
    generator = torch.Generator().manual_seed(seed)
    file.write_bytes(bytes(torch.randint(256, (4096,), generator=generator).tolist()))
    refused(target, "corrupt")


class _Trap:
    """Makes a file when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.mark,)


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_a_pickle_is_refused_and_never_read(zipped: bool, target: Path) -> None:
    mark = target.parent / "executed"
    file = weights_of(write(target, *small()))
    torch.save({"a": _Trap(mark)}, file, _use_new_zipfile_serialization=zipped)
    refused(target, "pickle")
    assert not mark.exists()
    torch.load(io.BytesIO(file.read_bytes()), weights_only=False)  # the trap is real
    assert mark.exists()


def test_a_refusal_of_many_layers_names_the_first_and_counts_the_rest(target: Path) -> None:
    save_adapter(trained_adapter(), target)
    with pytest.raises(CheckpointError, match=rf"{BLOCK}\.attn\d.*7 more of 8 layers"):
        load_adapter(target).bind({})


def test_parts_for_other_models_are_not_passed_over(target: Path) -> None:
    own = trained_adapter()
    save_adapter(replace(own, layers={}, components={"text_encoder": own}), target)
    loaded = load_adapter(target)
    with pytest.raises(CheckpointError, match="has parts for text_encoder"):
        loaded.bind(shapes_of(tiny_unet()))
    assert len(loaded.components["text_encoder"].bind(shapes_of(tiny_unet()))) == len(own.layers)


def test_a_layer_of_another_width_is_refused(target: Path) -> None:
    save_adapter(trained_adapter(), target)
    shapes = {**shapes_of(tiny_unet()), LAYER: (20, 30)}
    with pytest.raises(CheckpointError, match=rf"{LAYER}.*15.*20.*30"):
        load_adapter(target).bind(shapes)


def test_binding_to_an_adapted_model_sees_the_layers_beneath(target: Path) -> None:
    """A second adapter beside the first: the order does not matter, and both are removed together."""
    model = tiny_unet()
    sample = tiny_inputs()
    plain = bits(model(*sample))
    attach_(model, trained_adapter(0).bind(shapes_of(model)), name="one")
    save_adapter(trained_adapter(1), target)
    attach_(model, load_adapter(target).bind(shapes_of(model)), name="two", strength=0.5)
    assert bits(model(*sample)) != plain
    remove_(model)
    assert bits(model(*sample)) == plain


def test_a_config_round_trips_through_json() -> None:
    config = AdapterConfig(
        default=spec_of(),
        overrides={
            "b": AdapterSpec.from_dict({"residual": RANK_4}),
            "a": AdapterSpec.from_dict({"transform": {"type": RING, "rank": [2, 3, 1]}}),
        },
        strength=-0.5,
        base_model=BaseModel("x", None, "00ff"),
    )
    data = json.loads(json.dumps(config.to_dict()))
    assert AdapterConfig.from_dict(data) == config
    assert list(data["overrides"]) == ["a", "b"]  # sorted, for the same bytes
