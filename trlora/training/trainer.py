"""Training an adapter from the first step to the saved file: resumed where it was stopped, to the same bits."""

from __future__ import annotations

import copy
import dataclasses
import json
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, final

import torch
from torch import Tensor, nn

from trlora.adapter import Adapter, adapter_from_model
from trlora.checkpoint import save_adapter
from trlora.config import BaseModel
from trlora.errors import CheckpointError
from trlora.files import atomic_file
from trlora.training.accelerated import accelerator_for, seed_
from trlora.training.config import TrainingConfig, TrainingConfigError
from trlora.training.ema import MovingAverage
from trlora.training.order import Order, mixed
from trlora.training.output import Output
from trlora.training.parameter_stacks import ParameterStacks
from trlora.training.parameters import trainable_parameters
from trlora.training.smaller import what_takes_less
from trlora.training.state import (
    TrainingState,
    folder_of,
    load_state,
    prune,
    save_state,
    scaler_state,
)
from trlora.training.step import Loss, Stepped, TrainingError, step_
from trlora.training.weight_path import WeightPath

CONFIG_NAME = "training_config.json"
ADAPTER_NAME = "adapter"


@final
@dataclass(frozen=True)
class StepRecord:
    """What is told of a step."""

    step: int
    """Steps done, this one included."""
    loss: float
    penalty: float
    gradient_norm: float
    learning_rate: float
    seconds: float


class Callback(Protocol):
    """Somebody who looks at every step: a progress bar, sample pictures."""

    def __call__(self, trainer: Trainer, record: StepRecord, /) -> None: ...


class Trainer:
    """One training of one adapter of a model, on `accelerate`: as many processes and devices as it has been launched with.

    `out/checkpoint-…` are adapters that training can go on from, `out/adapter` is the result.

    With `path="weight"` in one process the gradients are those of `ParameterStacks` while it runs: what wants those of
    single parameters (a callback that logs them, a loss that asks `torch.autograd.grad` for them) takes
    `path="activations"`.
    """

    def __init__(
        self,
        model: nn.Module,
        config: TrainingConfig,
        out: str | Path | None = None,
        *,
        name: str = "default",
        accelerator: Any | None = None,
        base_model: BaseModel | None = None,
    ) -> None:
        """
        Args:
            model: with adapters from `inject_`, their parameters in float32.
            out: a folder; None: nothing is written.
            name: of the adapter to be trained.
            accelerator: an `accelerate.Accelerator`; made from the config unless given.
            base_model: what the adapter says of its base.

        Raises:
            TargetError: the model has no adapter of that name.
            TrainingConfigError: parameters that are not float32, or a model without gradient checkpointing is to have it.
            AccelerateMissingError: `accelerate` is not installed.
        """
        self.model = model
        self.config = config
        self.out = None if out is None else Path(out)
        self.name = name
        self.base_model = base_model or BaseModel(class_name=type(model).__name__)
        self.parameters = trainable_parameters(model, name)
        self.step = 0
        """Steps done."""
        wrong = {str(parameter.dtype) for parameter in self.parameters} - {"torch.float32"}
        if wrong:
            raise TrainingConfigError(
                f"the adapter's parameters are {', '.join(sorted(wrong))}, expected float32; cast the base, then inject_"
            )
        if config.checkpoint_every is not None and out is None:
            raise TrainingConfigError("checkpoint_every is set, and there is no folder to write to; give one")
        if config.gradient_checkpointing:
            enable = getattr(model, "enable_gradient_checkpointing", None)
            if enable is None:
                raise TrainingConfigError(f"{type(model).__name__} has no gradient checkpointing; leave it out")
            enable()
        self.accelerator: Any = accelerator if accelerator is not None else accelerator_for(config)
        self._output = Output(self.out, self.accelerator)
        precision = {"no": None, "fp16": torch.float16, "bf16": torch.bfloat16}[config.mixed_precision]
        weights = config.path == "weight"
        self._prepared: Any
        self._optimizer: Any
        self._path: WeightPath | None = None
        # where accelerate wraps the model, as by DistributedDataParallel, that sees to each of its parameters
        if weights and self.accelerator.distributed_type.value == "NO":
            self._prepared = self.accelerator.prepare(model)
            self._path = WeightPath(model, name, precision, compiled=config.compile)
            self._stacks = ParameterStacks(self._path.groups, self.parameters)
            self._optimizer = self.accelerator.prepare(_adamw(self._stacks.leaves, config))
        else:
            self._stacks = ParameterStacks([], self.parameters)
            self._prepared, self._optimizer = self.accelerator.prepare(model, _adamw(self.parameters, config))
            if weights:
                self._path = WeightPath(model, name, precision, compiled=config.compile)
        if config.compile:
            self._prepared = torch.compile(self._prepared)  # `model` itself, which draws pictures, is as it was
        self.average = None if config.ema_decay is None else MovingAverage(self.parameters, config.ema_decay)
        self._resumed: TrainingState | None = None

    def resume_(self, checkpoint: str | Path = "latest") -> int:
        """Go on from a checkpoint, a folder, or the `latest` one below `out`.

        Returns:
            The steps that are done; 0 where there is no latest one.

        Raises:
            CheckpointError: no checkpoint, a damaged one, or one of another adapter.
            TrainingConfigError: it was trained with another config; the fields are named.
        """
        if str(checkpoint) == "latest":
            last = self._output.last_checkpoint()
            if last is None:
                return 0
            checkpoint = last
        folder = Path(checkpoint)
        state = load_state(folder)
        differences = self.config.differences(state.config)
        if state.processes != self.accelerator.num_processes:
            differences["processes"] = (self.accelerator.num_processes, state.processes)
        if differences:
            said = ", ".join(f"{name} {its!r} there and {own!r} here" for name, (own, its) in differences.items())
            raise TrainingConfigError(f"{folder}: another training: {said}; give the same, or start in another folder")
        own, saved = adapter_from_model(self.model, self.name).tensors(), state.adapter.tensors()
        for key in sorted({*own, *saved}):
            expected, found = (tuple(tensors[key].shape) if key in tensors else "nothing" for tensors in (own, saved))
            if expected != found:
                raise CheckpointError(f"{folder}: another adapter: {key}: {found} found, expected {expected}")
        moments = self._stacks.join(state.optimizer)
        with torch.no_grad():
            for key, tensor in own.items():
                tensor.copy_(saved[key])
        groups = self._optimizer.state_dict()["param_groups"]
        self._optimizer.load_state_dict({"state": moments, "param_groups": groups})
        if self.average is not None:
            for average, value in zip(self.average.averages, state.averages, strict=True):
                average.copy_(value)
        if state.scaler is not None:
            self.accelerator.scaler.load_state_dict(state.scaler)
        self.step, self._resumed = state.step, state
        return self.step

    def run(
        self,
        data: Sequence[Any],
        loss: Loss,
        *,
        collate: Callable[[list[Any]], Any] = torch.utils.data.default_collate,
        callbacks: Sequence[Callback] = (),
    ) -> list[StepRecord]:
        """Train until `max_steps` steps are done, save what the config says, and the adapter at the end.

        Every step seeds all generators by its number, so that a resumed training draws what it would have drawn: noise,
        timesteps and augmentation have to come from them.

        Args:
            data: samples by number; they are loaded in this process.
            loss: (model, batch) → scalar, with the model as `accelerate` has wrapped it.
            collate: samples → batch; tensors are put on the device.
            callbacks: called after every step, on every process.

        Returns:
            The record of every step of this call.

        Raises:
            TrainingConfigError: no data, or other data than before.
            TrainingError: a loss or gradient that is NaN or Inf, memory or disk full. The adapter is that before the step,
                and the last checkpoint is as it was.
        """
        self._check_data(len(data))
        self._write_config()
        order = Order(
            len(data),
            self.config.batch_size,
            self.config.accumulation,
            self.config.seed,
            self.accelerator.num_processes,
        )
        rank = self.accelerator.process_index
        records: list[StepRecord] = []
        was_training = self.model.training
        self._prepared.train()
        try:
            with self._stacks.held():
                while self.step < self.config.max_steps:
                    start = time.perf_counter()
                    rate = self.config.rate(self.step)
                    for group in self._optimizer.param_groups:
                        group["lr"] = rate
                    seed_(mixed(self.config.seed, 1 + self.step, rank))
                    numbers = order.batches(self.step, rank)
                    stepped = self._step([self._batch(data, collate, chosen) for chosen in numbers], loss)
                    if self.average is not None:
                        self.average.update_(self.step)
                    self.step += 1
                    records.append(
                        StepRecord(
                            self.step,
                            self._mean(stepped.loss),
                            stepped.penalty,
                            stepped.gradient_norm,
                            rate,
                            time.perf_counter() - start,
                        )
                    )
                    self._tell(records[-1], callbacks)
                    every = self.config.checkpoint_every
                    if every is not None and (self.step % every == 0 or self.step == self.config.max_steps):
                        self.save_checkpoint(len(data))
        finally:
            self.model.train(was_training)
        self._output.write(self.step, lambda out: save_adapter(self.adapter(), out / ADAPTER_NAME, overwrite=True))
        return records

    def adapter(self) -> Adapter:
        """The adapter as it stands: its moving average where there is one."""
        with nullcontext() if self.average is None else self.average.in_place():
            found = adapter_from_model(self.model, self.name, base_model=self.base_model)
            return _detached(found)

    def save_checkpoint(self, samples: int) -> None:
        """Write a checkpoint now, and remove those that are too many."""
        state = self._stacks.split(self._optimizer.state_dict()["state"])
        found = TrainingState(
            self.config,
            self.step,
            adapter_from_model(self.model, self.name, base_model=self.base_model),
            state,
            () if self.average is None else tuple(self.average.averages),
            scaler_state(self.accelerator),
            samples,
            self.accelerator.num_processes,
        )

        def write(out: Path) -> None:
            save_state(found, folder_of(out, self.step))
            prune(out, self.config.keep_checkpoints)

        self._output.write(self.step, write)

    def _check_data(self, samples: int) -> None:
        if samples == 0:
            raise TrainingConfigError("no data: an empty sequence, expected one sample at least")
        if self._resumed is not None and self._resumed.samples != samples:
            raise TrainingConfigError(
                f"{samples} samples here, {self._resumed.samples} where the training was stopped; give the same data, or "
                "start in another folder"
            )

    def _batch(self, data: Sequence[Any], collate: Callable[[list[Any]], Any], numbers: list[int]) -> Any:
        return _moved(collate([data[number] for number in numbers]), self.accelerator.device)

    def _step(self, batches: list[Any], loss: Loss) -> Stepped:
        def asked(model: nn.Module, batch: Any) -> Tensor:
            with self.accelerator.autocast():
                return loss(model, batch)

        self._stacks.zero_grad()
        try:
            return step_(
                self.model,
                batches,
                asked,
                self._optimizer,
                number=self.step,
                prepared=self._prepared,
                penalty_kind=self.config.penalty,
                penalty_weight=self.config.penalty_weight,
                name=self.name,
                max_grad_norm=self.config.max_grad_norm,
                accelerator=self.accelerator,
                around=nullcontext if self._path is None else self._path.built,
            )
        except TrainingError as error:
            raise TrainingError(f"{error}{self._output.kept()}") from error
        except torch.OutOfMemoryError as error:
            less = what_takes_less(self.config, self.model)
            raise TrainingError(
                f"step {self.step}: out of memory on {self.accelerator.device}; {less}{self._output.kept()}"
            ) from error

    def _tell(self, record: StepRecord, callbacks: Sequence[Callback]) -> None:
        if self.accelerator.trackers:
            names = ("loss", "penalty", "gradient_norm", "learning_rate")
            self.accelerator.log({name: getattr(record, name) for name in names}, step=record.step)
        for callback in callbacks:
            callback(self, record)

    def _mean(self, value: float) -> float:
        if self.accelerator.num_processes == 1:
            return value
        every = self.accelerator.gather(torch.tensor([value], device=self.accelerator.device))
        return float(every.mean())

    def _write_config(self) -> None:
        def write(out: Path) -> None:
            with atomic_file(out / CONFIG_NAME) as temporary:
                temporary.write_text(json.dumps(self.config.to_dict(), indent=2) + "\n", encoding="utf-8")

        self._output.write(self.step, write)


def _adamw(parameters: Sequence[nn.Parameter], config: TrainingConfig) -> torch.optim.AdamW:
    return torch.optim.AdamW(
        parameters,
        lr=config.learning_rate,
        betas=(config.beta1, config.beta2),
        eps=config.epsilon,
        weight_decay=config.weight_decay,
        fused=True,  # many small parameters: one launch, not a dozen for every few of them
    )


def _moved(batch: Any, device: torch.device) -> Any:
    """Tensors of a batch, in dicts, lists and tuples, on a device."""
    if isinstance(batch, Tensor):
        return batch.to(device)
    if isinstance(batch, dict):
        return {key: _moved(value, device) for key, value in batch.items()}
    if isinstance(batch, (list, tuple)):
        values = [_moved(value, device) for value in batch]
        return type(batch)(*values) if hasattr(batch, "_fields") else type(batch)(values)
    return batch


def _detached(adapter: Adapter) -> Adapter:
    """The same with tensors of its own."""
    return dataclasses.replace(adapter, layers=copy.deepcopy(dict(adapter.layers)))
