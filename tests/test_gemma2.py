"""Is our Gemma 2 the model that transformers runs?"""

import pytest
import tokenizers
import torch
import torch.nn.functional as F
import transformers
from hf_bases import LENGTHS, ours, sequences
from hypothesis import given, settings
from hypothesis import strategies as st
from linears import site_by_site
from test_decoder import (
    RAGGED,
    ROPES,
    assert_bits_do_not_depend_on_company,
    assert_gradients_match,
    compare,
    largest_difference,
    make_reference,
    make_sequences,
    reference_logits,
)

from minipeft.errors import InputError
from minipeft.methods import PromptTuning
from minipeft.models import gemma2
from minipeft.models.attention import soft_cap
from minipeft.models.gemma2 import Gemma2, Gemma2Config, OffsetRMSNorm
from minipeft.models.hooks import BASE as PLAIN
from minipeft.models.loading import load_model, save_model
from minipeft.models.rows import Rows
from minipeft.models.top import Top
from minipeft.schedule import Adapter

SMALL = {"head_dim": 8, "query_pre_attn_scalar": 12, "sliding_window": 7, "attn_logit_softcapping": 2.0,
         "final_logit_softcapping": 3.0, "num_hidden_layers": 3}  # fmt: skip  # caps that bend most of what they see
CASES = {  # settings beyond those of test_decoder, rope
    "gemma2": (SMALL, "default"),
    "untied": (SMALL | {"tie_word_embeddings": False}, "linear"),
    "odd heads": (SMALL | {"num_attention_heads": 3, "num_key_value_heads": 1, "head_dim": 10}, "llama3"),
    "biases": (SMALL | {"attention_bias": True}, "default"),
    "no caps": (SMALL | {"attn_logit_softcapping": None, "final_logit_softcapping": None}, "default"),
    "layer types": (SMALL | {"layer_types": ["full_attention", "full_attention", "sliding_attention"]}, "default"),
}


@pytest.mark.parametrize("changes, rope", CASES.values(), ids=CASES.keys())
def test_logits_match_transformers(changes, rope):
    assert compare("gemma2", changes, rope, RAGGED) < 1e-4


@st.composite
def configurations(draw):
    kv_heads, group = draw(st.sampled_from([1, 2, 3, 5])), draw(st.integers(1, 4))
    heads, layers = kv_heads * group, draw(st.integers(1, 3))
    # Not narrower: a norm of one or two features turns fp32's last bits into 1e-4, in transformers as here.
    changes = {
        "num_attention_heads": heads, "num_key_value_heads": kv_heads, "hidden_size": heads * draw(st.integers(16, 24)),
        "head_dim": 2 * draw(st.integers(1, 12)), "intermediate_size": draw(st.integers(8, 50)),
        "num_hidden_layers": layers, "tie_word_embeddings": draw(st.booleans()), "attention_bias": draw(st.booleans()),
        "sliding_window": draw(st.integers(1, 60)), "query_pre_attn_scalar": draw(st.integers(4, 40)),
        "attn_logit_softcapping": draw(st.none() | st.floats(0.5, 50)),
        "final_logit_softcapping": draw(st.none() | st.floats(0.5, 50)),
    }  # fmt: skip
    if draw(st.booleans()):
        names = st.sampled_from(["full_attention", "sliding_attention"])
        changes["layer_types"] = draw(st.lists(names, min_size=layers, max_size=layers))
    return changes, draw(st.sampled_from(list(ROPES)))


def test_virtual_tokens_that_start_as_a_text_act_as_that_text(tmp_path):
    """Tokens are multiplied by sqrt(width), virtual tokens by nothing: their start is."""
    make_reference("gemma2", SMALL, "default").save_pretrained(tmp_path)
    model, text = load_model(tmp_path), (5, 9, 3)
    prompt = PromptTuning(3, "text", text)
    with torch.no_grad():
        (as_prompt,) = ours(model, Adapter("ann", prompt, prompt.initial_row(model, 0, "ann")))[:1]
        read = sequences(LENGTHS)[0]
        as_text = model.head(model.hidden(Rows.pack([[*text, *read]])))[len(text) :]
    torch.testing.assert_close(as_prompt, as_text, rtol=0, atol=1e-5)


@settings(max_examples=40, derandomize=True, database=None, deadline=None)
@given(case=configurations(), lengths=st.lists(st.integers(1, 200), min_size=1, max_size=17))
def test_logits_match_transformers_on_drawn_configurations(case, lengths):
    assert compare("gemma2", *case, lengths) < 1e-4


@pytest.mark.parametrize("changes, rope", CASES.values(), ids=CASES.keys())
def test_gradients_match_transformers(changes, rope, tmp_path):
    """Of every weight, so of every step between it and the logits."""
    reference = make_reference("gemma2", changes, rope)
    reference.save_pretrained(tmp_path)
    model = load_model(tmp_path).requires_grad_(True)
    assert_gradients_match(model, reference, gemma2.FAMILY.sources(model))


@pytest.mark.parametrize("changes", [SMALL, SMALL | {"hidden_size": 30}], ids=["24 wide", "30 wide"])
def test_bf16_is_as_accurate_as_transformers(changes, tmp_path):
    reference = make_reference("gemma2", changes).bfloat16()
    reference.save_pretrained(tmp_path)
    sequences = make_sequences(RAGGED)
    ours = load_model(tmp_path, torch.bfloat16)
    assert {weight.dtype for weight in ours.parameters()} == {torch.bfloat16}
    exact = load_model(tmp_path, torch.float64).logits(sequences)
    error = largest_difference(ours.logits(sequences), exact)
    assert 0 < error <= 2 * largest_difference(reference_logits(reference, sequences), exact)


def test_norm_and_embeddings_are_transformers_to_the_bit_in_bf16(tmp_path):
    """So (1 + w) is not rounded before it multiplies, and sqrt(width) is."""
    reference = make_reference("gemma2", SMALL | {"hidden_size": 30}).bfloat16()
    reference.save_pretrained(tmp_path)
    model = load_model(tmp_path, torch.bfloat16)
    x = torch.randn(50, 30, generator=torch.Generator().manual_seed(0)).bfloat16()
    assert torch.equal(model.layers[0].mlp_norm(x), reference.model.layers[0].pre_feedforward_layernorm(x))

    seen = []
    model.layers[0].attn_norm.register_forward_hook(lambda module, args, output: seen.append(args[0]))
    model.logits([list(range(61))])
    assert torch.equal(seen[0], reference.model.embed_tokens(torch.arange(61)))


def make_model(**changes):
    shape = {"vocab_size": 61, "width": 24, "num_layers": 2, "num_heads": 6, "num_kv_heads": 2, "head_dim": 8,
             "mlp_width": 40, "windows": (5, None), "score_scale": 0.3, "score_cap": 2.0, "logit_cap": 3.0,
             "attn_bias": True}  # fmt: skip
    model = Gemma2(Gemma2Config(**shape | changes))
    generator = torch.Generator().manual_seed(0)
    for weight in model.parameters():
        noise = torch.randn(weight.shape, generator=generator)
        weight.copy_(0.3 * noise if weight.ndim == 1 else noise / weight.shape[1] ** 0.5)
    return model


def test_gradients_of_a_layer_match_finite_differences():
    """In fp64, which is also the proof that nothing falls back to fp32 on the way."""
    layer = make_model(windows=(2, None)).double().layers[0].requires_grad_(True)
    rows = Rows.pack([[0] * 4, [0]])
    generator = torch.Generator().manual_seed(4)
    x = torch.randn(5, 24, dtype=torch.float64, generator=generator, requires_grad=True)
    angles = torch.randn(5, 1, 4, dtype=torch.float64, generator=generator)
    rope = torch.cat([angles.cos()] * 2, -1), torch.cat([-angles.sin(), angles.sin()], -1)
    norms = [m.weight for m in layer.modules() if isinstance(m, OffsetRMSNorm)]
    assert len(norms) == 4
    assert torch.autograd.gradcheck(
        lambda x, *norms: layer(x, rope, PLAIN, Top.all(rows, PLAIN)), (x, *norms), fast_mode=True)


@settings(max_examples=25, derandomize=True, database=None, deadline=None)
@given(
    length=st.integers(1, 40), before=st.lists(st.integers(1, 40), max_size=5),
    after=st.lists(st.integers(1, 40), max_size=5), mlp_width=st.sampled_from([33, 40, 64]),
    score_cap=st.sampled_from([None, 2.0]),
)  # fmt: skip
def test_bits_do_not_depend_on_company_where_those_of_linear_do_not(length, before, after, mlp_width, score_cap):
    assert_bits_do_not_depend_on_company(make_model(mlp_width=mlp_width, score_cap=score_cap), length, before, after)


@pytest.mark.parametrize("shape", [(1, 1), (3, 61), (999, 33), (2048, 64)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bits_of_a_cap_depend_on_the_element_alone(shape, dtype):
    generator = torch.Generator().manual_seed(5)
    x, grad_y = (torch.randn(shape, generator=generator).mul(4).to(dtype) for _ in range(2))

    def forward_backward(part):
        leaf = x[part].clone().requires_grad_()
        y = soft_cap(leaf, 3.0)
        y.backward(grad_y[part])
        return y.detach(), leaf.grad

    whole, threads = forward_backward(slice(None)), torch.get_num_threads()
    assert (whole[0].double() - 3 * (x.double() / 3).tanh()).abs().max() <= 4 * torch.finfo(dtype).eps
    try:
        for num_threads in (1, 2, 3):
            torch.set_num_threads(num_threads)
            for start, end in ((0, 1), (0, shape[0]), (shape[0] // 3, shape[0]), (shape[0] // 2, shape[0] // 2 + 1)):
                part = slice(start, end)
                assert all(torch.equal(one, all_of[part]) for one, all_of in zip(forward_backward(part), whole))
    finally:
        torch.set_num_threads(threads)


def test_every_linear_map_is_a_site_in_forward_order():
    model, calls = make_model(), []

    @site_by_site
    def linear(site, x, weight, bias):
        assert (bias is not None) == (".attn." in site)
        calls.append((site, (weight.shape[1], weight.shape[0])))
        return F.linear(x, weight, bias)

    rows = Rows.pack(make_sequences([5, 1, 30]))
    h = model.hidden(rows, linear)
    assert calls == list(model.sites.items()) and len(calls) == 14
    logits = model.head(h, linear)
    assert calls[14:] == [("head", (24, 61))] and logits.abs().max() < 3
    assert model.sites["layers.1.attn.k"] == (24, 16) and model.sites["layers.0.mlp.down"] == (40, 24)
    assert not any(weight.requires_grad for weight in model.parameters())
    assert model.head_linear.weight is model.embed.weight


def test_a_sequence_longer_than_the_positions_is_refused():
    with pytest.raises(ValueError, match="9 tokens but this base has 8 positions"):
        make_model(max_positions=8).logits([[1], [1] * 9])


# its files

GEMMA2_2B = {  # config.json of google/gemma-2-2b, as transformers 4 writes it
    "architectures": ["Gemma2ForCausalLM"], "attention_bias": False, "attention_dropout": 0.0,
    "attn_logit_softcapping": 50.0, "bos_token_id": 2, "cache_implementation": "hybrid", "eos_token_id": 1,
    "final_logit_softcapping": 30.0, "head_dim": 256, "hidden_act": "gelu_pytorch_tanh",
    "hidden_activation": "gelu_pytorch_tanh", "hidden_size": 2304, "initializer_range": 0.02,
    "intermediate_size": 9216, "max_position_embeddings": 8192, "model_type": "gemma2", "num_attention_heads": 8,
    "num_hidden_layers": 26, "num_key_value_heads": 4, "pad_token_id": 0, "query_pre_attn_scalar": 256,
    "rms_norm_eps": 1e-06, "rope_theta": 10000.0, "sliding_window": 4096, "torch_dtype": "float32",
    "use_cache": True, "vocab_size": 256000,
}  # fmt: skip


def test_config_reads_as_transformers_4_and_5_spell_it():
    expected = Gemma2Config(vocab_size=256000, width=2304, num_layers=26, num_heads=8, num_kv_heads=4, head_dim=256,
                            mlp_width=9216, windows=(4096, None) * 13, score_scale=1 / 16)  # fmt: skip
    assert gemma2.read(GEMMA2_2B) == expected
    spelled_anew = transformers.Gemma2Config(**GEMMA2_2B).to_dict()
    assert "layer_types" in spelled_anew and "rope_parameters" in spelled_anew and "rope_theta" not in spelled_anew
    assert gemma2.read(spelled_anew) == expected


def test_defaults_are_transformers():
    needed = ("vocab_size", "hidden_size", "intermediate_size", "num_attention_heads", "num_hidden_layers")
    fields = {name: GEMMA2_2B[name] for name in needed}
    assert gemma2.read(fields) == gemma2.read(transformers.Gemma2Config(**fields).to_dict())


@pytest.mark.parametrize("changes, words", [
    ({"hidden_activation": "gelu"}, "hidden_activation is 'gelu'"),
    ({"use_bidirectional_attention": True}, "use_bidirectional_attention is true"),
    ({"sliding_window": None}, "'sliding_window' is missing"),
    ({"layer_types": ["full_attention"]}, "layer_types is .*needed 26 names"),
    ({"layer_types": ["chunked_attention"] * 26}, "layer_types is .*chunked"),
    ({"attn_logit_softcapping": 0.0}, "attn_logit_softcapping is 0.0"),
    ({"final_logit_softcapping": "30"}, "final_logit_softcapping is '30'"),
    ({"query_pre_attn_scalar": -1}, "query_pre_attn_scalar is -1"),
    ({"num_key_value_heads": 3}, "not a multiple of num_key_value_heads 3"),
    ({"head_dim": 7}, "head_dim is 7"),
    ({"rope_scaling": {"rope_type": "yarn", "factor": 2.0}}, "rope type is 'yarn'"),
])  # fmt: skip
def test_what_it_has_not_is_refused_by_name(changes, words):
    with pytest.raises(InputError, match=words):
        gemma2.read(GEMMA2_2B | changes)


def test_save_model_refuses_it_and_leaves_nothing(tmp_path):
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel({"w0": 0}, unk_token="w0"))
    with pytest.raises(InputError, match="save_model: writes llama, mistral, qwen2, qwen3, not Gemma2"):
        save_model(make_model(), tokenizer, tmp_path / "base")
    assert list(tmp_path.iterdir()) == []
