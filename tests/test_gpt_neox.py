"""Is our GPT-NeoX (Pythia) the model that transformers runs, and does each linear map go through its own site?"""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_decoder import largest_difference, make_sequences, reference_logits
from test_gpt2 import (
    OTHERS,
    RAGGED,
    check_company,
    check_sites,
    compare,
    compare_gradients,
    edit_config,
    edit_weights,
    make_reference,
)

from minipeft.errors import InputError
from minipeft.models.gpt_neox import rotate_first
from minipeft.models.loading import fingerprint, load_model, read_config
from minipeft.models.rotary import rotate

SIZES = {"vocab_size": 61, "max_position_embeddings": 200, "hidden_size": 48, "num_hidden_layers": 2,
         "num_attention_heads": 6, "intermediate_size": 40}  # fmt: skip
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 32}  # fmt: skip


def turning(part, **rope):
    return {"rope_parameters": {"rope_type": "default", "rope_theta": 1000.0, "partial_rotary_factor": part} | rope}


CASES = {
    "pythia": {},
    "one after the other": {"use_parallel_residual": False},
    "odd heads": {"num_attention_heads": 3, "num_hidden_layers": 3} | turning(0.4),  # 6.4 of 16: 6 turn
    "all turns": turning(1.0),
    "no attention biases": {"attention_bias": False} | turning(0.5),
    "tied head": {"tie_word_embeddings": True},
    "tanh gelu": {"hidden_act": "gelu_new", "layer_norm_eps": 1e-3},
    "relu": {"hidden_act": "relu", "num_hidden_layers": 1, "num_attention_heads": 1},
    "linear scaling": turning(0.5, rope_type="linear", factor=3.0),
    "llama3 scaling": turning(0.5, **LLAMA3),
}
INPUTS = {"q": "attention.query_key_value", "o": "attention.dense", "up": "mlp.dense_h_to_4h",
          "down": "mlp.dense_4h_to_h"}  # fmt: skip


@pytest.fixture
def folder(tmp_path):
    make_reference("gpt_neox", SIZES).save_pretrained(tmp_path)
    return tmp_path


@pytest.mark.parametrize("changes", CASES.values(), ids=CASES.keys())
def test_logits_match_transformers(changes, tmp_path):
    assert compare("gpt_neox", SIZES | changes, RAGGED, tmp_path) < 1e-4


@st.composite
def configurations(draw):
    heads, half_dim = draw(st.integers(1, 7)), draw(st.integers(1, 12))
    rotary_dim = 2 * draw(st.integers(1, half_dim))
    part = 1.0 if rotary_dim == 2 * half_dim else (rotary_dim + 0.5) / (2 * half_dim)
    return {
        "vocab_size": 61, "max_position_embeddings": 200, "num_attention_heads": heads,
        "hidden_size": heads * 2 * half_dim, "intermediate_size": draw(st.integers(1, 50)),
        "num_hidden_layers": draw(st.integers(1, 3)), "tie_word_embeddings": draw(st.booleans()),
        "attention_bias": draw(st.booleans()), "use_parallel_residual": draw(st.booleans()),
        "hidden_act": draw(st.sampled_from(["gelu", "gelu_new", "relu", "gelu_fast", "gelu_pytorch_tanh"])),
        **turning(part),
    }  # fmt: skip


@settings(max_examples=25, derandomize=True, database=None, deadline=None)
@given(fields=configurations(), lengths=st.lists(st.integers(1, 200), min_size=1, max_size=17))
def test_logits_match_transformers_on_drawn_configurations(fields, lengths, tmp_path_factory):
    assert compare("gpt_neox", fields, lengths, tmp_path_factory.mktemp("drawn")) < 1e-4


def test_bf16_is_as_accurate_as_transformers(tmp_path):
    reference, sequences = make_reference("gpt_neox", SIZES).bfloat16(), make_sequences(RAGGED)
    reference.save_pretrained(tmp_path)
    exact = load_model(tmp_path, torch.float64).logits(sequences)
    error = largest_difference(load_model(tmp_path, torch.bfloat16).logits(sequences), exact)
    assert 0 < error <= 2 * largest_difference(reference_logits(reference, sequences), exact)


@pytest.mark.parametrize("changes", CASES.values(), ids=CASES.keys())
def test_gradients_at_every_site_match_transformers(changes, tmp_path):
    reference = make_reference("gpt_neox", SIZES | changes)
    reference.save_pretrained(tmp_path)
    compare_gradients(reference, load_model(tmp_path), INPUTS)


@pytest.mark.parametrize("angles", [1, 3, 5])
def test_only_the_first_features_turn(angles):
    generator = torch.Generator().manual_seed(0)
    x, (cos, sin) = torch.randn(4, 3, 10, generator=generator), torch.randn(2, 4, 1, 2 * angles, generator=generator)
    y = rotate_first(x, cos, sin)
    assert torch.equal(y[..., : 2 * angles], rotate(x[..., : 2 * angles], cos, sin))
    assert torch.equal(y[..., 2 * angles :], x[..., 2 * angles :])


@settings(max_examples=15, derandomize=True, database=None, deadline=None)
@given(st.integers(1, 40), OTHERS, OTHERS, st.sampled_from([33, 40, 64]), st.booleans())
def test_bits_do_not_depend_on_company(tmp_path_factory, length, before, after, mlp_width, parallel):
    folder = tmp_path_factory.mktemp("drawn")
    fields = SIZES | {"intermediate_size": mlp_width, "use_parallel_residual": parallel}
    make_reference("gpt_neox", fields).save_pretrained(folder)
    check_company(load_model(folder), length, before, after)


@pytest.mark.parametrize("parallel", [True, False])
def test_every_linear_map_is_a_site(parallel, tmp_path):
    make_reference("gpt_neox", SIZES | {"use_parallel_residual": parallel}).save_pretrained(tmp_path)
    check_sites(load_model(tmp_path))


def test_a_tied_head_is_the_embedding(tmp_path):
    make_reference("gpt_neox", SIZES | {"tie_word_embeddings": True}).save_pretrained(tmp_path)
    model = load_model(tmp_path)
    assert model.head_linear.weight is model.embed.weight
    edit_weights(tmp_path, lambda weights: weights | {"embed_out.weight": weights["gpt_neox.embed_in.weight"].clone()})
    assert fingerprint(load_model(tmp_path)) == fingerprint(model)
    edit_config(tmp_path, tie_word_embeddings=False)
    own = load_model(tmp_path)
    assert own.head_linear.weight is not own.embed.weight and torch.equal(own.head_linear.weight, own.embed.weight)


def test_a_checkpoint_of_the_headless_model_is_read_if_the_head_is_tied(tmp_path):
    reference = make_reference("gpt_neox", SIZES | {"tie_word_embeddings": True})
    reference.save_pretrained(tmp_path / "whole")
    reference.base_model.save_pretrained(tmp_path / "headless")
    assert fingerprint(load_model(tmp_path / "headless")) == fingerprint(load_model(tmp_path / "whole"))
    edit_config(tmp_path / "headless", tie_word_embeddings=False)
    with pytest.raises(InputError, match=r"embed_out.weight is missing, needed \[61, 48\]"):
        load_model(tmp_path / "headless")


def test_tables_in_old_checkpoints_are_not_read(folder):
    before = fingerprint(load_model(folder))
    tables = {"layers.0.attention.bias": torch.ones(1, 1, 8, 8).bool(), "rotary_emb.inv_freq": torch.ones(4),
              "layers.0.attention.masked_bias": torch.tensor(-1e9),
              "layers.1.attention.rotary_emb.inv_freq": torch.ones(4)}  # fmt: skip
    edit_weights(folder, lambda weights: weights | {f"gpt_neox.{key}": table for key, table in tables.items()})
    assert fingerprint(load_model(folder)) == before


def test_both_spellings_of_config_json_are_read(folder):
    _, defaults = read_config(folder)
    assert (defaults.rotary_dim, defaults.rope_theta, defaults.parallel, defaults.attn_bias) == (2, 10000.0, True, True)
    optional = ("rope_parameters", "use_parallel_residual", "attention_bias", "hidden_act", "layer_norm_eps",
                "tie_word_embeddings")  # fmt: skip
    edit_config(folder, **dict.fromkeys(optional, ...))
    assert read_config(folder)[1] == defaults

    edit_config(folder, **turning(0.5, rope_type="linear", factor=2.0))
    _, config = read_config(folder)
    assert (config.rotary_dim, config.rope_theta, config.rope_scaling["factor"]) == (4, 1000.0, 2.0)
    edit_config(folder, rope_parameters=..., rotary_pct=0.5, rotary_emb_base=1000, torch_dtype="float32", dtype=...,
                rope_scaling={"type": "linear", "factor": 2.0})  # fmt: skip
    assert read_config(folder)[1] == config
    edit_config(folder, max_position_embeddings=...)
    assert read_config(folder)[1].max_positions == 2048


def test_a_sequence_longer_than_the_positions_is_refused(folder):
    with pytest.raises(ValueError, match="201 tokens but this base has 200 positions"):
        load_model(folder).logits([[1], [1] * 201])


@pytest.mark.parametrize("changes, message", [
    ({"hidden_size": ...}, "'hidden_size' is missing"),
    ({"num_hidden_layers": ...}, "'num_hidden_layers' is missing"),
    ({"num_attention_heads": ...}, "'num_attention_heads' is missing"),
    ({"intermediate_size": ...}, "'intermediate_size' is missing"),
    ({"vocab_size": ...}, "'vocab_size' is missing"),
    ({"num_attention_heads": 5}, "hidden_size 48 is not a multiple of num_attention_heads 5"),
    (turning(0.2), r"partial_rotary_factor 0.2 turns 1 of the 8 features of a head"),
    (turning(0.1), r"partial_rotary_factor 0.1 turns 0 of the 8 features of a head"),
    (turning(1.5), r"partial_rotary_factor 1.5 turns 12 of the 8 features of a head"),
    ({"rope_parameters": ..., "rotary_pct": "all"}, "rotary_pct is 'all', needed a positive number"),
    ({"rope_parameters": ..., "rotary_emb_base": -1}, "rotary_emb_base is -1, needed a positive number"),
    (turning(0.25, rope_type="yarn"), "rope type is 'yarn'"),
    ({"layer_norm_eps": 0}, "layer_norm_eps is 0, needed a positive number"),
    ({"hidden_act": "silu"}, "hidden_act is 'silu'; supported are 'gelu', 'gelu_new'"),
    ({"use_parallel_residual": 2}, "use_parallel_residual is 2, needed true or false"),
    ({"intermediate_size": 41}, r"gpt_neox.layers.0.mlp.dense_h_to_4h.weight is \[40, 48\], needed \[41, 48\]"),
    ({"attention_bias": False}, r"gpt_neox.layers.0.attention.dense.bias \[48\] is unexpected"),
])  # fmt: skip
def test_what_cannot_be_read_is_one_line(changes, message, folder):
    edit_config(folder, **changes)
    with pytest.raises(InputError, match=message) as error:
        load_model(folder)
    assert "\n" not in str(error.value)
