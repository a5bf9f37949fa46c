"""Fixtures for every test."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

torch.set_num_threads(1)  # the tensors of the tests are small: threads only wait for each other


@pytest.fixture(autouse=True)
def _seeded() -> Iterator[None]:
    """Every test draws the same numbers, alone or in the whole suite, and leaves torch's defaults as they were."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        dtype = torch.get_default_dtype()
        yield
        torch.set_default_dtype(dtype)
