"""Does activation checkpointing keep less and change no bit? Does a bf16 base train adapters whose numbers are fp32?"""

from dataclasses import replace

import pytest
import torch
from test_classifier import make_jobs
from test_classifier import make_model as make_classifier

from minipeft.engine import Engine
from minipeft.labels import Classes, LabelSet, Question
from minipeft.methods.lora import LoRA
from minipeft.models import gpt2, gpt_neox
from minipeft.models.bert import Bert, BertConfig
from minipeft.models.decoder import Decoder, DecoderConfig
from minipeft.models.rows import Rows
from minipeft.models.t5 import T5, T5Config
from minipeft.schedule import PassConfig, TrainConfig

LABELS = LabelSet([[1], [2, 3], [2, 4]])
CONFIG = TrainConfig(method=LoRA(rank=4, sites=("q", "v", "down")), epochs=2, batch_size=3)


def fill(model, dtype=torch.float32):
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            noise = torch.randn(weight.shape, generator=draw)
            a_norm = weight.ndim == 1 and "bias" not in name
            weight.copy_(1 + 0.1 * noise if a_norm else noise / weight.shape[-1] ** 0.5)
    return model.to(dtype)


def make_decoder(dtype=torch.float32):
    return fill(Decoder(DecoderConfig(60, 32, 3, 4, 2, 8, 48)), dtype)


def jobs_of_speakers():
    return [replace(job, train=[Question(q.prompt, q.label) for q in job.train], config=replace(CONFIG, seed=u))
            for u, job in enumerate(make_jobs(4))]  # fmt: skip


@pytest.mark.parametrize("model, labels, jobs", [
    (make_decoder(), LABELS, jobs_of_speakers()), (make_classifier(), Classes(3), make_jobs(4)),
], ids=["decoder", "bert"])  # fmt: skip
def test_training_ends_with_the_same_bits(model, labels, jobs):
    plain, again = (Engine(model, labels, PassConfig(recompute=wanted)).train(jobs) for wanted in (False, True))
    for job in jobs:
        assert torch.equal(plain[job.user].row, again[job.user].row)


def hidden_of(model):
    sequences = [[3, 5, 8, 1], [7] * 30, [2]]
    if isinstance(model, T5):
        read, write, cross = model.pack_pairs(sequences, sequences)
        return model.decode_rows(write, model.cross_keys(model.encode_rows(read)), cross)
    return model.hidden(Rows.pack(sequences, causal=not isinstance(model, Bert)))


BASES = {
    "decoder": make_decoder(),
    "gpt2": fill(gpt2.GPT2(gpt2.GPT2Config(60, 32, 3, 4, 48, scales=(0.35,) * 3))),
    "gpt_neox": fill(gpt_neox.GPTNeoX(gpt_neox.GPTNeoXConfig(60, 32, 3, 4, 48, rotary_dim=8))),
    "bert": fill(Bert(BertConfig(60, 32, 3, 4, 48))),
    "t5": fill(T5(T5Config(60, 32, 3, 3, 4, 8, 48, start_token=0))),
}


@pytest.mark.parametrize("base", BASES)
def test_layers_keep_their_input_alone(base):
    model, gradients, kept = BASES[base], [], []
    for model.recompute in (False, True):
        sizes = {}  # address -> bytes that backward keeps

        def note(tensor, sizes=sizes):
            sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        model.embed.weight.requires_grad_(True)
        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            loss = hidden_of(model).square().sum()
        kept.append(sum(sizes.values()))
        gradients.append(torch.autograd.grad(loss, model.embed.weight)[0])
        model.embed.weight.requires_grad_(False)
    model.recompute = False
    assert torch.equal(*gradients) and gradients[0].any()
    assert kept[1] < 0.5 * kept[0], kept


def test_a_bf16_base_trains_fp32_adapters():
    jobs, model = jobs_of_speakers(), make_decoder(torch.bfloat16)
    engine = Engine(model, LABELS)
    adapters, exact = engine.train(jobs), Engine(make_decoder(), LABELS).train(jobs)
    (bank,) = (lora.bank for lora in engine._banks)
    assert bank.weights.dtype == torch.float32 and bank.compute.dtype == torch.bfloat16
    for job in jobs:
        row, start = adapters[job.user].row, job.config.method.initial_row(model, job.config.seed, job.user)
        assert row.dtype == torch.float32 and not torch.equal(row.bfloat16().float(), row)  # small steps are not lost
        moved, should = row - start, exact[job.user].row - start
        assert torch.nn.functional.cosine_similarity(moved, should, dim=0) > 0.9
    alone = Engine(model, LABELS, PassConfig(slots=1)).train(jobs[:1])[jobs[0].user].row
    assert (alone - adapters[jobs[0].user].row).norm() <= 0.05 * alone.norm()
