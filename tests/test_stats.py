"""Does a bootstrap interval hold the true mean as often as it says, and is "different" said wrongly as seldom?"""

from itertools import combinations, pairwise

import numpy as np
import pytest
import scipy.stats
from statsmodels.stats.multitest import multipletests
from statsmodels.stats.power import TTestPower

from minipeft.stats import (
    Estimate,
    bootstrap_mean,
    estimates,
    holm,
    luck_of,
    share_luck,
    worst_decile,
)


@pytest.mark.parametrize("level", [0.8, 0.95])
@pytest.mark.parametrize("spread", ["normal", "skewed"])
def test_intervals_hold_the_true_mean_as_often_as_they_say(spread, level):
    rng = np.random.default_rng(0)
    trials = 400
    values = rng.normal(1, 2, (trials, 60, 1)) if spread == "normal" else rng.exponential(1, (trials, 60, 1))
    bounds = np.array([each.interval(level) for each in estimates(values, draws=2000)])
    held = ((bounds[:, 0] <= 1) & (1 <= bounds[:, 1])).sum()
    # Of 60 skewed values it is a little short; beyond that, three standard errors of a share of trials.
    slack = 3 * (level * (1 - level) / trials) ** 0.5
    assert level - 0.03 - slack <= held / trials <= level + slack


def simulated_users(rng, names, users, seeds, luck=0.0, tests=20):
    """[names, users, seeds] accuracies of methods that are equally good for users who differ and examples that differ.

    Each name answers each test example by itself; a seed changes one answer in twelve, and moves all users of a name by
    the same: normal noise of the size `luck`.
    """
    good = rng.beta(6, 3, (users, 1))
    chance = rng.beta(4 * good, 4 * (1 - good), (users, tests))                             # of a right answer
    answers = rng.random((names, users, 1, tests)) < chance[:, None]
    again = rng.random((names, users, seeds, tests)) < chance[:, None]
    accuracies = np.where(rng.random(again.shape) < 1 / 12, again, answers).mean(-1)
    return accuracies + rng.normal(0, luck, (names, 1, seeds))


SEEDS_AND_LUCK = [(1, 0.0), (3, 0.0), (3, 0.02), (3, 0.06), (5, 0.02)]  # users' own accuracies differ by 0.17


@pytest.mark.parametrize(("seeds", "luck"), SEEDS_AND_LUCK)
@pytest.mark.parametrize("users", [20, 68, 253])
def test_paired_intervals_hold_the_truth_between_92_and_98_percent(users, seeds, luck):
    rng = np.random.default_rng(1)
    pairs = np.stack([simulated_users(rng, 2, users, seeds, luck) for _ in range(1000)])  # [trials, 2, users, seeds]
    bounds = np.array([each.interval() for each in estimates(pairs[:, 0] - pairs[:, 1], draws=1500)])
    held = ((bounds[:, 0] <= 0) & (0 <= bounds[:, 1])).mean()
    assert 0.92 <= held <= 0.98


@pytest.mark.parametrize(("seeds", "luck"), [(1, 0.0), (3, 0.0), (3, 0.06)])
@pytest.mark.parametrize("users", [20, 68])
def test_under_no_difference_a_whole_comparison_says_different_in_at_most_5_percent(users, seeds, luck):
    rng = np.random.default_rng(2)
    (a, b), trials = np.array(list(combinations(range(6), 2))).T, 300
    wrong = 0
    for _ in range(trials):
        values = simulated_users(rng, 6, users, seeds, luck)                              # [names, users, seeds]
        own = [luck_of(each) for each in values]
        p = [each.p_value() for each in share_luck(estimates(values[a] - values[b], draws=1000), own)]
        wrong += holm(p).min() < 0.05
    assert 0 < wrong / trials <= 0.05


def uneven_family(rng, users, seeds, luck, trained=4, baselines=3):
    """Names of which the first alone has luck; then others of as many seeds, then some of one. Their pairs' estimates,
    as a task's comparisons make them, and which of the pairs are the first name's."""
    values = simulated_users(rng, trained + baselines, users, seeds)
    values[trained:] = values[trained:, :, :1]
    values[0] += rng.normal(0, luck, seeds)
    a, b = np.array(list(combinations(range(trained + baselines), 2))).T
    of_seeds = a < trained
    family = [*estimates((values[a] - values[b])[of_seeds], draws=300),
              *estimates((values[a] - values[b])[~of_seeds, :, :1], draws=300)]  # fmt: skip
    shared = share_luck(family, [luck_of(each) for each in values[:trained]])
    return shared, np.concatenate([a[of_seeds], a[~of_seeds]]) == 0


@pytest.mark.parametrize("luck", [0.06, 0.17])
@pytest.mark.parametrize("users", [20, 68])
def test_where_one_side_alone_has_luck_intervals_hold_and_false_differences_are_few(users, luck):
    """As a shared adapter has, one training for all, and a baseline, which no seed changes, has not."""
    rng, trials, held, wrong = np.random.default_rng(10), 200, [], 0
    for _ in range(trials):
        family, lucky = uneven_family(rng, users, 3, luck)
        bounds = np.array([each.interval() for each in family])
        held.append(((bounds[:, 0] <= 0) & (0 <= bounds[:, 1]))[lucky].mean())
        wrong += holm([each.p_value() for each in family]).min() < 0.05
    slack = 0.01  # a trial's intervals have the one name's luck in common
    assert 0.92 - slack <= np.mean(held) <= 0.98 + slack
    assert wrong / trials <= 0.05


def test_of_one_seed_luck_cannot_be_known():
    """What the report has to say of a run of one seed: such intervals are too short."""
    rng = np.random.default_rng(11)
    family, lucky = zip(*(uneven_family(rng, 68, 1, 0.06) for _ in range(100)))
    bounds = np.array([[each.interval() for each in one] for one in family])
    held = (bounds[..., 0] <= 0) & (0 <= bounds[..., 1])
    assert held[:, lucky[0]].mean() < 0.8 and held[:, ~lucky[0]].mean() > 0.92


def test_intervals_are_as_narrow_as_the_report_says_where_they_are_too_narrow():
    """Of two seeds, whose luck two values cannot tell; and where one user in seven gains and all others tie."""
    rng, held = np.random.default_rng(12), lambda bounds, truth: np.mean(
        (bounds[:, 0] <= truth) & (truth <= bounds[:, 1]))  # fmt: skip
    pairs = np.stack([simulated_users(rng, 2, 68, 2, 0.06) for _ in range(1000)])
    seldom = (rng.random((1000, 20, 1)) < 1 / 7) * rng.uniform(0.05, 0.15, (1000, 20, 1))
    two, few = (np.array([each.interval() for each in estimates(values, draws=1500)])
                for values in (pairs[:, 0] - pairs[:, 1], seldom))  # fmt: skip
    assert 0.87 <= held(two, 0) <= 0.93, "90 %"
    assert 0.86 <= held(few, 0.1 / 7) <= 0.92, "89 %"


def test_of_two_seeds_false_differences_are_as_many_as_the_report_says():
    rng, trials, wrong = np.random.default_rng(12), 300, 0
    for _ in range(trials):
        family, _ = uneven_family(rng, 68, 2, 0.06)
        wrong += holm([each.p_value() for each in family]).min() < 0.05
    slack = 2 * (0.08 * 0.92 / trials) ** 0.5
    assert 0.05 < wrong / trials <= 0.08 + slack


@pytest.mark.parametrize("users", [6, 20, 68])
def test_the_interval_leaves_out_zero_exactly_when_p_is_below_5_percent(users):
    rng = np.random.default_rng(3)
    values = rng.normal(1.2 / users**0.5, 0.6, (200, users, 4)) + rng.normal(0, 0.01, (200, 1, 4))
    both = []
    for each in estimates(values):
        low, high = each.interval()
        p = each.p_value()
        assert abs(p - 0.05) < 0.005 or (p < 0.05) == (low > 0 or high < 0)
        both.append(p < 0.05)
    assert 20 < sum(both) < 180


def test_redraws_agree_with_scipys():
    values = np.random.default_rng(4).exponential(1, 25)
    theirs = scipy.stats.bootstrap((values,), np.mean, n_resamples=20_000, method="percentile", rng=5)
    (ours,) = estimates(values.reshape(1, 25, 1), draws=20_000)
    assert ours.redrawn.std() == pytest.approx(theirs.standard_error, rel=0.02)
    wider = 2 * scipy.stats.norm.cdf((25 / 24) ** 0.5 * scipy.stats.t.ppf(0.025, 24))      # the share left outside
    expected = np.quantile(theirs.bootstrap_distribution, [wider / 2, 1 - wider / 2])
    assert np.allclose(ours.interval(), expected, atol=0.02)
    low, high = theirs.confidence_interval
    assert ours.interval()[0] < low and high < ours.interval()[1]


def test_luck_of_all_users_alike_is_as_sure_as_so_many_seeds_are():
    """Three seeds that differ and users who do not: three numbers, however many users, as Student would have them."""
    seeds = np.array([0.0, 3.0, 9.0])
    (found,) = estimates(np.tile(seeds, (1, 500, 1)))
    expected = scipy.stats.t.interval(0.95, 2, seeds.mean(), scipy.stats.sem(seeds))
    assert np.allclose(found.interval(), expected, rtol=0.1)
    assert found.p_value() == pytest.approx(scipy.stats.ttest_1samp(seeds, 0).pvalue, rel=0.1)


def test_columns_are_redrawn_together():
    values = np.random.default_rng(6).random((1, 30, 2))
    one, other = estimates(np.concatenate([values, values + 0.25]), draws=50)
    assert np.allclose(other.redrawn - one.redrawn, 0.25)


@pytest.mark.parametrize("p", [[0.01, 0.04, 0.03, 0.005], [0.5], [0.02, 0.02, 0.9, 1.0, 0.013], [0.2, 0.2, 0.2]])
def test_holm_agrees_with_statsmodels(p):
    assert np.allclose(holm(p), multipletests(p, method="holm")[1])


@pytest.mark.parametrize("users", [2, 5, 20, 300])
def test_minimum_detectable_difference_agrees_with_statsmodels(users):
    differences = np.random.default_rng(7).normal(1, 4, (1, users, 1))
    expected = TTestPower().solve_power(nobs=users, alpha=0.05, power=0.8) * differences.std(ddof=1)
    assert estimates(differences)[0].minimum_detectable_difference() == pytest.approx(expected, rel=1e-4)
    assert estimates(differences[:, :1])[0].minimum_detectable_difference() is None


def test_luck_makes_a_difference_harder_to_detect():
    differences = np.random.default_rng(7).normal(1, 0.1, (60, 1)) + np.array([0.0, 1.0, 5.0])
    expected = TTestPower().solve_power(nobs=3, alpha=0.05, power=0.8) * np.std([0, 1, 5], ddof=1)
    assert estimates(differences[None])[0].minimum_detectable_difference() == pytest.approx(expected, rel=0.05)


def test_a_pair_of_less_luck_than_the_family_takes_the_familys():
    rng = np.random.default_rng(9)
    values = rng.normal(0, 6, (3, 30, 3)) + np.array([[[0, 0, 0]], [[0, 3, 6]], [[0, 30, 60]]])
    family = [*estimates(values), *estimates(values[:1, :, :1])]
    shared = share_luck(family, [1.0, 1.0, 1.0, 1.0])
    mean = np.mean([each.of_luck for each in family[:3]])
    assert [each.of_luck for each in shared] == pytest.approx([mean, mean, family[2].of_luck, 0])
    assert [each.luck_freedom for each in shared] == [6, 6, 6, 0]
    assert share_luck(family[3:], [1.0, 1.0]) == family[3:]


@pytest.mark.parametrize(("of_names", "freedom"), [
    ([5.0, 0.0, 0.0, 0.0], 2), ([5.0, 5.0, 0.0, 0.0], 4), ([3.0, 1.0, 0.0, 0.0], 4 * 16 / 10 - 4), ([7.0] * 4, 6),
    ([0.0] * 4, 6), ([5.0], 2),
])  # fmt: skip
def test_as_much_is_known_of_luck_as_names_have_it(of_names, freedom):
    family = estimates(np.random.default_rng(12).normal(0, 1, (3, 20, 3)))
    assert [each.luck_freedom for each in share_luck(family, of_names)] == pytest.approx([freedom] * 3)


def test_luck_is_the_variance_of_the_mean_over_seeds():
    assert luck_of(np.array([[1.0, 5.0], [3.0, 7.0]])) == pytest.approx(np.var([2, 6], ddof=1) / 2)


def test_few_users_cannot_say_much():
    """Five users who all gain the same: no spread at all, and yet chance alone does that once in sixteen."""
    for users, least in ((1, 1.0), (2, 0.5), (5, 1 / 16)):
        assert estimates(np.full((1, users, 1), 0.1))[0].p_value() == least
    assert estimates(np.zeros((1, 30, 1)))[0].p_value() == 1


def test_far_tails_are_extrapolated_without_a_step():
    """Around RESOLVED draws beyond zero the counted and the extrapolated tail agree."""
    means = np.random.default_rng(8).normal(0, 1, 10_000)
    for sign in (1, -1):
        p = [Estimate(sign * shift, np.sort(sign * (means + shift)), 1000, 1.0).p_value()
             for shift in (2.5, 2.7, 2.9, 3.1, 3.3)]  # fmt: skip
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
