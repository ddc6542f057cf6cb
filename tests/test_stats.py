"""Does a bootstrap interval hold the true mean as often as it says?"""

import numpy as np
import pytest

from minipeft.stats import bootstrap_mean


@pytest.mark.parametrize("level", [0.8, 0.95])
@pytest.mark.parametrize("spread", ["normal", "skewed"])
def test_intervals_hold_the_true_mean_as_often_as_they_say(spread, level):
    rng = np.random.default_rng(0)
    trials, held = 400, 0
    for trial in range(trials):
        values = rng.normal(1, 2, 60) if spread == "normal" else rng.exponential(1, 60)
        interval = bootstrap_mean(values, seed=trial, level=level, draws=500)
        held += interval.low <= 1 <= interval.high
    # A percentile interval of 60 values is a little short; beyond that, three standard errors of a share of trials.
    slack = 3 * (level * (1 - level) / trials) ** 0.5
    assert level - 0.03 - slack <= held / trials <= level + slack


def test_mean_and_order():
    values = np.array([0.1, 0.4, 0.4, 0.9, 0.2])
    interval = bootstrap_mean(values)
    assert interval.mean == pytest.approx(0.4) and 0.1 < interval.low < 0.4 < interval.high < 0.9
    wider = bootstrap_mean(values, level=0.99)
    assert wider.low < interval.low and interval.high < wider.high


def test_a_paired_comparison_is_tighter_than_two_intervals():
    rng = np.random.default_rng(0)
    users = rng.normal(0, 1, 100)
    one, other = users + rng.normal(0.1, 0.05, 100), users
    assert bootstrap_mean(one - other).low > 0
    assert bootstrap_mean(one).low < bootstrap_mean(other).high


def test_same_seed_same_interval_and_no_global_state():
    values = np.random.default_rng(0).random(30)
    first = bootstrap_mean(values, seed=3)
    np.random.seed(5)
    assert bootstrap_mean(values, seed=3) == first != bootstrap_mean(values, seed=4)
    assert bootstrap_mean(list(values), seed=3) == first


def test_users_who_agree_leave_no_doubt():
    for values in (np.full(20, 0.25), np.array([0.25])):
        interval = bootstrap_mean(values)
        assert interval.mean == interval.low == interval.high == 0.25


@pytest.mark.parametrize("values", [np.zeros(0), np.zeros((3, 2)), np.array(1.0)])
def test_needs_one_number_per_user(values):
    with pytest.raises(ValueError, match="needs one number per user, got shape"):
        bootstrap_mean(values)
