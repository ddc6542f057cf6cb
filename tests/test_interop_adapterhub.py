"""Are AdapterHub's folders written and read as its library `adapters` 1.3 writes and reads them?

What it wrote is repeated here: it needs another transformers than the one installed beside us.
"""

import json

import pytest
import torch
from hf_bases import assert_same, base_of, ours, random_adapter, theirs
from safetensors.torch import load_file, save_file

from minipeft.errors import InputError
from minipeft.interop import export_adapterhub, import_adapterhub
from minipeft.methods import Houlsby, LoRA, Parallel, Pfeiffer

BERT = {"attn": "encoder.layer.{}.attention.output", "mlp": "encoder.layer.{}.output"}
T5 = {"encoder": ("layer.0", "layer.1"), "decoder": ("layer.0", "layer.2")}  # after attention, after the MLP
LIBRARY = {  # "config" of `seq_bn`, every option as the library writes it
    "adapter_residual_before_ln": False, "cross_adapter": False, "dropout": 0.0, "factorized_phm_W": True,
    "factorized_phm_rule": False, "hypercomplex_nonlinearity": "glorot-uniform", "init_weights": "bert",
    "init_weights_seed": None, "inv_adapter": None, "inv_adapter_reduction_factor": None, "is_parallel": False,
    "learn_phm": True, "leave_out": [], "ln_after": False, "ln_before": False, "mh_adapter": False,
    "non_linearity": "relu", "original_ln_after": True, "original_ln_before": True, "output_adapter": True,
    "phm_bias": True, "phm_c_init": "normal", "phm_dim": 4, "phm_init_range": 0.0001, "phm_layer": False, "phm_rank": 1,
    "reduction_factor": 16, "residual_before_ln": True, "scaling": 1.0, "shared_W_phm": False, "shared_phm_rule": True,
    "stochastic_depth": 0.0, "use_gating": False,
}  # fmt: skip
HOULSBY = {"mh_adapter": True, "non_linearity": "swish", "original_ln_before": False}
PARALLEL = {"init_weights": "mam_adapter", "is_parallel": True, "original_ln_before": False, "reduction_factor": 2,
            "scaling": 4.0}  # fmt: skip
CASES = {  # family, method, what the library's config says beyond seq_bn's, its blocks
    "bert houlsby": ("bert", Houlsby(8, "silu"), HOULSBY, [BERT["attn"], BERT["mlp"]]),
    "bert pfeiffer": ("bert", Pfeiffer(8), {}, [BERT["mlp"]]),
    "bert parallel": ("roberta", Parallel(2, "gelu_tanh"), PARALLEL | {"non_linearity": "gelu_new"}, [BERT["mlp"]]),
    "t5 houlsby": ("t5", Houlsby(8, "gelu"), HOULSBY | {"non_linearity": "gelu"}, [
        f"{stack}.block.{{}}.{part}" for stack, parts in T5.items() for part in parts]),
    "t5 pfeiffer": ("t5", Pfeiffer(8), {}, ["encoder.block.{}.layer.1", "decoder.block.{}.layer.2"]),
    "t5 everywhere": ("t5", Houlsby(8, blocks=("attn", "cross", "mlp")), HOULSBY | {
        "cross_adapter": True, "non_linearity": "relu"}, ["encoder.block.{}.layer.0", "encoder.block.{}.layer.1", *(
            f"decoder.block.{{}}.layer.{i}" for i in range(3))]),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_folders_hold_what_the_library_writes(case, tmp_path):
    family, method, changes, blocks = case
    base = base_of(family)[1]
    adapter = random_adapter(method, base)
    export_adapterhub(adapter, base, tmp_path, "mine")
    tensors, F = load_file(tmp_path / "adapter.safetensors"), int(24 // method.reduction)
    shapes = {"adapter_down.0.weight": (F, 24), "adapter_down.0.bias": (F,), "adapter_up.weight": (24, F),
              "adapter_up.bias": (24,)}  # fmt: skip
    assert {key: tuple(tensor.shape) for key, tensor in tensors.items()} == {
        f"{block.format(layer)}.adapters.mine.{name}": shape
        for block in blocks for layer in range(2) for name, shape in shapes.items()}  # fmt: skip
    options = json.loads((tmp_path / "adapter_config.json").read_text())
    assert options["config"].items() <= (LIBRARY | changes | {"reduction_factor": method.reduction}).items()
    assert (options["name"], options["hidden_size"], options["model_type"]) == ("mine", 24, family)
    assert type(options["config"]["scaling"]) is float  # the library takes no whole number

    for prefix in ("", "transformer." if family == "t5" else f"{family}."):  # of a model with a head
        save_file({prefix + key: tensor for key, tensor in tensors.items()}, tmp_path / "adapter.safetensors")
        options["config"] = LIBRARY | changes | {"reduction_factor": method.reduction}
        (tmp_path / "adapter_config.json").write_text(json.dumps(options))
        back = import_adapterhub(tmp_path, base, "bob")
        assert back.user == "bob" and back.method == method and torch.equal(back.row, adapter.row)


def in_the_librarys_words(x, read, sum_norm, tensors, block, config):
    """adapters.methods.modeling.Adapter's pre_forward, forward and post_forward, of a block's output x."""
    get = lambda name: tensors[f"{block}.adapters.ann.{name}"]  # noqa: E731
    hidden, residual = x, x
    if config["is_parallel"]:
        hidden = read
    elif config["original_ln_before"]:
        hidden = sum_norm(x + read)
    down = torch.relu(hidden @ get("adapter_down.0.weight").T + get("adapter_down.0.bias"))
    up = (down @ get("adapter_up.weight").T + get("adapter_up.bias")) * config["scaling"]
    return sum_norm(up + residual + read)


@pytest.mark.parametrize("method", [Houlsby(4, blocks=("mlp",)), Pfeiffer(4), Parallel(4)], ids=lambda m: m.name)
def test_berts_adapters_compute_what_the_librarys_do(method, tmp_path):
    model, base = base_of("bert")
    adapter = random_adapter(method, base)
    export_adapterhub(adapter, base, tmp_path)
    tensors = load_file(tmp_path / "adapter.safetensors")
    config = LIBRARY | json.loads((tmp_path / "adapter_config.json").read_text())["config"]

    def output_of(layer):
        output, block = model.encoder.layer[layer].output, f"encoder.layer.{layer}.output"
        return lambda module, args, y: in_the_librarys_words(
            output.dense(args[0]), args[1], output.LayerNorm, tensors, block, config)  # fmt: skip

    handles = [model.encoder.layer[i].output.register_forward_hook(output_of(i)) for i in range(2)]
    expected = theirs(model)
    for handle in handles:
        handle.remove()
    assert_same(ours(base, adapter), expected)


def refused(folder, base, *parts):
    with pytest.raises(InputError) as error:
        import_adapterhub(folder, base, "ann")
    message = str(error.value)
    assert "\n" not in message and str(folder) in message
    for part in parts:
        assert part in message, message


OPTIONS = {"leave_out": [0], "ln_before": True, "ln_after": True, "phm_layer": True, "use_gating": True,
           "inv_adapter": "nice", "dropout": 0.1, "scaling": "learned", "reduction_factor": {"default": 16},
           "residual_before_ln": "post_add", "original_ln_after": False, "non_linearity": "tanh",
           "stochastic_depth": 0.1, "some_new_option": 1}  # fmt: skip


@pytest.mark.parametrize("option", OPTIONS)
def test_an_option_that_we_do_not_have_is_named(option, tmp_path):
    base = base_of("bert")[1]
    export_adapterhub(random_adapter(Pfeiffer(8), base), base, tmp_path)
    path = tmp_path / "adapter_config.json"
    options = json.loads(path.read_text())
    options["config"] = LIBRARY | {"reduction_factor": 8}
    path.write_text(json.dumps(options))
    import_adapterhub(tmp_path, base, "ann")
    options["config"][option] = OPTIONS[option]
    path.write_text(json.dumps(options))
    refused(tmp_path, base, option)


def test_folders_of_others_are_refused(tmp_path):
    base = base_of("bert")[1]
    export_adapterhub(random_adapter(Pfeiffer(8), base), base, tmp_path)
    refused(tmp_path, base_of("t5")[1], "encoder.block.0.layer.1.adapters.ann.adapter_down.0.weight is missing")
    refused(tmp_path, base_of("llama")[1], "BERT, RoBERTa and T5")
    path = tmp_path / "adapter_config.json"
    options = json.loads(path.read_text())
    path.write_text(json.dumps(options | {"hidden_size": 30}))
    refused(tmp_path, base, "hidden_size is 30, this base has 24")
    options["config"]["reduction_factor"] = 4
    path.write_text(json.dumps(options))
    refused(tmp_path, base, "adapter_down.0.weight is (3, 24), this base needs (6, 24)")
    options["config"]["is_parallel"] = True
    path.write_text(json.dumps(options))
    refused(tmp_path, base_of("t5")[1], "the stream before its norm")
    del options["version"]
    options["config"] |= {"is_parallel": False, "non_linearity": "gelu"}  # which gelu depends on the version
    path.write_text(json.dumps(options))
    refused(tmp_path, base, "non_linearity")
    (tmp_path / "adapter.safetensors").rename(tmp_path / "pytorch_adapter.bin")
    refused(tmp_path, base, "pickled", "torch.load('pytorch_adapter.bin'")


def test_what_adapterhub_cannot_say_is_not_exported(tmp_path):
    def not_exported(family, method, part, name=None):
        base = base_of(family)[1]
        with pytest.raises(InputError, match=part):
            export_adapterhub(random_adapter(method, base), base, tmp_path / "x", name)
        assert not (tmp_path / "x").exists()

    not_exported("bert", LoRA(2, sites=("q",)), "not lora")
    not_exported("llama", Pfeiffer(8), "not Decoder")
    not_exported("t5", Parallel(8), "before its norm")
    not_exported("bert", Pfeiffer(8, blocks=("layers.1.mlp",)), r"none at layers\.0\.mlp")
    not_exported("bert", Pfeiffer(8), r"'ann\.b'", "ann.b")
