"""The report's tables: from figures and records to rows of cells, whatever they are written as afterwards."""

from dataclasses import dataclass

from minipeft.peftu.charts import label
from minipeft.peftu.summary import Outcome

RIVALS = ("own_majority", "probe_pooled_user", "shared")  # what a personal method has to beat to have earned its cost
MOST_USERS = 300  # rows of the table of users
STILL, HARDLY = 0.0, 0.01  # a typical relative change of a weight: none at all, too little to have learnt from


@dataclass(frozen=True)
class Cell:
    """What is shown, and what the column is sorted by; None sorts last."""

    text: str
    key: float | str | None

    @property
    def numeric(self) -> bool:
        return not isinstance(self.key, str)


@dataclass(frozen=True)
class Table:
    title: str
    columns: list[str]
    rows: list[list[Cell]]
    folded: bool = False  # shown when asked for, and in print
    note: str = ""


def accuracy_table(figures: dict[str, dict]) -> Table:
    rows = [
        [words(label(name)), words(each["kind"]), number(each["accuracy"], ".1f"), span(each),
         number(each["worst_decile"], ".1f"), number(each["pooled_accuracy"], ".1f"),
         number(each["paper_accuracy"], ".1f"), number(each["harmed_vs_shared"], "d"),
         number(each["harmed_vs_own_majority"], "d"), number(each["num_users"], "d"),
         number(len(each["seeds"]), "d")]
        for name, each in by_accuracy(figures)
    ]  # fmt: skip
    return Table("Accuracy", ["method", "kind", "accuracy, %", "95 % interval", "worst tenth, %", "pooled, %",
                              "published scoring, %", "users below shared", "users below own majority", "users",
                              "seeds"],
                 rows, note="Worst tenth: mean over the tenth of the users who are worst off. Pooled: over all test "
                 "examples at once.")  # fmt: skip


def comparison_table(title: str, pairs: list[dict], family: int, folded: bool = False) -> Table:
    rows = [
        [words(label(pair["a"])), words(label(pair["b"])), number(pair["difference"], "+.1f"), span(pair),
         Cell(p_text(pair["p_holm"]), pair["p_holm"]), number(pair["wins"], "d"), number(pair["ties"], "d"),
         number(pair["losses"], "d"), number(pair["minimum_detectable_difference"], ".1f")]
        for pair in pairs
    ]  # fmt: skip
    return Table(title, ["a", "b", "difference, points", "95 % interval", "p (Holm)", "a wins", "ties", "a loses",
                         "detectable, points"], rows, folded,
                 f"a minus b, paired over users. p is adjusted over all {family} pairs of the task, the interval is "
                 "not. Detectable: the true difference that so many users would show with 80 % power at alpha 0.05.",
                 )  # fmt: skip


def metric_table(figures: dict[str, dict]) -> Table:
    metrics = list(dict.fromkeys(metric for each in figures.values() for metric in each["metrics"]))
    rows = [[words(label(name)), *(number(each["metrics"].get(metric), ".3f") for metric in metrics)]
            for name, each in by_accuracy(figures)]  # fmt: skip
    return Table("Other metrics", ["method", *map(label, metrics)], rows if metrics else [],
                 note="From 0 to 1, mean over users and seeds.")


def cost_table(figures: dict[str, dict]) -> Table:
    rows = [
        [words(label(name)), number(each["trainable"], ",d"), number(each["bytes_per_user"], ",d"),
         number(giga(each["train_flops_per_user"]), ",.1f"), number(each["train_seconds"], ",.1f"),
         number(each["peak_memory_mb"], ",.0f"), number(each["chosen_lr"], "g")]
        for name, each in by_accuracy(figures)
    ]  # fmt: skip
    return Table("Cost", ["method", "numbers trained", "bytes per user", "training GFLOP per user (counted)",
                          "training of all users, s", "peak memory, MB", "learning rate"], rows)  # fmt: skip


def rate_table(names: dict[str, Outcome]) -> Table:
    tried = sorted({rate for outcome in names.values() for rate in outcome.first.lr_grid})
    rows = [[words(label(name)), number(outcome.first.chosen_lr, "g"),
             *(number(outcome.first.lr_grid.get(rate), ".4f") for rate in tried)]
            for name, outcome in names.items() if outcome.first.lr_grid]  # fmt: skip
    return Table("Learning rates that were tried", ["method", "chosen", *(f"loss at {rate:g}" for rate in tried)], rows,
                 note="Validation loss of each, mean over users; first seed.")


def movement_table(names: dict[str, Outcome]) -> Table:
    rows = []
    for name, outcome in names.items():
        moved = outcome.first.movement
        if not moved:
            continue
        least = min(moved, key=lambda tensor: moved[tensor]["median"])
        typical = sorted(each["median"] for each in moved.values())[len(moved) // 2]
        stuck = sum(each["min"] <= STILL for each in moved.values())
        flag = "DID NOT TRAIN" if typical <= STILL else "HARDLY MOVED" if typical < HARDLY else "trained"
        rows.append([words(label(name)), words(flag), number(typical, ".2g"), number(moved[least]["median"], ".2g"),
                     words(least), number(stuck, "d"), number(len(moved), "d")])  # fmt: skip
    return Table("Movement audit: did the weights train?",
                 ["method", "verdict", "typical tensor", "least moved tensor", "which", "tensors still for some user",
                  "tensors"], rows,
                 note="Length of a weight's change over its start's, or the RMS of the change where the start is 0; "
                 f"the median over users, first seed. Hardly moved: below {HARDLY:g}.")  # fmt: skip


def notes_table(names: dict[str, Outcome], entries: dict[str, dict | None], left_out: dict[str, str]) -> Table:
    """What was cut, skipped or left out; what is true of several names alike stands once."""
    found: dict[tuple[str, float | None], list[str]] = {}
    for name, outcome in names.items():
        for reason, count in sorted({note for record in outcome.records for note in record.notes.items()}):
            found.setdefault((reason, count), []).append(label(name))
    for name, reason in left_out.items():
        found.setdefault((reason, None), []).append(label(name))
    missing = [label(name) for name, entry in entries.items() if entry is None and name not in left_out]
    if missing:
        found[("not made: does not apply here, or was not asked for", None)] = missing
    rows = [[words(reason), number(count, ",d"), words("all" if len(who) == len(names) else ", ".join(who))]
            for (reason, count), who in found.items()]  # fmt: skip
    return Table("What was cut, skipped or left out", ["what", "how many", "where"], rows)


def facts_table(title: str, facts: dict) -> Table:
    rows = []
    for name, value in facts.items():
        inner = value if isinstance(value, dict) else {"": value}
        rows += [[words(f"{label(name)}, {label(key)}" if key else label(name)), words(str(each))]
                 for key, each in inner.items() if each is not None]  # fmt: skip
    return Table(title, ["what", "value"], rows)


def users_table(names: dict[str, Outcome], personal: dict[str, Outcome]) -> Table:
    shown = {name: outcome.accuracy for name, outcome in names.items() if name in personal or name in RIVALS}
    some = next(iter(names.values())).first
    rows = [[words(user), number(num_train, "d"), number(len(scores), "d"),
             *(number(accuracy.get(user), ".1f") for accuracy in shown.values())]
            for user, num_train, scores in zip(some.users, some.num_train, some.correct)]  # fmt: skip
    note = f"Accuracy, %; the first {MOST_USERS} of {len(rows)} users." if len(rows) > MOST_USERS else "Accuracy, %."
    return Table("Users", ["user", "training examples", "test examples", *map(label, shown)], rows[:MOST_USERS],
                 folded=True, note=note)


def by_accuracy(figures: dict[str, dict]) -> list[tuple[str, dict]]:
    return sorted(figures.items(), key=lambda item: -item[1]["accuracy"])


# ---- Cells ---------------------------------------------------------------------------------------------------------


def words(text: str) -> Cell:
    return Cell(text, text)


def number(value: float | None, form: str) -> Cell:
    return Cell("\N{EN DASH}" if value is None else format(value, form).replace("-", "\N{MINUS SIGN}"), value)


def span(entry: dict) -> Cell:
    low, high = entry["ci"]
    return Cell(f"{low:.1f} to {high:.1f}".replace("-", "\N{MINUS SIGN}"), low)


def estimate(entry: dict | None) -> Cell:
    if entry is None:
        return number(None, "")
    return Cell(f"{entry['accuracy']:.1f} [{span(entry).text}]", entry["accuracy"])


def p_text(p: float) -> str:
    return "< 0.001" if p < 0.001 else f"{p:.3f}"


def giga(value: float | None) -> float | None:
    return None if value is None else value / 1e9
