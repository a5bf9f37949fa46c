"""`trexport merge` at the size of Stable Diffusion 1.5, against copying the base's file on the same disk."""

from __future__ import annotations

import json
import os
import shutil
import statistics
import tempfile
from pathlib import Path

from benchmarks.child import run_in_child
from benchmarks.record import keep
from trexport.merging import merge
from trexport.models.adapters import open_adapters
from trexport.models.base import WEIGHTS_STEM, open_base
from trexport.models.writer import SafetensorsWriter

ROUNDS = 8
ADAPTER = "random:tlora:2:6"
FILE = f"{WEIGHTS_STEM}.safetensors"


def main() -> None:
    """Alternate a copy and a merge, both flushed to the disk, and keep the medians."""
    with tempfile.TemporaryDirectory(dir=os.environ.get("BENCH_TMP")) as name:
        folder = Path(name)
        base = write_base(folder / "base", "random:sd15")
        copies, merges = [], []
        for round_ in range(ROUNDS):
            copied = run_in_child(copy, base / FILE, folder / "copy")
            (folder / "copy").unlink()  # at once, so that both find the same memory for the file's pages
            merged = run_in_child(run_merge, base, folder / "merged")
            shutil.rmtree(folder / "merged")
            print(f"round {round_}: copy {copied.seconds:.2f} s, merge {merged.seconds:.2f} s")
            if round_ > 0:  # the first warms up
                copies.append(copied.seconds)
                merges.append(merged)
        copy_s, merge_s = statistics.median(copies), statistics.median([run.seconds for run in merges])
        fields = {
            "base": "random:sd15, fp32",
            "adapter": ADAPTER,
            "layers": merges[0].value,
            "file_bytes": (base / FILE).stat().st_size,
            "copy_seconds": copies,
            "merge_seconds": [run.seconds for run in merges],
            "ratio": merge_s / copy_s,
            "ratio_of_pairs": [run.seconds / copy for run, copy in zip(merges, copies, strict=True)],
            "peak_private_bytes": max(run.peak_private_bytes for run in merges),
            "peak_resident_bytes": max(run.peak_resident_bytes for run in merges),
        }
    print(
        f"copy {copy_s:.2f} s, merge {merge_s:.2f} s, ratio {merge_s / copy_s:.2f}; "
        f"private memory at most {fields['peak_private_bytes'] / 2**30:.2f} GiB"
    )
    keep("merge_sd15", "python -m benchmarks merge", "cpu", fields)


def write_base(folder: Path, name: str) -> Path:
    """A UNet folder with the weights of a `random:` base."""
    base = open_base(name)
    folder.mkdir(parents=True)
    (file,) = base.weights
    with SafetensorsWriter(folder / FILE, file.entries, file.metadata) as writer:
        for entry in file.entries:
            writer.write(file.tensor(entry.name))
    (folder / "config.json").write_text(json.dumps(dict(base.config)), encoding="utf-8")
    return folder


def copy(source: Path, target: Path) -> None:
    """Copy a file, onto the disk."""
    shutil.copyfile(source, target)
    with target.open("rb+") as stream:
        os.fsync(stream.fileno())


def run_merge(base: Path, out: Path) -> int:
    """One merge; the number of adapted layers."""
    opened = open_base(str(base))
    return len(merge(opened, open_adapters([ADAPTER], opened), out).layers)
