"""Why is the CPU path written as it is? Each choice against what one would write first, side by side in one process.

    python benchmarks/cpu_choices.py            medians of 25 alternating calls, and one JSON object as the last line
"""

import json
import platform
import time
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F

from minipeft.default_base import SHAPE, initialise
from minipeft.engine import Engine
from minipeft.kernel_cases import DISTRIBUTIONS, Point, make
from minipeft.kernel_ops import SEGMENT_LORA
from minipeft.labels import LabelSet, Question
from minipeft.methods import LoRA
from minipeft.models.decoder import Decoder, DecoderConfig
from minipeft.models.layers import RMSNorm
from minipeft.schedule import Job, PassConfig, TrainConfig
from minipeft_kernels import cpu, reference
from minipeft_kernels.segment_lora import segment_lora
from minipeft_kernels.segments import TILE, Segments

T, K, R = 2048, 128, 8  # rows, features, rank: about a pass of the default base
PROMPT = (32, 20)  # tokens: an instruction that all prompts begin with, and a tweet with what follows it


def median_us(**calls) -> dict[str, float]:
    """Median time of each call in microseconds, the calls taking turns, first one first, then the other."""
    times = {name: [] for name in calls}
    for turn in range(27):
        for name, call in list(calls.items())[:: 1 if turn % 2 else -1]:
            began = time.perf_counter()
            call()
            times[name].append(time.perf_counter() - began)
    return {name: 1e6 * float(np.median(taken[2:])) for name, taken in times.items()}


def forward_backward(function, *inputs):
    """A call that runs function and its backward with respect to the inputs that require grad."""
    wanted = [x for x in inputs if x.requires_grad]
    grad = torch.randn_like(function(*inputs))
    return lambda: torch.autograd.grad(function(*inputs), wanted, grad)


def stepping(share: bool) -> Callable[[], None]:
    """A call that takes a step of 16 users, 8 prompts each, on the default base's shape."""
    rng, (shared, own) = np.random.default_rng(0), PROMPT
    base = initialise(Decoder(DecoderConfig(vocab_size=2048, tied_head=True, **SHAPE)), seed=0).requires_grad_(False)
    engine = Engine(base, LabelSet([[1], [2]]), PassConfig(share=share))
    instruction, runs = rng.integers(3, 2048, shared).tolist(), []
    for u in range(16):
        prompts = [(*instruction, *rng.integers(3, 2048, own).tolist()) for _ in range(8)]
        asked = [Question(prompt, i % 2) for i, prompt in enumerate(prompts)]
        runs.append(engine.begin(Job(f"user {u}", asked, asked, TrainConfig(LoRA(R), epochs=100))))
    return lambda: engine.train_step(runs)


def main() -> None:
    torch.manual_seed(0)
    x = torch.randn(T, K, requires_grad=True)
    tiles = x.detach().view(-1, TILE, K)
    A = torch.randn(T // TILE, R, K)
    one = torch.ones(T // TILE)
    norm = RMSNorm(K, 1e-6).requires_grad_(False)

    users, rows = 128, 16
    segments = Segments.build(range(users), [rows] * users)
    bank_A, bank_Bt = torch.randn(users, R, 768, requires_grad=True), torch.randn(users, R, 768, requires_grad=True)
    wide, scale = torch.randn(users * rows, 768, requires_grad=True), torch.ones(users)

    def lora(op):
        return forward_backward(lambda x, A, Bt: op(x, A, Bt, scale, segments), wide, bank_A, bank_Bt)

    result = {
        "shrink": median_us(
            rank_first=lambda: cpu.shrink(tiles, A, one),
            rank_last=lambda: torch.bmm(tiles, A.transpose(1, 2)) * one[:, None, None],
        ),
        "rms_norm": median_us(
            by_hand=forward_backward(norm, x),
            torch=forward_backward(lambda x: F.rms_norm(x, (K,), norm.weight, 1e-6), x),
        ),
        f"beginning_{PROMPT[0]}_of_{sum(PROMPT)}_tokens": median_us(shared=stepping(True), repeated=stepping(False)),
        "lora_128_users_16_rows": median_us(tiles=lora(segment_lora), loop_over_users=lora(reference.segment_lora)),
    }
    for point in (*(Point("", 768, (768,), R, T, users, distribution) for distribution in DISTRIBUTIONS),
                  Point("", 768, (768,), R, T, 16)):  # fmt: skip
        inputs = make(SEGMENT_LORA, point, "cpu", torch.float32)
        for backward in SEGMENT_LORA.passes:
            ways = {way: lambda way=way, passes=(inputs, backward): SEGMENT_LORA.ways[way](*passes)
                    for way in ("ours", "grouped_mm")}  # fmt: skip
            name = f"lora_{len(inputs.groups.lengths)}_users_{point.distribution}_{'both' if backward else 'forward'}"
            result[name] = median_us(**ways)
    print(f"{T} rows, {K} features, {torch.get_num_threads()} threads, torch {torch.__version__}, {platform.machine()}")
    for name, times in result.items():
        (ours, ours_us), (other, other_us) = times.items()
        print(f"{name:>34}: {ours} {ours_us:7.0f} us, {other} {other_us:7.0f} us: {other_us / ours_us:.2f}x")
    print(json.dumps({"threads": torch.get_num_threads(), "torch": torch.__version__, "median_us": result}))


if __name__ == "__main__":
    main()
