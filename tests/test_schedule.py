"""Is every user's plan their own: shuffles, learning rate, best epoch and stop, whoever else is there?"""

import math

import pytest
import torch

from minipeft.labels import LabelSet, Question
from minipeft.schedule import Job, Run, TrainConfig, choose
from minipeft_kernels.segments import TILE

LABELS = LabelSet([[5], [6, 7]])


def make_run(user="ann", num_train=7, num_tokens=3, slot=0, bank=0, **settings):
    train = [Question((10 + i,) * num_tokens, i % 2) for i in range(num_train)]
    return Run(Job(user, train, train[:2], TrainConfig(**settings)), bank, slot)


def joined(batches):
    return [example for batch in batches for example in batch]


def epochs_of(run):
    """The first tokens of every minibatch of every epoch, to the end of the plan."""
    epochs = []
    for _ in range(run.job.config.epochs):
        epochs.append([])
        while not run.wants_evaluation:
            epochs[-1].append([read.tokens[0] for read in run.minibatch(LABELS).reads])
            run.advance()
        run.evaluated(1.0, torch.zeros(1))
    return epochs


@pytest.mark.parametrize("batch_size", [1, 3, 7, 99])
def test_an_epoch_is_every_example_once_in_minibatches(batch_size):
    run = make_run(batch_size=batch_size, epochs=3, patience=9)
    epochs = epochs_of(run)
    for epoch in epochs:
        assert sorted(joined(epoch)) == list(range(10, 17))
        assert [len(batch) for batch in epoch[:-1]] == [batch_size] * (len(epoch) - 1)
        assert len(epoch) == run.steps_per_epoch == math.ceil(7 / batch_size)
    assert run.step == run.total_steps == 3 * run.steps_per_epoch and run.done
    assert epochs[0] != epochs[1] or batch_size == 99  # another order each epoch
    assert joined(epochs[0]) != joined(epochs[1]) != joined(epochs[2])


def test_shuffles_are_a_function_of_seed_user_and_epoch():
    settings = dict(batch_size=2, epochs=3, patience=9)
    first = epochs_of(make_run(**settings))
    assert epochs_of(make_run(slot=5, bank=2, learning_rate=0.5, **settings)) == first
    assert epochs_of(make_run(user="bob", **settings)) != first
    assert epochs_of(make_run(seed=1, **settings)) != first
    whole = epochs_of(make_run(batch_size=7, epochs=3, patience=9))
    assert [joined(epoch) for epoch in whole] == [joined(epoch) for epoch in first]


def test_asking_for_the_minibatch_again_gives_the_same_until_the_step_is_taken():
    run = make_run(batch_size=2, slot=3, bank=1)
    part = run.minibatch(LABELS)
    assert (part.bank, part.slot) == (1, 3) and run.minibatch(LABELS) == part
    run.advance()
    assert run.minibatch(LABELS) != part


@pytest.mark.parametrize("num_train, batch_size, epochs, warmup", [
    (40, 4, 5, 0.1), (40, 4, 5, 0.0), (40, 4, 5, 0.5), (40, 4, 5, 0.99), (1, 1, 1, 0.1), (1, 1, 2, 0.9), (3, 1, 1, 0.6),
])  # fmt: skip
def test_the_learning_rate_rises_to_its_peak_and_falls_and_is_never_zero(num_train, batch_size, epochs, warmup):
    run = make_run(num_train=num_train, batch_size=batch_size, epochs=epochs, warmup=warmup, learning_rate=0.02)
    N = run.total_steps
    rates = []
    for run.step in range(N):
        rates.append(run.learning_rate)
    assert all(rate > 0 for rate in rates) and max(rates) == pytest.approx(0.02)
    peak = rates.index(max(rates))
    assert peak == min(math.ceil(warmup * N), N - 1)
    rises, falls = (torch.tensor(part).diff() for part in (rates[: peak + 1], rates[peak:]))
    assert (rises > 0).all() and (falls < 0).all()
    for steps in (rises, falls):  # straight lines
        torch.testing.assert_close(steps, steps[:1].expand(len(steps)), rtol=1e-3, atol=1e-8)
    assert rates[0] == pytest.approx(0.02 / (peak + 1)) and rates[-1] == pytest.approx(0.02 / (N - peak))


def evaluate(losses, **settings):
    run = make_run(epochs=len(losses), **settings)
    for i, loss in enumerate(losses):
        run.evaluated(loss, torch.tensor([float(i + 1)]))
        if run.done:
            break
    return run


@pytest.mark.parametrize("losses, patience, best, epochs", [
    ([3.0, 2.0, 1.0], 1, 3, 3),
    ([1.0, 2.0, 3.0, 0.1], 2, 1, 3),
    ([1.0, 2.0, 0.5, 3.0, 4.0, 0.1], 2, 3, 5),
    ([1.0, 0.99995, 0.99995, 0.1], 2, 1, 3),  # not better by the least that counts
    ([1.0, 0.99985, 2.0, 0.99985], 2, 2, 4),
    ([math.nan, 2.0, 3.0], 2, 2, 3),  # anything finite is better than no number
    ([2.0, math.nan, math.nan, 1.0], 2, 1, 3),
    ([math.nan, math.nan, math.nan], 2, 1, 3),
    ([math.inf, math.inf, 5.0], 3, 3, 3),
])  # fmt: skip
def test_the_best_epoch_is_kept_and_patience_ends_a_run(losses, patience, best, epochs):
    run = evaluate(losses, patience=patience)
    assert run.best_epoch == best and run.best.tolist() == [float(best)]
    assert run.epoch == epochs == len(run.history) and run.done
    assert run.stopped_early == (epochs < len(losses))


def test_the_best_row_is_a_copy():
    run, row = make_run(), torch.ones(4)
    run.evaluated(1.0, row)
    row.zero_()
    assert run.best.tolist() == [1.0] * 4


def test_choose_fills_the_budget_with_those_who_have_most_left():
    # 5 examples of 10 tokens are 50 rows and one or two label tokens more: 64 rows with filler
    plans = [("a", 1, 0, 3), ("b", 0, 1, 9), ("c", 0, 0, 6), ("d", 2, 0, 1)]  # user, slot, bank, epochs
    runs = [make_run(user, 20, 10, slot, bank, batch_size=5, epochs=epochs) for user, slot, bank, epochs in plans]
    assert {run.minibatch(LABELS).num_rows for run in runs} == {64}
    pick = lambda budget: [run.job.user for run in choose(runs, LABELS, budget)]  # noqa: E731
    assert pick(1) == pick(64) == pick(127) == ["b"]  # at least one, whatever its size
    assert pick(128) == ["c", "b"]  # sorted by bank and slot
    assert pick(192) == ["c", "a", "b"]
    assert pick(10_000) == ["c", "a", "d", "b"]
    runs[1].step = 36  # b has now fewer steps left than all others
    assert pick(64) == ["c"] and pick(192) == ["c", "a", "d"]


def test_choose_passes_over_who_does_not_fit():
    small, large = make_run("small", 4, 2, 0, epochs=1, batch_size=4), make_run("large", 40, 30, 1, epochs=9)
    medium = make_run("medium", 8, 10, 2, epochs=2, batch_size=8)
    sizes = {run.job.user: run.minibatch(LABELS).num_rows for run in (small, large, medium)}
    assert sizes["large"] > sizes["medium"] > sizes["small"] == TILE
    budget = sizes["large"] + TILE
    assert [run.job.user for run in choose([small, large, medium], LABELS, budget)] == ["small", "large"]
