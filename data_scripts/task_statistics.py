"""One table over all prepared tasks, and a plot of how much people disagree on them.

    python data_scripts/task_statistics.py --tasks DIR [--out DIR]

Reads the task.json files that the prepare scripts wrote under `--tasks` and prints a Markdown table. With `--out` the
folder gets `statistics.md`, `statistics.json` and `disagreement.png`; the plot needs matplotlib, the extra `report`.
"""

import argparse
import json
import sys
from math import floor, log10
from pathlib import Path
from typing import TYPE_CHECKING, Any

from raw_files import BadInput

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def main(argv: list[str] | None = None) -> int:
    """Returns the exit status: 2, after one line on stderr, if no task is there or no matplotlib for the plot."""
    parser = argparse.ArgumentParser(prog="task_statistics.py", description="Statistics of all prepared tasks.")
    parser.add_argument("--tasks", type=Path, required=True, metavar="DIR", help="the --out of the prepare scripts")
    parser.add_argument("--out", type=Path, metavar="DIR", help="write the table and the plot here as well")
    args = parser.parse_args(argv)
    try:
        folders = sorted(path.parent for path in args.tasks.glob("[!.]*/task.json"))      # .<task>.*: see folders.py
        if not folders:
            raise BadInput(f"{args.tasks}: no prepared task in it (no <task>/task.json). Run prepare_all.py first.")
        rows = [read_statistics(folder) for folder in folders]
        if args.out:
            _write(rows, args.out)
    except BadInput as error:
        print(f"task_statistics: {error}", file=sys.stderr)
        return 2
    print(markdown_table(rows))
    return 0


def read_statistics(folder: Path) -> dict[str, Any]:
    """What the table and the plot need of one prepared task, from its task.json.

    `alpha` is None for a generative task, and where no text was labelled twice. `largest_label` is the label that most
    examples have, and `largest_share` the share of examples that have it; both are None for a generative task.
    """
    path = folder / "task.json"
    try:
        task = json.loads(path.read_text(encoding="utf-8"))
        facts = task["statistics"]
        label, count = max(facts.get("label_counts", {}).items(), key=lambda item: item[1], default=(None, 0))
        return {
            "task": task["name"],
            "labels": len(task["labels"]),
            "multi_label": task["multi_label"],
            "generative": task["generative"],
            "subset": task["subset"],
            "users": facts["users"],
            "users_kept": facts["users_kept"],
            "texts": facts["texts"],
            "examples": facts["pairs"],
            "examples_per_user": facts["examples_per_user"],
            "users_per_text": facts["users_per_text"],
            "alpha": facts.get("krippendorff_alpha_masi"),
            "largest_label": label,
            "largest_share": count / facts["pairs"] if label else None,
        }
    except OSError as error:
        raise BadInput(f"{path}: {error.strerror}.") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise BadInput(f"{path}: not a task.json of these scripts ({reason}). Prepare the task again.") from None


def markdown_table(rows: list[dict[str, Any]]) -> str:
    """A Markdown table, a task a row."""
    lines = [
        "| task | labels | users | kept | texts | examples | per user | users per text | alpha | largest label |",
        "|---|---|---:|---:|---:|---:|---:|---:|---:|---|",
    ]
    for row in rows:
        labels = "free text" if row["generative"] else f"{row['labels']}{' (several)' if row['multi_label'] else ''}"
        largest = f"{row['largest_label']} {row['largest_share']:.0%}" if row["largest_label"] else ""
        alpha = "" if row["alpha"] is None else f"{row['alpha']:.3f}"
        lines.append(
            f"| {row['task']}{' (subset)' if row['subset'] else ''} | {labels} | {row['users']:,} "
            f"| {row['users_kept']:,} | {row['texts']:,} | {row['examples']:,} | {row['examples_per_user']:.1f} "
            f"| {row['users_per_text']:.2f} | {alpha} | {largest} |"
        )
    return "\n".join(lines)


def plot_disagreement(rows: list[dict[str, Any]]) -> "Figure":
    """Alpha against users, of the tasks that have an alpha. Their names stand in a column beside it, never overlapping.

    Raises:
        BadInput: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise BadInput("the plot needs matplotlib: pip install 'minipeft[report]', or leave --out away.") from None
    shown = sorted((row for row in rows if row["alpha"] is not None), key=lambda row: row["alpha"])
    alphas = [row["alpha"] for row in shown]
    decades = [log10(row["users"]) for row in shown]
    left, right = 10 ** floor(min(decades, default=1)), 10 ** (floor(max(decades, default=1)) + 1)
    low, high = min([0, *alphas]) - 0.05, max([0.5, *alphas]) + 0.05
    figure = Figure(figsize=(10, 1.5 + 0.36 * max(len(shown), 8)), dpi=120, layout="constrained")
    axes = figure.add_subplot()
    axes.set(xscale="log", xlim=(left, right), ylim=(low, high),
             xlabel="people who labelled", ylabel="Krippendorff's alpha (MASI distance)")
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.set_title("How far do people agree? 1 is fully, 0 as by chance", loc="left")
    axes.grid(color="0.92")
    axes.axhline(0, color="0.6", linewidth=1)
    for subset, face, name in ((False, "tab:blue", "whole data set"), (True, "white", "part of the data set")):
        part = [row for row in shown if row["subset"] == subset]
        axes.scatter([row["users"] for row in part], [row["alpha"] for row in part], s=45, facecolor=face, zorder=3,
                     edgecolor="tab:blue", linewidth=1.5, label=name)
    places = spread([(alpha - low) / (high - low) for alpha in alphas], gap=min(0.06, 1 / max(len(shown), 1)))
    for row, place in zip(shown, places):
        axes.annotate(f"{row['task']}  {row['alpha']:.3f}", (row["users"], row["alpha"]), (1.04, place),
                      textcoords="axes fraction", verticalalignment="center", annotation_clip=False, fontsize=9,
                      arrowprops={"arrowstyle": "-", "color": "0.75", "linewidth": 0.8, "shrinkB": 4,
                                  "relpos": (0, 0.5)})
    figure.legend(loc="outside lower left", ncols=2, frameon=False)
    return figure


def spread(wanted: list[float], gap: float) -> list[float]:
    """Ascending places in 0..1, `gap` apart or more, near those `wanted` (ascending). There must be room for them."""
    places: list[float] = []
    for place in wanted:
        places.append(max(place, places[-1] + gap) if places else place)
    ceiling = 1.0
    for i in reversed(range(len(places))):
        places[i] = min(places[i], ceiling)
        ceiling = places[i] - gap
    return places


def _write(rows: list[dict[str, Any]], folder: Path) -> None:
    figure = plot_disagreement(rows)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "statistics.md").write_text(markdown_table(rows) + "\n", encoding="utf-8")
        (folder / "statistics.json").write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")
        figure.savefig(folder / "disagreement.png")
    except OSError as error:
        raise BadInput(f"{folder}: cannot be written ({error.strerror}).") from None


if __name__ == "__main__":
    raise SystemExit(main())
