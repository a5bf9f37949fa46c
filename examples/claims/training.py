"""Training, measuring and drawing with many runs at once."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from stack import Stack
from stacked_unet import Shape, StackedUNet
from tasks import Batch, Study, stacked
from torch import Tensor

WARM_UP = 0.05
MAX_NORM = 1.0
ENCODER_RATE = 1e-2
INFERENCE_STEPS = 20
IMAGES_AT_ONCE = 4096
FIRST_TIMED = 10
"""The steps before load kernels, and say nothing about the time of the others."""


@dataclass(frozen=True)
class Losses:
    """The loss of every step and run, (steps, runs), and for each run the step that it broke off at, or −1."""

    values: Tensor
    broke_off: Tensor


class Optimizer:
    """AdamW without decay, of all runs in one vector: each run has its own rate and its own clipped gradient norm."""

    def __init__(self, stack: Stack, rates: Tensor, encoder_rate: float) -> None:
        self.stack = stack
        self.rates = rates[stack.owner]
        self.rates[stack.adapter_elements :] = encoder_rate
        self.mean, self.square = torch.zeros_like(stack.flat), torch.zeros_like(stack.flat)
        self.steps = 0

    def norms(self, gradient: Tensor) -> Tensor:
        """The norm of each run's gradient, (runs,)."""
        squares = torch.segment_reduce(gradient.square(), "sum", lengths=self.stack.segment_length, unsafe=True)
        owner = self.stack.segment_owner
        return gradient.new_zeros(len(self.stack.runs)).index_add(0, owner, squares).sqrt()

    def step_(self, gradient: Tensor, factor: float, alive: Tensor) -> Tensor:
        """One step at `factor` times the rates, of the runs alive whose gradients are finite; gives these (runs,)."""
        norms = self.norms(gradient)
        alive = alive & norms.isfinite()
        owner = self.stack.owner
        gradient = gradient * (MAX_NORM / (norms + 1e-6)).clamp(max=1)[owner]
        self.steps += 1
        # what a dead run gathers is never read: its parameters stay as they are
        self.mean.lerp_(gradient, 1 - 0.9)
        self.square.mul_(0.999).addcmul_(gradient, gradient, value=1 - 0.999)
        denominator = (self.square / (1 - 0.999**self.steps)).sqrt_().add_(1e-8)
        change = self.mean / (1 - 0.9**self.steps) / denominator * self.rates * factor
        with torch.no_grad():
            self.stack.flat.sub_(torch.where(alive[owner], change, 0))
        return alive


def schedule(step: int, steps: int) -> float:
    """Linear warm-up over 5 % of the steps, then half a cosine down to zero."""
    warm_up = max(1, round(WARM_UP * steps))
    if step < warm_up:
        return (step + 1) / warm_up
    return (1 + math.cos(math.pi * (step - warm_up) / max(1, steps - warm_up))) / 2


class OutOfTime(Exception):
    """The training would not end before its time is up."""


def train(
    study: Study,
    stack: Stack,
    steps: int,
    encoder_rate: float = ENCODER_RATE,
    deadline: Callable[[float], bool] = lambda seconds: False,
) -> Losses:
    """Train all runs of a stack in place.

    Args:
        deadline: says of a number of seconds from now whether that is too late; asked once a step's time is known.

    Raises:
        OutOfTime: it is.
    """
    device, runs = study.device, stack.runs
    if not len(stack.flat):
        return Losses(torch.zeros(0, len(runs)), torch.full((len(runs),), -1))
    seeds = list(dict.fromkeys(run.seed for run in runs))
    seed_of_run = torch.tensor([seeds.index(run.seed) for run in runs], device=device)
    batches = stacked([study.batches(seed, steps) for seed in seeds]).each(lambda part: part.to(device))
    optimizer = Optimizer(stack, torch.tensor([run.rate for run in runs], device=device), encoder_rate)
    weights = {shape: room.requires_grad_() for shape, room in stack.new_weights().items()}
    alive = torch.ones(len(runs), dtype=torch.bool, device=device)
    broke_off = torch.full((len(runs),), -1, device=device)
    values = torch.zeros(steps, len(runs), device=device)
    started = 0.0
    for step in range(steps):
        parts = stack.fill_(weights)
        batch = batches.each(lambda part, step=step: part[:, step])
        loss = losses_of(study, stack, weights, batch, seed_of_run)
        inputs = [*weights.values(), *stack.encoder]
        found = torch.autograd.grad(loss.sum(), inputs)
        gradients = dict(zip(weights, found[: len(weights)], strict=True))
        values[step] = loss.detach()
        gradient = torch.cat([g.flatten() for g in (*_to_leaves(stack, parts, gradients), *found[len(weights) :])])
        survivors = optimizer.step_(gradient, schedule(step, steps), alive & loss.detach().isfinite())
        broke_off = torch.where(alive & ~survivors, step, broke_off)
        alive = survivors
        if step in (FIRST_TIMED, 3 * FIRST_TIMED, steps // 2):
            values[step].sum().item()  # waits for the device
            started = started or time.perf_counter()
            left = (steps - step - 1) * (time.perf_counter() - started) / max(1, step - FIRST_TIMED)
            if deadline(left):
                raise OutOfTime(f"{left:.0f} s more for {steps - step - 1} steps of {len(runs)} runs")
    return Losses(values, broke_off)


def _to_leaves(stack: Stack, parts: list[Tensor], gradients: dict[Shape, Tensor]) -> list[Tensor]:
    """The gradient of each adapter's tensors, from those of the adapted weights, penalties included."""
    leaves = stack.leaves[: len(stack.leaves) - len(stack.encoder)]
    pairs = [(p, g) for p, g in zip(parts, stack.parts_of(gradients), strict=True) if p.requires_grad]
    if not pairs:
        return []
    penalty = stack.penalty()
    if penalty is not None:
        pairs.append((penalty, torch.ones_like(penalty)))
    outputs, seeds = zip(*pairs, strict=True)
    return list(torch.autograd.grad(outputs, leaves, seeds))


def losses_of(study: Study, stack: Stack, weights: dict[Shape, Tensor], batch: Batch, row_of_run: Tensor) -> Tensor:
    """The mean squared error of each run, (runs,); `row_of_run` says which row of the batch (rows, B, …) a run takes."""

    def flat(part: Tensor) -> Tensor:
        return part[row_of_run].flatten(0, 1)

    hint = stack.hint(batch.condition[row_of_run])
    predicted = stack.unet(weights, hint, flat(batch.noisy), flat(batch.levels), study.codes[flat(batch.prompts)])
    errors = (predicted - flat(batch.target)).square().mean((1, 2, 3))
    return errors.view(len(stack.runs), -1).mean(1)


@torch.no_grad()
def measure(study: Study, stack: Stack, weights: dict[Shape, Tensor], choosing: bool) -> dict[str, Tensor]:
    """The loss of each run, (runs,), on pictures that were not trained on, by name; see `Study.measured`."""
    row = torch.zeros(len(stack.runs), dtype=torch.long, device=study.device)
    result = {}
    for name, batch in study.measured(choosing).items():
        count, total = len(batch.noisy), torch.zeros(len(stack.runs), device=study.device)
        for part in torch.arange(count).split(max(1, IMAGES_AT_ONCE // len(stack.runs))):
            piece = batch.each(lambda field, part=part: field[None, part].to(study.device))
            total += losses_of(study, stack, weights, piece, row) * len(part)
        result[name] = total / count
    return result


@torch.no_grad()
def draw(study: Study, stack: Stack, weights: dict[Shape, Tensor], seed: int = 1234) -> Tensor:
    """What each run draws, (runs, N, 16, 16) as bytes; every run starts from the same noise.

    DDIM without guidance: with it nearly every drawing of nearly every method is readable, which hides how they differ.
    """
    prompts, outlines = study.drawn()
    noise = torch.randn(len(prompts), 1, 16, 16, generator=torch.Generator().manual_seed(seed))
    scheduler, runs = study.scheduler, len(stack.runs)
    scheduler.set_timesteps(INFERENCE_STEPS)
    drawn = []
    for part in torch.arange(len(prompts)).split(max(1, IMAGES_AT_ONCE // runs)):
        images, outline = (given[part].to(study.device).repeat(runs, 1, 1, 1) for given in (noise, outlines))
        context = study.codes[prompts[part]].repeat(runs, 1, 1)
        hint = stack.hint(outline.unflatten(0, (runs, -1)))
        for level in scheduler.timesteps:
            velocity = stack.unet(weights, hint, images, level.to(study.device).expand(len(images)), context)
            images = scheduler.step(velocity, level, images, return_dict=False)[0]
        drawn.append(images[:, 0].unflatten(0, (runs, -1)))
    pictures = torch.cat(drawn, 1)
    return ((pictures.nan_to_num().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).cpu()


@torch.no_grad()
def trained_weights(stack: Stack) -> dict[Shape, Tensor]:
    """The adapted weights of all runs as they are now."""
    weights = stack.new_weights()
    stack.fill_(weights)
    return weights


def new_stack(study: Study, runs: list) -> Stack:
    """The runs at their start, on the study's device."""
    return Stack(runs, StackedUNet(study.base), study.with_condition)
