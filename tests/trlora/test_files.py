from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest

from trlora.files import atomic_file, atomic_folder, check_free


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture
def _umask_027() -> Iterator[None]:
    before = os.umask(0o027)
    yield
    os.umask(before)


def test_a_file_appears_whole_at_the_end(tmp_path: Path) -> None:
    target = tmp_path / "new" / "deep" / "model.bin"
    with atomic_file(target) as temporary:
        temporary.write_bytes(b"whole")
        assert not target.exists()
        assert temporary.parent == target.parent  # the same file system, or the renaming would copy
    assert target.read_bytes() == b"whole"
    assert names(target.parent) == ["model.bin"]


@pytest.mark.parametrize("failure", [ValueError("no"), KeyboardInterrupt()], ids=["error", "interrupt"])
def test_a_failing_block_leaves_the_old_file(tmp_path: Path, failure: BaseException) -> None:
    target = tmp_path / "model.bin"
    target.write_bytes(b"old")

    def write() -> None:
        with atomic_file(target) as temporary:
            temporary.write_bytes(b"ne")
            raise failure

    with pytest.raises(type(failure)):
        write()
    assert target.read_bytes() == b"old"
    assert names(tmp_path) == ["model.bin"]
    target.unlink()
    with pytest.raises(type(failure)):
        write()
    assert names(tmp_path) == []


def test_a_file_is_replaced(tmp_path: Path) -> None:
    target = tmp_path / "model.bin"
    target.write_bytes(b"old and longer")
    with atomic_file(target) as temporary:
        temporary.write_bytes(b"new")
        assert target.read_bytes() == b"old and longer"
    assert target.read_bytes() == b"new"


@pytest.mark.usefixtures("_umask_027")
def test_results_have_the_permissions_of_any_other_file(tmp_path: Path) -> None:
    with atomic_file(tmp_path / "file") as temporary:
        temporary.write_bytes(b"x")
    with atomic_folder(tmp_path / "folder") as folder:
        (folder / "inside").write_bytes(b"x")
    assert stat.S_IMODE((tmp_path / "file").stat().st_mode) == 0o640
    assert stat.S_IMODE((tmp_path / "folder").stat().st_mode) == 0o750
    assert os.umask(0o027) == 0o027  # looked at, not changed


def test_a_folder_appears_whole_at_the_end(tmp_path: Path) -> None:
    target = tmp_path / "new" / "adapter"
    with atomic_folder(target) as folder:
        (folder / "sub").mkdir()
        (folder / "sub" / "a").write_text("1")
        assert not target.exists()
        assert folder.parent == target.parent
    assert (target / "sub" / "a").read_text() == "1"
    assert names(target.parent) == ["adapter"]


@pytest.mark.parametrize("failure", [ValueError("no"), KeyboardInterrupt()], ids=["error", "interrupt"])
@pytest.mark.parametrize("there", [False, True], ids=["nothing there", "a folder there"])
def test_a_failing_block_leaves_the_old_folder(tmp_path: Path, failure: BaseException, there: bool) -> None:
    target = tmp_path / "adapter"
    if there:
        target.mkdir()
        (target / "old").write_text("old")

    def write() -> None:
        with atomic_folder(target, overwrite=True) as folder:
            (folder / "new").write_text("new")
            raise failure

    with pytest.raises(type(failure)):
        write()
    assert names(tmp_path) == (["adapter"] if there else [])
    assert not there or names(target) == ["old"]


def test_an_overwritten_folder_keeps_nothing_of_the_old_one(tmp_path: Path) -> None:
    target = tmp_path / "adapter"
    target.mkdir()
    (target / "old").write_text("old")
    with atomic_folder(target, overwrite=True) as folder:
        (folder / "new").write_text("new")
        assert names(target) == ["old"]
    assert names(target) == ["new"]
    assert names(tmp_path) == ["adapter"]


def test_a_failing_exchange_puts_the_old_folder_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "adapter"
    target.mkdir()
    (target / "old").write_text("old")
    replace = Path.replace
    calls: list[Path] = []

    def second_fails(self: Path, other: Path) -> Path:
        calls.append(self)
        if len(calls) == 2:
            raise OSError("no")
        return replace(self, other)

    monkeypatch.setattr(Path, "replace", second_fails)
    with pytest.raises(OSError, match="no"), atomic_folder(target, overwrite=True) as folder:
        (folder / "new").write_text("new")
    assert len(calls) == 3
    assert names(target) == ["old"]
    assert names(tmp_path) == ["adapter"]


@pytest.mark.parametrize("overwrite", [False, True])
def test_an_empty_folder_is_free(tmp_path: Path, overwrite: bool) -> None:
    check_free(tmp_path / "nothing", overwrite=overwrite)
    (tmp_path / "empty").mkdir()
    check_free(tmp_path / "empty", overwrite=overwrite)
    with atomic_folder(tmp_path / "empty", overwrite=overwrite) as folder:
        (folder / "a").write_text("1")
    assert names(tmp_path) == ["empty"]
    assert names(tmp_path / "empty") == ["a"]


def test_a_folder_with_something_in_it_is_not_free(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("mine")
    with pytest.raises(FileExistsError, match="not empty"):
        check_free(tmp_path)
    with pytest.raises(FileExistsError, match="not empty"), atomic_folder(tmp_path):
        pytest.fail("the block is not entered")
    assert (tmp_path / "a").read_text() == "mine"
    check_free(tmp_path, overwrite=True)


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_file_is_never_taken_for_a_folder(tmp_path: Path, overwrite: bool) -> None:
    (tmp_path / "a").write_text("mine")
    with pytest.raises(FileExistsError, match="is a file"), atomic_folder(tmp_path / "a", overwrite=overwrite):
        pytest.fail("the block is not entered")
    assert (tmp_path / "a").read_text() == "mine"
