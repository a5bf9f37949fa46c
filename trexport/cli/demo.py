"""`trexport demo`"""

from __future__ import annotations

import time
from pathlib import Path

import click

from trexport.cli.options import json_option


@click.command("demo")
@click.option(
    "-o",
    "--out",
    type=click.Path(path_type=Path, file_okay=False),
    default=Path("demo-output"),
    show_default=True,
    help="Output folder.",
)
@click.option("--overwrite", is_flag=True, help="Replace what is in the output folder.")
@click.option("--adapter", "adapters", multiple=True, help="One of the sample's; all of them unless given.")
@json_option
def command(out: Path, overwrite: bool, adapters: tuple[str, ...], as_json: bool) -> None:
    """The whole line on the trained sample that ships in the package, on a CPU.

    Merges its adapters, exports to ONNX, proves both equal to PyTorch, draws with each, measures the latency, and
    writes a report with the pictures: OUT/report.html.
    """
    from trexport.cli.console import print_json, progress_for
    from trexport.cli.show import show_bench, show_forms, show_parity_summary
    from trexport.demo.run import REPORT_NAME, run_demo
    from trexport.errors import ParityError

    start = time.perf_counter()

    def say(line: str) -> None:
        if not as_json:
            click.echo(f"[{time.perf_counter() - start:5.1f} s] {line}")

    result = run_demo(out, adapters, overwrite=overwrite, progress=progress_for(as_json), say=say)
    if as_json:
        parity = {name: report.to_dict() for name, report in result.parity.items()}
        print_json({"report": str(out / REPORT_NAME), "parity": parity, "bench": result.bench.to_dict()})
    else:
        show_parity_summary(result.parity)
        show_bench(result.bench)
        show_forms(result.forms)
        click.echo(f"report: {(out / REPORT_NAME).resolve()}")
    if not result.passed:
        raise ParityError("parity not met: see the report")
