"""What the protocol suite keeps of one finished piece of work: one method or baseline, on one task, with one seed.

    OUT/records/<task>/<name>-s<seed>.json

A file is written whole or not at all. Whoever continues a killed run finds what is there and does not do it again; the
digest tells whether it came from the same settings. Statistics and report read records and nothing else of a training.
"""

import json
import math
from dataclasses import MISSING, asdict, dataclass, fields
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, get_args, get_origin, get_type_hints
from urllib.parse import quote

from minipeft.errors import InputError
from minipeft.files import write_file

KINDS = ("baseline", "shared", "personal")
BASELINES = ("global_majority", "own_majority", "others_vote", "zero_shot", "few_shot", "retrieval", "probe_pooled",
             "probe_user", "probe_pooled_user")  # fmt: skip
UNANSWERED = "test examples without an answer"  # in `notes`


@dataclass(frozen=True)
class Record:
    """One (task, name, seed). A list of one value per user goes in the order of `users`; scores lie in 0 .. 1.

    users:           who has at least one scored test example; the others are counted in `notes`.
    correct:         one score per test example of each user: 0 or 1, or graded. Their means are the user's accuracy,
                     by which the run's mode ranks: as fixed_accuracy, or in mode paper as paper_accuracy.
    metrics:         other scores, one per user: macro_f1, jaccard, ...; None where one is not defined.
    pooled:          the same of all users' test examples at once, and "ece" where labels are scored.
    paper_accuracy:  accuracy under the published scoring, per user; None where that scoring cannot be applied.
    fixed_accuracy:  of the answer of the highest likelihood, whatever the mode: share right, or Jaccard; of a
                     written answer ROUGE-L.
                     None in records of before it was kept.
    num_train:       training examples of each user.
    digest:          of everything that determines the record: task, base, method, settings, seed.
    method:          the method's configuration, for people; {} for a baseline.
    trainable:       numbers trained; per user, or in all where kind is "shared".
    bytes_per_user:  what has to be stored for each user; of the one adapter where kind is "shared". What lies under it
                     (the shared adapter, the pooled probe) is not counted.
    train_flops_per_user:  counted; None where nobody counted.
    kept_bytes_per_row:  what a row of a training step keeps for the backward pass, measured; None where nobody did.
    train_seconds:   wall time of the training of all users together.
    val_loss:        validation loss after each epoch, per user; None where it was not finite. [] where none was taken.
    movement:        tensor -> {"median", "min"} over users of |w - w0| / |w0|, or of the RMS change where w0 is zero;
                     "from_zero" is 1 there.
    chosen_lr, lr_grid:    the learning rate, and the validation loss, mean over users, of each that was tried.
    notes:           what was cut, skipped or left out: reason -> how many.
    cold_start:      number of own training examples -> accuracy of each user; None for a user who has fewer.
    answered:        which of each user's test examples `correct` speaks of, by their places; None: of all.
    """

    task: str
    name: str
    kind: str
    seed: int
    digest: str
    users: list[str]
    correct: list[list[float]]
    num_train: list[int]
    metrics: dict[str, list[float | None]]
    pooled: dict[str, float]
    paper_accuracy: list[float] | None
    method: dict[str, Any]
    trainable: int
    bytes_per_user: int
    train_flops_per_user: float | None
    train_seconds: float
    peak_memory_mb: float | None
    val_loss: list[list[float | None]]
    movement: dict[str, dict[str, float]]
    chosen_lr: float | None
    lr_grid: dict[float, float]
    notes: dict[str, int]
    cold_start: dict[int, list[float | None]] | None = None
    answered: list[list[int]] | None = None
    fixed_accuracy: list[float] | None = None
    kept_bytes_per_row: float | None = None

    def __post_init__(self) -> None:
        """Raises ValueError, naming the field: of another type, not one value per user, or not a score."""
        for name, kind in get_type_hints(Record).items():
            object.__setattr__(self, name, _as(getattr(self, name), kind, name))
        if self.kind not in KINDS:
            raise ValueError(f"kind: came {self.kind!r}; needed one of {', '.join(KINDS)}")
        if len(set(self.users)) != len(self.users) or not self.users:
            raise ValueError("users: needed at least one, and each once")
        if not (self.task and self.name):
            raise ValueError("task, name: needed at least one character")
        per_user = {"correct": self.correct, "num_train": self.num_train}
        per_user |= {} if self.answered is None else {"answered": self.answered}
        for places, values in zip(self.answered or (), self.correct):
            if len({*places}) != len(places) or len(places) != len(values):
                raise ValueError("answered: needed each place once, as many as there are scores")
        scores = {f"metrics.{name}": values for name, values in self.metrics.items()}
        scores |= {f"cold_start.{k}": values for k, values in (self.cold_start or {}).items()}
        if any(not 0 <= value <= 1 for value in self.pooled.values()):
            raise ValueError("pooled: needed scores from 0 to 1")
        either = {"paper_accuracy": self.paper_accuracy, "fixed_accuracy": self.fixed_accuracy}
        scores |= {name: values for name, values in either.items() if values is not None}
        for name, values in (per_user | scores | ({"val_loss": self.val_loss} if self.val_loss else {})).items():
            if len(values) != len(self.users):
                raise ValueError(f"{name}: came {len(values)} values; needed one for each of {len(self.users)} users")
        scores |= {f"correct of {user!r}": values for user, values in zip(self.users, self.correct)}
        for name, values in scores.items():
            if not values or any(value is not None and not 0 <= value <= 1 for value in values):
                raise ValueError(f"{name}: needed scores from 0 to 1, at least one")

    @property
    def accuracy(self) -> list[float]:
        """Each user's mean score, 0 .. 1."""
        return [sum(scores) / len(scores) for scores in self.correct]


def record_path(out: Path, task: str, name: str, seed: int) -> Path:
    """Where a record lies. Any text is a safe task or name: everything but letters, digits, _ - ~ is escaped."""
    return Path(out) / "records" / file_name(task) / f"{file_name(name)}-s{seed}.json"


def save_record(out: Path, record: Record) -> Path:
    """Write a record, whole or not at all; replaces an earlier one of the same task, name and seed."""
    path = record_path(out, record.task, record.name, record.seed)
    write_file(path, (json.dumps(asdict(record), ensure_ascii=False, allow_nan=False) + "\n").encode())
    return path


def load_record(path: Path) -> Record:
    """Raises InputError, naming the file and the field, for one that is damaged or was not written by `save_record`."""
    content = read_object(path)
    known = {field.name: field for field in fields(Record)}
    odd = [f"no field {name!r}" for name, field in known.items() if field.default is MISSING and name not in content]
    odd += [f"an unknown field {name!r}" for name in content if name not in known]
    if odd:
        raise InputError(f"{path} is damaged: {odd[0]}; delete it and run again")
    try:
        return Record(**content)
    except ValueError as error:
        raise InputError(f"{path} is damaged: field {error}; delete it and run again") from None


def read_object(path: Path) -> dict[str, Any]:
    """A JSON object in a file of ours. Raises InputError if it is damaged."""
    try:
        content = json.loads(path.read_bytes())
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is damaged: not JSON ({type(error).__name__}); delete it and run again") from None
    if not isinstance(content, dict):
        raise InputError(f"{path} is damaged: needed an object, came {type(content).__name__}; delete it and run again")
    return content


def load_records(out: Path) -> list[Record]:
    """All records of a folder, by task, name and seed. Raises InputError if there is none or one is damaged."""
    paths = sorted((Path(out) / "records").glob("*/*.json"))
    if not paths:
        raise InputError(f"{out}: no records in it; needed a folder that `python -m minipeft.bench peftu` wrote")
    records = [load_record(path) for path in paths]
    for path, record in zip(paths, records):
        if path != record_path(out, record.task, record.name, record.seed):
            raise InputError(f"{path} holds the record of {record.task!r}, {record.name!r}, seed {record.seed}; a file "
                             "was moved or copied: delete it and run again")  # fmt: skip
    return sorted(records, key=lambda record: (record.task, record.name, record.seed))


def file_name(text: str) -> str:
    """A name of one file or folder, whatever the text: at most three bytes for each of its own."""
    return quote(text, safe="").replace(".", "%2E")


def _as(value: Any, kind: Any, place: str) -> Any:
    """The value as the type hint asks for it: keys of JSON become numbers. Raises ValueError, naming the place."""
    origin, inner = get_origin(kind), get_args(kind)
    if kind is Any:
        return value
    if origin is UnionType:
        return None if value is None else _as(value, next(each for each in inner if each is not NoneType), place)
    if origin is list and isinstance(value, list):
        return [_as(each, inner[0], f"{place}[{i}]") for i, each in enumerate(value)]
    if origin is dict and isinstance(value, dict):
        return {_key(key, inner[0], place): _as(each, inner[1], f"{place}.{key}") for key, each in value.items()}
    accepted = (int, float) if kind is float else origin or kind
    if not isinstance(value, accepted) or (isinstance(value, bool) and kind is not bool):
        raise ValueError(f"{place}: came {type(value).__name__}; needed {getattr(kind, '__name__', kind)}")
    if kind is float and not math.isfinite(value):
        raise ValueError(f"{place}: came {value}; needed a finite number")
    return value


def _key(key: Any, kind: type, place: str) -> Any:
    try:
        return kind(key)
    except ValueError:
        raise ValueError(f"{place}: came the key {key!r}; needed {kind.__name__}") from None
