from pathlib import Path

import pytest

from tests.trexport.helpers import copy_of
from trexport.errors import TrexportError, UsageError
from trexport.models.adapters import open_adapters, split_strength
from trexport.models.base import Base, open_base
from trlora import CheckpointError


def test_strengths(tmp_path: Path) -> None:
    assert split_strength("a/b") == ("a/b", None)
    assert split_strength("a/b=0.5") == ("a/b", 0.5)
    assert split_strength("a=b=-1e-1") == ("a=b", -0.1)
    (tmp_path / "x=2").mkdir()
    assert split_strength(str(tmp_path / "x=2")) == (str(tmp_path / "x=2"), None)
    assert split_strength(str(tmp_path / "x=2=3")) == (str(tmp_path / "x=2"), 3.0)
    for wrong in ("a=", "a=x", "a=nan", "a=inf", "a=0,5"):
        with pytest.raises(UsageError, match="strength"):
            split_strength(wrong)


def test_the_checkpoint_s_own_strength_stands_unless_another_is_given(base: Base, adapter_folder: Path) -> None:
    assert [a.strength for a in open_adapters([str(adapter_folder)], base)] == [1.0]
    assert [a.strength for a in open_adapters([f"{adapter_folder}=-2"], base)] == [-2.0]


def test_the_same_adapter_twice_is_refused(base: Base, adapter_folder: Path) -> None:
    with pytest.raises(UsageError, match="twice"):
        open_adapters([str(adapter_folder), f"{adapter_folder}=0.5"], base)


def test_unknown_names(base: Base) -> None:
    for name in ("random:lora", "random:lora:0", "random:dora:4", "random:tlora:2"):
        with pytest.raises(UsageError, match=name):
            open_adapters([name], base)
    with pytest.raises(UsageError, match="sample:digits/nine"):
        open_adapters(["sample:digits/nein"], base)
    with pytest.raises(TrexportError, match="no/such"):
        open_adapters(["no/such"], base)


def test_an_adapter_for_another_architecture_is_refused(adapter_folder: Path) -> None:
    with pytest.raises(CheckpointError, match="does not fit the base"):
        open_adapters([str(adapter_folder)], open_base("sample:digits"))


def test_the_hash_is_of_the_content(base: Base, adapter_folder: Path, tmp_path: Path) -> None:
    moved = copy_of(adapter_folder, tmp_path / "moved")
    (one,), (two,) = open_adapters([str(adapter_folder)], base), open_adapters([str(moved)], base)
    assert one.sha256 == two.sha256
    assert one.record().layers == len(one.layers) == 32
