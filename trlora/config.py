"""The JSON of an adapter checkpoint, format version 1."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Self, final

from trlora.errors import SpecError, nearest
from trlora.fields import finite_number
from trlora.spec import AdapterSpec

FORMAT = "trlora"
FORMAT_VERSION = 1


@final
@dataclass(frozen=True)
class BaseModel:
    """What the adapter was trained on, as far as its author said; every field may be None."""

    name_or_path: str | None = None
    class_name: str | None = None
    sha256: str | None = None

    @classmethod
    def from_dict(cls, fields: Any) -> Self:
        if not isinstance(fields, Mapping):
            raise SpecError(f"base_model is {fields!r}, expected an object or null")
        values = [fields.get(name) for name in ("name_or_path", "class", "sha256")]
        for name, value in fields.items():
            if name not in ("name_or_path", "class", "sha256"):
                raise SpecError(f"base_model: unknown field {name!r}, expected name_or_path, class, sha256")
            if value is not None and not isinstance(value, str):
                raise SpecError(f"base_model.{name} is {value!r}, expected a string or null")
        return cls(*values)

    def to_dict(self) -> dict[str, str | None]:
        return {"name_or_path": self.name_or_path, "class": self.class_name, "sha256": self.sha256}


@final
@dataclass(frozen=True)
class AdapterConfig:
    """The JSON of a checkpoint."""

    default: AdapterSpec
    overrides: Mapping[str, AdapterSpec] = field(default_factory=dict)
    strength: float = 1.0
    base_model: BaseModel = field(default_factory=BaseModel)
    components: Mapping[str, AdapterConfig] = field(default_factory=dict)
    """Of other models of the pipeline, by name: their defaults and overrides; the rest is that of the whole."""

    @classmethod
    def from_dict(cls, fields: Any) -> Self:
        """Raises `SpecError` for anything that format version 1 does not allow."""
        if not isinstance(fields, Mapping) or fields.get("format") != FORMAT:
            found = fields.get("format") if isinstance(fields, Mapping) else type(fields).__name__
            raise SpecError(f'not a trlora adapter: "format" is {found!r}, expected {FORMAT!r}')
        version = fields.get("format_version")
        if isinstance(version, bool) or not isinstance(version, int) or version < 1:
            raise SpecError(f"format_version is {version!r}, expected {FORMAT_VERSION}")
        if version > FORMAT_VERSION:
            raise SpecError(
                f"format_version {version} found, this trlora reads up to {FORMAT_VERSION}; install a newer trexport"
            )
        known = ("format", "format_version", "base_model", "default", "overrides", "strength", "components")
        for name in fields:
            if name not in known:
                raise SpecError(f"unknown field {name!r}{nearest(name, known)}")
        strength = finite_number("adapter", "strength", fields.get("strength", 1.0))
        overrides, base_model = fields.get("overrides", {}), fields.get("base_model")
        components = fields.get("components", {})
        if not all(isinstance(part, Mapping) for part in (overrides, components, fields.get("default"))):
            raise SpecError('"default", "overrides" and "components" must be objects')
        whole = {"format": FORMAT, "format_version": FORMAT_VERSION}
        for name, part in components.items():
            if not isinstance(part, Mapping) or not set(part) <= {"default", "overrides"}:
                raise SpecError(f'components.{name} is {part!r}, expected an object with "default" and "overrides"')
        return cls(
            default=AdapterSpec.from_dict(fields["default"]),
            overrides={path: AdapterSpec.from_dict(spec) for path, spec in overrides.items()},
            strength=strength,
            base_model=BaseModel.from_dict({} if base_model is None else base_model),
            components={name: cls.from_dict(whole | dict(part)) for name, part in components.items()},
        )

    def to_dict(self) -> dict[str, Any]:
        fields = {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            "base_model": self.base_model.to_dict(),
            "default": self.default.to_dict(),
            "overrides": {path: spec.to_dict() for path, spec in sorted(self.overrides.items())},
            "strength": self.strength,
        }
        if self.components:
            parts = {name: config.to_dict() for name, config in sorted(self.components.items())}
            fields["components"] = {
                name: {key: part[key] for key in ("default", "overrides")} for name, part in parts.items()
            }
        return fields
