"""Does a store lose anything when its writer is killed, or its disk is full?

    python benchmarks/kill_test.py [--kills N] [--quick] [--folder DIR] [--seed N]

A writer adds users in batches of 1 to 3,000, replaces some, deletes some and compacts, and says through a pipe what it
begins and what it has finished. It is killed (SIGKILL) at a random moment. Then the store is opened and must be exactly
what it was after the last operation that was reported, or after the one that had begun: nothing lost, nothing half
done, every row right to the bit. The next writer goes on from there.

Then disks of a few MB are written until they are full, and the same is asked of each, while it is still full. They are
tmpfs, which takes the right to mount; without it, one file's size is limited instead.

`kills`: writers that SIGKILL ended; one that ends in any other way ends the test. `full_disks`: writers that were told
that the disk is full; so does another end here. `operations`: reported as finished, by all of them. `lost`: users who
were reported and are not there, or have an older row. `damaged`: rows that are no user's.
"""

import argparse
import json
import os
import random
import re
import resource
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from minipeft.default_base import initialise
from minipeft.errors import InputError
from minipeft.methods import PromptTuning
from minipeft.models.decoder import Decoder, DecoderConfig
from minipeft.models.loading import Origin
from minipeft.schedule import Adapter
from minipeft.store import Store

POOL = 6_000  # users
METHODS = (PromptTuning(4), PromptTuning(2))  # of every third user, of the others: 256 and 128 numbers
ROWS = [torch.randn(64 * method.tokens, generator=torch.Generator().manual_seed(0)) for method in METHODS]
IS_FULL = "No space left on device|File too large|database or disk is full|disk I/O error"
FULL, FAILED = 0, 1  # how a writer may end that was not killed
Users = dict[str, int]  # who is there -> the operation that wrote the row
Say = Callable[[str, int], None]  # "begun" or "done", and which operation


@dataclass
class Found:
    """operations: reported as finished. The rest went wrong: users, over all kills."""

    operations: int = 0
    lost: int = 0
    damaged: int = 0


def base_of(folder: Path) -> Decoder:
    base = initialise(Decoder(DecoderConfig(8, 64, 1, 1, 1, 64, 64, max_positions=96)), seed=0)
    base.origin = Origin(folder, "base", base)
    return base


def adapter_of(user: str, operation: int) -> Adapter:
    which = int(user.split()[1]) % 3 > 0
    return Adapter(user, METHODS[which], ROWS[which] + operation, {"operation": operation})


# ---- What the writer does: operation after operation, each a function of the seed and its number ---------------------


def planned(seed: int, operation: int, there: Users) -> tuple[str, list[str]]:
    draw = random.Random(seed * 10**9 + operation)
    kind = draw.choices(("add", "delete", "compact"), (10, 3, 1))[0]
    if kind == "delete" and there:
        return "delete", [draw.choice(sorted(there))]
    if kind == "compact":
        return "compact", []
    number = draw.choice((1, 1, 1, 40, 400, 3_000))
    return "add", [f"user {i}" for i in draw.sample(range(POOL), number)]


def after(seed: int, operation: int, there: Users) -> Users:
    """Who is there once the operation is done."""
    kind, users = planned(seed, operation, there)
    if kind == "delete":
        return {user: at for user, at in there.items() if user not in users}
    return there | dict.fromkeys(users, operation) if kind == "add" else there


def write(folder: Path, base: Decoder, seed: int, operation: int, there: Users, say: Say) -> None:
    """Operations without end, from this one on."""
    store = Store(folder)
    while True:
        say("begun", operation)
        kind, users = planned(seed, operation, there)
        if kind == "add":
            store.add_many([adapter_of(user, operation) for user in users], base)
        elif kind == "delete":
            store.delete(*users)
        else:
            store.compact()
        say("done", operation)
        there = after(seed, operation, there)
        operation += 1


@contextmanager
def writer(*args: object, limit: int | None = None) -> Iterator[tuple[int, int]]:
    """A process that writes. Yields its id, and a pipe that it reports to. It ends when the disk is full, or fails.

    limit: bytes of the largest file that it may write.
    """
    reports, pipe = os.pipe()
    process = os.fork()
    if process == 0:
        end = FAILED
        try:
            os.close(reports)
            if limit is not None:
                resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
            write(*args, lambda what, operation: os.write(pipe, f"{what} {operation}\n".encode()))
        except InputError as error:
            print(f"the writer was told: {error}", file=sys.stderr)
            end = FULL if re.search(IS_FULL, str(error)) else FAILED
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(end)
    os.close(pipe)
    try:
        yield process, reports
    finally:
        os.close(reports)


def ended(process: int) -> int:
    """Waits for a writer. FULL, FAILED, or less the signal that killed it."""
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def must(end: int, expected: int) -> None:
    """Raises RuntimeError if a writer did not end as it should: then this tests nothing."""
    if end != expected:
        raise RuntimeError(f"the writer ended with {end}, needed {expected}; it may have said why")


def read_all(pipe: int) -> list[list[str]]:
    parts = []
    while part := os.read(pipe, 1 << 16):
        parts.append(part)
    return [line.split() for line in b"".join(parts).decode().splitlines()]


# ---- What is asked of the store --------------------------------------------------------------------------------------


def compare(folder: Path, base: Decoder, states: list[Users], found: Found) -> Users:
    """Which of these states a store is in. Counts what is wrong if it is in none, or if a row is not its user's."""
    store = Store(folder)
    bad = {damage.user for damage in store.verify()}
    users = [user for user in store.users() if user not in bad]
    there = {}
    for adapter in store.get_many(users, base):
        there[adapter.user] = adapter.metrics["operation"]
        if not torch.equal(adapter.row, adapter_of(adapter.user, there[adapter.user]).row):
            bad.add(adapter.user)
    found.damaged += len(bad)
    if there not in states:
        found.lost += max(sum(there.get(user) != at for user, at in states[0].items()), len(there) != len(states[0]), 1)
    store.close()
    return there


def possible(
    seed: int, operation: int, there: Users, reports: list[list[str]], found: Found
) -> tuple[int, list[Users]]:
    """The next operation, and the states after the last one that was done and after the one that had begun."""
    for what, number in reports:
        assert int(number) == operation
        if what == "done":
            there = after(seed, operation, there)
            operation += 1
            found.operations += 1
    begun = bool(reports) and reports[-1][0] == "begun"
    return operation + begun, [there, after(seed, operation, there)] if begun else [there]


def killed(folder: Path, base: Decoder, kills: int, seed: int, found: Found) -> None:
    """Kill one writer after another at random moments. A store grows, shrinks and is looked at after each."""
    Store.make(folder, base).close()
    draw, operation, there = random.Random(seed), 0, {}
    for kill in range(kills):
        with writer(folder, base, seed, operation, there) as (process, pipe):
            time.sleep(draw.uniform(0.0, 0.6))
            os.kill(process, signal.SIGKILL)
            end = ended(process)
            operation, states = possible(seed, operation, there, read_all(pipe), found)
        there = compare(folder, base, states, found)
        must(end, -signal.SIGKILL)
        if (kill + 1) % 20 == 0:
            print(f"{kill + 1} kills, {operation} operations, {len(there)} users; {found}", flush=True)


def until_full(folder: Path, base: Decoder, seed: int, found: Found, limit: int | None = None) -> None:
    """Write until there is no room. limit: bytes of the largest file; None: until the disk is full."""
    Store.make(folder, base).close()
    with writer(folder, base, seed, 0, {}, limit=limit) as (process, pipe):
        operation, states = possible(seed, 0, {}, read_all(pipe), found)
        end = ended(process)
    there = compare(folder, base, states[:1], found)
    must(end, FULL)
    print(f"full after {operation} operations, {len(there)} users; {found}", flush=True)


def filled(folder: Path, base: Decoder, megabytes: int, seed: int, found: Found) -> None:
    """Fill a small disk, or, without the right to mount one, write until a file is as large."""
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "minipeft", folder],
                             capture_output=True).returncode == 0  # fmt: skip
    print(f"a disk of {megabytes} MB" if mounted else f"files of at most {megabytes} MB", end=" ", flush=True)
    try:
        until_full(folder / "store", base, seed, found, limit=None if mounted else megabytes << 20)
    finally:
        if mounted:
            subprocess.run(["umount", folder], check=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, help="how often (default: 200; with --quick 40)")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()), help="on the disk to test")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    kills, disks, found = args.kills or (40 if args.quick else 200), 2 if args.quick else 10, Found()
    base = base_of(args.folder)
    torch.set_num_threads(1)  # a process with threads should not fork
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        killed(Path(folder) / "store", base, kills, args.seed, found)
        for i in range(disks):
            filled(Path(folder) / f"disk {i}", base, 2 + i, args.seed + 1 + i, found)
    print(json.dumps({"kills": kills, "full_disks": disks, **asdict(found)}))


if __name__ == "__main__":
    main()
