"""`trexport deploy`"""

from __future__ import annotations

from pathlib import Path

import click

from trexport.cli.options import device_option, dry_run_option, json_option


@click.group("deploy")
def command() -> None:
    """Lay out what an inference server needs, and check one that runs."""


@command.command("triton")
@click.argument("artifact", type=click.Path(path_type=Path), required=False)
@click.option("-o", "--out", type=click.Path(path_type=Path, file_okay=False), help="The model repository to write.")
@click.option("--overwrite", is_flag=True, help="Replace what is in the output folder.")
@click.option("--check", "url", metavar="URL", help="Check a running server instead: http://HOST:PORT or grpc://….")
@click.option("--name", default="unet", show_default=True, help="Of the UNet's model; NAME_image denoises.")
@click.option(
    "--adapters",
    type=click.Path(path_type=Path, file_okay=False),
    help="A folder of adapters, NAME/ or NAME.safetensors, to lay beside the model; with --check, those to try.",
)
@click.option(
    "--adapters-in-memory", type=click.IntRange(min=1), default=16, show_default=True, help="Others are read again."
)
@click.option(
    "--max-batch", type=click.IntRange(min=1), default=8, show_default=True, help="Samples in a run, at most."
)
@click.option("--instances", type=click.IntRange(min=1), default=1, show_default=True, help="Copies of the UNet.")
@click.option(
    "--image-instances",
    type=click.IntRange(min=1),
    default=2,
    show_default=True,
    help="Processes of the denoising model; each draws up to --max-batch pictures at once.",
)
@click.option(
    "--max-queue-delay-us",
    type=click.IntRange(min=0),
    default=0,
    show_default=True,
    help="How long a request may wait for company, in µs.",
)
@click.option("--python-env", metavar="PATH", help="The server's virtual environment for its python models.")
@click.option("--native/--python", default=None, help="Triton's own backend, or trexport's; what fits, unless given.")
@click.option("--pipeline/--no-pipeline", "image", default=True, show_default=True, help="Add the denoising model.")
@device_option
@dry_run_option
@json_option
@click.pass_context
def triton(
    ctx: click.Context,
    artifact: Path | None,
    out: Path | None,
    overwrite: bool,
    url: str | None,
    name: str,
    adapters: Path | None,
    adapters_in_memory: int,
    max_batch: int,
    instances: int,
    image_instances: int,
    max_queue_delay_us: int,
    python_env: str | None,
    native: bool | None,
    image: bool,
    device: str,
    dry_run: bool,
    as_json: bool,
) -> None:
    """Write a model repository for NVIDIA Triton Inference Server, or check a server that runs one.

    Merged artifacts with a timestep for each sample run in Triton's own backends. All others run in its python backend,
    where every request may name adapters: they are read from the model's folder `adapters` when first asked for.
    """
    from trexport.cli.console import gigabytes, print_json, progress_for
    from trexport.errors import UsageError

    progress = progress_for(as_json)
    if (url is None) == (out is None):
        raise UsageError("expected either -o REPO, to write, or --check URL")
    from trexport.artifact import open_artifact

    opened = None if artifact is None else open_artifact(artifact, progress=progress)
    if url is not None:
        from trexport.cli.show import show_checks
        from trexport.deploy.check import check_server
        from trexport.errors import ParityError

        report = check_server(url, name, opened, adapters, progress=progress)
        if as_json:
            print_json(report.to_dict())
        else:
            show_checks(report)
        if not report.passed:
            if as_json:
                ctx.exit(ParityError.exit_code)
            raise ParityError(f"{url}: parity not met: " + "; ".join(report.failures))
        return
    if opened is None or out is None:
        raise UsageError("no artifact given, expected a folder of trexport onnx or trexport engine")
    from trexport.backends import device_of
    from trexport.deploy.options import TritonOptions
    from trexport.deploy.triton import plan_triton, write_triton

    options = TritonOptions(
        name=name,
        adapters=adapters,
        adapters_in_memory=adapters_in_memory,
        max_batch=max_batch,
        instances=instances,
        queue_delay_us=max_queue_delay_us,
        device="cuda" if device == "cuda" else device_of(device),  # the server's device, not this machine's
        python_env=python_env,
        native=native,
        image=image,
        image_instances=image_instances,
    )
    if dry_run:
        plan = plan_triton(opened, out, options, overwrite=overwrite)
    else:
        plan = write_triton(opened, out, options, overwrite=overwrite, progress=progress)
    if as_json:
        print_json({"out": str(out), "dry_run": dry_run} | plan.to_dict())
        return
    for config in plan.configs:
        click.echo(f"model {config.name}: backend {config.backend}, at most {config.max_batch} samples in a run")
    if plan.adapters:
        click.echo(f"adapters: {', '.join(plan.adapters)}")
    click.echo(f"{'would write' if dry_run else 'written'}: {out} ({gigabytes(plan.size_bytes)})")
