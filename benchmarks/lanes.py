"""What do lanes gain? A fused training in one lane and in one for each core, in turns.

    python benchmarks/lanes.py [--model FOLDER --task DIR [--top-layers N]]       any options of `bench train`

Rows of a pass are counted over all lanes: 2,048 in two lanes are 1,024 each. Prints medians, and shares of one lane's.
"""

import statistics
import sys
import time
from dataclasses import replace

import torch

from minipeft.bench_train import main_work, parse

TURNS = 5
ROWS = (2048, 4096)


def main() -> None:
    work = main_work(parse(sys.argv[1:]))
    ways = {(lanes, rows): replace(work, passes=replace(work.passes, lanes=lanes, token_budget=rows))
            for lanes in (1, torch.get_num_threads()) for rows in ROWS}  # fmt: skip
    rows = {way: each.fused() for way, each in ways.items()}
    first = rows[1, ROWS[0]]
    apart = max(float((own[user] - row).norm() / row.norm()) for own in rows.values() for user, row in first.items())
    seconds: dict[tuple[int, int], list[float]] = {way: [] for way in ways}
    for turn in range(TURNS):
        for way in ways if turn % 2 else reversed(ways):
            began = time.perf_counter()
            ways[way].fused()
            seconds[way].append(time.perf_counter() - began)
    medians = {way: statistics.median(own) for way, own in seconds.items()}
    print(f"{len(work.jobs)} users, {work.steps} steps each, {torch.get_num_threads()} threads, torch "
          f"{torch.__version__}; adapters differ by {apart:.0e}")  # fmt: skip
    for (lanes, rows_in_all), median in medians.items():
        print(f"{lanes} lanes, {rows_in_all:,} rows: {median:6.2f} s, {median / medians[1, ROWS[0]]:5.1%}")


if __name__ == "__main__":
    main()
