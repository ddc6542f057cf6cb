"""How fast is a training step of 64 users in one pass, beside the same users one by one in the same engine?"""

from dataclasses import replace

import pytest

from minipeft.bench_train import curve_work
from minipeft.default_base import SHAPE, initialise
from minipeft.models.decoder import Decoder, DecoderConfig


@pytest.mark.parametrize("way", ["ours", "loop"])
def test_train_step(benchmark, way):
    base = initialise(Decoder(DecoderConfig(vocab_size=2048, tied_head=True, **SHAPE)), seed=0).requires_grad_(False)
    work = replace(curve_work("random 1M", base, users=64, tokens=64), steps=1)
    passes = work.passes if way == "ours" else replace(work.passes, slots=1)
    benchmark.group = "training step of 64 users of 64 tokens"
    benchmark(lambda: work.train(work.jobs, passes))
