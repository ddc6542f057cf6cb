"""Is it Krippendorff's alpha with MASI distance, and fast enough for half a million labels?"""

import math
import random
from fractions import Fraction
from itertools import permutations

import agreement
import krippendorff
import numpy as np
import pytest
from agreement import krippendorff_alpha, masi_distance


def masi_by_definition(a, b):
    """Passonneau 2006, in exact fractions."""
    overlap = 1 if a == b else Fraction(2, 3) if a <= b or b <= a else Fraction(1, 3) if a & b else 0
    return 1 - Fraction(len(a & b), len(a | b)) * overlap


def alpha_by_definition(labellings):
    """1 - observed / expected, pair of labellings by pair of labellings, in exact fractions."""
    by_text = {}
    for text_id, labels in labellings:
        by_text.setdefault(text_id, []).append(frozenset(labels))
    by_text = {text_id: sets for text_id, sets in by_text.items() if len(sets) > 1}
    everything = [labels for sets in by_text.values() for labels in sets]
    observed = sum(
        masi_by_definition(a, b) / (len(sets) - 1) for sets in by_text.values() for a, b in permutations(sets, 2)
    )
    expected = sum(masi_by_definition(a, b) for a, b in permutations(everything, 2)) / (len(everything) - 1)
    return 1 - observed / expected


def random_labellings(seed, num_texts, num_pairs, max_labels):
    rng = random.Random(seed)
    return [(rng.randrange(num_texts), rng.sample("abcdef", rng.randint(1, max_labels))) for _ in range(num_pairs)]


def test_krippendorffs_own_example():
    """Krippendorff 2011, "Computing Krippendorff's Alpha-Reliability", example C: nominal data, missing values."""
    observers = ("123321412...", "1233224125.3", ".3332342251.", "12332441251.")
    labellings = [(i, [value]) for values in observers for i, value in enumerate(values) if value != "."]
    assert round(krippendorff_alpha(labellings), 3) == 0.743


@pytest.mark.parametrize("max_labels", [1, 2, 6], ids=["one label", "up to two labels", "any labels"])
def test_equals_the_definition(max_labels):
    for seed in range(10):
        labellings = random_labellings(seed, num_texts=9, num_pairs=30, max_labels=max_labels)
        assert krippendorff_alpha(labellings) == pytest.approx(float(alpha_by_definition(labellings)), abs=1e-12)


def test_one_label_each_is_nominal_alpha():
    rng = np.random.default_rng(0)
    table = rng.choice([0, 1, 2, np.nan], size=(7, 50), p=[0.3, 0.2, 0.1, 0.4])     # users x texts, nan: not labelled
    labellings = [(i, [str(table[user, i])]) for user, i in np.argwhere(~np.isnan(table))]
    expected = krippendorff.alpha(reliability_data=table, level_of_measurement="nominal")
    assert krippendorff_alpha(labellings) == pytest.approx(expected, abs=1e-12)


def test_masi_distance():
    def distance(a, b):
        return masi_distance(frozenset(a), frozenset(b))

    assert distance("ab", "ab") == 0
    assert distance("ab", "abcd") == pytest.approx(2 / 3)      # 1 - 1/2 * 2/3: one contains the other
    assert distance("ab", "bc") == pytest.approx(8 / 9)        # 1 - 1/3 * 1/3: they overlap
    assert distance("ab", "cd") == distance("a", "b") == 1
    for a, b in [("ab", "abcd"), ("abc", "cd"), ("a", "ab")]:
        assert distance(a, b) == distance(b, a) == pytest.approx(float(masi_by_definition(set(a), set(b))))


def test_perfect_agreement_is_one_and_one_label_for_everything_is_one():
    assert krippendorff_alpha([(i, ["a" if i < 2 else "b"]) for i in range(4) for _ in range(3)]) == 1
    assert krippendorff_alpha([(i, ["a"]) for i in range(4) for _ in range(3)]) == 1


def test_undefined_without_two_labellings_of_a_text():
    assert math.isnan(krippendorff_alpha([]))
    assert math.isnan(krippendorff_alpha([(i, ["a"]) for i in range(5)]))


def test_texts_labelled_once_do_not_count():
    labellings = random_labellings(0, num_texts=9, num_pairs=30, max_labels=3)
    once = [(f"once {i}", ["z", "a"]) for i in range(20)]
    assert krippendorff_alpha(labellings + once) == krippendorff_alpha(labellings)


def test_order_does_not_matter_to_the_last_bit():
    labellings = random_labellings(1, num_texts=40, num_pairs=400, max_labels=4)
    shuffled = [(text_id, labels[::-1]) for text_id, labels in random.Random(2).sample(labellings, len(labellings))]
    assert krippendorff_alpha(shuffled) == krippendorff_alpha(labellings)


def test_work_grows_with_distinct_label_sets_and_not_with_pairs_of_people(monkeypatch):
    calls = []
    monkeypatch.setattr(agreement, "masi_distance", lambda a, b: calls.append(1) or masi_distance(a, b))
    labellings = random_labellings(3, num_texts=100, num_pairs=20_000, max_labels=2)
    num_sets = len({frozenset(labels) for _, labels in labellings})
    krippendorff_alpha(labellings)
    assert 0 < len(calls) <= num_sets**2
