"""Is every PEFT folder that is not ours to read, and every adapter that PEFT cannot keep, refused in one clear line?"""

import copy
import dataclasses
import json
import os
import subprocess
import sys
import warnings

import peft
import pytest
import torch
from hf_bases import base_of, random_adapter
from safetensors.torch import load_file, save_file

from minipeft.errors import InputError
from minipeft.files import write_file
from minipeft.interop import export_peft, folders, import_peft
from minipeft.methods import IA3, Houlsby, LayerNormTuning, LoRA, PrefixTuning, PromptTuning, VeRA
from minipeft.models.classifier import Classifier
from minipeft.models.decoder import Decoder, DecoderConfig
from minipeft.schedule import Adapter


def written(tmp_path, family="llama", method=None):
    """A base and the folder of an adapter exported from it."""
    base = base_of(family)[1]
    return base, export_peft(random_adapter(method or LoRA(3, sites=("q", "down")), base), base, tmp_path / "adapter")


def change(folder, **options):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | options))


def change_tensors(folder, **tensors):
    path = folder / "adapter_model.safetensors"
    save_file({key: t for key, t in (load_file(path) | tensors).items() if t is not None}, path)


def refused(folder, base, *parts):
    with pytest.raises(InputError) as error:
        import_peft(folder, base, "ann")
    message = str(error.value)
    assert "\n" not in message and str(folder) in message
    for part in parts:
        assert part in message, message


VERA, PREFIX, PROMPT = VeRA(4, ("q",)), PrefixTuning(3), PromptTuning(3)
OPTIONS = {  # option, value, method whose folder it stands in
    "use_qalora": ("use_qalora", True, None), "lora_bias": ("lora_bias", True, None),
    "layers_to_transform": ("layers_to_transform", [0], None), "layer 0": ("layers_to_transform", 0, None),
    "a new option at 0.0": ("some_new_option", 0.0, None), "modules_to_save": ("modules_to_save", ["head"], None),
    "exclude_modules": ("exclude_modules", ["q_proj"], None), "bias": ("bias", "all", None),
    "pissa": ("init_lora_weights", "pissa", None), "tokens": ("trainable_token_indices", [3], None),
    "parameters": ("target_parameters", ["w"], None), "replication": ("layer_replication", [[0, 1]], None),
    "alora": ("alora_invocation_tokens", [4], None), "unheard of": ("some_new_option", 3, None),
    "tying": ("ensure_weight_tying", True, None), "megatron": ("megatron_core", "other", None),
    "a rank that is a word": ("r", "8", None), "a pattern of words": ("rank_pattern", {"q_proj": "8"}, None),
    "a broken pattern": ("alpha_pattern", {"q_(": 3}, None), "targets that are none": ("target_modules", [3], None),
    "no targets": ("target_modules", None, None), "peft_type": ("peft_type", "LOHA", None),
    "a rank beyond all memory": ("r", 10**12, VERA), "a rank past int64": ("r", 10**30, None),
    "vera dropout": ("vera_dropout", 0.1, VERA), "vera layers": ("layers_to_transform", 1, VERA),
    "ia3 save": ("modules_to_save", ["x"], IA3()), "ia3 inputs": ("feedforward_modules", [3], IA3()),
    "norms exclude": ("exclude_modules", ["norm"], LayerNormTuning()),
    "prompt save": ("modules_to_save", ["x"], PROMPT), "prompt width": ("token_dim", 25, PROMPT),
    "no tokens": ("num_virtual_tokens", 0, PROMPT),
    "submodules": ("num_transformer_submodules", 2, PROMPT),
    "prefix heads": ("num_attention_heads", 3, PREFIX), "prefix width": ("token_dim", 7, PREFIX),
    "prefix layers": ("num_layers", 3, PREFIX), "prefix submodules": ("num_transformer_submodules", 2, PREFIX),
}  # fmt: skip


@pytest.mark.parametrize("case", OPTIONS.values(), ids=OPTIONS.keys())
def test_an_option_that_we_do_not_have_is_named(case, tmp_path):
    option, value, method = case
    base, folder = written(tmp_path, method=method)
    import_peft(folder, base, "ann")
    change(folder, **{option: value})
    refused(folder, base, option)


@pytest.mark.parametrize("value", [None, False, "", [], {}], ids=repr)
def test_an_option_that_is_not_set_is_no_matter(value, tmp_path):
    base, folder = written(tmp_path)
    change(folder, some_new_option=value, vera_dropout=0)
    import_peft(folder, base, "ann")


def test_targets_and_ranks_that_do_not_fit_are_errors(tmp_path):
    base, folder = written(tmp_path)
    change(folder, target_modules=["q_proj", "query"])
    refused(folder, base, "'query'", "down_proj, embed_tokens, gate_proj")
    change(folder, target_modules=r".*\.query")
    refused(folder, base, "query", "down_proj, embed_tokens, gate_proj")
    change(folder, target_modules=["q_proj", "down_proj"], r=0)
    refused(folder, base, "rank must be at least 1, got 0")
    change(folder, r=25)
    refused(folder, base, "rank 25 is above the width of layers.0.attn.q (24 in, 24 out)")
    change(folder, r=4)
    refused(folder, base, "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight is (3, 24)", "needs (4, 24)")


def test_another_bases_adapter_is_refused_by_its_first_key(tmp_path):
    base, folder = written(tmp_path)
    refused(folder, base_of("wide")[1], "layers.0.self_attn.q_proj.lora_A.weight is (3, 24), this base needs (3, 30)")
    refused(folder, base_of("bert")[1], "'q_proj'", "query")
    key = "base_model.model.model.layers.1.self_attn.q_proj.lora_A.weight"
    change_tensors(folder, **{key: None})
    refused(folder, base, f"{key} is missing, this base needs (3, 24)")
    change_tensors(folder, **{key: torch.zeros(3, 24), key.replace("layers.1", "layers.2"): torch.zeros(3, 24)})
    refused(folder, base, key.replace("layers.1", "layers.2"))


def test_weights_that_are_pickled_damaged_or_not_there_are_refused(tmp_path):
    base, folder = written(tmp_path)
    weights = folder / "adapter_model.safetensors"
    tensors = load_file(weights)
    weights.write_bytes(weights.read_bytes()[:-1])
    refused(folder, base, "damaged")
    weights.unlink()
    refused(folder, base, "no weights")
    torch.save(tensors, folder / "adapter_model.bin")
    refused(folder, base, "pickled", "can run code")
    with pytest.raises(InputError) as error:
        import_peft(folder, base, "ann")
    subprocess.run(str(error.value).partition("safetensors: ")[2].replace("python", sys.executable, 1), shell=True,
                   check=True)  # fmt: skip
    import_peft(folder, base, "ann")
    (folder / "adapter_config.json").write_text("[]")
    refused(folder, base, "JSON object")
    (folder / "adapter_config.json").unlink()
    refused(folder, base, "no adapter_config.json")


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_numbers_that_are_none_are_refused_and_counted(bad, tmp_path):
    base, folder = written(tmp_path)
    key = "base_model.model.model.layers.1.self_attn.q_proj.lora_A.weight"
    tensor = load_file(folder / "adapter_model.safetensors")[key]
    tensor[1, :2] = bad
    change_tensors(folder, **{key: tensor})
    refused(folder, base, f"{key} has 2 values of 72 that are NaN or infinite")


def test_frozen_tensors_in_the_file_must_be_the_bases_own(tmp_path):
    base, folder = written(tmp_path, method=LoRA(2, sites=("embed",)))
    frozen = {"model.embed_tokens": base.embed.weight, "lm_head": base.head_linear.weight}
    for key, weight in ((f"base_model.model.{path}.base_layer.weight", weight) for path, weight in frozen.items()):
        change_tensors(folder, **{key: weight.clone()})
        import_peft(folder, base, "ann")
        change_tensors(folder, **{key: weight + 1})
        refused(folder, base, key)
        change_tensors(folder, **{key: None})
    _, folder = written(tmp_path / "vera", method=VERA)
    change(folder, projection_prng_key=1)
    refused(folder, base, "base_model.vera_A")


def test_what_peft_has_no_place_for_is_not_exported(tmp_path):
    def not_exported(family, method, *parts, **fields):
        base = base_of(family)[1]
        with pytest.raises(InputError) as error:
            export_peft(dataclasses.replace(random_adapter(method, base), **fields), base, tmp_path / "x")
        assert all(part in str(error.value) for part in parts), str(error.value)
        assert not (tmp_path / "x").exists()

    not_exported("bert", Houlsby(), "houlsby", "export_adapterhub")
    not_exported("t5", PrefixTuning(3), "hf_compat")
    not_exported("gpt2", VERA, "vera: layers.0.attn.q is a part of transformer.h.0.attn.c_attn")
    not_exported("phi3", IA3(("up",), ("up",)), "ia3: layers.0.mlp.up is a part of model.layers.0.mlp.gate_up_proj")
    shared = Adapter("all", LoRA(2, sites=("q",)), torch.zeros(1))
    not_exported("llama", LoRA(2, sites=("q",)), "shared", under=shared)
    made_here = Decoder(DecoderConfig(61, 32, 1, 4, 2, 8, 40))
    with pytest.raises(InputError, match="save_model"):
        export_peft(random_adapter(LoRA(2, sites=("q",)), base_of("llama")[1]), made_here, tmp_path / "x")


@pytest.mark.parametrize("config, parts", [
    (peft.VeraConfig(r=4, target_modules=["c_attn"], fan_in_fan_out=True),
     ["vera: layers.0.attn.q", "h.0.attn.c_attn"]),
    (peft.IA3Config(target_modules=["c_attn"], feedforward_modules=["c_attn"], fan_in_fan_out=True),
     ["ia3: layers.0.attn.q", "with one input"]),
])  # fmt: skip
def test_what_is_not_exact_at_a_fused_map_is_refused(config, parts, tmp_path):
    model, base = base_of("gpt2")
    peft.get_peft_model(copy.deepcopy(model), config).save_pretrained(tmp_path)
    refused(tmp_path, base, *parts)


def test_a_fused_maps_tensors_have_its_rank_and_its_width(tmp_path):
    base, folder = written(tmp_path, "gpt2", LoRA(3, sites=("q", "k", "v")))
    import_peft(folder, base, "ann")
    key = "base_model.model.transformer.h.0.attn.c_attn.lora_"
    tensors = load_file(folder / "adapter_model.safetensors")
    change_tensors(folder, **{f"{key}B.weight": tensors[f"{key}B.weight"][:-1]})
    refused(folder, base, f"{key}B.weight is (71, 9)", "needs (72, 9)")
    change_tensors(folder, **{f"{key}B.weight": tensors[f"{key}B.weight"], f"{key}A.weight": torch.zeros(8, 24)})
    refused(folder, base, f"{key}A.weight is (8, 24)", "needs (9, 24)")


def test_virtual_tokens_of_a_t5_stand_where_ours_do_or_are_refused(tmp_path):
    base = base_of("t5")[1]
    for number in (2, None):  # PEFT reads none as two
        _, folder = written(tmp_path, "t5", PROMPT)
        change(folder, num_transformer_submodules=number)
        refused(folder, base, "num_transformer_submodules", "decoder")
    _, folder = written(tmp_path, "t5", PrefixTuning(3, hf_compat=True))
    change(folder, num_transformer_submodules=None)
    import_peft(folder, base, "ann")
    change(folder, num_transformer_submodules=1)
    refused(folder, base, "num_transformer_submodules", "cross-attention")
    change(folder, num_transformer_submodules=2, num_layers=1)
    refused(folder, base, "num_layers is 1")


def test_a_t5_has_one_embedding_and_so_one_adapter_of_it(tmp_path):
    """PEFT's `shared` is a module that nobody calls; the encoder and the decoder call one of their own each."""
    base, folder = written(tmp_path, "t5", LoRA(2, sites=("embed",)))
    import_peft(folder, base, "ann")
    path = "base_model.model.decoder.embed_tokens.lora_embedding_"
    tensors = load_file(folder / "adapter_model.safetensors")
    change(folder, alpha_pattern={"decoder.embed_tokens": 3})
    refused(folder, base, "alpha_pattern gives encoder.embed_tokens and decoder.embed_tokens different numbers")
    change(folder, alpha_pattern={}, target_modules=["shared"])
    refused(folder, base, "'shared'", "embed_tokens")
    change(folder, target_modules=["embed_tokens"])
    change_tensors(folder, **{f"{path}A": tensors[f"{path}A"] + 1})
    refused(folder, base, f"{path}A differ", "one place")
    change_tensors(folder, **{f"{path}A": None, f"{path}B": None})
    refused(folder, base, f"{path}A is missing beside", "share one embedding", "both, and equal")
    change(folder, target_modules=["encoder.embed_tokens"])
    refused(folder, base, f"{path}A is missing beside", "share one embedding", "both, and equal")


def test_an_encoders_adapter_below_a_head_is_the_same_adapter(tmp_path):
    """Keys of BertForSequenceClassification begin with "bert."; of LlamaModel they lack "model."."""
    base, folder = written(tmp_path, "bert", LoRA(3, sites=("q", "o")))
    adapter = import_peft(folder, base, "ann")
    tensors = load_file(folder / "adapter_model.safetensors")
    save_file({key.replace("model.encoder", "model.bert.encoder"): t for key, t in tensors.items()},
              folder / "adapter_model.safetensors")  # fmt: skip
    below = import_peft(folder, base, "ann")
    assert below.method == adapter.method and torch.equal(below.row, adapter.row)
    base, folder = written(tmp_path)
    adapter = import_peft(folder, base, "ann")
    tensors = load_file(folder / "adapter_model.safetensors")
    save_file({key.replace("model.model.model.", "model.model."): t for key, t in tensors.items()},
              folder / "adapter_model.safetensors")  # fmt: skip
    headless = import_peft(folder, base, "ann")
    assert headless.method == adapter.method and torch.equal(headless.row, adapter.row)


def test_a_classifiers_adapter_is_its_encoders(tmp_path):
    base = base_of("bert")[1]
    classifier, method = Classifier(base, 3), LoRA(3, sites=("q", "embed"))
    adapter = random_adapter(method, base)
    one, other = (export_peft(adapter, b, tmp_path / name) for b, name in ((base, "one"), (classifier, "other")))
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert (one / name).read_bytes() == (other / name).read_bytes()
    back = import_peft(one, classifier, "ann")
    assert back.method == import_peft(one, base, "ann").method and torch.equal(back.row, adapter.row)


def test_sites_are_named_as_shortly_as_peft_reads_them(tmp_path):
    def targets(family, method):
        folder = written(tmp_path, family, method)[1]
        return json.loads((folder / "adapter_config.json").read_text())["target_modules"]

    assert targets("llama", LoRA(2, sites=("q", "down"))) == ["q_proj", "down_proj"]
    assert targets("llama", LoRA(2, sites=("layers.1.attn.q",))) == ["model.layers.1.self_attn.q_proj"]
    assert targets("t5", LoRA(2, sites=("attn.o",)))[0] == "encoder.block.0.layer.0.SelfAttention.o"
    for family in ("bert", "bert, no pooler"):  # "dense" would reach the pooler of BertModel as well
        names = targets(family, LoRA(2, sites=("q", "o", "up", "down")))
        assert names[:2] == ["query", "encoder.layer.0.attention.output.dense"]
    base, folder = written(tmp_path, method=LoRA(2, sites=("q", "down"), ranks=(("layers.0.attn.q", 3),)))
    method = import_peft(folder, base, "ann").method
    assert method == LoRA(2, sites=("q", "down"), ranks=(("layers.0.attn.q", 3),))
    assert import_peft(written(tmp_path, method=LayerNormTuning())[1], base, "a").method == LayerNormTuning()


def test_peft_has_nothing_to_warn_of_where_maps_are_transposed(tmp_path):
    _, folder = written(tmp_path, "gpt2", LoRA(2, sites=("up",)))
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        peft.PeftModel.from_pretrained(copy.deepcopy(base_of("gpt2")[0]), folder)


def test_a_folder_is_complete_or_has_no_options(tmp_path, monkeypatch):
    base, folder = written(tmp_path)
    adapter, before = random_adapter(LoRA(3, sites=("q", "down")), base, seed=5), os.listdir(folder)
    assert sorted(before) == ["adapter_config.json", "adapter_model.safetensors"]
    written_files = []

    def write(path, content):
        written_files.append(path.name)
        if len(written_files) == 2:
            raise OSError("no space")
        write_file(path, content)

    monkeypatch.setattr(folders, "write_file", write)
    with pytest.raises(OSError, match="no space"):
        export_peft(adapter, base, folder)
    assert written_files == ["adapter_model.safetensors", "adapter_config.json"]
    refused(folder, base, "no adapter_config.json")
    monkeypatch.undo()
    assert torch.equal(import_peft(export_peft(adapter, base, folder), base, "ann").row, adapter.row)
