"""A folder of pictures, conditions and captions, in either of two layouts.

`metadata.jsonl` as of Hugging Face's image folders, a line a picture:
`{"file_name": "image/a.png", "conditioning_image": "edges/a.png", "text": "a house"}`. Or folders: `image/a.png`,
`conditioning/a.png`, and the caption in `captions/a.txt` or beside the image.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from failures import RecipeError, listed
from images import images_in

METADATA = "metadata.jsonl"


@dataclass(frozen=True)
class Pair:
    """One sample, before it is read."""

    image: Path
    condition: Path | None
    """None where conditions are made from the image."""
    caption: str


@dataclass(frozen=True)
class Columns:
    """The names of the fields in `metadata.jsonl`."""

    image: str = "image"
    condition: str = "conditioning_image"
    caption: str = "text"


def pairs_in(folder: Path, *, conditions: bool, columns: Columns | None = None) -> list[Pair]:
    """
    Args:
        conditions: whether there are to be condition images.

    Raises:
        RecipeError: no such folder, neither layout, or captions or files that are missing: all of them are counted.
    """
    if not folder.is_dir():
        raise RecipeError(f"{folder}: no such folder, expected {METADATA}, or image/, conditioning/ and captions/")
    if (folder / METADATA).is_file():
        return _from_metadata(folder, conditions, columns or Columns())
    if (folder / "image").is_dir():
        return _from_folders(folder, conditions)
    raise RecipeError(f"{folder}: neither {METADATA} nor image/ inside; expected one of these layouts")


def _from_metadata(folder: Path, conditions: bool, columns: Columns) -> list[Pair]:
    found: list[Pair] = []
    wrong: list[str] = []
    lines = (folder / METADATA).read_text(encoding="utf-8").splitlines()
    numbered = [(number, line) for number, line in enumerate(lines, 1) if line.strip()]
    for number, line in numbered:
        try:
            fields = json.loads(line)
            if not isinstance(fields, dict):
                raise ValueError("not an object")
        except ValueError as error:
            wrong.append(f"line {number}: not JSON ({error})")
            continue
        problem, pair = _pair(folder, fields, conditions, columns)
        if pair is None:
            wrong.append(f"line {number}: {problem}")
        else:
            found.append(pair)
    if wrong:
        raise RecipeError(f"{folder / METADATA}: {len(wrong)} of {len(numbered)} lines cannot be used:{listed(wrong)}")
    if not found:
        raise RecipeError(f"{folder / METADATA}: no images; expected a line for each")
    return found


def _pair(folder: Path, fields: dict[str, Any], conditions: bool, columns: Columns) -> tuple[str, Pair | None]:
    """What is wrong, or the pair."""
    values: list[str] = []
    wanted = [("file_name" if "file_name" in fields else columns.image), columns.caption]
    for name in [*wanted, *([columns.condition] if conditions else [])]:
        value = fields.get(name)
        if not isinstance(value, str) or not value.strip():
            said = "caption" if name == columns.caption else "file"
            return f"no {said} in {name!r} (fields found: {', '.join(map(repr, fields)) or 'none'})", None
        values.append(value)
    files = [folder / value for place, value in enumerate(values) if place != 1]
    for file in files:
        if not file.is_file():
            return f"{file.relative_to(folder)}: no such file", None
    return "", Pair(files[0], files[1] if conditions else None, values[1])


def _from_folders(folder: Path, conditions: bool) -> list[Pair]:
    found: list[Pair] = []
    wrong: list[str] = []
    images = images_in(folder / "image")
    if len({path.stem for path in images}) < len(images):
        raise RecipeError(f"{folder / 'image'}: two images differ in their ending only; rename one")
    controls = {path.stem: path for path in images_in(folder / "conditioning")} if conditions else {}
    for image in images:
        texts = [folder / "captions" / f"{image.stem}.txt", image.with_suffix(".txt")]
        text = next((path for path in texts if path.is_file()), None)
        caption = "" if text is None else text.read_text(encoding="utf-8").strip()
        if not caption:
            said = "no caption" if text is None else f"{text.relative_to(folder)} is empty"
            wrong.append(f"{image.name}: {said}; expected captions/{image.stem}.txt, or the same beside the image")
        elif conditions and image.stem not in controls:
            wrong.append(f"{image.name}: no image called {image.stem} in conditioning/")
        else:
            found.append(Pair(image, controls.get(image.stem), caption))
    if wrong:
        raise RecipeError(f"{folder}: {len(wrong)} of {len(images)} images lack something:{listed(wrong)}")
    return found
