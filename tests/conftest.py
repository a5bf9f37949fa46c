"""Fixtures for every test."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # Triton reads it once, when it is imported; torch alone does not import it
os.environ.setdefault("AOT_INDUCTOR_COMPILE_WRAPPER_OPT_LEVEL", "O0")  # read by torch too; the kernels stay optimised
torch.set_num_threads(1)  # the tensors of the tests are small: threads only wait for each other


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What needs a GPU is skipped without one. Files with slow tests first: begun last, one of them would run alone while
    the other processes have nothing to do."""
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="no CUDA device here"))
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


@pytest.fixture(autouse=True)
def _seeded() -> Iterator[None]:
    """Every test draws the same numbers, alone or in the whole suite, and leaves torch's defaults as they were."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        dtype = torch.get_default_dtype()
        yield
        torch.set_default_dtype(dtype)
