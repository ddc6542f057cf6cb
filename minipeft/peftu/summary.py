"""From records to the figures of result.json: every name's accuracy with its interval, every pair compared.

All accuracies and differences are in percent and points; a user's accuracy is the mean over the seeds.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import combinations

import numpy as np

from minipeft.errors import InputError
from minipeft.peftu.records import BASELINES, Record
from minipeft.stats import Estimate, Interval, bootstrap_mean, estimates, holm, luck_of, share_luck, worst_decile

EXACT = 1e-9  # points; differences below are of rounding
DIGITS = 9  # so that what two ways add up to 70.25 is printed alike
STANDS_ON = {"shared_user": "shared", "probe_pooled_user": "probe_pooled"}  # of which there is one for all users


@dataclass(frozen=True)
class Outcome:
    """One name on one task: its records, one per seed, all of the same users."""

    records: list[Record]

    @property
    def first(self) -> Record:
        return self.records[0]

    @property
    def users(self) -> list[str]:
        return self.first.users

    @cached_property
    def by_seed(self) -> dict[int, np.ndarray]:
        """Seed -> [users] accuracy in percent, in the order of `users`."""
        place = {user: i for i, user in enumerate(self.users)}
        result = {}
        for record in self.records:
            if set(record.users) != set(self.users):
                raise InputError(f"records of {record.task!r}, {record.name!r}: seeds {self.first.seed} and "
                                 f"{record.seed} scored different users; delete one of them and run again")
            result[record.seed] = np.empty(len(self.users))
            result[record.seed][[place[user] for user in record.users]] = 100 * np.array(record.accuracy)
        return result

    @property
    def values(self) -> np.ndarray:
        """[users, seeds] accuracy in percent."""
        return np.stack(list(self.by_seed.values()), axis=1)

    @cached_property
    def answered(self) -> dict[str, frozenset[int]]:
        """User -> the places of the test examples that are scored; those of the first seed, for all are the same."""
        places = self.first.answered or [range(len(scores)) for scores in self.first.correct]
        return {user: frozenset(own) for user, own in zip(self.users, places)}

    def on(self, examples: dict[str, frozenset[int]]) -> dict[int, np.ndarray]:
        """Seed -> [users] accuracy in percent, of these users on these of their test examples."""
        if all(self.answered[user] == own for user, own in examples.items()):
            place = {user: i for i, user in enumerate(self.users)}
            return {seed: values[[place[user] for user in examples]] for seed, values in self.by_seed.items()}
        found = {}
        for record in self.records:
            places = record.answered or [range(len(scores)) for scores in record.correct]
            scores = {user: dict(zip(*each)) for user, *each in zip(record.users, places, record.correct)}
            found[record.seed] = np.array([100 * np.mean([scores[user][i] for i in sorted(own)])
                                           for user, own in examples.items()])  # fmt: skip
        return found

    @property
    def accuracy(self) -> dict[str, float]:
        """User -> accuracy in percent, mean over seeds."""
        return dict(zip(self.users, self.values.mean(1).tolist()))

    def mean(self, field: str) -> float | None:
        """Mean over seeds of a number of the records; None where nobody took it."""
        values = [getattr(record, field) for record in self.records if getattr(record, field) is not None]
        return float(np.mean(values)) if values else None

    def metric(self, name: str) -> float | None:
        """A metric's mean over users and seeds, as the records have it; None where no user has one."""
        values = [value for record in self.records for value in record.metrics.get(name, []) if value is not None]
        return float(np.mean(values)) if values else None


def outcomes(records: Sequence[Record]) -> dict[str, dict[str, Outcome]]:
    """task -> name -> outcome; personal methods, then shared adapters, then baselines in the order of BASELINES."""
    kinds = {"personal": 0, "shared": 1, "baseline": 2}

    def order(record: Record) -> tuple:
        known = BASELINES.index(record.name) if record.name in BASELINES else len(BASELINES)
        return record.task, kinds[record.kind], known, record.name, record.seed

    found: dict[str, dict[str, list[Record]]] = {}
    for record in sorted(records, key=order):
        found.setdefault(record.task, {}).setdefault(record.name, []).append(record)
    return {task: {name: Outcome(some) for name, some in names.items()} for task, names in found.items()}


def summarise(records: Sequence[Record]) -> dict:
    """`tasks`, `comparisons` and `minimum_detectable_difference` of result.json; a baseline that was not made is null.

    Comparisons are a minus b over the users and test examples both have, for every pair of names of a task; `p_holm` is
    adjusted over all pairs of the task, not over tasks. Where one of the two has a single seed, that one stands against
    all seeds of the other. A task's `minimum_detectable_difference` is the median over its pairs.
    """
    tasks: dict[str, dict[str, dict | None]] = {}
    comparisons, detectable = [], {}
    for task, names in outcomes(records).items():
        tasks[task] = {name: figures(outcome, names) for name, outcome in names.items()}
        tasks[task] |= {name: None for name in BASELINES if name not in names}
        pairs = compare(task, names)
        comparisons += pairs
        known = [pair["minimum_detectable_difference"] for pair in pairs
                 if pair["minimum_detectable_difference"] is not None]  # fmt: skip
        detectable[task] = float(np.median(known)) if known else None
    return {"tasks": tasks, "comparisons": comparisons, "minimum_detectable_difference": detectable}


def figures(outcome: Outcome, names: dict[str, Outcome]) -> dict:
    """One name's entry of `tasks.<task>`.

    accuracy is by the scoring that the mode ranks by, one of paper_accuracy and fixed_accuracy, which both stand.
    bytes_per_user is what has to be stored for each user; of `shared` and `probe_pooled` that is one for all.
    stored_per_user shares these out and adds them to what stands on them; seconds_in_all and flops_in_all add the
    training of the shared adapter; a probe's seconds hold it already.
    """
    mean = bootstrap_mean(outcome.values)
    under, trained = names.get(STANDS_ON.get(outcome.first.name, "")), outcome.first.kind != "baseline"
    record = outcome.first
    scores = [score for each in outcome.records for user in each.correct for score in user]
    return {
        "kind": record.kind,
        "accuracy": round(mean.mean, DIGITS),
        "ci": within_percent(mean),
        "worst_decile": worst_decile(outcome.values.mean(1)),
        "pooled_accuracy": round(100 * float(np.mean(scores)), DIGITS),
        "paper_accuracy": scored_by(outcome, "paper_accuracy"),
        "fixed_accuracy": scored_by(outcome, "fixed_accuracy"),
        "harmed_vs_shared": harmed(outcome, names.get("shared")),
        "harmed_vs_own_majority": harmed(outcome, names.get("own_majority")),
        "num_users": len(outcome.users),
        "num_answered": sum(map(len, outcome.answered.values())),
        "seeds": [each.seed for each in outcome.records],
        "metrics": {name: outcome.metric(name) for name in record.metrics},
        "pooled_metrics": {name: float(np.mean([each.pooled[name] for each in outcome.records]))
                           for name in record.pooled},
        "trainable": record.trainable,
        "bytes_per_user": record.bytes_per_user,
        "stored_per_user": stored_per_user(outcome) + (stored_per_user(under) if under else 0),
        "train_flops_per_user": outcome.mean("train_flops_per_user"),
        "flops_in_all": flops_in_all(outcome, under if trained else None),
        "train_seconds": outcome.mean("train_seconds"),
        "seconds_in_all": outcome.mean("train_seconds") + (under.mean("train_seconds") if under and trained else 0),
        "kept_bytes_per_row": outcome.mean("kept_bytes_per_row"),
        "peak_memory_mb": outcome.mean("peak_memory_mb"),
        "chosen_lr": record.chosen_lr,
        "cold_start": cold_start(outcome),
    }


def scored_by(outcome: Outcome, field: str) -> float | None:
    """Percent under one of the two scorings, mean over users and seeds; None where no record has it."""
    found = [values for each in outcome.records if (values := getattr(each, field)) is not None]
    return round(100 * float(np.mean(found)), DIGITS) if found else None


def within_percent(interval: Interval) -> list[float]:
    """An interval of an accuracy. One that is symmetric may reach past what an accuracy can be."""
    return [max(0.0, interval.low), min(100.0, interval.high)]


def flops_in_all(outcome: Outcome, under: Outcome | None) -> float | None:
    """Counted operations of a user's training and of their share of what lies under it; None where not counted."""
    own, shared = outcome.mean("train_flops_per_user"), under.mean("train_flops_per_user") if under else 0.0
    return None if own is None or shared is None else own + shared


def stored_per_user(outcome: Outcome) -> float:
    """Bytes; what is one for all is shared out among the users."""
    return outcome.first.bytes_per_user / (len(outcome.users) if outcome.first.name in STANDS_ON.values() else 1)


def cold_start(outcome: Outcome) -> dict[str, dict] | None:
    """Number of own examples -> accuracy of the new users who have as many, its interval, and their number."""
    curves = [record.cold_start for record in outcome.records if record.cold_start]
    found = {}
    for k in sorted({k for curve in curves for k in curve}):
        of_user = 100 * np.array([curve[k] for curve in curves if k in curve], dtype=float).T       # [users, seeds]
        of_user = of_user[~np.isnan(of_user).any(1)]                                                # None became nan
        if len(of_user):
            mean = bootstrap_mean(of_user, draws=2000)
            found[str(k)] = {"accuracy": mean.mean, "ci": within_percent(mean), "users": len(of_user)}
    return found or None


def harmed(outcome: Outcome, other: Outcome | None) -> int | None:
    """How many users are worse off than under the other; None where there is no other."""
    if other is None or other is outcome:
        return None
    return int((paired(outcome, other)[1].mean(1) < -EXACT).sum())


def compare(task: str, names: dict[str, Outcome]) -> list[dict]:
    """Every pair of names, in the order of `names`, with p-values adjusted over all of them."""
    result, groups = [], {}
    for a, b in combinations(names, 2):
        users, differences = paired(names[a], names[b])
        if users:
            groups.setdefault((tuple(users), differences.shape), []).append((len(result), differences))
            result.append({"task": task, "a": a, "b": b})
    found: dict[int, Estimate] = {}
    for members in groups.values():  # pairs of the same users share their redraws
        found |= zip([place for place, _ in members], estimates(np.stack([values for _, values in members])))
    of_names = [luck_of(outcome.values) for outcome in names.values() if len(outcome.records) > 1]
    family = share_luck([found[place] for place in range(len(result))], of_names)
    by_user = {place: values.mean(1) for members in groups.values() for place, values in members}
    for place, (pair, estimate) in enumerate(zip(result, family)):
        gain = by_user[place]
        pair |= {
            "difference": estimate.mean, "ci": list(estimate.interval()), "p": estimate.p_value(), "p_holm": None,
            "wins": int((gain > EXACT).sum()), "ties": int((abs(gain) <= EXACT).sum()),
            "losses": int((gain < -EXACT).sum()),
            "minimum_detectable_difference": estimate.minimum_detectable_difference(),
        }  # fmt: skip
    for pair, adjusted in zip(result, holm([pair["p"] for pair in result])):
        pair["p_holm"] = float(adjusted)
    return result


def paired(a: Outcome, b: Outcome) -> tuple[list[str], np.ndarray]:
    """The users both have, and a minus b on the test examples both answered: [users, seeds], in points."""
    common = {user: a.answered[user] & b.answered[user] for user in a.users if user in b.answered}
    common = {user: both for user, both in common.items() if both}
    sides = []
    for side, other in ((a, b), (b, a)):
        seeds = [seed for seed in side.by_seed if seed in other.by_seed or 1 in (len(a.records), len(b.records))]
        if not seeds:
            raise InputError(f"records of {a.first.task!r}: {a.first.name!r} and {b.first.name!r} have no seed in "
                             "common; run both with the same --seeds")  # fmt: skip
        accuracies = side.on(common)
        sides.append(np.stack([accuracies[seed] for seed in seeds], axis=1))
    return list(common), sides[0] - sides[1]
