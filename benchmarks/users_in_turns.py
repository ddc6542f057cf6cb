"""Does a user's step cost the same, however many users there are? The same two steps of 16 to 4,096 users, in turns.

    python benchmarks/users_in_turns.py         milliseconds for each user's step, medians, and a JSON object; 4 minutes
"""

import json
import statistics
import time
from dataclasses import replace

import torch

from minipeft.bench_train import CURVE_AT, CURVE_STEPS, SMALL_BASE, curve_work
from minipeft.contenders import PASSES
from minipeft.default_base import SHAPE, VOCAB_SIZE, initialise
from minipeft.lanes import lanes_on
from minipeft.models.decoder import Decoder, DecoderConfig

USERS = (16, 64, 256, 1024, 4096)
TURNS = 5
AT_LEAST = 256  # users in a timed call: few are trained several times


def main() -> None:
    config = DecoderConfig(vocab_size=VOCAB_SIZE, tied_head=True, **SHAPE)
    base = initialise(Decoder(config), seed=0).requires_grad_(False)
    passes = replace(PASSES, token_budget=SMALL_BASE, lanes=lanes_on("cpu", SMALL_BASE))  # as in `bench train`
    works = {users: curve_work("random 1M", base, users, CURVE_AT[1], passes) for users in USERS}
    times: dict[int, list[float]] = {users: [] for users in USERS}
    planning: dict[int, list[float]] = {users: [] for users in USERS}
    works[USERS[1]].fused()
    for turn in range(TURNS):
        for users in USERS if turn % 2 == 0 else USERS[::-1]:
            again, planned = max(1, AT_LEAST // users), 0.0
            began = time.perf_counter()
            for _ in range(again):
                works[users].fused()
                planned += works[users].planning
            seconds = time.perf_counter() - began
            times[users].append(1e3 * seconds / (again * users * CURVE_STEPS))
            planning[users].append(planned / seconds)
    medians, shares = ({users: statistics.median(own) for users, own in each.items()} for each in (times, planning))
    print(f"{CURVE_AT[1]} tokens a step, {torch.get_num_threads()} threads, torch {torch.__version__}")
    for users, median in medians.items():
        print(f"{users:6,} users: {median:6.2f} ms, {median / medians[USERS[0]]:.2f} times as much as of {USERS[0]}; "
              f"planning and packing {shares[users]:.1%}")  # fmt: skip
    print(json.dumps({"ms_per_user_step": medians, "planning_share": shares}))


if __name__ == "__main__":
    main()
