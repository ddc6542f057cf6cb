"""The report's pictures. Each is narrow, so that its letters can be read on a phone; colours are Okabe and Ito's
(2008), which keep apart for the colour-blind, and no meaning hangs on colour alone.

Every function returns a figure, or None where there is nothing to draw.
"""

import io
import math
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from itertools import cycle

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, MaxNLocator

from minipeft.peftu.summary import Outcome, paired

BLUE, ORANGE, GREEN, GREY = "#0072B2", "#D55E00", "#009E73", "#5f6368"
LINES = (BLUE, ORANGE, GREEN, "#CC79A7", "#E69F00", "#56B4E9", "#000000")
KINDS = {"personal": (BLUE, "o"), "shared": (GREEN, "s"), "baseline": (GREY, "D")}  # colour, marker
WIDTH = 4.8  # inches
HALF = 1e-9  # more than what two ways to add up differ by
NO_COST = "others_vote"  # needs other people's labels of the very text: no cost of ours buys them
STYLE = {
    "font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "figure.constrained_layout.use": True,
    "text.parse_math": False,        # a name may hold a dollar sign
    "svg.hashsalt": "minipeft",      # the same records give the same bytes
}  # fmt: skip


@contextmanager
def style() -> Iterator[None]:
    """Figures are made and written inside."""
    with matplotlib.rc_context(STYLE):
        yield


def written(figure: Figure, kind: str) -> bytes:
    """The picture as "svg" or "png". No date in it: the same records give the same bytes."""
    file = io.BytesIO()
    figure.savefig(file, format=kind, dpi=200, metadata={"Date": None} if kind == "svg" else {"Software": None})
    return file.getvalue()


def label(name: str) -> str:
    """A name as people read it: own_majority is "own majority"."""
    return name.replace("_", " ")


def shown(value: float, form: str) -> str:
    """As format() does, but 70.25 is 70.3: a half goes away from zero. Of zero there is no negative."""
    nudged = value + math.copysign(HALF, value) if form.endswith("f") else value
    text = format(nudged, form)
    text = text if text.strip("-0.") else format(0 * abs(value), form)
    return text.replace("-", "\N{MINUS SIGN}")


def covered(figures: dict[str, dict]) -> dict[str, str]:
    """Name -> what part of the test examples it answers, where that is not all of them."""
    whole = max(each["num_answered"] for each in figures.values())
    return {name: f"{100 * each['num_answered'] // whole} % of test examples" for name, each in figures.items()
            if each["num_answered"] < whole}  # fmt: skip


def accuracies(figures: dict[str, dict], ceilings: dict[str, float]) -> Figure:
    """Every name's accuracy with its interval, best first; known ceilings as lines."""
    names = sorted(figures, key=lambda name: figures[name]["accuracy"])
    parts = covered(figures)
    figure, axes = _axes(height=1.1 + 0.24 * len(names))
    for place, name in enumerate(names):
        colour, marker = KINDS[figures[name]["kind"]]
        axes.plot(figures[name]["ci"], [place, place], color=colour, linewidth=1.5)
        axes.plot(figures[name]["accuracy"], place, marker, color=colour, markersize=5)
    for (name, value), dashes in zip(sorted(ceilings.items()), ("--", ":")):
        text = f"{label(name)} ceiling {shown(value, '.1f')}"
        axes.axvline(value, color="black", linewidth=1, linestyle=dashes, label=text)
    for kind, (colour, marker) in KINDS.items():
        axes.plot([], [], marker, color=colour, label=kind, markersize=5)
    axes.set_yticks(range(len(names)), [label(name) + (f"\n{parts[name]}" if name in parts else "") for name in names])
    axes.set_xlabel("accuracy, %, mean over users; 95 % interval")
    axes.grid(axis="x", color="#dddddd", linewidth=0.6)
    figure.legend(loc="outside upper center", ncols=3, frameon=False, fontsize=8)
    return figure


def gains(personal: dict[str, Outcome], shared: Outcome) -> Figure:
    """Per method one bar a user, personal minus shared, sorted; the line through a bar spans the seeds."""
    figure, panels = _panels(personal, height=1.7)
    for axes, (name, outcome) in zip(panels, personal.items()):
        differences = paired(outcome, shared)[1]                                            # [users, seeds]
        differences = differences[np.argsort(-differences.mean(1), kind="stable")]
        mean, places = differences.mean(1), np.arange(1, len(differences) + 1)
        for side, colour in ((np.maximum(mean, 0), BLUE), (np.minimum(mean, 0), ORANGE)):
            axes.stairs(side, np.arange(len(mean) + 1) + 0.5, fill=True, color=colour)  # one path, however many users
        if differences.shape[1] > 1:
            axes.vlines(places, differences.min(1), differences.max(1), color=GREY, linewidth=0.5)
        axes.axhline(0, color="black", linewidth=0.8)
        axes.set_title(f"{label(name)}: {(mean > 1e-9).sum()} gain, {(mean < -1e-9).sum()} lose", fontsize=9)
        axes.set_xlim(0.4, len(mean) + 0.6)
    figure.supxlabel("users, sorted", fontsize=9)
    figure.supylabel("personal minus shared, points", fontsize=9)
    return figure


def against_shared(personal: dict[str, Outcome], shared: Outcome) -> Figure:
    """Per method one point a user: accuracy under the shared adapter and under the user's own."""
    figure, panels = _panels(personal, height=2.2)
    for axes, (name, outcome) in zip(panels, personal.items()):
        users = [user for user in outcome.users if user in shared.accuracy]
        x, y = (np.array([each.accuracy[user] for user in users]) for each in (shared, outcome))
        axes.plot([0, 100], [0, 100], color="black", linewidth=0.8)
        axes.scatter(x, y, s=10, color=BLUE, alpha=0.6, linewidths=0)
        low = max(0, min(x.min(), y.min()) - 5)
        axes.set(xlim=(low, 101), ylim=(low, 101), aspect="equal")
        axes.set_title(label(name), fontsize=9)
    figure.supxlabel("shared adapter, accuracy %", fontsize=9)
    figure.supylabel("own adapter, accuracy %", fontsize=9)
    return figure


def costs(figures: dict[str, dict]) -> Figure:
    """Accuracy against bytes per user and against seconds; the line joins what nothing cheaper beats.

    What answers only some of the test examples is drawn, but not on the line; others' vote never is on it.
    """
    parts = covered(figures)
    figure = Figure(figsize=(WIDTH, 5.6))
    for axes, (field, title) in zip(figure.subplots(2), (
        ("stored_per_user", "bytes stored per user, what is shared shared out"),
        ("seconds_in_all", "training of all users, seconds"),
    )):
        known = {name: each for name, each in figures.items() if each[field] is not None}
        for each in known.values():
            colour, marker = KINDS[each["kind"]]
            axes.errorbar(each[field], each["accuracy"], yerr=_arms(each), fmt=marker, color=colour, markersize=4,
                          linewidth=0.7)
        front = pareto({name: (each[field], each["accuracy"]) for name, each in known.items()
                        if name not in parts and name != NO_COST})  # fmt: skip
        axes.step([known[name][field] for name in front], [known[name]["accuracy"] for name in front], where="post",
                  color=ORANGE, linewidth=1)
        for name in front:
            axes.annotate(label(name), (known[name][field], known[name]["accuracy"]), xytext=(-4, 4),
                          textcoords="offset points", fontsize=7, horizontalalignment="right")
        smallest = min((each[field] for each in known.values() if each[field] > 0), default=1)
        axes.set_xscale("symlog", linthresh=smallest)  # 0 has a place
        axes.xaxis.set_major_formatter(lambda value, _: EngFormatter(sep="")(value) if value >= 1 else f"{value:g}")
        axes.margins(x=0.15)
        axes.set(xlabel=title, ylabel="accuracy, %")
    return figure


def pareto(points: dict[str, tuple[float, float]]) -> list[str]:
    """The names that no other beats in accuracy at the same cost or less, cheapest first."""
    front: list[str] = []
    for name in sorted(points, key=lambda name: (points[name][0], -points[name][1])):
        if not front or points[name][1] > points[front[-1]][1]:
            front.append(name)
    return front


def cold_start(figures: dict[str, dict]) -> Figure | None:
    """Accuracy of new users against the number of their examples: a panel a name, the others' curves behind its own.

    Below each number, how many users have as many. What is known without a user's examples alone, `shared`, has no
    panel: it is where `shared_user` starts.
    """
    curves = {name: {int(k): point for k, point in each["cold_start"].items()} for name, each in figures.items()
              if each["cold_start"]}  # fmt: skip
    names = [name for name, curve in curves.items() if [*curve] != [0]]
    if not names:
        return None
    figure, panels = _panels(names, height=1.7)
    users: dict[int, int] = {}
    for curve in curves.values():
        users |= {k: max(point["users"], users.get(k, 0)) for k, point in curve.items()}
    ends = [end for curve in curves.values() for point in curve.values() for end in point["ci"]]
    for axes, name in zip(panels, names):
        colour, marker = KINDS[figures[name]["kind"]]
        for other in curves.values():
            axes.plot([*other], [point["accuracy"] for point in other.values()], color=GREY, linewidth=0.6, alpha=0.5)
        sizes, points = [*curves[name]], curves[name].values()
        axes.fill_between(sizes, *zip(*(point["ci"] for point in points)), color=colour, alpha=0.15, linewidth=0)
        axes.plot(sizes, [point["accuracy"] for point in points], marker=marker, color=colour, markersize=3)
        axes.set_xscale("symlog", base=2, linthresh=1)
        axes.set_xticks(list(users), [f"{k}\n{n}" for k, n in users.items()], fontsize=6)
        axes.minorticks_off()
        axes.set_title(label(name), fontsize=9)
        axes.set_ylim(min(ends) - 2, max(ends) + 2)
    figure.supxlabel("examples of the new user; below, of how many users", fontsize=9)
    figure.supylabel("accuracy, %; 95 % interval", fontsize=9)
    return figure


def losses(names: dict[str, Outcome]) -> Figure | None:
    """Validation loss after each epoch, mean over users and seeds; who stopped early keeps their last."""
    figure, axes = _axes(height=2.8)
    for name, colour, marker in _lines(names):
        every = [curve for record in names[name].records for curve in record.val_loss]
        curves = [finite for curve in every if (finite := [loss for loss in curve if loss is not None])]
        if curves:
            longest = max(map(len, curves))
            mean = np.mean([curve + curve[-1:] * (longest - len(curve)) for curve in curves], axis=0)
            axes.plot(range(1, longest + 1), mean, marker=marker, color=colour, markersize=4, label=label(name))
    if not axes.lines:
        return None
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    axes.set(xlabel="epoch", ylabel="validation loss")
    figure.legend(loc="outside upper center", ncols=3, frameon=False, fontsize=8)
    return figure


def _lines(names: dict[str, Outcome]) -> Iterator[tuple[str, str, str]]:
    """Each name with its colour and marker: 35 pairs before one comes again."""
    return zip(names, cycle(LINES), cycle("osD^v"))


def _arms(figures: dict) -> np.ndarray:
    """[2, 1] lengths of the error bar, down and up. A percentile interval need not hold the mean: no arm below 0."""
    (low, high), mean = figures["ci"], figures["accuracy"]
    return np.maximum(0, [[mean - low], [high - mean]])


def _axes(height: float) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(WIDTH, height))
    return figure, figure.subplots()


def _panels(names: Collection[str], height: float) -> tuple[Figure, list[Axes]]:
    """One panel per name, two beside each other."""
    rows = -(-len(names) // 2)
    figure = Figure(figsize=(WIDTH, 0.4 + height * rows))
    panels = figure.subplots(rows, 2, squeeze=False).ravel()
    for unused in panels[len(names):]:
        unused.remove()
    return figure, list(panels[: len(names)])
