"""Adapters of PEFT: weight and output must be those of PEFT itself."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from tests.helpers import state_bits
from tests.trexport.formats.peft_models import (
    CASES,
    CONVOLUTIONS,
    LINEAR,
    METHODS,
    Case,
    Layers,
    adapted_by_peft,
    put_kernel,
    save,
)
from tests.trexport.helpers import SIZES
from trexport.formats import read_adapter
from trexport.formats.peft import METHODS as METHOD_REGISTRY
from trexport.models.adapters import open_adapters
from trexport.models.architectures import spec_of
from trexport.models.base import Base
from trexport.models.model import attach_all_, first_output, load_model, merge_into_, random_feeds
from trlora import adapted_modules, attach_, load_adapter, merge_, save_adapter, set_strengths_, shapes_of

pytestmark = pytest.mark.filterwarnings("ignore:.*:UserWarning")
each_case = pytest.mark.parametrize("name", CASES)


def layers() -> Layers:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        return Layers().double().requires_grad_(False)


def inputs() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(5)
    return (
        torch.randn(2, 3, 24, generator=generator, dtype=torch.float64),
        torch.randn(2, 8, 9, 10, generator=generator, dtype=torch.float64),
    )


def targets_of(case: Case) -> list[str]:
    return [*LINEAR, *CONVOLUTIONS, *case.odd]


def close(actual: Tensor, expected: Tensor, limit: float) -> None:
    scale = float(expected.abs().max())
    torch.testing.assert_close(actual.detach(), expected.detach(), rtol=0, atol=limit * scale, check_stride=False)


@each_case
def test_merged_weight_and_unmerged_output_are_pefts(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = CASES[name]
    put_kernel(monkeypatch, there=case.needs_kernel)
    theirs = adapted_by_peft(layers(), case, targets_of(case))
    adapter = read_adapter(save(theirs, tmp_path / "adapter"))
    assert adapter.format.startswith("PEFT ")
    assert adapter.parameters == sum(p.numel() for p in theirs.parameters() if p.requires_grad) - _symmetric(theirs)
    ours, plain = layers(), layers()
    attach_(ours, adapter.bind(shapes_of(ours)), strength=adapter.config.strength)
    assert set(adapted_modules(ours)) == set(targets_of(case))

    found, expected, base = ours(*inputs()), theirs(*inputs()), plain(*inputs())
    for target in targets_of(case):
        assert (found[target] - base[target]).abs().max() > 1e-2
        if target not in case.wrong_forward:
            close(found[target], expected[target], case.limit)
    merge_(ours, torch.float64)
    theirs = theirs.merge_and_unload()
    for key, tensor in theirs.state_dict().items():
        close(ours.state_dict()[key], tensor, case.limit)
    for target, output in ours(*inputs()).items():
        close(output, found[target], 1e-12)


def _symmetric(theirs: nn.Module) -> int:
    """The entries of BOFT's square blocks that their skew parts do not have."""
    blocks = [p for key, p in theirs.named_parameters() if "boft_R" in key]
    return sum(p.numel() - p[..., 0].numel() * (p.shape[-1] - 1) // 2 for p in blocks)


def test_every_method_is_tried() -> None:
    assert {CASES[name].config().peft_type.value for name in METHODS} == set(METHOD_REGISTRY)


@pytest.mark.parametrize("name", ["OFT", "OFT, exact"])
def test_pefts_own_forward_is_wrong_where_we_do_not_follow_it(name: str) -> None:
    """A later PEFT may mend it: then the exceptions above can go."""
    case = CASES[name]
    theirs = adapted_by_peft(layers(), case, [*LINEAR, *CONVOLUTIONS])
    outputs = theirs(*inputs())
    merged = theirs.merge_and_unload()(*inputs())
    assert all((outputs[target] - merged[target]).abs().max() > 0.1 for target in case.wrong_forward)


@pytest.mark.parametrize("name", METHODS)
def test_strength_goes_from_the_base_to_the_adapter(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    case = CASES[name]
    put_kernel(monkeypatch, there=False)
    adapter = read_adapter(save(adapted_by_peft(layers(), case, targets_of(case)), tmp_path / "adapter"))
    ours, plain = layers(), layers()
    attach_(ours, adapter.bind(shapes_of(ours)))
    whole, base = ours(*inputs()), plain(*inputs())
    set_strengths_(ours, {"default": 0.25})
    for target, output in ours(*inputs()).items():
        close(output, base[target] + 0.25 * (whole[target] - base[target]), 1e-11)
    set_strengths_(ours, {"default": 0.0})
    assert all(torch.equal(output, base[target]) for target, output in ours(*inputs()).items())


@each_case
def test_as_a_checkpoint_of_ours_it_is_the_same(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    case = CASES[name]
    put_kernel(monkeypatch, there=case.needs_kernel)
    adapter = read_adapter(save(adapted_by_peft(layers(), case, targets_of(case)), tmp_path / "adapter"))
    save_adapter(adapter, tmp_path / "ours")
    again = load_adapter(tmp_path / "ours")
    assert again.config == adapter.config
    models = [layers(), layers()]
    for model, each in zip(models, (adapter, again), strict=True):
        attach_(model, each.bind(shapes_of(model)))
        merge_(model)
    assert state_bits(models[0]) == state_bits(models[1])


# --- a true UNet -------------------------------------------------------------------------------------------------------

UNET_TARGETS = (
    r".*(attn\d\.to_[qkv]|to_out\.0|ff\.net\.0\.proj|ff\.net\.2|proj_in|resnets\.\d\.conv[12]|conv_shortcut|"
    r"samplers\.0\.conv)"
)
UNET_FIELDS: dict[str, dict[str, object]] = {"(IA)³": {"feedforward_modules": [f"ff.net.{n}" for n in ("0.proj", "2")]}}


@pytest.mark.parametrize("name", METHODS)
def test_a_unet_draws_what_pefts_draws(name: str, base: Base, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    case = CASES[name]
    case = Case(case.config, {**case.fields, **UNET_FIELDS.get(name, {})}, amount=0.03)
    put_kernel(monkeypatch, there=False)
    plain = load_model(base)
    theirs = adapted_by_peft(plain, case, UNET_TARGETS)
    (bound,) = open_adapters([str(save(theirs, tmp_path / "any-name"))], base)
    assert len(bound.layers) == len(_targets(theirs))
    feeds = random_feeds(spec_of(base.config, "fp32"), SIZES)
    attached, merged = load_model(base), load_model(base)
    attach_all_(attached, [bound])
    merge_into_(merged, [bound])
    with torch.inference_mode():
        unmerged = None if case.config is CASES["OFT"].config else first_output(theirs.get_base_model(), feeds)
        found = first_output(attached, feeds)
        moved = float((found - first_output(plain, feeds)).abs().max())
        theirs = theirs.merge_and_unload()
        expected = first_output(theirs, feeds)
        assert moved > 1e-2
        for output in (found, first_output(merged, feeds), *([] if unmerged is None else [unmerged])):
            torch.testing.assert_close(output, expected, rtol=0, atol=1e-4)
    weights = theirs.state_dict()
    for key, tensor in merged.state_dict().items():
        torch.testing.assert_close(tensor, weights[key], rtol=0, atol=1e-5)


def _targets(theirs: nn.Module) -> Sequence[str]:
    return [path for path, module in theirs.named_modules() if hasattr(module, "base_layer")]
