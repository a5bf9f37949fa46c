"""A UNet rewritten for speed: the same function with fewer and greater operators, for eager torch, `torch.compile` and
AOTInductor.

Children of the diffusers model are replaced and attention processors set, nothing else of it is touched. What is not known
is left alone and counted. A linear layer whose weight goes into a greater one is gone; `FuseReport.placements` says where
its rows are.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from diffusers import UNet2DConditionModel
from torch.export import ExportedProgram

from trexport.errors import UsageError
from trexport.models.fused.attention import fuse_cross_attention_, fuse_self_attention_
from trexport.models.fused.group_norm import fuse_group_norm_
from trexport.models.fused.join import join_norms_
from trexport.models.fused.join_linear import join_linears_
from trexport.models.fused.options import ALL, PROJECTIONS, FuseOptions, FuseReport, Outcome, options_for
from trexport.models.fused.projection import fuse_projection_
from trexport.models.fused.time_embedding import fuse_time_embedding_
from trexport.models.fused.upsampling import fuse_upsampling_
from trlora.errors import nearest

__all__ = [
    "ALL",
    "PROJECTIONS",
    "REWRITES",
    "FuseOptions",
    "FuseReport",
    "Outcome",
    "fuse_",
    "join_",
    "options_for",
]

REWRITES: dict[str, Callable[[UNet2DConditionModel, FuseOptions], Outcome]] = {
    "self_attention": fuse_self_attention_,
    "cross_attention": fuse_cross_attention_,
    "projection": fuse_projection_,
    "time_embedding": fuse_time_embedding_,
    "group_norm": fuse_group_norm_,
    "upsampling": fuse_upsampling_,
}


def fuse_(unet: UNet2DConditionModel, options: FuseOptions | None = None) -> FuseReport:
    """Rewrite a UNet in place, in evaluation mode and without adapters attached. With `upsampling`, which is among the
    rewrites unless others are named, it takes heights and widths that halve at every level without a rest.

    Args:
        options: `FuseOptions()`, all rewrites with torch's own operators, unless given; see `options_for`.

    Raises:
        UsageError: an unknown rewrite.
    """
    options = options or FuseOptions()
    for name in options.rewrites:
        if name not in REWRITES:
            raise UsageError(f"{name}: unknown rewrite, expected one of {list(REWRITES)}{nearest(name, REWRITES)}")
    return FuseReport(
        options, {name: rewrite(unet, options) for name, rewrite in REWRITES.items() if name in options.rewrites}
    )


def join_(program: ExportedProgram) -> Mapping[str, int]:
    """In a program exported from a UNet rewritten with our own kernels, put what stands around a kernel's call into it.

    Returns:
        what was joined, and how often.
    """
    return {**join_norms_(program), **join_linears_(program)}
