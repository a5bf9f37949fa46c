from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.helpers import bias_oracle, bits, state_bits, trained, weight_oracle
from trlora import (
    AdaptedConv2d,
    AdapterSpec,
    CheckpointError,
    LayerAdapter,
    ShapeError,
    TargetError,
    adapter_from_model,
    attach_,
    find_targets,
    inject_,
    load_adapter,
    merge_,
    remove_,
    save_adapter,
    shapes_of,
)

GEOMETRIES: dict[str, dict[str, Any]] = {
    "1×1": {"kernel_size": 1},
    "3×3, padded": {"kernel_size": 3, "padding": 1},
    "strides": {"kernel_size": 3, "stride": (2, 1), "padding": (1, 2)},
    "1×3, dilated": {"kernel_size": (1, 3), "dilation": (1, 2), "padding": "same"},
    "reflected": {"kernel_size": 3, "padding": 1, "padding_mode": "reflect"},
    "groups": {"kernel_size": 3, "groups": 2, "padding": 1},
    "no bias": {"kernel_size": (3, 2), "bias": False},
}
PARTS: dict[str, dict[str, Any]] = {
    "LoRA": {"residual": {"type": "low_rank", "rank": 2, "alpha": 3.0}},
    "DoRA": {"residual": {"type": "low_rank", "rank": 2}, "magnitude": {"type": "norm"}},
    "TLoRA": {"transform": {"type": "tensor_ring"}, "residual": {"type": "tensor_ring", "rank": 2}},
    "HRA": {"transform": {"type": "householder", "rank": 2}},
    "OFT and a scale": {
        "transform": {"type": "block_orthogonal", "block_size": 3},
        "magnitude": {"type": "scale", "bias": True},
    },
}
STRENGTHS = [1.0, 0.3, -1.75]

each_geometry = pytest.mark.parametrize("geometry", GEOMETRIES)
each_kind = pytest.mark.parametrize("kind", PARTS)


def conv(geometry: str, dtype: torch.dtype = torch.float64) -> nn.Conv2d:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        return nn.Conv2d(6, 10, **GEOMETRIES[geometry], dtype=dtype).requires_grad_(False)


def adapter_on(base: nn.Conv2d, kind: str, seed: int = 0) -> LayerAdapter:
    weight = base.weight.flatten(1)
    spec = AdapterSpec.from_dict(PARTS[kind])
    generator = torch.Generator().manual_seed(seed)
    if kind == "OFT and a scale" and weight.shape[1] % 3:
        spec = AdapterSpec.from_dict({**PARTS[kind], "transform": {"type": "block_orthogonal", "block_size": 2}})
    return LayerAdapter.from_spec(spec, weight.shape[1], weight.shape[0], generator, weight)


def by_patches(base: nn.Conv2d, weight: Tensor, bias: Tensor | None, x: Tensor) -> Tensor:
    """A convolution from `unfold` and one product a group; padded by hand where the padding is not of zeros."""
    kernel, padding = base.kernel_size, base.padding
    if padding == "same":
        padding = tuple(d * (k - 1) // 2 for d, k in zip(base.dilation, kernel, strict=True))
    assert not isinstance(padding, str)
    if base.padding_mode != "zeros":
        x, padding = nn.functional.pad(x, [padding[1]] * 2 + [padding[0]] * 2, base.padding_mode), (0, 0)
    sizes = [
        (x.shape[2 + n] + 2 * padding[n] - base.dilation[n] * (kernel[n] - 1) - 1) // base.stride[n] + 1 for n in (0, 1)
    ]
    outputs = []
    for part, rows in zip(x.chunk(base.groups, 1), weight.chunk(base.groups), strict=True):
        patches = nn.functional.unfold(part, kernel, base.dilation, padding, base.stride)
        outputs.append(rows.flatten(1) @ patches)
    y = torch.cat(outputs, 1).unflatten(-1, sizes)
    return y if bias is None else y + bias[:, None, None]


def close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual.detach(), expected.detach(), rtol=1e-11, atol=1e-11)


@each_geometry
@each_kind
def test_forward_and_merged_weight_are_the_formula(geometry: str, kind: str) -> None:
    base = conv(geometry)
    layer = AdaptedConv2d(base)
    layer.add("a", trained(adapter_on(base, kind)))
    x = torch.randn(2, 6, 8, 7, dtype=torch.float64)
    for strength in STRENGTHS:
        layer.set_strength("a", strength)
        weight = torch.from_numpy(weight_oracle(base.weight.flatten(1), layer.active())).reshape(base.weight.shape)
        bias = None if base.bias is None else torch.from_numpy(bias_oracle(base.bias, layer.active()))
        close(layer(x), by_patches(base, weight, bias, x))
        close(layer.merged_weight(torch.float64), weight)
    assert (layer(x) - base(x)).abs().max() > 1e-2


@each_geometry
def test_the_oracle_of_the_patches_is_a_convolution(geometry: str) -> None:
    base = conv(geometry)
    x = torch.randn(2, 6, 8, 7, dtype=torch.float64)
    close(by_patches(base, base.weight, base.bias, x), base(x))


@each_kind
def test_the_start_and_strength_zero_are_the_base_bit_for_bit(kind: str) -> None:
    base = conv("3×3, padded", torch.float32)
    x = torch.randn(2, 6, 8, 7)
    for adapter, strength in ((adapter_on(base, kind), 0.7), (trained(adapter_on(base, kind)), 0.0)):
        layer = AdaptedConv2d(base)
        layer.add("a", adapter, strength)
        if kind in ("HRA",) and strength:  # reflections that undo each other to rounding
            torch.testing.assert_close(layer(x), base(x), rtol=1e-5, atol=1e-5)
            continue
        assert bits(layer(x)) == bits(base(x))
        assert bits(layer.merged_weight()) == bits(base.weight)


def test_several_adapters_add_up() -> None:
    base = conv("groups")
    layer = AdaptedConv2d(base)
    for number, kind in enumerate(PARTS):
        layer.add(f"a{number}", trained(adapter_on(base, kind), seed=number), 0.2 * number - 0.5)
    x = torch.randn(2, 6, 8, 7, dtype=torch.float64)
    weight = torch.from_numpy(weight_oracle(base.weight.flatten(1), layer.active())).reshape(base.weight.shape)
    assert base.bias is not None
    close(layer(x), by_patches(base, weight, torch.from_numpy(bias_oracle(base.bias, layer.active())), x))


def test_a_half_precision_base_takes_float32_adapters() -> None:
    base = conv("strides", torch.float32).bfloat16()
    layer = AdaptedConv2d(base)
    layer.add("a", trained(adapter_on(base, "LoRA")).float())
    x = torch.randn(2, 6, 8, 7).bfloat16()
    assert layer(x).dtype == layer.merged_weight().dtype == torch.bfloat16
    expected = nn.functional.conv2d(x.float(), layer.merged_weight().float(), base.bias.float(), (2, 1), (1, 2))  # type: ignore[union-attr]
    torch.testing.assert_close(layer(x).float(), expected, rtol=0.05, atol=0.05)


def test_it_looks_like_the_convolution_it_wraps() -> None:
    base = conv("strides")
    layer = AdaptedConv2d(base)
    for name in (
        "in_channels",
        "out_channels",
        "kernel_size",
        "stride",
        "padding",
        "dilation",
        "groups",
        "weight",
        "bias",
    ):
        assert getattr(layer, name) is getattr(base, name)


class Net(nn.Module):
    """A convolution of each geometry, and what is neither convolution nor linear."""

    def __init__(self, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        self.convs = nn.ModuleDict({f"c{n}": conv(geometry, dtype) for n, geometry in enumerate(GEOMETRIES)})
        self.norm = nn.GroupNorm(2, 6, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([module(self.norm(x)).sum((2, 3)) for module in self.convs.values()])


@each_kind
def test_inject_save_load_merge_and_remove(kind: str, tmp_path: Path) -> None:
    spec = {**PARTS[kind]}
    if kind == "OFT and a scale":
        spec["transform"] = {"type": "block_orthogonal", "block_size": 1}  # divides every width
    model, plain, again = Net(), Net(), Net()
    x = torch.randn(2, 6, 8, 7, dtype=torch.float64)
    before, expected = state_bits(model), model(x)
    paths = inject_(model, AdapterSpec.from_dict(spec), r"convs\..*")
    assert paths == [f"convs.c{n}" for n in range(len(GEOMETRIES))]
    trained(model.convs)  # only adapters have gradients; the bases are restored below
    for path in paths:
        model.get_submodule(path).base.load_state_dict(plain.get_submodule(path).state_dict())  # type: ignore[union-attr]
    moved = model(x)
    assert (moved - expected).abs().max() > 1e-2

    save_adapter(adapter_from_model(model), tmp_path / "adapter")
    loaded = load_adapter(tmp_path / "adapter")
    attach_(again, loaded.bind(shapes_of(again)))
    assert bits(again(x)) == bits(moved)
    merge_(again, torch.float64)
    assert all(isinstance(module, nn.Conv2d) for module in again.convs.values())
    close(again(x), moved)
    remove_(model)
    assert state_bits(model) == before


def test_a_scale_for_each_channel_is_for_every_tap_of_its_kernel() -> None:
    base = conv("3×3, padded")
    spec = AdapterSpec.from_dict({"transform": {"type": "diagonal"}})
    transform = spec.transform.from_tensors({"scale": torch.randn(6, dtype=torch.float64)})
    assert transform is not None
    layer = AdaptedConv2d(base)
    layer.add("a", LayerAdapter.from_parts(spec, transform.fitted(6, 54), None, 54, 10))
    x = torch.randn(2, 6, 8, 7, dtype=torch.float64)
    close(layer(x), base(x * transform.state_dict()["scale"][:, None, None]))
    assert transform.fitted(5, 54) is None


def test_an_adapter_of_another_kernel_is_refused() -> None:
    layer = AdaptedConv2d(conv("3×3, padded"))
    with pytest.raises(ShapeError, match=r"6 → 10.*54 → 10"):
        layer.add("a", adapter_on(conv("1×1"), "LoRA"))


def test_a_checkpoint_for_other_shapes_is_refused(tmp_path: Path) -> None:
    model = Net()
    inject_(model, AdapterSpec.from_dict(PARTS["LoRA"]), ["convs.c1"])
    adapter = adapter_from_model(model)
    with pytest.raises(CheckpointError, match=r"convs\.c1: for 54 → 10 features, the base's layer has 6 → 10"):
        adapter.bind({"convs.c1": (10, 6)})


def test_targets_are_linear_layers_and_convolutions() -> None:
    model = Net()
    assert list(find_targets(model, "convs.c3")) == ["convs.c3"]
    with pytest.raises(TargetError, match="GroupNorm"):
        find_targets(model, "norm")
