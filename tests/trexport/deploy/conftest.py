"""The sample as a bank, laid out for Triton with its denoising model, and the tiny UNet as a swappable model beside it."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from torch import Tensor

from tests.trexport.deploy.server import TritonServer, triton_server
from trexport.artifact import Artifact, open_artifact
from trexport.deploy.options import TritonOptions
from trexport.deploy.triton import write_triton
from trexport.graph.export import ExportOptions, export_onnx
from trexport.graph.factored import FactoredOptions
from trexport.models.adapters import open_adapters
from trexport.models.base import Base, open_base, sample_folder
from trexport.models.sample import Sample, sample_of
from trexport.session import Session

NAMES = ("nine", "outline", "slant")


@pytest.fixture(scope="session")
def digits() -> Base:
    return open_base("sample:digits")


@pytest.fixture(scope="session")
def sample(digits: Base) -> Sample:
    found = sample_of(digits)
    assert found is not None
    return found


@pytest.fixture(scope="session")
def digits_adapters() -> Path:
    """A folder with the sample's three adapters."""
    return sample_folder("digits") / "adapters"


@pytest.fixture(scope="session")
def digits_bank(tmp_path_factory: pytest.TempPathFactory, digits: Base) -> Artifact:
    """A bank of two places for all three, a timestep for each sample."""
    folder = tmp_path_factory.mktemp("onnx") / "bank"
    adapters = open_adapters(["sample:digits/nine", "sample:digits/slant"], digits)
    options = ExportOptions(factored=FactoredOptions(blank=True, bank=2), timestep_per_sample=True)
    export_onnx(digits, adapters, folder, options)
    return open_artifact(folder)


@pytest.fixture(scope="session")
def repository(
    tmp_path_factory: pytest.TempPathFactory,
    digits_bank: Artifact,
    digits_adapters: Path,
    swappable: Artifact,
    adapter_folder: Path,
    lora_folder: Path,
) -> Path:
    """Models `unet`, `unet_image` and `swap`, the last with the adapters `tlora` and `lora`."""
    folder = tmp_path_factory.mktemp("triton") / "repository"
    write_triton(digits_bank, folder, TritonOptions(adapters=digits_adapters, image_instances=1))
    adapters = tmp_path_factory.mktemp("adapters")
    shutil.copytree(adapter_folder, adapters / "tlora")
    shutil.copytree(lora_folder, adapters / "lora")
    other = folder.parent / "other"
    write_triton(swappable, other, TritonOptions("swap", adapters=adapters, image=False))
    (other / "swap").rename(folder / "swap")
    return folder


@pytest.fixture(scope="module")
def server(repository: Path) -> Iterator[TritonServer]:
    """The real server with all of the repository's models."""
    with triton_server(repository, ["unet", "unet_image", "swap"]) as running:
        yield running


@pytest.fixture(scope="session")
def alone(digits_bank: Artifact, digits_adapters: Path) -> Iterator[Session]:
    """The same bank, in this process."""
    with Session(digits_bank) as session:
        for name in NAMES:
            session.load_adapter(name, digits_adapters / name)
        yield session


def drawn_alone(session: Session, feeds: dict[str, Tensor], names: list[str | None]) -> Tensor:
    """One step in this process, each sample its own adapter."""
    return session.run(feeds, adapters=names)["out_sample"]
