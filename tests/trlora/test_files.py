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
def umask(request: pytest.FixtureRequest) -> Iterator[int]:
    before = os.umask(request.param)
    yield request.param
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


@pytest.mark.parametrize(
    ("umask", "file_mode", "folder_mode"), [(0o022, 0o644, 0o755), (0o027, 0o640, 0o750)], indirect=["umask"]
)
def test_results_have_the_permissions_of_any_other_file(
    tmp_path: Path, umask: int, file_mode: int, folder_mode: int
) -> None:
    """Also those that their writer makes for one user, as safetensors does."""
    with atomic_file(tmp_path / "file") as temporary:
        temporary.write_bytes(b"x")
        temporary.chmod(0o600)
    with atomic_folder(tmp_path / "folder") as folder:
        (folder / "inside").write_bytes(b"x")
        (folder / "inside").chmod(0o600)
    for name, mode in (("file", file_mode), ("folder", folder_mode), ("folder/inside", file_mode)):
        assert stat.S_IMODE((tmp_path / name).stat().st_mode) == mode, name
    assert os.umask(umask) == umask  # looked at, not changed


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


def test_a_link_to_a_folder_stays_a_link(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    with atomic_folder(tmp_path / "link") as folder:
        (folder / "x").write_text("1")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real" / "x").read_text() == "1"


def test_the_folder_that_the_process_runs_in_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a").mkdir()
    monkeypatch.chdir(tmp_path / "a")
    for name in (".", tmp_path / "a", tmp_path):
        with pytest.raises(FileExistsError, match="runs in"), atomic_folder(name, overwrite=True):
            pass
    assert list(tmp_path.iterdir()) == [tmp_path / "a"]
