"""A picture from latents: the VAE's decoder as optimum lays it out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import final

import torch
from torch import Tensor

from trexport.backends.onnxruntime import open_session


@final
class Decoder:
    """`model.onnx`, in `latent_sample`, out `sample`, and `config.json` beside it, on the CPU.

    Raises:
        MissingError: ONNX Runtime is not installed.
        ArtifactError: it does not load the model.
    """

    def __init__(self, folder: Path) -> None:
        config = json.loads((folder / "config.json").read_bytes())
        self._scale = float(config.get("scaling_factor", 0.18215))  # Stable Diffusion's own
        self._shift = float(config.get("shift_factor") or 0.0)
        self._session = open_session(str(folder / "model.onnx"), "cpu")
        self._half = self._session.get_inputs()[0].type == "tensor(float16)"

    def __call__(self, latents: Tensor) -> Tensor:
        """Latents (batch, channels, height, width), float32 → pixels from −1 to 1, float32."""
        scaled = latents / self._scale + self._shift
        given = (scaled.half() if self._half else scaled).numpy()
        return torch.from_numpy(self._session.run(["sample"], {"latent_sample": given})[0]).float()
