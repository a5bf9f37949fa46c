"""The sizes that an engine is built for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self, final

from trexport.errors import UsageError
from trexport.io_spec import ModelSpec, TensorSpec, parts_of

_HELP = (
    "expected {axes}, the least, the usual and the greatest with commas between them ({usual},{usual},{usual}; a single one "
    "fixes them), or the same by tensor (sample=1x4x64x64,2x4x64x64,8x4x96x96)"
)


@final
@dataclass(frozen=True)
class Profile:
    """Sizes of all the model's axes, in the architecture's order: the least, those to be fastest at, the greatest."""

    min: Mapping[str, int]
    opt: Mapping[str, int]
    max: Mapping[str, int]

    @property
    def fixed(self) -> dict[str, int]:
        """The axes that have one size only."""
        return {axis: size for axis, size in self.opt.items() if self.min[axis] == self.max[axis]}

    def holds(self, sizes: Mapping[str, int]) -> bool:
        """Whether an engine of this profile takes inputs of these sizes."""
        return all(self.min[axis] <= size <= self.max[axis] for axis, size in sizes.items())

    def shapes(self, tensor: TensorSpec) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
        """The least, usual and greatest shape of an input."""
        return tensor.shape(self.min), tensor.shape(self.opt), tensor.shape(self.max)

    def __str__(self) -> str:
        short = ["x".join(str(sizes[axis]) for axis in self.opt) for sizes in (self.min, self.opt, self.max)]
        return short[1] if len(set(short)) == 1 else ",".join(short)

    def to_dict(self) -> dict[str, Any]:
        return {"min": dict(self.min), "opt": dict(self.opt), "max": dict(self.max)}

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> Self:
        return cls(fields["min"], fields["opt"], fields["max"])

    @classmethod
    def of(cls, sizes: Mapping[str, int]) -> Self:
        """One size for every axis."""
        return cls(dict(sizes), dict(sizes), dict(sizes))


def parse_profile(text: str, spec: ModelSpec, usual: Mapping[str, int]) -> Profile:
    """A profile as it is typed: `1x64x64x77,2x64x64x77,8x96x96x77`, or tensor by tensor in trtexec's order,
    `sample=1x4x64x64,2x4x64x64,8x4x96x96`; axes that no given tensor has keep their usual size.

    Args:
        spec: the inputs that the engine takes.
        usual: a size for every axis, in the order that sizes are written in.

    Raises:
        UsageError: not of that form, a tensor or shape that the model does not have, sizes that contradict each other, that
            the model fixes otherwise, or that do not grow from least to greatest.
    """
    found: list[dict[str, int]] = [{}, {}, {}]
    help_text = _HELP.format(axes="x".join(axis.upper() for axis in usual), usual="x".join(map(str, usual.values())))
    if "=" in text:
        by_name = {tensor.name: tensor for tensor in spec.inputs}
        for part in text.split(";"):
            name, _, shapes = part.strip().partition("=")
            if name not in by_name:
                raise UsageError(f"profile {text!r}: the model has no input {name!r}, it has {list(by_name)}")
            for sizes, shape in zip(found, _three(shapes, text, help_text), strict=True):
                _read(by_name[name], shape, sizes, text)
    else:
        for sizes, shape in zip(found, _three(text, text, help_text), strict=True):
            if len(shape) != len(usual):
                raise UsageError(f"profile {text!r}: {help_text}")
            sizes |= dict(zip(usual, shape, strict=True))
    least, best, most = ({axis: sizes.get(axis, usual[axis]) for axis in usual} for sizes in found)
    fixed = spec.fixed_sizes()
    for axis in usual:
        if not 1 <= least[axis] <= best[axis] <= most[axis]:
            raise UsageError(
                f"profile {text!r}: {axis} goes {least[axis]}, {best[axis]}, {most[axis]}; expected the least, the usual "
                "and the greatest size, in this order"
            )
        if axis in fixed and (least[axis], most[axis]) != (fixed[axis], fixed[axis]):
            raise UsageError(
                f"profile {text!r}: {axis} from {least[axis]} to {most[axis]}, the model fixes it at {fixed[axis]}; "
                "export it with that axis free"
            )
    return Profile(least, best, most)


def _three(text: str, whole: str, help_text: str) -> list[tuple[int, ...]]:
    shapes = []
    for item in text.split(","):
        sizes = item.strip().split("x")
        if not all(size.isdecimal() for size in sizes):
            raise UsageError(f"profile {whole!r}: {help_text}")
        shapes.append(tuple(int(size) for size in sizes))
    if len(shapes) == 1:
        shapes *= 3
    if len(shapes) != 3:
        raise UsageError(f"profile {whole!r}: {len(shapes)} shapes, expected one or three; {help_text}")
    return shapes


def _read(tensor: TensorSpec, shape: tuple[int, ...], sizes: dict[str, int], whole: str) -> None:
    expected = list(tensor.axes)
    if len(shape) != len(expected):
        raise UsageError(f"profile {whole!r}: {tensor.name} has axes {expected}, {len(shape)} sizes found")
    for axis, size in zip(expected, shape, strict=True):
        if isinstance(axis, int):
            if size != axis:
                raise UsageError(f"profile {whole!r}: {tensor.name} is {expected}, {list(shape)} found")
            continue
        name, times, over = parts_of(axis)
        own = size * over // times
        if sizes.setdefault(name, own) != own or own * times // over != size:
            raise UsageError(f"profile {whole!r}: {name} is {sizes[name]} for one input and {own} for {tensor.name}")
