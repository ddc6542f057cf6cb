"""How much does a store hold, how fast, and does a user cost the same in a small store and in a large one?

    python benchmarks/store_scale.py [--quick] [--folder DIR] [--plot FILE.png]

Synthetic users of a base of no use: rows of 256 numbers, and of 73,728, which is LoRA of rank 8 on q and v of MiniLM.
Ids come in random order, metrics are what training leaves. Adding and reading are processes of their own, which say how
much memory they had, PyTorch included. Every row that is read is compared. Beside the large rows stands what the disk
takes of one plain file, written in turns with them.

Needs 8 GB of room under --folder (default: the system's temporary folder), and removes what it wrote.
"""

import argparse
import json
import math
import os
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from minipeft.default_base import initialise
from minipeft.methods import PromptTuning
from minipeft.models.decoder import Decoder, DecoderConfig
from minipeft.models.loading import Origin
from minipeft.schedule import Adapter
from minipeft.store import Store

WIDTH, SMALL, LARGE = 64, 256, 73_728  # of the base; numbers of a user
BATCH = {SMALL: 8_000, LARGE: 100}  # rows added at a time
TURN = 3_000  # large rows between two plain files
READS = 5_000
STRIDE = 7_368_787  # a prime: users in an order that is none


def base_of(folder: Path) -> Decoder:
    base = initialise(Decoder(DecoderConfig(8, WIDTH, 1, 1, 1, WIDTH, WIDTH, max_positions=4096)), seed=0)
    base.origin = Origin(folder, "base", base)
    return base


def adapters(rows: torch.Tensor, first: int, total: int) -> list[Adapter]:
    """Users with these rows, from the first on, of `total`, in their order."""
    method, made = PromptTuning(rows.shape[1] // WIDTH), []
    for i, row in enumerate(rows, first):
        draw = random.Random(i)
        metrics = {"best_epoch": draw.randint(1, 3), "epochs": 3, "steps": draw.randint(6, 180),
                   "val_loss": [draw.random() for _ in range(3)], "stopped_early": draw.random() < 0.5,
                   "skipped_steps": 0}  # fmt: skip
        made.append(Adapter(name(i, total), method, row, metrics))
    return made


def fill(rows: torch.Tensor, first: int) -> torch.Tensor:
    """rows [n, numbers] = those of the users from the first on; each user's differ from everybody's."""
    row = torch.randn(rows.shape[1], generator=torch.Generator().manual_seed(0))
    return torch.add(row, torch.arange(first, first + len(rows))[:, None], out=rows)


def name(i: int, total: int) -> str:
    return f"user{i * STRIDE % total:07d}"


def peak_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


# ---- Processes of their own ----------------------------------------------------------------------------------------


def add(folder: Path, numbers: int, first: int, last: int, total: int) -> dict:
    """Seconds to add users first .. last - 1 in batches."""
    base = base_of(folder)
    store, seconds, rows = Store.make(folder, base), 0.0, torch.empty(BATCH[numbers], numbers)
    for start in range(first, last, len(rows)):
        batch = adapters(fill(rows[: last - start], start), start, total)
        began = time.perf_counter()
        store.add_many(batch, base)
        seconds += time.perf_counter() - began
    return {"seconds": seconds, "rss_mb": peak_mb()}


def read(folder: Path, numbers: int, _: int, last: int, total: int) -> dict:
    """Seconds to open a store, and microseconds to read one user after another at random."""
    base = base_of(folder)
    began = time.perf_counter()
    store = Store(folder)
    opened, draw, took = time.perf_counter() - began, random.Random(last), []
    for _ in range(min(READS, 4 * last)):
        i = draw.randrange(last)
        began = time.perf_counter()
        found = store.get(name(i, total), base)
        took.append(1e6 * (time.perf_counter() - began))
        assert torch.equal(found.row, fill(torch.empty(1, numbers), i)[0]), f"user {i} is another"
    return {"open_s": opened, "read_us": statistics.median(took), "rss_mb": peak_mb()}


def on_its_own(part: str, *args: object) -> dict:
    command = [sys.executable, __file__, "--part", part, *map(str, args)]
    return json.loads(subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout)


def plain_file(path: Path, size: int) -> float:
    """Seconds that the disk takes for so many bytes, written one after another."""
    block = os.urandom(16 << 20)
    began = time.perf_counter()
    with open(path, "wb") as file:
        for start in range(0, size, len(block)):
            file.write(block[: size - start])
        file.flush()
        os.fsync(file.fileno())
    seconds = time.perf_counter() - began
    path.unlink()
    return seconds


def bytes_on_disk(folder: Path) -> int:
    return sum(path.stat().st_blocks * 512 for path in folder.rglob("*"))


# ---- The two questions ---------------------------------------------------------------------------------------------


def small_rows(folder: Path, total: int) -> list[dict]:
    """A store that grows tenfold from 1,000 users to `total`, looked at each time."""
    found, before = [], 0
    print(f"{'users':>9}{'added a second':>16}{'read':>12}{'open':>10}{'memory':>10}{'disk':>8}")
    for users in (10**k for k in range(3, 1 + round(math.log10(total)))):
        added = on_its_own("add", folder, SMALL, before, users, total)
        seen = on_its_own("read", folder, SMALL, 0, users, total)
        found.append({"users": users, "add_rows_per_s": (users - before) / added["seconds"],
                      "read_us_median": seen["read_us"], "open_s": seen["open_s"],
                      "rss_mb": max(added["rss_mb"], seen["rss_mb"]),
                      "disk_ratio": bytes_on_disk(folder) / (users * SMALL * 4)})  # fmt: skip
        before, last = users, found[-1]
        print(f"{users:>9,}{last['add_rows_per_s']:>16,.0f}{last['read_us_median']:>9.0f} us{last['open_s']:>8.4f} s"
              f"{last['rss_mb']:>7.0f} MB{last['disk_ratio']:>8.3f}", flush=True)  # fmt: skip
    return found


def large_rows(folder: Path, total: int) -> dict:
    """A store of large rows and plain files, in turns."""
    seconds = {"store": 0.0, "disk": 0.0}
    for first in range(0, total, TURN):
        last = min(first + TURN, total)
        added = on_its_own("add", folder, LARGE, first, last, total)
        seconds["store"] += added["seconds"]
        seconds["disk"] += plain_file(folder.parent / "plain", (last - first) * LARGE * 4)
    seen, size = on_its_own("read", folder, LARGE, 0, total, total), total * LARGE * 4
    result = {"users": total, "add_mb_per_s": size / seconds["store"] / 1e6,
              "disk_mb_per_s": size / seconds["disk"] / 1e6, "of_disk": seconds["disk"] / seconds["store"],
              "read_us_median": seen["read_us"], "open_s": seen["open_s"],
              "rss_mb": max(added["rss_mb"], seen["rss_mb"]), "disk_ratio": bytes_on_disk(folder) / size}  # fmt: skip
    print(f"{total:,} rows of {LARGE:,} numbers: {result['add_mb_per_s']:.0f} MB/s, a plain file "
          f"{result['disk_mb_per_s']:.0f} MB/s: {100 * result['of_disk']:.0f} % of it; read {seen['read_us']:.0f} us, "
          f"memory {result['rss_mb']:.0f} MB, disk {result['disk_ratio']:.3f}")  # fmt: skip
    return result


def plot(runs: list[dict], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, 2, figsize=(8, 3), layout="constrained")
    labels = {"add_rows_per_s": "users added a second", "read_us_median": "us to read one"}
    for panel, (key, label) in zip(panels, labels.items()):
        panel.plot([run["users"] for run in runs], [run[key] for run in runs], marker="o")
        panel.set(xscale="log", xlabel="users in the store", ylabel=label, ylim=(0, None))
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="100,000 small rows and 1,500 large ones")
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()), help="on the disk to measure")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="what a store costs by its size, as a picture")
    parser.add_argument("--part", nargs=6, help=argparse.SUPPRESS)  # for the processes that this one starts
    args = parser.parse_args()
    if args.part:
        part, folder, *numbers = args.part
        print(json.dumps({"add": add, "read": read}[part](Path(folder), *map(int, numbers))))
        return
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        runs = small_rows(Path(folder) / "small", 10**5 if args.quick else 10**6)
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        large = large_rows(Path(folder) / "large", 1_500 if args.quick else 20_000)
    if args.plot:
        plot(runs, args.plot)
    rss_mb = max(run["rss_mb"] for run in (*runs, large))
    print(json.dumps(runs[-1] | {"rss_mb": rss_mb, "by_users": runs, "large": large}))


if __name__ == "__main__":
    main()
