"""Do ten thousand users train in one run as fast as five hundred, and in as much memory?

    python benchmarks/many_users.py [--quick]

Synthetic users with 10 to 60 examples, skewed, at most 3 epochs, on the default base, on this machine's cores. The
fewer users are trained before and after the many, for machines drift, each time by a process of its own, which reads
its memory whenever a user finishes: `rss_mb` is the resident memory when a tenth, a half and all of the users are done.
`cpu_s` are the seconds that its threads ran: in them other work on the machine counts less. The base is trained
beforehand, on the fewer users' examples. `ratio` is the many's users a second over the mean of the fewer's.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from minipeft.default_base import default_base
from minipeft.methods.lora import LoRA
from minipeft.schedule import TrainConfig
from minipeft.tasks.synthetic import SyntheticConfig, make_synthetic
from minipeft.tasks.task import load_task, save_task
from minipeft.training import Training

SIZES = {True: (25, 100), False: (500, 10_000)}  # users, with --quick and without
CONFIG = TrainConfig(LoRA(rank=8, alpha=16, sites=("v", "o", "down")), learning_rate=5e-3, epochs=3)
AT_ONCE = 500  # users made at a time


def make_task(folder: Path, number: int) -> None:
    """So many users' examples, without holding all of them."""
    folder.mkdir()
    for first in range(0, number, AT_ONCE):
        task, _ = make_synthetic(SyntheticConfig(users=min(AT_ONCE, number - first), max_examples=60, test_examples=1,
                                                 seed=first))  # fmt: skip
        save_task(task, folder / "part")
        for file in (folder / "part").glob("*.jsonl"):
            with open(folder / file.name, "a") as whole:
                whole.write(file.read_text().replace('{"user": "', f'{{"user": "{first} '))
        shutil.copy(folder / "part" / "task.json", folder)
    shutil.rmtree(folder / "part")


def resident_mb() -> float:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


def train(task: Path, base: Path, store: Path) -> dict:
    """Train everybody here; the figures."""
    began, cpu_began, memory = time.perf_counter(), time.process_time(), []
    training = Training.plan(base, task, CONFIG, store)
    plan_s = time.perf_counter() - began
    summary = training.run(lambda adapter: memory.append(resident_mb()))
    seconds, cpu_s = time.perf_counter() - began, time.process_time() - cpu_began
    rss_mb = {f"{share} %": round(memory[len(memory) * share // 100 - 1]) for share in (10, 50, 100)}
    return {"users": summary.trained, "minutes": seconds / 60, "plan_s": plan_s,
            "users_per_s": summary.trained / seconds, "cpu_s": cpu_s, "users_per_cpu_s": summary.trained / cpu_s,
            "rss_mb": rss_mb}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="{} and {} users".format(*SIZES[True]))
    parser.add_argument("--train", nargs=3, type=Path, metavar=("TASK", "BASE", "STORE"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.train:
        print(json.dumps(train(*args.train)))
        return
    runs = []
    with tempfile.TemporaryDirectory() as name:
        folder, sizes = Path(name), SIZES[args.quick]
        for number in sizes:
            make_task(folder / f"task {number}", number)
        base = default_base(load_task(folder / f"task {sizes[0]}"))
        for turn, number in enumerate((*sizes, sizes[0])):
            argv = [sys.executable, __file__, "--train", folder / f"task {number}", base, folder / f"store {turn}"]
            done = subprocess.run(argv, stdout=subprocess.PIPE, text=True, check=True)
            runs.append(json.loads(done.stdout.splitlines()[-1]))
            print(runs[-1], flush=True)
    few, many, again = runs
    ratios = {name: 2 * many[of] / (few[of] + again[of]) for name, of in
              (("ratio", "users_per_s"), ("cpu_ratio", "users_per_cpu_s"))}  # fmt: skip
    print(json.dumps({"runs": runs, **ratios, "threads": torch.get_num_threads(), "torch": torch.__version__}))


if __name__ == "__main__":
    main()
