"""Adapters of kohya's scripts and of LyCORIS. A new method is one file here, one line in `METHODS`, one entry in the
tests."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import final

from torch import Tensor

from trexport.formats.content import Content, listed
from trexport.formats.kohya.full import Full
from trexport.formats.kohya.glora import Glora
from trexport.formats.kohya.ia3 import Ia3
from trexport.formats.kohya.locon import Locon
from trexport.formats.kohya.loha import Loha
from trexport.formats.kohya.lokr import Lokr
from trexport.formats.kohya.method import Method
from trexport.formats.kohya.names import dotted
from trexport.formats.kohya.offsets import take_offsets
from trexport.formats.kohya.oft import Oft
from trexport.formats.text import dotted_text
from trlora import Adapter, CheckpointError, LayerParts, TrloraError
from trlora.checkpoint import check_tensor, provenance

METHODS: tuple[Method, ...] = (Locon(), Loha(), Lokr(), Ia3(), Oft(), Glora(), Full())
"""The first whose telling leaf begins one of a layer's."""

_REFUSED = {
    "oft_diag": "OFT of LyCORIS' first versions is not read",
    "lora_D": "T-LoRA is not read",
}
"""What is known and cannot be expressed, by a leaf."""

_MAY_BE_WHOLE = ("on_input", "alpha")
"""Leaves that are not always of floating-point numbers."""

_OFT = "oft_unet_"
"""Of kohya's own OFT."""
_UNET = ("lora_unet_", "lycoris_", _OFT)
_TEXT = re.compile(r"lora_te(\d?)_")


@final
class KohyaFormat:
    """Keys `lora_unet_<module>.<leaf>` with underscores for the dots of a path (`oft_unet_…` for kohya's own OFT),
    `lora_te_…` for text encoders."""

    name = "kohya and LyCORIS"

    def recognises(self, content: Content) -> bool:
        return any(key.startswith(_UNET) or _TEXT.match(key) for key in content.tensors)

    def read(self, content: Content) -> Adapter:
        try:
            return self._read(content)
        except TrloraError as error:
            raise CheckpointError(f"{content.path}: {error}") from error

    def _read(self, content: Content) -> Adapter:
        models: dict[str, _ByName] = {}
        unknown: list[str] = []
        full: dict[tuple[str, str], str] = {}
        for key, tensor in content.tensors.items():
            whole, _, leaf = key.partition(".")
            model, name = _model_of(whole)
            if model is None or not leaf:
                unknown.append(key)
            else:
                if full.setdefault((model, name), whole) != whole:
                    raise CheckpointError(f"{whole} and {full[model, name]} are one module; expected one of them")
                if whole.startswith(_OFT) and leaf == "alpha" and not tensor.any():
                    raise CheckpointError(f"{key} is 0: kohya's OFT turns nothing then, the file changes nothing")
                models.setdefault(model, {}).setdefault(name, {})[leaf] = tensor
                if leaf not in _MAY_BE_WHOLE or tensor.dtype.is_floating_point:
                    check_tensor(key, tensor)
        if unknown:
            raise CheckpointError(
                f"{len(unknown)} of {len(content.tensors)} keys are none of kohya's, lora_unet_<module>.<leaf> or "
                f"lora_te_<module>.<leaf>: {listed(unknown)}"
            )
        metadata = provenance(content.metadata)
        found = {
            model: _adapter(models[model], str(content.path), metadata, dotted_text if model else dotted)
            for model in sorted(models)
        }
        unet = found.pop("", None) or Adapter.of({}, 1.0, None, str(content.path), "kohya", metadata)
        return replace(unet, components=found)


_ByName = dict[str, dict[str, Tensor]]
"""The tensors of a model by the name of their module, then by leaf."""


def _model_of(name: str) -> tuple[str | None, str]:
    """The component that a module is of, empty for the UNet, None for no name of kohya's; and the rest of the name."""
    text = _TEXT.match(name)
    if text is not None:
        return f"text_encoder_{text[1]}" if text[1] not in ("", "1") else "text_encoder", name[text.end() :]
    prefix = next((prefix for prefix in _UNET if name.startswith(prefix)), None)
    return (None, name) if prefix is None else ("", name.removeprefix(prefix))


def _adapter(by_name: _ByName, source: str, metadata: Mapping[str, str], path_of: Callable[[str], str]) -> Adapter:
    """What is for one model."""
    layers: dict[str, LayerParts] = {}
    offsets: dict[str, Tensor] = {}
    kinds: set[str] = set()
    problems: list[str] = []
    names: dict[str, str] = {}
    for name, tensors in by_name.items():
        path = path_of(name)
        if names.setdefault(path, name) != name:
            raise CheckpointError(f"{name} and {names[path]} are both {path}; expected one of them")
        try:
            taken = take_offsets(path, tensors)
            offsets |= taken
            kinds |= {"offsets"} if taken else set()
            if tensors:
                method = _method_of(path, tensors)
                layers[path] = method.layer(path, tensors)
                kinds.add(type(method).__name__)
        except TrloraError as error:
            problems.append(str(error))
    if problems:
        more = f" (and {len(problems) - 1} more of {len(by_name)} layers)" if len(problems) > 1 else ""
        raise CheckpointError(f"{problems[0]}{more}")
    _check_alphas(by_name)
    kind = "LyCORIS" if kinds - {"Locon"} else "kohya"
    return Adapter.of(layers, 1.0, None, source, kind, metadata, offsets)


def _method_of(path: str, tensors: dict[str, Tensor]) -> Method:
    for leaf, reason in _REFUSED.items():
        if any(found == leaf or found.startswith(f"{leaf}.") for found in tensors):
            raise CheckpointError(f"{path}: {leaf}: {reason}")
    for method in METHODS:
        if any(leaf.startswith(method.telling) for leaf in tensors):
            strange = tensors.keys() - set(method.leaves)
            if strange:
                beside = listed(tensors.keys() - strange)
                raise CheckpointError(f"{path}: {listed(strange)} beside {beside}, expected {', '.join(method.leaves)}")
            return method
    halves = {"lora_down.weight": "lora_up.weight", "weight": "on_input"}
    missing = next((wanted for leaf, wanted in halves.items() if leaf in tensors), None)
    if missing is not None:
        raise CheckpointError(f"{path}: {missing} is missing beside {listed(tensors)}")
    raise CheckpointError(f"{path}: of no method that is known: {listed(tensors)}")


def _check_alphas(by_name: dict[str, dict[str, Tensor]]) -> None:
    """Raises `CheckpointError` where some layers have an alpha and others, that could have one, have not: half a file."""
    able = {name for name, tensors in by_name.items() if tensors and not {"on_input", "diff"} & tensors.keys()}
    lacking = sorted(name for name in able if "alpha" not in by_name[name])
    if lacking and len(lacking) < len(able):
        raise CheckpointError(f"{len(lacking)} of {len(able)} layers have no alpha, the others have: {listed(lacking)}")
