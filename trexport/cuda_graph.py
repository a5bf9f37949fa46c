"""Work on the GPU recorded once, to be queued as a whole."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch

_WARM_UP = 3
_Result = TypeVar("_Result")


def captured(run: Callable[[], _Result]) -> tuple[torch.cuda.CUDAGraph, _Result]:
    """A CUDA graph of a function, and what it returned while it was recorded: the buffers that every replay overwrites."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(_WARM_UP):
            run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = run()
    return graph, result
