"""Linear probes: logistic regression on frozen features, what one would try before training any adapter.

    probe_pooled        one classifier for all users
    probe_user          one per user
    probe_pooled_user   one per user, on the features and what the pooled classifier says of the text

scikit-learn's, C = STRENGTH. With several labels per example one classifier per label; the answer is every label above
one half, or else the likeliest.
"""

from collections.abc import Callable

import numpy as np

from minipeft.errors import InputError
from minipeft.peftu.audit import Audit
from minipeft.peftu.metrics import Labels
from minipeft.tasks.task import Example, Task

STRENGTH = 1.0  # C, the inverse of the penalty
MAX_STEPS = 1000

Featurise = Callable[[Example], np.ndarray]  # an example -> the feature of its text [width]
Probe = Callable[[np.ndarray], np.ndarray]  # features [n, width] -> log-odds or log p of each label [n, C]


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

    def regression(target: np.ndarray) -> Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]:
        """Features -> (the classes of the target, log p of each [n, classes])."""
        if len(classes := np.unique(target)) == 1:
            return lambda features: (classes, np.zeros((len(features), 1)))
        model = LogisticRegression(C=STRENGTH, max_iter=MAX_STEPS).fit(x, target)
        return lambda features: (model.classes_, model.predict_log_proba(features))

    if task.multi_label:
        each = [regression(column) for column in y.T]

        def log_odds(features: np.ndarray) -> np.ndarray:
            columns = []
            for of_label in each:
                classes, log_p = of_label(features)
                columns.append(log_p[:, 1] - log_p[:, 0] if len(classes) == 2
                               else np.full(len(features), np.inf if classes[0] else -np.inf))  # fmt: skip
            return np.clip(np.stack(columns, 1), -FAR, FAR)

        return log_odds
    single = regression(y.argmax(1))

    def log_p(features: np.ndarray) -> np.ndarray:
        classes, found = single(features)
        scores = np.full((len(features), len(task.labels)), -FAR)
        scores[:, classes] = found
        return np.maximum(scores, -FAR)

    return log_p


FAR = 20.0  # log p and log-odds are kept within, so that they can be features


def indicator(task: Task, examples: list[Example]) -> np.ndarray:
    """[examples, C] of 0 and 1."""
    return np.array([[label in example.label for label in task.labels] for example in examples], dtype=int)


def probe_scores(task: Task, audit: Audit, featurise: Featurise) -> dict[str, dict[str, np.ndarray]]:
    """Probe -> user -> scores [test examples, C], for all three probes and every user with a test example."""
    stack = lambda examples: np.stack([featurise(example) for example in examples])  # noqa: E731
    everyone = audit.fitting("probe_pooled", task.pooled("train"))
    pooled = probe(task, everyone, stack(everyone))
    found: dict[str, dict[str, np.ndarray]] = {"probe_pooled": {}, "probe_user": {}, "probe_pooled_user": {}}
    for user in task.users:
        if not task.test[user]:
            continue
        own = audit.fitting("probe_user", task.train[user])
        x, asked = stack(own), stack(task.test[user])
        found["probe_pooled"][user] = pooled(asked)
        found["probe_user"][user] = probe(task, own, x)(asked)
        both = lambda features: np.concatenate([features, pooled(features)], 1)  # noqa: E731
        found["probe_pooled_user"][user] = probe(task, own, both(x))(both(asked))
    return found


def chosen_labels(labels: tuple[str, ...], scores: np.ndarray, multi_label: bool) -> list[Labels]:
    """What scores [n, C] answer: the highest label; with several labels each whose log-odds are above 0, or that."""
    best = scores.argmax(1)
    if not multi_label:
        return [(labels[i],) for i in best]
    return [tuple(label for i, label in enumerate(labels) if row[i] > 0) or (labels[first],)
            for row, first in zip(scores, best)]  # fmt: skip
