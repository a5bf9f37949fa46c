"""The model that denoises: its configuration, and what it needs beside it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import safetensors.torch

from trexport.artifact import Artifact
from trexport.deploy.config import ModelConfig, Port
from trexport.deploy.names import LATENTS, NEGATIVE, PROMPT, image_name
from trexport.deploy.options import TritonOptions
from trexport.deploy.unet_model import MODEL_PY, python_parameters, usual_shape
from trexport.errors import BaseError, TrexportError
from trexport.models.base import Base, open_base
from trexport.models.diffusion import Denoising
from trexport.models.sample import sample_of


def base_of(artifact: Artifact) -> Base | None:
    """The base, for its scheduler; None where it is no longer there and the artifact has one of its own."""
    try:
        return open_base(artifact.manifest.base.name)
    except TrexportError as error:
        if (artifact.folder / "scheduler" / "scheduler_config.json").is_file():
            return None
        raise BaseError(
            f"{artifact.folder}: its base, and with it the scheduler, is not found: {error}; put it back, or leave the "
            "denoising model out with --no-pipeline"
        ) from error


def image_config(artifact: Artifact, options: TritonOptions, unet: ModelConfig, base: Base | None) -> ModelConfig:
    """The configuration of the model that denoises beside a UNet's."""
    ports = {port.name: port for port in unet.inputs}
    context = ports["encoder_hidden_states"]
    others = [port for name, port in ports.items() if name not in ("sample", "timestep", "encoder_hidden_states")]
    inputs = (
        Port(PROMPT, context.type, context.dims),
        Port(NEGATIVE, context.type, context.dims, optional=True),
        Port(LATENTS, "TYPE_FP32", ports["sample"].dims, optional=True),
        Port("seed", "TYPE_INT64", (1,), optional=True),
        Port("num_inference_steps", "TYPE_INT32", (1,), optional=True),
        Port("guidance_scale", "TYPE_FP32", (1,), optional=True),
        *others,
    )
    output = _image_output(artifact, base)
    channels = unet.outputs[0].dims[0] if output == LATENTS or not _has_decoder(artifact) else 3
    return ModelConfig(
        image_name(options.name),
        "python",
        unet.max_batch,
        inputs,
        (Port(output, "TYPE_FP32", (channels, -1, -1)),),
        instances=options.image_instances,
        queue_delay_us=options.queue_delay_us,
        parameters=python_parameters(options),
    )


def _has_decoder(artifact: Artifact) -> bool:
    return (artifact.folder / "vae_decoder" / "model.onnx").is_file()


def _image_output(artifact: Artifact, base: Base | None) -> str:
    in_pixels = base is not None and sample_of(base) is not None
    return "images" if in_pixels or _has_decoder(artifact) else LATENTS


def write_image(artifact: Artifact, folder: Path, unet: ModelConfig, config: ModelConfig) -> None:
    """Write the model into a repository's folder."""
    base = base_of(artifact)
    sample = sample_of(base) if base is not None else None
    own = (artifact.folder / "scheduler" / "scheduler_config.json").is_file()
    source = artifact.folder if own else base.folder if base is not None else None
    version = folder / config.name / "1"
    version.mkdir(parents=True)
    (version.parent / "config.pbtxt").write_text(config.to_pbtxt(), encoding="utf-8")
    (version / "model.py").write_text(MODEL_PY.format(module="image"), encoding="utf-8")
    channels, height, width = usual_shape(artifact, "sample")
    if sample is not None and "height" not in artifact.manifest.io.fixed_sizes():
        height = width = sample.image_size
    settings = {
        "unet": unet.name,
        "max_batch": unet.max_batch,
        "sample_shape": [channels, height, width],
        "steps": sample.denoising.steps if sample is not None else 50,
        "guidance": sample.denoising.guidance if sample is not None else 7.5,
        "output": _image_output(artifact, base),
    }
    (version / "image.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    scheduler = version / "scheduler"
    scheduler.mkdir()
    config_text = json.dumps(dict(Denoising.of_folder(source, 1).scheduler), indent=2) + "\n"
    (scheduler / "scheduler_config.json").write_text(config_text, encoding="utf-8")
    if sample is not None and sample.denoising.unconditional is not None:
        tensors = {NEGATIVE: sample.denoising.unconditional.contiguous()}
        safetensors.torch.save_file(tensors, version / "defaults.safetensors")
    if _has_decoder(artifact):
        shutil.copytree(artifact.folder / "vae_decoder", version / "vae_decoder")
