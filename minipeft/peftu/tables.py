"""The report's tables: from figures and records to rows of cells, whatever they are written as afterwards."""

from collections.abc import Collection, Iterable
from dataclasses import dataclass

from minipeft.peftu.charts import covered, label, shown
from minipeft.peftu.probes import STRENGTH
from minipeft.peftu.protocol import GRID, MOST_RATES
from minipeft.peftu.summary import Outcome

RIVALS = ("own_majority", "probe_pooled_user", "shared")  # what a personal method has to beat to have earned its cost
MOST_USERS = 300  # rows of the table of users
STILL = 0.0  # a change of a weight: none at all
HARDLY, HARDLY_FROM_ZERO = 0.01, 1e-4  # too little to have learnt from: of its size, or in itself where it was zero
BEYOND = "A learning rate that is best at the grid's end: a better one may lie beyond, or the next was given up"
NAMES = {  # what answers; methods by name are each user's own adapter
    "global_majority": "the commonest label of everybody's training examples",
    "own_majority": "the commonest label of the user's training examples",
    "others_vote": "most other users' training labels of the same text. It answers only test texts that others have in "
                   "training, so it is compared with each other name on these alone, and not on the line of costs",
    "zero_shot": "the language model alone; the default base has been trained on the task's training examples: there "
                 "it is one model for all",
    "few_shot": "the language model with some of the user's own examples in the prompt",
    "retrieval": "the labels of the user's nearest training texts (BM25)",
    "probe_pooled": "one logistic regression on frozen features for all users", "probe_user": "one per user",
    "probe_pooled_user": "one per user that also sees what the pooled one says",
    "shared": "one adapter for all users", "shared_user": "each user's own adapter on top of the shared one",
}  # fmt: skip
PUBLISHED_NAMES = {  # in mode paper
    "zero_shot": "the language model alone, but with up to three of the user's own examples and their labels in the "
                 "prompt: so it is published under this name",
}  # fmt: skip


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


def best_baseline(figures: dict[str, dict]) -> str | None:
    """The highest of those that answer every test example."""
    parts = covered(figures)
    whole = {name: each["accuracy"] for name, each in figures.items()
             if each["kind"] == "baseline" and name not in parts}  # fmt: skip
    return max(whole, key=whole.get, default=None)


def rivals(figures: dict[str, dict]) -> tuple[str, ...]:
    """RIVALS, and the best baseline where it is none of them."""
    best = best_baseline(figures)
    return RIVALS if best is None or best in RIVALS else (*RIVALS, best)


def accuracy_table(figures: dict[str, dict]) -> Table:
    parts = covered(figures)
    rows = [
        [words(label(name)), words(each["kind"]), on_part(number(each["accuracy"], ".1f"), parts.get(name)), span(each),
         number(each["worst_decile"], ".1f"), number(each["pooled_accuracy"], ".1f"),
         number(each.get("fixed_accuracy"), ".1f"), number(each["paper_accuracy"], ".1f"),
         number(each["harmed_vs_shared"], "d"),
         number(each["harmed_vs_own_majority"], "d"), number(each["num_users"], "d"),
         number(each["num_answered"], ",d"), number(len(each["seeds"]), "d")]
        for name, each in by_accuracy(figures)
    ]  # fmt: skip
    return Table("Accuracy", ["method", "kind", "accuracy, %", "95 % interval", "worst tenth, %", "pooled, %",
                              "fixed scoring, %", "published scoring, %", "users below shared",
                              "users below own majority", "users", "test examples", "seeds"],
                 rows, note="Worst tenth: mean over the tenth of the users who are worst off. Pooled: over all test "
                 "examples at once. Fixed scoring: of the answer of the highest likelihood, share of right ones, or "
                 "Jaccard's measure; ROUGE-L where users write. Published scoring: of decoded text on a T5, else of "
                 "the answered label's name; of several labels one right one is enough.")  # fmt: skip


def comparison_table(title: str, pairs: list[dict], family: int, folded: bool = False) -> Table:
    rows = [
        [words(label(pair["a"])), words(label(pair["b"])), number(pair["difference"], "+.1f"), span(pair),
         Cell(p_text(pair["p_holm"]), pair["p_holm"]), number(pair["wins"], "d"), number(pair["ties"], "d"),
         number(pair["losses"], "d"), number(pair["minimum_detectable_difference"], ".1f")]
        for pair in pairs
    ]  # fmt: skip
    return Table(title, ["a", "b", "difference, points", "95 % interval", "p (Holm)", "a wins", "ties", "a loses",
                         "detectable, points"], rows, folded,
                 f"a minus b, paired over users, on the test examples that both answer. p is adjusted over all "
                 f"{family} pairs of the task, the interval is not. Where few users make all the difference and most "
                 "tie, an interval is too narrow: of 20 users of whom one in seven gains it holds the truth in 89 % of "
                 "trials. Detectable: the true difference that so many users "
                 "would show with 80 % power at alpha 0.05.",
                 )  # fmt: skip


def metric_table(figures: dict[str, dict]) -> Table:
    columns = {key: list(dict.fromkeys(metric for each in figures.values() for metric in each[key]))
               for key in ("metrics", "pooled_metrics")}  # fmt: skip
    rows = [[words(label(name)), *(number(each[key].get(metric), ".3f") for key in columns for metric in columns[key])]
            for name, each in by_accuracy(figures)]  # fmt: skip
    heads = [*map(label, columns["metrics"]), *(f"{label(metric)}, pooled" for metric in columns["pooled_metrics"])]
    return Table("Other metrics", ["method", *heads], rows if heads else [],
                 note="From 0 to 1, mean over users and seeds; pooled: of all users' test examples at once. Rows go by "
                 "accuracy, whose intervals stand in the first table.")  # fmt: skip


def cost_table(figures: dict[str, dict]) -> Table:
    rows = [
        [words(label(name)), number(each["trainable"], ",d"), number(each["bytes_per_user"], ",d"),
         number(each["stored_per_user"], ",.0f"), number(giga(each["train_flops_per_user"]), ",.1f"),
         number(giga(each.get("flops_in_all")), ",.1f"),
         number(each["train_seconds"], ",.1f"), number(each["seconds_in_all"], ",.1f"),
         number(kilo(each.get("kept_bytes_per_row")), ",.1f"),
         number(each["peak_memory_mb"], ",.0f"), number(each["chosen_lr"], "g")]
        for name, each in by_accuracy(figures)
    ]  # fmt: skip
    return Table("Cost", ["method", "numbers trained", "bytes per user", "with shares of what is shared",
                          "training GFLOP per user (counted)", "GFLOP with what lies under it",
                          "training of all users, s", "s with what lies under it", "a training row keeps, kB",
                          "whole process's peak memory so far, MB", "learning rate"], rows,
                 note="Seconds are of training steps alone, at the chosen learning rate: neither the search for it nor "
                 "evaluation is in them. Where methods act in an encoder's top layers only, the lower ones run "
                 "once on the training texts: each name's seconds and operations hold that, for alone it would "
                 "have to pay it (shared_user's where what lies under it is added). A head's lower layers are all "
                 "layers. Virtual tokens are rows that run through every layer. A fused pass's seconds are shared "
                 "out by rows: between methods they differ by rows, not by what a method's own arithmetic costs. "
                 "On a GPU what adapters themselves compute is not counted but taken as three times their forward "
                 "pass. What a row of a training pass keeps for the backward pass is measured, on a few texts; a pass "
                 "takes that times its rows, and as much again for what lives shorter. The process's memory is of "
                 "everything that shares it, earlier methods included: no method's own. Bytes are those of our "
                 "files, all trained numbers in fp32: P-tuning's with the network that writes its virtual tokens, "
                 "though to answer the tokens would do.")  # fmt: skip


def rate_table(names: dict[str, Outcome]) -> Table:
    rows = [[words(label(name)), number(outcome.first.chosen_lr, "g"), words(at_edge(grid)),
             words(", ".join(f"{rate:g}: {grid[rate]:.4f}" for rate in sorted(grid)))]
            for name, outcome in names.items() if (grid := outcome.first.lr_grid)]  # fmt: skip
    return Table("Learning rates that were tried", ["method", "chosen", "best at the grid's end", "loss at each"], rows,
                 note="Validation loss of each, first seed: of each user's best epoch, mean over users (of the shared "
                 "adapter's best epoch, mean over everybody's examples). A rate at which "
                 "one user cannot be trained is given up for all. Of the protocol's own grids every method tries "
                 f"{len(GRID)}, and where the best lies at an end those beyond, one at a time, up to {MOST_RATES} in "
                 f"all. {BEYOND}.")  # fmt: skip


def at_edges(names: dict[str, Outcome]) -> str:
    """Whose best rate lies at an end of the grid, in one line; "" if nobody's does."""
    ends = {name: at_edge(outcome.first.lr_grid) for name, outcome in names.items() if outcome.first.lr_grid}
    found = ", ".join(f"{label(name)} ({end})" for name, end in ends.items() if end)
    return f"{BEYOND}: {found}." if found else ""


def at_edge(grid: dict[float, float]) -> str:
    best = min(grid, key=grid.get)
    return "" if len(grid) < 2 else "lowest" if best == min(grid) else "highest" if best == max(grid) else ""


def names_table(names: Iterable[str], mode: str) -> Table:
    known = NAMES | (PUBLISHED_NAMES if mode == "paper" else {})
    return Table("Names", ["name", "what answers"],
                 [[words(label(name)), words(known.get(name, "each user's own adapter, by this method"))]
                  for name in names],
                 note=f"The probes' C is {STRENGTH:g}, fixed: it was not searched for, as learning rates were.")


def methods_table(names: dict[str, Outcome]) -> Table:
    """How each was trained: configuration, and the epochs that users went through on average."""
    rows = []
    for name, outcome in names.items():
        record = outcome.first
        if not record.method:
            continue
        epochs = [len(curve) for each in outcome.records for curve in each.val_loss]
        rows.append([words(label(name)), words(configuration(record.method)),
                     number(sum(epochs) / len(epochs) if epochs else None, ".1f")])  # fmt: skip
    return Table("Methods as they were trained", ["method", "configuration", "epochs, mean over users"], rows)


def configuration(method: dict) -> str:
    """Method.described() for people."""
    if "members" in method:
        return " + ".join(map(configuration, method["members"]))
    values = ", ".join(f"{name} {value}" for name, value in method.items() if name != "name")
    return f"{method['name']} ({values})" if values else method["name"]


def cold_start_table(figures: dict[str, dict]) -> Table:
    rows = [[words(label(name)), number(int(k), "d"), number(point["accuracy"], ".1f"), span(point),
             number(point["users"], "d")]
            for name, each in figures.items() for k, point in (each["cold_start"] or {}).items()]  # fmt: skip
    return Table("Cold start: new users", ["method", "own examples", "accuracy, %", "95 % interval", "users"], rows,
                 folded=True, note="First seed, whose luck is in no interval. Users with fewer examples drop out as "
                 "the number grows: points of different numbers of users are not of the same users.")  # fmt: skip


def movement_table(names: dict[str, Outcome]) -> Table:
    rows = []
    for name, outcome in names.items():
        moved = outcome.first.movement
        if not moved:
            continue
        own = {kind: each for kind, each in moved.items() if not kind.startswith("head.")} or moved
        least = min(own, key=lambda kind: own[kind]["median"])
        stuck = sum(each["min"] <= STILL for each in own.values())
        rows.append([words(label(name)), words(verdict(own.values())), number(own[least]["median"], ".2g"),
                     words(least), number(max(each["median"] for each in own.values()), ".2g"), number(stuck, "d"),
                     number(len(own), "d")])  # fmt: skip
    return Table("Movement audit: did the weights train?",
                 ["method", "verdict", "least moved tensor", "which", "most moved tensor",
                  "tensors still for some user", "tensors"], rows,
                 note="Length of a weight's change over its start's, or the RMS of the change where the start is 0; "
                 "the median over users, first seed, of a method's own tensors without the head beside it. Hardly "
                 f"moved: none by {HARDLY:g}, or {HARDLY_FROM_ZERO:g} from 0.")  # fmt: skip


def verdict(own: Collection[dict[str, float]]) -> str:
    """Of how far each kind of a method's own tensors moved."""
    still = sum(each["median"] <= STILL for each in own)
    if still:
        return "DID NOT TRAIN" if still == len(own) else "PARTS DID NOT TRAIN"
    moved = any(each["median"] >= (HARDLY_FROM_ZERO if each.get("from_zero") else HARDLY) for each in own)
    return "trained" if moved else "HARDLY MOVED"


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


def calls_table(calls: Iterable[dict]) -> Table:
    """Which call made which records."""
    rows = [[words(call["began"]), words(task), number(call["seconds"][task], ",.0f"),
             words(str(call["versions"].get("minipeft", ""))), words(machine(call["versions"])),
             number(len(made), "d"), words(", ".join(made))]
            for call in calls for task, made in call["records"].items()]  # fmt: skip
    return Table("Calls", ["began", "task", "s until its last record", "minipeft", "on", "records",
                           "which, with their seed"],
                 rows, folded=True, note="A run that was stopped goes on in another call. Seconds are of everything "
                 "the call did for the task up to then: search, evaluation and baselines too. A call that was stopped "
                 "may have trained adapters of which the next made the record.")  # fmt: skip


def machine(versions: dict) -> str:
    """What a call ran on. Seconds of calls on different machines do not compare."""
    return ", ".join(str(versions[name]) for name in ("gpu", "cpu") if versions.get(name))


def users_table(names: dict[str, Outcome], personal: dict[str, Outcome]) -> Table:
    of_users = {name: outcome.accuracy for name, outcome in names.items() if name in personal or name in RIVALS}
    some = next(iter(names.values())).first
    rows = [[words(user), number(num_train, "d"), number(len(scores), "d"),
             *(number(accuracy.get(user), ".1f") for accuracy in of_users.values())]
            for user, num_train, scores in zip(some.users, some.num_train, some.correct)]  # fmt: skip
    note = f"Accuracy, %; the first {MOST_USERS} of {len(rows)} users." if len(rows) > MOST_USERS else "Accuracy, %."
    return Table("Users", ["user", "training examples", "test examples", *map(label, of_users)], rows[:MOST_USERS],
                 folded=True, note=note)


def by_accuracy(figures: dict[str, dict]) -> list[tuple[str, dict]]:
    return sorted(figures.items(), key=lambda item: -item[1]["accuracy"])


# ---- Cells ---------------------------------------------------------------------------------------------------------


def words(text: str) -> Cell:
    return Cell(text, text)


def number(value: float | None, form: str) -> Cell:
    return Cell("\N{EN DASH}" if value is None else shown(value, form), value)


def span(entry: dict) -> Cell:
    low, high = entry["ci"]
    return Cell(f"{shown(low, '.1f')} to {shown(high, '.1f')}", low)


def estimate(entry: dict | None, part: str | None = None) -> Cell:
    """part: of the test examples, where not all are answered."""
    if entry is None:
        return number(None, "")
    return on_part(Cell(f"{shown(entry['accuracy'], '.1f')} [{span(entry).text}]", entry["accuracy"]), part)


def on_part(cell: Cell, part: str | None) -> Cell:
    return cell if part is None else Cell(f"{cell.text} on {part}", cell.key)


def p_text(p: float) -> str:
    return "< 0.001" if p < 0.001 else f"{p:.3f}"


def giga(value: float | None) -> float | None:
    return None if value is None else value / 1e9


def kilo(value: float | None) -> float | None:
    return None if value is None else value / 1e3
