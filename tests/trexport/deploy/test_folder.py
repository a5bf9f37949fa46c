"""No name leads out of the folder of adapters."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from trexport.deploy.serve.folder import AdapterFolder, signature
from trexport.errors import UsageError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """`ink/`, `water.v2.safetensors`, and things that are no adapters; beside it a secret."""
    inside = tmp_path / "adapters"
    (inside / "ink").mkdir(parents=True)
    (inside / "ink" / "adapter_config.json").write_text("{}")
    (inside / "water.v2.safetensors").write_bytes(b"x")
    (inside / "notes.txt").write_text("x")
    (inside / ".hidden").mkdir()
    (tmp_path / "secret").mkdir()
    (tmp_path / "secret.safetensors").write_bytes(b"x")
    return inside


def test_folders_and_files_are_found(folder: Path) -> None:
    adapters = AdapterFolder(folder)
    assert adapters.names() == ["ink", "water.v2"]
    assert adapters.find("ink") == folder / "ink"
    assert adapters.find("water.v2") == folder / "water.v2.safetensors"


@pytest.mark.parametrize(
    "name",
    ["", ".", "..", "../secret", "ink/../../secret", "/etc", ".hidden", "a\\b", "ink=2", "a:x", "a\0b", "x" * 999],
)
def test_what_is_no_name_is_refused(folder: Path, name: str) -> None:
    with pytest.raises(UsageError, match="ink"):
        AdapterFolder(folder).find(name)


def test_a_link_out_of_the_folder_is_refused_and_one_inside_is_followed(folder: Path) -> None:
    os.symlink(folder.parent / "secret", folder / "out")
    os.symlink(folder.parent / "secret.safetensors", folder / "out2.safetensors")
    os.symlink(folder / "ink", folder / "alias")
    for name in ("out", "out2"):
        with pytest.raises(UsageError, match="no adapter"):
            AdapterFolder(folder).find(name)
    assert AdapterFolder(folder).find("alias") == folder / "alias"


def test_the_folder_itself_may_be_a_link(folder: Path, tmp_path: Path) -> None:
    os.symlink(folder, tmp_path / "link")
    assert AdapterFolder(tmp_path / "link").find("ink").name == "ink"


def test_an_unknown_name_gets_the_nearest(folder: Path) -> None:
    with pytest.raises(UsageError, match="nearest existing name is 'water.v2'"):
        AdapterFolder(folder).find("water.v3")


def test_a_folder_that_is_not_there_has_no_names(tmp_path: Path) -> None:
    assert AdapterFolder(tmp_path / "nothing").names() == []


def test_a_replaced_file_has_another_signature(folder: Path) -> None:
    before = signature(folder / "ink")
    assert signature(folder / "ink") == before
    (folder / "ink" / "adapter_config.json").write_text("{ }")
    assert signature(folder / "ink") != before
