"""Does generation say what transformers says, token for token, whoever else is generated with it?"""

import numpy as np
import pytest
import test_gemma2
import test_gpt2
import test_gpt_neox
import test_t5
import torch
from test_decoder import make_reference, make_sequences

from minipeft.models.generate import Cache, Memory, Sampling, Step, generate
from minipeft.models.hooks import Hooks
from minipeft.models.loading import load_model

BASES = {  # family -> transformers' model, of 256 positions
    "llama": lambda: make_reference("llama", {}, "llama3"),
    "mistral": lambda: make_reference("mistral", {"sliding_window": 7}),
    "qwen2": lambda: make_reference("qwen2", {"num_key_value_heads": 6}),
    "qwen3": lambda: make_reference("qwen3", {"head_dim": 10, "tie_word_embeddings": True}),
    "phi3": lambda: make_reference("phi3", {"sliding_window": 7}),
    "gemma2": lambda: make_reference("gemma2", test_gemma2.SMALL),
    "gpt2": lambda: test_gpt2.make_reference("gpt2", test_gpt2.SIZES | {"n_positions": 256, "n_layer": 3}),
    "gpt_neox": lambda: test_gpt2.make_reference("gpt_neox", test_gpt_neox.SIZES | {"max_position_embeddings": 256}),
}
NEW = 12


@pytest.fixture(scope="module", params=BASES)
def base(request, tmp_path_factory):
    """(ours, transformers'), in fp64, so that no two tokens are nearly as likely as each other."""
    folder = tmp_path_factory.mktemp(request.param)
    reference = BASES[request.param]().double()
    reference.save_pretrained(folder)
    ours = load_model(folder, torch.float64)
    ends = reference.generation_config.eos_token_id
    assert ours.stop_tokens == (() if ends is None else (ends,))
    ours.stop_tokens = ()
    return ours, reference


def prompts(number=50):
    return make_sequences(np.random.default_rng(0).integers(1, 60, number).tolist())


@torch.no_grad()
def greedily(reference, sequence, num_tokens, stop=()):
    """transformers' own greedy loop."""
    ids = torch.tensor([sequence])
    new = reference.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=num_tokens, do_sample=False,
                             eos_token_id=list(stop) or None, pad_token_id=0)  # fmt: skip
    return new[0, len(sequence) :].tolist()


def test_fifty_prompts_token_for_token(base):
    ours, reference = base
    sequences = prompts()
    new = ours.generate(sequences, NEW)
    assert new == [greedily(reference, sequence, NEW) for sequence in sequences]
    assert len({tuple(tokens) for tokens in new}) > 25  # a base that says something


def test_every_token_is_the_likeliest_after_all_before_it(base):
    ours, _ = base
    sequences = prompts(5)
    for sequence, new in zip(sequences, ours.generate(sequences, NEW)):
        (logits,) = ours.logits([[*sequence, *new]])
        assert logits[len(sequence) - 1 : -1].argmax(-1).tolist() == new


def test_each_sequence_stops_on_its_own(base):
    ours, reference = base
    sequences = prompts(10)
    stop = [greedily(reference, sequences[0], 4)[3], greedily(reference, sequences[1], 9)[8]]
    new = ours.generate(sequences, NEW, stop=stop)
    assert new == [greedily(reference, sequence, NEW, stop) for sequence in sequences]
    assert 1 < len({len(tokens) for tokens in new}) and any(tokens[-1] in stop for tokens in new)
    ours.stop_tokens = tuple(stop)  # the base's own, unless others are given
    assert ours.generate(sequences, NEW) == new and ours.generate(sequences, NEW, stop=[]) != new
    ours.stop_tokens = ()


def test_sampling_does_not_depend_on_the_company(base):
    ours, _ = base
    sequences, options = prompts(12), {"temperature": 0.9, "top_k": 20, "top_p": 0.9, "seed": 3}
    together = ours.generate(sequences, NEW, stop=[5, 6, 7], **options)
    assert together == ours.generate(sequences, NEW, stop=[5, 6, 7], **options)
    assert together[0] == ours.generate(sequences[:1], NEW, stop=[5, 6, 7], **options)[0]
    assert together != ours.generate(sequences, NEW, stop=[5, 6, 7], **options | {"seed": 4})


def test_choices_have_the_probabilities_they_should():
    logits, n = torch.tensor([1.0, 3.0, 2.0, 0.0, -50.0]), 20_000
    draws = (torch.arange(n) + 0.5) / n

    def shares(**options):
        tokens = Sampling(**options).choose(logits.expand(n, -1), draws.double())
        return torch.bincount(tokens, minlength=5) / n

    torch.testing.assert_close(shares(temperature=1.0), logits.softmax(0), atol=1e-3, rtol=0)
    torch.testing.assert_close(shares(temperature=0.5), (2 * logits).softmax(0), atol=1e-3, rtol=0)
    two = torch.tensor([-torch.inf, 3.0, 2.0, -torch.inf, -torch.inf]).softmax(0)
    torch.testing.assert_close(shares(temperature=1.0, top_k=2), two, atol=1e-3, rtol=0)
    torch.testing.assert_close(shares(temperature=1.0, top_p=0.8), two, atol=1e-3, rtol=0)  # 0.64, then 0.24
    assert shares(temperature=1.0, top_p=0.6)[1] == 1 and shares(temperature=1.0, top_k=1)[1] == 1
    assert shares()[1] == 1


@pytest.mark.parametrize("temperature", [5e-324, 1e-30])
def test_next_to_no_temperature_is_greedy_and_a_giant_one_draws_evenly(temperature):
    logits = torch.tensor([[1.0, 3.0, 2.0, -torch.inf]]).expand(100, -1)
    draws = (torch.arange(100).double() + 0.5) / 100
    assert set(Sampling(temperature=temperature).choose(logits, draws).tolist()) == {1}
    even = Sampling(temperature=1e308).choose(logits, draws)
    assert (torch.bincount(even, minlength=4) - torch.tensor([33, 33, 33, 0])).abs().max() <= 1


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("options", [{}, {"temperature": 0.7, "top_k": 2}], ids=["greedy", "sampled"])
def test_logits_that_are_no_numbers_are_an_error(options, bad):
    logits = torch.tensor([[1.0, 3.0, 2.0], [0.0, bad, 1.0]])
    with pytest.raises(ValueError, match=r"^generate: the logits of 1 of 2 sequences are NaN or infinite; look for "):
        Sampling(**options).choose(logits, torch.zeros(2).double())


def test_every_pass_is_told_whose_rows_it_has(base):
    """An adapter that belongs to some sequences acts on their rows only, in the prompt pass and in every step."""
    ours, _ = base
    sequences = prompts(6)
    owned, told = np.array([True, False, True, False, False, True]), []
    shift = torch.randn(ours.config.width, generator=torch.Generator().manual_seed(0)).double()

    def hooks_of(lengths, whose):
        told.append(lengths)
        mine = torch.from_numpy(np.repeat(owned, lengths))[:, None]

        class Shifting(Hooks):
            def linear(self, sites, x, weights, biases):
                x = torch.where(mine, x + shift, x) if sites[-1].endswith(".v") else x
                return super().linear(sites, x, weights, biases)

        return Shifting()

    stop = [ours.generate(sequences, 3)[1][2]]
    mixed = generate(ours, sequences, NEW, stop, hooks_of=hooks_of)
    plain = ours.generate(sequences, NEW, stop=stop)
    for number, mine in enumerate(owned):
        assert (mixed[number] == plain[number]) != mine
    assert told[0].tolist() == [len(sequence) for sequence in sequences] and told[1].tolist() == [1] * 6
    assert told[-1].sum() < 6 and all(lengths.max() <= 1 for lengths in told[1:])


@pytest.mark.parametrize("message, options", [
    ("max_new_tokens is 0; needed at least 1", {"max_new_tokens": 0}),
    ("temperature is -1; needed a finite number, 0 or more", {"temperature": -1}),
    ("temperature is inf; needed a finite number", {"temperature": float("inf")}),
    ("temperature is nan; needed a finite number", {"temperature": float("nan")}),
    ("top_k is 0; needed at least 1", {"temperature": 1, "top_k": 0}),
    ("top_p is 1.5; needed above 0 and at most 1", {"temperature": 1, "top_p": 1.5}),
    ("top_k and top_p choose among sampled tokens; give a temperature", {"top_k": 3}),
    ("sequence 1 has 40 tokens and may get 300 more, but this base has 256 positions", {"max_new_tokens": 300}),
])  # fmt: skip
def test_options_that_make_no_sense_are_errors(base, message, options):
    with pytest.raises(ValueError, match=message):
        base[0].generate(make_sequences([3, 40]), **{"max_new_tokens": 5} | options)


# ---- One long sequence among short ones ----------------------------------------------------------------------------


def steps(lengths, chosen, number=3, heads=(4, 2), window=None):
    """Attention outputs of these among sequences of these lengths, step by step: [number, len(chosen), H, D]; and the
    cache. What a sequence holds and asks depends on its length alone."""
    rows = [torch.randn(n + number, 3, 4, 8, generator=torch.Generator().manual_seed(n)) for n in lengths]  # q, k, v
    first = torch.cat([own[:n] for own, n in zip(rows, lengths)])
    cache, outputs = Cache.of(np.array(lengths), "cpu", number), []
    cache.put(0, first[:, 1, : heads[1]], first[:, 2, : heads[1]])
    for turn in range(number):
        q, k, v = torch.stack([own[n + turn] for own, n in zip(rows, lengths)]).unbind(1)
        cache.step()
        outputs.append(Step(cache)(0, q, k[:, : heads[1]], v[:, : heads[1]], window)[chosen])
    return torch.stack(outputs), cache


@pytest.mark.parametrize("window", [None, 5])
def test_a_steps_attention_has_the_same_bits_in_any_company(window):
    lengths = [10, 700, 3, 11, 10, 40]
    together, _ = steps(lengths, list(range(6)), window=window)
    for place, length in enumerate(lengths):
        alone, _ = steps([length], [0], window=window)
        assert torch.equal(together[:, place], alone[:, 0])


def test_a_long_sequence_does_not_make_the_others_caches_long():
    cache = Cache.of(np.array([2000] + [10] * 63), "cpu", 12)
    cache.put(0, *torch.zeros(2, 2630, 2, 8))
    held = sum(shelf.keys[0].shape[0] * shelf.keys[0].shape[1] for shelf in cache.shelves)
    seen = sum(ages.numel() for ages in cache.ages())
    assert held <= 1.5 * (2016 + 63 * 32) and seen <= 1.5 * (2000 + 63 * 16)
    cache.keep(torch.arange(1, 64))
    assert [tuple(shelf.keys[0].shape) for shelf in cache.shelves] == [(63, 32, 2, 8)]
    assert sum(ages.numel() for ages in Memory(cache).masks) == 63 * 16


@pytest.mark.parametrize("chosen", [[0, 2, 5], [3], [1, 4]])
def test_who_stays_is_not_touched_when_others_leave(chosen):
    lengths = [10, 70, 3, 11, 10, 40]
    _, cache = steps(lengths, [0])
    _, alone = steps([lengths[i] for i in chosen], [0])
    cache.keep(torch.tensor(chosen))
    q, k, v = torch.randn(3, len(chosen), 4, 8, generator=torch.Generator().manual_seed(0))
    for one in (cache, alone):
        one.step()
    ours, theirs = (Step(one)(0, q, k[:, :2], v[:, :2]) for one in (cache, alone))
    assert torch.equal(ours, theirs) and torch.equal(cache.lengths, alone.lengths)


# ---- T5 ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def t5(tmp_path_factory):
    folder = tmp_path_factory.mktemp("t5")
    reference = test_t5.make_reference(test_t5.CASES["1.1 and flan"]).double()
    test_t5.save(reference, folder)
    ours = load_model(folder, torch.float64)
    assert ours.stop_tokens == (reference.config.eos_token_id,)
    ours.stop_tokens = ()
    return ours, reference


@torch.no_grad()
def written(reference, sequence, stop=()):
    """transformers' own greedy loop, without the start token."""
    ids = torch.tensor([sequence])
    new = reference.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW, do_sample=False,
                             eos_token_id=list(stop) or None, pad_token_id=0)  # fmt: skip
    return new[0, 1:].tolist()


def test_t5_fifty_inputs_token_for_token(t5):
    ours, reference = t5
    inputs = prompts()
    new = ours.generate(inputs, NEW)
    assert new == [written(reference, sequence) for sequence in inputs]
    assert len({tuple(tokens) for tokens in new}) > 25
    stop = [new[0][2], new[1][5]]
    stopped = ours.generate(inputs, NEW, stop=stop)
    assert stopped == [written(reference, sequence, stop) for sequence in inputs] != new


def test_t5_tokens_are_the_likeliest_after_all_before_them(t5):
    ours, _ = t5
    inputs = prompts(6)
    new = ours.generate(inputs, NEW)
    for tokens, logits in zip(new, ours.logits(inputs, new)):
        assert logits.argmax(-1).tolist() == tokens
    assert ours.generate(inputs[2:3], NEW, temperature=0.8, seed=1) != new[2:3]
