"""Profiles as they are typed."""

from __future__ import annotations

import pytest

from trexport.errors import UsageError
from trexport.io_spec import ModelSpec
from trexport.models.architectures import spec_of
from trexport.models.base import Base
from trexport.profile import Profile, parse_profile

USUAL = {"batch_size": 2, "height": 64, "width": 64, "sequence_length": 77}


@pytest.fixture(scope="module")
def spec(base: Base) -> ModelSpec:
    return spec_of(base.config, "fp32")


def sizes(*values: int) -> dict[str, int]:
    return dict(zip(USUAL, values, strict=True))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("1x64x64x77,2x64x64x77,8x96x96x77", ((1, 64, 64, 77), (2, 64, 64, 77), (8, 96, 96, 77))),
        ("4x32x48x9", ((4, 32, 48, 9),) * 3),
        ("sample=1x4x64x64,2x4x64x64,8x4x96x96", ((1, 64, 64, 77), (2, 64, 64, 77), (8, 96, 96, 77))),
        (
            "sample=1x4x64x64,2x4x64x64,8x4x96x96; encoder_hidden_states=1x5x24,2x6x24,8x7x24",
            ((1, 64, 64, 5), (2, 64, 64, 6), (8, 96, 96, 7)),
        ),
        ("encoder_hidden_states=3x5x24", ((3, 64, 64, 5),) * 3),
    ],
)
def test_both_forms(text: str, expected: tuple[tuple[int, ...], ...], spec: ModelSpec) -> None:
    profile = parse_profile(text, spec, USUAL)
    assert (profile.min, profile.opt, profile.max) == tuple(sizes(*values) for values in expected)
    assert Profile.from_dict(profile.to_dict()) == profile
    assert parse_profile(str(profile), spec, USUAL) == profile


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "expected"),
        ("2x64x64", "expected"),
        ("2x64x64x77,2x64x64x77", "2 shapes"),
        ("ax64x64x77", "expected"),
        ("0x64x64x77", "batch_size goes 0"),
        ("2x64x64x77,1x64x64x77,8x64x64x77", "batch_size goes 2, 1, 8"),
        ("noise=1x4x64x64", "no input 'noise'"),
        ("sample=1x3x64x64", r"\[1, 3, 64, 64\] found"),
        ("sample=1x4x64", "3 sizes found"),
        ("sample=1x4x64x64;encoder_hidden_states=2x5x24", "batch_size is 1 for one input and 2"),
    ],
)
def test_wrong_ones(text: str, says: str, spec: ModelSpec) -> None:
    with pytest.raises(UsageError, match=says):
        parse_profile(text, spec, USUAL)


def test_axes_that_the_model_fixes(base: Base) -> None:
    fixed = spec_of(base.config, "fp32", {"height": 64})
    assert parse_profile("1x64x32x5,2x64x64x5,2x64x96x5", fixed, USUAL).fixed == {"height": 64, "sequence_length": 5}
    with pytest.raises(UsageError, match="the model fixes it at 64"):
        parse_profile("1x64x64x5,2x96x64x5,2x96x96x5", fixed, USUAL)


def test_what_it_holds() -> None:
    profile = Profile(sizes(1, 8, 8, 5), sizes(2, 8, 8, 5), sizes(4, 16, 8, 5))
    assert profile.holds({"batch_size": 4, "height": 8})
    assert not profile.holds({"batch_size": 5, "height": 8})
    assert not profile.holds({"sequence_length": 4})
