"""Does every method do in a fused pass what its paper says, for every user, on every kind of base?"""

import copy
import types
from dataclasses import replace

import numpy as np
import pytest
import torch
from plain_methods import plain_log_probs
from stores import through_a_store
from test_recompute import fill

from minipeft import flops
from minipeft.acting import Acting
from minipeft.batch import Read
from minipeft.engine import Engine, label_scores
from minipeft.errors import InputError
from minipeft.labels import Classes, LabelSet, Question
from minipeft.methods import (
    IA3,
    BitFit,
    DoRA,
    Head,
    Houlsby,
    LayerNormTuning,
    LoRA,
    Parallel,
    Pfeiffer,
    PrefixTuning,
    PromptTuning,
    PTuning,
    Stack,
    VeRA,
)
from minipeft.methods import method as method_file
from minipeft.methods.method import Residents, Share, method_from
from minipeft.models import gpt2
from minipeft.models.bert import Bert, BertConfig
from minipeft.models.classifier import Classifier
from minipeft.models.decoder import Decoder, DecoderConfig
from minipeft.models.loading import fingerprint
from minipeft.models.rows import Rows
from minipeft.models.t5 import T5, T5Config
from minipeft.schedule import Adapter, Job, PassConfig, Run, TrainConfig
from minipeft_kernels.segments import Segments

METHODS = {
    "lora": LoRA(3, sites=("q", "v", "down")),
    "rslora": LoRA(4, sites=("k", "o", "up"), scaling="rslora", ranks=(("up", 9), ("layers.1.attn.k", 2)),
                   alphas=(("o", 3.0),)),
    "embedding": LoRA(2, sites=("embed", "q")),
    "vocabulary": LoRA(3, sites=("head", "embed"), ranks=(("head", 5),), alphas=(("embed", 2.0),)),
    "dora": DoRA(3, sites=("q", "v", "down")),
    "dora, head": DoRA(2, sites=("head", "k")),
    "vera": VeRA(16, sites=("q", "down")),
    "ia3": IA3(),
    "layernorm": LayerNormTuning(),
    "bitfit": BitFit(),
    "houlsby": Houlsby(reduction=4),
    "pfeiffer": Pfeiffer(reduction=8, activation="silu"),
    "parallel": Parallel(reduction=4, activation="gelu"),
    "prompt": PromptTuning(5),
    "prefix": PrefixTuning(3),
    "prefix of an MLP": PrefixTuning(4, hidden=7),
    "ptuning": PTuning(4, hidden=6),
    "ptuning by MLP": PTuning(3, encoder="mlp", hidden=9),
    "head": Head(),
}
LABELS = [[5], [6, 7], [6, 8]]


def make_bases():
    """Decoder's head is its own, GPT-2's and T5's is the embedding, T5's reads a scaled stream."""
    return {
        "decoder": fill(Decoder(DecoderConfig(60, 32, 2, 4, 2, 8, 48, qkv_bias=True))),
        "gpt2": fill(gpt2.GPT2(gpt2.GPT2Config(60, 32, 2, 4, 48, scales=(0.35,) * 2))),
        "t5": fill(T5(T5Config(60, 32, 2, 2, 4, 8, 48, start_token=0, gated=True))),
        "bert": Classifier(fill(Bert(BertConfig(60, 32, 2, 4, 48))), 3),
    }


BASES = make_bases()
EXACT = {name: copy.deepcopy(base).double() for name, base in BASES.items()}


def labels_of(base):
    if isinstance(base, Classifier):
        return Classes(3)
    return LabelSet(LABELS, start=0 if isinstance(base, T5) else None)


def applies(method, base):
    try:
        method.check(base)
    except InputError:
        return False
    return True


CASES = [(name, kind) for name in BASES for kind, method in METHODS.items() if applies(method, BASES[name])]


def of_base(method, base):
    """The method as that base's users have it: with a head on an encoder."""
    return Stack((method, Head())) if isinstance(base, Classifier) and method.name != "head" else method


def questions(rng, number):
    return [Question(tuple(rng.integers(9, 60, rng.integers(1, 12)).tolist()), int(rng.integers(3)))
            for _ in range(number)]  # fmt: skip


def drawn(method, base, seed=0):
    """Tensors far from the start value, where nothing is zero."""
    draw, start = torch.Generator().manual_seed(seed), method.tensors(method.initial_row(base, 0, "ann"), base)
    return {name: tensor + 0.3 * torch.randn(tensor.shape, generator=draw) for name, tensor in start.items()}


def test_what_does_not_apply_says_so():
    refused = {(name, kind) for name in BASES for kind in METHODS} - set(CASES)
    assert refused == {("t5", "bitfit"), ("decoder", "head"), ("gpt2", "head"), ("bert", "vocabulary"),
                       ("bert", "dora, head")}  # fmt: skip
    for name, kind in refused:
        with pytest.raises(InputError, match=r"no site of this base is called 'head'|no biases|no place for a head"):
            METHODS[kind].check(BASES[name])


@pytest.mark.parametrize("name, kind", CASES)
def test_gradients_are_those_of_the_plain_method(name, kind):
    """Of one step, between two other users, against autograd through a single user's equations in fp64."""
    base, rng = BASES[name], np.random.default_rng(0)
    method, labels = of_base(METHODS[kind], base), labels_of(base)
    tensors, mine = drawn(method, base), questions(rng, 5)
    engine, runs = Engine(base, labels), []
    for user in ("bob", "ann", "cem"):
        row = method.row(tensors if user == "ann" else drawn(method, base, len(user)), base)
        job = Job(user, mine if user == "ann" else questions(rng, 4), mine, TrainConfig(method, batch_size=5))
        bank, slot = engine.admit(user, method, row)
        runs.append(Run(job, bank, slot, engine.virtual(bank)))
    engine.train_step(runs)
    found = method.tensors(engine._banks[0].bank.grads[1], base)

    exact = {name: tensor.double().requires_grad_() for name, tensor in tensors.items()}
    reads = [labels.training_read(question) for question in mine]
    losses = []
    for read in reads:
        log_probs = plain_log_probs(EXACT[name], method, exact, read)
        losses += [-log_probs[row, target] for row, target in enumerate(read.targets)]
    torch.stack(losses).mean().backward()
    largest = max(tensor.grad.norm() for tensor in exact.values())
    for name_, tensor in exact.items():  # a bias of keys has none: softmax does not see it
        error = (found[name_].double() - tensor.grad).norm() / max(tensor.grad.norm(), 1e-3 * largest)
        assert error < 2e-4, f"{name_}: gradients differ by {error:.1e} of their norm"


@pytest.mark.parametrize("name, kind", [case for case in CASES if not case[1].startswith(("prompt", "prefix", "ptun"))])
def test_the_start_changes_nothing(name, kind):
    base, rng = BASES[name], np.random.default_rng(1)
    method = of_base(METHODS[kind], base)
    asked = questions(rng, 6)
    own = {"ann": Adapter("ann", method, method.initial_row(base, 0, "ann"))}
    plain = np.full((6, 3), -np.log(3)) if isinstance(base, Classifier) else base_scores(base, asked)
    scores = label_scores(base, labels_of(base), own, {"ann": asked})["ann"]
    np.testing.assert_allclose(scores, plain, atol=2e-5)


def base_scores(base, asked):
    """Label scores of the base alone, by its three plain functions."""
    rows = []
    for question in asked:
        rows.append([])
        for label in LABELS:
            if isinstance(base, T5):
                (logits,) = base.logits([question.prompt], [label])
            else:
                (logits,) = base.logits([question.prompt + tuple(label)])
                logits = logits[len(question.prompt) - 1 : -1]
            rows[-1].append(float(logits.log_softmax(-1)[range(len(label)), label].sum()))
    return np.array(rows)


@pytest.mark.parametrize("name, kind", CASES)
def test_every_tensor_moves_and_the_base_does_not(name, kind, tmp_path):
    base, rng = BASES[name], np.random.default_rng(2)
    method = of_base(METHODS[kind], base)
    before, mine = fingerprint(base), questions(rng, 6)
    config = TrainConfig(method, learning_rate=1e-2, epochs=2, batch_size=3, patience=2)
    adapter = Engine(base, labels_of(base)).train([Job("ann", mine, mine, config)])["ann"]
    assert fingerprint(base) == before
    start, end = (method.tensors(row, base) for row in (method.initial_row(base, 0, "ann"), adapter.row))
    assert method.count(base) == sum(tensor.numel() for tensor in end.values())
    assert [name for name in start if torch.equal(start[name], end[name])] == []
    (again,) = through_a_store(tmp_path, [adapter], base)
    assert torch.equal(again.row, adapter.row) and again.method == method == method_from(method.described())
    assert torch.equal(method.row(end, base), adapter.row)


def many_jobs(base, num_users=40):
    """Users under every method that applies, of every kind, with plans of their own."""
    kinds = [of_base(method, base) for method in METHODS.values() if applies(method, base)]
    if not isinstance(base, T5):
        kinds.append(of_base(LoRA(12, sites=("q", "v", "down"), dropout=0.25), base))
    jobs = []
    for u in range(num_users):
        rng = np.random.default_rng(u)
        config = TrainConfig(kinds[u % len(kinds)], learning_rate=(1e-2, 3e-3)[u % 2], epochs=1 + u % 2,
                             batch_size=2 + u % 3, seed=u % 2)  # fmt: skip
        jobs.append(Job(f"user {u}", questions(rng, 3 + u % 5), questions(rng, 2), config))
    return jobs


@pytest.mark.parametrize("name", BASES)
def test_forty_users_under_all_methods_get_what_they_get_alone(name):
    base, jobs = BASES[name], many_jobs(BASES[name])
    together = Engine(base, labels_of(base), PassConfig(slots=40)).train(jobs)
    for job in jobs:
        alone = Engine(base, labels_of(base), PassConfig(slots=1)).train([job])[job.user]
        error = (together[job.user].row - alone.row).norm() / alone.row.norm()
        assert error < 1e-5, f"{job.user} by {job.config.method}: {error:.1e}"
    asked = {job.user: job.val for job in jobs}
    scores = label_scores(base, labels_of(base), together, asked, PassConfig(slots=40))
    for job in jobs[::7]:
        mine = label_scores(base, labels_of(base), {job.user: together[job.user]}, {job.user: job.val})
        np.testing.assert_allclose(scores[job.user], mine[job.user], atol=1e-4)


@pytest.mark.parametrize("name", BASES)
def test_rewriting_one_user_changes_no_bit_of_another(name):
    base, jobs = BASES[name], many_jobs(BASES[name], 20)
    rng = np.random.default_rng(9)
    changed = [replace(job, train=[Question(tuple(rng.permutation(q.prompt).tolist()), q.label)
                                   for q in job.train]) if u == 4 else job for u, job in enumerate(jobs)]  # fmt: skip
    one, other = (Engine(base, labels_of(base), PassConfig(slots=20)).train(some) for some in (jobs, changed))
    assert not torch.equal(one["user 4"].row, other["user 4"].row)
    assert [job.user for job in jobs if not torch.equal(one[job.user].row, other[job.user].row)] == ["user 4"]


@pytest.mark.parametrize("name", BASES)
def test_deterministic_adapters_are_the_same_bits_in_any_company(name):
    base, jobs = BASES[name], many_jobs(BASES[name], 20)
    together = Engine(base, labels_of(base), PassConfig(20, deterministic=True)).train(jobs)
    for job in jobs:
        alone = Engine(base, labels_of(base), PassConfig(1, deterministic=True)).train([job])[job.user]
        assert torch.equal(together[job.user].row, alone.row), f"{job.user} by {job.config.method}"


FLOPS = {  # how much of it is multiplying number by number, which no counter of products sees
    LoRA(8, sites=("q", "v", "down")): 0, LoRA(16, sites=("embed", "head")): 0, Houlsby(reduction=4): 0,
    Pfeiffer(reduction=4): 0, Parallel(reduction=4): 0, VeRA(16, sites=("q", "down")): 2 * (16 + 32 + 16 + 32),
    DoRA(8, sites=("q", "head")): 2 * 32 + 60, PromptTuning(5): 0, IA3(): 2 * (16 + 16 + 48),
}  # fmt: skip


@pytest.mark.parametrize("method", FLOPS, ids=lambda method: method.name)
def test_flops_are_those_of_the_products_that_run(method):
    """Of one read of 32 tokens, all of which the head reads, less the base's own."""
    base, rows = BASES["decoder"], Rows.pack([list(range(9, 41))])

    def counted(shares):
        hooks = Acting(shares, [], torch.zeros(()), None)
        with flops.counter() as counter, torch.no_grad():
            base.head(base.hidden(rows, hooks), hooks)
        return counter.get_total_flops()

    residents = Residents(method, base, 1, "cpu", torch.float32)
    residents.admit("ann", method, method.row(drawn(method, base), base), 0)
    residents.begin(np.zeros(1, dtype=np.int64), training=False)
    share = Share(residents, 0, Segments.build([0], [32]), None, residents.keys, None, None, torch.zeros(()))
    assert (counted([share]) - counted([])) / 32 == method.flops(base) - FLOPS[method]


def test_flops_of_a_t5s_embedding_are_those_of_an_input_and_a_target():
    base, method, tokens = BASES["t5"], LoRA(8, sites=("embed",)), torch.arange(9, 41)
    residents = Residents(method, base, 1, "cpu", torch.float32)
    residents.admit("ann", method, method.row(drawn(method, base), base), 0)
    share = Share(residents, 0, Segments.build([0], [32]), None, residents.keys, None, None, torch.zeros(()))
    hooks = Acting([share], [], torch.zeros(()), None)
    with flops.counter() as counter, torch.no_grad():
        hooks.embed(base.embed(tokens), tokens)
        hooks.embed_targets(base.embed(tokens), tokens)
    assert counter.get_total_flops() / 32 == method.flops(base)


@pytest.mark.parametrize("kind, copies", [("dora", 1), ("embedding", 1), ("lora", 0)])
def test_slots_go_to_the_device_once_a_pass_and_only_where_something_is_derived(kind, copies, monkeypatch):
    base, copied = BASES["t5"], []
    residents = Residents(METHODS[kind], base, 2, "cpu", torch.float32)
    residents.admit("ann", METHODS[kind], METHODS[kind].row(drawn(METHODS[kind], base), base), 0)
    monkeypatch.setattr(method_file, "to_device", lambda slots, device: copied.append(slots) or torch.from_numpy(slots))
    residents.begin(np.zeros(1, dtype=np.int64), training=True)
    assert len(copied) == copies
    residents.end(np.zeros(1, dtype=np.int64))
    assert len(copied) == 2 * copies


def test_dora_keeps_no_second_copy_of_a_bf16_bases_matrices():
    base = copy.deepcopy(BASES["decoder"]).bfloat16()
    residents = Residents(METHODS["dora"], base, 2, "cpu", torch.bfloat16)
    residents.admit("ann", METHODS["dora"], METHODS["dora"].row(drawn(METHODS["dora"], base), base), 0)
    residents.begin(np.zeros(1, dtype=np.int64), training=False)
    shapes = {tuple(base.linears[site].weight.shape) for site in METHODS["dora"].chosen(base)}

    def held(value, seen):
        """Tensors that these values, their fields and what their functions close over lead to."""
        if id(value) in seen or isinstance(value, torch.nn.Module | type):
            return
        seen.add(id(value))
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, dict):
            for one in value.values():
                yield from held(one, seen)
        elif isinstance(value, list | tuple):
            for one in value:
                yield from held(one, seen)
        elif isinstance(value, types.FunctionType):
            for cell in value.__closure__ or ():
                yield from held(cell.cell_contents, seen)
        elif hasattr(value, "__dict__"):
            yield from held(vars(value), seen)

    found = list(held(residents, set()))
    assert len(found) > 30 and not [t for t in found if tuple(t.shape) in shapes and t.dtype == torch.float32]


def plain_continuation(base, method, tensors, prompt, number):
    """Greedy, one token at a time, everything computed again for each."""
    tokens = []
    for _ in range(number):
        if isinstance(base, T5):
            read = Read((0, *tokens), 1, inputs=tuple(prompt))
        else:
            read = Read((*prompt, *tokens), 1)
        tokens.append(int(plain_log_probs(base, method, tensors, read)[-1].argmax()))
    return tokens


@pytest.mark.parametrize("name", ["decoder", "gpt2", "t5"])
def test_users_under_all_methods_write_in_one_batch_what_they_write_alone(name):
    base, rng = BASES[name], np.random.default_rng(3)
    engine, asked, expected = Engine(base, labels_of(base), PassConfig(slots=4)), [], []
    for u, method in enumerate(method for method in METHODS.values() if applies(method, base)):
        tensors, prompts = drawn(method, base, u), [q.prompt for q in questions(rng, 1 + u % 2)]
        asked.append((*engine.admit(f"user {u}", method, method.row(tensors, base)), prompts))
        exact = {key: tensor.double() for key, tensor in tensors.items()}
        with torch.no_grad():
            expected.append([plain_continuation(EXACT[name], method, exact, prompt, 6) for prompt in prompts])
    assert engine.generate(asked, 6, stop=()) == expected
    assert len({tuple(tokens) for answers in expected for tokens in answers}) > 5


@pytest.mark.parametrize("name", BASES)
def test_a_personal_adapter_on_a_shared_one(name):
    """Shared + personal: the shared one acts and stays as it is; the personal one alone is trained."""
    base, rng = BASES[name], np.random.default_rng(4)
    labels, mine = labels_of(base), questions(rng, 6)
    at_head = ("head",) * (name == "decoder")  # whose head is not its embedding
    shared_method, method = LoRA(4, sites=("q", "v", "down", *at_head)), of_base(IA3(), base)
    row = shared_method.row(drawn(shared_method, base), base)
    shared = Adapter("everyone", shared_method, row)
    config = TrainConfig(method, learning_rate=1e-2, epochs=2, batch_size=3)
    jobs = [Job("ann", mine, mine, config, under=shared), Job("bob", mine, mine, config)]
    trained = Engine(base, labels).train(jobs)
    assert torch.equal(shared.row, row) and not torch.equal(trained["ann"].row, trained["bob"].row)
    merged = copy.deepcopy(base)
    tensors = shared_method.tensors(row, base)
    with torch.no_grad():
        for site in shared_method.chosen(base):
            merged.linears[site].weight += shared_method.scale_of(site) * tensors[f"{site}.B"] @ tensors[f"{site}.A"]
    on_merged = Engine(merged, labels).train([Job("ann", mine, mine, config)])["ann"]
    assert (trained["ann"].row - on_merged.row).norm() < 1e-4 * on_merged.row.norm()
    asked = {"ann": mine}
    scores = label_scores(base, labels, {"ann": trained["ann"]}, asked)["ann"]
    np.testing.assert_allclose(scores, label_scores(merged, labels, {"ann": on_merged}, asked)["ann"], atol=1e-3)
    job = Job("ann", mine, mine, replace(config, method=shared_method), start=row)
    begun = Engine(base, labels).train([job])["ann"]
    assert begun.row.shape == row.shape and (begun.row - row).norm() < row.norm()


def test_one_user_under_several_methods_at_once():
    base, rng = BASES["decoder"], np.random.default_rng(5)
    mine = questions(rng, 6)
    configs = {name: TrainConfig(METHODS[name], epochs=1) for name in ("lora", "ia3", "prompt")}
    configs |= {"rank 7": TrainConfig(LoRA(7)), "rank 8": TrainConfig(LoRA(8))}  # one bank
    jobs = [Job("ann", mine, mine, config, name=name) for name, config in configs.items()]
    together = Engine(base, labels_of(base)).train(jobs)
    for job in jobs:
        alone = Engine(base, labels_of(base)).train([job])[job.name].row
        assert (together[job.name].row - alone).norm() < 1e-5 * alone.norm()
    with pytest.raises(InputError, match="'ann' is listed twice"):
        Engine(base, labels_of(base)).train([replace(job, name="") for job in jobs])


def test_dropout_is_the_users_own_and_gone_in_evaluation():
    base, rng = BASES["decoder"], np.random.default_rng(6)
    mine = questions(rng, 8)
    config = TrainConfig(LoRA(4, dropout=0.5), learning_rate=1e-2, epochs=1, batch_size=8)
    jobs = [Job("ann", mine, mine, replace(config, method=method, seed=seed))
            for seed, method in ((0, config.method), (0, config.method), (1, config.method), (0, LoRA(4)))]
    rows = [Engine(base, labels_of(base)).train([job])["ann"].row for job in jobs]
    assert torch.equal(rows[0], rows[1]) and not torch.equal(rows[0], rows[2]) and not torch.equal(rows[0], rows[3])
    scores = [label_scores(base, labels_of(base), {"ann": Adapter("ann", method, rows[0])}, {"ann": mine})["ann"]
              for method in (config.method, LoRA(4))]  # fmt: skip
    np.testing.assert_array_equal(*scores)


@pytest.mark.parametrize("method, message", [
    (Houlsby(reduction=100), "reduction 100 makes 0 features of 32 at layers.0.attn; needed 1 to 256"),
    (Houlsby(activation="tanh"), "activation 'tanh' is unknown; choose one of relu, gelu"),
    (Pfeiffer(blocks=("ffn",)), "no site of this base is called 'ffn'; it has attn, mlp"),
    (IA3(inputs=("up",)), "'up' among inputs is none of its sites k, v, down; add it there"),
    (VeRA(0), "VeRA rank must be 1 to 16384, got 0"),
    (VeRA(10**12), "VeRA rank must be 1 to 16384, got 1000000000000"),
    (LoRA(4, scaling="rs"), "LoRA scaling 'rs' is unknown; choose one of lora, rslora"),
    (LoRA(4, dropout=1.0), "LoRA dropout must be at least 0 and below 1, in steps of 1.256, got 1.0"),
    (LoRA(4, ranks=(("q", 0),)), "LoRA rank must be at least 1, got 0"),
    (DoRA(4, sites=("embed",)), "DoRA acts at linear maps, not at the embedding"),
    (PromptTuning(0), "prompt: 0 virtual tokens; needed at least 1 and fewer than the base's positions, 2048"),
    (PromptTuning(5, start_from="text"), "prompt: start from 'text' with 0 tokens of text"),
    (PrefixTuning(2048), "prefix: 2048 virtual tokens"),
    (PTuning(encoder="gru"), "encoder 'gru' is unknown; choose one of lstm, mlp"),
    (PTuning(hidden=0), "hidden is 0 and layers 2; both must be at least 1"),
    (LayerNormTuning(("ln",)), "no site of this base is called 'ln'; it has attn_norm, mlp_norm, norm"),
    (Stack((PromptTuning(3), PTuning(3))), "two methods of one user have virtual tokens"),
    (Stack(()), "a stack holds one or more methods, and no stack"),
    (LoRA(4, sites=("q",), alphas=(("k", 2.0),)), "'k' has a rank or alpha of its own but is none of the sites q"),
    (LoRA(4, alpha=float("nan")), "LoRA alpha must be a finite number"),
    (Houlsby(reduction=0), "reduction is 0 and scale 1.0; needed at least 1"),
    (VeRA(seed=10**30), "needed 0 to 2.63 - 1 and a number"),
    (PromptTuning(5, start_from="text", text=(60,)), "text has token ids 60 to 60; this base's are 0 to 59"),
    (PromptTuning(1, start_from="text", text=(1, 2)), "text has 2 tokens but there are 1 virtual ones"),
    (PrefixTuning(3, hf_compat=True), "hf_compat is for a T5"),
    (PTuning(encoder="mlp", layers=3), "layers is 3, but those are of the LSTM"),
])  # fmt: skip
def test_what_makes_no_sense_is_refused(method, message):
    with pytest.raises(InputError, match=message):
        method.check(BASES["decoder"])


@pytest.mark.parametrize("name", BASES)
def test_all_methods_train_on_a_bf16_base_in_fp32_numbers(name):
    """And go where they go on the same base in fp32, as far as bf16 can tell."""
    exact, rounded = BASES[name], copy.deepcopy(BASES[name]).bfloat16()
    jobs = many_jobs(exact, 20)
    adapters, others = (Engine(base, labels_of(base), PassConfig(slots=20)).train(jobs) for base in (rounded, exact))
    for job in jobs:
        method, row = job.config.method, adapters[job.user].row
        start = method.initial_row(rounded, job.config.seed, job.user)
        assert row.dtype == torch.float32 and row.isfinite().all() and not torch.equal(row, start)
        moved, expected = row - start, others[job.user].row - method.initial_row(exact, job.config.seed, job.user)
        assert torch.cosine_similarity(moved, expected, 0) > 0.5, f"{job.user} by {method}"


@pytest.mark.parametrize("under, own, message", [
    (PromptTuning(3), LoRA(2), "prompt cannot lie under lora: it has virtual tokens; share a LoRA, say"),
    (IA3(), LoRA(2), "ia3 cannot lie under lora: it would rescale what lora adds"),
    (DoRA(2), DoRA(2), "dora cannot lie under dora: it would rescale what dora adds"),
    (None, LoRA(2), "the adapter under theirs has one under itself"),
    (LayerNormTuning(), LayerNormTuning(), "layernorm cannot lie under layernorm: the upper one replaces the same"),
])  # fmt: skip
def test_what_cannot_lie_under_another_is_refused(under, own, message):
    base, rng = BASES["decoder"], np.random.default_rng(7)
    nested = under is None
    under = under or own
    shared, mine = Adapter("everyone", under, under.initial_row(base, 0, "everyone")), questions(rng, 3)
    shared = replace(shared, under=shared) if nested else shared
    with pytest.raises(InputError, match=message):
        Engine(base, labels_of(base)).train([Job("ann", mine, mine, TrainConfig(own), under=shared)])


@pytest.mark.parametrize("method", [PTuning(7, hidden=48), PrefixTuning(6, hidden=40), Parallel(), Houlsby(),
                                    DoRA(3, sites=("head",)), LoRA(3, sites=("head", "embed"))])  # fmt: skip
def test_deterministic_bits_at_a_width_where_a_single_product_goes_another_way(method):
    base = fill(Decoder(DecoderConfig(200, 160, 2, 4, 2, 40, 320, qkv_bias=True)))
    jobs = [Job(f"user {u}", questions(np.random.default_rng(u), 3), questions(np.random.default_rng(u), 2),
                TrainConfig(method, epochs=1, batch_size=1)) for u in range(3)]  # fmt: skip
    together = Engine(base, labels_of(base), PassConfig(3, deterministic=True)).train(jobs)["user 0"]
    alone = Engine(base, labels_of(base), PassConfig(1, deterministic=True)).train(jobs[:1])["user 0"]
    assert torch.equal(together.row, alone.row)


@pytest.mark.parametrize("stack", [Stack((DoRA(2, sites=("k",)), IA3())), Stack((DoRA(2, sites=("q",)), BitFit()))])
def test_methods_of_one_user_at_one_site_act_one_after_another(stack):
    base, rng = BASES["decoder"], np.random.default_rng(8)
    mine = questions(rng, 4)
    trained = Engine(base, labels_of(base)).train([Job("ann", mine, mine, TrainConfig(stack, 1e-2, epochs=1))])["ann"]
    start = stack.tensors(stack.initial_row(base, 0, "ann"), base)
    moved = stack.tensors(trained.row, base)
    assert [name for name in start if torch.equal(start[name], moved[name])] == []
    silent = Adapter("ann", stack, stack.initial_row(base, 0, "ann"))
    scores = label_scores(base, labels_of(base), {"ann": silent}, {"ann": mine})
    np.testing.assert_allclose(scores["ann"], base_scores(base, mine), atol=2e-5)
