"""The order of samples."""

from __future__ import annotations

import pytest

from trlora.training import Order
from trlora.training.order import mixed


@pytest.mark.parametrize(
    ("samples", "size", "accumulation", "processes"), [(7, 3, 1, 1), (5, 2, 3, 2), (2, 5, 1, 1), (1, 1, 2, 3)]
)
def test_every_epoch_has_every_sample_once(samples: int, size: int, accumulation: int, processes: int) -> None:
    order = Order(samples, size, accumulation, seed=3, processes=processes)
    stream: list[int] = []
    for step in range(samples * 4):
        every = [order.batches(step, process) for process in range(processes)]
        for place in range(accumulation):
            for process in range(processes):
                batch = every[process][place]
                assert len(batch) == size
                stream += batch
    epochs = [stream[start : start + samples] for start in range(0, len(stream) - samples + 1, samples)]
    assert len(epochs) >= 4
    assert all(sorted(epoch) == list(range(samples)) for epoch in epochs)
    if samples > 4:
        assert len({tuple(epoch) for epoch in epochs}) > 1


def test_the_seed_decides() -> None:
    assert Order(50, 10, seed=1).batches(2) == Order(50, 10, seed=1).batches(2)
    assert Order(50, 10, seed=1).batches(2) != Order(50, 10, seed=2).batches(2)


def test_seeds_of_neighbours_are_apart() -> None:
    seeds = {mixed(seed, step, rank) for seed in range(20) for step in range(100) for rank in range(4)}
    assert len(seeds) == 20 * 100 * 4
    assert all(0 <= seed < 2**31 for seed in seeds)
