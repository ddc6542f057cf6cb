"""Is anything lost or damaged when a training is killed with SIGKILL at random moments?

    python benchmarks/kill_training.py [--quick]

A training that saves what is under way after every pass reports each finished user through a pipe, is killed, and is
resumed from the disk, over and over; whenever one comes to its end, the next begins in a new store. After each kill the
store is opened and everybody who was ever reported must be there, with the bits of a training that nobody killed.
"""

import argparse
import json
import os
import random
import select
import signal
import tempfile
import time
from pathlib import Path

import torch
from small_trainings import CONFIG, PASSES, adapters_of, make_inputs

from minipeft.models.classifier import Base
from minipeft.training import Training

USERS = 16
KILLS = {True: 20, False: 200}  # with --quick, without


def started(base: Base, task: Path, store: Path) -> tuple[int, int]:
    """A process that trains, and a pipe on which it writes each finished user's id on a line of its own."""
    reading, writing = os.pipe()
    if child := os.fork():
        os.close(writing)
        return child, reading
    os.close(reading)
    training = Training.plan(base, task, CONFIG, store, passes=PASSES, resume=True, save_minutes=1e-9)
    training.run(lambda adapter: os.write(writing, f"{adapter.user}\n".encode()))
    os._exit(0)


def reported(child: int, pipe: int, seconds: float) -> tuple[set[str], bool]:
    """Who is reported until the process ends or is killed after so long; and whether it ended by itself."""
    deadline, heard = time.monotonic() + seconds, b""
    while (left := deadline - time.monotonic()) > 0 and select.select([pipe], [], [], left)[0]:
        if not (piece := os.read(pipe, 65536)):
            break
        heard += piece
    os.kill(child, signal.SIGKILL)
    while piece := os.read(pipe, 65536):  # what it had written before
        heard += piece
    os.close(pipe)
    _, status = os.waitpid(child, 0)
    if os.WIFEXITED(status) and status:
        raise SystemExit("the training failed by itself")
    return set(heard.decode().split("\n")[:-1]), os.WIFEXITED(status)


def kill_training(kills: int, seed: int = 0) -> dict:
    """Kill so many times. Returns `kills`, `lost` (reported and not there) and `damaged` (there with other bits)."""
    torch.set_num_threads(1)  # a forked process has no other thread
    draw, done, lost, damaged, number = random.Random(seed), 0, set(), set(), 0
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        _, base = make_inputs(folder, USERS)
        began = time.monotonic()
        reported(*started(base, folder / "task", folder / "whole"), seconds=600)
        whole_s = time.monotonic() - began
        whole = adapters_of(folder / "whole", base)
        if len(whole) != USERS:
            raise SystemExit("the training that nobody kills has not trained everybody")
        said: set[str] = set()
        while done < kills:
            store = folder / f"store {number}"
            more, ended = reported(*started(base, folder / "task", store), draw.uniform(0, whole_s))
            said |= more
            done += not ended
            there = adapters_of(store, base) if (store / "training").exists() else {}
            lost |= {(number, user) for user in said - there.keys()}
            damaged |= {(number, user) for user in there if there[user] != whole[user]}
            if ended:
                if there != whole:
                    raise SystemExit("a training that was killed and resumed gave other adapters")
                number, said = number + 1, set()
            print(f"{done} kills, {number} trainings ended; {len(there)} of {USERS} users there", flush=True)
    return {"kills": done, "lost": len(lost), "damaged": len(damaged)}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help=f"{KILLS[True]} kills, not {KILLS[False]}")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    print(json.dumps(kill_training(KILLS[args.quick], args.seed)))
