"""Is a running server equal to PyTorch?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

import torch
from torch import Tensor

from trexport.artifact import Artifact
from trexport.deploy.client import TritonClient, parameter
from trexport.deploy.names import ADAPTER, LATENTS, PROMPT, image_name
from trexport.deploy.serve.decoder import Decoder
from trexport.deploy.serve.folder import AdapterFolder
from trexport.errors import ArtifactError, UsageError
from trexport.io_spec import Dtype
from trexport.models.adapters import BoundAdapter, open_adapters
from trexport.models.architectures import spec_of
from trexport.models.base import Base, open_base
from trexport.models.diffusion import Denoising, DenoisingStep
from trexport.models.model import random_feeds
from trexport.models.pipeline import text_encoders_of
from trexport.models.sample import sample_of
from trexport.parity.metrics import relative_l2
from trexport.parity.reference import Reference
from trexport.parity.tolerance import TOLERANCES
from trexport.progress import SILENT, Progress

_TIMESTEPS = (1.0, 500.0, 999.0)
_IMAGE_STEPS = 3


@final
@dataclass(frozen=True)
class Check:
    """One request and how far its answer was from the reference."""

    what: str
    relative_l2: float
    limit: float

    @property
    def passed(self) -> bool:
        """NaN does not."""
        return self.relative_l2 <= self.limit


@final
@dataclass(frozen=True)
class ServerReport:
    """What a server was asked, and what it made of it."""

    url: str
    model: str
    checks: Sequence[Check]

    @property
    def failures(self) -> list[str]:
        return [
            f"{check.what}: relative L2 {check.relative_l2:.2e}, expected {check.limit:.0e} at most"
            for check in self.checks
            if not check.passed
        ]

    @property
    def passed(self) -> bool:
        return not self.failures

    def to_dict(self) -> dict[str, Any]:
        checks = [vars(check) | {"passed": check.passed} for check in self.checks]
        return {"url": self.url, "model": self.model, "passed": self.passed, "checks": checks}


def check_server(
    url: str,
    model: str,
    artifact: Artifact | None = None,
    adapters: Path | None = None,
    *,
    progress: Progress = SILENT,
) -> ServerReport:
    """Send a running server random inputs and compare its answers with float32 PyTorch, the adapters never merged.

    Args:
        url: `http://HOST:PORT` or `grpc://HOST:PORT`.
        model: the UNet's name there. The model that denoises is checked too, where there is one.
        artifact: what the server should be serving; None for what the server says it serves, whose base and adapters
            must then be found here under the names that they had.
        adapters: a folder of adapters that the server has too; each is asked for by name.

    Raises:
        MissingError: tritonclient is not installed.
        TrexportError: no server answers.
        ArtifactError: the model is not there, was not laid out by trexport, or serves another artifact.
        RunError: the server's answer is an error.
    """
    with TritonClient(url) as client:
        config = client.config(model)
        record = parameter(config, "trexport")
        if record is None:
            raise ArtifactError(f"{url}: {model} was not laid out by trexport, expected a parameter 'trexport'")
        base, bound = served_sources(url, record, artifact)
        named = _named(record, adapters, base)
        merged = record["form"] in ("base", "merged")
        reference = Reference(base, [*bound, *named.values()] if not merged else bound, "cpu", progress=progress)
        numbers: dict[str | None, int] = {name: index + len(bound) for index, name in enumerate(named)}
        limit = TOLERANCES[record["dtype"]].relative_l2
        checks: list[Check] = []
        cases = [(None, t) for t in _TIMESTEPS] + [(name, 500.0) for name in named]
        with progress.task("check", len(cases)) as task:
            for name, timestep in cases:
                feeds = _feeds(base, record, seed=len(checks), timestep=timestep)
                expected = (reference.adapted(feeds) if merged else reference.mixed(feeds, [numbers.get(name)]))[
                    0
                ]  # a session that is asked for no adapter is the base
                found = client.run(model, _batched(feeds), _text(name, _batch(feeds)))["out_sample"]
                what = f"timestep {timestep:g}" + (f", adapter {name}" if name else "")
                checks.append(_compare(what, found, expected, limit))
                task.advance(1)
        if client.has(image_name(model)):
            drawn = reference.adapted if merged else reference.plain
            checks += _check_image(client, model, base, record, lambda fed: drawn(fed)[0], artifact)
    return ServerReport(url, model, checks)


def served_sources(url: str, record: Mapping[str, Any], artifact: Artifact | None) -> tuple[Base, list[BoundAdapter]]:
    """What the server should draw with: the base, proved by its hash, and the adapters that are merged into what it serves.

    Args:
        record: what the server says that it serves.
        artifact: what it should be serving; None to look for base and adapters under the names that they had.

    Raises:
        ArtifactError: it serves another artifact, or base or adapters have changed since.
    """
    if artifact is not None:
        manifest = artifact.manifest
        served = [(entry["strength"], entry["sha256"]) for entry in record["adapters"]]
        if (record["form"], record["base"]["content_hash"], served) != (
            manifest.form,
            manifest.base.content_hash,
            [(adapter.strength, adapter.sha256) for adapter in manifest.adapters],
        ):
            raise ArtifactError(
                f"{url}: serves another artifact than {artifact.folder}: a {record['form']} one of {record['base']['name']} "
                f"with {len(served)} adapters"
            )
        base, bound = artifact.sources()
        return base, bound if manifest.form in ("base", "merged") else []
    base = open_base(record["base"]["name"])
    if base.content_hash() != record["base"]["content_hash"]:
        raise ArtifactError(f"{base.name}: not the base that {url} serves (its hash differs); give the artifact too")
    if record["form"] not in ("base", "merged"):
        return base, []
    arguments = [f"{entry['name']}={entry['strength']!r}" for entry in record["adapters"]]
    # a UNet that was exported alone is checked alone, whatever its adapters have for text encoders
    in_encoders = any(entry.get("components") for entry in record["adapters"])
    bound = open_adapters(arguments, base, lambda: text_encoders_of(base) if in_encoders else None)
    for adapter, entry in zip(bound, record["adapters"], strict=True):
        if adapter.sha256 != entry["sha256"]:
            raise ArtifactError(f"{adapter.name}: not the adapter that {url} serves (its hash differs)")
    return base, bound


def _named(record: Mapping[str, Any], folder: Path | None, base: Base) -> dict[str, BoundAdapter]:
    if folder is None:
        return {}
    if record["form"] in ("base", "merged"):
        raise UsageError(f"--adapters: the server's model is a {record['form']} one and takes none")
    found = AdapterFolder(folder)
    return {name: open_adapters([str(found.find(name))], base)[0] for name in found.names()}


def _feeds(base: Base, record: Mapping[str, Any], *, seed: int, timestep: float) -> dict[str, Tensor]:
    """Random inputs of the usual sizes, one sample, rounded to what the server takes."""
    dtype: Dtype = record["dtype"]
    sizes = record["sizes"] | {"batch_size": 1}
    return random_feeds(spec_of(base.config, dtype), sizes, seed=seed, timestep=timestep)


def _batch(feeds: Mapping[str, Tensor]) -> int:
    return feeds["sample"].shape[0]


def _batched(feeds: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {**feeds, "timestep": feeds["timestep"].float().reshape(1, 1).expand(_batch(feeds), 1)}


def _text(name: str | None, batch: int) -> dict[str, list[list[str]]]:
    return {} if name is None else {ADAPTER: [[name]] * batch}


def _compare(what: str, found: Tensor, expected: Tensor, limit: float) -> Check:
    if found.shape != expected.shape:
        raise ArtifactError(
            f"{what}: the server answers with shape {list(found.shape)}, expected {list(expected.shape)}"
        )
    return Check(what, relative_l2(found, expected), limit)


def _check_image(
    client: TritonClient,
    model: str,
    base: Base,
    record: Mapping[str, Any],
    denoise: DenoisingStep,
    artifact: Artifact | None,
) -> list[Check]:
    """A few steps without guidance, from given noise. Nothing where the server decodes and there is no decoder here."""
    feeds = _feeds(base, record, seed=7, timestep=0.0)
    noise = torch.randn(feeds["sample"].shape, generator=torch.Generator().manual_seed(7))
    others = {name: tensor for name, tensor in feeds.items() if name not in ("sample", "timestep")}
    expected = Denoising.of_folder(base.folder, _IMAGE_STEPS).run(denoise, noise, others)
    inputs = {PROMPT if name == "encoder_hidden_states" else name: tensor for name, tensor in others.items()}
    inputs |= {
        LATENTS: noise,
        "num_inference_steps": torch.full((1, 1), _IMAGE_STEPS, dtype=torch.int32),
        "guidance_scale": torch.ones(1, 1),
    }
    found = client.run(image_name(model), inputs)
    what = f"{image_name(model)}, {_IMAGE_STEPS} steps"
    limit = TOLERANCES[record["dtype"]].trajectory_relative_l2
    if LATENTS in found:
        return [_compare(what, found[LATENTS], expected, limit)]
    decoder = artifact.folder / "vae_decoder" if artifact is not None else None
    if decoder is not None and decoder.is_dir():
        expected = Decoder(decoder)(expected)
    elif sample_of(base) is None:
        return []
    return [_compare(what, found["images"], (expected / 2 + 0.5).clamp(0, 1), limit)]
