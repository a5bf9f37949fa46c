"""A UNet in Triton's python backend: any artifact that `Session` opens, adapters by name in every request."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

import torch
from torch import Tensor

from trexport.adapter_file import factored_of
from trexport.deploy.names import ADAPTER, ADAPTERS, ARTIFACT, STRENGTH
from trexport.deploy.serve.folder import AdapterFolder, Signature, signature
from trexport.deploy.serve.rows import Choice, Limits, Row, feeds_of, runs_of
from trexport.deploy.serve.tensors import check_bridge, from_triton, text_from_triton, to_triton, triton
from trexport.errors import TrexportError, UsageError
from trexport.session import Session
from trlora.errors import TrloraError


@final
class TritonPythonModel:
    """What Triton calls. Requests that arrive together run together where they can, each sample with adapters of its own:
    in one run where the artifact is a bank, else one run for each set of adapters. A request that cannot be answered gets
    an error of its own and changes nothing for the others."""

    def initialize(self, args: Mapping[str, str]) -> None:
        """Load the artifact of this version. Raises what `Session` raises; Triton then refuses to serve the model."""
        check_bridge()
        config = json.loads(args["model_config"])
        parameters = {key: entry["string_value"] for key, entry in config["parameters"].items()}
        folder = Path(args["model_repository"])
        if args["model_instance_kind"] == "GPU":
            torch.cuda.set_device(int(args["model_instance_device_id"]))
        session = Session(
            folder / args["model_version"] / ARTIFACT,
            parameters["device"],
            capacity=int(parameters["adapters_in_memory"]),
        )
        self._server = AdapterServer(session, AdapterFolder(folder / ADAPTERS), config["max_batch_size"])

    def execute(self, requests: Sequence[Any]) -> list[Any]:
        """One response for each request."""
        pb_utils = triton()

        answers = self._server.answer([_asked(request) for request in requests])
        responses = []
        for answer in answers:
            if isinstance(answer, dict):
                tensors = [to_triton(name, tensor) for name, tensor in answer.items()]
                responses.append(pb_utils.InferenceResponse(tensors))
            else:
                responses.append(pb_utils.InferenceResponse([], error=as_triton_error(answer)))
        return responses

    def finalize(self) -> None:
        """Free the model."""
        self._server.close()


Answer = dict[str, Tensor] | Exception


@final
@dataclass(frozen=True)
class Asked:
    """A request: the UNet's inputs with a batch axis, and for each sample its adapters."""

    feeds: Mapping[str, Tensor]
    adapters: Sequence[Sequence[str]] | None = None
    strengths: Tensor | None = None
    """Shape of `adapters`, NaN for the adapter's own."""


@final
class Cancelled(Exception):
    """The client has gone."""


@final
class AdapterServer:
    """Answers requests with a session, whose only user it is; adapters are read from a folder when they are first named,
    and again when their files have changed.

    Args:
        max_batch: samples that run together at most.
    """

    def __init__(self, session: Session, folder: AdapterFolder, max_batch: int) -> None:
        self._session = session
        self._folder = folder
        manifest = session.artifact.manifest
        io = {tensor.name: tensor for tensor in session.spec.inputs}
        bank = factored_of(session.artifact).bank if manifest.factored is not None else None
        size = io["sample"].axes[0]
        fixed = size if isinstance(size, int) else None
        # what lacks in a batch is filled up to the least that the model takes
        profiles = session.artifact.engine_record.profiles if manifest.kind == "engine" else ()
        self._least = fixed or min((profile.min["batch_size"] for profile in profiles), default=1)
        limits = Limits(fixed or max_batch, bank, timesteps=bool(io["timestep"].axes))
        self._limits = limits
        self._signatures: dict[str, Signature] = {}
        self._active: Choice | None = ()
        """None after an activation that failed."""

    def answer(self, requests: Sequence[Asked | Exception]) -> list[Answer]:
        """Outputs by name, or the error, for each request; one that is an error already stays it."""
        answers: list[Answer | None] = [request if isinstance(request, Exception) else None for request in requests]
        rows: list[Row] = []
        for number, request in enumerate(requests):
            if isinstance(request, Exception):
                continue
            try:
                rows += self._rows(number, request)
            except Exception as error:  # of this request alone, whatever it is
                answers[number] = error
        outputs: dict[int, dict[str, Tensor]] = {}
        for run in runs_of(rows, self._limits, self._active):
            self._run_each(run, outputs, answers)
        for number, answer in enumerate(answers):
            if answer is None:
                own = [outputs[id(row)] for row in rows if row.request == number]
                answers[number] = {name: torch.stack([output[name] for output in own]) for name in own[0]}
        return [answer for answer in answers if answer is not None]

    def close(self) -> None:
        """Free the model."""
        self._session.close()

    def _rows(self, number: int, request: Asked) -> list[Row]:
        feeds = request.feeds
        batch = feeds["sample"].shape[0]
        choices = _choices(request, batch)
        for name in dict.fromkeys(name for choice in choices for name, _ in choice):
            self._load(name)
        if self._limits.bank is not None and any(len(choice) > 1 for choice in choices):
            raise UsageError(f"{ADAPTER}: several adapters for one sample given, this model takes one for each sample")
        return [
            Row(number, {name: tensor[index] for name, tensor in feeds.items()}, choice)
            for index, choice in enumerate(choices)
        ]

    def _load(self, name: str) -> None:
        """Make an adapter known, as its files are now."""
        checkpoint = self._folder.find(name)
        found = signature(checkpoint)
        if self._signatures.get(name) == found and name in self._session.adapters:
            return
        self._signatures.pop(name, None)
        if name in self._session.active:
            self._session.deactivate()
            self._active = ()
        self._session.load_adapter(name, checkpoint)
        self._signatures[name] = found

    def _run_each(
        self, run: Sequence[Row], outputs: dict[int, dict[str, Tensor]], answers: list[Answer | None]
    ) -> None:
        """A run of several requests that fails is run again for each of them, so that only the guilty one fails."""
        # in an order that does not depend on who came first: a sample that keeps its adapter is not written again
        run = sorted((row for row in run if answers[row.request] is None), key=lambda row: repr(row.choice))
        if not run:
            return
        try:
            found = self._run(run)
        except Exception as error:
            owners = list(dict.fromkeys(row.request for row in run))
            if len(owners) == 1:
                answers[owners[0]] = error
                return
            for owner in owners:
                self._run_each([row for row in run if row.request == owner], outputs, answers)
            return
        for index, row in enumerate(run):
            outputs[id(row)] = {name: tensor[index] for name, tensor in found.items()}

    def _run(self, run: Sequence[Row]) -> dict[str, Tensor]:
        filled = [*run, *[run[-1]] * (self._least - len(run))]
        feeds = feeds_of(filled)
        if not self._limits.timesteps:
            feeds["timestep"] = feeds["timestep"][0]
        if self._limits.bank is not None:
            chosen = [row.choice[0] if row.choice else (None, None) for row in run]
            chosen += [(None, None)] * (
                len(filled) - len(run)
            )  # nobody looks at those, and nothing is written for them
            return self._session.run(feeds, adapters=[name for name, _ in chosen], strengths=[s for _, s in chosen])
        if run[0].choice != self._active:
            self._active = None
            self._session.activate(dict(run[0].choice))
            self._active = run[0].choice
        return self._session.run(feeds)


def _choices(request: Asked, batch: int) -> list[Choice]:
    """For each sample its adapters, in an order that does not depend on the client's; empty names are none."""
    if request.adapters is None:
        if request.strengths is not None:
            raise UsageError(f"{STRENGTH} given without {ADAPTER}")
        return [()] * batch
    shape = (len(request.adapters), len(request.adapters[0]))
    if request.strengths is not None and tuple(request.strengths.shape) != shape:
        raise UsageError(
            f"{STRENGTH}: shape {list(request.strengths.shape)} found, expected {ADAPTER}'s, {list(shape)}"
        )
    strengths = [[None] * shape[1]] * shape[0] if request.strengths is None else request.strengths.tolist()
    found: list[Choice] = []
    for names, scales in zip(request.adapters, strengths, strict=True):
        pairs = {
            name: None if scale is None or scale != scale else scale
            for name, scale in zip(names, scales, strict=True)
            if name
        }
        if len(pairs) != sum(bool(name) for name in names):
            raise UsageError(f"{ADAPTER}: one named twice for one sample, in {list(names)}")
        found.append(tuple(sorted(pairs.items(), key=lambda pair: pair[0])))
    return found


def _asked(request: Any) -> Asked | Exception:
    """A request of Triton's."""
    try:
        if request.is_cancelled():
            return Cancelled("the client has cancelled the request, or gone")
        tensors = {tensor.name(): tensor for tensor in request.inputs()}
        adapters, strengths = tensors.pop(ADAPTER, None), tensors.pop(STRENGTH, None)
        feeds = {name: from_triton(tensor) for name, tensor in tensors.items()}
        return Asked(
            feeds,
            None if adapters is None else text_from_triton(adapters),
            None if strengths is None else from_triton(strengths),
        )
    except Exception as error:  # of this request alone, whatever it is
        return error


def as_triton_error(error: Exception) -> Any:
    """A `pb_utils.TritonError` with the message that a user of the command line would get."""
    pb_utils = triton()

    if isinstance(error, Cancelled):
        return pb_utils.TritonError(str(error), pb_utils.TritonError.CANCELLED)
    if isinstance(error, (TrexportError, TrloraError, UnicodeDecodeError)):
        return pb_utils.TritonError(str(error), pb_utils.TritonError.INVALID_ARG)
    return pb_utils.TritonError(f"{type(error).__name__}: {error}", pb_utils.TritonError.INTERNAL)
