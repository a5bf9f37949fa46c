"""Text encoders of transformers. The only file that imports it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from torch import nn


def build_text_model(class_name: str, config: Mapping[str, Any]) -> nn.Module:
    """A text encoder with whatever weights its class begins with, on torch's default device.

    Raises:
        ImportError: transformers is not installed.
        ValueError, TypeError: the class cannot be built from the config.
    """
    import transformers

    known: Any = getattr(transformers, class_name)
    return known(known.config_class.from_dict({n: v for n, v in config.items() if n != "_class_name"}))


def config_of_text_model(model: Any) -> dict[str, Any]:
    """The whole config of a text encoder, defaults included, as a `config.json` holds it."""
    return json.loads(model.config.to_json_string(use_diff=False))


def load_text_model(class_name: str, folder: Any, options: Mapping[str, Any]) -> Any:
    """`from_pretrained`, without its progress bars."""
    import transformers
    from transformers.utils import logging as transformers_logging

    bars = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()  # ours are shown, or none
    try:
        return getattr(transformers, class_name).from_pretrained(folder, **options)
    finally:
        if bars:
            transformers_logging.enable_progress_bar()
