"""Adapters in memory: which leave, which stay, which come back."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import safetensors.torch
import torch

from tests.helpers import bits
from tests.trexport.helpers import SIZES, copy_of
from trexport.artifact import Artifact
from trexport.errors import ArtifactError, TrexportError, UsageError
from trexport.models.adapters import BoundAdapter, open_adapters
from trexport.models.base import Base
from trexport.models.model import random_feeds
from trexport.session import Session
from trexport.session.adapters import AdapterStore
from trexport.session.forms import Prepared
from trlora import save_adapter
from trlora.errors import CheckpointError

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


class Shelf:
    """A store over adapters that are opened and prepared in name only, with a record of what was read."""

    def __init__(self, bound: BoundAdapter, capacity: int) -> None:
        self.read: list[str] = []
        self._bound = bound
        self.store = AdapterStore(capacity, self._open, lambda name, adapter: Prepared(name, adapter.strength, {}))

    def _open(self, argument: str) -> BoundAdapter:
        self.read.append(argument)
        return self._bound


@pytest.fixture(scope="module")
def bound(base: Base) -> BoundAdapter:
    (adapter,) = open_adapters(["random:lora:1"], base)
    return adapter


def test_the_least_recently_used_leaves(bound: BoundAdapter) -> None:
    shelf = Shelf(bound, 3)
    for name in "abc":
        shelf.store.load(name, f"{name}.file")
    shelf.store.get("a")
    assert shelf.store.kept() == ["b", "c", "a"]
    shelf.store.load("d", "d.file")
    assert shelf.store.kept() == ["c", "a", "d"]
    assert shelf.store.names() == ["a", "b", "c", "d"]
    assert shelf.read == ["a.file", "b.file", "c.file", "d.file"]


def test_what_has_left_is_read_again_and_what_has_not_is_not(bound: BoundAdapter) -> None:
    shelf = Shelf(bound, 2)
    for name in "abc":
        shelf.store.load(name, f"{name}.file")
    kept = shelf.store.get("c")
    assert shelf.store.get("c") is kept
    assert len(shelf.read) == 3
    assert shelf.store.get("a").name == "a"
    assert shelf.read[3:] == ["a.file"]
    assert shelf.store.kept() == ["c", "a"]


def test_no_more_than_the_capacity_are_kept(bound: BoundAdapter) -> None:
    for capacity in (1, 2, 5):
        shelf = Shelf(bound, capacity)
        for number in range(9):
            shelf.store.load(str(number), "file")
            assert len(shelf.store.kept()) == min(number + 1, capacity)
        for number in (3, 1, 4, 1, 5):
            shelf.store.get(str(number))
            assert len(shelf.store.kept()) == capacity


def test_pinned_ones_stay(bound: BoundAdapter) -> None:
    shelf = Shelf(bound, 2)
    shelf.store.load("a", "file")
    shelf.store.load("b", "file")
    shelf.store.load("c", "file", pinned=["a"])
    assert shelf.store.kept() == ["a", "c"]
    with pytest.raises(UsageError, match="no room for 'd'"):
        shelf.store.load("d", "file", pinned=["a", "c"])
    assert shelf.store.kept() == ["a", "c"]
    assert shelf.store.names() == ["a", "b", "c"]
    with pytest.raises(UsageError, match="no room for 'b'"):
        shelf.store.get("b", pinned=["a", "c"])


def test_a_name_that_is_loaded_again_is_replaced_in_place(bound: BoundAdapter) -> None:
    shelf = Shelf(bound, 2)
    for name in "ab":
        shelf.store.load(name, "old")
    again = shelf.store.load("a", "new", pinned=["b"])
    assert shelf.store.get("a") is again
    assert set(shelf.store.kept()) == {"a", "b"}
    shelf.store.load("c", "file")
    shelf.store.load("d", "file")
    shelf.store.get("a")
    assert shelf.read[-1] == "new"


def test_what_is_forgotten_is_gone(bound: BoundAdapter) -> None:
    shelf = Shelf(bound, 2)
    shelf.store.load("alpha", "file")
    shelf.store.forget("alpha")
    assert shelf.store.names() == shelf.store.kept() == []
    for refused in (shelf.store.forget, shelf.store.get):
        with pytest.raises(UsageError, match="'alpha'"):
            refused("alpha")


def test_room_for_none_is_refused(bound: BoundAdapter) -> None:
    with pytest.raises(UsageError, match="at least 1"):
        Shelf(bound, 0)


# --- in a session, from files ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory, base: Base) -> dict[str, Path]:
    """Three adapters on disk."""
    folder = tmp_path_factory.mktemp("adapters")
    names = {"a": "random:tlora:2:6", "b": "random:tlora:1:4", "c": "random:lora:2"}
    for name, argument in names.items():
        (bound,) = open_adapters([argument], base)
        save_adapter(bound.adapter, folder / name)
    return {name: folder / name for name in names}


def scaled(folder: Path, factor: float) -> None:
    """The adapter's numbers changed, its shapes kept."""
    tensors = {k: v * factor for k, v in safetensors.torch.load_file(folder / WEIGHTS).items()}
    safetensors.torch.save_file(tensors, folder / WEIGHTS)


def test_one_that_has_left_comes_back_the_same(swappable: Artifact, folders: dict[str, Path]) -> None:
    feeds = random_feeds(swappable.manifest.io, SIZES, seed=4)
    with Session(swappable, capacity=2) as session:
        session.load_adapter("a", f"{folders['a']}=0.7")
        session.activate({"a": None})
        first = bits(session.run(feeds)["out_sample"])
        session.load_adapter("b", folders["b"])
        session.load_adapter("c", folders["c"])
        assert session.resident == ["a", "c"]  # a is active and stays, though used least recently
        session.activate({"c": 1.0})
        session.activate({"b": 1.0})
        assert session.resident == ["c", "b"]
        assert session.adapters == ["a", "b", "c"]
        assert bits(session.run(feeds)["out_sample"]) != first
        session.activate({"a": None})
        assert session.active == {"a": 0.7}
        assert bits(session.run(feeds)["out_sample"]) == first


def test_an_active_adapter_does_not_leave(swappable: Artifact, folders: dict[str, Path]) -> None:
    with Session(swappable, capacity=1) as session:
        session.load_adapter("a", folders["a"])
        session.activate({"a": 1.0})
        with pytest.raises(UsageError, match="no room"):
            session.load_adapter("b", folders["b"])
        assert session.resident == session.adapters == ["a"]
        for refused in (session.unload_adapter, lambda name: session.load_adapter(name, folders["b"])):
            with pytest.raises(UsageError, match="is active"):
                refused("a")
        session.deactivate()
        session.load_adapter("b", folders["b"])
        assert session.resident == ["b"]
        session.unload_adapter("a")
        assert session.adapters == ["b"]


def test_a_file_that_has_changed_since_is_refused(
    swappable: Artifact, folders: dict[str, Path], tmp_path: Path
) -> None:
    changing = copy_of(folders["a"], tmp_path / "changing")
    feeds = random_feeds(swappable.manifest.io, SIZES, seed=4)
    with Session(swappable, capacity=1) as session:
        session.load_adapter("x", changing)
        session.activate({"x": 1.0})
        old = bits(session.run(feeds)["out_sample"])
        scaled(changing, 1.5)
        session.activate({"x": 1.0})  # it is in memory: what was loaded counts
        assert bits(session.run(feeds)["out_sample"]) == old
        session.deactivate()
        session.load_adapter("b", folders["b"])
        session.activate({"b": 0.5})
        with_b = bits(session.run(feeds)["out_sample"])
        with pytest.raises(ArtifactError, match="changed since"):
            session.activate({"x": 1.0})
        assert session.active == {"b": 0.5}
        assert bits(session.run(feeds)["out_sample"]) == with_b
        session.deactivate()
        session.load_adapter("x", changing)
        session.activate({"x": 1.0})
        assert bits(session.run(feeds)["out_sample"]) not in (old, with_b)


def test_a_file_that_is_gone_is_refused(swappable: Artifact, folders: dict[str, Path], tmp_path: Path) -> None:
    going = copy_of(folders["a"], tmp_path / "going")
    with Session(swappable, capacity=1) as session:
        session.load_adapter("x", going)
        session.load_adapter("b", folders["b"])
        going.rename(tmp_path / "gone")
        with pytest.raises(TrexportError, match="going"):
            session.activate({"x": 1.0})
        session.activate({"b": 1.0})


def test_an_adapter_with_nan_is_refused(swappable: Artifact, folders: dict[str, Path], tmp_path: Path) -> None:
    broken = copy_of(folders["a"], tmp_path / "broken")
    tensors = safetensors.torch.load_file(broken / WEIGHTS)
    next(iter(tensors.values())).view(-1)[0] = torch.nan
    safetensors.torch.save_file(tensors, broken / WEIGHTS)
    with Session(swappable) as session:
        session.load_adapter("x", folders["b"])
        with pytest.raises(CheckpointError, match="NaN"):
            session.load_adapter("x", broken)
        assert session.adapters == session.resident == ["x"]
        session.activate({"x": 1.0})  # the one from before


@pytest.mark.parametrize("form", ["swappable", "two_slots", "bank"])
def test_an_adapter_of_another_base_is_refused(
    form: str, request: pytest.FixtureRequest, folders: dict[str, Path], tmp_path: Path
) -> None:
    artifact: Artifact = request.getfixturevalue(form)

    def saying(name: str, recorded: str) -> Path:
        folder = copy_of(folders["a"], tmp_path / name)
        config = json.loads((folder / CONFIG).read_bytes())
        config["base_model"] = {"name_or_path": "elsewhere", "sha256": recorded}
        (folder / CONFIG).write_text(json.dumps(config))
        return folder

    own = artifact.manifest.base.content_hash
    assert own.startswith("blake3:")
    with Session(artifact) as session:
        with pytest.raises(ArtifactError, match="another base"):
            session.load_adapter("x", saying("wrong", "blake3:" + "0" * 64))
        assert session.adapters == []
        session.load_adapter("right", saying("right", own))
        # the hash of a file tells nothing of the weights
        session.load_adapter("file", saying("file", "0" * 64))
        assert session.adapters == ["right", "file"]


@pytest.mark.parametrize(
    ("form", "argument"),
    [
        ("swappable", "random:tlora:3:6"),
        ("swappable", "random:lora:37"),
        ("two_slots", "random:tlora:2:7"),
        ("two_slots", "random:tlora-star:1:3"),
        ("bank", "random:tlora:3:1"),
        ("bank", "random:lora:1"),
    ],
)
def test_an_adapter_that_fits_nowhere_is_refused(form: str, argument: str, request: pytest.FixtureRequest) -> None:
    with Session(request.getfixturevalue(form)) as session:
        with pytest.raises(ArtifactError, match="export for this adapter's shapes"):
            session.load_adapter("x", argument)
        assert session.adapters == []
