"""Plausible records of a whole run, without a run: users who differ, methods whose true gain is known."""

import numpy as np

from minipeft.peftu.records import Record

# name -> (kind, true gain over the shared adapter in score, gain differs over users by, numbers trained per user)
NAMES = {
    "lora": ("personal", 0.08, 0.06, 24_576),
    "houlsby": ("personal", 0.07, 0.06, 99_456),
    "ia3": ("personal", 0.04, 0.05, 4_608),
    "prompt": ("personal", 0.0, 0.03, 7_680),
    "head": ("personal", 0.05, 0.08, 770),
    "shared": ("shared", 0.0, 0.0, 24_576),
    "global_majority": ("baseline", -0.15, 0.15, 0),
    "own_majority": ("baseline", -0.06, 0.08, 1),
    "others_vote": ("baseline", -0.1, 0.1, 0),
    "retrieval": ("baseline", -0.03, 0.05, 0),
    "probe_pooled": ("baseline", -0.04, 0.05, 0),
    "probe_user": ("baseline", 0.02, 0.05, 770),
    "probe_pooled_user": ("baseline", 0.06, 0.05, 772),
}


def simulate(task="sarcasm", users=20, seeds=3, tests=20, names=NAMES, multi_label=False, ids="user{:03d}", start=0):
    """One record of each name and seed; baselines have one seed. Methods meet the same users and the same examples."""
    rng = np.random.default_rng([start, users, len(task)])
    ids = [ids.format(i) for i in range(users)]
    skill = rng.beta(14, 6, (users, 1))
    hard = rng.normal(0, 0.25, (users, tests))
    num_train = (8 * rng.lognormal(2.2, 0.8, users)).astype(int) + 4
    records = []
    for name, (kind, gain, spread, trainable) in names.items():
        chance = skill + gain + rng.normal(0, spread, (users, 1)) + hard
        draws = rng.random((users, tests))
        for seed in range(1 if kind == "baseline" else seeds):
            again = np.where(rng.random((users, tests)) < 0.08, rng.random((users, tests)), draws)
            correct = (again < chance).astype(float)
            if multi_label:
                correct = correct * rng.choice([1.0, 0.5], correct.shape)
            scored = slice(0, users - 3) if name == "others_vote" else slice(None)
            mean, trained = correct.mean(1), kind != "baseline"
            metrics, pooled = {"macro_f1": mean * 0.9}, {"macro_f1": mean.mean() * 0.9, "ece": 0.3 * (1 - mean.mean())}
            if multi_label:
                metrics = {"any_hit": np.minimum(1, mean * 1.2), "jaccard": mean, "micro_f1": mean, "exact": mean * 0.6}
                pooled = {key: values.mean() for key, values in metrics.items()}
            epochs = np.arange(1, 9)
            loss = 0.35 + 0.5 * np.exp(-epochs * (0.5 if gain else 0.1)) + rng.normal(0, 0.02, (users, 8))
            records.append(Record(
                task=task, name=name, kind=kind, seed=seed, digest="0" * 32, users=ids[scored],
                correct=correct[scored].tolist(), num_train=num_train[scored].tolist(),
                metrics={key: values[scored].tolist() for key, values in metrics.items()},
                pooled={key: float(value) for key, value in pooled.items()},
                paper_accuracy=(0.9 * mean)[scored].tolist(), method={"name": name} if trained else {},
                trainable=trainable, bytes_per_user=4 * trainable,
                train_flops_per_user=3e9 * np.log1p(trainable) if trained else None,
                train_seconds=0.02 * users * np.log1p(trainable) + 0.01, peak_memory_mb=900.0 if trained else None,
                val_loss=loss.tolist() if trained else [],
                movement={f"layers.{i}.attn.{site}": {"median": 0.0004 if name == "prompt" else 0.3 / (i + 1),
                                                      "min": 0.0 if name == "prompt" else 0.01}
                          for i in range(3) for site in "qv"} if trained else {},
                chosen_lr=1e-3 if trained else None,
                lr_grid={1e-4: 0.62, 1e-3: 0.71, 1e-2: 0.66} if trained else {},
                notes={"texts cut to 512 positions": 4} if trained else
                      {"users without a label of anybody else": 3} if name == "others_vote" else {},
                cold_start={k: (0.55 + 0.2 * (1 - np.exp(-k / 8)) * (1 + gain) + rng.normal(0, 0.05, users)).clip(0, 1)
                            .tolist() for k in (0, 1, 2, 4, 8, 16, 32)} if trained and seed == 0 else None,
            ))  # fmt: skip
    return records
