"""Parts of an adapter that are for text encoders."""

from __future__ import annotations

from collections.abc import Mapping


def text_note(encoders: Mapping[str, int]) -> str:
    """What to say of them.

    Args:
        encoders: name of a pipeline's component → how many tensors are for it.
    """
    counts = ", ".join(f"{count} tensors for {name}" for name, count in sorted(encoders.items()))
    return f"{counts} are left out: only the UNet is adapted" if encoders else ""
