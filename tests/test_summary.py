"""Do the figures of result.json say what the records hold, and does the comparison find the order that was put in?"""

from dataclasses import replace

import numpy as np
import pytest
from scipy.stats import t
from simulated_records import NAMES, simulate
from statsmodels.stats.multitest import multipletests
from test_records import RECORD

from minipeft.errors import InputError
from minipeft.peftu.records import BASELINES
from minipeft.peftu.summary import summarise


def record(name, scores, kind="personal", seed=0, **changes):
    """A record whose users a, b, c, ... have these scores, one test example each."""
    users = [chr(ord("a") + i) for i in range(len(scores))]
    fields = dict(metrics={}, pooled={}, paper_accuracy=None, val_loss=[], cold_start=None, num_train=[4] * len(scores),
                  correct=[[score] for score in scores], users=users, task="t") | changes  # fmt: skip
    return replace(RECORD, name=name, kind=kind, seed=seed, **fields)


def pair_of(result, a, b):
    return next(pair for pair in result["comparisons"] if (pair["a"], pair["b"]) == (a, b))


def test_figures_of_a_case_by_hand():
    """Lora: per user means over seeds 1, .5, .25, 1; the second seed lists the users the other way round."""
    second = record("lora", [1, 0.5, 0, 1], seed=1, users=list("dcba"), paper_accuracy=[0.5] * 4,
                    fixed_accuracy=[1.0] * 4)
    result = summarise([
        record("lora", [1, 1, 0, 1], paper_accuracy=[0.0] * 4, fixed_accuracy=[0.5] * 4), second,
        record("shared", [1, 1, 1, 0], "shared"),
        record("own_majority", [0, 0, 1, 0.5], "baseline"),
    ])  # fmt: skip
    lora = result["tasks"]["t"]["lora"]
    assert lora["accuracy"] == 68.75 and lora["worst_decile"] == 25 and lora["paper_accuracy"] == 25
    assert lora["fixed_accuracy"] == 75 and result["tasks"]["t"]["shared"]["fixed_accuracy"] is None
    assert lora["harmed_vs_shared"] == 2 and lora["harmed_vs_own_majority"] == 1 and lora["num_users"] == 4
    assert lora["kind"] == "personal" and lora["seeds"] == [0, 1] and lora["trainable"] == RECORD.trainable
    assert result["tasks"]["t"]["shared"]["harmed_vs_shared"] is None
    pair = pair_of(result, "lora", "shared")
    assert pair["difference"] == -6.25 and (pair["wins"], pair["ties"], pair["losses"]) == (1, 1, 2)
    assert pair["ci"][0] < -6.25 < pair["ci"][1] and pair["p_holm"] >= pair["p"] > 0.05
    assert all(result["tasks"]["t"][name] is None for name in BASELINES if name != "own_majority")


def test_one_figure_reached_in_two_ways_is_one_figure():
    """Means of sevenths: 100 times their mean, and the mean of 100 times each."""
    rows = [[1.0] * right + [0.0] * (7 - right) for right in (1, 3, 5, 6, 2, 4, 7, 1)]
    result = summarise([record("lora", rows, correct=rows, fixed_accuracy=[np.mean(row) for row in rows])])
    entry = result["tasks"]["t"]["lora"]
    assert entry["accuracy"] == entry["fixed_accuracy"] == round(entry["accuracy"], 9)


def test_a_clear_order_is_found_and_stated_with_its_uncertainty():
    result = summarise(simulate(users=68))
    tasks = result["tasks"]["sarcasm"]
    assert tasks["lora"]["accuracy"] > tasks["shared"]["accuracy"] > tasks["global_majority"]["accuracy"]
    for better, worse in (("lora", "shared"), ("lora", "own_majority"), ("shared", "global_majority")):
        pair = pair_of(result, better, worse)
        assert pair["p_holm"] < 0.05 and pair["ci"][0] > 0
        assert pair["difference"] == pytest.approx(tasks[better]["accuracy"] - tasks[worse]["accuracy"])
    assert pair_of(result, "prompt", "shared")["p_holm"] > 0.05
    assert len(result["comparisons"]) == len(NAMES) * (len(NAMES) - 1) // 2
    assert 1 < result["minimum_detectable_difference"]["sarcasm"] < 15
    assert result == summarise(simulate(users=68)[::-1])


def test_users_only_one_side_has_are_left_out_of_the_pair():
    result = summarise([record("lora", [1, 1, 0]), record("others_vote", [0, 1], "baseline")])
    pair = pair_of(result, "lora", "others_vote")
    assert pair["difference"] == 50 and pair["wins"] + pair["ties"] + pair["losses"] == 2
    nobody = summarise([record("lora", [1, 1]), record("others_vote", [0, 1], "baseline", users=["x", "y"])])
    assert nobody["comparisons"] == []


def test_names_are_compared_on_the_test_examples_that_both_answer():
    """Lora is right where nobody else voted, and wrong where they did."""
    lora = record("lora", [0, 0], correct=[[1, 1, 0], [1, 0, 0]])
    vote = record("others_vote", [0, 0], "baseline", correct=[[1], [1, 0]], answered=[[2], [1, 2]])
    result = summarise([lora, replace(lora, seed=1), vote])
    pair, entries = pair_of(result, "lora", "others_vote"), result["tasks"]["t"]
    assert pair["difference"] == -75 and (pair["wins"], pair["losses"]) == (0, 2)
    assert entries["others_vote"]["accuracy"] == 75 and entries["lora"]["accuracy"] == pytest.approx(50)
    assert entries["others_vote"]["num_answered"] == 3 and entries["lora"]["num_answered"] == 6


def test_what_all_share_is_shared_out_and_added_to_what_stands_on_it():
    entries = summarise([
        record("lora", [1, 0], bytes_per_user=40), record("shared", [1, 0], "shared", bytes_per_user=100),
        record("shared_user", [1, 0], bytes_per_user=40, train_seconds=3.0, train_flops_per_user=5.0),
        record("probe_pooled", [1, 0], "baseline", bytes_per_user=20, train_seconds=1.0),
        record("probe_pooled_user", [1, 0], "baseline", bytes_per_user=30, train_seconds=2.0,
               train_flops_per_user=None),
    ])["tasks"]["t"]  # fmt: skip
    assert {name: entry["stored_per_user"] for name, entry in entries.items() if entry} == {
        "lora": 40, "shared": 50, "shared_user": 90, "probe_pooled": 10, "probe_pooled_user": 40}  # fmt: skip
    assert entries["shared"]["bytes_per_user"] == 100
    assert entries["shared_user"]["seconds_in_all"] == 3 + RECORD.train_seconds
    assert entries["shared_user"]["flops_in_all"] == 5 + RECORD.train_flops_per_user
    assert entries["shared"]["flops_in_all"] == entries["lora"]["flops_in_all"] == RECORD.train_flops_per_user
    assert entries["probe_pooled_user"]["flops_in_all"] is None
    assert entries["probe_pooled_user"]["seconds_in_all"] == 2


def test_cold_start_says_of_how_many_users():
    entries = summarise([record("lora", [1, 0, 1], cold_start={0: [0.5, 1.0, None], 2: [1.0, None, None]})])
    curve = entries["tasks"]["t"]["lora"]["cold_start"]
    assert {k: (point["accuracy"], point["users"]) for k, point in curve.items()} == {"0": (75, 2), "2": (100, 1)}
    assert curve["0"]["ci"][0] <= 75 <= curve["0"]["ci"][1]


def test_the_same_seeds_are_paired_and_one_seed_stands_against_all():
    rng = np.random.default_rng(0)
    base, luck = rng.random((30, 1)) * 0.5, rng.random((30, 3)) * 0.4          # each seed's luck, the same for both
    records = [record(name, base[:, 0] * 0 + (base + luck)[:, s] + gain, seed=s)
               for name, gain in (("lora", 0.1), ("ia3", 0.0)) for s in range(3)]  # fmt: skip
    pair = pair_of(summarise(records), "ia3", "lora")
    assert pair["ci"] == pytest.approx([-10, -10])
    result = summarise([*records[:3], record("ia3", base[:, 0])])
    assert pair_of(result, "ia3", "lora")["difference"] == pytest.approx(-100 * (luck.mean() + 0.1))
    some = summarise([*records[:3], *records[4:]])                             # ia3's seed 0 is missing
    assert pair_of(some, "ia3", "lora")["difference"] == pytest.approx(-10)


def test_tasks_are_families_of_their_own():
    both = summarise([*simulate("one"), *simulate("another")])
    assert [pair for pair in both["comparisons"] if pair["task"] == "one"] == summarise(simulate("one"))["comparisons"]


def test_luck_is_shared_by_the_whole_task_and_no_further():
    """Users are alike, so that all variance is luck: an interval is t of its freedom times the root of the luck.

    Means of three seeds 40, 50, 60 have luck 100 / 3; of names without luck 0. Of the nine pairs in which a name has
    several seeds four have 100 / 3, so the mean is 400 / 27, whoever their users are.
    """
    lucky = lambda name, **changes: [record(name, [score] * 4, seed=seed, **changes)  # noqa: E731
                                     for seed, score in enumerate((0.4, 0.5, 0.6))]
    still = lambda name, **changes: [record(name, [0.5] * 4, seed=seed, **changes) for seed in range(3)]  # noqa: E731
    one = record("own_majority", [0.5] * 4, "baseline")
    few = record("others_vote", [0.5] * 2, "baseline")
    records = [*still("lora"), *still("ia3"), *lucky("head"), one, few]
    pairs = {(pair["a"], pair["b"]): pair for pair in summarise(records)["comparisons"]}
    luck = {names: 100 / 3 if "head" in names else 0.0 for names in pairs if names != ("own_majority", "others_vote")}
    assert len(pairs) == 10 and len(luck) == 9
    mean = np.mean([*luck.values()])

    def reach(luck, freedom):
        return pytest.approx([-t.ppf(0.975, freedom) * luck**0.5, t.ppf(0.975, freedom) * luck**0.5])

    for names, own in luck.items():  # one name has all the luck: it says no more than its own three seeds
        assert pairs[names]["ci"] == reach(max(own, mean), 2), names
    assert pairs["own_majority", "others_vote"]["ci"] == [0, 0], "of one seed"
    two = {(pair["a"], pair["b"]): pair for pair in summarise([*records, *lucky("prompt", task="t")])["comparisons"]}
    assert two["head", "lora"]["ci"] == reach(100 / 3, 4)  # v = (0, 0, 100 / 3, 100 / 3): 4 * 4 / 2 - 4
    apart = summarise([*records, *lucky("prompt", task="another"), *still("lora", task="another")])["comparisons"]
    assert [pair for pair in apart if pair["task"] == "t"] == [*pairs.values()]


def test_p_values_are_adjusted_over_all_pairs_of_the_task():
    """Also over those of other users: others' vote answers fewer."""
    rng = np.random.default_rng(1)
    records = [record(name, rng.random(12) * 0.3 + gain, seed=seed)
               for name, gain in (("lora", 0.4), ("ia3", 0.3), ("head", 0.1)) for seed in range(2)]  # fmt: skip
    records.append(record("others_vote", rng.random(9) * 0.5, "baseline"))
    pairs = summarise(records)["comparisons"]
    assert len(pairs) == 6 and any(pair["p"] < pair["p_holm"] < 1 for pair in pairs)
    adjusted = multipletests([pair["p"] for pair in pairs], method="holm")[1]
    assert [pair["p_holm"] for pair in pairs] == pytest.approx(adjusted)


def test_records_that_do_not_belong_together_are_an_error():
    with pytest.raises(InputError, match="seeds 0 and 1 scored different users"):
        summarise([record("lora", [1, 1]), record("lora", [1, 1, 0], seed=1)])
    with pytest.raises(InputError, match="have no seed in common"):
        summarise([record("lora", [1, 0], seed=s) for s in (0, 1)] + [record("ia3", [1, 0], seed=s) for s in (2, 3)])


def test_no_interval_of_an_accuracy_leaves_what_an_accuracy_can_be():
    rng = np.random.default_rng(0)
    scores = [[1.0] * 20 for _ in range(18)] + [[0.0] * 10 + [1.0] * 10] * 2
    records = [record("lora", [0] * 20, seed=seed, correct=[list(rng.permutation(own)) for own in scores],
                      cold_start={4: [1.0] * 19 + [0.5]}) for seed in range(3)]  # fmt: skip
    entry = summarise(records)["tasks"]["t"]["lora"]
    for interval in (entry["ci"], entry["cold_start"]["4"]["ci"]):
        assert interval[0] < interval[1] == 100


def test_pooled_metrics_are_means_over_seeds():
    records = [record("lora", [1, 0], seed=seed, pooled={"ece": 0.1 * seed}) for seed in range(3)]
    assert summarise(records)["tasks"]["t"]["lora"]["pooled_metrics"] == {"ece": pytest.approx(0.1)}
