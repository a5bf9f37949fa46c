"""Judge what `study.py` drew and sum it up: results.json, claims.png, and the tables as Markdown."""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from judging import Judging, read_drawn
from methods import ALL_METHODS, BUDGETS, CLAIMS, METHODS
from runs import MIDDLE, RATES, TASKS, TUNING_SEED, read_results

HERE = Path(__file__).parent
MEASURES = {"subject": ("new digit", "prior"), "control": ("overlap", "digit")}
LOSSES = {"subject": ("subject", "prior"), "control": ("control",)}
CLAIM_TABLES = {
    "zero or random start": ("tr", "tr_small", "loretta", "tlora", "tlora_random"),
    "penalties": ("tlora_no_penalty", "tlora", "tlora_identity", "tlora_orthogonal", "tlora_orthogonal_10"),
    "rank of the transform": ("tlora", "tlora_rank_1"),
}

Row = dict[str, Any]


def summed_up(results: list[Row], judging: Judging, folder: Path) -> dict[str, Any]:
    """All results as one object: what the rates gave, and for each task, method and budget the values of its seeds."""
    tuning: dict[str, dict[str, dict[str, float | None]]] = {task: defaultdict(dict) for task in TASKS}
    kinds: dict[tuple[str, str, int], list[Row]] = defaultdict(list)
    for result in results:
        run = result["run"]
        if run["seed"] == TUNING_SEED:
            tuning[run["task"]][run["method"]][f"{run['rate']:g}"] = result["validation_loss"]
            continue
        result["measures"] = judging.measures(run["task"], read_drawn(folder / f"{_name(run)}.npz"))
        kinds[run["task"], run["method"], run["budget"]].append(result)
    rows = [_row(task, method, budget, members) for (task, method, budget), members in kinds.items()]
    order = list(ALL_METHODS)
    rows.sort(key=lambda row: (TASKS.index(row["task"]), row["budget"], order.index(row["method"])))
    first = results[0]
    return {
        "rows": rows,
        "validation_loss_by_rate": tuning,
        "references": judging.references(),
        "steps": first["steps"],
        "device": sorted({result["device"] for result in results}),
        "versions": first["versions"],
    }


def _name(run: Row) -> str:
    return f"{run['task']}-{run['method']}-{run['budget']}-seed{run['seed']}"


def _row(task: str, method: str, budget: int, members: list[Row]) -> Row:
    """One line of a table; the values stand in the order of the seeds."""

    def rounded(values: Iterable[float | None]) -> list[float | None]:
        return [None if value is None else round(value, 5) for value in values]

    members = sorted(members, key=lambda member: member["run"]["seed"])
    values = {name: rounded(member["measures"][name] for member in members) for name in MEASURES[task]}
    values |= {f"loss, {name}": rounded(member["loss"][name] for member in members) for name in LOSSES[task]}
    starts = {f"loss, {name}": rounded(member["loss_at_start"][name] for member in members) for name in LOSSES[task]}
    first = members[0]
    return {
        "task": task,
        "method": method,
        "title": first["title"],
        "budget": budget,
        "parameters": first["parameters"],
        "encoder_parameters": first["encoder_parameters"],
        "rate": first["run"]["rate"],
        "seeds": [member["run"]["seed"] for member in members],
        "broke_off": sum(member["broke_off_at_step"] is not None for member in members),
        "values": values,
        "at_start": starts,
    }


def spread(values: list[float | None], digits: int, scale: float = 1.0) -> str:
    """Mean ± standard deviation over the seeds, of those that came to an end."""
    numbers = np.array([value for value in values if value is not None]) * scale
    if not len(numbers):
        return "–"
    deviation = f" ± {numbers.std(ddof=1):.{digits}f}" if len(numbers) > 1 else ""
    return f"{numbers.mean():.{digits}f}{deviation}"


def _cell(row: Row, name: str) -> str:
    values = row["values"][name]
    if name.startswith("loss"):
        return spread(values, 2, 1e3)
    return spread(values, 3) if name == "overlap" else spread(values, 1, 100)


def _heading(name: str) -> str:
    unit = "×10³" if name.startswith("loss") else ("0–1" if name == "overlap" else "%")
    return f"{name} ({unit})"


def against(row: Row, other: Row | None, name: str) -> str:
    """By how many percent a loss is above another row's, seed by seed."""
    if other is None or other["seeds"] != row["seeds"] or None in (*row["values"][name], *other["values"][name]):
        return "–"
    pairs = zip(row["values"][name], other["values"][name], strict=True)
    return spread([(a / b - 1) * 100 for a, b in pairs], 1)


def table(rows: list[Row], with_start: bool = False) -> str:
    """Rows of one task and budget as a Markdown table."""
    names = list(rows[0]["values"])
    main = next(name for name in names if name.startswith("loss"))
    lora = next((row for row in rows if row["method"] == "lora"), None)
    columns = ["method", "parameters", "learning rate", *map(_heading, names)]
    columns += ([f"{main}, at the start (×10³)"] if with_start else [f"{main}, above LoRA's (%)"]) + ["broke off"]
    lines = ["| " + " | ".join(columns) + " |", "|---|" + "---:|" * (len(columns) - 1)]
    for row in rows:
        last = spread(row["at_start"][main], 2, 1e3) if with_start else against(row, lora, main)
        cells = [
            row["title"],
            f"{row['parameters']:,}",
            f"{row['rate']:g}",
            *(_cell(row, name) for name in names),
            last,
        ]
        lines.append("| " + " | ".join([*cells, f"{row['broke_off']} of {len(row['seeds'])}"]) + " |")
    return "\n".join(lines)


def budget_table(rows: list[Row], task: str) -> str:
    """One task's first measure, and its first loss against LoRA's of the same budget, over the budgets."""
    measure, loss = MEASURES[task][0], f"loss, {LOSSES[task][0]}"
    found = {(row["method"], row["budget"]): row for row in rows}
    columns = [f"{_heading(measure)}, {budget:,}" for budget in BUDGETS]
    columns += [f"{loss}, above LoRA's (%), {budget:,}" for budget in BUDGETS]
    lines = ["| method | " + " | ".join(columns) + " |", "|---|" + "---:|" * len(columns)]
    for method in METHODS:
        own = [found.get((method, budget)) for budget in BUDGETS]
        cells = ["–" if row is None else _cell(row, measure) for row in own]
        for budget, row in zip(BUDGETS, own, strict=True):
            cells.append("–" if row is None else against(row, found.get(("lora", budget)), loss))
        lines.append("| " + " | ".join([METHODS[method].title, *cells]) + " |")
    return "\n".join(lines)


def rate_table(by_rate: dict[str, dict[str, float | None]]) -> str:
    """The validation loss of every method at every learning rate, ×10³, the best in bold."""
    lines = ["| method | " + " | ".join(f"{rate:g}" for rate in RATES) + " |", "|---|" + "---:|" * len(RATES)]
    for method, losses in by_rate.items():
        least = min((value for value in losses.values() if value is not None), default=None)
        cells = []
        for rate in RATES:
            value = losses.get(f"{rate:g}")
            text = "–" if value is None else f"{value * 1e3:.2f}"
            cells.append(f"**{text}**" if value is not None and value == least else text)
        lines.append(f"| {ALL_METHODS[method].title} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def markdown(summary: dict[str, Any]) -> str:
    """Every table."""
    parts = []
    for task in TASKS:
        rows = [row for row in summary["rows"] if row["task"] == task]
        parts.append(f"### {task}: the budgets\n\n{budget_table(rows, task)}")
        for budget in BUDGETS:
            chosen = [row for row in rows if row["budget"] == budget and row["method"] in METHODS]
            if chosen:
                chosen += [row for row in rows if row["method"] == "nothing"]
                parts.append(f"### {task}, {budget:,} parameters\n\n{table(chosen)}")
        for title, methods in CLAIM_TABLES.items():
            chosen = [row for name in methods for row in rows if row["method"] == name and row["budget"] == MIDDLE]
            if any(row["method"] in CLAIMS for row in chosen):
                parts.append(f"### {task}: {title}, {MIDDLE:,} parameters\n\n{table(chosen, with_start=True)}")
        if summary["validation_loss_by_rate"][task]:
            parts.append(f"### {task}: learning rates\n\n{rate_table(summary['validation_loss_by_rate'][task])}")
    return "\n\n".join(parts)


def plot(summary: dict[str, Any], path: Path) -> None:
    """Every measure of the main methods over the budgets, means with the spread over the seeds."""
    from matplotlib.figure import Figure

    panels = [(task, name) for task in TASKS for name in (*MEASURES[task], f"loss, {LOSSES[task][0]}")]
    figure = Figure(figsize=(13, 7.2))
    axes = figure.subplots(2, 3).flat
    for axis, (task, name) in zip(axes, panels, strict=True):
        for place, method in enumerate(METHODS):
            rows = [row for row in summary["rows"] if (row["task"], row["method"]) == (task, method)]
            values = [[v for v in row["values"][name] if v is not None] for row in rows]
            points = [(row, value) for row, value in zip(rows, values, strict=True) if value]
            x = [row["budget"] * (1 + 0.015 * (place - 3.5)) for row, _ in points]  # side by side, not on each other
            means, deviations = (
                [np.mean(v) for _, v in points],
                [np.std(v, ddof=1) if len(v) > 1 else 0 for _, v in points],
            )
            axis.errorbar(
                x, means, deviations, marker="o", markersize=3.5, linewidth=1, capsize=2, label=METHODS[method].title
            )
        axis.set_xscale("log")
        axis.set_xticks(BUDGETS, [f"{budget:,}" for budget in BUDGETS])
        axis.minorticks_off()
        axis.set_title(f"{task}: {name}", fontsize=10)
        axis.grid(alpha=0.3)
        if name.startswith("loss"):
            axis.set_yscale("log")
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="lower center", ncols=4, fontsize=9)
    figure.supxlabel("parameters of the adapter", y=0.09, fontsize=10)
    figure.tight_layout(rect=(0, 0.1, 1, 1))
    figure.savefig(path, dpi=110, metadata={"Software": None})


def as_json(summary: dict[str, Any]) -> str:
    """The summary with a line for each row."""
    rows = ",\n".join(f"  {json.dumps(row)}" for row in summary["rows"])
    rest = json.dumps({name: value for name, value in summary.items() if name != "rows"}, indent=1)
    return f'{{\n "rows": [\n{rows}\n ],{rest.removeprefix("{")}\n'


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("runs", type=Path, help="the output folder of study.py")
    parser.add_argument("--out", type=Path, default=HERE, help="folder for results.json and claims.png (default: here)")
    parser.add_argument("--pictures", type=Path, help="the file of pictures.py (default: RUNS/pictures.npz)")
    options = parser.parse_args()
    results = read_results(options.runs)
    if not results:
        parser.error(f"no results in {options.runs}, expected files like subject-lora-{MIDDLE}-seed0.json of study.py")
    summary = summed_up(results, Judging(options.pictures or options.runs / "pictures.npz"), options.runs)
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "results.json").write_text(as_json(summary), encoding="utf-8")
    plot(summary, options.out / "claims.png")
    print(markdown(summary))


if __name__ == "__main__":
    main()
