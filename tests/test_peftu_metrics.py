"""Are the metrics what scikit-learn computes, and what a hand computes where it has none?"""

import math

import numpy as np
import pytest

from minipeft.peftu.metrics import (
    Scored,
    any_hit,
    calibration_error,
    exact_set,
    f1_scores,
    label_metrics,
    rouge_l,
    scores,
    token_f1,
)

LABELS = ("a", "b", "c", "d")


def random_sets(seed, n=40):
    rng = np.random.default_rng(seed)
    draw = lambda: [tuple(label for label in LABELS[:3] if rng.random() < 0.5) or ("a",) for _ in range(n)]  # noqa: E731
    return draw(), draw()


def indicator(sets):
    return np.array([[label in each for label in LABELS] for each in sets], dtype=int)


@pytest.mark.parametrize("seed", range(3))
def test_multi_label_metrics_are_scikit_learns(seed):
    sklearn = pytest.importorskip("sklearn.metrics")
    answers, truths = random_sets(seed)
    said, true = indicator(answers), indicator(truths)
    found = label_metrics(answers, truths, multi_label=True)
    present = [0, 1, 2]  # "d" occurs nowhere: our macro leaves it out
    assert found["micro_f1"] == pytest.approx(sklearn.f1_score(true, said, average="micro"))
    assert found["macro_f1"] == pytest.approx(sklearn.f1_score(true, said, average="macro", labels=present))
    assert found["jaccard"] == pytest.approx(sklearn.jaccard_score(true, said, average="samples"))
    assert found["exact"] == pytest.approx(sklearn.accuracy_score(true, said))


def test_single_label_f1_is_scikit_learns():
    sklearn = pytest.importorskip("sklearn.metrics")
    rng = np.random.default_rng(0)
    said, true = rng.choice(LABELS, 50), rng.choice(LABELS[:3], 50)
    found = label_metrics([(x,) for x in said], [(x,) for x in true], multi_label=False)
    assert found == {"macro_f1": pytest.approx(sklearn.f1_score(true, said, average="macro"))}


def test_by_hand():
    answers, truths = [("a", "b"), ("a",), ()], [("b", "c"), ("a",), ("c",)]
    assert scores(answers, truths) == [1 / 3, 1.0, 0.0]
    assert any_hit(answers, truths) == pytest.approx(2 / 3)
    assert exact_set(answers, truths) == pytest.approx(1 / 3)
    # a: 1 right, 1 wrong; b: 1 right; c: 2 missed
    assert f1_scores(answers, truths) == (pytest.approx(4 / 7), pytest.approx((2 / 3 + 1 + 0) / 3))
    assert any_hit([LABELS] * 3, truths) == 1  # the published measure's weakness


def test_calibration_error_by_hand():
    """Bin (0.8, 0.9]: 0.9 and 0.9, one right. Bin (0.5, 0.6]: 0.6, right."""
    error = calibration_error(np.array([0.9, 0.9, 0.6]), np.array([True, False, True]))
    assert error == pytest.approx((abs(1.8 - 1) + abs(0.6 - 1)) / 3)
    assert calibration_error(np.array([1.0, 1.0]), np.array([True, True])) == 0


def test_a_calibrated_model_has_a_small_error():
    rng = np.random.default_rng(0)
    confidence = rng.uniform(0.5, 1, 20_000)
    assert calibration_error(confidence, rng.random(20_000) < confidence) < 0.02


def test_calibration_of_scored_answers_and_of_independent_labels():
    """Two users, the second's first example left out. Both answers are 80 % sure of "a"; that is right of ann alone."""
    log_p, places = np.log([[0.8, 0.2]]), {"ann": [0], "bob": [1]}
    one_of_two = Scored({"ann": log_p, "bob": np.concatenate([-log_p, log_p])}, [("a",), ("b",)], False)
    assert one_of_two.calibration_error(places, [("a",), ("b",)]) == pytest.approx(abs(1.6 - 1) / 2)
    assert one_of_two.calibration_error(places, [("a",), ("a", "b")]) == pytest.approx(abs(1.6 - 1) / 2)

    odds = np.log([[0.8 / 0.2, 0.3 / 0.7]])  # "a" is there, 0.8; "b" is not, 0.7
    each = Scored({"ann": odds}, [("a",), ("b",)], True)
    assert each.calibration_error({"ann": [0]}, [("a",)]) == pytest.approx((0.2 + 0.3) / 2)
    assert each.calibration_error({"ann": [0]}, [("a", "b")]) == pytest.approx((0.2 + 0.7) / 2)


def test_texts():
    assert token_f1("The cat, sat!", "a cat sat down") == pytest.approx(2 * 2 / 5)
    assert token_f1("", "") == 1 and token_f1("", "word") == 0
    pytest.importorskip("rouge_score")
    assert rouge_l("the cats sat", "the cat was sat") == pytest.approx(2 * 1 * (3 / 4) / (1 + 3 / 4))
    assert math.isclose(rouge_l("same words", "same words"), 1)
