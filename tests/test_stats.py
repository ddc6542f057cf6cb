"""Does a bootstrap interval hold the true mean as often as it says, and is "different" said wrongly as seldom?"""

from itertools import combinations, pairwise

import numpy as np
import pytest
import scipy.stats
from statsmodels.stats.multitest import multipletests
from statsmodels.stats.power import TTestPower

from minipeft.stats import (
    bootstrap_mean,
    holm,
    interval,
    minimum_detectable_difference,
    p_value,
    redrawn_means,
    worst_decile,
)


@pytest.mark.parametrize("level", [0.8, 0.95])
@pytest.mark.parametrize("spread", ["normal", "skewed"])
def test_intervals_hold_the_true_mean_as_often_as_they_say(spread, level):
    rng = np.random.default_rng(0)
    trials = 400
    values = rng.normal(1, 2, (trials, 60, 1)) if spread == "normal" else rng.exponential(1, (trials, 60, 1))
    means = redrawn_means(values, draws=2000)
    bounds = np.array([interval(means[:, trial], 60, level) for trial in range(trials)])
    held = ((bounds[:, 0] <= 1) & (1 <= bounds[:, 1])).sum()
    # Of 60 skewed values it is a little short; beyond that, three standard errors of a share of trials.
    slack = 3 * (level * (1 - level) / trials) ** 0.5
    assert level - 0.03 - slack <= held / trials <= level + slack


def simulated_users(rng, names, users, seeds, tests=20):
    """[names, users, seeds] accuracies of methods that are equally good for users who differ and examples that differ.

    Each name answers each test example by itself; a seed changes one answer in twelve.
    """
    good = rng.beta(6, 3, (users, 1))
    chance = rng.beta(4 * good, 4 * (1 - good), (users, tests))                             # of a right answer
    answers = rng.random((names, users, 1, tests)) < chance[:, None]
    again = rng.random((names, users, seeds, tests)) < chance[:, None]
    return np.where(rng.random(again.shape) < 1 / 12, again, answers).mean(-1)


@pytest.mark.parametrize("seeds", [1, 3])
@pytest.mark.parametrize("users", [20, 68])
def test_paired_intervals_hold_the_truth_between_92_and_98_percent(users, seeds):
    rng = np.random.default_rng(1)
    pairs = np.stack([simulated_users(rng, 2, users, seeds) for _ in range(1000)])        # [trials, 2, users, seeds]
    means = redrawn_means(pairs[:, 0] - pairs[:, 1], draws=1500)                          # [draws, trials]
    bounds = np.array([interval(means[:, trial], users) for trial in range(1000)])
    held = ((bounds[:, 0] <= 0) & (0 <= bounds[:, 1])).mean()
    assert 0.92 <= held <= 0.98


@pytest.mark.parametrize("seeds", [1, 3])
@pytest.mark.parametrize("users", [20, 68])
def test_under_no_difference_a_whole_comparison_says_different_in_at_most_5_percent(users, seeds):
    rng = np.random.default_rng(2)
    pairs, trials = list(combinations(range(6), 2)), 300
    values = np.stack([simulated_users(rng, 6, users, seeds) for _ in range(trials)])    # [trials, 6, users, seeds]
    means = redrawn_means(values.reshape(trials * 6, users, seeds), draws=2000).reshape(-1, trials, 6)
    wrong = 0
    for trial, accuracies in enumerate(values.mean((2, 3))):
        p = [p_value(means[:, trial, a] - means[:, trial, b], accuracies[a] - accuracies[b], users) for a, b in pairs]
        wrong += holm(p).min() < 0.05
    assert 0 < wrong / trials <= 0.05


@pytest.mark.parametrize("users", [6, 20, 68])
def test_the_interval_leaves_out_zero_exactly_when_p_is_below_5_percent(users):
    rng = np.random.default_rng(3)
    values = rng.normal(0.8 / users**0.5, 0.4, (200, users, 2))
    means = redrawn_means(values)
    both = []
    for trial in range(200):
        low, high = interval(means[:, trial], users)
        p = p_value(means[:, trial], values[trial].mean(), users)
        assert abs(p - 0.05) < 0.005 or (p < 0.05) == (low > 0 or high < 0)
        both.append(p < 0.05)
    assert 20 < sum(both) < 180


def test_redraws_agree_with_scipys():
    values = np.random.default_rng(4).exponential(1, 25)
    theirs = scipy.stats.bootstrap((values,), np.mean, n_resamples=20_000, method="percentile", rng=5)
    ours = redrawn_means(values.reshape(1, 25, 1), draws=20_000)[:, 0]
    assert ours.std() == pytest.approx(theirs.standard_error, rel=0.02)
    wider = 2 * scipy.stats.norm.cdf((25 / 24) ** 0.5 * scipy.stats.t.ppf(0.025, 24))      # the share left outside
    expected = np.quantile(theirs.bootstrap_distribution, [wider / 2, 1 - wider / 2])
    assert np.allclose(interval(ours, 25), expected, atol=0.02)
    low, high = theirs.confidence_interval
    assert interval(ours, 25)[0] < low and high < interval(ours, 25)[1]


def test_redrawn_seeds_are_the_same_for_all_users_of_a_draw():
    """Three seeds that differ and users who do not: the means vary as those of three numbers, however many users."""
    seeds = np.array([0.0, 3.0, 9.0])
    means = redrawn_means(np.tile(seeds, (1, 500, 1)), draws=5000)
    assert means.std() == pytest.approx(seeds.std() / 3**0.5, rel=0.05)


def test_columns_are_redrawn_together():
    values = np.random.default_rng(6).random((1, 30, 2))
    means = redrawn_means(np.concatenate([values, values + 0.25]), draws=50)
    assert np.allclose(means[:, 1] - means[:, 0], 0.25)


@pytest.mark.parametrize("p", [[0.01, 0.04, 0.03, 0.005], [0.5], [0.02, 0.02, 0.9, 1.0, 0.013], [0.2, 0.2, 0.2]])
def test_holm_agrees_with_statsmodels(p):
    assert np.allclose(holm(p), multipletests(p, method="holm")[1])


@pytest.mark.parametrize("users", [2, 5, 20, 300])
def test_minimum_detectable_difference_agrees_with_statsmodels(users):
    differences = np.random.default_rng(7).normal(1, 4, users)
    expected = TTestPower().solve_power(nobs=users, alpha=0.05, power=0.8) * differences.std(ddof=1)
    assert minimum_detectable_difference(differences) == pytest.approx(expected, rel=1e-4)
    assert minimum_detectable_difference(differences[:1]) is None


def test_few_users_cannot_say_much():
    """Five users who all gain the same: no spread at all, and yet chance alone does that once in sixteen."""
    for users, least in ((1, 1.0), (2, 0.5), (5, 1 / 16)):
        assert p_value(np.full(1000, 0.1), 0.1, users) == least
    assert p_value(np.zeros(1000), 0.0, 30) == 1


def test_far_tails_are_extrapolated_without_a_step():
    """Around RESOLVED draws beyond zero the counted and the extrapolated tail agree."""
    means = np.random.default_rng(8).normal(0, 1, 10_000)
    p = [p_value(means + shift, shift, 1000) for shift in (2.5, 2.7, 2.9, 3.1, 3.3)]
    assert all(0.3 < after / before < 0.7 for before, after in pairwise(p))


def test_worst_decile_is_the_mean_of_the_worst_tenth():
    assert worst_decile(np.arange(20.0)[::-1]) == 0.5
    assert worst_decile(np.array([3.0, 1.0])) == 1.0
    assert worst_decile(np.arange(21.0)) == 1.0


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


@pytest.mark.parametrize("values", [np.zeros(0), np.zeros((3, 2, 2)), np.array(1.0)])
def test_needs_one_number_per_user(values):
    with pytest.raises(ValueError, match="needs one number per user, or per user and seed, got shape"):
        bootstrap_mean(values)
