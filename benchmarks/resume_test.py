"""Does a training that is interrupted give the same bits as one that is not, and on any number of processes?

    python benchmarks/resume_test.py [--quick]

Interruptions: SIGTERM or Ctrl-C after a random number of passes, and now and then once more after the resumption;
every resumption reads all it knows from the disk. Processes: torchrun with 1, 2 and 3 ranks over gloo on this machine;
some are also stopped on the way and resumed with another number of ranks.
"""

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager
from pathlib import Path

from small_trainings import CONFIG, FLAGS, PASSES, adapters_of, make_inputs

from minipeft.resume import State
from minipeft.training import Interrupted, Training

USERS = 24
INTERRUPTIONS = {True: 6, False: 20}  # with --quick, without


def after(passes: int, signum: int, seen: list[int]):
    """A `Show` that sends this process a signal after so many passes, and counts them."""

    @contextmanager
    def show(title):
        def update(done, total):
            seen.append(1)
            if len(seen) == passes:
                os.kill(os.getpid(), signum)

        yield update

    return show


def trained(base, folder: Path, store: Path, points: list[int], draw: random.Random) -> tuple[int, int]:
    """Train, interrupted after these numbers of passes, one after the other, as far as there are so many.

    Returns how often it was interrupted, and the passes of the last part.
    """
    for interruptions, point in enumerate([*points, 0]):
        seen: list[int] = []
        training = Training.plan(base, folder / "task", CONFIG, store, passes=PASSES, resume=True)
        try:
            training.run(show=after(point, draw.choice((signal.SIGINT, signal.SIGTERM)), seen))
        except Interrupted:
            continue
        return interruptions, len(seen)
    raise AssertionError("the last part has no interruption")


def ranks_give(folder: Path, store: Path, ranks: list[int]) -> None:
    """Train with torchrun; all but the last number of ranks are stopped by SIGTERM when some users have finished."""
    for i, number in enumerate(ranks):
        last = i == len(ranks) - 1
        argv = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(number), "-m",
                "minipeft", "train", "--model", folder / "base", "--task", folder / "task", "--store", store, *FLAGS,
                "--resume", "--save-minutes", "0.001"]  # fmt: skip
        process = subprocess.Popen(list(map(str, argv)), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        if not last:
            log = store / "log.jsonl"
            while process.poll() is None and not (log.exists() and '"finished"' in log.read_text()):
                time.sleep(0.05)
            process.terminate()
        errors = process.communicate()[1]
        if last == bool(process.returncode) or State(store).unfinished == last:
            raise SystemExit(f"{number} ranks that were {'not ' * last}to be interrupted ended with "
                             f"{process.returncode}:\n{errors}")  # fmt: skip
        if not last:
            saved = len(list((store / "training").glob(f"rank-*-of-{number}.standings")))
            if saved < number:
                raise SystemExit(f"of {number} ranks that were interrupted {saved} saved:\n{errors}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help=f"{INTERRUPTIONS[True]} interruptions, not "
                                                             f"{INTERRUPTIONS[False]}")  # fmt: skip
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    draw, same, rank_same = random.Random(args.seed), [], []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        _, base = make_inputs(folder, USERS)
        _, passes = trained(base, folder, folder / "whole", [], draw)
        whole = adapters_of(folder / "whole", base)
        assert len(whole) == USERS
        print(f"{USERS} users, {passes} passes", flush=True)
        made = 0
        while made < INTERRUPTIONS[args.quick]:
            points = [draw.randrange(1, passes)]
            if made % 3 == 2:
                points.append(draw.randrange(1, max(2, passes - points[0])))
            store = folder / f"store {len(same)}"
            interruptions, _ = trained(base, folder, store, points, draw)
            same.append(adapters_of(store, base) == whole)
            made += interruptions
            print(f"interrupted {interruptions} times, after passes {points[:interruptions]}: "
                  f"{'identical' if same[-1] else 'DIFFERENT'}", flush=True)  # fmt: skip
        for ranks in ([1], [2], [3]) if args.quick else ([1], [2], [3], [2, 3], [3, 1], [3, 2]):
            store = folder / f"ranks {ranks}"
            ranks_give(folder, store, ranks)
            rank_same.append(adapters_of(store, base) == whole)
            print(f"ranks {ranks}: {'identical' if rank_same[-1] else 'DIFFERENT'}", flush=True)
    print(json.dumps({"interruptions": made, "identical": all(same), "ranks_identical": all(rank_same)}))


if __name__ == "__main__":
    main()
