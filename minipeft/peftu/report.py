"""The report of a run: report.html, one file that needs no network; report.md with figures/*.png says the same.

Everything comes from result.json and records/: no training, and no figure that the two do not hold. The sections are
made once, as tables and pictures, and then written twice. Ids and names are data: escaped wherever they appear.
"""

import base64
import json
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from html import escape
from importlib.resources import files
from pathlib import Path

from jinja2 import Environment
from matplotlib.figure import Figure

from minipeft.errors import InputError
from minipeft.files import write_file
from minipeft.peftu import charts
from minipeft.peftu.charts import label, shown
from minipeft.peftu.records import Record, load_records
from minipeft.peftu.summary import Outcome, outcomes
from minipeft.peftu.tables import (
    Table,
    accuracy_table,
    at_edges,
    best_baseline,
    calls_table,
    cold_start_table,
    comparison_table,
    cost_table,
    estimate,
    facts_table,
    methods_table,
    metric_table,
    movement_table,
    names_table,
    notes_table,
    number,
    p_text,
    rate_table,
    rivals,
    span,
    users_table,
    words,
)

FIELDS = {"tasks": dict, "comparisons": list, "mode": str, "seeds": list, "versions": dict, "command": str,
          "ceilings": dict, "audit": dict, "minimum_detectable_difference": dict, "options": dict}  # fmt: skip
SIGNIFICANT = 0.05
PICTURE = re.compile(r"^!\[.*\]\(figures/(\d+-[a-z-]+\.png)\)$", re.MULTILINE)  # as `as_markdown` names one


@dataclass(frozen=True)
class Picture:
    name: str
    caption: str
    figure: Figure

    @property
    def data_uri(self) -> str:
        return "data:image/svg+xml;base64," + base64.b64encode(charts.written(self.figure, "svg")).decode()


@dataclass(frozen=True)
class Section:
    title: str
    lines: list[str] = field(default_factory=list)
    pictures: list[Picture] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)


def write_report(out: Path) -> Path:
    """Write report.html, report.md and figures/; replaces earlier ones, and no other file in figures/.

    Returns the path of report.html. Records of further methods and seeds, which a larger run left, are not read.

    Raises:
        InputError: result.json or a record is missing or damaged, or they are not of the same run.
    """
    out = Path(out)
    result = read_result(out / "result.json")
    found = outcomes([record for record in load_records(out) if asked_for(result, record)])
    check_same_run(out, result, found)
    with charts.style():
        sections = [overview(result), *(task_section(task, names, result) for task, names in found.items()),
                    made_by(result)]  # fmt: skip
        write_file(out / "report.html", as_html(sections).encode())
        for old in pictures_named(out / "report.md"):
            (out / "figures" / old).unlink(missing_ok=True)
        write_file(out / "report.md", as_markdown(sections, out / "figures").encode())
    return out / "report.html"


def pictures_named(report: Path) -> list[str]:
    """The pictures that an earlier report has written."""
    return PICTURE.findall(report.read_text(errors="replace")) if report.exists() else []


def asked_for(result: dict, record: Record) -> bool:
    entry = result["tasks"].get(record.task, {}).get(record.name)
    return entry is not None and record.seed in entry["seeds"]


def read_result(path: Path) -> dict:
    """Raises InputError, naming the file and the field."""
    try:
        result = json.loads(path.read_bytes())
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); needed a folder that "
                         "`python -m minipeft.bench peftu` finished") from None  # fmt: skip
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is damaged: not JSON ({type(error).__name__}); run the command again") from None
    for name, kind in FIELDS.items():
        if not isinstance(result, dict) or not isinstance(result.get(name), kind):
            raise InputError(f"{path} is damaged: field {name!r} is missing or no {kind.__name__}; run the command "
                             "again")
    return result


def check_same_run(out: Path, result: dict, found: dict[str, dict[str, Outcome]]) -> None:
    """Raises InputError if a record is missing of which result.json speaks."""
    for task, entries in result["tasks"].items():
        stated = {name: entry["seeds"] for name, entry in entries.items() if entry is not None}
        there = {name: list(outcome.by_seed) for name, outcome in found.get(task, {}).items()}
        if stated != there:
            names = sorted(name for name in stated | there if stated.get(name) != there.get(name))
            raise InputError(f"{out}: result.json and records/ disagree about {names[0]!r} of task {task!r}; the run "
                             "is not finished: the same command with the same --out continues it")  # fmt: skip


# ---- Sections ------------------------------------------------------------------------------------------------------


def overview(result: dict) -> Section:
    tasks = result["tasks"]
    names = dict.fromkeys(name for entries in tasks.values() for name, entry in entries.items() if entry is not None)
    parts = [charts.covered({name: entry for name, entry in entries.items() if entry}) for entries in tasks.values()]
    rows = [[words(label(name)), *(estimate(entries.get(name), part.get(name))
                                   for entries, part in zip(tasks.values(), parts))] for name in names]  # fmt: skip
    count = f"{len(tasks)} task{'s' if len(tasks) > 1 else ''}"
    to_come = result.get("to_come")
    return Section(
        f"Protocol report: {count}, mode {result['mode']}",
        lines=[
            "Accuracy is each user's share of right answers, averaged over users (and seeds), in percent; of several "
            + ("labels one right one is enough. " if result["mode"] == "paper" else
               "labels Jaccard's measure, and where users write the mean ROUGE-L. ")
            + "Brackets hold the 95 % interval: users redrawn with replacement, percentiles widened as Student's t "
            "asks (Hesterberg 2015); " + luck(result),
            "Two names whose intervals overlap may still differ, and the other way round: what was compared user by "
            "user stands under each task, with p-values adjusted (Holm 1979) over all pairs of the task."
            + (" Tasks are families of their own: over several the chance of a wrong \"different\" adds up."
               if len(tasks) > 1 else ""),
            ranked_by(result["mode"]),
            *([f"Not finished; still to come: {', '.join(to_come)}."] if to_come else []),
        ],
        tables=[Table("Accuracy, %", ["method", *tasks], rows), names_table(names, result["mode"])],
    )


def ranked_by(mode: str) -> str:
    """Which of the two scorings the accuracies, intervals and comparisons are of."""
    kind = {"fixed": "the fixed scoring", "paper": "the published scoring"}.get(mode, "its own scoring")
    return (f"Mode {mode} ranks by {kind}: every accuracy, interval and comparison is of that one. Both scorings stand "
            "under each task of labels.")  # fmt: skip


def luck(result: dict) -> str:
    """What the intervals know of the luck of training."""
    if len(result["seeds"]) == 1:
        return "of one seed: the luck of training is in no interval and no p-value."
    known = "what the seeds' means vary by is added, with the few degrees of freedom that so many seeds leave"
    if len(result["seeds"]) == 2:
        known += ("; two are too few to know it well: such intervals hold the truth in 90 % of trials, not in 95, and "
                  "up to 8 % of tasks whose names do not differ at all show an adjusted p below 0.05")  # fmt: skip
    return known + "."


def task_section(task: str, names: dict[str, Outcome], result: dict) -> Section:
    figures = {name: entry for name, entry in result["tasks"][task].items() if entry is not None}
    pairs = [pair for pair in result["comparisons"] if pair["task"] == task]
    personal = {name: outcome for name, outcome in names.items() if outcome.first.kind == "personal"}
    ceilings = result["ceilings"].get(task, {})
    drawn = [("accuracy", "Accuracy with 95 % intervals. Lines: the best that is possible, where the truth is known.",
              charts.accuracies(figures, ceilings)),
             ("cost", "Accuracy against cost. The line joins the methods that nothing cheaper beats; where intervals "
                      "overlap, neighbours on it may change places.", charts.costs(figures)),
             ("cold-start", "New users: accuracy against the number of their own examples, of those who have as many; "
                            "first seed, whose luck is not in the intervals; thin lines are the others.",
              charts.cold_start(figures)),
             ("loss", "Validation loss, mean over users; who stopped early keeps the last value.",
              charts.losses(names))]  # fmt: skip
    if personal and "shared" in names:
        drawn += [("gains", "Gain of the own adapter over the shared one, user by user; thin lines span the seeds.",
                   charts.gains(personal, names["shared"])),
                  ("against-shared", "Each user under the shared adapter and under the own one; above the line the own "
                                     "one is better.", charts.against_shared(personal, names["shared"]))]  # fmt: skip
    against = rivals(figures)
    main = [pair for pair in pairs if pair["a"] in personal and pair["b"] in against]
    return Section(
        f"Task {task}",
        lines=[*headline(figures, pairs, personal), *ceiling_lines(ceilings), *writing_lines(figures),
               *single_user_lines(figures), *filter(None, [at_edges(names)])],
        pictures=[Picture(name, caption, figure) for name, caption, figure in drawn if figure is not None],
        tables=[table for table in (
            accuracy_table(figures),
            methods_table(names),
            comparison_table("Personal methods against what they have to beat", main, len(pairs)),
            comparison_table("All comparisons", pairs, len(pairs), folded=True),
            metric_table(figures),
            cost_table(figures),
            rate_table(names),
            movement_table(names),
            cold_start_table(figures),
            notes_table(names, result["tasks"][task], result.get("left_out", {}).get(task, {})),
            facts_table("Audit: was any test example fitted on?", result["audit"].get(task, {})),
            users_table(names, personal),
        ) if table.rows],
    )


def made_by(result: dict) -> Section:
    facts = {"command": result["command"], "mode": result["mode"], "model": result.get("model"),
             "seeds": ", ".join(map(str, result["seeds"])), **result["options"], **result["versions"]}  # fmt: skip
    tables = [facts_table("Command, seeds and versions", facts), calls_table(result.get("calls", []))]
    return Section("How this was made", tables=[table for table in tables if table.rows])


def headline(figures: dict[str, dict], pairs: list[dict], personal: Iterable[str]) -> list[str]:
    """What can be said, each with its uncertainty."""
    ranked = sorted(personal, key=lambda name: -figures[name]["accuracy"])
    if not ranked:
        return []
    best = ranked[0]
    about = {(pair["a"], pair["b"]): pair for pair in pairs}
    remark = f" It was picked of {len(ranked)} after the fact, which its interval does not know." if ranked[1:] else ""
    lines = [f"Highest of the personal methods: {label(best)}, {estimate(figures[best]).text}.{remark}"]
    strongest = best_baseline(figures)
    for rival in rivals(figures):
        if pair := about.get((best, rival)):
            told = "" if pair["p_holm"] < SIGNIFICANT else ", not told apart"
            picked = ", the highest baseline of those that answer every test example" if rival == strongest else ""
            lines.append(f"Against {label(rival)}{picked}: {number(pair['difference'], '+.1f').text} points "
                         f"(95 % interval {span(pair).text}, Holm p {p_text(pair['p_holm'])}{told}); "
                         f"{pair['wins']} users win, {pair['ties']} tie, {pair['losses']} lose.")  # fmt: skip
    both = {other: about.get((best, other)) or about.get((other, best)) for other in ranked[1:]}
    alike = [label(other) for other, pair in both.items() if pair and pair["p_holm"] >= SIGNIFICANT]
    if alike:
        lines.append(f"Not told apart from {label(best)}: {', '.join(alike)}.")
    return lines


def ceiling_lines(ceilings: dict[str, float]) -> list[str]:
    if not ceilings:
        return []
    known = ", ".join(f"{label(name)} {shown(value, '.1f')} %" for name, value in sorted(ceilings.items()))
    return [f"The best possible in expectation, for the truth of these users is known: {known}."]


def writing_lines(figures: dict[str, dict]) -> list[str]:
    if not any("rouge_l" in each["metrics"] for each in figures.values()):
        return []
    return ["Users write in this task. Accuracy, here and in every table, is ROUGE-L (the F1 of the longest common "
            "subsequence of stemmed words, Lin 2004) of what the base writes greedily, in percent; the published "
            "scoring of labels has nothing to say of it."]  # fmt: skip


def single_user_lines(figures: dict[str, dict]) -> list[str]:
    alone = any(each["num_users"] == 1 for each in figures.values())
    return ["Of a single user an interval has no width: it knows nothing of other users."] if alone else []


# ---- Writing -------------------------------------------------------------------------------------------------------


def as_html(sections: list[Section]) -> str:
    template = files("minipeft.peftu").joinpath("report.html").read_text(encoding="utf-8")
    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    return environment.from_string(template).render(sections=sections)


def as_markdown(sections: list[Section], figures: Path) -> str:
    """Writes the pictures into the folder `figures`, which lies beside the file."""
    lines = []
    for i, section in enumerate(sections):
        lines += [f"{'##' if i else '#'} {plain(section.title)}", ""]
        lines += [part for line in section.lines for part in (plain(line), "")]
        for picture in section.pictures:
            path = figures / f"{i}-{picture.name}.png"
            write_file(path, charts.written(picture.figure, "png"))
            lines += [f"![{plain(picture.caption)}]({figures.name}/{path.name})", "", plain(picture.caption), ""]
        for table in section.tables:
            lines += [f"### {plain(table.title)}", "", *([plain(table.note), ""] if table.note else [])]
            lines += ["<details><summary>show</summary>", ""] if table.folded else []
            aligned = [all(row[i].numeric for row in table.rows) for i in range(len(table.columns))]
            lines += [_row(table.columns), "|" + "|".join("--:" if right else ":--" for right in aligned) + "|"]
            lines += [_row(cell.text for cell in row) for row in table.rows]
            lines += ["", "</details>", ""] if table.folded else [""]
    return "\n".join(lines)


def plain(text: str) -> str:
    """Text that Markdown and the HTML in it leave as it is."""
    escaped = escape(" ".join(text.split()), quote=False)
    return "".join(f"\\{each}" if each in "\\`*_[]|#~$" else each for each in escaped)


def _row(cells: Iterable[str]) -> str:
    return "| " + " | ".join(map(plain, cells)) + " |"
