"""Does a user's step cost the same, however many users there are? The same two steps of 16 to 4,096 users, in turns.

    python benchmarks/users_in_turns.py         milliseconds for each user's step, medians, and a JSON object; 4 minutes
"""

import json
import statistics
import time

import torch

from minipeft.bench_train import CURVE_AT, CURVE_STEPS, curve_work
from minipeft.default_base import SHAPE, VOCAB_SIZE, initialise
from minipeft.models.decoder import Decoder, DecoderConfig

USERS = (16, 64, 256, 1024, 4096)
TURNS = 5
AT_LEAST = 256  # users in a timed call: few are trained several times


def main() -> None:
    config = DecoderConfig(vocab_size=VOCAB_SIZE, tied_head=True, **SHAPE)
    base = initialise(Decoder(config), seed=0).requires_grad_(False)
    works = {users: curve_work("random 1M", base, users, CURVE_AT[1]) for users in USERS}
    times: dict[int, list[float]] = {users: [] for users in USERS}
    works[USERS[1]].fused()
    for turn in range(TURNS):
        for users in USERS if turn % 2 == 0 else USERS[::-1]:
            again = max(1, AT_LEAST // users)
            began = time.perf_counter()
            for _ in range(again):
                works[users].fused()
            times[users].append(1e3 * (time.perf_counter() - began) / (again * users * CURVE_STEPS))
    medians = {users: statistics.median(own) for users, own in times.items()}
    print(f"{CURVE_AT[1]} tokens a step, {torch.get_num_threads()} threads, torch {torch.__version__}")
    for users, median in medians.items():
        print(f"{users:6,} users: {median:6.2f} ms, {median / medians[USERS[0]]:.2f} times as much as of {USERS[0]}")
    print(json.dumps({"ms_per_user_step": medians}))


if __name__ == "__main__":
    main()
