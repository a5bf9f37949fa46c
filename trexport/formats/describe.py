"""What people call an adapter."""

from __future__ import annotations

from trlora import Adapter

_METHODS: dict[tuple[str, ...], str] = {
    ("tensor_ring", "tensor_ring", "none"): "TLoRA({t},{r})",
    ("tensor_ring", "low_rank", "none"): "TLoRA*({t},{r})",
    ("identity", "low_rank", "none"): "LoRA({r})",
    ("identity", "low_rank", "norm"): "DoRA({r})",
    ("identity", "tensor_ring", "none"): "LoRETTA-like({r})",
    ("identity", "hadamard", "none"): "LoHa({r})",
    ("identity", "kronecker", "none"): "LoKr({r})",
    ("diagonal", "low_rank", "none"): "DoRA without its norm({r})",
    ("block_orthogonal", "none", "none"): "OFT({b})",
    ("butterfly", "none", "scale"): "BOFT({b})",
    ("householder", "none", "none"): "HRA({t})",
    ("diagonal", "none", "none"): "(IA)³",
    ("identity", "none", "scale"): "(IA)³",
    ("low_rank", "low_rank", "none"): "GLoRA({t})",
    ("block_orthogonal", "of outputs"): "OFT of outputs({o})",
    ("butterfly", "of outputs"): "BOFT of outputs({o})",
}
"""Methods by the types of transform, residual and magnitude; by that of an output transform, where there is one."""


def method_of(adapter: Adapter) -> str:
    """The name of the method, from its parts."""
    if not adapter.layers and adapter.components:
        return method_of(next(iter(adapter.components.values())))
    if not adapter.layers:
        return "offsets"
    spec = adapter.config.default.to_dict()
    transform, residual, magnitude = spec["transform"], spec["residual"], spec.get("magnitude", {"type": "none"})
    types: tuple[str, ...] = (transform["type"], residual["type"], magnitude["type"])
    if "output_transform" in spec:
        inside = [kind for kind in types[:2] if kind not in ("identity", "none")]
        types = (*inside, spec["output_transform"]["type"], "of outputs")
    pattern = _METHODS.get(types, " + ".join(kind for kind in types if kind not in ("identity", "none")))
    turn = spec.get("output_transform", {})
    return pattern.format(
        t=transform.get("rank"), r=residual.get("rank"), b=transform.get("block_size"), o=turn.get("block_size")
    )


def ranks_of(adapter: Adapter) -> list[int]:
    """The ranks of its layers, of residuals or, where those have none, of transforms; rings with several are left out."""
    found = set()
    for parts in adapter.layers.values():
        spec = parts.spec.to_dict()
        rank = spec["residual"].get("rank") or spec["transform"].get("rank")
        found |= {rank} if isinstance(rank, int) else set()
    return sorted(found)
