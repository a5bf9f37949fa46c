"""`recipe.json` in the output folder: what a training was, so that it goes on as the same or not at all."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from caches import hash_of_file
from failures import OptionError

from trlora.files import atomic_file
from trlora.training import checkpoints

NAME = "recipe.json"
FREE = (
    "output_dir", "logging_dir", "report_to", "resume_from_checkpoint", "checkpointing_steps", "checkpoints_total_limit",
    "validation_prompt", "validation_steps", "num_validation_images", "num_inference_steps", "guidance_scale",
    "sample_batch_size", "instance_data_dir", "class_data_dir", "train_data_dir", "validation_image", "allow_tf32",
    "max_train_steps", "num_train_epochs",
)  # fmt: skip
"""Options that the result does not depend on, or that others look at: the images themselves, the trainer's config."""


def check_output(options: argparse.Namespace) -> Path | None:
    """The checkpoint to go on from, None for a training from the start.

    Raises:
        OptionError: there is a training in the folder and nobody said to go on with it, or no such checkpoint.
    """
    out: Path = options.output_dir
    if out.exists() and not out.is_dir():
        raise OptionError(f"--output_dir {out} is a file, expected a folder")
    known = checkpoints(out) if out.is_dir() else {}
    asked = options.resume_from_checkpoint
    if asked is None:
        there = [*known.values(), *(path for path in [out / "adapter"] if path.exists())]
        if there:
            raise OptionError(
                f"{there[-1]} is there from a training before; --resume_from_checkpoint latest goes on with it, or give "
                "another --output_dir"
            )
        return None
    if asked == "latest":
        return list(known.values())[-1] if known else None
    folder = next((path for path in (out / asked, Path(asked)) if path.is_dir()), None)
    if folder is None:
        names = ", ".join(path.name for path in known.values()) or "none"
        raise OptionError(f"--resume_from_checkpoint {asked}: no such checkpoint; in {out}: {names}")
    return folder


def describe(script: str, options: argparse.Namespace, files: list[Path] | None = None) -> dict[str, Any]:
    """What the result depends on: options, and the bytes of all data, where that is known already."""
    kept = {name: value for name, value in sorted(vars(options).items()) if name not in FREE}
    data = {} if files is None else {"data": sorted({hash_of_file(path) for path in files})}
    return {"recipe": script, "options": kept, **data}


def check_same(found: dict[str, Any], out: Path) -> None:
    """
    Raises:
        OptionError: the training in `out` is another one than `found`.
    """
    file = out / NAME
    if not file.is_file():
        return
    try:
        before = json.loads(file.read_bytes())
        options = {**before["options"], "recipe": before["recipe"]}
        data = set(before["data"])
    except (ValueError, KeyError, TypeError) as error:
        raise OptionError(f"{file}: damaged ({error}); remove it if the options are those of before") from error
    own = {**found["options"], "recipe": found["recipe"]}
    said = [
        f"{name} {options.get(name)!r} there and {own.get(name)!r} here"
        for name in sorted({*own, *options})
        if own.get(name) != options.get(name)
    ]
    changed = len(data ^ set(found["data"])) if "data" in found else 0
    if changed:
        said.append(f"{changed} data files are not the same")
    if said:
        raise OptionError(f"{out}: another training: {', '.join(said)}; give the same, or another --output_dir")


def write(found: dict[str, Any], out: Path) -> None:
    with atomic_file(out / NAME) as temporary:
        temporary.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
