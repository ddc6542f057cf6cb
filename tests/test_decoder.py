"""Is the decoder the model that transformers runs, for Llama, Mistral, Qwen2, Qwen3 and Phi-3?"""

import tempfile

import pytest
import tokenizers
import torch
import torch.nn.functional as F
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from linears import site_by_site

from minipeft.errors import InputError
from minipeft.models import decoder_files
from minipeft.models.decoder import Decoder, DecoderConfig
from minipeft.models.hooks import BASE as PLAIN
from minipeft.models.layers import HeadRMSNorm, stable_sigmoid
from minipeft.models.loading import FAMILIES, fingerprint, load_model, save_model
from minipeft.models.rotary import CHUNK, Rotary, rope_frequencies
from minipeft.models.rows import Rows
from minipeft.models.top import Top

SIZES = {"vocab_size": 61, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 6,
         "num_key_value_heads": 2, "rms_norm_eps": 1e-5, "max_position_embeddings": 256,
         "pad_token_id": None}  # fmt: skip
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 32}  # fmt: skip
ROPES = {"default": {"rope_type": "default"}, "linear": {"rope_type": "linear", "factor": 3.0}, "llama3": LLAMA3}
CASES = {  # family, settings beyond SIZES, rope
    "llama": ("llama", {}, "default"),
    "llama tied": ("llama", {"tie_word_embeddings": True}, "default"),
    "llama linear": ("llama", {"num_key_value_heads": 6}, "linear"),
    "llama llama3": ("llama", {"num_key_value_heads": 1, "head_dim": 16}, "llama3"),
    "llama biases": ("llama", {"attention_bias": True, "mlp_bias": True}, "default"),
    "llama odd heads": ("llama", {"hidden_size": 30, "num_attention_heads": 5, "num_key_value_heads": 5}, "default"),
    "mistral": ("mistral", {"sliding_window": 7}, "default"),
    "mistral no window": ("mistral", {"sliding_window": None, "head_dim": 6}, "default"),
    "qwen2": ("qwen2", {"tie_word_embeddings": True}, "default"),
    "qwen2 window": ("qwen2", {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1}, "default"),
    "qwen3": ("qwen3", {"head_dim": 10, "tie_word_embeddings": True}, "default"),
    "qwen3 window": ("qwen3", {"head_dim": 8, "attention_bias": True, "use_sliding_window": True, "sliding_window": 9,
                               "layer_types": ["sliding_attention", "full_attention"]}, "linear"),
}  # fmt: skip
PHI3 = {  # the file keeps q, k, v together, and gate, up; saved, it is another family's
    "phi3": ("phi3", {}, "default"),
    "phi3 window": ("phi3", {"sliding_window": 7, "num_key_value_heads": 6, "tie_word_embeddings": True}, "default"),
    "phi3 odd heads": ("phi3", {"num_attention_heads": 3, "num_key_value_heads": 1, "head_dim": 6}, "default"),
}  # fmt: skip
RAGGED = [3, 100, 1, 17, 8, 9, 64, 40, 2]


def make_reference(family, changes, rope="default", seed=0):
    """A transformers model with eager attention whose every weight, norm and bias is far from its start value."""
    fields = {**SIZES, **changes, "rope_parameters": {"rope_theta": 1000.0, **ROPES[rope]}}
    config = transformers.AutoConfig.for_model(family, **fields)
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


def make_sequences(lengths, vocab_size=61, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(vocab_size, (n,), generator=generator).tolist() for n in lengths]


@torch.no_grad()
def reference_logits(reference, sequences):
    """Each sequence alone, so that nothing is padded."""
    return [reference(torch.tensor([s]), use_cache=False).logits[0] for s in sequences]


def largest_difference(one, other):
    assert [x.shape for x in one] == [y.shape for y in other]
    return max((x.double() - y.double()).abs().max().item() for x, y in zip(one, other))


def compare(family, changes, rope, lengths):
    reference = make_reference(family, changes, rope)
    with tempfile.TemporaryDirectory() as folder:
        reference.save_pretrained(folder)
        model = load_model(folder)
    sequences = make_sequences(lengths)
    expected = reference_logits(reference, sequences)
    assert max(x.std() for x in expected) > 0.1  # a model that says something
    return largest_difference(model.logits(sequences), expected)


@pytest.mark.parametrize("case", (CASES | PHI3).values(), ids=(CASES | PHI3).keys())
def test_logits_match_transformers(case):
    assert compare(*case, RAGGED) < 1e-4


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3", "phi3"])
def test_logits_match_transformers_with_odd_heads(family, tied):
    for biases in ({}, {"attention_bias": True, "mlp_bias": True}) if family in ("llama", "qwen3") else ({},):
        changes = {"num_attention_heads": 5, "num_key_value_heads": 5, "hidden_size": 50, "tie_word_embeddings": tied}
        assert compare(family, changes | biases, "default", [200, 1, 199, 8, 33]) < 1e-4


@st.composite
def configurations(draw):
    family = draw(st.sampled_from(["llama", "mistral", "qwen2", "qwen3", "phi3"]))
    kv_heads, group = draw(st.sampled_from([1, 2, 3, 5])), draw(st.integers(1, 4))
    heads = kv_heads * group
    changes = {
        "vocab_size": 61, "num_attention_heads": heads, "num_key_value_heads": kv_heads,
        "hidden_size": heads * 8 * draw(st.integers(1, 3)), "intermediate_size": draw(st.integers(1, 50)),
        "num_hidden_layers": draw(st.integers(1, 3)), "tie_word_embeddings": draw(st.booleans()),
    }  # fmt: skip
    if family == "qwen3" or draw(st.booleans()):
        changes["head_dim"] = 2 * draw(st.integers(1, 12))
    if family in ("llama", "qwen3"):
        changes["attention_bias"] = draw(st.booleans())
    if family == "llama":
        changes["mlp_bias"] = draw(st.booleans())
    if family in ("mistral", "phi3"):
        changes["sliding_window"] = draw(st.none() | st.integers(1, 30))
    if family in ("qwen2", "qwen3") and draw(st.booleans()):
        changes |= {"use_sliding_window": True, "sliding_window": draw(st.integers(1, 30)),
                    "max_window_layers": draw(st.integers(0, 3))}  # fmt: skip
    return family, changes, "default" if family == "phi3" else draw(st.sampled_from(list(ROPES)))


@settings(max_examples=50, derandomize=True, database=None, deadline=None)
@given(case=configurations(), lengths=st.lists(st.integers(1, 200), min_size=1, max_size=17))
def test_logits_match_transformers_on_drawn_configurations(case, lengths):
    assert compare(*case, lengths) < 1e-4


@pytest.mark.parametrize("family, rope", [("llama", "llama3"), ("qwen3", "llama3"), ("phi3", "default")])
def test_bf16_is_as_accurate_as_transformers(family, rope, tmp_path):
    reference = make_reference(family, {"head_dim": 16}, rope).bfloat16()
    reference.save_pretrained(tmp_path)
    sequences = make_sequences(RAGGED)
    ours = load_model(tmp_path, torch.bfloat16)
    assert {weight.dtype for weight in ours.parameters()} == {torch.bfloat16}
    exact = load_model(tmp_path, torch.float64).logits(sequences)
    error = largest_difference(ours.logits(sequences), exact)
    assert 0 < error <= 2 * largest_difference(reference_logits(reference, sequences), exact)


@pytest.mark.parametrize("theta", [10000.0, 500000.0])
@pytest.mark.parametrize("head_dim", [20, 64, 128])
@pytest.mark.parametrize("rope", ROPES)
def test_frequencies_match_transformers(rope, head_dim, theta):
    fields = {"hidden_size": 2 * head_dim, "num_attention_heads": 2, "head_dim": head_dim}
    config = transformers.LlamaConfig(**fields, rope_parameters={"rope_theta": theta, **ROPES[rope]})
    expected = transformers.models.llama.modeling_llama.LlamaRotaryEmbedding(config).inv_freq
    scaling = {} if rope == "default" else ROPES[rope]
    ours = rope_frequencies(head_dim, theta, scaling)
    assert ((ours - expected) / expected).abs().max() < 2e-7  # two units in the last place of fp32


@pytest.mark.parametrize("case", (CASES | PHI3).values(), ids=(CASES | PHI3).keys())
def test_gradients_match_transformers(case, tmp_path):
    """Of every weight, so of every step between it and the logits."""
    reference = make_reference(*case)
    reference.save_pretrained(tmp_path)
    model = load_model(tmp_path).requires_grad_(True)
    assert_gradients_match(model, reference, FAMILIES[case[0]].sources(model))


def read_from(whole, source, shape):
    """What load_model reads of a tensor, cut out of it in one go."""
    first, length, every = source.part or (0, whole.numel(), whole.numel())
    numbers = whole.reshape(-1, every)[:, first : first + length]
    return numbers.reshape(shape[::-1]).t() if source.transposed else numbers.reshape(shape)


def assert_gradients_match(model, reference, sources):
    sequences = make_sequences([3, 40, 17, 1])
    pull = torch.randn(61, 61, generator=torch.Generator().manual_seed(3))  # [token, C]: what each logit's gradient is
    rows = Rows.pack(sequences)
    (model.head(model.hidden(rows)) * pull[rows.tokens]).sum().backward()
    for s in sequences:
        (reference(torch.tensor([s]), use_cache=False).logits[0] * pull[s]).sum().backward()
    theirs = {name: weight.grad for name, weight in reference.named_parameters()}
    assert theirs.keys() == {source.key for source in sources.values()}
    for name, weight in model.named_parameters():
        source = sources[name]
        expected = read_from(theirs[source.key], source, weight.shape)
        assert (weight.grad - expected).norm() < 1e-5 * expected.norm(), name


@pytest.mark.parametrize("window", [None, 2])
def test_gradients_of_a_layer_match_finite_differences(window):
    """In fp64, which is also the proof that nothing falls back to fp32 on the way."""
    layer = make_model(qk_norm=True, windows=(window,) * 2).double().layers[0].requires_grad_(True)
    rows = Rows.pack([[0] * 4, [0]])
    generator = torch.Generator().manual_seed(4)
    x = torch.randn(5, 24, dtype=torch.float64, generator=generator, requires_grad=True)
    angles = torch.randn(5, 1, 4, dtype=torch.float64, generator=generator)
    rope = torch.cat([angles.cos()] * 2, -1), torch.cat([-angles.sin(), angles.sin()], -1)
    norms = [m.weight for m in layer.modules() if isinstance(m, HeadRMSNorm)]
    assert len(norms) == 4
    assert torch.autograd.gradcheck(
        lambda x, *norms: layer(x, rope, PLAIN, Top.all(rows, PLAIN)), (x, *norms), fast_mode=True)


@pytest.mark.parametrize("shape", [(1, 1), (3, 40), (400, 100), (999, 33), (2048, 64)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bits_of_sigmoid_depend_on_the_element_alone(shape, dtype):
    x = 4 * torch.randn(shape, generator=torch.Generator().manual_seed(5)).to(dtype)
    y, threads = stable_sigmoid(x), torch.get_num_threads()
    assert (y.double() - x.double().sigmoid()).abs().max() <= torch.finfo(dtype).eps
    try:
        for num_threads in (1, 2, 3):
            torch.set_num_threads(num_threads)
            for start, end in ((0, 1), (0, shape[0]), (shape[0] // 3, shape[0]), (shape[0] // 2, shape[0] // 2 + 1)):
                assert torch.equal(stable_sigmoid(x[start:end]), y[start:end])
    finally:
        torch.set_num_threads(threads)


@settings(max_examples=25, derandomize=True, database=None, deadline=None)
@given(
    length=st.integers(1, 40), before=st.lists(st.integers(1, 40), max_size=5),
    after=st.lists(st.integers(1, 40), max_size=5), mlp_width=st.sampled_from([33, 40, 64]), qk_norm=st.booleans(),
)  # fmt: skip
def test_bits_do_not_depend_on_company_where_those_of_linear_do_not(length, before, after, mlp_width, qk_norm):
    assert_bits_do_not_depend_on_company(make_model(mlp_width=mlp_width, qk_norm=qk_norm), length, before, after)


def assert_bits_do_not_depend_on_company(model, length, before, after):
    """With a matrix product that takes each row alone: all else in the decoder keeps a sequence's bits."""

    @site_by_site
    def linear(site, x, weight, bias):
        return torch.stack([F.linear(row, weight, bias) for row in x])

    mine, *others = make_sequences([length, *before, *after])
    company = [*others[: len(before)], mine, *others[len(before) :]]
    grads, outputs = [], []
    for sequences in ([mine], company):
        rows = Rows.pack(sequences)
        added = torch.zeros(len(rows.tokens), 24, requires_grad=True)  # [T, width], to receive the first gradient

        @site_by_site
        def tuned(site, x, weight, bias, added=added):
            return linear.linear((site,), x + added if site == "layers.0.attn.v" else x, [weight], [bias])[0]

        h = model.hidden(rows, tuned)
        h.square().sum().backward()
        start = 0 if sequences[0] is mine else sum(before)
        outputs.append(h[start : start + length])
        grads.append(added.grad[start : start + length])
    assert torch.equal(*outputs) and torch.equal(*grads) and grads[0].abs().max() > 0


def test_a_sequence_longer_than_the_positions_is_refused():
    model = make_model(max_positions=8)
    model.logits([[1] * 8])
    with pytest.raises(ValueError, match="9 tokens but this base has 8 positions"):
        model.logits([[1], [1] * 9])


def make_model(**changes):
    """A small decoder with biases and a head of its own, from the loader's point of view a Llama."""
    shape = {"vocab_size": 61, "width": 24, "num_layers": 2, "num_heads": 6, "num_kv_heads": 2, "head_dim": 8,
             "mlp_width": 40, "qkv_bias": True, "o_bias": True, "mlp_bias": True}  # fmt: skip
    model = Decoder(DecoderConfig(**shape | changes))
    generator = torch.Generator().manual_seed(0)
    for weight in model.parameters():
        noise = torch.randn(weight.shape, generator=generator)
        weight.copy_(1 + 0.3 * noise if weight.ndim == 1 else noise / weight.shape[1] ** 0.5)
    return model


def test_every_linear_map_is_a_site_in_forward_order():
    model, calls = make_model(), []

    @site_by_site
    def linear(site, x, weight, bias):
        assert bias is not None or site == "head"
        calls.append((site, (weight.shape[1], weight.shape[0])))
        return F.linear(x, weight, bias)

    rows = Rows.pack(make_sequences([5, 1, 30]))
    h = model.hidden(rows, linear)
    assert calls == list(model.sites.items()) and len(calls) == 14
    model.head(h[[4, 5, 35]], linear)
    assert calls[14:] == [("head", (24, 61))]
    assert model.sites["layers.1.attn.k"] == (24, 16) and model.sites["layers.0.mlp.down"] == (40, 24)


def test_what_linear_adds_at_a_site_equals_an_edited_weight():
    rows = Rows.pack(make_sequences([5, 1, 30]))
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

    model.head(model.hidden(Rows.pack(make_sequences([5, 1, 30])), linear)).square().sum().backward()
    assert tuned.grad.abs().min() > 0
    assert all(weight.grad is None and not weight.requires_grad for weight in model.parameters())


def test_a_bf16_bases_angles_are_those_of_fp32_rounded_once():
    rows = Rows.pack([[0] * 700])
    exact = make_model().rotary(rows, torch.float32)
    for ours, theirs in zip(make_model().bfloat16().rotary(rows, torch.bfloat16), exact):
        assert torch.equal(ours, theirs.bfloat16())


def test_a_positions_angles_do_not_depend_on_the_company():
    rotary = Rotary(10, 10000.0, {})
    alone = rotary(Rows.pack([[0] * 7]), torch.float32)
    with_a_long_one = rotary(Rows.pack([[0] * 7, [0] * (CHUNK + 300)]), torch.float32)
    for one, other in zip(alone, with_a_long_one):
        assert torch.equal(one, other[:7])
    position = torch.tensor(float(CHUNK + 299), dtype=torch.float64)
    exact = (position * rope_frequencies(10, 10000.0, {}).double()).cos().repeat(2)
    assert (with_a_long_one[0][-1, 0] - exact).abs().max() < 1e-4


def test_tied_head_is_the_embedding():
    model = make_model(tied_head=True)
    assert model.head_linear.weight is model.embed.weight
    assert model.double().head_linear.weight is model.embed.weight


def test_each_layer_has_a_window():
    with pytest.raises(AssertionError, match="1 windows for 2 layers"):
        make_model(windows=(3,))


# Phi-3's files

PHI3_MINI = {  # config.json of microsoft/Phi-3-mini-4k-instruct, as transformers 4 writes it
    "architectures": ["Phi3ForCausalLM"], "attention_bias": False, "attention_dropout": 0.0, "bos_token_id": 1,
    "embd_pdrop": 0.0, "eos_token_id": 32000, "hidden_act": "silu", "hidden_size": 3072, "initializer_range": 0.02,
    "intermediate_size": 8192, "max_position_embeddings": 4096, "model_type": "phi3", "num_attention_heads": 32,
    "num_hidden_layers": 32, "num_key_value_heads": 32, "original_max_position_embeddings": 4096,
    "pad_token_id": 32000, "resid_pdrop": 0.0, "rms_norm_eps": 1e-05, "rope_scaling": None, "rope_theta": 10000.0,
    "sliding_window": 2047, "tie_word_embeddings": False, "torch_dtype": "bfloat16", "vocab_size": 32064,
}  # fmt: skip


def test_phi3_reads_as_transformers_4_and_5_spell_it():
    mini = DecoderConfig(vocab_size=32064, width=3072, num_layers=32, num_heads=32, num_kv_heads=32, head_dim=96,
                         mlp_width=8192, norm_eps=1e-5, windows=(2047,) * 32, max_positions=4096)  # fmt: skip
    assert decoder_files.read(PHI3_MINI) == mini
    spelled_anew = transformers.Phi3Config(**PHI3_MINI).to_dict()
    assert "rope_parameters" in spelled_anew and "rope_theta" not in spelled_anew
    assert decoder_files.read(spelled_anew) == mini


@pytest.mark.parametrize("family", [*decoder_files.FAMILIES, "phi3"])
def test_what_config_json_leaves_out_is_as_in_transformers(family):
    fields = {"model_type": family, "vocab_size": 61, "hidden_size": 256, "num_attention_heads": 32,
              "num_hidden_layers": 2, "intermediate_size": 40}  # fmt: skip
    theirs = transformers.AutoConfig.for_model(**fields, pad_token_id=None).to_dict()
    ours = decoder_files.read(fields)
    assert ours == decoder_files.read(theirs)
    assert (ours.norm_eps, ours.max_positions) == (theirs["rms_norm_eps"], theirs["max_position_embeddings"])


def test_a_ropes_original_length_may_lie_outside_of_it():
    fields = SIZES | {"model_type": "llama", "rope_scaling": LLAMA3}
    inside = {name: value for name, value in LLAMA3.items() if name != "original_max_position_embeddings"}
    outside = fields | {"rope_scaling": inside, "original_max_position_embeddings": 32}
    assert decoder_files.read(outside) == decoder_files.read(fields)
    with pytest.raises(InputError, match="'original_max_position_embeddings' is missing"):
        decoder_files.read(fields | {"rope_scaling": inside})


LONG = {"type": "longrope", "short_factor": [1.0] * 48, "long_factor": [2.0] * 48}


@pytest.mark.parametrize("changes, words", [
    ({"rope_scaling": LONG}, "longrope"),
    ({"rope_scaling": LONG | {"type": "su"}}, "su"),
    ({"rope_parameters": {"rope_type": "longrope", "rope_theta": 10000.0}}, "longrope"),
    ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "linear"),
    ({"partial_rotary_factor": 0.75}, "partial_rotary_factor is 0.75"),
    ({"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}, "partial_rotary_factor is 0.5"),
    ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
    ({"sliding_window": 0}, "sliding_window is 0"),
    ({"num_key_value_heads": 5}, "num_key_value_heads 5"),
])  # fmt: skip
def test_what_phi3_has_not_is_refused_by_name(changes, words):
    with pytest.raises(InputError, match=words):
        decoder_files.read(PHI3_MINI | changes)


def test_a_fused_tensor_of_another_shape_is_refused(tmp_path):
    make_reference("phi3", {}).save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(path.read_text().replace('"num_key_value_heads": 2', '"num_key_value_heads": 3'))
    with pytest.raises(InputError, match=r"layers.0.self_attn.qkv_proj.weight is \[40, 24\], needed \[48, 24\]"):
        load_model(tmp_path)


@pytest.mark.parametrize("case", PHI3.values(), ids=PHI3.keys())
def test_phi3_is_saved_as_the_family_that_is_the_same_model(case, tmp_path):
    make_reference(*case).save_pretrained(tmp_path / "original")
    model = load_model(tmp_path / "original")
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel({"w0": 0}, unk_token="w0"))
    save_model(model, tokenizer, tmp_path / "saved")
    assert fingerprint(load_model(tmp_path / "saved")) == fingerprint(model)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "saved", attn_implementation="eager")
    assert theirs.config.model_type == ("mistral" if model.config.windows else "llama")
    sequences = make_sequences(RAGGED)
    assert largest_difference(model.logits(sequences), reference_logits(theirs, sequences)) < 1e-4
