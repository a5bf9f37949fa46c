"""Which samples come when: computed from the step's number alone, so that a resumed training sees what it would have."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

import torch


@final
@dataclass(frozen=True)
class Order:
    """An endless stream of samples, each once an epoch, every epoch in another order; dealt out to processes in turn."""

    samples: int
    batch_size: int
    accumulation: int = 1
    seed: int = 0
    processes: int = 1

    def batches(self, step: int, process: int = 0) -> list[list[int]]:
        """The samples' numbers in the batches of a step, all full: where an epoch ends the next one begins."""
        first = step * self.accumulation
        return [
            self._slice(((first + n) * self.processes + process) * self.batch_size) for n in range(self.accumulation)
        ]

    def _slice(self, start: int) -> list[int]:
        found: list[int] = []
        while len(found) < self.batch_size:
            epoch, place = divmod(start + len(found), self.samples)
            found += self._epoch(epoch)[place : place + self.batch_size - len(found)]
        return found

    def _epoch(self, epoch: int) -> list[int]:
        generator = torch.Generator().manual_seed(mixed(self.seed, epoch))
        return torch.randperm(self.samples, generator=generator).tolist()


def mixed(*numbers: int) -> int:
    """A seed made of several numbers, by splitmix64's finaliser (Steele, Lea and Flood, "Fast splittable pseudorandom number
    generators", 2014)."""
    state = 0
    for number in numbers:
        state = (state ^ (number + 0x9E3779B97F4A7C15 + (state << 6))) & 0xFFFFFFFFFFFFFFFF
        state = (state ^ (state >> 30)) * 0xBF58476D1CE4E5B9 & 0xFFFFFFFFFFFFFFFF
        state = (state ^ (state >> 27)) * 0x94D049BB133111EB & 0xFFFFFFFFFFFFFFFF
        state ^= state >> 31
    return state & 0x7FFFFFFF
