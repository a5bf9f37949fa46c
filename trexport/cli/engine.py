"""`trexport engine`"""

from __future__ import annotations

from pathlib import Path
from typing import Literal, cast

import click

from trexport.cli.options import device_option, dry_run_option, json_option, output_options


def _size(ctx: click.Context, parameter: click.Parameter, value: str | None) -> int | None:
    if value is None:
        return None
    units = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30}
    number, unit = value.rstrip("KMGkmg"), value[len(value.rstrip("KMGkmg")) :].upper()
    if not number.isdecimal() or unit not in units:
        raise click.BadParameter(f"{value!r}, expected bytes, or K, M or G of them, as in 4G")
    return int(number) * units[unit]


@click.command("engine")
@click.argument("artifact", type=click.Path(path_type=Path))
@output_options
@click.option("--backend", required=True, help="tensorrt, tensorrt-rtx or aotinductor.")
@click.option(
    "--target",
    "targets",
    metavar="SM,…",
    help="GPUs to build for, as in sm86,sm89; the one that is here, unless given.",
)
@click.option(
    "--profile",
    "profiles",
    multiple=True,
    metavar="MIN,OPT,MAX",
    help="Sizes BxHxWxTOKENS, as in 1x64x64x77,2x64x64x77,8x96x96x77, or by tensor. Repeat for several. Fixed at the UNet's "
    "own, unless given.",
)
@click.option(
    "--optimization-level",
    type=click.IntRange(0, 5),
    help="How long the builder searches (aotinductor: 0 to 3); its own unless given.",
)
@click.option(
    "--workspace", "workspace_bytes", callback=_size, metavar="SIZE", help="Scratch memory of layers, as in 4G."
)
@click.option(
    "--timing-cache",
    type=click.Path(path_type=Path, dir_okay=False),
    help="A file to keep kernels' times in, and reuse.",
)
@click.option("--version-compatible", is_flag=True, help="Loads in newer minor versions of the runtime too.")
@click.option(
    "--hardware-compatible",
    type=click.Choice(["ampere-plus", "same-compute-capability"]),
    help="Loads on other GPUs of this kind too.",
)
@click.option("--refit", is_flag=True, help="Weights can be replaced in the built engine: see `trexport refit`.")
@click.option("--strip", is_flag=True, help="Leave the weights out, to be put in where the engine is loaded.")
@click.option("--base", help="Where the artifact's base is now; where it was, unless given.")
@click.option("--adapter", "adapters", multiple=True, help="Likewise for each adapter, in their order.")
@device_option
@dry_run_option
@json_option
def command(
    artifact: Path,
    out: Path,
    overwrite: bool,
    backend: str,
    targets: str | None,
    profiles: tuple[str, ...],
    optimization_level: int | None,
    workspace_bytes: int | None,
    timing_cache: Path | None,
    version_compatible: bool,
    hardware_compatible: str | None,
    refit: bool,
    strip: bool,
    base: str | None,
    adapters: tuple[str, ...],
    device: str,
    dry_run: bool,
    as_json: bool,
) -> None:
    """Build a compiled engine from an artifact of `trexport onnx`.

    The engine has the artifact's form. Of a factored one and of a bank, strengths and cores are inputs, so that a swap is a
    pointer (aotinductor's bank takes whole weights, and no factored one); of a swappable one the adapted weights are
    replaced in place; no form needs a refit to change adapters.

    tensorrt-rtx builds ahead of time, on a machine without a GPU too: give --target. aotinductor compiles PyTorch's own
    graph of the same model, for --device.
    """
    from trexport.artifact import open_artifact
    from trexport.backends import EngineOptions, device_of, engine_backend_of
    from trexport.cli.console import gigabytes, print_json, progress_for
    from trexport.cli.show import show_build
    from trexport.engine import build_engine, default_profile, usual_sizes
    from trexport.profile import parse_profile

    builder = engine_backend_of(backend)
    progress = progress_for(as_json)
    opened = open_artifact(artifact, progress=progress)
    source, bound = opened.sources(base, adapters, progress=progress)
    usual = usual_sizes(opened, source)
    options = EngineOptions(
        profiles=tuple(parse_profile(text, opened.manifest.io, usual) for text in profiles)
        or (default_profile(opened, source),),
        targets=tuple(target.strip() for target in targets.split(",")) if targets else (),
        device=device_of(device),
        optimization_level=optimization_level,
        workspace_bytes=workspace_bytes,
        timing_cache=timing_cache,
        version_compatible=version_compatible,
        hardware_compatible=cast("Literal['ampere-plus', 'same-compute-capability'] | None", hardware_compatible),
        refit="all" if refit else None,
        strip=strip,
    )
    result = build_engine(
        opened, source, bound, out, builder, options, overwrite=overwrite, dry_run=dry_run, progress=progress
    )
    if result is None:
        described = [str(profile) for profile in options.profiles]
        if as_json:
            print_json({"out": str(out), "dry_run": True, "backend": backend, "profiles": described})
        else:
            click.echo(f"would build {out} with {backend}, for {'; '.join(described)}")
        return
    manifest, report = result
    if as_json:
        print_json({"out": str(out)} | manifest.to_dict() | {"build": report.to_dict()})
        return
    show_build(report)
    for profile in options.profiles:
        click.echo(f"profile (batch, height, width, tokens): {profile}")
    click.echo(f"written: {out} ({gigabytes(report.size_bytes)}, for {manifest.target_gpu})")
