"""Train the sample model and its adapters, then measure them.

With no options: everything from nothing, written into the package (`sample:digits`), with results.json and grid.png here.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

from evaluate import HERE, THREADS, evaluate_to, fix_arithmetic
from sample import SAMPLE, read_base, write_adapter, write_base
from train_adapters import RECIPES, train_adapter
from train_base import train_base

PARTS = ("base", *RECIPES)


def train(parts: list[str], folder: Path) -> dict[str, float]:
    """Train the parts and write them to the sample folder; gives the seconds that each took."""
    seconds = {}
    for part in PARTS:
        if part not in parts:
            continue
        started = time.perf_counter()
        if part == "base":
            write_base(train_base(), folder)
        else:
            unet, _, _ = read_base(folder)
            adapter, _ = train_adapter(unet, part)
            write_adapter(part, adapter, folder)
        seconds[part] = time.perf_counter() - started
        print(f"{part}: trained in {seconds[part]:.0f} s", flush=True)
    return seconds


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "parts", nargs="*", metavar="PART", help=f"what to train, of {', '.join(PARTS)} (default: all of them)"
    )
    parser.add_argument(
        "--sample",
        type=Path,
        default=SAMPLE,
        help="the sample's folder, with the base in it unless that is trained too (default: the one in the package)",
    )
    parser.add_argument(
        "--out", type=Path, default=HERE, help="folder for results.json and grid.png (default: beside this script)"
    )
    parser.add_argument("--no-evaluation", action="store_true", help="train only")
    options = parser.parse_args()
    unknown = sorted(set(options.parts) - set(PARTS))
    if unknown:
        parser.error(f"unknown part {unknown[0]!r}, expected one of {', '.join(PARTS)}")
    fix_arithmetic(THREADS)
    seconds = train(options.parts or list(PARTS), options.sample)
    if not options.no_evaluation:
        evaluate_to(options.out, options.sample, seconds)


if __name__ == "__main__":
    main()
