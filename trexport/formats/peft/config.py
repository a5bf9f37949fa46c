"""PEFT's `adapter_config.json`."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, final

from trlora import SpecError
from trlora.fields import finite_number, positive_int


@final
@dataclass(frozen=True)
class PeftConfig:
    """The fields of a config, with PEFT's defaults for those that are not there."""

    fields: Mapping[str, Any]

    @property
    def method(self) -> str:
        """`LORA`, `OFT`, …"""
        return str(self.fields.get("peft_type"))

    def flag(self, name: str, default: bool) -> bool:
        """Raises `SpecError` where it is no bool."""
        value = self.fields.get(name, default)
        if not isinstance(value, bool):
            raise SpecError(f"{name} is {value!r}, expected true or false")
        return value

    def rank(self, path: str, default: int = 8) -> int:
        """The rank of a layer: `r`, or what `rank_pattern` has for it."""
        return positive_int(self.method, "r", self._of("rank_pattern", path, self.fields.get("r", default)))

    def alpha(self, path: str, name: str) -> float:
        """The alpha of a layer: `lora_alpha` or `alpha`, or what `alpha_pattern` has for it. It is nowhere else, so it has
        to be there."""
        value = self._of("alpha_pattern", path, self.fields.get(name))
        if value is None:
            raise SpecError(f"{name} is missing, without which nobody knows how strong the adapter is")
        return finite_number(self.method, name, value)

    def _of(self, pattern: str, path: str, default: Any) -> Any:
        """PEFT's rule: the first key that, as a regular expression, matches the end of the path from a dot on."""
        found = self.fields.get(pattern) or {}
        if not isinstance(found, Mapping):
            raise SpecError(f"{pattern} is {found!r}, expected an object")
        for key, value in found.items():
            try:
                if re.match(rf"(.*\.)?({key})$", path):
                    return value
            except re.error as error:
                raise SpecError(f"{pattern}: {key!r} is no regular expression ({error})") from error
        return default
