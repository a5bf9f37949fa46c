"""Adapters that PEFT's `save_pretrained` writes. A new method is one file here, one line in `METHODS`, one entry in the
tests."""

from __future__ import annotations

from typing import final

from torch import Tensor

from trexport.formats.content import Content, listed
from trexport.formats.peft.boft import Boft
from trexport.formats.peft.config import PeftConfig
from trexport.formats.peft.hra import Hra
from trexport.formats.peft.ia3 import Ia3
from trexport.formats.peft.loha import Loha
from trexport.formats.peft.lokr import Lokr
from trexport.formats.peft.lora import Lora
from trexport.formats.peft.method import Method
from trexport.formats.peft.oft import Oft
from trlora import Adapter, BaseModel, CheckpointError, LayerParts, SpecError, TrloraError
from trlora.checkpoint import CONFIG_NAME
from trlora.errors import nearest

METHODS: dict[str, Method] = {
    "LORA": Lora(),
    "OFT": Oft(),
    "BOFT": Boft(),
    "LOHA": Loha(),
    "LOKR": Lokr(),
    "HRA": Hra(),
    "IA3": Ia3(),
}
"""By `peft_type`."""

_PREFIX = "base_model.model."


@final
class PeftFormat:
    """Keys `base_model.model.<module>.<leaf>` and, in the folder or beside the file, a config that names a `peft_type`.

    `fan_in_fan_out` is for transformers' `Conv1D`, which a UNet has not; on a linear layer PEFT itself does not heed it.
    """

    name = "PEFT"

    def recognises(self, content: Content) -> bool:
        return any(key.startswith(_PREFIX) for key in content.tensors) or (
            "peft_type" in content.config and content.path.is_dir()
        )

    def read(self, content: Content) -> Adapter:
        try:
            return self._read(content)
        except TrloraError as error:
            raise CheckpointError(f"{content.path}: {error}") from error

    def _read(self, content: Content) -> Adapter:
        config = PeftConfig(content.config)
        if "peft_type" not in config.fields:
            raise CheckpointError(
                f"keys of PEFT, but no {CONFIG_NAME} beside them that names a peft_type: without it nobody knows alpha and "
                "what else the method depends on; give the folder that PEFT wrote"
            )
        if config.method not in METHODS:
            known = sorted(METHODS)
            raise CheckpointError(
                f"peft_type {config.method!r} is not read, expected one of {known}{nearest(config.method, known)}"
            )
        method = METHODS[config.method]
        if config.fields.get("bias", "none") != "none":
            raise SpecError(
                f"bias is {config.fields['bias']!r}: trained biases beside the method are not read, only weights change"
            )
        method.check(config)
        by_layer = _by_layer(content, method)
        content.check_tensors()
        layers: dict[str, LayerParts] = {}
        problems: list[str] = []
        for path, tensors in by_layer.items():
            try:
                layers[path] = method.layer(path, tensors, config)
            except CheckpointError as error:
                problems.append(str(error))
        if problems:
            more = f" (and {len(problems) - 1} more of {len(by_layer)} layers)" if len(problems) > 1 else ""
            raise CheckpointError(f"{problems[0]}{more}")
        base = config.fields.get("base_model_name_or_path")
        base_model = BaseModel(name_or_path=base if isinstance(base, str) and base else None)
        return Adapter.of(layers, 1.0, base_model, str(content.path), f"PEFT {config.method}")


def _by_layer(content: Content, method: Method) -> dict[str, dict[str, Tensor]]:
    """The tensors by module path and leaf.

    Raises:
        CheckpointError: none, or keys that the method does not have.
    """
    by_layer: dict[str, dict[str, Tensor]] = {}
    unknown: list[str] = []
    leaves = sorted(method.leaves, key=len, reverse=True)
    for key, tensor in content.tensors.items():
        leaf = next((leaf for leaf in leaves if key.endswith(f".{leaf}")), None)
        if leaf is None or not key.startswith(_PREFIX):
            unknown.append(key)
            continue
        path = key.removeprefix(_PREFIX).removesuffix(f".{leaf}")
        by_layer.setdefault(path, {})[leaf] = tensor
    if unknown:
        raise CheckpointError(
            f"{len(unknown)} of {len(content.tensors)} keys are none of this method's, which end in "
            f"{', '.join(method.leaves)} after {_PREFIX}<module>: {listed(unknown)}"
        )
    if not by_layer:
        raise CheckpointError("no tensors inside, expected at least one layer")
    return by_layer
