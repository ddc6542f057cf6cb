"""Does one user in a hundred who cannot be trained change anybody else's adapter, by as much as a bit?

    python benchmarks/poison_test.py [--quick]

The hundred are trained without the poisoned user, then once with each kind of poison: a loss that is no number from the
start, a learning rate of 1e30, an empty text, a label outside the set. Deterministic mode; fewer slots than users, so
others take the poisoned one's slot when it is free again.
"""

import argparse
import json
import shutil
import tempfile
from dataclasses import replace
from pathlib import Path

import torch
from small_trainings import CONFIG, PASSES, adapters_of, make_inputs

from minipeft.tasks.task import save_task
from minipeft.training import Training

USERS = 100
POISONED = "user00042"


class WithoutNumber(Training):
    """The poisoned user starts from a row of NaN: so is every loss and gradient."""

    def job(self, user):
        job, num_cut = super().job(user)
        nothing = torch.full((self.method.layout(self.base).row_size,), torch.nan)
        return (replace(job, start=nothing) if user == POISONED else job), num_cut


class TooFast(Training):
    """The poisoned user's learning rate is 1e30."""

    def job(self, user):
        job, num_cut = super().job(user)
        wild = replace(job.config, learning_rate=1e30)
        return (replace(job, config=wild) if user == POISONED else job), num_cut


def edited(folder: Path, name: str, **fields) -> Path:
    """A copy of the task in which the poisoned user's first training example has these fields."""
    shutil.copytree(folder / "task", folder / name)
    lines = (folder / name / "train.jsonl").read_text().splitlines()
    first = next(i for i, line in enumerate(lines) if POISONED in line)
    lines[first] = json.dumps(json.loads(lines[first]) | fields)
    (folder / name / "train.jsonl").write_text("\n".join(lines) + "\n")
    return folder / name


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one epoch of training for each user")
    args = parser.parse_args()
    config = replace(CONFIG, epochs=1) if args.quick else CONFIG
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        task, base = make_inputs(folder, USERS)
        save_task(task.subset(user for user in task.users if user != POISONED), folder / "without")
        Training.plan(base, folder / "without", config, folder / "clean", passes=PASSES).run()
        expected, same = adapters_of(folder / "clean", base), []
        assert len(expected) == USERS - 1
        kinds = {
            "a loss that is no number": (WithoutNumber, folder / "task"),
            "a learning rate of 1e30": (TooFast, folder / "task"),
            "an empty text": (Training, edited(folder, "empty", text="")),
            "a label outside the set": (Training, edited(folder, "label", label=["perhaps"])),
        }
        for kind, (training, source) in kinds.items():
            store = folder / kind
            summary = training.plan(base, source, config, store, passes=PASSES).run()
            same.append(adapters_of(store, base) == expected and list(summary.quarantined) == [POISONED])
            print(f"{kind}: {'others identical' if same[-1] else 'DIFFERENT'}; {summary.quarantined}", flush=True)
    print(json.dumps({"users": USERS, "poisoned": len(kinds), "others_identical": all(same)}))


if __name__ == "__main__":
    main()
