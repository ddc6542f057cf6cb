"""How fast is a training step of 64 users in one pass, beside the same users one by one in the same engine, and beside
peft, a user at a time, of 8 of them? Where our engine itself becomes slower, only peft's time shows it: a group each.
"""

from dataclasses import replace

import pytest
from tokenizers import Tokenizer
from tokenizers.models import BPE

from minipeft.bench_train import curve_work
from minipeft.default_base import SHAPE, initialise
from minipeft.models.decoder import Decoder, DecoderConfig
from minipeft.models.loading import load_model, save_model

GROUP = "training step of 64 users of 64 tokens"


@pytest.mark.parametrize("group, way", [(GROUP, "ours"), (GROUP, "loop"), (f"{GROUP}, beside peft", "ours"),
                                        (f"{GROUP}, beside peft", "peft")])  # fmt: skip
def test_train_step(benchmark, tmp_path, group, way):
    made = initialise(Decoder(DecoderConfig(vocab_size=2048, tied_head=True, **SHAPE)), seed=0)
    save_model(made, Tokenizer(BPE()), tmp_path / "base")
    work = replace(curve_work("random 1M", load_model(tmp_path / "base"), users=64, tokens=64), steps=1)
    if way == "peft":
        for peer in ("transformers", "peft"):
            pytest.importorskip(peer)
    passes = work.passes if way == "ours" else replace(work.passes, slots=1)
    benchmark.group = group
    benchmark(work.peft if way == "peft" else lambda: work.train(work.jobs, passes))
