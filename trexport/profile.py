"""The sizes that an engine is built for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self, final

from trexport.errors import UsageError
from trexport.io_spec import FREE_AXES, ModelSpec, TensorSpec

_HELP = (
    "expected BATCHxHEIGHTxWIDTHxTOKENS, the least, the usual and the greatest with commas between them "
    "(1x64x64x77,2x64x64x77,8x96x96x77; a single one fixes them), or the same by tensor "
    "(sample=1x4x64x64,2x4x64x64,8x4x96x96;encoder_hidden_states=1x77x768,2x77x768,8x77x768)"
)


@final
@dataclass(frozen=True)
class Profile:
    """Sizes of the axes in `trexport.io_spec.FREE_AXES`: the least, those to be fastest at, the greatest."""

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
        short = ["x".join(str(sizes[axis]) for axis in FREE_AXES) for sizes in (self.min, self.opt, self.max)]
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
        usual: a size for every axis.

    Raises:
        UsageError: not of that form, a tensor or shape that the model does not have, sizes that contradict each other, that
            the model fixes otherwise, or that do not grow from least to greatest.
    """
    found: list[dict[str, int]] = [{}, {}, {}]
    if "=" in text:
        by_name = {tensor.name: tensor for tensor in spec.inputs}
        for part in text.split(";"):
            name, _, shapes = part.strip().partition("=")
            if name not in by_name:
                raise UsageError(f"profile {text!r}: the model has no input {name!r}, it has {list(by_name)}")
            for sizes, shape in zip(found, _three(shapes, text), strict=True):
                _read(by_name[name], shape, sizes, text)
    else:
        for sizes, shape in zip(found, _three(text, text), strict=True):
            if len(shape) != len(FREE_AXES):
                raise UsageError(f"profile {text!r}: {_HELP}")
            sizes |= dict(zip(FREE_AXES, shape, strict=True))
    least, best, most = ({axis: sizes.get(axis, usual[axis]) for axis in FREE_AXES} for sizes in found)
    fixed = spec.fixed_sizes()
    for axis in FREE_AXES:
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


def _three(text: str, whole: str) -> list[tuple[int, ...]]:
    shapes = []
    for item in text.split(","):
        sizes = item.strip().split("x")
        if not all(size.isdecimal() for size in sizes):
            raise UsageError(f"profile {whole!r}: {_HELP}")
        shapes.append(tuple(int(size) for size in sizes))
    if len(shapes) == 1:
        shapes *= 3
    if len(shapes) != 3:
        raise UsageError(f"profile {whole!r}: {len(shapes)} shapes, expected one or three; {_HELP}")
    return shapes


def _read(tensor: TensorSpec, shape: tuple[int, ...], sizes: dict[str, int], whole: str) -> None:
    expected = list(tensor.axes)
    if len(shape) != len(expected):
        raise UsageError(f"profile {whole!r}: {tensor.name} has axes {expected}, {len(shape)} sizes found")
    for axis, size in zip(expected, shape, strict=True):
        if isinstance(axis, int):
            if size != axis:
                raise UsageError(f"profile {whole!r}: {tensor.name} is {expected}, {list(shape)} found")
        elif sizes.setdefault(axis, size) != size:
            raise UsageError(f"profile {whole!r}: {axis} is {sizes[axis]} for one input and {size} for {tensor.name}")
