"""Does PEFT compute with our adapters what we compute, and we with PEFT's, tensor for tensor?"""

import copy

import peft
import pytest
import torch
from hf_bases import assert_differ, assert_same, base_of, ours, random_adapter, theirs
from safetensors.torch import load_file

from minipeft.interop import export_peft, import_peft
from minipeft.methods import IA3, DoRA, LayerNormTuning, LoRA, PrefixTuning, PromptTuning, PTuning, VeRA
from minipeft.schedule import Adapter


def loaded(model, folder):
    return peft.PeftModel.from_pretrained(copy.deepcopy(model), folder).eval()


def stored(model):
    """What PEFT itself would store of its model's adapter."""
    return peft.get_peft_model_state_dict(model, save_embedding_layers=False)


ALL = ("q", "k", "v", "o", "gate", "up", "down")
METHODS = {  # family, method
    "lora": ("llama", LoRA(3, 5.0, ("q", "v", "down"))),
    "lora everywhere, patterns": ("llama", LoRA(
        4, 8.0, ALL, dropout=0.25, ranks=(("layers.1.attn.q", 2), ("down", 7)), alphas=(("layers.0.mlp.up", 3.5),))),
    "lora in one layer": ("qwen2", LoRA(2, sites=("layers.1.attn.q", "layers.1.mlp.down"))),
    "rslora": ("qwen2", LoRA(5, 3.0, ("k", "o"), scaling="rslora", ranks=(("k", 3),))),
    "dora": ("qwen2", DoRA(3, 6.0, ("q", "v", "up"), ranks=(("up", 2),))),
    "lora embedding": ("llama", LoRA(3, 9.0, ("embed", "q"), ranks=(("embed", 5),))),
    "lora tied embedding": ("qwen2", LoRA(3, 9.0, ("embed",))),
    "lora head": ("llama", LoRA(3, 9.0, ("head", "q"), ranks=(("head", 5),))),
    "lora tied head": ("qwen2", LoRA(3, 9.0, ("head", "embed"), alphas=(("head", 5.0),))),
    "dora head": ("llama", DoRA(3, 9.0, ("head",))),
    "dora tied head": ("gpt2", DoRA(3, 9.0, ("head", "up"))),
    "neox head": ("gpt_neox", LoRA(3, 9.0, ("head", "o"))),
    "neox tied head": ("gpt_neox tied", LoRA(3, 9.0, ("head", "down"))),
    "t5 head": ("t5", LoRA(3, 9.0, ("head", "q"))),
    "t5 own head": ("t5 gated", LoRA(3, 9.0, ("head",))),
    "t5 embedding": ("t5", LoRA(3, 9.0, ("embed", "head"), ranks=(("embed", 4),))),
    "vera": ("llama", VeRA(8, ("q", "v", "down"), seed=7)),
    "ia3": ("qwen2", IA3()),
    "ia3 of some inputs": ("llama", IA3(("k", "down"), ("layers.1.mlp.down",))),
    "layernorm": ("llama", LayerNormTuning()),
    "layernorm of some": ("qwen2", LayerNormTuning(("layers.1.attn_norm", "mlp_norm"))),
    "prompt": ("llama", PromptTuning(5)),
    "ptuning": ("qwen2", PTuning(4, hidden=6)),
    "ptuning mlp": ("llama", PTuning(4, "mlp", hidden=6)),
    "gemma2 prompt": ("gemma2", PromptTuning(5)),
    "gemma2 ptuning": ("gemma2", PTuning(4, hidden=6)),
    "gemma2 embedding": ("gemma2", LoRA(3, 9.0, ("embed", "q"))),
    "prefix": ("llama", PrefixTuning(5)),
    "prefix hidden": ("qwen2", PrefixTuning(5, hidden=7)),
    "t5 lora": ("t5", LoRA(3, 5.0, ("q", "v"), ranks=(("decoder.layers.1.cross.q", 2),))),
    "t5 lora everywhere": ("t5 gated", LoRA(3, 5.0, ALL, ranks=(("gate", 2),))),
    "t5 dora": ("t5 gated", DoRA(2, 5.0, ("attn.q", "up"))),
    "t5 vera": ("t5", VeRA(6, ("q", "up"))),
    "t5 ia3": ("t5 gated", IA3(("k", "v", "down"), ("down",))),
    "t5 layernorm": ("t5", LayerNormTuning()),
    "t5 prompt": ("t5", PromptTuning(5)),
    "t5 ptuning": ("t5 gated", PTuning(4, hidden=6)),
    "t5 prefix": ("t5", PrefixTuning(5, hf_compat=True)),
    "t5 prefix, odd": ("t5 gated", PrefixTuning(5, hidden=4, hf_compat=True)),
    "bert lora": ("bert", LoRA(3, 5.0, ("q", "o", "up", "down"), ranks=(("up", 2),))),
    "bert rslora": ("roberta", LoRA(3, 5.0, ("k", "v"), scaling="rslora")),
    "bert dora": ("bert", DoRA(3, 5.0, ("q", "down"))),
    "bert embedding": ("bert", LoRA(3, 5.0, ("embed",))),
    "bert vera": ("bert", VeRA(5, ("q", "up"))),
    "bert ia3": ("bert", IA3()),
    "bert layernorm": ("bert", LayerNormTuning()),
    "roberta layernorm": ("roberta", LayerNormTuning(("attn_norm",))),
    "bert prompt": ("bert", PromptTuning(5)),
    "roberta ptuning": ("roberta", PTuning(4, hidden=6)),
    "bert prefix": ("bert", PrefixTuning(3)),
    "gpt2 lora": ("gpt2", LoRA(3, 5.0, ("down", "up"))),
    "gpt2 ia3": ("gpt2", IA3(("up", "down"))),
}  # fmt: skip
FUSED = {  # sites that are parts of one map there
    "gpt2 fused": ("gpt2", LoRA(3, 5.0, ("q", "k", "v", "down"))),
    "gpt2 fused, some parts": ("gpt2", LoRA(3, 5.0, ("v", "layers.0.attn.q"))),
    "gpt2 fused, parts of their own": ("gpt2", LoRA(
        3, 5.0, ("q", "k", "v"), scaling="rslora", ranks=(("k", 2), ("layers.1.attn.q", 5)),
        alphas=(("q", 0.0), ("v", -7.0)))),
    "gpt2 fused dora": ("gpt2", DoRA(3, 5.0, ("q", "v", "up"), ranks=(("q", 2),))),
    "gpt2 fused ia3": ("gpt2", IA3()),
    "phi3 fused": ("phi3", LoRA(3, 5.0, ALL, alphas=(("k", 2.0),))),
    "phi3 fused, more ranks than k is wide": ("phi3", LoRA(8, 5.0, ("q", "k", "v"), ranks=(("q", 10),))),
    "gpt2 fused, q and v": ("gpt2", LoRA(8, 16.0, ("q", "v"))),
    "phi3 fused dora": ("phi3", DoRA(2, 5.0, ("k", "gate", "up"))),
    "phi3 fused ia3": ("phi3", IA3(("v", "up", "down"))),
    "neox fused": ("gpt_neox", LoRA(3, 5.0, ("q", "k", "v", "up"), ranks=(("v", 4),))),
    "neox fused dora": ("gpt_neox", DoRA(3, 5.0, ("k", "v"))),
    "neox fused ia3": ("gpt_neox", IA3()),
}  # fmt: skip


@pytest.mark.parametrize("case", (METHODS | FUSED).values(), ids=(METHODS | FUSED).keys())
def test_peft_computes_what_we_do_with_an_exported_adapter(case, tmp_path):
    family, method = case
    model, base = base_of(family)
    adapter = random_adapter(method, base)
    export_peft(adapter, base, tmp_path)
    their_model, expected = loaded(model, tmp_path), ours(base, adapter)
    assert_same(theirs(their_model), expected)
    assert_differ(expected, ours(base))
    file, own = load_file(tmp_path / "adapter_model.safetensors"), stored(their_model)
    assert file.keys() == own.keys()
    for key, tensor in own.items():
        assert torch.equal(file[key], tensor), key


@pytest.mark.parametrize("case", METHODS.values(), ids=METHODS.keys())
def test_an_exported_adapter_comes_back(case, tmp_path):
    family, method = case
    base = base_of(family)[1]
    adapter = random_adapter(method, base)
    back = import_peft(export_peft(adapter, base, tmp_path), base, "bob")
    assert back.user == "bob"
    if isinstance(method, PTuning) or (isinstance(method, PrefixTuning) and method.hidden):  # computed
        assert_same(ours(base, back), ours(base, adapter))
    else:
        assert method.tensors(adapter.row, base).keys() == back.method.tensors(back.row, base).keys()
        for name, tensor in method.tensors(adapter.row, base).items():
            assert torch.equal(back.method.tensors(back.row, base)[name], tensor), name
        assert_same(ours(base, back), ours(base, adapter))


@pytest.mark.parametrize("case", FUSED.values(), ids=FUSED.keys())
def test_parts_come_back_from_the_map_that_holds_them(case, tmp_path):
    """And parts without an adapter, or with a scale of 0, come back without one."""
    family, method = case
    base = base_of(family)[1]
    adapter = random_adapter(method, base)
    back = import_peft(export_peft(adapter, base, tmp_path), base, "bob")
    assert_same(ours(base, back), ours(base, adapter))
    if isinstance(method, LoRA):
        acting = [site for site in method.chosen(base) if method.scale_of(site)]
        assert list(back.method.chosen(base)) == acting
        assert [back.method.rank_of(site) for site in acting] == [method.rank_of(site) for site in acting]
    if isinstance(method, LoRA) and not method.alphas and not method.ranks:  # of one scale
        assert torch.equal(back.row, adapter.row)
    if case in (FUSED["gpt2 fused"], FUSED["gpt2 fused, q and v"]):
        assert back.method == method


@pytest.mark.parametrize("family, width", [("gpt2", 24), ("phi3", 8)])
def test_a_fresh_adapter_of_a_fused_map_is_one_of_every_part_that_fits_it(family, width, tmp_path):
    base, method = base_of(family)[1], LoRA(6, 12.0, ("q", "v"))
    fresh = Adapter("ann", method, method.initial_row(base, 0, "ann"))
    back = import_peft(export_peft(fresh, base, tmp_path), base, "ann")
    assert {site: back.method.rank_of(site) for site in back.method.chosen(base)} == {
        f"layers.{layer}.attn.{part}": 12 if part == "q" else min(12, width) for layer in (0, 1) for part in "qkv"}
    assert {back.method.scale_of(site) for site in back.method.chosen(base)} == {2.0}
    assert_same(ours(base, back), ours(base))


SEQ2SEQ = {"task_type": "SEQ_2_SEQ_LM"}
CONFIGS = {  # family, PEFT's configuration. Patterns take whole words: "proj" is none
    "lora": ("llama", peft.LoraConfig(r=3, lora_alpha=5, target_modules=["q_proj", "down_proj"], lora_dropout=0.1)),
    "lora, patterns": ("qwen2", peft.LoraConfig(
        r=4, target_modules=["q_proj", "k_proj", "up_proj"],
        rank_pattern={"proj": 5, r"layers\.1\..*q_proj": 2, "k_proj": 3},
        alpha_pattern={"up_proj": 3, "^model.layers.0.self_attn.q_proj": 11})),
    "lora by a pattern": ("llama", peft.LoraConfig(r=3, target_modules=r"model\.layers\.1\.(.*)\.[vo]_proj")),
    "lora everywhere": ("llama", peft.LoraConfig(r=3, target_modules="all-linear", init_lora_weights="gaussian")),
    "rslora": ("qwen2", peft.LoraConfig(r=5, lora_alpha=3, target_modules=["v_proj"], use_rslora=True,
                                        rank_pattern={"layers.0.self_attn.v_proj": 3})),
    "dora": ("qwen2", peft.LoraConfig(r=3, target_modules=["q_proj", "o_proj"], use_dora=True)),
    "lora embedding": ("llama", peft.LoraConfig(r=3, target_modules=["embed_tokens", "q_proj"])),
    "lora tied embedding": ("qwen2", peft.LoraConfig(r=3, target_modules=["embed_tokens"])),
    "lora head": ("llama", peft.LoraConfig(r=3, target_modules=["lm_head"])),
    "lora tied head": ("qwen2", peft.LoraConfig(r=3, target_modules=["lm_head", "embed_tokens", "q_proj"],
                                                rank_pattern={"lm_head": 5})),
    "dora tied head": ("gpt2", peft.LoraConfig(r=3, target_modules=["lm_head"], use_dora=True)),
    "neox head": ("gpt_neox", peft.LoraConfig(r=3, target_modules=["lm_head"])),
    "t5 head": ("t5", peft.LoraConfig(r=3, target_modules=["lm_head", "v"], **SEQ2SEQ)),
    "vera": ("llama", peft.VeraConfig(r=6, target_modules=["q_proj", "down_proj"], projection_prng_key=5)),
    "vera, no projections": ("qwen2", peft.VeraConfig(r=6, target_modules=["v_proj"], save_projection=False)),
    "ia3": ("llama", peft.IA3Config(target_modules=["k_proj", "v_proj", "down_proj"],
                                    feedforward_modules=["down_proj"])),
    "ia3, outputs": ("qwen2", peft.IA3Config(target_modules=["down_proj"], feedforward_modules=[])),
    "layernorm": ("llama", peft.LNTuningConfig(task_type="CAUSAL_LM")),
    "prompt": ("llama", peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5)),
    "ptuning": ("llama", peft.PromptEncoderConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=4, encoder_reparameterization_type="LSTM", encoder_hidden_size=6)),
    "gemma2 prompt": ("gemma2", peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5)),
    "gemma2 ptuning": ("gemma2", peft.PromptEncoderConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=4, encoder_hidden_size=6)),
    "gemma2 embedding": ("gemma2", peft.LoraConfig(r=3, target_modules=["embed_tokens"])),
    "prefix": ("qwen2", peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5)),
    "prefix, projected": ("llama", peft.PrefixTuningConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=5, prefix_projection=True, encoder_hidden_size=7)),
    "t5 lora": ("t5", peft.LoraConfig(r=3, target_modules=["q", "wi", "wo"], rank_pattern={"EncDecAttention.q": 2},
                                      **SEQ2SEQ)),
    "t5 dora": ("t5 gated", peft.LoraConfig(r=3, target_modules=["v", "wi_1"], use_dora=True, **SEQ2SEQ)),
    "t5 vera": ("t5", peft.VeraConfig(r=6, target_modules=["q", "wo"], **SEQ2SEQ)),
    "t5 ia3": ("t5 gated", peft.IA3Config(target_modules=["k", "v", "wi_1"], feedforward_modules=["wi_1"], **SEQ2SEQ)),
    "t5 layernorm": ("t5", peft.LNTuningConfig(**SEQ2SEQ)),
    "t5 prompt": ("t5", peft.PromptTuningConfig(num_virtual_tokens=5, num_transformer_submodules=1, **SEQ2SEQ)),
    "t5 ptuning": ("t5", peft.PromptEncoderConfig(
        num_virtual_tokens=5, num_transformer_submodules=1, encoder_hidden_size=7, **SEQ2SEQ)),
    "t5 prefix": ("t5", peft.PrefixTuningConfig(num_virtual_tokens=5, **SEQ2SEQ)),
    "bert lora": ("bert", peft.LoraConfig(r=3, target_modules=["query", "attention.output.dense"])),
    "bert dora": ("roberta", peft.LoraConfig(r=3, target_modules=["key", "intermediate.dense"], use_dora=True)),
    "bert embedding": ("bert", peft.LoraConfig(r=3, target_modules=["word_embeddings"])),
    "bert vera": ("bert", peft.VeraConfig(r=6, target_modules=["query", "intermediate.dense"])),
    "bert ia3": ("bert", peft.IA3Config(target_modules=["key", "output.dense"], feedforward_modules=["output.dense"])),
    "bert layernorm": ("bert", peft.LNTuningConfig(target_modules=["LayerNorm"])),
    "bert prompt": ("roberta", peft.PromptTuningConfig(task_type="FEATURE_EXTRACTION", num_virtual_tokens=5)),
    "bert ptuning": ("bert", peft.PromptEncoderConfig(
        task_type="FEATURE_EXTRACTION", num_virtual_tokens=5, encoder_hidden_size=8)),
    "bert prefix": ("bert", peft.PrefixTuningConfig(task_type="FEATURE_EXTRACTION", num_virtual_tokens=5)),
    "gpt2 lora": ("gpt2", peft.LoraConfig(r=3, target_modules=["mlp.c_proj", "c_fc"], fan_in_fan_out=True)),
    "gpt2 dora": ("gpt2", peft.LoraConfig(r=3, target_modules=["c_fc"], fan_in_fan_out=True, use_dora=True)),
}  # fmt: skip
FUSED_CONFIGS = {
    "gpt2 fused": ("gpt2", peft.LoraConfig(r=3, target_modules=["c_attn", "c_fc"], fan_in_fan_out=True,
                                           rank_pattern={"h.0.attn.c_attn": 5}, alpha_pattern={"c_attn": 3})),
    "gpt2 fused rslora": ("gpt2", peft.LoraConfig(r=3, target_modules=["c_attn"], fan_in_fan_out=True,
                                                  use_rslora=True)),
    "gpt2 fused dora": ("gpt2", peft.LoraConfig(r=3, target_modules=["c_attn"], fan_in_fan_out=True, use_dora=True)),
    "gpt2 fused ia3": ("gpt2", peft.IA3Config(target_modules=["c_attn"], feedforward_modules=[], fan_in_fan_out=True)),
    "phi3 fused": ("phi3", peft.LoraConfig(r=3, target_modules=["qkv_proj", "gate_up_proj", "o_proj"])),
    "phi3 fused, a rank above k's width": ("phi3", peft.LoraConfig(r=10, target_modules=["qkv_proj"])),
    "phi3 fused dora, a rank above k's width": ("phi3", peft.LoraConfig(r=10, target_modules=["qkv_proj"],
                                                                        use_dora=True)),
    "phi3 fused dora": ("phi3", peft.LoraConfig(r=3, target_modules=["gate_up_proj"], use_dora=True)),
    "phi3 fused ia3": ("phi3", peft.IA3Config(target_modules=["qkv_proj"], feedforward_modules=[])),
    "neox fused": ("gpt_neox", peft.LoraConfig(r=3, target_modules=["query_key_value", "dense"])),
    "neox fused dora": ("gpt_neox", peft.LoraConfig(r=3, target_modules=["query_key_value"], use_dora=True)),
    "neox fused ia3": ("gpt_neox", peft.IA3Config(target_modules=["query_key_value"], feedforward_modules=[])),
}  # fmt: skip


@torch.no_grad()
def trained(model, config, seed=0):
    """A PEFT model of which every number that it trains is far from its start."""
    model = peft.get_peft_model(copy.deepcopy(model), copy.deepcopy(config)).eval()
    torch.manual_seed(seed)
    for weight in model.parameters():
        if weight.requires_grad:
            weight += 0.15 * torch.randn(weight.shape)
    return model


def there_and_back(case, folder):
    """peft's trained model, and the same after an import and an export of ours; all three compute the same."""
    family, config = case
    model, base = base_of(family)
    their_model = trained(model, config)
    their_model.save_pretrained(folder)
    adapter = import_peft(folder, base, "ann")
    expected = theirs(their_model)
    assert_same(ours(base, adapter), expected)
    assert_differ(expected, ours(base))
    again = loaded(model, export_peft(adapter, base, folder / "again"))
    assert_same(theirs(again), expected)
    return their_model, again


@pytest.mark.parametrize("case", CONFIGS.values(), ids=CONFIGS.keys())
def test_we_compute_what_peft_does_with_an_imported_adapter(case, tmp_path):
    their_model, again = there_and_back(case, tmp_path)
    own, back = stored(their_model), stored(again)
    if case == CONFIGS["t5 prefix"]:  # of PEFT's two pairs the first acts at both layers, see pair_of
        P, ours_twice = own["prompt_embeddings"].view(5, 2, 48), back["prompt_embeddings"].view(5, 4, 48)
        assert torch.equal(ours_twice, P[:, :1].expand(5, 4, 48) * torch.tensor([1, 0, 1, 0])[:, None])
        return
    for key, tensor in own.items():
        assert torch.equal(tensor, back[key]), key
    assert own.keys() <= back.keys()
    assert all(key.startswith("base_model.vera_") for key in back.keys() - own.keys())


@pytest.mark.parametrize("case", FUSED_CONFIGS.values(), ids=FUSED_CONFIGS.keys())
def test_an_adapter_of_a_fused_map_becomes_one_of_each_part(case, tmp_path):
    there_and_back(case, tmp_path)
