"""AdapterHub's folders for bottleneck adapters, both ways: what the library `adapters` 1.3 writes with use_safetensors.

    adapter_config.json     {"config": {...}, "name": ..., "hidden_size": ...}
    adapter.safetensors     <block>.adapters.<name>.adapter_down.0.weight [F, width]   .bias [F]
                            <block>.adapters.<name>.adapter_up.weight     [width, F]   .bias [width]
    <block>                 BERT  encoder.layer.3.attention.output, encoder.layer.3.output
                            T5    encoder.block.3.layer.0, decoder.block.3.layer.2; layer.1 there is cross-attention

                    its name                 its config                                     what the adapter reads
    Houlsby         double_seq_bn            mh_adapter, output_adapter                     the block's output
    Pfeiffer        seq_bn                   output_adapter, original_ln_before             the sum, after its norm
    parallel        par_bn                   output_adapter, is_parallel, scaling           the stream

The stream is what a BERT's MLP reads, and there our parallel adapter is theirs. A T5 normalises it first: our adapter
reads what the MLP reads, as He et al. (2022) have it, theirs the stream as it is. So on a T5 it is refused.
"""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from minipeft.errors import InputError
from minipeft.interop.folders import (
    ANOTHER,
    NEEDED,
    Options,
    check_alone,
    check_tensors,
    read_options,
    read_tensors,
    write_folder,
)
from minipeft.interop.modules import modules_of, plain
from minipeft.methods.bottleneck import BottleneckMethod, Houlsby, Parallel, Pfeiffer
from minipeft.models.bert import Bert
from minipeft.models.hooks import Sites
from minipeft.models.t5 import T5
from minipeft.schedule import Adapter

WEIGHTS, PICKLED, VERSION = "adapter.safetensors", "pytorch_adapter.bin", "adapters.1.3.0"
BLOCKS = {"attn": "mh_adapter", "cross": "cross_adapter", "mlp": "output_adapter"}  # last word of our block -> option
ACTIVATIONS = {"relu": "relu", "gelu": "gelu", "gelu_tanh": "gelu_new", "silu": "swish"}  # ours -> theirs
OURS = {theirs: ours for ours, theirs in ACTIVATIONS.items()} | {"silu": "silu", "gelu_pytorch_tanh": "gelu_tanh"}
KEYS = {"down": "adapter_down.0.weight", "down_bias": "adapter_down.0.bias",
        "up": "adapter_up.weight", "up_bias": "adapter_up.bias"}  # fmt: skip
ABOUT = ("model_type", "model_class", "model_name", "version", "type", "config_id")
NO_EFFECT = (  # without phm_layer, inv_adapter or ln_after, which are refused, or after training
    "phm_dim", "factorized_phm_W", "shared_W_phm", "shared_phm_rule", "factorized_phm_rule", "phm_c_init",
    "phm_init_range", "learn_phm", "hypercomplex_nonlinearity", "phm_rank", "phm_bias", "inv_adapter_reduction_factor",
    "adapter_residual_before_ln", "init_weights", "init_weights_seed",
)  # fmt: skip


def export_adapterhub(adapter: Adapter, base: Sites, folder: str | Path, name: str | None = None) -> Path:
    """Write a bottleneck adapter as AdapterHub does: model.load_adapter(folder, use_safetensors=True) takes it.

    Args:
        name: what the library calls it; None: the user's id.
    Raises:
        InputError: another method or base, an adapter that AdapterHub's options cannot say, or a name with a dot.
    """
    base, method, folder = plain(base), adapter.method, Path(folder)
    name = adapter.user if name is None else name
    if not isinstance(method, BottleneckMethod):
        raise InputError(f"AdapterHub's folders hold houlsby, pfeiffer and parallel here, not {method.title}; see "
                         "export_peft")  # fmt: skip
    _check_base(method, base)
    if not name or "." in name:
        raise InputError(f"adapter name {name!r}: AdapterHub's names have a letter and no dot; give one by name=")
    check_alone(adapter)
    options = {
        "config": {
            **_placed(method, base), "reduction_factor": method.reduction, "scaling": float(method.scale),
            "non_linearity": ACTIVATIONS[method.activation], "original_ln_before": isinstance(method, Pfeiffer),
            "original_ln_after": True, "residual_before_ln": True, "is_parallel": isinstance(method, Parallel),
        },
        "name": name, "hidden_size": base.config.width, "version": VERSION,
        "model_type": "t5" if isinstance(base, T5) else base.family.prefix.rstrip("."),
        "model_class": "T5ForConditionalGeneration" if isinstance(base, T5) else "BertModel", "model_name": None,
    }  # fmt: skip
    tensors = _keyed(method.tensors(adapter.row.cpu(), base), base, name)
    write_folder(folder, options, WEIGHTS, {key: tensor.contiguous() for key, tensor in tensors.items()})
    return folder


def import_adapterhub(folder: str | Path, base: Sites, user: str) -> Adapter:
    """Read a bottleneck adapter that AdapterHub wrote. A prediction head beside it has files of its own, not read here.

    Raises:
        InputError: no such folder, pickled or damaged weights, another base's adapter (names the first key that
            differs), or an option that minipeft has not (named).
    """
    folder, base = Path(folder), plain(base)
    options, tensors = read_options(folder), read_tensors(folder, WEIGHTS, PICKLED)
    try:
        name, method = _read(options, base)
        _check_base(method, base)
        method.check(base)
        zeros = method.tensors(torch.zeros(method.layout(base).row_size), base)
        needed = _keyed(zeros, base, name)
        prefix = "transformer." if isinstance(base, T5) else base.family.prefix  # of a model with a head
        if all(key.startswith(prefix) for key in tensors):
            tensors = {key.removeprefix(prefix): tensor for key, tensor in tensors.items()}
        check_tensors(tensors, {key: tuple(zero.shape) for key, zero in needed.items()})
        own = {ours: (tensors[key].T if ours.endswith(".up") else tensors[key]).float()
               for ours, key in zip(zeros, needed)}  # fmt: skip
        return Adapter(user, method, method.row(own, base))
    except InputError as error:
        raise InputError(f"{folder}: {error}") from None


def _check_base(method: BottleneckMethod, base: Sites) -> None:
    if not isinstance(base, Bert | T5):
        raise InputError("AdapterHub's folders are read and written for BERT, RoBERTa and T5, not "
                         f"{type(base).__name__}")  # fmt: skip
    if isinstance(method, Parallel) and isinstance(base, T5):
        raise InputError("parallel: on a T5 AdapterHub's reads the stream before its norm and minipeft's after it; "
                         "they are different adapters")


def _placed(method: BottleneckMethod, base: Sites) -> dict[str, bool]:
    """Where AdapterHub shall place adapters: after all blocks of a kind, or none."""
    words = {site: site.rpartition(".")[2] for site in base.blocks}
    chosen = method.chosen(base)
    placed = {words[site] for site in chosen}
    if left := [site for site, word in words.items() if word in placed and site not in chosen]:
        raise InputError(f"{method.name}: AdapterHub places adapters at all blocks of a kind, and this one has none at "
                         f"{left[0]}")  # fmt: skip
    return {option: word in placed for word, option in BLOCKS.items()}


def _keyed(tensors: Mapping[str, Tensor], base: Sites, name: str) -> dict[str, Tensor]:
    """Our tensors, in their order, by AdapterHub's keys and in its shapes. A block is where its norm is."""
    modules, keyed = modules_of(base, headless=True), {}
    for ours, tensor in tensors.items():
        site, _, word = ours.rpartition(".")
        block = modules[f"{site}_norm"].path.rpartition(".")[0]
        keyed[f"{block}.adapters.{name}.{KEYS[word]}"] = tensor.T if word == "up" else tensor
    return keyed


def _read(fields: dict, base: Sites) -> tuple[str, BottleneckMethod]:
    """The adapter's name and method from adapter_config.json."""
    about = Options(fields, {})
    about.drop(*ABOUT)
    name = about.take("name", NEEDED, str)
    if (width := about.take("hidden_size", base.config.width, int)) != base.config.width:
        raise InputError(f"option hidden_size is {width}, this base has {base.config.width}; {ANOTHER}")
    options = Options(about.take("config", NEEDED, dict), {"dropout": 0.0, "stochastic_depth": 0.0})
    about.refuse_rest()

    options.drop(*NO_EFFECT)
    parallel = options.take("is_parallel", False, bool)
    before = options.take("original_ln_before", False, bool)
    options.must_be("original_ln_after", True, default=True, why="needed true, the base's own sum and norm")
    options.must_be("residual_before_ln", True, default=True, why="needed true, what the block gave is added again")
    theirs = options.take("non_linearity", NEEDED, str)
    if theirs not in OURS or ("version" not in fields and theirs.startswith("gelu")):  # which meant gelu_new then
        raise InputError(f"option non_linearity is {theirs!r}; supported are {', '.join(OURS)}, the gelus in files "
                         "that say their version")  # fmt: skip
    method = (Parallel if parallel else Pfeiffer if before else Houlsby)(
        reduction=options.take("reduction_factor", NEEDED, int, float), activation=OURS[theirs],
        blocks=tuple(word for word, option in BLOCKS.items() if options.take(option, False, bool)),
        scale=options.take("scaling", 1.0, int, float),
    )  # fmt: skip
    options.refuse_rest()
    return name, method
