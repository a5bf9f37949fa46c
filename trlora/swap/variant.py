"""The sizes that a swap kernel is compiled for."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import final

SHARED_BYTES = 99 * 1024
"""That a block has on every GPU from compute capability 8.0 on; some have more."""
MOST_ADAPTERS = 4
_REGISTERS = 224
"""For factors that stay in a thread's registers, of the 255 that it has."""
_OTHER_REGISTERS = 40
_WIDEST = 1280
"""Columns taken at once where a row may be taken in pieces."""


@final
@dataclass(frozen=True)
class Variant:
    """A kernel's macros; see `kernel.cu`."""

    stride: int
    """STRIDE: columns of the weights."""
    width: int
    """IN: columns that the kernel takes as a row; without a transform it may be a part of the weights'."""
    n_lo: int
    bfloat16: bool
    terms: tuple[int, ...] = (0,)
    """TERMS: of each adapter's transform; 0 for the identity."""
    ring_pairs: tuple[int, ...] = (0,)
    """PAIRS: of each adapter, half of the middle rank of the residuals' rings, rounded up."""
    low_rank_steps: tuple[int, ...] = (0,)
    """STEPS: of each adapter, sixteenths of the rank of the residuals, rounded up. Rings or low ranks, not both."""
    held: bool = True
    """HELD: whether the transforms' fast factors stay in registers."""
    block_rows: int = 16
    """OB."""

    def fitted(self, shared_limit: int = SHARED_BYTES) -> Variant | None:
        """This variant with the block that was measured best on an H100; None where no kernel is built for its sizes.

        Args:
            shared_limit: bytes of shared memory that a block may have.
        """
        if (
            self.adapters > MOST_ADAPTERS
            or self.width % self.n_lo
            or self.n_lo % 16
            or self.stride % self.width
            or self.n_lo > 128
        ):
            return None
        for held in (True, False):
            for rows in (16, 8) if self.n_lo < 80 else (8,):
                variant = replace(self, held=held, block_rows=rows)
                if variant.shared_bytes <= shared_limit and variant.registers <= _REGISTERS:
                    return variant
        return None

    @property
    def adapters(self) -> int:
        return len(self.terms)

    @property
    def n_hi(self) -> int:
        return self.width // self.n_lo

    @property
    def pieces(self) -> int:
        """Of a row of the weights."""
        return self.stride // self.width

    @property
    def slow_rows(self) -> int:
        """n_hi, rounded up to a multiple of 16."""
        return (self.n_hi + 15) // 16 * 16

    @property
    def slow_columns(self) -> int:
        """n_hi, rounded up to a multiple of 8."""
        return (self.n_hi + 7) // 8 * 8

    @property
    def rows_at_once(self) -> int:
        """WO: so many that a block has four warps at least."""
        return max(1, 4 // (self.n_lo // 16))

    @property
    def threads(self) -> int:
        return 32 * (self.n_lo // 16) * self.rows_at_once

    @property
    def blocks_at_once(self) -> int:
        """MIN_CTAS, on a multiprocessor with its 65,536 registers."""
        return 2 if 2 * self.threads * (self.registers + _OTHER_REGISTERS) <= 65536 else 1

    @property
    def shared_bytes(self) -> int:
        """Of a block: two times its rows of W0 (and of L), and the residual of low rank."""
        rows = self.block_rows * self.n_hi * (self.n_lo + 8)
        ring = self.block_rows * 64 * self.adapters if any(self.ring_pairs) else 0
        buffer = rows + (self.slow_rows - self.n_hi) * (self.n_lo + 8) + ring
        return 2 * (2 * buffer + (rows if any(self.low_rank_steps) else 0))

    @property
    def registers(self) -> int:
        """What a thread holds of the factors and of a row of W0, in 32-bit registers."""
        terms, steps = sum(self.terms), self.n_lo // 16
        high, wide = self.slow_rows // 16, self.slow_columns // 8
        fast = 4 * terms * steps if self.held else 8
        transform = fast + 2 * (terms + 1) * high * wide + 4 * high * steps + 8 * high if terms else 0
        return transform + sum(self.ring_pairs) * (4 + 2 * wide) + 4 * sum(self.low_rank_steps) + 4 * wide

    def macros(self) -> dict[str, str]:
        """By the kernel's names."""
        lists = {"TERMS": self.terms, "PAIRS": self.ring_pairs, "STEPS": self.low_rank_steps}
        sums = {"NQ": sum(self.terms), "NC": sum(self.ring_pairs), "NR": sum(self.low_rank_steps)}
        sizes = {
            "STRIDE": self.stride,
            "IN": self.width,
            "N_LO": self.n_lo,
            "NA": self.adapters,
            "OB": self.block_rows,
            "WO": self.rows_at_once,
            "HELD": int(self.held),
            "BF16": int(self.bfloat16),
            "MIN_CTAS": self.blocks_at_once,
        }
        texts = {name: ", ".join(map(str, numbers)) for name, numbers in lists.items()}
        return texts | {name: str(size) for name, size in (sums | sizes).items()}


def free_splits(stride: int) -> Iterator[tuple[int, int]]:
    """Width and n_lo for weights that nothing cuts, the best first: a residual of low rank without a transform."""
    for width in range(min(stride, _WIDEST) // 16 * 16, 0, -16):
        if stride % width == 0:
            yield from ((width, n_lo) for n_lo in range(128, 0, -16) if width % n_lo == 0 and width // n_lo <= 32)
