"""Does the engine train the same adapters through the kernels as through plain PyTorch?"""

import copy

import numpy as np
import pytest
import test_methods
import torch
from test_engine import LABELS, make_model, make_questions

import minipeft_kernels.backend
from minipeft.engine import Engine, label_scores
from minipeft.methods.lora import LoRA
from minipeft.models.decoder import DecoderConfig
from minipeft.schedule import Job, PassConfig, Run, TrainConfig
from minipeft_kernels import lora_linear as lora_linear_file
from minipeft_kernels import wgrad as wgrad_file

# q, k, v and gate, up are whole blocks of columns wide: kernels take them at once
CONFIG = DecoderConfig(vocab_size=60, width=128, num_layers=1, num_heads=4, num_kv_heads=4, head_dim=32,
                       mlp_width=128, qkv_bias=True, max_positions=64)  # fmt: skip
METHODS = {"two banks": {"ann": LoRA(8), "bob": LoRA(3), "cem": LoRA(12, sites=("q", "v", "down"))},
           "all alike": {name: LoRA(rank, sites=("k", "v", "gate")) for name, rank in (("ann", 8), ("bob", 2))}}


def make_jobs(methods):
    rng = np.random.default_rng(0)
    return [
        Job(user, make_questions(rng, 4, i, longest=6), make_questions(rng, 2, i, longest=6),
            TrainConfig(method=method, learning_rate=1e-2, epochs=1, batch_size=2, max_grad_norm=0.5))
        for i, (user, method) in enumerate(methods.items())
    ]  # fmt: skip


def test_adapters_and_answers_are_those_of_plain_pytorch(kernels, monkeypatch):
    launches = []
    for file, name in ((lora_linear_file, "forward_triton"), (wgrad_file, "configuration")):
        function = getattr(file, name)
        monkeypatch.setattr(file, name, lambda *args, f=function, n=name: launches.append((n, args)) or f(*args))
    for name, methods in METHODS.items():
        jobs, results = make_jobs(methods), {}
        for interpret in (False, minipeft_kernels.backend.INTERPRET):
            monkeypatch.setattr(minipeft_kernels.backend, "INTERPRET", interpret)
            launches.clear()
            model = make_model(0, CONFIG).to("cpu" if not interpret else kernels)
            engine = Engine(model, LABELS, PassConfig())
            adapters = engine.train(jobs)
            scores = label_scores(model, LABELS, adapters, {job.user: job.val for job in jobs})
            results[interpret] = adapters, scores, [args for kind, args in launches if kind == "forward_triton"]
        (plain, plain_scores, none), (kernel, kernel_scores, launched) = results[False], results[True]
        assert not none and launched
        sites = {len(args[0].Bts) for args in launched}
        assert sites == ({1, 2} if name == "all alike" else {1}), "which sites share a launch"
        for job in jobs:
            one, other = kernel[job.user].row.cpu(), plain[job.user].row
            assert float((one - other).norm() / other.norm()) < 1e-5, job.user
            torch.testing.assert_close(*(torch.from_numpy(s[job.user]) for s in (kernel_scores, plain_scores)),
                                       rtol=1e-4, atol=1e-4)  # fmt: skip


@pytest.mark.parametrize("name, kind", [("gpt2", kind) for kind in test_methods.METHODS if kind != "head"] +
                         [("t5", "head"), ("t5", "prefix"), ("t5", "vocabulary"), ("bert", "head"),
                          ("decoder", "layernorm")])  # fmt: skip
def test_every_method_does_through_the_kernels_what_it_does_in_plain_pytorch(name, kind, kernels, monkeypatch):
    """The gradients of one step of two users."""
    rows, grads = {}, []
    for interpret in (False, minipeft_kernels.backend.INTERPRET):
        monkeypatch.setattr(minipeft_kernels.backend, "INTERPRET", interpret)
        base = copy.deepcopy(test_methods.BASES[name]).to(kernels if interpret else "cpu")
        method = test_methods.of_base(test_methods.METHODS[kind], base)
        engine, runs, rng = Engine(base, test_methods.labels_of(base)), [], np.random.default_rng(0)
        for seed, user in enumerate(("ann", "bob")):
            if user not in rows:
                rows[user] = method.row(test_methods.drawn(method, base, seed), base)
            mine = test_methods.questions(rng, 2)
            place = engine.admit(user, method, rows[user])
            runs.append(Run(Job(user, mine, mine, TrainConfig(method)), *place, engine.virtual(place[0])))
        engine.train_step(runs)
        grads.append([method.tensors(engine._banks[0].bank.grads[slot].cpu(), base) for slot in (0, 1)])
    for plain, kernel in zip(*grads):
        largest = max(tensor.norm() for tensor in plain.values())
        for site, tensor in plain.items():
            error = (kernel[site] - tensor).norm() / max(tensor.norm(), 1e-3 * largest)
            assert error < 1e-4, f"{site}: {error:.1e}"
