"""Is our GPT-2 the model that transformers runs, and does each of its linear maps go through its own site?"""

import json

import pytest
import torch
import torch.nn.functional as F
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from linears import hooks_of, site_by_site
from safetensors.torch import load_file, save_file
from test_decoder import largest_difference, make_sequences, reference_logits

from minipeft.errors import InputError
from minipeft.models.loading import fingerprint, load_model, read_config
from minipeft.models.rows import Rows

SIZES = {"vocab_size": 61, "n_positions": 200, "n_embd": 24, "n_layer": 2, "n_head": 6, "n_inner": 40}
CASES = {
    "plain": {},
    "odd heads": {"n_embd": 35, "n_head": 5, "n_inner": None},
    "own head": {"tie_word_embeddings": False},
    "erf gelu": {"activation_function": "gelu", "layer_norm_epsilon": 1e-3},
    "relu": {"activation_function": "relu", "n_layer": 1, "n_head": 1},
    "unscaled": {"scale_attn_weights": False, "n_layer": 1},
    "scaled by layer": {"scale_attn_by_inverse_layer_idx": True, "reorder_and_upcast_attn": True, "n_layer": 3},
}
RAGGED = [3, 200, 1, 17, 8, 9, 64, 40, 2]
INPUTS = {"q": "attn.c_attn", "o": "attn.c_proj", "up": "mlp.c_fc", "down": "mlp.c_proj"}  # site -> whose input it has


def make_reference(family, fields, seed=0):
    """A transformers model with eager attention whose every weight, norm and bias is far from its start value."""
    config = transformers.AutoConfig.for_model(family, bos_token_id=None, eos_token_id=None, **fields)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            noise = torch.randn(weight.shape, generator=generator)
            if weight.ndim == 1:
                weight.copy_(0.3 * noise if name.endswith("bias") else 1 + 0.3 * noise)
            else:
                weight.copy_(noise / weight.shape[1] ** 0.5)
    return model


def compare(family, fields, lengths, folder):
    """The largest difference of any logit between transformers, each sequence alone, and us, all in one pass."""
    reference, sequences = make_reference(family, fields), make_sequences(lengths)
    reference.save_pretrained(folder)
    expected = reference_logits(reference, sequences)
    assert max(x.std() for x in expected) > 0.1  # a model that says something
    return largest_difference(load_model(folder).logits(sequences), expected)


def compare_gradients(reference, model, inputs):
    """The gradients of a pull on the logits, at the input of every site, are transformers'."""
    sequences = make_sequences([3, 40, 17, 1])
    rows, names = Rows.pack(sequences), [*model.shared_inputs, ("head",)]
    pull = torch.randn(61, 61, generator=torch.Generator().manual_seed(3))  # [token, C]: what each logit's gradient is
    widths = {group[0]: model.sites.get(group[0], (model.config.width,))[0] for group in names}
    ours = {site: torch.zeros(len(rows.tokens), width, requires_grad=True) for site, width in widths.items()}

    @hooks_of
    def linear(sites, x, weights, biases):
        return tuple(F.linear(x + ours[sites[0]], weight, bias) for weight, bias in zip(weights, biases))

    (model.head(model.hidden(rows, linear), linear) * pull[rows.tokens]).sum().backward()

    theirs = {site: [] for site in ours}  # of each sequence
    layers = reference.base_model.h if hasattr(reference.base_model, "h") else reference.base_model.layers
    modules = {site: layers[int(site.split(".")[1])].get_submodule(inputs[site.split(".")[-1]])
               for site in ours if site != "head"} | {"head": reference.get_output_embeddings()}  # fmt: skip
    for site, module in modules.items():

        def add(module, args, site=site):
            theirs[site].append(torch.zeros_like(args[0], requires_grad=True))
            return (args[0] + theirs[site][-1],)

        module.register_forward_pre_hook(add)
    for s in sequences:
        (reference(torch.tensor([s]), use_cache=False).logits[0] * pull[s]).sum().backward()
    for site, mine in ours.items():
        expected = torch.cat([added.grad[0] for added in theirs[site]])
        assert (mine.grad - expected).norm() < 1e-5 * expected.norm(), site


def check_company(model, length, before, after):
    """With a matrix product that takes each row alone, a sequence's bits and gradients are its own."""

    def linear(sites, x, weights, biases):
        return tuple(torch.stack([F.linear(row, w, b) for row in x]) for w, b in zip(weights, biases))

    mine, *others = make_sequences([length, *before, *after])
    outputs, grads = [], []
    for sequences in ([mine], [*others[: len(before)], mine, *others[len(before) :]]):
        rows = Rows.pack(sequences)
        added = torch.zeros(len(rows.tokens), model.config.width, requires_grad=True)  # to receive the first gradient
        h = model.hidden(rows, hooks_of(lambda sites, x, weights, biases, added=added: linear(
            sites, x + added if sites[0] == "layers.0.attn.q" else x, weights, biases)))  # fmt: skip
        h.square().sum().backward()
        mine_at = slice(start := 0 if sequences[0] is mine else sum(before), start + length)
        outputs.append(h[mine_at])
        grads.append(added.grad[mine_at])
    assert torch.equal(*outputs) and torch.equal(*grads) and grads[0].abs().max() > 0


def check_sites(model):
    """Every linear map is called once, in order, by its name; what is added at a site is an edit of its own weight."""
    calls, rows = [], Rows.pack(make_sequences([5, 1, 30]))

    @site_by_site
    def noted(site, x, weight, bias):
        calls.append((site, (weight.shape[1], weight.shape[0])))
        return F.linear(x, weight, bias)

    plain = model.head(model.hidden(rows, noted), noted)
    assert calls == [*model.sites.items(), ("head", (model.config.width, 61))]
    assert len(calls) == 6 * model.config.num_layers + 1
    for site, (K, N) in calls[:-1]:
        delta = torch.randn(N, K, generator=torch.Generator().manual_seed(2)) / K

        @site_by_site
        def linear(at, x, weight, bias, site=site, delta=delta):
            y = F.linear(x, weight, bias)
            return y + x @ delta.T if at == site else y

        added = model.head(model.hidden(rows, linear))
        linear_map = next(m for m in model.layers.modules() if getattr(m, "site", None) == site)
        before = linear_map.weight.clone()
        linear_map.weight += delta
        edited = model.head(model.hidden(rows))
        linear_map.weight.copy_(before)
        assert (added - edited).abs().max() < 1e-4, site
        assert (added - plain).abs().max() > 1e-2, site
    assert all(not weight.requires_grad for weight in model.parameters())


def edit_config(folder, **changes):
    """Rewrite config.json; a field set to ... is taken out."""
    path = folder / "config.json"
    fields = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({name: value for name, value in fields.items() if value is not ...}))


def edit_weights(folder, edit):
    """Rewrite model.safetensors with what `edit` makes of its dictionary of tensors."""
    weights = {key: weight.clone() for key, weight in load_file(folder / "model.safetensors").items()}
    save_file(edit(weights), folder / "model.safetensors")


@pytest.fixture
def folder(tmp_path):
    make_reference("gpt2", SIZES).save_pretrained(tmp_path)
    return tmp_path


@pytest.mark.parametrize("changes", CASES.values(), ids=CASES.keys())
def test_logits_match_transformers(changes, tmp_path):
    assert compare("gpt2", SIZES | changes, RAGGED, tmp_path) < 1e-4


@st.composite
def configurations(draw):
    heads = draw(st.integers(1, 7))
    return {
        "vocab_size": 61, "n_positions": 200, "n_head": heads, "n_embd": heads * draw(st.integers(1, 12)),
        "n_layer": draw(st.integers(1, 3)), "n_inner": draw(st.none() | st.integers(1, 50)),
        "activation_function": draw(st.sampled_from(["gelu_new", "gelu", "relu", "gelu_fast", "gelu_pytorch_tanh"])),
        "tie_word_embeddings": draw(st.booleans()), "scale_attn_by_inverse_layer_idx": draw(st.booleans()),
    }  # fmt: skip


@settings(max_examples=25, derandomize=True, database=None, deadline=None)
@given(fields=configurations(), lengths=st.lists(st.integers(1, 200), min_size=1, max_size=17))
def test_logits_match_transformers_on_drawn_configurations(fields, lengths, tmp_path_factory):
    assert compare("gpt2", fields, lengths, tmp_path_factory.mktemp("drawn")) < 1e-4


def test_bf16_is_as_accurate_as_transformers(tmp_path):
    reference, sequences = make_reference("gpt2", SIZES).bfloat16(), make_sequences(RAGGED)
    reference.save_pretrained(tmp_path)
    exact = load_model(tmp_path, torch.float64).logits(sequences)
    error = largest_difference(load_model(tmp_path, torch.bfloat16).logits(sequences), exact)
    assert 0 < error <= 2 * largest_difference(reference_logits(reference, sequences), exact)


@pytest.mark.parametrize("changes", CASES.values(), ids=CASES.keys())
def test_gradients_at_every_site_match_transformers(changes, tmp_path):
    reference = make_reference("gpt2", SIZES | changes)
    reference.save_pretrained(tmp_path)
    compare_gradients(reference, load_model(tmp_path), INPUTS)


OTHERS = st.lists(st.integers(1, 40), max_size=5)


@settings(max_examples=15, derandomize=True, database=None, deadline=None)
@given(st.integers(1, 40), OTHERS, OTHERS, st.sampled_from([33, 40, 64]), st.sampled_from(["gelu_new", "gelu", "relu"]))
def test_bits_do_not_depend_on_company(tmp_path_factory, length, before, after, n_inner, activation):
    folder = tmp_path_factory.mktemp("drawn")
    fields = SIZES | {"n_inner": n_inner, "activation_function": activation}
    make_reference("gpt2", fields).save_pretrained(folder)
    check_company(load_model(folder), length, before, after)


def test_every_linear_map_is_a_site(folder):
    check_sites(load_model(folder))


def test_a_tied_head_is_the_embedding(folder):
    model = load_model(folder)
    assert model.head_linear.weight is model.embed.weight
    edit_weights(folder, lambda weights: weights | {"lm_head.weight": weights["transformer.wte.weight"].clone()})
    assert fingerprint(load_model(folder)) == fingerprint(model)
    edit_weights(folder, lambda weights: weights | {"lm_head.weight": weights["lm_head.weight"] + 1})
    with pytest.raises(InputError, match=r"lm_head.weight differs from transformer.wte.weight"):
        load_model(folder)


def test_the_first_checkpoints_without_prefix_and_with_masks_are_the_same_model(folder):
    before = fingerprint(load_model(folder))
    masks = {"attn.bias": torch.ones(1, 1, 8, 8).byte(), "attn.masked_bias": torch.tensor(-1e4)}
    edit_weights(folder, lambda weights: weights | {f"transformer.h.1.{key}": mask for key, mask in masks.items()})
    assert fingerprint(load_model(folder)) == before
    edit_weights(folder, lambda weights: {key.removeprefix("transformer."): w for key, w in weights.items()})
    assert fingerprint(load_model(folder)) == before


def test_all_spellings_of_config_json_are_read(folder):
    _, config = read_config(folder)
    edit_config(folder, hidden_size=24, n_embd=..., num_hidden_layers=2, n_layer=..., num_attention_heads=6, n_head=...,
                max_position_embeddings=200, n_positions=..., n_ctx=200, torch_dtype="float32", dtype=...)  # fmt: skip
    assert read_config(folder)[1] == config
    defaults = ("activation_function", "layer_norm_epsilon", "scale_attn_weights", "tie_word_embeddings",
                "scale_attn_by_inverse_layer_idx", "reorder_and_upcast_attn", "add_cross_attention")  # fmt: skip
    edit_config(folder, **dict.fromkeys(defaults, ...))
    assert read_config(folder)[1] == config
    edit_config(folder, max_position_embeddings=..., n_ctx=..., n_inner=...)
    config = read_config(folder)[1]
    assert config.max_positions == 1024 and config.mlp_width == 4 * 24  # the positions that GPT-2 itself has


def test_a_sequence_longer_than_the_positions_is_refused(folder):
    with pytest.raises(ValueError, match="201 tokens but this base has 200 positions"):
        load_model(folder).logits([[1], [1] * 201])


@pytest.mark.parametrize("changes, message", [
    ({"n_embd": ...}, "'n_embd' is missing"),
    ({"n_layer": ...}, "'n_layer' is missing"),
    ({"n_head": ...}, "'n_head' is missing"),
    ({"vocab_size": ...}, "'vocab_size' is missing"),
    ({"n_head": 5}, "n_embd 24 is not a multiple of n_head 5"),
    ({"n_inner": "wide"}, "n_inner is 'wide'"),
    ({"layer_norm_epsilon": 0}, "layer_norm_epsilon is 0, needed a positive number"),
    ({"activation_function": "swish"}, "activation_function is 'swish'; supported are 'gelu', 'gelu_new'"),
    ({"scale_attn_weights": "yes"}, "scale_attn_weights is 'yes'"),
    ({"add_cross_attention": True}, "add_cross_attention is true; supported is GPT-2 as a decoder alone"),
    ({"n_positions": 199}, r"transformer.wpe.weight is \[200, 24\], needed \[199, 24\]"),
    ({"n_inner": 41}, r"transformer.h.0.mlp.c_fc.weight is \[24, 40\], needed \[24, 41\]"),
    ({"tie_word_embeddings": False}, r"lm_head.weight is missing, needed \[61, 24\]"),
])  # fmt: skip
def test_what_cannot_be_read_is_one_line(changes, message, folder):
    edit_config(folder, **changes)
    with pytest.raises(InputError, match=message) as error:
        load_model(folder)
    assert "\n" not in str(error.value)
