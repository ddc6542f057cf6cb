"""Synthetic users with known truth: little hotel reviews, and people who weigh what is said in them their own way.

A text expresses binary features f in {-1, +1} (price, noise, staff...), one word each. User u labels it by

    score[u] = w[u] @ f + bias[u],    w[u] = scaled(common + disagreement * own[u])

where common and own[u] are vectors of length 1 and `scaled` gives the score a standard deviation of 1 over the texts.
The label is the interval that the score falls in: C - 1 thresholds at the normal quantiles 1/C, 2/C..., lowest label
first. Then, with probability `noise`, the label is replaced by one of the C - 1 *other* labels, all equally likely: so
a share `noise` of all labels is really wrong, and nobody can predict more than 1 - noise of them.

common: all features, with comparable weight and the same sign, 0.8 to 1.2 before scaling: what most people like.
own[u]: a taste that falls by a factor, the user's own within FOCUS, from the user's favourite feature to the next, in
an order of the user's own; each in the common direction with probability SAME_DIRECTION, else against it. At the
defaults the favourite alone decides 19 of 20 clean labels: tastes spread over many features cannot be learned from
100 noisy labels while users also agree as much (alpha above 0.2), as they do on the real tasks.

Because the truth is known, so is what any method can reach: `ceiling_shared` for one model for all users,
`ceiling_personal` for one per user, and `logistic_on_features`, which is told the features and must learn the weights
from the user's own few examples, as an honest mark in between.

`python -m minipeft.tasks.synthetic` prints these figures for the default configuration.
"""

from dataclasses import dataclass
from statistics import NormalDist

import numpy as np

from minipeft.errors import InputError
from minipeft.randomness import generator
from minipeft.tasks.task import Example, Task, macro_accuracy, nominal_alpha, own_majority

FOCUS = (0.1, 0.4)
SAME_DIRECTION = 0.9
SKEW = 0.5         # of the number of examples; 1 would be evenly spread in the logarithm
L2 = 6.0           # of logistic_on_features; 2 to 20 give the default's figures within half a point

# noun, words for f = +1, words for f = -1. The first `features` rows are used; no word appears twice.
GRAMMAR = (
    ("hotel", ("cheap", "affordable", "inexpensive"), ("expensive", "pricey", "costly")),
    ("rooms", ("quiet", "calm", "silent"), ("noisy", "loud", "rackety")),
    ("staff", ("kind", "friendly", "polite"), ("rude", "unfriendly", "surly")),
    ("hotel", ("modern", "new", "renovated"), ("old", "dated", "shabby")),
    ("rooms", ("big", "spacious", "large"), ("small", "tiny", "cramped")),
    ("staff", ("quick", "prompt", "fast"), ("slow", "sluggish", "late")),
    ("hotel", ("central", "downtown", "nearby"), ("remote", "distant", "outlying")),
    ("rooms", ("bright", "sunny", "airy"), ("dark", "gloomy", "dim")),
    ("breakfast", ("tasty", "delicious", "fresh"), ("bland", "stale", "tasteless")),
    ("breakfast", ("hot", "warm", "steaming"), ("cold", "lukewarm", "chilly")),
    ("beds", ("soft", "comfortable", "cosy"), ("hard", "lumpy", "saggy")),
    ("beds", ("wide", "roomy", "generous"), ("narrow", "short", "skimpy")),
)
# Phrases that say nothing any user cares about, of 1 to 4 words; each at most once in a text.
FILLERS = (
    "midweek", "two nights", "in May", "for work", "by train", "first visit here",
)


@dataclass(frozen=True)
class SyntheticConfig:
    """What the users and texts are like. The defaults are tuned for two labels; the test file has what they promise."""

    users: int = 128
    features: int = 8                            # 2 to 12; every text expresses them all
    disagreement: float = 4.0                    # length of a user's own taste; the common opinion has length 1
    bias: float = 0.15                           # standard deviation over users; scores have 1
    noise: float = 0.11                          # share of labels replaced by another label
    labels: tuple[str, ...] = ("no", "yes")      # from the lowest score to the highest
    min_examples: int = 10                       # per user, train + val + test in 80 : 10 : 10
    max_examples: int = 240
    test_examples: int = 40                      # at least so many test examples per user, drawn on top
    texts: int = 2000                            # in the pool that all users draw from
    correlation: float = 0.40                    # between two features over texts: good hotels are good in many ways
    synonyms: int = 1                            # words for each value of a feature, 1 to 3
    max_words: int = 14                          # lengths are spread evenly from no filler to this
    seed: int = 0


@dataclass(frozen=True)
class Truth:
    """What the users really think: score[u, text] = weights[u] @ features[text] + bias[u].

    Shapes: features [texts, features] of -1 and +1, common [features], weights [users, features], bias [users],
    thresholds [C - 1]. `text_rows` and `user_rows` give the row of a text id and of a user.
    """

    features: np.ndarray
    text_rows: dict[str, int]
    common: np.ndarray
    weights: np.ndarray
    bias: np.ndarray
    user_rows: dict[str, int]
    thresholds: np.ndarray
    noise: float

    def clean_labels(self) -> np.ndarray:
        """[users, texts] int: index of the label that each user gives to each text before noise."""
        scores = self.weights @ self.features.T + self.bias[:, None]     # [users, texts]
        return np.searchsorted(self.thresholds, scores, side="right")

    def rows_of(self, examples: list[Example]) -> list[int]:
        """Row in `features` of each example's text."""
        return [self.text_rows[example.id] for example in examples]


# ------------------------------------------------------------------------------------------------ making the task


def make_synthetic(config: SyntheticConfig) -> tuple[Task, Truth]:
    """The task and its truth, the same on every call; a user is a function of (seed, user), not of how many there are.

    A user labels n distinct texts of the pool, n = min * (max / min) ** (uniform ** SKEW): half of the users have fewer
    than 100, some only ten, and a few more than 200. Validation is 10 % of n and at
    least 2, training what the test's 10 % leave.

    Raises:
        InputError: a knob outside its range, or more distinct texts than the grammar has at this length.
    """
    _check(config)
    ids = [f"t{index:05d}" for index in range(config.texts)]
    texts, features = _make_texts(config)
    common = generator(config.seed, "", "common opinion").uniform(0.8, 1.2, config.features)
    common /= np.linalg.norm(common)
    users = [f"user{index:05d}" for index in range(config.users)]
    thresholds = np.array([NormalDist().inv_cdf(k / len(config.labels)) for k in range(1, len(config.labels))])
    draws = [_User(config, user, features, common) for user in users]
    truth = Truth(
        features, {id_: row for row, id_ in enumerate(ids)},
        common, np.stack([draw.weights for draw in draws]), np.array([draw.bias for draw in draws]),
        {user: row for row, user in enumerate(users)}, thresholds, config.noise,
    )

    splits = {"train": {}, "val": {}, "test": {}}
    for user, draw, clean in zip(users, draws, truth.clean_labels()):
        label = (clean[draw.text_rows] + draw.label_shift) % len(config.labels)            # [examples]
        examples = [Example(user, ids[row], texts[row], (config.labels[index],))
                    for row, index in zip(draw.text_rows, label)]
        bounds = np.cumsum([0, draw.num_train, draw.num_val, draw.num_test])
        for split, start, end in zip(splits, bounds, bounds[1:]):
            splits[split][user] = examples[start:end]
    instruction = f"How would this guest rate the hotel? Answer with one of: {', '.join(config.labels)}."
    return Task("synthetic", instruction, config.labels, False, **splits), truth


class _User:
    """One user's weights, bias, texts and noise, all drawn from the generator of (seed, user), in this order."""

    def __init__(self, config: SyntheticConfig, user: str, features: np.ndarray, common: np.ndarray):
        rng = generator(config.seed, user, "synthetic task")
        order = rng.permutation(config.features)
        signs = np.where(rng.random(config.features) < SAME_DIRECTION, 1.0, -1.0)
        own = signs * rng.uniform(*FOCUS) ** order                                         # [features]
        weights = common + config.disagreement * own / np.linalg.norm(own)
        self.weights = weights / (features @ weights).std()
        self.bias = config.bias * rng.standard_normal()

        spread = config.max_examples / config.min_examples
        num_examples = round(config.min_examples * spread ** rng.random() ** SKEW)
        num_held_out = max(1, round(0.1 * num_examples))
        self.num_val = max(2, num_held_out)
        self.num_train = num_examples - self.num_val - num_held_out
        self.num_test = max(num_held_out, config.test_examples)
        total = self.num_train + self.num_val + self.num_test
        self.text_rows = rng.permutation(config.texts)[:total]
        wrong = rng.random(total) < config.noise
        self.label_shift = wrong * rng.integers(1, len(config.labels), total)              # 0 where the label is right


def _make_texts(config: SyntheticConfig) -> tuple[list[str], np.ndarray]:
    """The pool: distinct texts, and their features [texts, features] in {-1, +1}.

    Each text has a quality q ~ Beta(a, a) and each of its features is +1 with probability q; two features then
    correlate by 1 / (2 a + 1) over the texts.
    """
    rng = generator(config.seed, "", "texts")
    rows: dict[str, np.ndarray] = {}
    for _ in range(50 * config.texts):
        if len(rows) == config.texts:
            return list(rows), np.array(list(rows.values()), dtype=float)
        a = (1 / config.correlation - 1) / 2 if config.correlation else None
        quality = rng.beta(a, a) if a else 0.5
        signs = np.where(rng.random(config.features) < quality, 1, -1)
        rows.setdefault(_write(signs, config, rng), signs)
    raise InputError(f"make_synthetic: only {len(rows)} distinct texts found; texts={config.texts} was asked. "
                     "Raise max_words, synonyms or features, or lower texts")


def _write(signs: np.ndarray, config: SyntheticConfig, rng: np.random.Generator) -> str:
    """One review that says exactly these features, in random words and order, with random filler."""
    phrases: dict[str, list[str]] = {}
    for row in rng.permutation(config.features):
        noun, good, bad = GRAMMAR[row]
        words = good if signs[row] > 0 else bad
        phrases.setdefault(noun, []).append(words[rng.integers(config.synonyms)])
    parts = [" ".join([*words, noun]) for noun, words in phrases.items()]
    left = rng.integers(config.max_words - _num_words(parts) + 1)
    for index in rng.permutation(len(FILLERS)):
        if _num_words([FILLERS[index]]) <= left:
            parts.append(FILLERS[index])
            left -= _num_words([FILLERS[index]])
    return " ".join(parts[index] for index in rng.permutation(len(parts)))


def _num_words(parts) -> int:
    return sum(len(part.split()) for part in parts)


def _check(config: SyntheticConfig) -> None:
    C = len(config.labels)
    bare = config.features + len({noun for noun, _, _ in GRAMMAR[:config.features]})
    longest = bare + _num_words(FILLERS)
    for name, ok, needed in (
        ("users", config.users >= 1, "at least 1"),
        ("features", 2 <= config.features <= len(GRAMMAR), f"2 to {len(GRAMMAR)}"),
        ("disagreement", config.disagreement >= 0, "0 or more"),
        ("bias", config.bias >= 0, "0 or more"),
        ("labels", C >= 2 and len(set(config.labels)) == C and all(config.labels), "2 or more different names"),
        ("noise", 0 <= config.noise < (C - 1) / C, f"0 to below {(C - 1) / C:.3f}, where {C} labels are pure noise"),
        ("min_examples", 4 <= config.min_examples <= config.max_examples, "4 to max_examples"),
        ("test_examples", config.test_examples >= 1, "1 or more"),
        ("texts", config.texts >= config.max_examples + config.test_examples, "max_examples + test_examples or more"),
        ("correlation", 0 <= config.correlation < 1, "0 to below 1"),
        ("synonyms", 1 <= config.synonyms <= 3, "1 to 3"),
        ("max_words", bare <= config.max_words <= longest, f"{bare} to {longest} for {config.features} features"),
    ):
        if not ok:
            raise InputError(f"make_synthetic: {name} is {getattr(config, name)!r}; needed {needed}")


# ------------------------------------------------------------------------------------------------ what can be reached


def ceiling_personal(task: Task, truth: Truth) -> float:
    """Macro accuracy in percent, on the test labels as drawn, of answering each user's label before noise.

    The best personalised predictor there is: that label has probability 1 - noise and every other less. Its
    expectation is 100 * (1 - noise); the drawn noise differs a little. A model passes it only by luck.
    """
    return macro_accuracy(task, _answers(task, truth, truth.clean_labels()))


def ceiling_shared(task: Task, truth: Truth) -> float:
    """Macro accuracy in percent, on the test labels as drawn, of the best model that is not told who is asking.

    For every text it answers argmax over labels of sum over users of P(user gives label), users weighing the same.
    Why nothing shared expects more: users draw texts alike, so given a text every user is equally likely, and a
    model that sees only the text expects the mean over users of P(label) for its answer, which the argmax makes
    largest, text by text. It holds in expectation over the draw of texts and noise; on one drawn test set another
    shared model may by luck score a little more. The population is all users of `truth`, also when `task` is a subset.
    """
    clean = truth.clean_labels()                                         # [users, texts]
    C = len(task.labels)
    # P(label) is 1 - noise for the clean label and noise / (C - 1) for others: the sum is largest where votes are.
    votes = np.stack([(clean == label).sum(0) for label in range(C)])    # [C, texts]
    return macro_accuracy(task, _answers(task, truth, np.broadcast_to(votes.argmax(0), clean.shape)))


def logistic_on_features(task: Task, truth: Truth) -> float:
    """Macro accuracy in percent of one logistic regression per user on the true features and that user's training set.

    It is told what a language model must find in the words, and like it has only the user's own examples.
    """
    answers = np.zeros((len(truth.user_rows), len(truth.features)), dtype=int)             # [users, texts]
    for user, examples in task.train.items():
        label = np.array([task.labels.index(example.label[0]) for example in examples])
        theta = fit_logistic(truth.features[truth.rows_of(examples)], label, len(task.labels), L2)
        answers[truth.user_rows[user]] = (truth.features @ theta[:, 1:].T + theta[:, 0]).argmax(1)
    return macro_accuracy(task, _answers(task, truth, answers))


def fit_logistic(x: np.ndarray, label: np.ndarray, C: int, l2: float, num_steps: int = 300) -> np.ndarray:
    """theta minimising sum of -log softmax(theta @ [1, x])[label] + l2 / 2 * |theta|^2, theta in [C, 1 + features].

    Bohning 1992, "Multinomial logistic regression algorithm": the Hessian never exceeds X'X / 2 + l2, so Newton steps
    with that fixed matrix fall monotonically, with no step size to choose.

    Args:
        x:      [examples, features].
        label:  [examples] int, 0 to C - 1.
    """
    x = np.column_stack([np.ones(len(x)), x])                            # [examples, 1 + features]
    target = np.eye(C)[label]                                            # [examples, C]
    step = np.linalg.inv(x.T @ x / 2 + l2 * np.eye(x.shape[1]))          # [1 + features, 1 + features]
    theta = np.zeros((C, x.shape[1]))
    for _ in range(num_steps):
        scores = x @ theta.T                                             # [examples, C]
        probability = np.exp(scores - scores.max(1, keepdims=True))
        probability /= probability.sum(1, keepdims=True)
        theta -= ((probability - target).T @ x + l2 * theta) @ step
    return theta


def figures(task: Task, truth: Truth, at_least: int = 1) -> dict[str, float]:
    """Everything that is known of a synthetic task, over the users with so many training examples; alpha over all.

    Accuracies are macro, in percent; `logistic_share` is how far logistic_on_features gets from the shared ceiling (0)
    to the personal one (1), nan where they are equal.
    """
    some = task.with_training(at_least)
    if not some.users:
        raise InputError(f"figures: no user has {at_least} training examples; needed at least one such user")
    personal, shared, logistic = (f(some, truth) for f in (ceiling_personal, ceiling_shared, logistic_on_features))
    num_train, gap = len(some.pooled("train")), personal - shared
    return {
        "users": len(some.users), "train_examples": num_train, "train_per_user": num_train / len(some.users),
        "test_examples": len(some.pooled("test")), "alpha": nominal_alpha(task), "own_majority": own_majority(some),
        "ceiling_shared": shared, "logistic_on_features": logistic, "ceiling_personal": personal,
        "gap": gap, "logistic_share": (logistic - shared) / gap if gap else float("nan"),
    }


def _answers(task: Task, truth: Truth, labels: np.ndarray) -> dict[str, list[tuple[str, ...]]]:
    """From labels [users, texts] the predictions that macro_accuracy takes, for the task's test examples."""
    return {user: [(task.labels[labels[truth.user_rows[user], row]],) for row in truth.rows_of(examples)]
            for user, examples in task.test.items()}


def main() -> None:
    """Prints the figures of the default configuration, for all users and for those with 100 training examples."""
    task, truth = make_synthetic(SyntheticConfig())
    everyone, active = figures(task, truth), figures(task, truth, at_least=100)
    print(f"{'figure':>22} {'all users':>10} {'>= 100 train':>13}")
    for name in everyone:
        print(f"{name:>22} {everyone[name]:10.2f} {active[name]:13.2f}")
    for example in task.pooled("train")[:3]:
        print(f"{example.label[0]:>5}  {example.text}")


if __name__ == "__main__":
    main()
