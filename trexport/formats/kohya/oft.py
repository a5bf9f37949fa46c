"""OFT (arXiv 2306.07280) and BOFT (2311.06243) as LyCORIS and kohya's scripts have them: on the outputs of a layer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, final

import torch
from torch import Tensor

from trexport.formats.kohya.method import number_of
from trexport.formats.peft.method import take
from trlora import AdapterSpec, CheckpointError, LayerParts
from trlora.cayley import upper_of


@final
class Oft:
    """`W' = diag(rescale)·Rᵀ·W0`, R block-diagonal, by the Cayley map of `Q = oft_blocks − oft_blocksᵀ`, of (blocks, b, b);
    with four dimensions a butterfly, `diag(rescale)·R_m···R_1·W0`. `alpha` is the constraint: all Q together no longer than
    alpha times the outputs, 0 for no constraint."""

    telling = "oft_blocks"
    leaves = ("oft_blocks", "rescale", "alpha")

    def layer(self, path: str, tensors: Mapping[str, Tensor]) -> LayerParts:
        blocks = take(path, tensors, "oft_blocks", (3, 4))
        if blocks.shape[-1] != blocks.shape[-2]:
            raise CheckpointError(f"{path}: oft_blocks has shape {tuple(blocks.shape)}, expected square blocks")
        skew = self._constrained(path, tensors, blocks.double() - blocks.double().transpose(-1, -2))
        size = blocks.shape[-1]
        if blocks.ndim == 3:
            fields: dict[str, Any] = {"type": "block_orthogonal", "block_size": size}
        else:
            fields = {"type": "butterfly", "block_size": size, "factors": len(blocks)}
            # the product there begins with the last factor, so it is that of the transposed blocks, transposed; and in a
            # block the two halves are interleaved, here they follow each other
            order = torch.arange(size).reshape(-1, 2).T.flatten()
            skew = -skew[..., order, :][..., order]
        spec: dict[str, Any] = {"output_transform": fields}
        parts = {"output_transform": {"skew": upper_of(skew).to(blocks.dtype)}}
        if "rescale" in tensors:
            rescale = tensors["rescale"]
            if rescale.numel() != rescale.shape[0]:
                raise CheckpointError(
                    f"{path}: rescale has shape {tuple(rescale.shape)}, expected one number an output"
                )
            spec["magnitude"], parts["magnitude"] = {"type": "scale", "bias": False}, {"scale": rescale.flatten()}
        return LayerParts.from_tensors(path, AdapterSpec.from_dict(spec), parts)

    def _constrained(self, path: str, tensors: Mapping[str, Tensor], skew: Tensor) -> Tensor:
        if "alpha" not in tensors:
            raise CheckpointError(
                f"{path}: alpha is missing, which says how far the blocks may turn; 0 is no constraint"
            )
        limit = number_of(path, tensors, "alpha") * skew.shape[-3] * skew.shape[-1]
        length = float(torch.linalg.vector_norm(skew)) + 1e-8
        return skew * (limit / length) if 0 < limit < length else skew
