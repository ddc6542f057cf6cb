"""Are the synthetic users what they promise: known, noisy, disagreeing, and learnable to the stated share?"""

from dataclasses import replace
from itertools import product

import numpy as np
import pytest

from minipeft.errors import InputError
from minipeft.tasks import synthetic
from minipeft.tasks.synthetic import (
    GRAMMAR,
    SyntheticConfig,
    ceiling_personal,
    ceiling_shared,
    figures,
    fit_logistic,
    make_synthetic,
)
from minipeft.tasks.task import SPLITS, Example, load_task, macro_accuracy, nominal_alpha, save_task

SMALL = SyntheticConfig(users=6, texts=150, max_examples=60, test_examples=20)


@pytest.fixture(scope="module")
def default():
    return make_synthetic(SyntheticConfig())


def share_wrong(task, truth):
    """Share of all drawn labels that differ from the user's label before noise."""
    clean = truth.clean_labels()
    wrong = [task.labels.index(example.label[0]) != clean[truth.user_rows[example.user], truth.text_rows[example.id]]
             for split in SPLITS for example in task.pooled(split)]
    return np.mean(wrong)


# ---------------------------------------------------------------------------------------------- the tuned defaults


def test_default_figures(default):
    task, truth = default
    everyone, active = figures(task, truth), figures(task, truth, at_least=100)
    assert everyone["users"] == 128 and truth.features.shape[1] >= 8
    assert 70 <= everyone["train_per_user"] <= 110 and 10_000 <= everyone["train_examples"] <= 13_000
    assert 0.2 <= everyone["alpha"] <= 0.4
    assert everyone["own_majority"] <= 65
    assert everyone["gap"] >= 14 and active["gap"] >= 14
    assert 0.70 <= everyone["logistic_share"] <= 0.95          # can be learned, but is not given away
    assert 0.85 <= active["logistic_share"] <= 0.99 and active["users"] >= 40
    assert share_wrong(task, truth) >= 0.10


def test_default_is_not_one_lucky_seed():
    for seed in (1, 2):
        task, truth = make_synthetic(SyntheticConfig(seed=seed))
        found = figures(task, truth)
        assert 0.2 <= found["alpha"] <= 0.4 and found["gap"] >= 14 and found["logistic_share"] >= 0.70


def test_common_opinion_weighs_every_feature_alike(default):
    _, truth = default
    assert np.isclose(np.linalg.norm(truth.common), 1)
    assert truth.common.min() > 0 and truth.common.max() / truth.common.min() <= 1.5


def test_no_two_users_think_alike_and_scores_have_unit_spread(default):
    _, truth = default
    directions = truth.weights / np.linalg.norm(truth.weights, axis=1, keepdims=True)     # [users, features]
    assert np.triu(directions @ directions.T, 1).max() < 1 - 1e-9
    assert np.allclose((truth.features @ truth.weights.T).std(0), 1)


def test_favourite_feature_decides_19_of_20_clean_labels(default):
    _, truth = default
    favourite = np.abs(truth.weights).argmax(1)                                            # [users]
    alone = truth.features[:, favourite].T * np.take_along_axis(truth.weights, favourite[:, None], 1) > 0
    assert 0.95 <= np.mean(alone == truth.clean_labels()) < 0.99
    assert set(favourite) == set(range(8))


def test_example_counts_are_skewed(default):
    task, _ = default
    counts = np.array([len(task.train[user]) + len(task.val[user]) for user in task.users])
    assert counts.min() < 20 and counts.max() > 200
    assert np.median(counts) < counts.mean()


# ---------------------------------------------------------------------------------------------- users and splits


def test_same_seed_same_task_and_another_seed_another():
    assert make_synthetic(SMALL)[0] == make_synthetic(SMALL)[0]
    assert make_synthetic(SMALL)[0] != make_synthetic(replace(SMALL, seed=1))[0]


def test_adding_users_changes_nobody():
    few, few_truth = make_synthetic(SMALL)
    many, many_truth = make_synthetic(replace(SMALL, users=11))
    assert many.subset(few.users) == few
    assert np.array_equal(many_truth.weights[:6], few_truth.weights)
    assert np.array_equal(many_truth.bias[:6], few_truth.bias)


def test_noise_changes_only_labels():
    quiet, loud = make_synthetic(replace(SMALL, noise=0.0)), make_synthetic(replace(SMALL, noise=0.3))
    for split in SPLITS:
        pairs = list(zip(quiet[0].pooled(split), loud[0].pooled(split)))
        assert all((a.user, a.id, a.text) == (b.user, b.id, b.text) for a, b in pairs)
        assert 0.1 < np.mean([a.label != b.label for a, b in pairs]) < 0.5
    assert share_wrong(*quiet) == 0


@pytest.mark.parametrize("labels", [("no", "yes"), ("bad", "fair", "good", "great")], ids=["2 labels", "4 labels"])
def test_noise_is_the_share_of_really_wrong_labels(labels):
    task, truth = make_synthetic(SyntheticConfig(noise=0.25, labels=labels))
    num_labels = sum(len(task.pooled(split)) for split in SPLITS)
    assert abs(share_wrong(task, truth) - 0.25) < 4 * np.sqrt(0.25 * 0.75 / num_labels)
    assert {example.label[0] for example in task.pooled("train")} == set(labels)


def test_wrong_labels_are_any_other_label():
    task, truth = make_synthetic(SyntheticConfig(users=30, noise=0.4, labels=("bad", "fair", "good")))
    clean = truth.clean_labels()
    shifts = np.array([(task.labels.index(example.label[0])
                        - clean[truth.user_rows[example.user], truth.text_rows[example.id]]) % 3
                       for example in task.pooled("train")])
    counts = np.bincount(shifts, minlength=3)
    assert abs(counts[1] - counts[2]) < 4 * np.sqrt(counts[1] + counts[2])


def test_splits_are_disjoint_and_80_10_10():
    task, _ = make_synthetic(replace(SMALL, min_examples=4, test_examples=1))
    for user in task.users:
        ids = [example.id for split in SPLITS for example in task.split(split)[user]]
        assert len(set(ids)) == len(ids)
        num_train, num_val, num_test = (len(task.split(split)[user]) for split in SPLITS)
        total = num_train + num_val + num_test
        assert num_train >= 1 and num_val == max(2, round(total / 10)) and num_test == max(1, round(total / 10))


def test_larger_test_sets_come_on_top():
    small, large = make_synthetic(replace(SMALL, test_examples=1))[0], make_synthetic(SMALL)[0]
    assert all(len(examples) == 20 for examples in large.test.values())
    for user in small.users:
        assert [e.id for e in small.train[user]] == [e.id for e in large.train[user]]
        assert [e.id for e in small.val[user]] == [e.id for e in large.val[user]]


def test_task_can_be_saved_and_loaded(tmp_path):
    task, _ = make_synthetic(SMALL)
    save_task(task, tmp_path)
    assert load_task(tmp_path) == task


# ---------------------------------------------------------------------------------------------- texts


@pytest.mark.parametrize("changes", [{}, {"features": 12, "max_words": 29, "synonyms": 3},
                                     {"features": 5, "synonyms": 1, "max_words": 20, "correlation": 0.0}],
                         ids=["default", "long", "few features"])
def test_text_says_exactly_its_features(changes):
    config = replace(SyntheticConfig(users=8), **changes)
    task, truth = make_synthetic(config)
    texts = {example.id: example.text for split in SPLITS for example in task.pooled(split)}
    assert len(set(texts.values())) == len(texts)
    for id_, text in texts.items():
        words = text.lower().replace(",", "").rstrip(".").split()
        found = [[sign for sign, said in ((1, good), (-1, bad)) for word in said[:config.synonyms] if word in words]
                 for _, good, bad in GRAMMAR[:config.features]]
        assert found == [[sign] for sign in truth.features[truth.text_rows[id_]]]
        assert len(words) <= config.max_words
    assert max(len(text.split()) for text in texts.values()) == config.max_words


def test_typical_texts_have_10_to_14_words(default):
    assert all(10 <= len(example.text.split()) <= 14 for example in default[0].pooled("train"))


def test_no_word_means_two_things():
    words = [word for _, good, bad in GRAMMAR for word in good + bad]
    fillers = [word.lower() for phrase in synthetic.FILLERS for word in phrase.split()]
    assert len(set(words)) == len(words) and not set(words) & set(fillers)
    assert len(set(synthetic.FILLERS)) == len(synthetic.FILLERS)


def test_features_are_balanced_and_correlate_as_asked():
    for correlation in (0.0, 0.35):
        _, truth = make_synthetic(SyntheticConfig(users=1, texts=4000, correlation=correlation))
        pairs = np.corrcoef(truth.features.T)[np.triu_indices(8, 1)]
        assert abs(truth.features.mean()) < 0.05
        assert abs(pairs.mean() - correlation) < 0.03


# ---------------------------------------------------------------------------------------------- ceilings


@pytest.mark.parametrize("labels, copies", [(("no", "yes"), (8, 2)), (("bad", "fair", "good"), (8, 1, 1))])
def test_ceilings_are_the_best_of_all_predictors(labels, copies):
    """Test sets in which every (user, text) comes 10 times, its labels in exactly their proportions at noise 0.2."""
    config = SyntheticConfig(users=5, features=3, labels=labels, texts=7, min_examples=4, max_examples=4,
                             test_examples=3, max_words=12, noise=0.2)
    task, truth = make_synthetic(config)
    clean = truth.clean_labels()                                                           # [users, texts]
    C = len(labels)
    test = {user: [Example(user, id_, "x", (labels[(clean[row, text_row] + shift) % C],))
                   for id_, text_row in truth.text_rows.items() for shift, times in enumerate(copies)
                   for _ in range(times)]
            for user, row in truth.user_rows.items()}
    task = replace(task, test=test)

    def spread(answers):                                                    # one label per text -> per test example
        return [(labels[label],) for label in answers for _ in range(10)]
    shared = max(macro_accuracy(task, dict.fromkeys(task.users, spread(answers)))
                 for answers in product(range(C), repeat=config.texts))
    assert ceiling_shared(task, truth) == pytest.approx(shared)
    assert ceiling_personal(task, truth) == pytest.approx(80.0)
    for user in task.users:                                                 # no predictor beats 80 % for any one user
        alone = task.subset([user])
        best = max(macro_accuracy(alone, {user: spread(answers)}) for answers in product(range(C), repeat=config.texts))
        assert best == pytest.approx(80.0)
        assert ceiling_personal(alone, truth) == pytest.approx(80.0)
    assert ceiling_shared(task, truth) < 80.0


def test_personal_ceiling_is_one_minus_noise_in_expectation(default):
    task, truth = default
    num_test = len(task.pooled("test"))
    assert abs(ceiling_personal(task, truth) - 89) < 400 * np.sqrt(0.11 * 0.89 / num_test)


def test_without_disagreement_the_ceilings_meet_and_the_share_is_undefined():
    task, truth = make_synthetic(replace(SMALL, disagreement=0.0, bias=0.0, noise=0.1))
    assert ceiling_shared(task, truth) == ceiling_personal(task, truth)
    assert np.isnan(figures(task, truth)["logistic_share"])


def test_shared_ceiling_asks_the_whole_population_also_of_a_subset(default):
    task, truth = default
    alone = [ceiling_shared(task.subset([user]), truth) for user in task.users]
    assert np.mean(alone) == pytest.approx(ceiling_shared(task, truth))


def test_more_disagreement_less_agreement():
    alphas = [nominal_alpha(make_synthetic(SyntheticConfig(users=40, disagreement=d))[0]) for d in (0.0, 1.5, 3.2)]
    assert alphas[0] > alphas[1] > alphas[2] > 0


def test_alpha_agrees_with_the_krippendorff_package(default):
    krippendorff = pytest.importorskip("krippendorff")
    task, truth = default
    counts = np.zeros((len(truth.text_rows), 2), dtype=int)                                # [texts, C]
    for split in SPLITS:
        for example in task.pooled(split):
            counts[truth.text_rows[example.id], task.labels.index(example.label[0])] += 1
    exact = krippendorff.alpha(value_counts=counts[counts.sum(1) > 0], level_of_measurement="nominal")
    assert nominal_alpha(task) == pytest.approx(exact, abs=1e-12)


# ---------------------------------------------------------------------------------------------- logistic regression


def test_logistic_recovers_weights_from_many_examples():
    rng = np.random.default_rng(0)
    true = rng.normal(size=(3, 6))
    true -= true.mean(0)                                                    # softmax cannot see a common shift
    x = rng.choice([-1.0, 1.0], (10_000, 5))
    scores = x @ true[:, 1:].T + true[:, 0] + rng.gumbel(size=(10_000, 3))  # the argmax follows softmax
    theta = fit_logistic(x, scores.argmax(1), 3, l2=1e-3)
    assert np.abs(theta - theta.mean(0) - true).max() < 0.15


def test_logistic_finds_the_minimum(default):
    """At theta the loss is flat in every direction, measured by central differences."""
    task, truth = default
    for user in task.users[:3]:
        x = truth.features[truth.rows_of(task.train[user])]
        label = np.array([task.labels.index(example.label[0]) for example in task.train[user]])

        def loss(theta, x=x, label=label):
            scores = x @ theta[:, 1:].T + theta[:, 0]
            nll = np.logaddexp.reduce(scores, axis=1) - scores[np.arange(len(label)), label]
            return nll.sum() + synthetic.L2 / 2 * (theta ** 2).sum()
        theta = fit_logistic(x, label, 2, synthetic.L2)
        for index in np.ndindex(theta.shape):
            nudge = np.zeros_like(theta)
            nudge[index] = 1e-4
            assert abs(loss(theta + nudge) - loss(theta - nudge)) / 2e-4 < 1e-4


def test_logistic_comes_near_the_personal_ceiling_with_many_examples():
    """Near, not at: labels jump at the threshold where the regression rises smoothly, so it spends weight on noise."""
    config = SyntheticConfig(users=6, min_examples=1500, max_examples=1500, test_examples=400)
    found = figures(*make_synthetic(config))
    assert 0.9 < found["logistic_share"] <= 1


# ---------------------------------------------------------------------------------------------- wrong knobs


WRONG = {
    "users": {"users": 0}, "features": {"features": 13}, "disagreement": {"disagreement": -1.0},
    "bias": {"bias": -0.1}, "noise": {"noise": 0.5}, "labels": {"labels": ("yes", "yes")},
    "min_examples": {"min_examples": 400}, "test_examples": {"test_examples": 0}, "texts": {"texts": 200},
    "correlation": {"correlation": 1.0}, "synonyms": {"synonyms": 4}, "max_words": {"max_words": 10},
}


@pytest.mark.parametrize("name, changes", WRONG.items(), ids=WRONG.keys())
def test_knob_out_of_range_is_named(name, changes):
    with pytest.raises(InputError, match=rf"^make_synthetic: {name} is .*; needed "):
        make_synthetic(replace(SyntheticConfig(), **changes))


def test_grammar_too_small_for_the_pool_is_an_error():
    with pytest.raises(InputError, match="distinct texts"):
        make_synthetic(replace(SMALL, features=2, synonyms=1, max_words=4))


def test_nobody_with_so_many_examples_is_an_error():
    with pytest.raises(InputError, match="100000 training examples"):
        figures(*make_synthetic(SMALL), at_least=100_000)
