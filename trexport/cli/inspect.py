"""`trexport inspect`"""

from __future__ import annotations

import click

from trexport.cli.options import json_option

_SHOWN = 12


@click.command("inspect")
@click.argument("path")
@click.argument("other", required=False)
@click.option("--all", "show_all", is_flag=True, help=f"Show every row of the table, not the first {_SHOWN}.")
@json_option
def command(path: str, other: str | None, show_all: bool, as_json: bool) -> None:
    """Say what PATH is: an adapter, a UNet or pipeline, an ONNX model, an artifact of trexport.

    It is recognised from its content. Artifacts are verified against their manifest. PATH may also be a sample: or
    random: name. With OTHER both are adapters, and compared: layers, methods, ranks, and how far apart they are.
    """
    from trexport.cli.console import print_json, print_table, progress_for
    from trexport.comparing import compare
    from trexport.inspecting import inspect

    found = inspect(path, progress=progress_for(as_json)) if other is None else compare(path, other)
    if as_json:
        print_json(found.to_dict())
        return
    click.echo(f"{found.path}: {found.kind}")
    for name, value in found.facts.items():
        if value not in (None, {}, []):
            click.echo(f"  {name:20} {_text(value)}")
    shown = found.rows if show_all else found.rows[:_SHOWN]
    if shown:
        print_table("", found.columns, shown)
    if len(shown) < len(found.rows):
        click.echo(f"… and {len(found.rows) - len(shown)} more rows (--all)")


def _text(value: object) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key}: {_text(item)}" for key, item in value.items() if item is not None)
    if isinstance(value, (list, tuple)):
        return ", ".join(_text(item) for item in value)
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)
