"""Hugging Face PEFT's adapter folders, both ways: adapter_config.json and adapter_model.safetensors, as of peft 0.21.

    base_model.model.<module>.lora_A.weight   [rank, K]      .lora_B.weight [N, rank]     LoRA, rsLoRA, DoRA
                             .lora_magnitude_vector [N]                                   DoRA
                             .lora_embedding_A [rank, vocabulary]  .lora_embedding_B [width, rank]
                             .vera_lambda_d [rank], .vera_lambda_b [N]                    VeRA, and for all modules
    base_model.vera_A [rank, largest K], base_model.vera_B [largest N, rank]
                             .ia3_l [N, 1], at inputs [1, K]                              IA3
                             .ln_tuning_layers.weight, .bias                              LayerNorm tuning
    prompt_embeddings        [V, width]                                                   prompt tuning, P-tuning
                             [V, 2 * layers * H * D]: k and v of layer 0, of layer 1 ...  prefix tuning
"""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from minipeft.errors import InputError
from minipeft.interop import fused
from minipeft.interop.folders import ANOTHER, check_alone, check_tensors, read_options, read_tensors, write_folder
from minipeft.interop.modules import Module, modules_of, plain
from minipeft.interop.peft_config import MANY, method_of, num_pairs, option_values, pair_of
from minipeft.methods.ia3 import IA3
from minipeft.methods.lora import LoRA
from minipeft.methods.method import Method
from minipeft.methods.prefix import PrefixTuning
from minipeft.methods.prompt import PromptTuning
from minipeft.methods.ptuning import PTuning
from minipeft.methods.vera import VeRA
from minipeft.models.hooks import Sites
from minipeft.schedule import Adapter

WEIGHTS, PICKLED = "adapter_model.safetensors", "adapter_model.bin"
ROOT, PROMPT = "base_model.model.", "prompt_embeddings"
KEYS = {  # last word of our tensor's name -> PEFT's name of it below its module
    "A": "lora_A.weight", "B": "lora_B.weight", "m": "lora_magnitude_vector",
    "d": "vera_lambda_d", "d_b": "vera_lambda_b", "l": "ia3_l",
    "weight": "ln_tuning_layers.weight", "bias": "ln_tuning_layers.bias",
}  # fmt: skip
PROJECTIONS = ("base_model.vera_A", "base_model.vera_B")
EMBEDDING_KEYS = {"A": "lora_embedding_A", "B": "lora_embedding_B"}


def export_peft(adapter: Adapter, base: Sites, folder: str | Path, base_name: str | None = None) -> Path:
    """Write an adapter as PEFT does: PeftModel.from_pretrained(model, folder) then computes what minipeft computes.

    model is the base's folder as AutoModelForCausalLM, AutoModelForSeq2SeqLM or, for an encoder, AutoModel reads it.
    What PEFT cannot keep is left behind: the encoder of P-tuning and the MLP of prefixes, of which the results are
    written, and metrics.

    Args:
        base_name: what adapter_config.json calls the base, e.g. its hub id; AutoPeftModel goes by it.
    Raises:
        InputError: PEFT has no such method, the adapter lies over a shared one, or it acts at a part of a fused map as
            the whole cannot (fused.py).
    """
    base, method, folder = plain(base), adapter.method, Path(folder)
    check_alone(adapter)
    options = option_values(method, base, base_name)
    write_folder(folder, options, WEIGHTS, _written(method, adapter.row, base))
    return folder


def import_peft(folder: str | Path, base: Sites, user: str) -> Adapter:
    """Read an adapter that PEFT wrote.

    P-tuning becomes prompt tuning and a projected prefix a plain one: PEFT keeps their results alone. An adapter of a
    fused map becomes one for each of its parts.

    Raises:
        InputError: no such folder, pickled or damaged weights, another base's adapter (names the first key that
            differs), or an option that minipeft has not (named).
    """
    folder, base = Path(folder), plain(base)
    options, tensors = read_options(folder), read_tensors(folder, WEIGHTS, PICKLED)
    try:
        headless = base.family is not None and not any(key.startswith(ROOT + base.family.prefix) for key in tensors)
        modules = modules_of(base, headless)
        method = whole = method_of(options, base, modules)
        used = _used_ranks(whole, tensors, base, modules) if isinstance(whole, LoRA) else {}
        method = fused.narrowed(whole, used, base) if used else whole
        method.check(base)
        if isinstance(method, PrefixTuning):
            own = _prefixes(method, tensors, options, base)
        elif isinstance(method, PromptTuning):
            check_tensors(tensors, {PROMPT: method.shapes(base)["prompt"]})
            own = {"prompt": tensors[PROMPT]}
        else:
            own = _at_modules(method, whole, used, tensors, base, modules)
        return Adapter(user, method, method.row({name: tensor.float() for name, tensor in own.items()}, base))
    except InputError as error:
        raise InputError(f"{folder}: {error}") from None


def _written(method: Method, row: Tensor, base: Sites) -> dict[str, Tensor]:
    """A row [P] as PEFT's file has it."""
    tensors = method.tensors(row.cpu(), base)
    if isinstance(method, PromptTuning):
        return {PROMPT: tensors["prompt"]}
    if isinstance(method, PTuning):
        return {PROMPT: method.computed({name: tensor[None] for name, tensor in tensors.items()})[0].contiguous()}
    if isinstance(method, PrefixTuning):
        prefixes = method.computed({name: tensor[None] for name, tensor in tensors.items()}, base)
        width, pairs = next(iter(prefixes.values())).shape[-1], num_pairs(method, base)
        P = torch.zeros(method.tokens, pairs, 2, width)
        for i, prefix in enumerate(prefixes.values()):  # k and v of layer 0, of layer 1, ...
            P[:, pair_of(i // 2, pairs, base), i % 2] = prefix[0]
        return {PROMPT: P.flatten(1)}
    written = _keyed(method, tensors, base, modules_of(base))
    if isinstance(method, VeRA):
        written |= _projections(method, base)
    return written


def _keyed(method: Method, tensors: Mapping[str, Tensor], base: Sites, modules: Mapping[str, Module]) -> dict:
    """Our tensors by PEFT's keys and in its shapes."""
    keyed, parts = {}, {}
    for name, tensor in tensors.items():
        site, _, word = name.rpartition(".")
        if modules[site].outputs is None:
            keyed |= {key: _shaped(method, site, tensor) for key in _keys(site, word, base, modules)}
        else:
            parts.setdefault(modules[site].path, {}).setdefault(site, {})[word] = tensor
    for path, adapters in parts.items():
        site = next(iter(adapters))
        for word, tensor in fused.join(method, path, adapters, base, modules).items():
            keyed |= {key: _shaped(method, site, tensor) for key in _keys(site, word, base, modules)}
    return keyed


def _shaped(method: Method, site: str, tensor: Tensor) -> Tensor:
    """In PEFT's shape, and alone in its memory, as a file wants it."""
    if isinstance(method, IA3):
        tensor = tensor[None] if method.at_input(site) else tensor[:, None]
    return tensor.clone()


def _keys(site: str, word: str, base: Sites, modules: Mapping[str, Module]) -> list[str]:
    """Where a tensor of ours lies: once in each of the site's modules."""
    key = (EMBEDDING_KEYS if site in base.embeddings else KEYS)[word]
    return [f"{ROOT}{path}.{key}" for path in modules[site].paths]


def _used_ranks(method: LoRA, tensors: Mapping[str, Tensor], base: Sites, modules: Mapping[str, Module]) -> dict:
    """Site -> which ranks of a fused map's adapter it uses."""
    return {site: fused.used_ranks(method, site, _whole(site, tensors, base, modules), base, modules)
            for site in method.chosen(base) if modules[site].outputs is not None}  # fmt: skip


def _whole(site: str, tensors: Mapping[str, Tensor], base: Sites, modules: Mapping[str, Module]) -> fused.Words:
    """A fused map's tensors, those that the file has."""
    keys = {word: _keys(site, word, base, modules)[0] for word in KEYS}
    return {word: tensors[key] for word, key in keys.items() if key in tensors}


def _at_modules(
    method: Method, whole: Method, used: Mapping[str, Tensor], tensors: dict[str, Tensor], base: Sites,
    modules: Mapping[str, Module],
) -> dict[str, Tensor]:  # fmt: skip
    """Our tensors by name from PEFT's. whole: as PEFT has it, before parts of fused maps were left their used ranks."""
    zeros, needed = method.tensors(torch.zeros(method.layout(base).row_size), base), {}
    for name, zero in zeros.items():
        site, _, word = name.rpartition(".")
        is_whole = modules[site].outputs is None
        shape = (tuple(_shaped(method, site, zero).shape) if is_whole else
                 fused.shape(whole, word, site, base, modules))  # fmt: skip
        keys = _keys(site, word, base, modules)
        there = [key for key in keys if key in tensors]
        if there and (absent := [key for key in keys if key not in tensors]):
            raise InputError(f"{absent[0]} is missing beside {there[0]}; here encoder and decoder share one embedding, "
                             "which has one adapter: needed are both, and equal. Train with both as targets.")
        needed |= dict.fromkeys(keys, shape)
    # PEFT writes the frozen table beside an adapter of the embedding or the head.
    frozen = dict.fromkeys(base.embeddings, base.embed) | {site: base.linears[site] for site in base.heads}
    tables = {f"{ROOT}{path}.base_layer.weight": table.weight for site, table in frozen.items()
              for path in modules[site].paths}  # fmt: skip
    check_tensors(tensors, needed, may=[*tables, *(PROJECTIONS if isinstance(method, VeRA) else ())])
    projections = _projections(method, base) if isinstance(method, VeRA) else {}
    for key, own in (tables | projections).items():
        if key in tensors and not torch.equal(own.detach().cpu().to(tensors[key].dtype), tensors[key]):
            raise InputError(f"{key} is not what this base has; was it trained on another base, or with an embedding "
                             "or projections of its own?")  # fmt: skip
    own = {}
    for name, zero in zeros.items():
        site, _, word = name.rpartition(".")
        key, *twins = _keys(site, word, base, modules)
        if other := [twin for twin in twins if not torch.equal(tensors[twin], tensors[key])]:
            raise InputError(f"{key} and {other[0]} differ; here they are one place, which has one adapter")
        outputs, part = modules[site].outputs, tensors[key]
        if outputs is not None:
            part = fused.part(word, _whole(site, tensors, base, modules), outputs, used.get(site))
        own[name] = part.reshape(zero.shape)
    return own


def _projections(method: VeRA, base: Sites) -> dict[str, Tensor]:
    return dict(zip(PROJECTIONS, method.projections(base)))


def _prefixes(method: PrefixTuning, tensors: dict[str, Tensor], options: dict, base: Sites) -> dict[str, Tensor]:
    """Our prefixes by name from PEFT's one tensor."""
    shapes = method.shapes(base)  # k and v of each layer
    layers, (V, width) = len(shapes) // 2, next(iter(shapes.values()))
    pairs = options.get("num_layers") or layers
    if type(pairs) is not int or not layers <= pairs <= MANY or not (pairs == layers or method.hf_compat):
        raise InputError(f"option num_layers is {pairs}, this base has {layers}; {ANOTHER}")
    check_tensors(tensors, {PROMPT: (V, pairs * 2 * width)})
    P = tensors[PROMPT].view(V, pairs, 2, width)
    return {name: P[:, pair_of(i // 2, pairs, base), i % 2] for i, name in enumerate(shapes)}
