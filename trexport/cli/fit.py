"""`trexport fit`"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from trexport.cli.options import base_argument, base_options, dry_run_option, json_option

if TYPE_CHECKING:
    from trexport.fit.goal import FitGoal, FitReport
    from trexport.fit.plan import FitPlan

_MEMBER = "NAME, NAME:SIZE, or a JSON object as in a checkpoint. "


@click.command("fit")
@base_argument
@click.argument("tuned")
@click.option("-o", "--out", required=True, type=click.Path(path_type=Path), help="Folder, or file.safetensors.")
@click.option("--overwrite", is_flag=True, help="Replace what is there.")
@click.option("--transform", default="tensor_ring", show_default=True, help=f"{_MEMBER}SIZE is a rank or block size.")
@click.option("--residual", default="tensor_ring", show_default=True, help=f"{_MEMBER}SIZE is a rank.")
@click.option("--magnitude", default="none", show_default=True, help="NAME or JSON.")
@click.option(
    "--budget", type=click.IntRange(min=1), metavar="PARAMS", help="Parameters at most; sizes not given are chosen."
)
@click.option(
    "--max-error",
    type=click.FloatRange(min=0, max=1, min_open=True, max_open=True),
    metavar="E",
    help="The smallest adapter with ‖W* − W'‖ at most E·‖W* − W0‖; sizes not given are chosen.",
)
@click.option(
    "--targets",
    multiple=True,
    default=["attention"],
    show_default=True,
    help="attention, transformer, convolutions, or a regular expression for module paths; may be given again.",
)
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Of random starts.")
@click.option("--starts", type=click.IntRange(min=1), default=3, show_default=True, help="Starts for tensor rings.")
@click.option("--sweeps", type=click.IntRange(min=1), default=200, show_default=True, help="Of least squares, at most.")
@click.option("--restart", is_flag=True, help="Throw away what a stopped fit has left.")
@base_options
@dry_run_option
@json_option
def command(
    base: str,
    tuned: str,
    out: Path,
    overwrite: bool,
    transform: str,
    residual: str,
    magnitude: str,
    budget: int | None,
    max_error: float | None,
    targets: tuple[str, ...],
    seed: int,
    starts: int,
    sweeps: int,
    restart: bool,
    revision: str | None,
    variant: str | None,
    dry_run: bool,
    as_json: bool,
) -> None:
    """Fit a small adapter to what a fine-tune made of a base.

    BASE is what trexport merge takes; TUNED too, or one safetensors file with the parameters of a UNet. Layer by layer
    ‖W* − (W0·T + Δ)‖ is made small; nothing is trained. Layers that are finished are kept: a fit that was stopped goes on
    when it is called again with the same arguments, and ends in the same bytes.

    A size that is given is every layer's. One that is left out is the member's usual one, or, with --budget or
    --max-error, chosen layer by layer; a layer whose parameters are worth more elsewhere then gets no adapter.
    """
    from trexport.cli.console import print_json, progress_for
    from trexport.fit.goal import check_budget
    from trexport.fit.plan import open_tuned, plan_fit
    from trexport.fit.run import check_out, fit
    from trexport.models.base import open_base
    from trlora.fit import FitOptions

    goal = _goal(transform, residual, magnitude, budget, max_error)
    check_out(out, overwrite=overwrite)
    opened = open_base(base, revision=revision, variant=variant)
    progress = progress_for(as_json)
    plan = plan_fit(opened, open_tuned(tuned, opened), targets, progress=progress)
    if dry_run:
        smallest = sum(check_budget(plan, goal).values())
        if as_json:
            fields = {"out": str(out), "layers": len(plan.layers), "least_parameters": smallest, "dry_run": True}
            print_json(fields | {"target_share": plan.target_share})
        else:
            click.echo(f"would fit {len(plan.layers)} layers, from {smallest} parameters on, and write {out}")
            _say_outside(plan)
        return
    options = FitOptions(seed=seed, starts=starts, sweeps=sweeps)
    try:
        report = fit(plan, goal, out, options, overwrite=overwrite, restart=restart, progress=progress)
    except KeyboardInterrupt:
        click.echo("finished layers are kept: the same command goes on with them", err=True)
        raise
    if as_json:
        layers = [
            vars(layer) | {"spec": layer.spec and layer.spec.to_dict(), "relative_error": layer.relative_error}
            for layer in report.layers
        ]
        totals = {"parameters": report.parameters, "relative_error": report.relative_error}
        outside = {"target_share": plan.target_share, "others": plan.others, "unchanged": plan.unchanged}
        print_json({"out": str(out), "layers": layers} | totals | outside)
        return
    _print_report(report)
    _say_outside(plan)
    click.echo(f"written: {out}")


def _goal(transform: str, residual: str, magnitude: str, budget: int | None, max_error: float | None) -> FitGoal:
    from trexport.fit.goal import FitGoal
    from trlora import AdapterSpec, SpecError
    from trlora.shorthand import fields_from_text, size_of

    if budget is not None and max_error is not None:
        raise click.UsageError("--budget and --max-error exclude each other; give one")
    texts = {"transform": transform, "residual": residual, "magnitude": magnitude}
    try:
        parts = {part: fields_from_text(part, text) for part, text in texts.items()}
        spec = AdapterSpec.from_dict(parts)
    except SpecError as error:
        raise click.UsageError(str(error)) from error

    def is_free(part: str) -> bool:
        name = size_of(part, parts[part]["type"])
        return name is not None and name not in parts[part]

    return FitGoal(spec, is_free("transform"), is_free("residual"), budget, max_error)


def _print_report(report: FitReport) -> None:
    from trexport.cli.console import print_table
    from trlora.shorthand import size_name

    def brief(spec: Any) -> str:
        name = size_name(type(spec))
        size = None if name is None else getattr(spec, name)
        return spec.type if size is None else f"{spec.type}:{size}"

    rows = []
    for layer in report.layers:
        kinds = ("-", "-") if layer.spec is None else (brief(layer.spec.transform), brief(layer.spec.residual))
        rows.append((layer.path, *kinds, layer.parameters, f"{layer.relative_error:.4f}", layer.method or "-"))
    rows.append(("all", "", "", report.parameters, f"{report.relative_error:.4f}", ""))
    columns = ["layer", "transform", "residual", "parameters", "error", "method"]
    print_table("error: ‖W* − W'‖ ÷ ‖W* − W0‖", columns, rows)


def _say_outside(plan: FitPlan) -> None:
    """What of the fine-tune no adapter on these targets can hold."""
    if plan.unchanged:
        click.echo(f"{plan.unchanged} targets did not change, and get no adapter")
    if plan.others:
        click.echo(
            f"not in the adapter: {len(plan.others)} tensors outside the targets changed too, {plan.others[0]} the most; "
            f"the targets hold {plan.target_share:.1%} of the squared change"
        )
