"""Linear probes: logistic regression on frozen features, what one would try before training any adapter.

    probe_pooled        one classifier for all users
    probe_user          one per user
    probe_pooled_user   one per user, on the features and what the pooled classifier says of the text

scikit-learn's, C = STRENGTH. With several labels per example one classifier per label; the answer is every label above
one half, or else the likeliest.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from minipeft.errors import InputError
from minipeft.peftu.audit import Audit
from minipeft.peftu.metrics import Labels
from minipeft.tasks.task import Example, Task

STRENGTH = 1.0  # C, the inverse of the penalty
MAX_STEPS = 1000

Featurise = Callable[[Example], np.ndarray]  # an example -> the feature of its text [width]


@dataclass(frozen=True)
class Probe:
    """scores: features [n, width] -> log-odds or log p of each label [n, C]. trainable: numbers that were fitted."""

    scores: Callable[[np.ndarray], np.ndarray]
    trainable: int


@dataclass
class Probed:
    """What one of the three probes came to.

    scores:    user -> scores of the test examples [n, C], for every user who has some.
    trainable: numbers fitted for a user, at most; of the pooled probe in all.
    seconds:   to fit all users, without the features.
    """

    scores: dict[str, np.ndarray] = field(default_factory=dict)
    trainable: int = 0
    seconds: float = 0.0


def probe(task: Task, fit: list[Example], x: np.ndarray) -> Probe:
    """A classifier fitted on these examples and their features x [n, width]. A label nobody has stays impossible.

    Raises:
        InputError: scikit-learn is not installed.
    """
    try:
        from sklearn.linear_model import LogisticRegression
    except ImportError:
        raise InputError("linear probes need scikit-learn: pip install 'minipeft[protocol]'") from None
    y = indicator(task, fit)  # [n, C]

    models = []

    def regression(target: np.ndarray) -> Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]:
        """Features -> (the classes of the target, log p of each [n, classes])."""
        if len(classes := np.unique(target)) == 1:
            return lambda features: (classes, np.zeros((len(features), 1)))
        model = LogisticRegression(C=STRENGTH, max_iter=MAX_STEPS).fit(x, target)
        models.append(model)
        return lambda features: (model.classes_, model.predict_log_proba(features))

    if task.multi_label:
        each = [regression(column) for column in y.T]

        def scores(features: np.ndarray) -> np.ndarray:
            """Log-odds."""
            columns = []
            for of_label in each:
                classes, log_p = of_label(features)
                columns.append(log_p[:, 1] - log_p[:, 0] if len(classes) == 2
                               else np.full(len(features), np.inf if classes[0] else -np.inf))  # fmt: skip
            return np.clip(np.stack(columns, 1), -FAR, FAR)
    else:
        single = regression(y.argmax(1))

        def scores(features: np.ndarray) -> np.ndarray:
            """log p."""
            classes, found = single(features)
            log_p = np.full((len(features), len(task.labels)), -FAR)
            log_p[:, classes] = found
            return np.maximum(log_p, -FAR)

    return Probe(scores, sum(model.coef_.size + model.intercept_.size for model in models))


FAR = 20.0  # log p and log-odds are kept within, so that they can be features


def indicator(task: Task, examples: list[Example]) -> np.ndarray:
    """[examples, C] of 0 and 1."""
    return np.array([[label in example.label for label in task.labels] for example in examples], dtype=int)


def probe_scores(task: Task, audit: Audit, featurise: Featurise) -> dict[str, Probed]:
    """All three probes by name, fitted on training examples and asked every test example."""
    stack = lambda examples: np.stack([featurise(example) for example in examples])  # noqa: E731
    found = {name: Probed() for name in ("probe_pooled", "probe_user", "probe_pooled_user")}

    def fitted(name: str, fit: list[Example], x: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
        began, into = time.perf_counter(), found[name]
        made = probe(task, fit, x)
        into.seconds += time.perf_counter() - began
        into.trainable = max(into.trainable, made.trainable)
        return made.scores

    everyone = audit.fitting("probe_pooled", task.pooled("train"))
    pooled = fitted("probe_pooled", everyone, stack(everyone))
    found["probe_pooled_user"].seconds = found["probe_pooled"].seconds  # for it stands on the pooled one
    for user in task.users:
        if not task.test[user]:
            continue
        own = audit.fitting("probe_user", task.train[user])
        x, asked = stack(own), stack(task.test[user])
        both = lambda features: np.concatenate([features, pooled(features)], 1)  # noqa: E731
        found["probe_pooled"].scores[user] = pooled(asked)
        found["probe_user"].scores[user] = fitted("probe_user", own, x)(asked)
        found["probe_pooled_user"].scores[user] = fitted("probe_pooled_user", own, both(x))(both(asked))
    return found


def chosen_labels(labels: tuple[str, ...], scores: np.ndarray, multi_label: bool) -> list[Labels]:
    """What scores [n, C] answer: the highest label; with several labels each whose log-odds are above 0, or that."""
    best = scores.argmax(1)
    if not multi_label:
        return [(labels[i],) for i in best]
    return [tuple(label for i, label in enumerate(labels) if row[i] > 0) or (labels[first],)
            for row, first in zip(scores, best)]  # fmt: skip
