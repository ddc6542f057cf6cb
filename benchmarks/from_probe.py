"""Do personal adapters get past the pooled + user probe if they start where it ends? On an encoder, single labels.

    python benchmarks/from_probe.py --task DIR --model FOLDER [--methods head,lora]
        [--top-layers 2] [--epochs 3] [--lrs 1e-3,3e-3,1e-2]

The probe is two logistic regressions, a user's on top of everybody's (peftu/probes.py). Nearly all of it is a head:

    f = h / |h|                  p = log softmax(G f + g), everybody's           z = U f + V p + u, the user's
    head: W = (U + V G) / mean |h|,   b = u + V (g - mean logsumexp(G f + g))    what the two means leave out is lost

Heads start there, alone and beside a LoRA in the top layers; and at zero, as the protocol has them, for comparison.
The best of the learning rates for all by validation, as there. Printed: accuracy, and the differences from the probe
and from those that start at zero, with their paired intervals over users.
"""

import argparse
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from scipy.special import logsumexp
from sklearn.linear_model import LogisticRegression

from minipeft.engine import Engine, label_scores
from minipeft.machine import versions
from minipeft.methods.head import Head
from minipeft.methods.lora import LoRA
from minipeft.methods.method import Method
from minipeft.models.classifier import Base, Classifier
from minipeft.models.loading import load_model
from minipeft.models.trunk import Trunk, above_frozen, keep_top
from minipeft.peftu.asking import Asking
from minipeft.peftu.audit import Audit
from minipeft.peftu.command import PASSES, rates
from minipeft.peftu.features import means
from minipeft.peftu.probes import FAR, MAX_STEPS, STRENGTH, probe_scores
from minipeft.peftu.protocol import FIXED
from minipeft.peftu.tidy import load_tidied
from minipeft.running import for_base, open_base
from minipeft.schedule import Job
from minipeft.stats import Interval, bootstrap_mean
from minipeft.tasks.task import Task


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--task", type=Path, required=True)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--methods", default="head,lora", help="head (seconds each), lora (minutes), or both")
    parser.add_argument("--top-layers", type=int, default=2)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--lrs", type=rates, default=(1e-3, 3e-3, 1e-2))
    args = parser.parse_args()
    known = {"head": Head(), "lora": LoRA()}
    if unknown := {*args.methods.split(",")} - {*known}:
        parser.error(f"--methods {args.methods}: {', '.join(sorted(unknown))} is none of {', '.join(known)}")
    task = load_tidied(args.task).task
    if task.multi_label:
        parser.error(f"{args.task}: a multi-label task; the heads here have one class each")
    base = open_base(load_model(args.model), len(task.labels))
    if not isinstance(base, Classifier):
        parser.error(f"{args.model}: needed an encoder, such as all-MiniLM-L6-v2")
    audit = Audit(task)
    asking = Asking(base, task, FIXED, audit)
    questions = asking.questions()
    users = [user for user in task.users if task.test[user]]
    prompt_of = {example.text: question.prompt for split, own in questions.items() for user in own
                 for example, question in zip(task.split(split)[user], own[user])}  # fmt: skip
    keep_top(base, args.top_layers)
    base = Trunk(base, prompt_of.values())
    mean = {prompt: h.numpy() for prompt, h in means(base, prompt_of.values()).items()}
    feature = {text: mean[prompt] / np.linalg.norm(mean[prompt]) for text, prompt in prompt_of.items()}
    trained_on = dict.fromkeys(question.prompt for own in questions["train"].values() for question in own)
    size = float(np.mean([np.linalg.norm(mean[prompt]) for prompt in trained_on]))
    probed = probe_scores(task, audit, lambda example: feature[example.text])
    found = {name: accuracies(task, users, each.scores) for name, each in probed.items()}
    heads = heads_like_the_probe(task, audit, feature, size)
    chosen = {}
    for name in args.methods.split(","):
        method = for_base(known[name], base)
        own_starts = {user: method.initial_row(base, 0, user) for user in users}
        at_probe = {user: with_head(method, base, row, heads[user]) for user, row in own_starts.items()}
        for where, starts in (("from zero", own_starts), ("from the probe", at_probe)):
            jobs = [Job(user, *(audit.fitting(name, questions[split][user]) for split in ("train", "val")),
                        FIXED.config(method, rate, 0, args.epochs), f"{rate:g} {user}", starts[user])
                    for rate in args.lrs for user in users]  # fmt: skip
            adapters = Engine(above_frozen(base, method), asking.prompts.labels, PASSES).train(jobs)
            some = {rate: {user: adapters[f"{rate:g} {user}"] for user in users} for rate in args.lrs}
            loss = {rate: np.mean([best_loss(each.metrics) for each in own.values()]) for rate, own in some.items()}
            best = chosen[f"{name} {where}"] = min(loss, key=loss.get)
            if (name, where) == ("head", "from the probe"):
                as_it_starts = {user: replace(some[best][user], row=starts[user]) for user in users}
                found["head as it starts"] = answered(task, base, asking, as_it_starts, questions["test"])
            found[f"{name} {where}"] = answered(task, base, asking, some[best], questions["test"])
    print(f"{task.name}: {len(users)} users, at most {args.epochs} epochs, LoRA in the top {args.top_layers} layers; "
          "accuracy, then differences and their paired 95 % intervals:")  # fmt: skip
    print(f"{'':42}{'against pooled + user':>26}{'against from zero':>26}")
    told = {}
    for name, own in found.items():
        zero = found.get(name.replace("from the probe", "from zero"), own)
        gains = [bootstrap_mean((own - rival)[:, None]) for rival in (found["probe_pooled_user"], zero)]
        told[name] = {"accuracy": own.mean(), "learning_rate": chosen.get(name),
                      "against_probe_pooled_user": shown(gains[0]), "against_from_zero": shown(gains[1])}  # fmt: skip
        print(f"  {name:28}{told[name]['learning_rate'] or '':>6}{own.mean():>6.1f}", *(
            f"{gain.mean:+9.1f} [{gain.low:+.1f}, {gain.high:+.1f}]".rjust(25) for gain in gains))  # fmt: skip
    print(json.dumps({"task": task.name, "users": len(users), "epochs": args.epochs, "rates": args.lrs,
                      "top_layers": args.top_layers, "versions": versions("cpu", ("numpy", "scipy", "scikit-learn")),
                      "found": told}))  # fmt: skip


def shown(gain: Interval) -> list[float]:
    return [gain.mean, gain.low, gain.high]


def heads_like_the_probe(
    task: Task, audit: Audit, feature: dict[str, np.ndarray], size: float
) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """User -> (W [C, width], b [C]) of the head that says nearly what pooled + user says. size: mean |h|."""
    C, everyone = len(task.labels), audit.fitting("probes", task.pooled("train"))
    G, g = logits_of(np.stack([feature[e.text] for e in everyone]), numbers(task, everyone), C)
    found = {}
    for user, own in task.train.items():
        f = np.stack([feature[e.text] for e in own])
        p = np.maximum(f @ G.T + g - logsumexp(f @ G.T + g, axis=1, keepdims=True), -FAR)
        UV, u = logits_of(np.concatenate([f, p], 1), numbers(task, own), C)
        U, V = UV[:, : f.shape[1]], UV[:, f.shape[1] :]
        W, b = (U + V @ G) / size, u + V @ (g - logsumexp(f @ G.T + g, axis=1).mean())
        found[user] = torch.tensor(W, dtype=torch.float32), torch.tensor(b, dtype=torch.float32)
    return found


def logits_of(x: np.ndarray, y: np.ndarray, C: int) -> tuple[np.ndarray, np.ndarray]:
    """(W [C, width], b [C]) of scikit-learn's classifier; of a class that nobody has, b = -FAR."""
    W, b = np.zeros((C, x.shape[1])), np.full(C, -FAR)
    if len(known := np.unique(y)) == 1:
        b[known] = 0
        return W, b
    model = LogisticRegression(C=STRENGTH, max_iter=MAX_STEPS).fit(x, y)
    if len(known) == 2:  # one row, of the second class against the first
        W[known], b[known] = np.stack([-model.coef_[0], model.coef_[0]]) / 2, np.array([-1, 1]) * model.intercept_ / 2
    else:
        W[known], b[known] = model.coef_, model.intercept_
    return W, b


def with_head(method: Method, base: Base, row: torch.Tensor, head: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """This row, with this head."""
    tensors = method.tensors(row, base)
    return method.row(tensors | dict(zip(("head.weight", "head.bias"), head)), base)


def numbers(task: Task, examples: list) -> np.ndarray:
    return np.array([task.labels.index(example.label[0]) for example in examples])


def best_loss(metrics: dict) -> float:
    return metrics["val_loss"][metrics["best_epoch"] - 1]


def answered(task: Task, base: Base, asking: Asking, adapters: dict, test: dict) -> np.ndarray:
    asked = {user: test[user] for user in adapters}
    return accuracies(task, list(adapters), label_scores(base, asking.prompts.labels, adapters, asked, PASSES))


def accuracies(task: Task, users: list[str], scores: dict[str, np.ndarray]) -> np.ndarray:
    """Percent of each user's test examples whose likeliest label is right."""
    return np.array([100 * np.mean(scores[user].argmax(1) == numbers(task, task.test[user])) for user in users])


if __name__ == "__main__":
    main()
