"""From prompt embeddings to pictures in Triton's python backend: the denoising loop beside the UNet that it calls."""

from __future__ import annotations

import json
import secrets
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self, final

import safetensors.torch
import torch
from torch import Tensor

from trexport.deploy.names import ADAPTER, LATENTS, NEGATIVE, PROMPT, STRENGTH
from trexport.deploy.serve.decoder import Decoder
from trexport.deploy.serve.tensors import check_bridge, from_triton, text_from_triton, text_to_triton, to_triton, triton
from trexport.deploy.serve.unet import Answer, Cancelled, as_triton_error
from trexport.errors import RunError, UsageError
from trexport.models.diffusion import Denoising

GREATEST_STEPS = 1000


@final
@dataclass(frozen=True)
class Settings:
    """What a repository says of the model, in `image.json`."""

    unet: str
    """The name of the model to call."""
    max_batch: int
    """Of that model."""
    sample_shape: tuple[int, int, int]
    """Channels, height, width of the noise, where none is given."""
    steps: int
    guidance: float
    output: str
    """`images`, or `latents` where nothing decodes them."""

    @classmethod
    def read(cls, file: Path) -> Self:
        fields = json.loads(file.read_bytes())
        return cls(**fields | {"sample_shape": tuple(fields["sample_shape"])})


Call = Callable[[Mapping[str, Tensor], Sequence[Sequence[str]] | None, Tensor | None], Tensor]
"""The UNet: inputs with a batch axis, adapters and strengths for each sample → its output."""


@final
@dataclass(frozen=True)
class Order:
    """A request for pictures, one a row."""

    inputs: Mapping[str, Tensor]
    adapters: Sequence[Sequence[str]] | None = None


@final
class TritonPythonModel:
    """What Triton calls. Pictures of one call overlap, so that their steps share runs of the UNet."""

    def initialize(self, args: Mapping[str, str]) -> None:
        """Read the settings. The UNet is looked for when a picture is asked for."""
        check_bridge()
        folder = Path(args["model_repository"]) / args["model_version"]
        batch = json.loads(args["model_config"])["max_batch_size"]
        self._pool = ThreadPoolExecutor(max(1, batch))
        self._painter = Painter.of_folder(folder, self._call)

    def execute(self, requests: Sequence[Any]) -> list[Any]:
        """One response for each request."""
        pb_utils = triton()

        responses = []
        for answer in self._pool.map(self._answer, requests):
            if isinstance(answer, dict):
                tensors = [to_triton(name, tensor) for name, tensor in answer.items()]
                responses.append(pb_utils.InferenceResponse(tensors))
            else:
                responses.append(pb_utils.InferenceResponse([], error=as_triton_error(answer)))
        return responses

    def finalize(self) -> None:
        """End the threads."""
        self._pool.shutdown()

    def _answer(self, request: Any) -> Answer:
        try:
            tensors = {tensor.name(): tensor for tensor in request.inputs()}
            adapters = tensors.pop(ADAPTER, None)
            inputs = {name: from_triton(tensor).clone() for name, tensor in tensors.items()}
            order = Order(inputs, None if adapters is None else text_from_triton(adapters))

            def check_client() -> None:
                if request.is_cancelled():
                    raise Cancelled("the client has cancelled the request, or gone")

            return self._painter.paint(order, check_client)
        except Exception as error:  # of this request alone, whatever it is
            return error

    def _call(
        self, feeds: Mapping[str, Tensor], adapters: Sequence[Sequence[str]] | None, strengths: Tensor | None
    ) -> Tensor:
        pb_utils = triton()

        inputs = [to_triton(name, tensor) for name, tensor in feeds.items()]
        inputs += [] if adapters is None else [text_to_triton(ADAPTER, [list(names) for names in adapters])]
        inputs += [] if strengths is None else [to_triton(STRENGTH, strengths)]
        asked = pb_utils.InferenceRequest(
            model_name=self._painter.settings.unet, requested_output_names=["out_sample"], inputs=inputs
        )
        response = asked.exec()
        if response.has_error():
            raise RunError(response.error().message())
        output = pb_utils.get_output_tensor_by_name(response, "out_sample")
        return from_triton(output).clone()


@final
class Painter:
    """Denoises what is ordered, with `trexport.models.diffusion.Denoising`."""

    def __init__(
        self, settings: Settings, denoising: Denoising, call: Call, negative: Tensor | None, decoder: Decoder | None
    ) -> None:
        self.settings = settings
        self._denoising, self._call, self._negative, self._decoder = denoising, call, negative, decoder

    @classmethod
    def of_folder(cls, folder: Path, call: Call) -> Self:
        """From a version's folder.

        Args:
            call: one step of the UNet.
        """
        settings = Settings.read(folder / "image.json")
        defaults = folder / "defaults.safetensors"
        negative = safetensors.torch.load_file(defaults)[NEGATIVE] if defaults.is_file() else None
        decoder = Decoder(folder / "vae_decoder") if (folder / "vae_decoder").is_dir() else None
        return cls(settings, Denoising.of_folder(folder, settings.steps), call, negative, decoder)

    def paint(self, order: Order, check: Callable[[], None] = lambda: None) -> dict[str, Tensor]:
        """The pictures (batch, channels, height, width), float32: from 0 to 1, or latents.

        Args:
            check: called before each step; what it raises ends the picture.

        Raises:
            UsageError: inputs that cannot be.
            RunError: the UNet did not run.
        """
        inputs = dict(order.inputs)
        context = inputs.pop(PROMPT)
        batch = context.shape[0]
        noise = self._noise(inputs.pop(LATENTS, None), inputs.pop("seed", None), batch)
        steps = _numbers(inputs.pop("num_inference_steps", None), batch, self.settings.steps)
        guidance = _numbers(inputs.pop("guidance_scale", None), batch, self.settings.guidance)
        if any(not 1 <= number <= GREATEST_STEPS for number in steps):
            raise UsageError(f"num_inference_steps: {steps} found, expected 1 to {GREATEST_STEPS}")
        if any(not 0 <= number < 1e6 for number in guidance):  # NaN is not
            raise UsageError(f"guidance_scale: {guidance} found, expected numbers from 0")
        negative = self._unconditional(inputs.pop(NEGATIVE, None), context, guidance)
        strengths = inputs.pop(STRENGTH, None)
        samples: list[Tensor | None] = [None] * batch
        for wanted in dict.fromkeys(zip(steps, guidance, strict=True)):
            rows = [row for row in range(batch) if (steps[row], guidance[row]) == wanted]
            feeds = {"encoder_hidden_states": context[rows]} | {name: value[rows] for name, value in inputs.items()}
            chosen = None if order.adapters is None else [order.adapters[row] for row in rows]
            denoising = Denoising(
                self._denoising.scheduler, int(wanted[0]), wanted[1], None if negative is None else negative[rows]
            )
            own = None if strengths is None else strengths[rows]
            found = denoising.run(lambda fed, c=chosen, s=own: self._step(fed, c, s, check), noise[rows], feeds)
            for row, sample in zip(rows, found, strict=True):
                samples[row] = sample
        latents = torch.stack([sample for sample in samples if sample is not None])
        if self.settings.output == LATENTS:
            return {LATENTS: latents}
        pixels = latents if self._decoder is None else self._decoder(latents)
        return {self.settings.output: (pixels / 2 + 0.5).clamp(0, 1)}

    def _noise(self, latents: Tensor | None, seed: Tensor | None, batch: int) -> Tensor:
        if latents is not None:
            if seed is not None:
                raise UsageError("latents and seed given, expected one of them")
            return latents
        seeds = [secrets.randbits(63) for _ in range(batch)] if seed is None else seed.flatten().tolist()
        shape = self.settings.sample_shape
        return torch.stack([torch.randn(shape, generator=torch.Generator().manual_seed(number)) for number in seeds])

    def _unconditional(self, given: Tensor | None, context: Tensor, guidance: Sequence[float]) -> Tensor | None:
        if given is not None:
            if given.shape != context.shape:
                raise UsageError(
                    f"{NEGATIVE}: shape {list(given.shape)} found, expected {PROMPT}'s, {list(context.shape)}"
                )
            return given
        if all(scale <= 1 for scale in guidance):
            return None
        if self._negative is None:
            raise UsageError(
                f"guidance_scale {max(guidance)} needs {NEGATIVE}; give them, or a guidance_scale of 1 for none"
            )
        if self._negative.shape != context.shape[1:]:
            raise UsageError(
                f"{PROMPT}: shape {list(context.shape)} found, and no {NEGATIVE}; the model's own are for "
                f"{list(self._negative.shape)}"
            )
        return self._negative.to(context).expand_as(context)

    def _step(
        self,
        fed: Mapping[str, Tensor],
        adapters: Sequence[Sequence[str]] | None,
        strengths: Tensor | None,
        check: Callable[[], None],
    ) -> Tensor:
        """One step of rows that are drawn together; under guidance, twice as many."""
        check()
        count = fed["sample"].shape[0]
        feeds = {**fed, "timestep": fed["timestep"].expand(count)[:, None]}
        if adapters is not None and len(adapters) != count:
            adapters = [*adapters, *adapters]
            strengths = None if strengths is None else torch.cat([strengths, strengths])
        parts = []
        for start in range(0, count, self.settings.max_batch):
            part = slice(start, start + self.settings.max_batch)
            parts.append(
                self._call(
                    {name: tensor[part] for name, tensor in feeds.items()},
                    None if adapters is None else adapters[part],
                    None if strengths is None else strengths[part],
                )
            )
        return torch.cat(parts)


def _numbers(given: Tensor | None, batch: int, default: float) -> list[float]:
    return [default] * batch if given is None else given.flatten().tolist()
