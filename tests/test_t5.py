"""Is T5, 1.0, 1.1 and Flan, the model that transformers runs?"""

import json
import tempfile
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from linears import hooks_of, site_by_site
from safetensors.torch import load_file, save_file

from minipeft.errors import InputError
from minipeft.models.attention import Packed
from minipeft.models.hooks import Linear
from minipeft.models.loading import load_model, read_config
from minipeft.models.rows import Rows
from minipeft.models.t5 import T5, T5Config, distance_buckets, key_of

SIZES = {"vocab_size": 61, "d_model": 24, "d_kv": 8, "d_ff": 40, "num_layers": 2, "num_heads": 3,
         "decoder_start_token_id": 0, "layer_norm_epsilon": 1e-5}  # fmt: skip
CASES = {  # settings beyond SIZES; tie_word_embeddings false: a head of its own, unscaled
    "1.0": {},
    "1.1 and flan": {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False},
    "gated by silu": {"feed_forward_proj": "gated-silu", "tie_word_embeddings": False},
    "gated, tied": {"feed_forward_proj": "gated-gelu"},
    "deeper decoder": {"num_decoder_layers": 3, "num_heads": 5, "d_kv": 3},
    "few buckets": {"relative_attention_num_buckets": 5, "relative_attention_max_distance": 20, "d_ff": 17},
}  # fmt: skip
READ, WRITTEN = [3, 200, 1, 17, 8, 9, 64, 40, 2], [1, 7, 60, 17, 8, 2, 9, 33, 5]


def make_reference(changes, seed=0):
    """A transformers model with eager attention whose every weight, norm and bias is far from its start value."""
    config = transformers.T5Config(**SIZES | changes)
    config._attn_implementation = "eager"
    model = transformers.T5ForConditionalGeneration(config).eval()
    assert model.config._attn_implementation == "eager"
    if changes.get("tie_word_embeddings") is False:
        model.lm_head.weight = torch.nn.Parameter(torch.empty(61, config.d_model))  # transformers 5 ties it always
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            noise = torch.randn(weight.shape, generator=generator)
            if weight.ndim == 1:
                weight.copy_(1 + 0.3 * noise)
            elif name.endswith(("relative_attention_bias.weight", "shared.weight")):
                weight.copy_(noise)
            else:
                weight.copy_(noise / weight.shape[1] ** 0.5)
    return model


def save(reference, folder, spelling=5):
    """A folder as transformers 5 writes it, or as 4 did."""
    reference.save_pretrained(folder)
    path = Path(folder) / "config.json"
    fields = json.loads(path.read_text())
    if spelling == 4:
        fields["tie_word_embeddings"] = fields.pop("scale_decoder_outputs")
        fields["torch_dtype"] = fields.pop("dtype")
    path.write_text(json.dumps(fields))
    assert ("lm_head.weight" in load_file(Path(folder) / "model.safetensors")) != reference.config.scale_decoder_outputs


def make_sequences(lengths, vocab_size=61, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(vocab_size, (n,), generator=generator).tolist() for n in lengths]


def make_pairs(read=READ, written=WRITTEN):
    return make_sequences(read), make_sequences(written, seed=2)


@torch.no_grad()
def reference_logits(reference, inputs, targets):
    """Each pair alone, so that nothing is padded."""
    return [reference(torch.tensor([i]), decoder_input_ids=torch.tensor([[0, *t[:-1]]]), use_cache=False).logits[0]
            for i, t in zip(inputs, targets)]  # fmt: skip


@torch.no_grad()
def reference_states(reference, inputs):
    return [reference.encoder(torch.tensor([i])).last_hidden_state[0] for i in inputs]


def largest_difference(one, other):
    assert [x.shape for x in one] == [y.shape for y in other]
    return max((x.double() - y.double()).abs().max().item() for x, y in zip(one, other))


def compare(changes, inputs, targets, spelling):
    reference = make_reference(changes)
    with tempfile.TemporaryDirectory() as folder:
        save(reference, folder, spelling)
        model = load_model(folder)
    assert model.config.scaled_output == model.config.tied_head == changes.get("tie_word_embeddings", True)
    expected = reference_logits(reference, inputs, targets)
    assert max(x.std() for x in expected) > 0.1  # a model that says something
    return max(largest_difference(model.logits(inputs, targets), expected),
               largest_difference(model.encode(inputs), reference_states(reference, inputs)))  # fmt: skip


@pytest.mark.parametrize("spelling", [4, 5])
@pytest.mark.parametrize("changes", CASES.values(), ids=CASES.keys())
def test_logits_and_encoder_states_match_transformers(changes, spelling):
    assert compare(changes, *make_pairs(), spelling) < 1e-4


@st.composite
def configurations(draw):
    heads = draw(st.integers(1, 5))
    num_buckets = draw(st.integers(4, 40))
    return {
        "num_heads": heads, "d_kv": draw(st.integers(1, 20)), "d_model": draw(st.integers(8, 40)),
        "d_ff": draw(st.integers(1, 50)), "num_layers": draw(st.integers(1, 3)),
        "num_decoder_layers": draw(st.none() | st.integers(1, 3)), "relative_attention_num_buckets": num_buckets,
        "relative_attention_max_distance": draw(st.integers(num_buckets // 2 + 1, 250)),
        "feed_forward_proj": draw(st.sampled_from(["relu", "gated-gelu", "gated-silu"])),
        "tie_word_embeddings": draw(st.booleans()),
    }  # fmt: skip


PAIRS = st.lists(st.tuples(st.integers(1, 200), st.integers(1, 60)), min_size=1, max_size=17)


@settings(max_examples=30, derandomize=True, database=None, deadline=None)
@given(changes=configurations(), lengths=PAIRS, spelling=st.sampled_from([4, 5]))
def test_logits_match_transformers_on_drawn_configurations(changes, lengths, spelling):
    assert compare(changes, *make_pairs(*zip(*lengths)), spelling) < 1e-4


def test_an_unscaled_head_may_be_tied_in_what_transformers_5_wrote(tmp_path):
    reference = make_reference(CASES["1.1 and flan"])
    reference.lm_head.weight = reference.shared.weight
    reference.save_pretrained(tmp_path)
    model, pairs = load_model(tmp_path), make_pairs([5, 9], [4, 1])
    assert model.head_linear.weight is model.embed.weight and not model.config.scaled_output
    assert largest_difference(model.logits(*pairs), reference_logits(reference, *pairs)) < 1e-4


def test_bf16_is_as_accurate_as_transformers(tmp_path):
    reference = make_reference(CASES["gated, tied"]).bfloat16()
    reference.save_pretrained(tmp_path)
    pairs, ours = make_pairs(), load_model(tmp_path, torch.bfloat16)
    assert {weight.dtype for weight in ours.parameters()} == {torch.bfloat16}
    exact = load_model(tmp_path, torch.float64).logits(*pairs)
    error = largest_difference(ours.logits(*pairs), exact)
    assert 0 < error <= 2 * largest_difference(reference_logits(reference, *pairs), exact)


@pytest.mark.parametrize("num_buckets, max_distance", [(32, 128), (5, 20), (4, 3), (7, 200), (32, 17), (64, 128)])
@pytest.mark.parametrize("both_ways", [True, False])
def test_buckets_match_transformers(num_buckets, max_distance, both_ways):
    theirs = transformers.models.t5.modeling_t5.T5Attention._relative_position_bucket
    ages = torch.arange(-max_distance, max_distance + 1)
    ours = distance_buckets(num_buckets, max_distance, both_ways)
    assert torch.equal(ours, theirs(-ages, both_ways, num_buckets, max_distance))
    far = theirs(torch.tensor([-1000, 1000]), both_ways, num_buckets, max_distance)
    assert far.tolist() == [ours[-1], ours[0]] and ours.max() == num_buckets - 1 - (both_ways and num_buckets % 2)


def pull_of(tokens):
    """[token, C]: what each logit's gradient is, by the token its row holds."""
    return torch.randn(61, 61, generator=torch.Generator().manual_seed(3))[tokens]


class Embedded:
    """The rows that an embedding returns, as leaves: they receive a gradient though weights may not."""

    def __init__(self, embedding):
        self.rows = []
        embedding.register_forward_hook(self.keep)

    def keep(self, module, args, x):
        self.rows.append(x.detach().requires_grad_())
        return self.rows[-1]


@pytest.mark.parametrize("changes", CASES.values(), ids=CASES.keys())
def test_gradients_match_transformers(changes, tmp_path):
    """Of the embedded rows and of every weight, so of every step between them and the logits."""
    reference = make_reference(changes)
    save(reference, tmp_path)
    model = load_model(tmp_path).requires_grad_(True)
    inputs, targets = make_pairs([3, 40, 17, 150], [5, 1, 30, 2])
    ours, theirs = Embedded(model.embed), [Embedded(e.embed_tokens) for e in (reference.encoder, reference.decoder)]
    read, write, cross = model.pack_pairs(inputs, targets)
    logits = model.head(model.decode_rows(write, model.cross_keys(model.encode_rows(read)), cross))
    (logits * pull_of(write.tokens)).sum().backward()
    for i, t in zip(inputs, targets):
        start = torch.tensor([[0, *t[:-1]]])
        logits = reference(torch.tensor([i]), decoder_input_ids=start, use_cache=False).logits
        (logits * pull_of(start)).sum().backward()
    assert [len(e.rows) for e in (ours, *theirs)] == [2, 4, 4]
    expected = {f"{name} rows": torch.cat([x.grad[0] for x in e.rows]) for name, e in zip(("input", "target"), theirs)}
    found = dict(zip(expected, (x.grad for x in ours.rows)))
    expected |= {name: weight.grad for name, weight in reference.named_parameters()}
    found |= {key_of(name, model.config.gated): weight.grad for name, weight in model.named_parameters()}
    assert found.keys() == expected.keys()
    for name, grad in expected.items():
        if grad is None:
            assert name == "shared.weight" and found[name] is None and not model.config.tied_head
        else:
            assert (found[name] - grad).norm() < 1e-5 * grad.norm(), name


def make_model(**changes):
    shape = {"vocab_size": 61, "width": 24, "num_layers": 2, "num_decoder_layers": 3, "num_heads": 3, "head_dim": 8,
             "mlp_width": 40, "start_token": 7, "gated": True}  # fmt: skip
    model = T5(T5Config(**shape | changes))
    generator = torch.Generator().manual_seed(0)
    for name, weight in model.named_parameters():
        noise = torch.randn(weight.shape, generator=generator)
        weight.copy_(1 + 0.3 * noise if weight.ndim == 1 else noise / weight.shape[1] ** (0.5 * ("bias" not in name)))
    return model


@site_by_site
def row_by_row(site, x, weight, bias):
    """With a matrix product that takes each row alone: all else keeps a sequence's bits."""
    return torch.stack([F.linear(row, weight, bias) for row in x])


def states_and_gradients(model, inputs, targets):
    """The decoder's hidden states, and the gradient of the embedded input rows, both in pieces."""
    embedded = Embedded(model.embed)
    read, write, cross = model.pack_pairs(inputs, targets)
    memory = model.encode_rows(read, row_by_row)
    h = model.decode_rows(write, model.cross_keys(memory, row_by_row), cross, row_by_row)
    h.square().sum().backward()
    model.embed._forward_hooks.clear()
    return write.split(h.detach()), read.split(embedded.rows[0].grad)


@settings(max_examples=15, derandomize=True, database=None, deadline=None)
@given(
    mine=st.tuples(st.integers(1, 50), st.integers(1, 20)), gated=st.booleans(),
    before=st.lists(st.tuples(st.integers(1, 40), st.integers(1, 20)), max_size=4),
    after=st.lists(st.tuples(st.integers(1, 40), st.integers(1, 20)), max_size=4),
)  # fmt: skip
def test_a_pairs_bits_do_not_depend_on_company(mine, before, after, gated):
    model, place = make_model(gated=gated, mlp_width=33), len(before)
    inputs, targets = make_pairs(*zip(*before, mine, *after))
    together = states_and_gradients(model, inputs, targets)
    alone = states_and_gradients(model, inputs[place : place + 1], targets[place : place + 1])
    for one, other in zip(together, alone):
        assert torch.equal(one[place], other[0]) and other[0].abs().max() > 0


def test_rewriting_one_pair_changes_nobody_else():
    model, (inputs, targets) = make_model(), make_pairs()
    before = states_and_gradients(model, inputs, targets)
    inputs[3], targets[3] = [60 - t for t in inputs[3]], [60 - t for t in targets[3]]
    after = states_and_gradients(model, inputs, targets)
    for one, other in zip(before, after):
        assert [torch.equal(x, y) for x, y in zip(one, other)] == [i != 3 for i in range(9)]


def test_several_targets_can_see_one_input():
    model, (inputs, targets) = make_model(), make_pairs([20, 9], [4, 5])
    expected = model.logits([inputs[0], inputs[1], inputs[0]], [targets[0], targets[0], targets[1]])
    read = Rows.pack(inputs, causal=False)
    write = Rows.pack([[7, *t[:-1]] for t in (targets[0], targets[0], targets[1])])
    cross = Packed.plan(write.lengths, False, "cpu", k_lengths=read.lengths, sees=torch.tensor([0, 1, 0]).numpy())
    h = model.decode_rows(write, model.cross_keys(model.encode_rows(read)), cross)
    assert largest_difference(write.split(model.head(h)), expected) < 1e-5


@pytest.mark.parametrize("gated", [True, False])
def test_every_linear_map_is_a_site_in_forward_order_on_its_side(gated):
    model, calls = make_model(gated=gated), []
    read, write, cross = model.pack_pairs(*make_pairs([5, 1, 30], [2, 3, 4]))

    def linear_of(num_rows):
        @hooks_of
        def linear(sites, x, weights, biases):
            assert x.shape[0] == num_rows and biases == [None] * len(sites)
            calls.append((sites, [tuple(weight.shape[::-1]) for weight in weights]))
            return tuple(F.linear(x, weight) for weight in weights)

        return linear

    keys = model.cross_keys(model.encode_rows(read, linear_of(36)), linear_of(36))
    h = model.decode_rows(write, keys, cross, linear_of(9))
    assert tuple(sites for sites, _ in calls) == model.shared_inputs
    assert [(s, shape) for sites, shapes in calls for s, shape in zip(sites, shapes)] == list(model.sites.items())
    assert len(model.sites) == 2 * (6 + gated) + 3 * (10 + gated)
    model.head(h[[0, 5]], linear_of(2))
    assert calls[-1] == (("head",), [(24, 61)])
    maps = {m.site for m in model.modules() if isinstance(m, Linear)}
    assert maps == {*model.sites, "head"}
    assert {"encoder.layers.1.attn.q", "encoder.layers.0.mlp.up", "decoder.layers.2.attn.o", "decoder.layers.0.cross.k",
            "decoder.layers.2.mlp.down"} <= maps  # fmt: skip
    assert ("decoder.layers.0.mlp.gate" in maps) == gated


def test_what_linear_adds_at_a_site_equals_an_edited_weight():
    read, write, cross = make_model().pack_pairs(*make_pairs([5, 1, 30], [2, 3, 4]))
    for site, (K, N) in make_model().sites.items():
        edited, delta = make_model(), torch.randn(N, K, generator=torch.Generator().manual_seed(2)) / K

        @site_by_site
        def linear(at, x, weight, bias, site=site, delta=delta):
            y = F.linear(x, weight, bias)
            return y + x @ delta.T if at == site else y

        def hidden(*linear, model=edited):
            return model.decode_rows(write, model.cross_keys(model.encode_rows(read, *linear), *linear), cross, *linear)

        plain, added = hidden(), hidden(linear)
        next(m for m in edited.modules() if getattr(m, "site", None) == site).weight += delta
        assert (added - hidden()).abs().max() < 1e-4, site
        assert (added - plain).abs().max() > 1e-3, site


def test_weights_are_frozen():
    assert not any(weight.requires_grad for weight in make_model().parameters())


def test_pairs_that_are_none_are_refused():
    model = make_model()
    beyond = model.config.vocab_size
    for inputs, targets, message in (([[1]], [[1], [2]], "1 inputs and 2 targets; needed one for each"),
                                     ([[1], [2]], [[1], []], "target ids: needed at least one sequence and no empty"),
                                     ([[1]], [[1, beyond]], f"target ids from 1 to {beyond}, but"),
                                     ([[1]], [1], "target ids: number 0 is 1; needed a list of lists")):  # fmt: skip
        with pytest.raises(InputError, match=message):
            model.logits(inputs, targets)


# config.json as found in the wild: (fields, what they mean)

T5_SMALL = {
    "architectures": ["T5ForConditionalGeneration"], "d_ff": 2048, "d_kv": 64, "d_model": 512,
    "decoder_start_token_id": 0, "dropout_rate": 0.1, "eos_token_id": 1, "initializer_factor": 1.0,
    "is_encoder_decoder": True, "layer_norm_epsilon": 1e-06, "model_type": "t5", "n_positions": 512, "num_heads": 8,
    "num_layers": 6, "output_past": True, "pad_token_id": 0, "relative_attention_num_buckets": 32,
    "vocab_size": 32128,
}  # fmt: skip
FLAN_T5_SMALL = {
    "architectures": ["T5ForConditionalGeneration"], "d_ff": 1024, "d_kv": 64, "d_model": 512,
    "decoder_start_token_id": 0, "dense_act_fn": "gelu_new", "dropout_rate": 0.1, "eos_token_id": 1,
    "feed_forward_proj": "gated-gelu", "initializer_factor": 1.0, "is_encoder_decoder": True, "is_gated_act": True,
    "layer_norm_epsilon": 1e-06, "model_type": "t5", "n_positions": 512, "num_decoder_layers": 8, "num_heads": 6,
    "num_layers": 8, "output_past": True, "pad_token_id": 0, "relative_attention_max_distance": 128,
    "relative_attention_num_buckets": 32, "tie_word_embeddings": False, "torch_dtype": "float32", "use_cache": True,
    "vocab_size": 32128,
}  # fmt: skip
SMALL = T5Config(32128, 512, 6, 6, 8, 64, 2048, 0)
FLAN = T5Config(32128, 512, 8, 8, 6, 64, 1024, 0, gated=True, tied_head=False, scaled_output=False)
FOUND = {
    "t5": (T5_SMALL, SMALL),
    "flan": (FLAN_T5_SMALL, FLAN),
    "flan, from transformers 5": (
        {**FLAN_T5_SMALL, "tie_word_embeddings": True, "scale_decoder_outputs": False}, replace(FLAN, tied_head=True)),
    "t5, from transformers 5": ({**T5_SMALL, "tie_word_embeddings": True, "scale_decoder_outputs": True}, SMALL),
}  # fmt: skip


@pytest.mark.parametrize("fields, expected", FOUND.values(), ids=FOUND.keys())
def test_config_of_published_models(fields, expected, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(fields))
    assert read_config(tmp_path)[1] == expected
    assert expected.max_positions is None


REFUSED = {
    "an encoder alone": ({"is_encoder_decoder": False}, "is_encoder_decoder is false or is_decoder is true"),
    "a decoder": ({"is_decoder": True}, "is_encoder_decoder is false or is_decoder is true"),
    "another mlp": ({"feed_forward_proj": "gated-relu"}, "feed_forward_proj is 'gated-relu'"),
    "another activation": ({"dense_act_fn": "gelu"}, "dense_act_fn is 'gelu'"),
    "half a gate": ({"is_gated_act": True}, "is_gated_act is True but feed_forward_proj is 'relu'"),
    "a scale too many": ({"tie_word_embeddings": False, "scale_decoder_outputs": True}, "only a tied head is scaled"),
    "no start": ({"decoder_start_token_id": None}, "'decoder_start_token_id' is missing"),
    "a start past the end": ({"decoder_start_token_id": 32128}, "decoder_start_token_id is 32128"),
    "too few buckets": ({"relative_attention_num_buckets": 3}, "relative_attention_num_buckets is 3"),
    "too short a distance": ({"relative_attention_max_distance": 16}, "relative_attention_max_distance is 16"),
    "no decoder": ({"num_decoder_layers": 0}, "num_decoder_layers is 0"),
    "no width": ({"d_model": None}, "'d_model' is missing"),
}  # fmt: skip


@pytest.mark.parametrize("changes, words", REFUSED.values(), ids=REFUSED.keys())
def test_refused_with_one_clear_line(changes, words, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({**T5_SMALL, **changes}))
    with pytest.raises(InputError) as error:
        read_config(tmp_path)
    assert words in str(error.value) and "\n" not in str(error.value) and len(str(error.value)) < 300 + len(
        str(tmp_path))


def edit(folder, change):
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def test_copies_of_the_embedding_and_an_unused_bias_may_be_in_the_file(tmp_path):
    reference, pairs = make_reference({}), make_pairs([5, 9], [4, 1])
    save(reference, tmp_path)
    copies = [f"{name}.weight" for name in ("encoder.embed_tokens", "decoder.embed_tokens", "lm_head")]
    unused = "decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight"
    edit(tmp_path, lambda weights: weights.update({key: weights["shared.weight"].clone() for key in copies}))
    edit(tmp_path, lambda weights: weights.update({unused: torch.ones(32, 3)}))
    assert largest_difference(load_model(tmp_path).logits(*pairs), reference_logits(reference, *pairs)) < 1e-4
    edit(tmp_path, lambda weights: weights["decoder.embed_tokens.weight"].add_(1))
    with pytest.raises(InputError, match=r"decoder.embed_tokens.weight differs from shared.weight"):
        load_model(tmp_path)


def test_a_head_of_its_own_is_needed_where_it_is_not_tied(tmp_path):
    save(make_reference(CASES["1.1 and flan"]), tmp_path, spelling=4)
    edit(tmp_path, lambda weights: weights.pop("lm_head.weight"))
    with pytest.raises(InputError, match=r"lm_head.weight is missing, needed \[61, 24\]"):
        load_model(tmp_path)
